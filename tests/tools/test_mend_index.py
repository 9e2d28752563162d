"""tools/mend_index.py: data whose index does not count the end of its documents.

The writer below does what the preprocess of argonne-lcf/Megatron-DeepSpeed does with --append-eod:
the tokens of a document go to `.bin` with the end-of-document id behind them, the lengths of its
sentences into the index without it; a text without tokens leaves an empty document and no id.
"""

import os
import random
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron.config.errors import DataError
from megatron.data.data_list import parse_data_list
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_header import left_out_path, read_header
from megatron.data.prepare.checks import check_files
from megatron.data.prepare.merge import merge_pairs
from tools import check_data, mend_index

EOD = 9
Document = list[list[int]]  # sentences, without the EOD


def reference_writes(prefix: Path, documents: list[Document], eod: int = EOD) -> str:
    """A pair as the reference's tool writes it."""
    tokens: list[int] = []
    lengths: list[int] = []
    boundaries = [0]
    for document in documents:
        sentences = [sentence for sentence in document if sentence]
        ids = [token for sentence in sentences for token in sentence]
        tokens += [*ids, eod] if ids else []
        lengths += [len(sentence) for sentence in sentences]
        boundaries.append(len(lengths))
    pointers = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, "<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 8, len(lengths), len(boundaries))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(boundaries)}q", *boundaries)
    )
    return str(prefix)


def reference_reads(prefix: str) -> list[list[int]]:
    """Its sequences, as its reader gives them: at the offset of the index, of the length there."""
    content = Path(f"{prefix}.idx").read_bytes()
    count, boundaries = struct.unpack_from("<QQ", content, 18)
    lengths = struct.unpack_from(f"<{count}i", content, 34)
    pointers = struct.unpack_from(f"<{count}q", content, 34 + 4 * count)
    del boundaries
    data = Path(f"{prefix}.bin").read_bytes()
    return [
        list(struct.unpack_from(f"<{n}H", data, start))
        for n, start in zip(lengths, pointers, strict=True)
    ]


def texts(documents: list[Document]) -> list[list[int]]:
    """What a reader should find: each document's tokens and its EOD; nothing for an empty one."""
    flat = [[token for sentence in document for token in sentence] for document in documents]
    return [[*ids, EOD] if ids else [] for ids in flat]


def documents_of(dataset: IndexedDataset) -> list[list[int]]:
    """All tokens of each document."""
    edges = dataset.documents.tolist()
    return [
        [int(token) for i in range(first, last) for token in dataset.sequence(i)]
        for first, last in pairwise(edges)
    ]


def drawn(seed: int) -> list[Document]:
    """Documents of any shape: empty, of one token, of several sentences."""
    draw = random.Random(seed)
    return [
        [[draw.randrange(9) for _ in range(draw.choice((0, 1, 2, 17)))] for _ in range(sentences)]
        for sentences in (draw.choice((0, 1, 1, 1, 3)) for _ in range(draw.randrange(1, 40)))
    ] + [[[1, 2]]]


THREE: list[Document] = [[[1, 2, 3]], [[4, 5]], [[6, 7, 1, 2]]]


def call(*arguments: str | Path) -> int:
    return mend_index.main([str(argument) for argument in arguments])


