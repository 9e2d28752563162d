"""Checks of data files before the first step.

Ids are sampled at both ends and at seeded places between; with tensor parallelism an id outside the
vocabulary would otherwise train on a zero embedding without an error.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron.config.errors import DataError
from megatron.data.data_list import DataSource
from megatron.data.indexed import IndexedDataset, TokenArray
from megatron.data.indexed_header import IndexHeader, left_out_path
from megatron.data.prepare.fingerprint import data_digest
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.data.tokenizer_note import note_path, read_note

WINDOW = 4096  # tokens checked in one place
RANDOM_WINDOWS = 6
ENDS_WINDOW = 1 << 17  # tokens among which an end of a document is looked for
INDEX_WINDOWS = 16  # windows of a large index that are read at start; a small one is read whole
_SHOWN = 10


@dataclass(frozen=True)
class Report:
    """What was found: problems prevent a run, files without a note are logged once."""

    problems: tuple[str, ...]
    without_note: tuple[str, ...]  # prefixes
    headers: Mapping[str, IndexHeader] = field(default_factory=dict)  # by prefix

    @classmethod
    def joined(cls, reports: Iterable[Report]) -> Report:
        """The reports of several ranks as one."""
        reports = list(reports)
        return cls(
            tuple(line for report in reports for line in report.problems),
            tuple(prefix for report in reports for prefix in report.without_note),
            {prefix: header for report in reports for prefix, header in report.headers.items()},
        )

    def warnings(self) -> list[str]:
        """What a run should know: files of unknown tokenizer, and tokens left out."""
        lines = []
        if self.without_note:
            first = self.without_note[0]
            lines.append(
                f"{len(self.without_note)} data file(s) do not name the tokenizer that made them "
                f"(no {note_path(first)}); that the run's tokenizer is the same one cannot be "
                "checked"
            )
        left_out = {prefix: h.left_out for prefix, h in self.headers.items() if h.left_out}
        if left_out:
            lines.append(
                f"{len(left_out)} data file(s) are read as Megatron-DeepSpeed read them: documents "
                f"begin early and {sum(left_out.values()):,} tokens at the ends are left out "
                f"({left_out_path(min(left_out))})"
            )
        return lines

    def raise_problems(self) -> None:
        """Raise a DataError with every problem, shortened; nothing where there is none."""
        if not self.problems:
            return
        shown = "\n".join(self.problems[:_SHOWN])
        more = len(self.problems) - _SHOWN
        raise DataError(shown + (f"\n... and {more} more" if more > 0 else ""))


def check_files(
    files: Iterable[DataSource],
    vocab_size: int,
    tokenizer: Tokenizer | None = None,
    rank: int = 0,
    world_size: int = 1,
    ends: bool = False,
    tick: Callable[[], object] = lambda: None,
) -> Report:
    """Check this rank's files; the ranks' reports together cover the list.

    Args:
        files: the list.
        vocab_size: of the model, before padding; ids must lie below it.
        tokenizer: the run's; None where only `vocab_size` is known.
        rank: takes files rank, rank + world_size, ...
        world_size: ranks that divide the files.
        ends: the tokenizer's end-of-document id must be in the data.
        tick: called after each file.
    """
    problems: list[str] = []
    without_note: list[str] = []
    headers: dict[str, IndexHeader] = {}
    fingerprint = tokenizer.fingerprint() if tokenizer else None
    if tokenizer and tokenizer.vocab_size > vocab_size and rank == 0:
        problems.append(
            f"VOCAB_SIZE = {vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids: raise "
            "VOCAB_SIZE or leave it unset"
        )
    prefixes = sorted({file.prefix for file in files})
    for prefix in prefixes[rank::world_size]:
        try:
            dataset = IndexedDataset(prefix, check=False)
            headers[prefix] = dataset.header
            dataset.check_index(INDEX_WINDOWS)
            _check_ids(dataset, vocab_size)
            if ends and tokenizer:
                _check_ends(dataset, tokenizer.eod)
            if not check_note(prefix, fingerprint):
                without_note.append(prefix)
        except DataError as error:
            problems.append(str(error))
        tick()
    return Report(tuple(problems), tuple(without_note), headers)


def _check_ids(dataset: IndexedDataset, vocab_size: int) -> None:
    """Check the tokens of some windows, read at once: there are thousands of files."""
    last = max(dataset.header.tokens - WINDOW, 0)
    # Seeded by the name: the same places on every start and every rank.
    places = random.Random(dataset.prefix)
    starts = [0, last, *(places.randint(0, last) for _ in range(RANDOM_WINDOWS))]
    size = dataset.dtype.itemsize
    try:
        with open(f"{dataset.prefix}.bin", "rb", buffering=0) as file:
            # Read, not mapped: a fault at a random place reads far around it.
            parts = [os.pread(file.fileno(), WINDOW * size, start * size) for start in starts]
    except OSError as error:
        raise DataError(f"{dataset.prefix}.bin cannot be read: {error}") from error
    tokens = np.frombuffer(b"".join(parts), dataset.dtype)
    if len(tokens) and (tokens.min() < 0 or tokens.max() >= vocab_size):
        for start, part in zip(starts, parts, strict=True):
            require_ids(dataset, np.frombuffer(part, dataset.dtype), start, vocab_size)


def _check_ends(dataset: IndexedDataset, eod: int) -> None:
    """Documents at the start of the file end with `eod`; one that is longer proves nothing."""
    lengths = dataset.lengths[:ENDS_WINDOW].astype(np.int64).cumsum()
    complete = int((lengths <= ENDS_WINDOW).sum())
    if complete and not (dataset.tokens[: lengths[complete - 1]] == eod).any():
        raise DataError(
            f"{dataset.prefix}.bin: id {eod}, which ends documents by the tokenizer, is not among "
            f"the {lengths[complete - 1]:,} tokens of its first {complete:,} sequences: there is "
            "nothing for RESET_ATTENTION_MASK, RESET_POSITION_IDS and EOD_MASK_LOSS to go by. Make "
            "the file again with --append-eod, set TOKENIZER_TYPE and TOKENIZER_MODEL to the ones "
            "it was made with, or unset these options"
        )


def require_ids(dataset: IndexedDataset, tokens: TokenArray, start: int, vocab_size: int) -> None:
    """Raise DataError for the first of `tokens`, which begin at `start`, outside the vocabulary."""
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        raise DataError(
            f"{dataset.prefix}.bin: token {start + wrong[0]} has id {tokens[wrong[0]]}, outside "
            f"the vocabulary [0, {vocab_size}); set TOKENIZER_TYPE and TOKENIZER_MODEL (or "
            "VOCAB_SIZE) to those the file was made with, or make it again"
        )


def check_note(prefix: str, fingerprint: str | None) -> bool:
    """Compare the pair with its note; False where it has none.

    Raises:
        DataError: other data or another tokenizer than the note records.
    """
    note = read_note(prefix)
    if note is None:
        return False
    if note.data != data_digest(prefix):
        raise DataError(
            f"{prefix}.bin: not the data that {note_path(prefix)} was written for; were files "
            "swapped? Copy .bin, .idx and .tokenizer.json together, or make them again"
        )
    if fingerprint is not None and note.tokenizer != fingerprint:
        raise DataError(
            f"{prefix}.bin: made with another tokenizer, {note.named}, than the run's "
            f"({fingerprint[:12]}); set TOKENIZER_TYPE and TOKENIZER_MODEL to the one it was made "
            "with, or make it again"
        )
    return True
