"""The training data of a run of several stages: sample k is the stage's that holds k.

A stage goes on with each file where the stage before it stopped, so that over all stages a sample
is seen again only after every other sample of its file. The start of a stage is known beforehand
(a list of stages) or is where a run stood when its data was changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron.data.data_list import ListStage
from megatron.data.dataset import (
    Dataset,
    Location,
    Sample,
    SampleSource,
    Splits,
    build_datasets,
)
from megatron.data.file_pool import FilePool
from megatron.data.indexed_header import IndexHeader


@dataclass(frozen=True)
class Origin:
    """Where the present plan of stages began: the start of the run, or a change of its data.

    Attributes:
        samples, tokens: consumed before it.
        drawn: draws taken before it of each file, by identity.
    """

    samples: int = 0
    tokens: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)


class StagedDataset:
    """Training data sets one after the other, each an order of its own from its sample 0 on."""

    def __init__(self, parts: Sequence[tuple[int, Dataset]]) -> None:
        """Args: parts are the first sample of each stage, ascending, and its data."""
        self.parts = tuple(parts)
        self._firsts = [first for first, _ in parts]
        assert self._firsts == sorted(set(self._firsts))

    def sample(self, k: int) -> Sample:
        """Sample `k` of the run, not before the first stage."""
        first, dataset = self._part(k)
        return dataset.sample(k - first)

    def locate(self, k: int) -> Location:
        """Where sample `k` comes from, without reading it."""
        first, dataset = self._part(k)
        return dataset.locate(k - first)

    def drawn(self, count: int) -> dict[str, int]:
        """Draws of each file, by identity, after sample count - 1 of the run."""
        result: dict[str, int] = {}
        for number, (first, dataset) in enumerate(self.parts):
            if number and first >= count:
                break
            result |= dataset.drawn(min(count, self._stop(number, count)) - first)
        return result

    def shortage(self, count: int) -> tuple[int, int, int] | None:
        """The first stage that has too few samples for a run of `count`, or None.

        Returns:
            Number of the stage, samples that it has, samples wanted of it.
        """
        for number, (first, dataset) in enumerate(self.parts):
            wanted = self._stop(number, count) - first
            if dataset.total is not None and wanted > dataset.total:
                return number, dataset.total, wanted
        return None

    def _stop(self, number: int, count: int) -> int:
        following = self._firsts[number + 1 : number + 2]
        return min([count, *following])

    def _part(self, k: int) -> tuple[int, Dataset]:
        number = bisect_right(self._firsts, k) - 1
        assert number >= 0, f"sample {k} is before the first stage, at {self._firsts[0]}"
        return self.parts[number]


class LaterDataset:
    """An order whose sample 0 is a later sample of the run."""

    def __init__(self, first: int, dataset: SampleSource) -> None:
        """Args: first is the sample of the run that `dataset` begins with."""
        self.first = first
        self.dataset = dataset

    def sample(self, k: int) -> Sample:
        """Sample `k` >= first of the run."""
        return self.dataset.sample(k - self.first)


@dataclass(frozen=True)
class StagedSplits:
    """The data of a run; None where a split has no samples."""

    train: StagedDataset | None
    valid: Dataset | None
    test: Dataset | None
    warnings: tuple[str, ...]


def build_stages(
    stages: Sequence[ListStage],
    seq_length: int,
    splits: tuple[float, float, float] = (990, 10, 0),
    seed: int = 1234,
    origin: Origin | None = None,
    headers: Mapping[str, IndexHeader] | None = None,
    pool: FilePool | None = None,
) -> StagedSplits:
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
    first_splits: Splits | None = None
    warnings: list[str] = []
    for number, stage in enumerate(stages):
        first = _first_sample(stage, origin, seq_length)
        stop = (
            _first_sample(stages[number + 1], origin, seq_length)
            if number + 1 < len(stages)
            else None
        )
        if stop is not None and stop <= max(first, origin.samples):
            continue
        if parts:
            begun, dataset = parts[-1]
            drawn |= dataset.drawn(first - begun)
        built = build_datasets(stage.sources, seq_length, splits, seed, pool, headers, drawn)
        first_splits = first_splits or built
        warnings += [line for line in built.warnings if line not in warnings]
        if built.train is not None:
            parts.append((first, built.train))
    assert first_splits is not None
    train = StagedDataset(parts) if parts else None
    return StagedSplits(train, first_splits.valid, first_splits.test, tuple(warnings))


def _first_sample(stage: ListStage, origin: Origin, seq_length: int) -> int:
    """The first sample that begins at or after the stage's first token."""
    tokens = max(stage.start_tokens - origin.tokens, 0)
    return origin.samples - (-tokens // seq_length)
