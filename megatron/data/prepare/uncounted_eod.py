"""Indexes that do not count the token that ends each document, as Megatron-DeepSpeed's
`preprocess_data.py --append-eod` writes them: document k begins k tokens early, and the last tokens
of the file belong to none.

Nothing here writes to a `.bin`. Tables are read through maps, a block of documents at a time.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron.checkpoint.atomic import replacing, write_atomically
from megatron.config.errors import DataError
from megatron.data.indexed import (
    Int32Array,
    Int64Array,
    TokenArray,
    file_dtype,
    map_array,
    write_index,
)
from megatron.data.indexed_header import HEADER, IndexHeader, left_out_path, stated

_BLOCK = 1 << 18  # documents
_LONGEST = 2**31 - 1  # tokens of a sequence


class Uncounted(NamedTuple):
    """A pair whose index does not count the end of its documents.

    Attributes:
        index_path: the index itself, or, of a mended pair, the one that was kept.
        header: what it states; `tokens` are those that it counts.
        documents: that hold tokens; each lacks one.
        empty: documents without a sequence.
        eod: id at the true end of each document.
    """

    prefix: str
    index_path: Path
    header: IndexHeader
    documents: int
    empty: int
    eod: int

    @property
    def tokens(self) -> int:
        """Of the token file: one more per document than are counted."""
        return self.header.tokens + self.documents


def kept_index(prefix: str) -> Path:
    """Where the index from before the mending is kept."""
    return Path(f"{prefix}.idx.uncounted-eod")


def examine(prefix: str, eod: int | None = None, kept: bool = False) -> Uncounted | None:
    """What is not counted, proved on the sizes and on the id at each true end; None: all is right.

    Args:
        prefix: of the pair.
        eod: the id that ends documents; None: whichever is at the first end.
        kept: look at the index that was kept, where there is one.

    Raises:
        DataError: index and tokens disagree in another way, with the arithmetic.
    """
    index = kept_index(prefix) if kept and kept_index(prefix).exists() else Path(f"{prefix}.idx")
    header, tables, tokens = _opened(prefix, index)
    empty = tables.check(index)
    documents = max(header.document_boundaries - 1, 0) - empty
    missing = len(tokens) - header.tokens
    if missing == 0:
        return None
    if missing != documents:
        raise DataError(
            f"{prefix}.bin holds {len(tokens)} tokens, {index.name} counts {header.tokens}: "
            f"{missing} more, but {documents} documents hold tokens. Not the data of --append-eod; "
            "copy the pair again or make it again with tools/preprocess_data.py"
        )
    found = _only_end(prefix, tables, tokens, eod, uncounted=True)
    return Uncounted(prefix, index, header, documents, empty, found)


def mend(found: Uncounted, target: str) -> None:
    """Write the index that counts every token, read it back, and only then put it in place.

    Args:
        found: the pair.
        target: prefix of the mended pair; the pair's own keeps the old index, another links to the
            tokens.

    Raises:
        DataError: another index is kept already, or another file is at the target.
    """
    if target == found.prefix:
        _keep(found)
    else:
        _link(found, target)
    header, tables, tokens = _opened(found.prefix, found.index_path)
    folder = Path(target).parent
    with (
        tempfile.TemporaryFile(dir=folder) as lengths,
        tempfile.TemporaryFile(dir=folder) as documents,
        replacing(Path(f"{target}.idx")) as file,
    ):
        documents.write(bytes(8))
        for table in tables.blocks():
            counted = tables.lengths[table[0] : table[-1]].copy()
            ends = table[1:][np.diff(table) > 0] - 1 - table[0]
            if len(ends) and counted[ends].max() == _LONGEST:
                raise DataError(f"{found.prefix}.idx: a sequence has {_LONGEST} tokens already")
            counted[ends] += 1
            lengths.write(counted.tobytes())
            documents.write(table[1:].astype("<i8").tobytes())
        write_index(file, file_dtype(header.dtype), lengths, documents)
        file.flush()
        written = Path(file.name)
        again = _Tables.of(written, _stated(written))
        again.check(written)
        assert _stated(written).tokens == len(tokens) == found.tokens
        _only_end(found.prefix, again, tokens, found.eod, uncounted=False)
    left_out_path(target).unlink(missing_ok=True)  # of an earlier choice


def accept_as_reference(found: Uncounted, target: str) -> None:
    """Let the pair be read as the reference read it: the old index, the last tokens left out.

    Raises:
        DataError: the pair is mended and no other target is given, or a file is at the target.
    """
    if target != found.prefix:
        _link(found, target)
        with found.index_path.open("rb") as old, replacing(Path(f"{target}.idx")) as new:
            shutil.copyfileobj(old, new)
    elif found.index_path != Path(f"{found.prefix}.idx"):
        raise DataError(
            f"{found.prefix}.idx is mended; give --out DIR to read the kept index from there"
        )
    write_atomically(left_out_path(target), json.dumps({"left_out": found.documents}) + "\n")


class _Tables(NamedTuple):
    """The tables of an index, mapped."""

    lengths: Int32Array  # (sequences,)
    pointers: Int64Array  # (sequences,) bytes
    documents: Int64Array  # (documents + 1,) first sequence of each, then their number
    item_bytes: int

    @classmethod
    def of(cls, path: Path, header: IndexHeader) -> _Tables:
        """The tables of the index at `path`."""
        name, count, start = str(path), header.sequences, HEADER.size
        return cls(
            map_array(name, np.dtype("<i4"), count, start),
            map_array(name, np.dtype("<i8"), count, start + 4 * count),
            map_array(name, np.dtype("<i8"), header.document_boundaries, start + 12 * count),
            header.item_bytes,
        )

    def blocks(self) -> Iterator[Int64Array]:
        """Stretches of the table of documents; each begins with the last entry of the one before.

        Together they hold all documents.
        """
        for first in range(0, len(self.documents) - 1, _BLOCK):
            yield self.documents[first : first + _BLOCK + 1]

    def check(self, path: Path) -> int:
        """Compare the tables with each other; returns the documents without a sequence.

        Raises:
            DataError: they disagree.
        """
        count, empty, total = len(self.lengths), 0, 0
        whole = len(self.documents) > 0 and self.documents[0] == 0 and self.documents[-1] == count
        for table in self.blocks():
            steps = np.diff(table)
            whole = whole and bool((steps >= 0).all())
            empty += int((steps == 0).sum())
        for first in range(0, count, _BLOCK):
            lengths = self.lengths[first : first + _BLOCK].astype(np.int64)
            ends = total + np.cumsum(lengths)
            starts = (ends - lengths) * self.item_bytes
            whole = whole and bool((lengths >= 0).all())
            whole = whole and bool((self.pointers[first : first + _BLOCK] == starts).all())
            total = int(ends[-1])
        if not whole and (count or len(self.documents)):
            raise DataError(
                f"{path}: lengths, offsets and documents do not agree; copy the pair again or make "
                "it again with tools/preprocess_data.py"
            )
        return empty

    def ends(self, uncounted: bool) -> Iterator[Int64Array]:
        """Places in the token file of the last token of each document that holds any.

        Args:
            uncounted: the index does not count these tokens.
        """
        before = 0
        for table in self.blocks():
            last = table[1:][np.diff(table) > 0] - 1  # sequence that ends the document
            places = self.pointers[last] // self.item_bytes + self.lengths[last]
            if uncounted:
                yield places + np.arange(before, before + len(last))
            else:
                yield places - 1
            before += len(last)


def _opened(prefix: str, index: Path) -> tuple[IndexHeader, _Tables, TokenArray]:
    """What an index states, its tables, and all tokens of the file, counted or not."""
    header = _stated(index)
    data = Path(f"{prefix}.bin")
    try:
        size = data.stat().st_size
    except OSError as error:
        raise DataError(f"{data} cannot be read: {error}") from error
    count, rest = divmod(size, header.item_bytes)
    if rest:
        raise DataError(
            f"{data} has {size} bytes, no multiple of the {header.item_bytes} of a token"
        )
    tokens = map_array(str(data), file_dtype(header.dtype), count)
    return header, _Tables.of(index, header), tokens


def _stated(index: Path) -> IndexHeader:
    try:
        with open(index, "rb", buffering=0) as stream:
            return stated(stream, str(index), index.stat().st_size)
    except OSError as error:
        raise DataError(f"{index} cannot be read: {error}") from error


def _only_end(
    prefix: str, tables: _Tables, tokens: TokenArray, eod: int | None, uncounted: bool
) -> int:
    """The id that is at the end of every document.

    Raises:
        DataError: they differ, or are not `eod`.
    """
    before = 0
    for places in tables.ends(uncounted):
        ids = tokens[places]
        if eod is None and len(ids):
            eod = int(ids[0])
        wrong = np.flatnonzero(ids != eod)
        if len(wrong):
            i = int(wrong[0])
            raise DataError(
                f"{prefix}.bin: token {places[i]}, where document {before + i} would end, has id "
                f"{ids[i]}, not {eod}; these are not uncounted end-of-document ids. Make the pair "
                "again with tools/preprocess_data.py"
            )
        before += len(ids)
    assert eod is not None, "nothing is missing where there is no document"
    return eod


def _keep(found: Uncounted) -> None:
    """A copy of the index that will be replaced."""
    kept = kept_index(found.prefix)
    if kept == found.index_path:
        return
    if not kept.exists():
        with found.index_path.open("rb") as old, replacing(kept) as new:
            shutil.copyfileobj(old, new)
    elif not filecmp.cmp(kept, found.index_path, shallow=False):
        raise DataError(f"{kept} is another index than {found.index_path}; move it away first")


def _link(found: Uncounted, target: str) -> None:
    """A link at the target to the tokens."""
    link, data = Path(f"{target}.bin"), Path(f"{found.prefix}.bin").resolve()
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() and not link.exists():
        os.symlink(data, link)
    elif link.resolve() != data:
        raise DataError(f"{link} is there and is not a link to {data}; give another --out")
