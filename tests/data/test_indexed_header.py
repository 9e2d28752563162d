"""The header of an index, and everything that can be wrong with a pair of files."""

import pytest

from megatron.config.errors import DataError
from megatron.data.indexed_header import read_header
from tests.config.helpers import write_pair


def test_a_good_pair(tmp_path):
    write_pair(tmp_path / "a", [3, 5, 2])
    header = read_header(str(tmp_path / "a"))
    assert (header.dtype, header.item_bytes, header.sequences, header.tokens) == (
        "uint16",
        2,
        3,
        10,
    )
    write_pair(tmp_path / "b", [7], code=4, item_bytes=4)
    assert read_header(str(tmp_path / "b")).dtype == "int32"


def _set(path, position, value):
    content = bytearray(path.read_bytes())
    content[position : position + len(value)] = value
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda index, tokens: index.unlink(), "does not exist"),
        (lambda index, tokens: tokens.unlink(), "does not exist"),
        (lambda index, tokens: _set(index, 0, b"TNTIDX"), "not a Megatron index"),
        (lambda index, tokens: _set(index, 9, b"\x02"), "version 2"),
        (lambda index, tokens: _set(index, 17, b"\x07"), "dtype code 7"),
        (lambda index, tokens: _set(index, 17, b"\x63"), "dtype code 99"),
        (lambda index, tokens: index.write_bytes(index.read_bytes()[:20]), "truncated"),
        (lambda index, tokens: index.write_bytes(index.read_bytes()[:-1]), "header gives"),
        (lambda index, tokens: index.write_bytes(b""), "not a Megatron index"),
        (
            lambda index, tokens: index.write_bytes(index.read_bytes() + b"\0"),
            "but its header gives",
        ),
        (lambda index, tokens: _set(index, 18, b"\x04"), "header gives"),
        (lambda index, tokens: tokens.write_bytes(tokens.read_bytes()[:-2]), "18 bytes"),
        (lambda index, tokens: tokens.write_bytes(tokens.read_bytes() + b"\0\0"), "22 bytes"),
    ],
)
def test_damage_is_named(tmp_path, damage, word):
    write_pair(tmp_path / "a", [3, 5, 2])
    damage(tmp_path / "a.idx", tmp_path / "a.bin")
    with pytest.raises(DataError, match=word):
        read_header(str(tmp_path / "a"))


def test_empty_pairs(tmp_path):
    write_pair(tmp_path / "none", [])
    write_pair(tmp_path / "zero", [0])
    for name in ("none", "zero"):
        with pytest.raises(DataError, match="holds no"):
            read_header(str(tmp_path / name))
