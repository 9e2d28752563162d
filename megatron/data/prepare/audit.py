"""Audit of one file, by samples or in full: what it holds and everything that is wrong with it.

The checks before step 1 (checks.py) read a little of each file; these read all of an index and, if
deep, every token.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedDataset, TokenArray
from megatron.data.prepare.checks import check_note, require_ids
from megatron.data.prepare.fingerprint import data_digest
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.data.tokenizer_note import Note, read_note

_BLOCK = 1 << 22  # tokens read at a time when all are
_WINDOW = 1 << 14  # tokens of a sampled place
_WINDOWS = 16
_DOCUMENTS = 512  # whose last token is checked when not all are


@dataclass(frozen=True)
class Audit:
    """What was found in a pair.

    Attributes:
        tokens, documents: their numbers; 0 where it cannot be opened.
        dtype: of its tokens.
        max_id: largest id seen; -1 where none was.
        eod_share: of the tokens seen; None where the end-of-document id is not known.
        digest: of the content: of all of it if deep, else of size and ends.
        problems: one line each, with file and fix.
        left_out: tokens at the end that are never read.
    """

    prefix: str
    tokens: int = 0
    documents: int = 0
    dtype: str = "-"
    max_id: int = -1
    eod_share: float | None = None
    digest: str = ""
    problems: tuple[str, ...] = ()
    left_out: int = 0


def audit_file(
    prefix: str, vocab_size: int | None, tokenizer: Tokenizer | None, deep: bool
) -> Audit:
    """Audit a pair.

    Args:
        prefix: of the pair.
        vocab_size: ids must lie below it; None: that of the note beside the pair, if any.
        tokenizer: that should have made the pair; None: any.
        deep: check and hash every token; else only some places.
    """
    try:
        dataset = IndexedDataset(prefix, check=False)
    except DataError as error:
        return Audit(prefix, problems=(str(error),))
    problems: list[str] = []
    note = None
    try:
        note = read_note(prefix)
        dataset.check_index()
        check_note(prefix, tokenizer.fingerprint() if tokenizer else None)
    except DataError as error:
        problems.append(str(error))
    if vocab_size is None and note is not None:
        vocab_size = note.vocab_size
    eod = tokenizer.eod if tokenizer else note.eod if note else None
    seen = highest = ends = 0
    lowest = 0
    digest = hashlib.blake2b(digest_size=16)
    for start, tokens in _all(dataset) if deep else _sampled(dataset):
        if deep:
            digest.update(tokens.tobytes())
        if len(tokens) == 0:
            continue
        seen += len(tokens)
        lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
        ends += int((tokens == eod).sum()) if eod is not None else 0
        outside = lowest < 0 or (vocab_size is not None and highest >= vocab_size)
        if outside and not any("has id" in problem for problem in problems):
            try:
                require_ids(dataset, tokens, start, vocab_size or highest + 1)
            except DataError as error:
                problems.append(str(error))
    if not problems and note is not None and note.append_eod:
        problems += _without_end(dataset, note, deep)
    return Audit(
        prefix,
        dataset.header.tokens,
        max(dataset.header.document_boundaries - 1, 0),
        dataset.header.dtype,
        highest if seen else -1,
        ends / seen if eod is not None and seen else None,
        digest.hexdigest() if deep else data_digest(prefix),
        tuple(problems),
        dataset.header.left_out,
    )


def duplicates(audits: Iterable[Audit], deep: bool) -> list[tuple[str, str]]:
    """(prefix, problem) of each file with the content of one before it under another name."""
    first: dict[tuple[str, int], str] = {}
    found = []
    for audit in audits:
        if not audit.tokens:
            continue
        before = first.setdefault((audit.digest, audit.tokens), audit.prefix)
        if before != audit.prefix:
            how = "the same tokens" if deep else "the same size, first and last tokens"
            found.append(
                (audit.prefix, f"{audit.prefix}.bin has {how} as {before}.bin; remove one "
                 "from the list")
            )  # fmt: skip
    return found


def _all(dataset: IndexedDataset) -> Iterator[tuple[int, TokenArray]]:
    """Every token, in blocks; read, so that pages do not stay in the process."""
    with open(f"{dataset.prefix}.bin", "rb") as file:
        start, end = 0, dataset.header.tokens  # what is left out after it is never read
        while len(tokens := np.fromfile(file, dataset.dtype, min(_BLOCK, end - start))):
            yield start, tokens
            start += len(tokens)


def _sampled(dataset: IndexedDataset) -> Iterator[tuple[int, TokenArray]]:
    """Both ends and some places between, the same ones each time."""
    last = max(dataset.header.tokens - _WINDOW, 0)
    places = random.Random(dataset.prefix)
    size = dataset.dtype.itemsize
    starts = sorted({0, last, *(places.randint(0, last) for _ in range(_WINDOWS))})
    for start in starts:
        path = f"{dataset.prefix}.bin"
        yield start, np.fromfile(path, dataset.dtype, _WINDOW, offset=start * size)


def _without_end(dataset: IndexedDataset, note: Note, deep: bool) -> Sequence[str]:
    """Documents that do not end with the end-of-document id that the note promises."""
    lengths, boundaries = dataset.lengths, dataset.documents
    count = len(boundaries) - 1
    step = 1 if deep else max(count // _DOCUMENTS, 1)
    for document in range(0, count, step):
        last = int(boundaries[document + 1]) - 1
        if last < int(boundaries[document]) or not lengths[last]:
            continue
        if int(dataset.sequence(last)[-1]) != note.eod:
            return [
                f"{dataset.prefix}.idx: document {document} does not end with the end-of-document "
                f"id {note.eod} that every document should end with: lengths and tokens do not "
                "belong together; make the pair again with tools/preprocess_data.py"
            ]
    return []