def test_three_documents(tmp_path, capsys):
    prefix = reference_writes(tmp_path / "a", THREE)
    data, index = Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()
    with pytest.raises(DataError, match=rf"3 tokens less for 3 doc.*mend_index\.py {prefix}"):
        read_header(prefix)
    assert call(prefix, "--check") == 1
    assert "0 right, 1 to be mended, 0 bad" in capsys.readouterr().out
    assert Path(f"{prefix}.idx").read_bytes() == index
    assert call(prefix) == 0
    told = "3 documents (0 to 2), each without its last token, id 9: 9 tokens counted, 12 true, 3 "
    assert f"{told}gained" in capsys.readouterr().out
    assert documents_of(IndexedDataset(prefix)) == [[1, 2, 3, 9], [4, 5, 9], [6, 7, 1, 2, 9]]
    assert Path(f"{prefix}.bin").read_bytes() == data
    assert Path(f"{prefix}.idx.uncounted-eod").read_bytes() == index
    assert call(prefix) == 0, "a mended pair is right"
    assert "every token is counted (mended before)" in capsys.readouterr().out


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_every_document_comes_back(block, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.prepare.uncounted_eod._BLOCK", block)
    for seed in range(25):
        documents = drawn(seed)
        prefix = reference_writes(tmp_path / f"{block}-{seed}", documents)
        assert call(prefix) == 0
        dataset = IndexedDataset(prefix)
        assert documents_of(dataset) == texts(documents)
        assert dataset.header.tokens == sum(len(text) for text in texts(documents))


@pytest.mark.parametrize("block", [1, 3, 1 << 18])
def test_read_as_the_reference_read_it(block, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.data.prepare.uncounted_eod._BLOCK", block)
    for seed in range(25):
        documents = drawn(seed)
        prefix = reference_writes(tmp_path / f"{block}-{seed}", documents)
        index = Path(f"{prefix}.idx").read_bytes()
        assert call(prefix, "--as-reference") == 0
        assert Path(f"{prefix}.idx").read_bytes() == index
        dataset = IndexedDataset(prefix)
        read = [dataset.sequence(i).tolist() for i in range(len(dataset))]
        assert read == reference_reads(prefix)
        assert dataset.tokens.tolist() == [token for ids in read for token in ids]
        assert dataset.header.left_out == sum(1 for text in texts(documents) if text)


def test_what_is_left_out_is_said_and_can_be_undone(tmp_path, capsys):
    prefix = reference_writes(tmp_path / "a", THREE)
    listed = tmp_path / "list.txt"
    listed.write_text(f"1 {prefix} a\n")
    assert call(prefix, "--as-reference") == 0
    assert "3 tokens at the end left out, document k begins k tokens early" in (
        capsys.readouterr().out
    )
    report = check_files(parse_data_list(listed), 10)
    assert not report.problems
    assert "3 tokens at the ends are left out" in report.warnings()[-1]
    assert check_data.main([str(listed), "--deep"]) == 0
    assert "3 tokens at the ends are left out" in capsys.readouterr().out
    with pytest.raises(DataError, match="3 tokens that its index leaves out"):
        merge_pairs([prefix], str(tmp_path / "merged"))
    with open(f"{prefix}.bin", "ab") as file:
        file.write(bytes(2))
    with pytest.raises(DataError, match="has 26 bytes"):
        read_header(prefix)  # the note accepts its own number only
    os.truncate(f"{prefix}.bin", 24)
    assert call(prefix) == 0
    assert not left_out_path(prefix).exists()
    assert read_header(prefix).left_out == 0
    assert call(prefix, "--as-reference") == 3, "mended: only from another folder"
    assert "give --out DIR" in capsys.readouterr().err
    assert call(prefix, "--as-reference", "--out", tmp_path / "old") == 0
    assert read_header(str(tmp_path / "old/a")).left_out == 3


@pytest.mark.parametrize("mode", [[], ["--as-reference"]])
def test_a_folder_that_cannot_be_written_to(mode, tmp_path, capsys):
    a = reference_writes(tmp_path / "data/x/part", THREE)
    b = reference_writes(tmp_path / "data/y/part", [[[5]], [[6]]])
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.*")}
    good = reference_writes(tmp_path / "data/y/good", [[[5, EOD]]], eod=0)
    Path(f"{good}.bin").write_bytes(np.array([5, EOD], "<u2").tobytes())
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"# mine\n0.5 {a}.bin x\n\n0.25 {b} y\n0.25 {good} y\ncorpus y max_epochs=2\n"
    )
    for _ in range(2):  # again: the same
        assert call(listed, "--out", tmp_path / "out", *mode) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert len(list((tmp_path / "data").rglob("*.*"))) == len(before) + 2
    assert "1 right, 2" in capsys.readouterr().out
    sources = parse_data_list(tmp_path / "out/list.txt")
    assert [source.prefix for source in sources] == [
        str(tmp_path / "out/x/part"), str(tmp_path / "out/y/part"), good,
    ]  # fmt: skip
    assert [(source.weight, source.corpus) for source in sources] == [
        (0.5, "x"), (0.25, "y"), (0.25, "y"),
    ]  # fmt: skip
    for source in sources:
        IndexedDataset(source.prefix)
    if not mode:
        assert documents_of(IndexedDataset(sources[1].prefix)) == [[5, EOD], [6, EOD]]


def test_wrong_in_another_way_is_refused_and_left_alone(tmp_path, capsys):
    def attempt(prefix: str, *more: str) -> str:
        index = Path(f"{prefix}.idx").read_bytes()
        assert call(prefix, *more) == 3
        assert Path(f"{prefix}.idx").read_bytes() == index
        assert not Path(f"{prefix}.idx.uncounted-eod").exists()
        return capsys.readouterr().err

    cut = reference_writes(tmp_path / "cut", THREE)
    os.truncate(f"{cut}.bin", 22)
    assert "holds 11 tokens, cut.idx counts 9: 2 more, but 3 documents" in attempt(cut)
    other = reference_writes(tmp_path / "other", THREE)
    tokens = np.fromfile(f"{other}.bin", "<u2")
    tokens[6] = 8  # of document 1
    tokens.tofile(f"{other}.bin")
    assert "token 6, where document 1 would end, has id 8, not 9" in attempt(other)
    assert "has id 9, not 7" in attempt(reference_writes(tmp_path / "eod", THREE), "--eod", "7")
    odd = reference_writes(tmp_path / "odd", THREE)
    os.truncate(f"{odd}.bin", 23)
    assert "no multiple of the 2 of a token" in attempt(odd)
    table = reference_writes(tmp_path / "table", THREE)
    content = bytearray(Path(f"{table}.idx").read_bytes())
    content[34 + 12 + 8] += 2  # offset of sequence 1
    Path(f"{table}.idx").write_bytes(content)
    assert "do not agree" in attempt(table)


def test_killed_before_the_new_index_is_in_place(tmp_path, monkeypatch):
    prefix = reference_writes(tmp_path / "a", THREE)
    index = Path(f"{prefix}.idx").read_bytes()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("megatron.data.prepare.uncounted_eod.write_index", killed)
        call(prefix)
    assert Path(f"{prefix}.idx").read_bytes() == index
    assert call(prefix) == 0
    assert documents_of(IndexedDataset(prefix)) == texts(THREE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.bin", "a.idx", "a.idx.uncounted-eod",
    ]  # fmt: skip
