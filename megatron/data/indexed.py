"""Megatron's `.bin/.idx` pairs: a reader over read-only maps and a writer that commits by renaming.

`.bin` holds the tokens of all sequences end to end; `.idx` the length and byte offset of each
sequence and the sequences at which documents begin. Layout: megatron/data/indexed_header.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron.checkpoint.atomic import replacing
from megatron.config.errors import DataError
from megatron.data.indexed_header import DTYPES, HEADER, MAGIC, VERSION, read_header

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.integer[Any]]

UINT16_VOCAB_LIMIT = 65500  # the format's own limit, a little below 2^16
_LENGTH_LIMIT = 2**31  # lengths are int32
_CHUNK = 1 << 20  # sequences checked or written at a time
_WINDOW = 1 << 12  # sequences checked in one place of a large index


def file_dtype(name: str) -> np.dtype[Any]:
    """The format's dtype of this name, in the format's byte order."""
    return np.dtype(name).newbyteorder("<")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """dtype that Megatron's tools give a vocabulary: uint16 below 65500, else int32."""
    return file_dtype("uint16" if vocab_size < UINT16_VOCAB_LIMIT else "int32")


def map_array(path: str, dtype: np.dtype[Any], count: int, offset: int = 0) -> npt.NDArray[Any]:
    """Read-only map of `count` values at byte `offset` of a file, shape (count,)."""
    if count == 0:
        return np.empty(0, dtype=dtype)  # the system refuses to map nothing
    try:
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: {count} values of {dtype} at byte {offset} cannot be mapped ({error}); "
            "is the file complete and readable?"
        ) from error


class DocumentPart(NamedTuple):
    """Tokens of one document that are part of a sample."""

    document: int  # of the file
    offset: int  # of the first of them in the document
    length: int


