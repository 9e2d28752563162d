"""A file of named arrays that is whole or is not used.

Layout: magic, length and CRC-32 of a JSON header, the header, then the arrays at multiples of 64
bytes. The header holds the key (what the arrays were made from), some facts, and each array's type,
shape, place and CRC-32.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MAGIC = b"MGORDER\x01"
_START = struct.Struct("<8sII")  # magic, bytes of the header, its CRC-32
_ALIGN = 64
_READ = 1 << 22  # bytes read at a time for a CRC-32
_MAX_HEADER = 1 << 20

Facts = Mapping[str, int]


class Damaged(Exception):
    """The file is not there, not whole, or not what it should be."""


class NewArray(NamedTuple):
    """An array to be written: its blocks along the first axis together have `shape`."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    blocks: Iterable[npt.NDArray[Any]]


class Place(NamedTuple):
    """Where an array lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int  # bytes
    crc: str

    @property
    def size(self) -> int:
        """Bytes of the array."""
        return _bytes(self.dtype, self.shape)

    def rows(self, first: int, stop: int) -> tuple[int, int]:
        """Byte offset in the file, and bytes, of rows [first, stop)."""
        row = _bytes(self.dtype, self.shape[1:])
        return self.offset + first * row, (stop - first) * row


class Header(NamedTuple):
    """What is known of a file without reading an array."""

    facts: Facts
    places: Mapping[str, Place]


@dataclass(frozen=True)
class ArrayFile:
    """An open file: facts and read-only maps of its arrays."""

    facts: Facts
    arrays: Mapping[str, npt.NDArray[Any]]


def write_arrays(file: IO[bytes], key: str, facts: Facts, arrays: Mapping[str, NewArray]) -> None:
    """Write a whole file; blocks are asked for in order and never held together.

    Args:
        file: new and empty, open for writing; flushed to the disk at the end.
        key: what the arrays were made from.
        facts: numbers to be known without reading an array.
        arrays: in the order in which they are made.
    """
    table = {
        name: {"dtype": new.dtype.str, "shape": list(new.shape), "offset": 0, "crc": f"{0:08x}"}
        for name, new in arrays.items()
    }
    # Offsets and sums are known later; they are given the room that they will need.
    room = len(_header_bytes(key, facts, table)) + 20 * len(table)
    offset = _aligned(_START.size + room)
    for name, new in arrays.items():
        table[name]["offset"] = offset
        offset += _bytes(new.dtype, new.shape)
        offset = _aligned(offset)
    for name, new in arrays.items():
        file.seek(int(str(table[name]["offset"])))
        crc, rows = 0, 0
        for block in new.blocks:
            data = _raw(np.ascontiguousarray(block, dtype=new.dtype))
            crc = zlib.crc32(data, crc)
            rows += len(block)
            file.write(data)
        assert rows == new.shape[0], f"{name}: {rows} rows of {new.shape}"
        table[name]["crc"] = f"{crc:08x}"
    file.truncate(offset)
    header = _header_bytes(key, facts, table).ljust(room)
    file.seek(0)
    file.write(_START.pack(_MAGIC, len(header), zlib.crc32(header)) + header)
    file.flush()
    os.fsync(file.fileno())


def map_arrays(path: Path, header: Header) -> ArrayFile:
    """Map the arrays of a file whose header was read.

    Raises:
        Damaged: it cannot be mapped.
    """
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise Damaged(f"it cannot be mapped ({error})") from error
    arrays = {
        name: np.asarray(whole[place.offset : place.offset + place.size])
        .view(place.dtype)
        .reshape(place.shape)
        for name, place in header.places.items()
    }
    return ArrayFile(header.facts, arrays)


def read_header(path: Path, key: str, check_up_to: int) -> Header:
    """Header of a file that is whole.

    Args:
        path: the file.
        key: what its arrays must have been made from.
        check_up_to: largest file in bytes whose arrays are read and held against their CRC-32;
            of a larger one only header and size are checked.

    Raises:
        Damaged: it is not there, not whole, or not what it should be.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(file, key)
            expected = _aligned(max(place.offset + place.size for place in header.places.values()))
            if size != expected:
                raise Damaged(f"it has {size} bytes, its header asks for {expected}")
            if size <= check_up_to:
                _check_arrays(file, header)
    except FileNotFoundError:
        raise Damaged("it does not exist") from None
    except OSError as error:
        raise Damaged(f"it cannot be read ({error})") from error
    return header


def _read_header(file: IO[bytes], key: str) -> Header:
    start = file.read(_START.size)
    if len(start) < _START.size or start[: len(_MAGIC)] != _MAGIC:
        raise Damaged("it has no header")
    _, length, crc = _START.unpack(start)
    header = file.read(min(length, _MAX_HEADER))
    if zlib.crc32(header) != crc:
        raise Damaged("its header is damaged")
    content = json.loads(header)
    if content["key"] != key:
        raise Damaged("it was made from something else")
    places = {
        name: Place(np.dtype(entry["dtype"]), tuple(entry["shape"]), entry["offset"], entry["crc"])
        for name, entry in content["arrays"].items()
    }
    return Header(content["facts"], places)


def _check_arrays(file: IO[bytes], header: Header) -> None:
    for name, place in header.places.items():
        file.seek(place.offset)
        crc, left = 0, place.size
        while left and (data := file.read(min(left, _READ))):
            crc = zlib.crc32(data, crc)
            left -= len(data)
        if f"{crc:08x}" != place.crc:
            raise Damaged(f"its array {name} is damaged")


def _raw(array: npt.NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, not copied."""
    return array.reshape(-1).view(np.uint8).data


def _header_bytes(key: str, facts: Facts, table: Mapping[str, Any]) -> bytes:
    return json.dumps({"key": key, "facts": dict(facts), "arrays": table}).encode("ascii")


def _bytes(dtype: np.dtype[Any], shape: Iterable[int]) -> int:
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN
