"""The `.bin/.idx` format byte for byte, round trips, and every corruption named."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedDataset, IndexedWriter, token_dtype
from tests.data.pairs import idx_bytes, write_tokens


@pytest.mark.parametrize(("vocab", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i")])
def test_the_writer_is_byte_golden(tmp_path, vocab, code, letter):
    prefix = tmp_path / "new" / "data"
    with IndexedWriter(str(prefix), token_dtype(vocab)) as writer:
        writer.append([1, 2])
        writer.append([3])
        writer.end_sequence()
        writer.append([65000, 5])
        writer.end_sequence()
        writer.end_document()  # two sequences
        writer.add_document([7])
    size = struct.calcsize(letter)
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack(f"<6{letter}", 1, 2, 3, 65000, 5, 7)
    assert Path(f"{prefix}.idx").read_bytes() == (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + bytes([code])
        + struct.pack("<QQ", 3, 3)
        + struct.pack("<3i", 3, 2, 1)
        + struct.pack("<3q", 0, 3 * size, 5 * size)
        + struct.pack("<3q", 0, 2, 3)
    )
    assert sorted(p.name for p in prefix.parent.iterdir()) == ["data.bin", "data.idx"]


def test_the_reader_reads_what_the_format_says(tmp_path):
    (tmp_path / "a.bin").write_bytes(struct.pack("<6i", 1, 2, 3, 70000, 5, 7))
    (tmp_path / "a.idx").write_bytes(idx_bytes([3, 0, 2, 1], code=4, itemsize=4))
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert len(dataset) == 4
    assert [dataset.sequence(i).tolist() for i in range(4)] == [[1, 2, 3], [], [70000, 5], [7]]
    assert dataset.documents.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens[0] = 1


@pytest.mark.parametrize("boundaries", [0, 1])
def test_no_document_at_all(tmp_path, boundaries):
    (tmp_path / "a.bin").write_bytes(b"")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, boundaries)
    (tmp_path / "a.idx").write_bytes(header + bytes(8 * boundaries))
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert (len(dataset), len(dataset.tokens)) == (0, 0)


def test_an_empty_pair_is_written_and_read(tmp_path):
    with IndexedWriter(str(tmp_path / "a"), token_dtype(100)):
        pass
    assert (tmp_path / "a.idx").read_bytes() == idx_bytes([])
    assert len(IndexedDataset(str(tmp_path / "a"))) == 0


def test_offsets_beyond_4_gib(tmp_path):
    """A sparse file: 3 sequences of 2^30 int32 tokens, so that byte offsets pass 2^32."""
    length, prefix = 1 << 30, tmp_path / "big"
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(3 * length * 4)
        file.seek(2 * length * 4)
        file.write(struct.pack("<2i", 11, 12))
        file.seek(3 * length * 4 - 4)
        file.write(struct.pack("<i", 13))
    Path(f"{prefix}.idx").write_bytes(idx_bytes([length] * 3, code=4, itemsize=4))
    dataset = IndexedDataset(str(prefix))
    last = dataset.sequence(2)
    assert (int(last[0]), int(last[1]), int(last[-1]), len(last)) == (11, 12, 13, length)
    assert int(dataset.sequence(1)[-1]) == 0


def test_the_writer_computes_pointers_beyond_4_gib(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.indexed._CHUNK", 2)
    writer = IndexedWriter(str(tmp_path / "a"), token_dtype(70000))
    for _ in range(5):  # as if 2^30 tokens had been appended to each
        writer._length = 1 << 30
        writer.end_sequence()
        writer.end_document()
    writer.commit()
    content = (tmp_path / "a.idx").read_bytes()
    pointers = struct.unpack_from("<5q", content, 34 + 4 * 5)
    assert pointers == tuple((1 << 32) * i for i in range(5))


def test_an_exception_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(str(tmp_path / "a"), token_dtype(9)) as writer:
        writer.add_document([1])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("token", [-1, 1 << 16])
def test_an_id_that_does_not_fit_is_refused(tmp_path, token):
    writer = IndexedWriter(str(tmp_path / "a"), token_dtype(9))
    with pytest.raises(DataError, match=rf"{token} does not fit uint16"):
        writer.add_document([1, token])
    writer.close()
    assert list(tmp_path.iterdir()) == []


def _patched(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


LENGTHS, POINTERS, DOCUMENTS = 34, 34 + 4 * 3, 34 + 12 * 3  # of the three documents below
CORRUPTIONS = {
    "bin truncated": lambda b, i: b.write_bytes(b.read_bytes()[:-2]),
    "bin empty": lambda b, i: b.write_bytes(b""),
    "bin odd": lambda b, i: b.write_bytes(b.read_bytes()[:-1]),
    "bin gone": lambda b, i: b.unlink(),
    "bin longer": lambda b, i: b.write_bytes(b.read_bytes() + bytes(2)),
    "idx truncated": lambda b, i: i.write_bytes(i.read_bytes()[:-1]),
    "idx header cut": lambda b, i: i.write_bytes(i.read_bytes()[:20]),
    "idx empty": lambda b, i: i.write_bytes(b""),
    "idx gone": lambda b, i: i.unlink(),
    "dtype int32": lambda b, i: _patched(i, 17, b"\x04"),
    "dtype uint8": lambda b, i: _patched(i, 17, b"\x01"),
    "dtype float": lambda b, i: _patched(i, 17, b"\x07"),
    "dtype unknown": lambda b, i: _patched(i, 17, b"\x63"),
    "length": lambda b, i: _patched(i, LENGTHS, struct.pack("<2i", 5, 3)),
    "negative length": lambda b, i: _patched(i, LENGTHS, struct.pack("<2i", 9, -1)),
    "negative length that adds up": lambda b, i: (
        _patched(i, LENGTHS, struct.pack("<3i", 4, -2, 10)),
        _patched(i, POINTERS, struct.pack("<3q", 0, 8, 4)),
    ),
    "first pointer": lambda b, i: _patched(i, POINTERS, struct.pack("<q", 2)),
    "middle pointer": lambda b, i: _patched(i, POINTERS + 8, struct.pack("<q", 6)),
    "first document": lambda b, i: _patched(i, DOCUMENTS, struct.pack("<q", 1)),
    "last document": lambda b, i: _patched(i, DOCUMENTS + 24, struct.pack("<q", 4)),
    "documents backwards": lambda b, i: _patched(i, DOCUMENTS + 8, struct.pack("<2q", 2, 1)),
    "int32 data": lambda b, i: b.write_bytes(np.arange(12, dtype="<i4").tobytes()),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_refused_by_the_name_of_the_file(tmp_path, name):
    prefix = write_tokens(tmp_path / "data", np.arange(12), documents=3)  # lengths 4, 4, 4
    assert len(IndexedDataset(prefix)) == 3
    CORRUPTIONS[name](Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    with pytest.raises(DataError, match=r"data\.(bin|idx).*preprocess_data|data.*correct the path"):
        IndexedDataset(prefix)


def test_swapped_files_are_refused(tmp_path):
    one = write_tokens(tmp_path / "one", np.arange(12), documents=3)
    two = write_tokens(tmp_path / "two", np.arange(14), documents=3)
    Path(f"{one}.bin").rename(tmp_path / "third.bin")
    Path(f"{two}.bin").rename(f"{one}.bin")
    with pytest.raises(DataError, match=r"one\.bin has 28 bytes"):
        IndexedDataset(one)


def test_an_uncounted_end_of_document_is_explained(tmp_path):
    """Megatron-DeepSpeed's preprocessing with --append-eod: 3 documents, 3 tokens too many."""
    prefix = write_tokens(tmp_path / "data", np.arange(12), documents=3)
    Path(f"{prefix}.bin").write_bytes(bytes(2 * 15))
    with pytest.raises(DataError, match=r"3 tokens less for 3 documents.*mend_index\.py"):
        IndexedDataset(prefix)