class IndexedDataset:
    """A `.bin/.idx` pair, mapped when first used."""

    def __init__(self, prefix: str, check: bool = True) -> None:
        """Open `<prefix>.bin` and `<prefix>.idx`.

        Args:
            prefix: both paths without their suffix.
            check: also read the whole index and compare it with the data (`check_index`).

        Raises:
            DataError: a file is missing, truncated, of another kind, or the two disagree.
        """
        self.prefix = prefix
        self.header = read_header(prefix, allow_empty=True)
        self.dtype = file_dtype(self.header.dtype)
        if check:
            self.check_index()

    def __len__(self) -> int:
        """Number of sequences."""
        return self.header.sequences

    @cached_property
    def tokens(self) -> TokenArray:
        """All tokens of `.bin`, shape (tokens,)."""
        return map_array(f"{self.prefix}.bin", self.dtype, self.header.tokens)

    @cached_property
    def lengths(self) -> Int32Array:
        """Tokens of each sequence, shape (sequences,)."""
        return self._index(np.dtype("<i4"), HEADER.size, len(self))

    @cached_property
    def pointers(self) -> Int64Array:
        """Byte offset in `.bin` of each sequence, shape (sequences,)."""
        return self._index(np.dtype("<i8"), HEADER.size + 4 * len(self), len(self))

    @cached_property
    def documents(self) -> Int64Array:
        """First sequence of each document, then the number of sequences, (documents + 1,)."""
        offset = HEADER.size + 12 * len(self)
        return self._index(np.dtype("<i8"), offset, self.header.document_boundaries)

    def sequence(self, i: int) -> TokenArray:
        """Tokens of sequence `i`, a view of the map."""
        start = int(self.pointers[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[i])]

    def check_index(self, windows: int | None = None) -> None:
        """Compare lengths, pointers and documents with each other and with `.bin`.

        Args:
            windows: check only this many windows of a larger index, both ends among them; None:
                check all of it.

        Raises:
            DataError: they disagree; names the file and the first sequence that is wrong.
        """
        if windows is not None and len(self) > windows * _WINDOW:
            return self._check_windows(windows)
        path, total = f"{self.prefix}.idx", 0
        for first in range(0, len(self), _CHUNK):
            lengths = self.lengths[first : first + _CHUNK].astype(np.int64)
            if lengths.min() < 0:
                self._refuse(
                    path, f"sequence {first + int(lengths.argmin())} has a negative length"
                )
            ends = total + np.cumsum(lengths)
            expected = (ends - lengths) * self.dtype.itemsize
            wrong = np.flatnonzero(self.pointers[first : first + _CHUNK] != expected)
            if len(wrong):
                i = int(wrong[0])
                self._refuse(
                    path,
                    f"sequence {first + i} has byte offset {self.pointers[first + i]}, "
                    f"but the lengths before it add up to {expected[i]}",
                )
            total = int(ends[-1])
        if total != self.header.tokens:
            self._refuse(
                f"{self.prefix}.bin",
                f"{self.header.tokens} tokens, but the lengths add up to {total}",
            )
        documents = self.documents
        if len(documents) == 0 and len(self) == 0:
            return  # some writers leave the table of an empty file empty
        if not len(documents) or documents[0] != 0 or documents[-1] != len(self):
            self._refuse(path, f"the document table does not run from 0 to {len(self)}")
        for first in range(0, len(documents) - 1, _CHUNK):
            if (np.diff(documents[first : first + _CHUNK + 1]) < 0).any():
                self._refuse(path, "the document table goes backwards")

    def _check_windows(self, windows: int) -> None:
        path, size = f"{self.prefix}.idx", self.dtype.itemsize
        for place in range(windows):
            first = place * (len(self) - _WINDOW) // (windows - 1)
            window = slice(first, first + _WINDOW)
            lengths = self.lengths[window].astype(np.int64) * size
            pointers = self.pointers[window]
            wrong = np.flatnonzero((lengths[:-1] < 0) | (np.diff(pointers) != lengths[:-1]))
            if len(wrong) or (place == 0 and pointers[0] != 0):
                i = first + int(wrong[0]) + 1 if len(wrong) else 0
                self._refuse(
                    path,
                    f"sequence {i} has byte offset {self.pointers[i]}, which is not where the one "
                    "before it ends",
                )
            documents = self.documents[window]
            if (np.diff(documents) < 0).any() or documents.max(initial=0) > len(self):
                self._refuse(path, "the document table goes backwards or beyond its end")

    def _index(self, dtype: np.dtype[Any], offset: int, count: int) -> npt.NDArray[Any]:
        return np.ndarray((count,), dtype, buffer=self._map, offset=offset)

    @cached_property
    def _map(self) -> npt.NDArray[np.uint8]:
        """The whole index; one map takes a third of the time of three."""
        path = f"{self.prefix}.idx"
        size = HEADER.size + 12 * len(self) + 8 * self.header.document_boundaries
        return map_array(path, np.dtype(np.uint8), size)

    def _refuse(self, path: str, problem: str) -> None:
        raise DataError(
            f"{path}: {problem}; copy the pair again or make it with tools/preprocess_data.py"
        )


