"""Text files as units of work of bounded size: JSON lines, plain, gzip or zstd; tables; text.

Units depend on the input alone, not on the number of workers. Plain JSON and Parquet are split by
reference, so that workers read them; the rest is a stream that one process reads and distributes:
compressed lines, Arrow tables, data sets of the Hub, text.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron.config.errors import ConfigError, DataError
from megatron.data.prepare import hub
from megatron.data.text_files import HUB, is_plain

UNIT_BYTES = 2 << 20  # of JSON lines, a unit
PIECE_CHARACTERS = 1 << 20  # of a text file, a unit
_ZSTD_BLOCK = 1 << 17
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True)
class Unit:
    """A part of one input file.

    Attributes:
        kind: range (bytes of JSON lines), lines (JSON lines themselves), rows (a row group of
            Parquet), text (a piece of one document).
        start, stop: of a range; start alone of rows.
        data: lines or text.
        ends_document: False for a piece of text that another one follows.
        input_bytes: bytes of the file on disk that this unit covers.
    """

    path: str
    kind: str
    start: int = 0
    stop: int = 0
    data: bytes = b""
    ends_document: bool = True
    input_bytes: int = 0


@dataclass(frozen=True)
class Bad:
    """An unusable document: its line or row, counted from 0 within its unit, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Texts:
    """What a unit holds: the texts of each key, how many lines it took, and what is bad."""

    by_key: dict[str, list[str]]
    lines: int
    bad: list[Bad]


def units(paths: Iterable[str], keys: Sequence[str]) -> Iterator[Unit]:
    """All units of the files, in order."""
    for path in paths:
        if path.endswith(".parquet"):
            yield from _row_groups(path, keys)
        elif path.startswith(HUB):
            yield from _row_lines(path, hub.rows(path, keys), keys)
        elif path.endswith(".arrow"):
            yield from _row_lines(path, _arrow_rows(path, keys), keys)
        elif is_plain(path):
            yield from _text_pieces(path)
        elif path.endswith(_COMPRESSED):
            yield from _compressed_lines(path)
        else:
            size = Path(path).stat().st_size
            for start in range(0, size, UNIT_BYTES):
                stop = min(start + UNIT_BYTES, size)
                yield Unit(path, "range", start, stop, input_bytes=stop - start)


def texts(unit: Unit, keys: Sequence[str]) -> Texts:
    """The texts of a unit.

    Raises:
        DataError: a file is damaged.
    """
    if unit.kind == "text":
        return Texts({keys[0]: [unit.data.decode()]}, 0, [])
    if unit.kind == "rows":
        return _rows(unit, keys)
    return _documents(_range_lines(unit) if unit.kind == "range" else io.BytesIO(unit.data), keys)


