"""Training, validation and test data of a list of weighted files: global sample k, for any k.

Two levels are blended by one rule: corpora, then the files of a corpus. Nothing is built at start
but a table of file sizes; sample k depends on the list, the seed, the sequence length and the
split, and on what earlier stages of the run took of each file, on nothing else.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron.config.errors import DataError
from megatron.data.blend import Blend
from megatron.data.data_list import DataSource
from megatron.data.file_pool import FilePool
from megatron.data.indexed_header import IndexHeader, read_header
from megatron.data.samples import FileSamples, Tokens, num_samples, split_ranges

SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Location:
    """Where a sample comes from."""

    corpus: str
    file: str  # prefix of the pair
    epoch: int  # passes over the file's share of the split before this one
    index: int  # sample number within the file: it starts at token index * seq_length


@dataclass(frozen=True, kw_only=True)
class Sample(Location):
    """A sample and where it comes from."""

    tokens: Tokens = field(repr=False, compare=False)  # int64 (seq_length + 1,)


class SampleSource(Protocol):
    """Anything that gives global sample k; the loader needs no more."""

    def sample(self, k: int) -> Sample:
        """Sample `k` >= 0 of an endless order."""


@dataclass(frozen=True)
class Corpus:
    """Files of one corpus and their blend."""

    name: str
    files: tuple[FileSamples, ...]
    blend: Blend


class Dataset:
    """One split: an endless, fixed order over the samples of all corpora."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float]) -> None:
        """Blend `corpora` by `weights`, in the order of their first appearance in the list."""
        self.corpora = tuple(corpora)
        self.blend = Blend(weights, limits=[corpus.blend.total for corpus in corpora])

    @property
    def total(self) -> int | None:
        """Samples there are; None where some corpus has no limit."""
        return self.blend.total

    def sample(self, k: int) -> Sample:
        """Sample `k` >= 0."""
        corpus, file, epoch, index = self._find(k)
        return Sample(corpus.name, file.prefix, epoch, index, tokens=file.read(index))

    def locate(self, k: int) -> Location:
        """Where sample `k` >= 0 comes from, without reading it."""
        corpus, file, epoch, index = self._find(k)
        return Location(corpus.name, file.prefix, epoch, index)

    def drawn(self, count: int) -> dict[str, int]:
        """Draws of each file, by its identity, after `count` samples and all earlier stages."""
        result: dict[str, int] = {}
        for corpus, draws in zip(self.corpora, self.blend.counts(count).tolist(), strict=True):
            own = corpus.blend.counts(draws).tolist()
            result |= {f.identity: f.drawn + n for f, n in zip(corpus.files, own, strict=True)}
        return result

    def position(self, corpus: int, file: int, draw: int) -> int:
        """Which sample is draw `draw` of file number `file` of corpus number `corpus`."""
        return self.blend.position(corpus, self.corpora[corpus].blend.position(file, draw))

    def _find(self, k: int) -> tuple[Corpus, FileSamples, int, int]:
        source, corpus_draw = self.blend.draw(k)
        corpus = self.corpora[source]
        source, file_draw = corpus.blend.draw(corpus_draw)
        file = corpus.files[source]
        return corpus, file, *file.locate(file_draw)


@dataclass(frozen=True)
class Splits:
    """The three data sets of a run; None where a split has no samples."""

    train: Dataset | None
    valid: Dataset | None
    test: Dataset | None
    warnings: tuple[str, ...]  # files and corpora that a split leaves out, to be shown once


@dataclass(frozen=True)
class _File:
    """A list entry with what is known of its file before any token is read."""

    entry: DataSource
    header: IndexHeader
    identity: str
    shares: tuple[range, range, range]


def build_datasets(
    entries: Iterable[DataSource],
    seq_length: int,
    splits: tuple[float, float, float] = (990, 10, 0),
    seed: int = 1234,
    pool: FilePool | None = None,
    headers: Mapping[str, IndexHeader] | None = None,
    drawn: Mapping[str, int] | None = None,
) -> Splits:
    """Data sets of a list; reads only headers, some tens of microseconds a file.

    Args:
        entries: weight, prefix and corpus of each file, in list order.
        seq_length: S; a sample has S + 1 tokens.
        splits: shares of train, validation and test; they need not add up to 1.
        seed: of the sample order.
        pool: of open files, shared by the three splits.
        headers: by prefix, of files whose header has been read already.
        drawn: draws that earlier stages took of the training share of each file, by identity.

    Raises:
        DataError: a file is missing or damaged, a weight is not positive, or training is left
            without a
            file of some corpus.
    """
    if seq_length < 1:
        raise DataError(f"SEQ = {seq_length}: a sample needs at least one token")
    if min(splits) < 0 or not 0 < sum(splits) < float("inf"):
        raise DataError(
            f"TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT = {splits}: not negative, and one above 0"
        )
    files = _open_files(entries, seq_length, splits, headers or {})
    pool = FilePool() if pool is None else pool
    warnings: list[str] = []
    datasets = [
        _dataset(files, split, seq_length, seed, pool, warnings, (drawn or {}) if not split else {})
        for split in range(3)
    ]
    for name, share, dataset in zip(SPLIT_NAMES, splits, datasets, strict=True):
        if share == 0 or dataset is not None:
            continue
        problem = (
            f"no file is long enough for a {name} sample: SEQ + 1 = {seq_length + 1} tokens, share "
            f"{share:g} "
            f"of {sum(splits):g}; lower SEQ, raise the share or add data"
        )
        if name == "train":
            raise DataError(problem)
        warnings.append(problem)
    train, valid, test = datasets
    return Splits(train, valid, test, tuple(warnings))