class IndexedWriter:
    """Writes a `.bin/.idx` pair under temporary names that `commit` replaces by the real ones.

    As a context manager it commits at the end of the block and removes its files on an exception.
    Memory stays constant: lengths and documents wait on disk until the index is written.
    """

    def __init__(self, prefix: str, dtype: np.dtype[Any]) -> None:
        """Begin the pair; folders of `prefix` are made."""
        self.prefix = prefix
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        assert self._dtype.name in {name for name, _ in DTYPES.values()}, self._dtype
        self._length = 0
        folder = Path(prefix).parent
        folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(".bin.partial", f".{Path(prefix).name}-", folder)
        os.fchmod(handle, 0o644)  # mkstemp's 0600 would keep a data set from the group
        self._data = open(path, "wb", opener=lambda *_: handle)  # noqa: SIM115 (close closes it)
        # Nameless, so that the system removes them with the process.
        self._lengths = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._documents = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._documents.write(np.int64(0).tobytes())

    def append(self, tokens: npt.ArrayLike) -> None:
        """Add tokens to the sequence that is being written.

        Raises:
            DataError: an id does not fit the file's dtype.
        """
        values = np.asarray(tokens)
        if values.size == 0:
            return
        limits = np.iinfo(self._dtype)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > limits.max:
            raise DataError(
                f"{self.prefix}.bin: token id {low if low < 0 else high} does not fit "
                f"{self._dtype} [0, {limits.max}]; was the vocabulary given right?"
            )
        self._data.write(np.ascontiguousarray(values, dtype=self._dtype).data)
        self._length += values.size

    def end_sequence(self) -> None:
        """Close the sequence; one of no tokens is kept as such."""
        if self._length >= _LENGTH_LIMIT:
            raise DataError(
                f"{self.prefix}.idx: a sequence of {self._length} tokens, the format holds 2^31 - 1"
            )
        self._lengths.write(np.int32(self._length).tobytes())
        self.num_sequences += 1
        self.num_tokens += self._length
        self._length = 0

    def end_document(self) -> None:
        """Close the document at the last closed sequence."""
        assert self._length == 0, "end_sequence comes before end_document"
        self._documents.write(np.int64(self.num_sequences).tobytes())
        self.num_documents += 1

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Add a document of one sequence."""
        self.append(tokens)
        self.end_sequence()
        self.end_document()

    def commit(self) -> None:
        """Write the index, then give both files their names; an index marks complete data."""
        assert self._length == 0, "the last sequence was not ended"
        try:
            self._data.flush()
            os.fsync(self._data.fileno())
            data = Path(self._data.name)
            commit_pair(data, self.prefix, self._dtype, self._lengths, self._documents)
        finally:
            self.close()

    def close(self) -> None:
        """Drop what was not committed."""
        self._data.close()
        Path(self._data.name).unlink(missing_ok=True)
        self._lengths.close()
        self._documents.close()

    def __enter__(self) -> IndexedWriter:
        """The writer itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Commit, or drop everything on an exception."""
        if kind is None:
            self.commit()
        else:
            self.close()


def write_index(
    index: IO[bytes], dtype: np.dtype[Any], lengths: IO[bytes], documents: IO[bytes] | None = None
) -> None:
    """Write an `.idx` from its tables, a block at a time.

    Args:
        index: to write to.
        dtype: of the tokens.
        lengths: int32, of each sequence; readable.
        documents: int64, the table of documents; None: each sequence is one.
    """
    sequences = lengths.seek(0, os.SEEK_END) // 4
    entries = sequences + 1 if documents is None else documents.seek(0, os.SEEK_END) // 8
    code = {name: code for code, (name, _) in DTYPES.items()}[dtype.name]
    index.write(HEADER.pack(MAGIC, VERSION, code, sequences, entries))
    for block in _blocks(lengths):
        index.write(block)
    start = 0
    for block in _blocks(lengths):
        sizes = np.frombuffer(block, dtype="<i4").astype(np.int64)
        ends = start + np.cumsum(sizes)
        index.write(((ends - sizes) * dtype.itemsize).astype("<i8").tobytes())
        start = int(ends[-1])
    if documents is not None:
        for block in _blocks(documents):
            index.write(block)
    else:
        for first in range(0, entries, _CHUNK):
            index.write(np.arange(first, min(first + _CHUNK, entries), dtype="<i8").tobytes())


def commit_pair(
    data: Path,
    prefix: str,
    dtype: np.dtype[Any],
    lengths: IO[bytes],
    documents: IO[bytes] | None = None,
) -> None:
    """Write the index of finished data and name both, the index last: it marks complete data.

    Args:
        data: the complete token file, on the disk; renamed.
        prefix: of the pair.
        dtype, lengths, documents: as in `write_index`.
    """
    path = Path(f"{prefix}.idx")
    with replacing(path) as index:
        write_index(index, dtype, lengths, documents)
        path.unlink(missing_ok=True)  # an old index must not meet the new data
        os.replace(data, f"{prefix}.bin")


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The whole file in blocks of `_CHUNK` values or less."""
    file.flush()
    file.seek(0)
    while block := file.read(8 * _CHUNK):
        yield block
