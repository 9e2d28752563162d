"""What a run requests of each file in each split, computed from headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron.config.errors import DataError
from megatron.data.data_list import DataSource
from megatron.data.indexed_header import IndexHeader, read_header
from megatron.data.megatron_order.greedy import MAX_SOURCES
from megatron.data.megatron_order.requests import (
    NAMES,
    Shares,
    Wanted,
    file_requests,
    samples_wanted,
    split_documents,
    split_text,
)

_SHOWN = 10
_MAX_DOCUMENTS = 2**31 - 1  # document numbers are int32
_VARIABLES = ("TRAIN_SPLIT", "VAL_SPLIT", "TEST_SPLIT")


@dataclass(frozen=True, kw_only=True)
class OrderSettings:
    """Everything that decides the order, besides the files themselves.

    Attributes:
        entries: the data file list, in its order; a weight may be 0.
        seq_length: S; a sample has S + 1 tokens.
        shares: TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT.
        eval_interval: steps between evaluations; 0 for none, and no validation or test samples.
        blend_in_corpus: the files of a corpus are blended; else one comes after the other.
        shuffle_in_corpus: the samples of a corpus are shuffled after that.
        exact_epochs: passes over every training file; None for as many as needed.
        train_samples: to request; None: train_iters x global_batch_size.
    """

    entries: tuple[DataSource, ...]
    seq_length: int
    shares: Shares
    seed: int
    train_iters: int
    global_batch_size: int
    eval_interval: int
    eval_iters: int
    blend_in_corpus: bool = False
    shuffle_in_corpus: bool = True
    exact_epochs: int | None = None
    train_samples: int | None = None


@dataclass(frozen=True)
class FilePlan:
    """One list entry in one split."""

    prefix: str
    corpus: str
    header: IndexHeader
    split: str  # train, valid or test
    documents: range  # of the split; each sequence of the file counts as one
    request: int  # samples requested of it
    stamp: tuple[int, ...]  # size and time of .idx and .bin


@dataclass(frozen=True)
class CorpusPlan:
    """The files of one corpus in one split, in list order."""

    name: str
    files: tuple[FilePlan, ...]

    @cached_property
    def size(self) -> int:
        """Samples requested of all its files."""
        return sum(file.request for file in self.files)


@dataclass(frozen=True)
class SplitPlan:
    """One split of a run: its corpora, sorted by name."""

    name: str
    corpora: tuple[CorpusPlan, ...]
    train_total: int  # samples requested of all files for training

    @cached_property
    def size(self) -> int:
        """Samples of the split."""
        return sum(corpus.size for corpus in self.corpora)


def plan_splits(settings: OrderSettings) -> dict[str, SplitPlan]:
    """The splits that a run reads; one without a share or without samples is left out.

    Raises:
        DataError: a setting cannot be used, a file is missing or damaged, or a split needs samples
            of a file of which it has no document; every problem is named.
    """
    _check(settings)
    wanted = samples_wanted(
        settings.train_iters, settings.global_batch_size, settings.eval_interval,
        settings.eval_iters, settings.train_samples,
    )  # fmt: skip
    problems: list[str] = []
    files = _files(settings, wanted, problems)
    if problems:
        more = len(problems) - _SHOWN
        raise DataError("\n".join(problems[:_SHOWN] + ([f"and {more} more"] if more > 0 else [])))
    train_total = sum(file.request for file in files["train"])
    plans = {}
    for name in NAMES:
        plan = SplitPlan(name, _grouped(files[name]), train_total)
        if plan.size and settings.shares[NAMES.index(name)] > 0:
            plans[name] = plan
    if "train" not in plans:
        raise DataError(
            f"TRAIN_SPLIT = {settings.shares[0]:g}, TRAIN_ITERS = {settings.train_iters}: no "
            "sample is left to train on"
        )
    return plans


def exact_epochs(file: FilePlan, settings: OrderSettings) -> int | None:
    """Passes that the user demands of a file; training files only."""
    return settings.exact_epochs if file.split == "train" else None


def _check(settings: OrderSettings) -> None:
    """Refuse numbers that no order can be made from."""
    if settings.seq_length < 1:
        raise DataError(f"SEQ = {settings.seq_length}: a sample needs at least one token")
    if not 0 <= settings.seed < 2**32:
        raise DataError(
            f"SEED = {settings.seed}: DATA_ORDER=megatron draws with numpy's RandomState, whose "
            "seeds are 0 .. 2^32 - 1"
        )
    if settings.exact_epochs is not None and settings.exact_epochs < 1:
        raise DataError(f"TRAIN_DATA_EXACT_NUM_EPOCHS = {settings.exact_epochs}: 1 or more")
    if not 0 < len(settings.entries) <= MAX_SOURCES:
        raise DataError(
            f"DATA_FILE_LIST names {len(settings.entries)} files, DATA_ORDER=megatron takes 1 .. "
            f"{MAX_SOURCES}"
        )


def _files(
    settings: OrderSettings, wanted: Wanted, problems: list[str]
) -> dict[str, list[FilePlan]]:
    """The plan of every entry, by split; what is wrong is added to `problems`."""
    weights = [entry.weight for entry in settings.entries]
    requests = {
        name: file_requests(weights, count) for name, count in zip(NAMES, wanted, strict=True)
    }
    files: dict[str, list[FilePlan]] = {name: [] for name in NAMES}
    known: dict[str, tuple[IndexHeader, tuple[int, ...]] | None] = {}
    for number, entry in enumerate(settings.entries):
        if entry.prefix not in known:
            known[entry.prefix] = _look(entry.prefix, problems)
        found = known[entry.prefix]
        if found is None:
            continue
        header, stamp = found
        shares = split_documents(settings.shares, header.sequences)
        for position, (name, documents) in enumerate(zip(NAMES, shares, strict=True)):
            request = requests[name][number] if settings.shares[position] > 0 else 0
            file = FilePlan(entry.prefix, entry.corpus, header, name, documents, request, stamp)
            files[name].append(file)
            if request and not documents:
                problems.append(_no_documents(file, position, settings.shares))
    return files


def _look(prefix: str, problems: list[str]) -> tuple[IndexHeader, tuple[int, ...]] | None:
    """Header and stamp of a pair; None where something is wrong with it."""
    try:
        header = read_header(prefix, allow_empty=True)
    except DataError as error:
        problems.append(str(error))
        return None
    if header.sequences > _MAX_DOCUMENTS:
        problems.append(
            f"{prefix}: {header.sequences} documents, DATA_ORDER=megatron numbers {_MAX_DOCUMENTS}"
        )
        return None
    return header, file_stamp(prefix)


def file_stamp(prefix: str) -> tuple[int, ...]:
    """Size and time of last change of `.idx` and `.bin`.

    Raises:
        DataError: a file has gone.
    """
    stamp: list[int] = []
    for suffix in (".idx", ".bin"):
        try:
            status = os.stat(prefix + suffix)
        except OSError as error:
            raise DataError(f"{prefix}{suffix} cannot be read: {error}") from error
        stamp += [status.st_size, status.st_mtime_ns]
    return tuple(stamp)


def _no_documents(file: FilePlan, position: int, shares: Shares) -> str:
    return (
        f"{file.prefix}: {file.header.sequences} documents split {split_text(shares)} leave none "
        f"for {file.split}, but DATA_ORDER=megatron needs {file.request} {file.split} samples of "
        f"it; raise {_VARIABLES[position]} (or set it to 0), remove the line, or use "
        "DATA_ORDER=stateless"
    )


def _grouped(files: Sequence[FilePlan]) -> tuple[CorpusPlan, ...]:
    """Files by corpus, corpora sorted by code points."""
    names = sorted({file.corpus for file in files})
    return tuple(
        CorpusPlan(name, tuple(file for file in files if file.corpus == name)) for name in names
    )
