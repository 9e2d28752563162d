"""The header of a Megatron `.idx` file, and whether it and its `.bin` belong together.

Reads a few bytes per file, so that thousands of files are checked before a run starts.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from megatron.config.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
# code -> (numpy name, bytes); floats are part of the format but cannot hold tokens
DTYPES = {
    1: ("uint8", 1),
    2: ("int8", 1),
    3: ("int16", 2),
    4: ("int32", 4),
    5: ("int64", 8),
    6: ("float64", 8),
    7: ("float32", 4),
    8: ("uint16", 2),
}
REMAKE = "make it again with tools/preprocess_data.py"


class IndexHeader(NamedTuple):
    """What an index states about its token file.

    Attributes:
        tokens: that belong to its sequences.
        left_out: tokens of `.bin` after them, left out on purpose (`left_out_path`).
    """

    dtype: str
    item_bytes: int
    sequences: int
    document_boundaries: int
    tokens: int
    left_out: int = 0


def read_header(prefix: str, allow_empty: bool = False) -> IndexHeader:
    """The checked header of `<prefix>.idx`.

    Args:
        prefix: path of the pair without its suffix.
        allow_empty: accept a pair without tokens.

    Raises:
        DataError: where a file is missing, is no Megatron index, is empty, or does not add up.
    """
    index, tokens = f"{prefix}.idx", f"{prefix}.bin"
    index_bytes, token_bytes = _size(index, prefix), _size(tokens, prefix)
    try:
        # Unbuffered: three short reads per file, for thousands of files.
        with open(index, "rb", buffering=0) as stream:
            header = _checked(stream, index, index_bytes, tokens, token_bytes)
    except OSError as error:
        raise DataError(f"{index} cannot be read: {error}") from None
    if header.tokens == 0 and not allow_empty:
        raise DataError(f"{tokens} holds no tokens; remove it from the list or {REMAKE}")
    return header


def _size(path: str, prefix: str) -> int:
    """Bytes of a file of the pair."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} does not exist; {_where(prefix)}")
    return status.st_size


def left_out_path(prefix: str) -> Path:
    """The note that accepts tokens of `.bin` after those that the index counts.

    `tools/mend_index.py --as-reference` writes it: {"left_out": tokens}.
    """
    return Path(f"{prefix}.left-out.json")


def stated(stream: FileIO, index: str, index_bytes: int) -> IndexHeader:
    """What an index states by itself; no token file is looked at.

    Args:
        stream: the index, at its start.
        index: its path, for messages.
        index_bytes: its size.

    Raises:
        DataError: it is no Megatron index of tokens, or truncated.
    """
    start = stream.read(HEADER.size)
    if start[: len(MAGIC)] != MAGIC:
        raise DataError(f"{index} is not a Megatron index (it starts with {start[:9]!r}); {REMAKE}")
    if len(start) < HEADER.size:
        raise DataError(
            f"{index} is truncated: {index_bytes} bytes are less than its header; {REMAKE}"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(start)
    if version != VERSION:
        raise DataError(f"{index} has version {version}, known is {VERSION}; {REMAKE}")
    if code not in DTYPES or DTYPES[code][0].startswith("float"):
        raise DataError(f"{index} has dtype code {code}, which holds no tokens; {REMAKE}")
    dtype, item_bytes = DTYPES[code]
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if index_bytes != expected:
        raise DataError(
            f"{index} has {index_bytes} bytes, but its header gives {HEADER.size} + 12 x "
            f"{sequences} + 8 x {boundaries} = {expected}; {REMAKE}"
        )
    length, offset = _last_sequence(stream, sequences) if sequences else (0, 0)
    return IndexHeader(dtype, item_bytes, sequences, boundaries, offset // item_bytes + length)


def _checked(
    stream: FileIO, index: str, index_bytes: int, tokens: str, token_bytes: int
) -> IndexHeader:
    header = stated(stream, index, index_bytes)
    end = header.tokens * header.item_bytes
    if end == token_bytes:
        return header
    left_out, rest = divmod(token_bytes - end, header.item_bytes)
    if rest == 0 and left_out > 0 and _accepted(tokens.removesuffix(".bin")) == left_out:
        return header._replace(left_out=left_out)
    documents = max(header.document_boundaries - 1, 0)
    reason, fix = "", REMAKE
    if rest == 0 and 0 < left_out <= documents:
        # Megatron-DeepSpeed's tool writes the token of --append-eod without counting it.
        reason = f", {left_out} tokens less for {documents} documents (uncounted EOD?)"
        prefix = tokens.removesuffix(".bin")
        fix = f"mend the index with `python3 tools/mend_index.py {prefix}`, or {REMAKE}"
    raise DataError(
        f"{tokens} has {token_bytes} bytes, its index ends at {header.tokens} x "
        f"{header.item_bytes} = {end}{reason}; {fix}"
    )


def _accepted(prefix: str) -> int | None:
    """Tokens that a note leaves out; None without one."""
    path = left_out_path(prefix)
    try:
        return int(json.loads(path.read_text(encoding="ascii"))["left_out"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} cannot be read ({error!r}); remove it") from error


def _last_sequence(stream: FileIO, sequences: int) -> tuple[int, int]:
    """Tokens and byte offset of the last sequence."""
    stream.seek(HEADER.size + 4 * (sequences - 1))
    (length,) = struct.unpack("<i", stream.read(4))
    stream.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
    (offset,) = struct.unpack("<q", stream.read(8))
    return length, offset


def _where(prefix: str) -> str:
    """The fix for a missing file."""
    if Path(prefix).is_absolute():
        return "correct the path in the list, or remove the line"
    return (
        f"paths are relative to the working folder ({Path.cwd()}): correct it, or remove the line"
    )
