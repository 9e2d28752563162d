"""From lists to the training, validation and test data of a run; reads only headers.

A stage continues each file where the previous stage stopped, so that over all stages a sample
repeats only after every other sample of its file. A stage starts where the list of stages puts it,
or where the run was when its data changed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron.config.errors import DataError
from megatron.data.blend import Blend
from megatron.data.data_list import DataSource, ListStage
from megatron.data.dataset import CorpusFiles, Dataset, Splits, StagedDataset
from megatron.data.indexed import file_dtype
from megatron.data.indexed_header import IndexHeader, read_header
from megatron.data.samples import FilePool, FileSamples

Shares = tuple[float, float, float]  # of train, validation and test

SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Origin:
    """Where the current plan of stages began: the start of the run, or a change of its data.

    Attributes:
        samples, tokens: consumed before it.
        drawn: draws taken before it of each file, by identity.
    """

    samples: int = 0
    tokens: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)


def build_stages(
    stages: Sequence[ListStage],
    seq_length: int,
    splits: Shares = (990, 10, 0),
    seed: int = 1234,
    origin: Origin | None = None,
    headers: Mapping[str, IndexHeader] | None = None,
    pool: FilePool | None = None,
) -> Splits[StagedDataset]:
    """Data of a plan of stages; validation and test are those of the first one, to be comparable.

    Args:
        stages: lists, ascending by the token at which they start.
        seq_length: S.
        splits: shares of train, validation and test.
        seed: of the sample order.
        origin: where the plan began; stages that ended before it are left out.
        headers: by prefix, of files whose header has been read already.
        pool: of open files.

    Raises:
        DataError: as `build_datasets`.
    """
    origin = origin or Origin()
    pool = FilePool() if pool is None else pool
    parts: list[tuple[int, Dataset]] = []
    drawn: dict[str, int] = dict(origin.drawn)
    first_splits: Splits[Dataset] | None = None
    warnings: dict[str, None] = {}
    firsts = [_first_sample(stage, origin, seq_length) for stage in stages]
    for stage, first, stop in zip(stages, firsts, [*firsts[1:], None], strict=True):
        if stop is not None and stop <= max(first, origin.samples):
            continue
        if parts:
            begun, dataset = parts[-1]
            drawn |= dataset.drawn(first - begun)
        built = build_datasets(stage.sources, seq_length, splits, seed, pool, headers, drawn)
        first_splits = first_splits or built
        warnings |= dict.fromkeys(built.warnings)
        if built.train is not None:
            parts.append((first, built.train))
    assert first_splits is not None
    train = StagedDataset(parts) if parts else None
    return Splits(train, first_splits.valid, first_splits.test, tuple(warnings))


def _first_sample(stage: ListStage, origin: Origin, seq_length: int) -> int:
    """The first sample that begins at or after the stage's first token."""
    tokens = max(stage.start_tokens - origin.tokens, 0)
    return origin.samples - (-tokens // seq_length)


def build_datasets(
    entries: Iterable[DataSource],
    seq_length: int,
    splits: Shares = (990, 10, 0),
    seed: int = 1234,
    pool: FilePool | None = None,
    headers: Mapping[str, IndexHeader] | None = None,
    drawn: Mapping[str, int] | None = None,
) -> Splits[Dataset]:
    """Data sets of a list; reads only headers, some tens of microseconds per file.

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
            without a file of some corpus.
    """
    if seq_length < 1:
        raise DataError(f"SEQ = {seq_length}: a sample needs at least one token")
    if min(splits) < 0 or not 0 < sum(splits) < float("inf"):
        raise DataError(
            f"TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT = {splits}: not negative, and one above 0"
        )
    files = _read_headers(entries, seq_length, splits, headers or {})
    maker = _Maker(files, seq_length, seed, FilePool() if pool is None else pool, [])
    datasets = (maker.dataset(0, drawn or {}), maker.dataset(1, {}), maker.dataset(2, {}))
    for name, share, dataset in zip(SPLIT_NAMES, splits, datasets, strict=True):
        if share == 0 or dataset is not None:
            continue
        problem = (
            f"no file is long enough for a {name} sample: SEQ + 1 = {seq_length + 1} tokens, share "
            f"{share:g} of {sum(splits):g}; lower SEQ, raise the share or add data"
        )
        if name == "train":
            raise DataError(problem)
        maker.warnings.append(problem)
    return Splits(*datasets, tuple(maker.warnings))


def num_samples(token_count: int, seq_length: int) -> int:
    """Samples of `seq_length` + 1 tokens in a file; neighbours share one token."""
    return max(token_count - 1, 0) // seq_length


def split_ranges(count: int, shares: Shares) -> tuple[range, range, range]:
    """Split [0, count) into contiguous train, validation and test ranges by `shares`."""
    total = sum(shares)
    assert total > 0 and min(shares) >= 0, shares
    first = round(count * (shares[0] / total))
    second = round(count * ((shares[0] + shares[1]) / total))
    return range(first), range(first, second), range(second, count)


@dataclass(frozen=True)
class _File:
    """A list entry with what is known of its file before any token is read."""

    entry: DataSource
    header: IndexHeader
    identity: str
    shares: tuple[range, range, range]


def _read_headers(
    entries: Iterable[DataSource],
    seq_length: int,
    splits: Shares,
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
        # Neither folder nor line number: data may move and lists may grow without reshuffling all
        # files. A file listed twice gets two orders.
        name = f"{entry.corpus}/{os.path.basename(entry.prefix)}/{header.tokens}"
        identity = f"{name}/{seen[name]}"
        seen[name] += 1
        shares = split_ranges(num_samples(header.tokens, seq_length), splits)
        files.append(_File(entry, header, identity, shares))
    if not files:
        raise DataError("DATA_FILE_LIST names no file with a weight above 0")
    return files


@dataclass(frozen=True)
class _Maker:
    """Makes the data sets of one list's splits; adds what they leave out to `warnings`."""

    files: Sequence[_File]
    seq_length: int
    seed: int
    pool: FilePool
    warnings: list[str]

    def dataset(self, split: int, drawn: Mapping[str, int]) -> Dataset | None:
        """Data set of one split, or None where no file has a sample for it."""
        grouped: dict[str, list[_File]] = {}
        skipped: dict[str, list[_File]] = {}
        for file in self.files:
            kept = grouped.setdefault(file.entry.corpus, [])
            (kept if file.shares[split] else skipped.setdefault(file.entry.corpus, [])).append(file)
        corpora, weights = [], []
        for name, members in grouped.items():
            if not members:
                continue
            samples = tuple(self._samples(file, split, drawn) for file in members)
            # Evaluations repeat their samples anyway: a limit of epochs is for training.
            limits = [
                None if split else _limit(f, s) for f, s in zip(members, samples, strict=True)
            ]
            file_weights = [float(file.entry.weight) for file in members]
            corpora.append(CorpusFiles(name, samples, Blend(file_weights, limits=limits)))
            # A corpus keeps its share of the list even where some files are too short.
            weights.append(sum(file_weights) + sum(f.entry.weight for f in skipped.get(name, [])))
        if not corpora:
            return None
        for name, left_out in skipped.items():
            self._warn_of_skipped(name, left_out, bool(grouped[name]), split)
        return Dataset(corpora, weights)

    def _samples(self, file: _File, split: int, drawn: Mapping[str, int]) -> FileSamples:
        return FileSamples(
            file.entry.prefix,
            file_dtype(file.header.dtype),
            self.seq_length,
            file.shares[split],
            self.seed,
            file.identity,
            self.pool,
            drawn.get(file.identity, 0),
        )

    def _warn_of_skipped(self, corpus: str, files: list[_File], rest: bool, split: int) -> None:
        """Warn of files without a sample in a split; refuse a corpus that training would lose."""
        first = files[0]
        what = (
            f"corpus {corpus}: {len(files)} file(s) have no {SPLIT_NAMES[split]} sample of "
            f"SEQ + 1 = {self.seq_length + 1} tokens, the first is {first.entry.prefix} "
            f"with {first.header.tokens} tokens"
        )
        if rest:
            self.warnings.append(f"{what}; the other files of the corpus take their share")
        elif split == 0:
            raise DataError(
                f"{what}; lower SEQ, raise TRAIN_SPLIT, or remove the corpus from the list"
            )
        else:
            self.warnings.append(f"{what}; {SPLIT_NAMES[split]} leaves the corpus out")


def _limit(file: _File, samples: FileSamples) -> int | None:
    """Draws that max_epochs leaves of a file after earlier stages."""
    if file.entry.max_epochs is None:
        return None
    return max(math.floor(file.entry.max_epochs * len(samples.share)) - samples.drawn, 0)