def _range_lines(unit: Unit) -> Iterator[bytes]:
    """Lines that begin within the range."""
    with open(unit.path, "rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the end of a line that began before
        while file.tell() < unit.stop and (line := file.readline()):
            yield line


def _documents(lines: Iterable[bytes], keys: Sequence[str]) -> Texts:
    by_key: dict[str, list[str]] = {key: [] for key in keys}
    bad: list[Bad] = []
    count = 0
    for number, line in enumerate(lines):
        count += 1
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            bad.append(Bad(number, str(error)))
            continue
        problem = _problem(document, keys)
        if problem:
            bad.append(Bad(number, problem))
            continue
        for key in keys:
            by_key[key].append(document[key])
    return Texts(by_key, count, bad)


def _problem(document: Any, keys: Sequence[str]) -> str | None:
    if not isinstance(document, dict):
        return f"not a JSON object but {type(document).__name__}"
    for key in keys:
        if key not in document:
            return f"no key {key!r}; it has {', '.join(map(repr, list(document)[:8]))}"
        value = document[key]
        if not isinstance(value, str):
            return f"{key!r} is not text but {type(value).__name__}"
        if not _is_unicode(value):
            return f"{key!r} holds half a surrogate pair"
    return None


def _is_unicode(text: str) -> bool:
    """JSON may hold `\\ud800`, which no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _damaged(path: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Adds the file's name to a library's error about damage."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except kinds as error:
        raise DataError(
            f"{path}: damaged or truncated ({error}); fetch it again, or leave it out"
        ) from error


def _compressed_lines(path: str) -> Iterator[Unit]:
    opened = _open_zstd if path.endswith(".zst") else _open_gzip
    with open(path, "rb") as raw, _damaged(path, (OSError, EOFError, zlib.error)):
        stream = opened(raw)
        before = 0
        while lines := stream.readlines(UNIT_BYTES):
            read = raw.tell()
            yield Unit(path, "lines", data=b"".join(lines), input_bytes=read - before)
            before = read


def _open_gzip(raw: IO[bytes]) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=raw)


def _open_zstd(raw: IO[bytes]) -> io.BufferedIOBase:
    return io.BufferedReader(_ZstdStream(raw, _library("zstandard", raw.name)), 1 << 20)


class _ZstdStream(io.RawIOBase):
    """Frames of zstd, one after the other.

    The library's own reader takes a truncated file for a whole one.
    """

    def __init__(self, raw: IO[bytes], library: Any) -> None:
        self._raw = raw
        self._library = library
        self._frame: Any = None  # None between frames
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Next bytes; 0 at the end of the last frame."""
        while not self._ready:
            block = self._raw.read(_ZSTD_BLOCK)
            if not block:
                if self._frame is None:
                    return 0
                raise EOFError("the last frame has no end")
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._library.ZstdError as error:
                raise OSError(str(error)) from error
            if self._frame.eof:
                self._raw.seek(-len(self._frame.unused_data), io.SEEK_CUR)  # the next frame's
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _text_pieces(path: str) -> Iterator[Unit]:
    """Pieces of a text file, split at line ends where there are any, so that memory is bounded."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            piece = file.read(PIECE_CHARACTERS)
            while piece:
                following = file.read(PIECE_CHARACTERS)
                if following:
                    end = _last_split(piece)
                    piece, following = piece[:end], piece[end:] + following
                data = piece.encode()
                yield Unit(path, "text", data=data, ends_document=not following,
                           input_bytes=len(data))  # fmt: skip
                piece = following
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 text ({error}); convert it, for example with iconv"
        ) from error


def split_text(text: str) -> list[str]:
    """A giant document in pieces of bounded size, split before words; others whole.

    The ids of the pieces are those of the whole for every tokenizer whose words are independent
    (words.py); for others ids next to a split may differ.
    """
    pieces = []
    while len(text) > 2 * PIECE_CHARACTERS:
        end = _last_split(text[:PIECE_CHARACTERS])
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


def _last_split(text: str) -> int:
    """The last place before a space that follows printable ASCII; else a line end, else the end."""
    place = len(text)
    while (place := text.rfind(" ", 1, place)) > 0:
        if "!" <= text[place - 1] <= "~":
            return place
    return text.rfind("\n", 0, len(text) - 1) + 1 or len(text)


def _row_groups(path: str, keys: Sequence[str]) -> Iterator[Unit]:
    parquet = _library("pyarrow.parquet", path)
    with _damaged(path, (OSError, ValueError)), parquet.ParquetFile(path) as file:
        _require_columns(path, keys, file.schema_arrow.names)
        groups = file.metadata.num_row_groups
        share = Path(path).stat().st_size // max(groups, 1)
        for group in range(groups):
            yield Unit(path, "rows", group, input_bytes=share)


def _arrow_rows(path: str, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of a table that `datasets` saved: a stream of batches, or a file of them."""
    arrow = _library("pyarrow", path)
    ipc = _library("pyarrow.ipc", path)
    with _damaged(path, (OSError, ValueError)), arrow.memory_map(path) as source:
        try:
            reader = ipc.open_stream(source)
        except arrow.ArrowInvalid:
            table = ipc.open_file(source)
            reader = (table.get_batch(i) for i in range(table.num_record_batches))
            names = table.schema.names
        else:
            names = reader.schema.names
        _require_columns(path, keys, names)
        for batch in reader:
            yield from batch.select(list(keys)).to_pylist()


def _row_lines(path: str, rows: Iterable[dict[str, Any]], keys: Sequence[str]) -> Iterator[Unit]:
    """Rows as JSON lines, some megabytes at a time; the file's size is that of its text here."""
    lines: list[bytes] = []
    size = 0
    for row in rows:
        line = json.dumps({key: row.get(key) for key in keys}).encode() + b"\n"
        lines.append(line)
        size += len(line)
        if size >= UNIT_BYTES:
            yield Unit(path, "lines", data=b"".join(lines), input_bytes=size)
            lines, size = [], 0
    if lines:
        yield Unit(path, "lines", data=b"".join(lines), input_bytes=size)


def _require_columns(path: str, keys: Sequence[str], names: Sequence[str]) -> None:
    missing = [key for key in keys if key not in names]
    if missing:
        raise ConfigError(
            f"--json-keys {' '.join(missing)}: {path} has the columns {', '.join(names[:8])}; give "
            "the one with the text (DATA_KEY of a run)"
        )


def _rows(unit: Unit, keys: Sequence[str]) -> Texts:
    parquet = _library("pyarrow.parquet", unit.path)
    by_key: dict[str, list[str]] = {key: [] for key in keys}
    bad: list[Bad] = []
    with _damaged(unit.path, (OSError, ValueError)), parquet.ParquetFile(unit.path) as file:
        table = file.read_row_group(unit.start, columns=list(keys))
        columns = [table.column(key).to_pylist() for key in keys]
    for number, values in enumerate(zip(*columns, strict=True)):
        problem = _problem(dict(zip(keys, values, strict=True)), keys)
        if problem:
            bad.append(Bad(number, problem))
            continue
        for key, value in zip(keys, values, strict=True):
            by_key[key].append(value)
    return Texts(by_key, table.num_rows, bad)


def _library(name: str, path: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ConfigError(
            f"{path} needs the library {package}: run `python3 -m pip install {package}`"
        ) from error