def _open_files(
    entries: Iterable[DataSource],
    seq_length: int,
    splits: tuple[float, float, float],
    headers: Mapping[str, IndexHeader],
) -> list[_File]:
    files: list[_File] = []
    seen: Counter[str] = Counter()
    for entry in entries:
        if not 0 <= entry.weight < float("inf"):
            raise DataError(f"{entry.prefix}: weight {entry.weight}: must be 0 or above")
        if entry.weight == 0:
            continue
        header = headers.get(entry.prefix) or read_header(entry.prefix)
        # Neither folder nor line number: data may move and lists may grow without reshuffling every
        # file. A file listed twice gets two orders.
        name = f"{entry.corpus}/{os.path.basename(entry.prefix)}/{header.tokens}"
        identity = f"{name}/{seen[name]}"
        seen[name] += 1
        shares = split_ranges(num_samples(header.tokens, seq_length), splits)
        files.append(_File(entry, header, identity, shares))
    if not files:
        raise DataError("DATA_FILE_LIST names no file with a weight above 0")
    return files


def _dataset(
    files: Sequence[_File],
    split: int,
    seq_length: int,
    seed: int,
    pool: FilePool,
    warnings: list[str],
    drawn: Mapping[str, int],
) -> Dataset | None:
    """Data set of one split, or None where no file has a sample for it."""
    grouped: dict[str, list[_File]] = {}
    skipped: dict[str, list[_File]] = {}
    for file in files:
        kept = grouped.setdefault(file.entry.corpus, [])
        (kept if file.shares[split] else skipped.setdefault(file.entry.corpus, [])).append(file)
    corpora, weights = [], []
    for name, members in grouped.items():
        if not members:
            continue
        samples = [
            FileSamples(
                f.entry.prefix,
                f.header,
                seq_length,
                f.shares[split],
                seed,
                f.identity,
                pool,
                drawn.get(f.identity, 0),
            )
            for f in members
        ]
        # Evaluations repeat their samples anyway: a limit of epochs is for training.
        limits = [None if split else _limit(f, s) for f, s in zip(members, samples, strict=True)]
        file_weights = [float(f.entry.weight) for f in members]
        corpora.append(Corpus(name, tuple(samples), Blend(file_weights, limits=limits)))
        # A corpus keeps the share the list gives it, also where some of its files are too short.
        weights.append(sum(file_weights) + sum(f.entry.weight for f in skipped.get(name, [])))
    if not corpora:
        return None
    for name, left_out in skipped.items():
        _say_skipped(name, left_out, bool(grouped[name]), split, seq_length, warnings)
    return Dataset(corpora, weights)


def _limit(file: _File, samples: FileSamples) -> int | None:
    """Draws that max_epochs leaves of a file after earlier stages."""
    if file.entry.max_epochs is None:
        return None
    return max(math.floor(file.entry.max_epochs * len(samples)) - samples.drawn, 0)


def _say_skipped(
    corpus: str, left_out: list[_File], rest: bool, split: int, seq_length: int, warnings: list[str]
) -> None:
    """Warn of files with no sample in a split; refuse a corpus that training would lose."""
    first = left_out[0]
    what = (
        f"corpus {corpus}: {len(left_out)} file(s) have no {SPLIT_NAMES[split]} sample of SEQ + 1 "
        "= "
        f"{seq_length + 1} tokens, the first is {first.entry.prefix} with {first.header.tokens} "
        "tokens"
    )
    if rest:
        warnings.append(f"{what}; the other files of the corpus take their share")
    elif split == 0:
        raise DataError(f"{what}; lower SEQ, raise TRAIN_SPLIT, or remove the corpus from the list")
    else:
        warnings.append(f"{what}; {SPLIT_NAMES[split]} leaves the corpus out")
