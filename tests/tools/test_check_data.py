"""tools/check_data.py: a table of what is well, and each bad file by name and fix."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import ByteTokenizer, NullTokenizer
from tests.data.pairs import idx_bytes, write_tokens
from tools import check_data

BYTES = ("--tokenizer-type", "ByteTokenizer")
COUNT = 60_000  # beyond the places that are looked at without --deep


def documents(seed: int) -> np.ndarray:
    """Four documents that end with 256."""
    tokens = np.random.default_rng(seed).integers(0, 256, COUNT)
    tokens[COUNT // 4 - 1 :: COUNT // 4] = 256
    return tokens


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A list of three good files in two corpora."""
    lines = []
    for number, corpus in enumerate(("books", "books", "code")):
        prefix = write_tokens(tmp_path / f"part{number}", documents(number), documents=4)
        write_note(prefix, ByteTokenizer(), append_eod=True)
        lines.append(f"1 {prefix} {corpus}\n")
    (tmp_path / "list.txt").write_text("".join(lines))
    return tmp_path


def run(folder: Path, *arguments: str) -> int:
    return check_data.main([str(folder / "list.txt"), *arguments])


def test_good_data(data, capsys):
    for deep in ((), ("--deep",)):
        assert run(data, *BYTES, *deep) == 0
        table = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert table[0][:3] == ["corpus", "files", "documents"]
        assert table[1][:6] == ["books", "2", "8", "120,000", "uint16", "256"]
        assert table[1][-1] == "0" and table[2][0] == "code"
        assert table[-1] == ["3", "files,", "0", "bad"]
    assert run(data) == 0  # the notes say which vocabulary


def test_deep_sees_one_wrong_id(data, capsys):
    tokens = documents(1)
    tokens[23456] = 300
    path = data / "part1.bin"
    path.write_bytes(tokens.astype("<u2").tobytes())
    assert run(data, "--vocab-size", "257", "--deep") == 3
    assert "BAD: " in (said := capsys.readouterr().out)
    assert "part1.bin: token 23456 has id 300, outside the vocabulary [0, 257)" in said
    assert "3 files, 1 bad" in said


def test_the_same_content_under_two_names(data, capsys):
    for suffix in ("bin", "idx", "tokenizer.json"):
        (data / f"part2.{suffix}").write_bytes((data / f"part0.{suffix}").read_bytes())
    for deep in ((), ("--deep",)):
        assert run(data, *BYTES, *deep) == 3
        said = capsys.readouterr().out
        assert f"part2.bin has the same {'tokens' if deep else 'size'}" in said
        assert "remove one from the list" in said


def test_lengths_that_do_not_count_the_end_of_document(data, capsys):
    """What one program writes: each length is one short, so documents drift."""
    tokens = documents(0)
    lengths = [COUNT // 4 - 1] * 3 + [COUNT // 4 + 3]
    (data / "part0.idx").write_bytes(idx_bytes(lengths))
    (data / "part0.bin").write_bytes(tokens.astype("<u2").tobytes())
    assert run(data, *BYTES, "--deep") == 3
    assert "part0.idx: document 0 does not end with the end-of-document id 256" in (
        capsys.readouterr().out
    )


def test_every_bad_file_is_named(data, capsys):
    (data / "part0.bin").write_bytes(b"")
    index = bytearray((data / "part2.idx").read_bytes())
    struct.pack_into("<q", index, 34 + 4 * 4 + 8, 77)
    (data / "part2.idx").write_bytes(index)
    assert run(data) == 3
    said = capsys.readouterr().out
    assert "part0.bin" in said and "part2.idx: sequence 1 has byte offset 77" in said
    assert "3 files, 2 bad" in said
    (data / "part0.idx").unlink()
    (data / "part0.tokenizer.json").unlink()
    assert run(data) == 3
    assert "do not name their tokenizer" not in capsys.readouterr().out  # of a file not there


def test_files_of_two_tokenizers_are_bad(data, capsys):
    write_note(str(data / "part1"), NullTokenizer(257), append_eod=True)
    assert run(data) == 3
    said = capsys.readouterr().out
    assert "part1.bin was made with" in said and "3 files, 1 bad" in said
    assert "the files of a list have one tokenizer" in said


def test_json_and_settings(data, capsys):
    assert run(data, "--json", *BYTES) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert [file["tokens"] for file in found["files"]] == [COUNT] * 3
    assert run(data, "--tokenizer-type", "NullTokenizer", "--vocab-size", "257") == 3
    assert "made with another tokenizer" in capsys.readouterr().out
    assert run(data, "--tokenizer-type", "HFTokenizer") == 2
    assert run(data, "--workers", "0") == 2
    assert check_data.main([str(data / "gone.txt")]) == 3
