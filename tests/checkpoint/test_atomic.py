"""A file is found whole or not at all, and a failure leaves the old one."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.checkpoint.atomic import replacing, write_atomically


def test_a_reader_finds_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "1\n")
    with path.open(encoding="utf-8") as reader:  # it has begun to read the old one
        write_atomically(path, b"2\n", durable=False)
        assert reader.read() == "1\n"
    assert path.read_text(encoding="utf-8") == "2\n"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "1\n")
    with pytest.raises(OSError, match="disk full"), replacing(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert path.read_text(encoding="utf-8") == "1\n"
    assert list(tmp_path.iterdir()) == [path]
