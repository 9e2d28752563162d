"""A file of named arrays that is whole or is not used, in the format of safetensors.

Its metadata holds the key (what the arrays were made from), some facts, and one CRC-32 of the
header (computed with zeros in its place) and one of all arrays.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

_LENGTH = struct.Struct("<Q")  # bytes of the JSON header, which comes next
_NO_CRC = "00000000"
_READ = 1 << 22  # bytes read at a time for a CRC-32
_DTYPES = {"U8": "|u1", "U16": "<u2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}


class Damaged(Exception):
    """The file is missing, incomplete, or made from something else."""


class NewArray(NamedTuple):
    """An array to be written; its blocks, joined along the first axis, have `shape`."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterable[npt.NDArray[Any]]


@dataclass(frozen=True)
class ArrayFile:
    """A whole file: its facts, and dtype, shape and byte offset of each array."""

    path: Path
    facts: Mapping[str, int]
    table: Mapping[str, tuple[np.dtype[Any], tuple[int, ...], int]]

    @cached_property
    def arrays(self) -> Mapping[str, npt.NDArray[Any]]:
        """Read-only maps of the arrays."""
        whole = np.memmap(self.path, dtype=np.uint8, mode="r")
        return {
            name: np.ndarray(shape, dtype, whole, offset)
            for name, (dtype, shape, offset) in self.table.items()
        }


def write_arrays(
    file: IO[bytes], key: str, facts: Mapping[str, int], arrays: Mapping[str, NewArray]
) -> None:
    """Write a whole file; blocks are made in order and never held together.

    Args:
        file: new and empty, open for writing.
        key: what the arrays were made from.
        facts: numbers available without reading an array.
        arrays: in the order in which they are made.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    metadata = {"key": key, "facts": json.dumps(facts), "crc": _NO_CRC, "header_crc": _NO_CRC}
    header: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, new in arrays.items():
        start, stop = stop, stop + math.prod(new.shape) * new.dtype.itemsize
        header[name] = {
            "dtype": names[new.dtype.str], "shape": new.shape, "data_offsets": [start, stop],
        }  # fmt: skip
    file.write(_packed(header))  # of its final length
    crc = 0
    for name, new in arrays.items():
        rows = 0
        for block in new.blocks:
            data = np.ascontiguousarray(block, dtype=new.dtype).reshape(-1).view(np.uint8).data
            crc = zlib.crc32(data, crc)
            rows += len(block)
            file.write(data)
        assert rows == new.shape[0], f"{name}: {rows} rows of {new.shape}"
    metadata["crc"] = f"{crc:08x}"
    metadata["header_crc"] = f"{zlib.crc32(_packed(header)):08x}"
    file.seek(0)
    file.write(_packed(header))


def read_arrays(path: Path, key: str, check_up_to: int) -> ArrayFile:
    """A file that is whole; reads its header, and its arrays only to check them.

    Args:
        path: the file.
        key: what its arrays must have been made from.
        check_up_to: largest file in bytes whose arrays are read and compared with their CRC-32;
            of a larger one only header and size are checked.

    Raises:
        Damaged: it is missing, incomplete, or made from something else.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(file, size)
            metadata = header.pop("__metadata__")
            if metadata["key"] != key:
                raise Damaged("it was made from something else")
            expected = start + max(entry["data_offsets"][1] for entry in header.values())
            if size != expected:
                raise Damaged(f"it has {size} bytes, but its header gives {expected}")
            if size <= check_up_to and f"{_crc_of_rest(file):08x}" != metadata["crc"]:
                raise Damaged("its arrays are damaged")
    except FileNotFoundError:
        raise Damaged("it does not exist") from None
    except OSError as error:
        raise Damaged(f"it cannot be read ({error})") from error
    table = {
        name: (
            np.dtype(_DTYPES[entry["dtype"]]),
            tuple(entry["shape"]),
            start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }
    return ArrayFile(path, json.loads(metadata["facts"]), table)


def _read_header(file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The sound header of a file of `size` bytes, and where the arrays begin."""
    start = file.read(_LENGTH.size)
    length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else size
    if _LENGTH.size + length > size:
        raise Damaged("it has no whole header")
    try:
        header: dict[str, Any] = json.loads(file.read(length))
        crc = header["__metadata__"]["header_crc"]
        header["__metadata__"]["header_crc"] = _NO_CRC
        sound = f"{zlib.crc32(_packed(header)):08x}" == crc
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise Damaged("its header is damaged")
    return header, _LENGTH.size + length


def _crc_of_rest(file: IO[bytes]) -> int:
    crc = 0
    while data := file.read(_READ):
        crc = zlib.crc32(data, crc)
    return crc


def _packed(header: Mapping[str, Any]) -> bytes:
    """Length and JSON of a header, which ends at a multiple of 8 bytes."""
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text
