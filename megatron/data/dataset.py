"""Global sample k of a run, for any k: which corpus, which file, which tokens.

Two levels are blended by one rule: corpora, then the files of a corpus. Sample k depends on the
list, the seed, the sequence length, the split, and on what earlier stages of the run read of each
file; on nothing else. Nothing is stored. Data sets are made in splits.py.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from megatron.data.blend import Blend
from megatron.data.samples import FileSamples, Tokens


@dataclass(frozen=True)
class SampleLocation:
    """Where a sample comes from."""

    corpus: str
    file: str  # prefix of the pair
    epoch: int  # passes over the file's share of the split before this one
    index: int  # sample number within the file: it starts at token index * seq_length


@dataclass(frozen=True, kw_only=True)
class Sample(SampleLocation):
    """A sample and where it comes from."""

    tokens: Tokens = field(repr=False, compare=False)  # int64 (seq_length + 1,)


class SampleSource(Protocol):
    """Anything that gives global sample k; the loader needs no more."""

    def sample(self, k: int) -> Sample:
        """Sample `k` >= 0 of an endless order."""


Train = TypeVar("Train", bound=SampleSource, covariant=True)


@dataclass(frozen=True)
class Splits(Generic[Train]):
    """Three data sets; None where a split has no samples or is never read."""

    train: Train | None
    valid: SampleSource | None
    test: SampleSource | None
    warnings: tuple[str, ...]  # what a split leaves out, to be logged once


@dataclass(frozen=True)
class CorpusFiles:
    """Files of one corpus and their blend."""

    name: str
    files: tuple[FileSamples, ...]
    blend: Blend


class Dataset:
    """One split: an endless, fixed order over the samples of all corpora."""

    def __init__(self, corpora: Sequence[CorpusFiles], weights: Sequence[float]) -> None:
        """Blend `corpora` by `weights`, in the order of their first appearance in the list."""
        self.corpora = tuple(corpora)
        self.blend = Blend(weights, limits=[corpus.blend.total for corpus in corpora])

    @property
    def total(self) -> int | None:
        """Number of samples; None where some corpus has no limit."""
        return self.blend.total

    def sample(self, k: int) -> Sample:
        """Sample `k` >= 0."""
        corpus, file, epoch, index = self._find(k)
        return Sample(corpus.name, file.prefix, epoch, index, tokens=file.read(index))

    def locate(self, k: int) -> SampleLocation:
        """Where sample `k` >= 0 comes from, without reading it."""
        corpus, file, epoch, index = self._find(k)
        return SampleLocation(corpus.name, file.prefix, epoch, index)

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

    def _find(self, k: int) -> tuple[CorpusFiles, FileSamples, int, int]:
        source, corpus_draw = self.blend.draw(k)
        corpus = self.corpora[source]
        source, file_draw = corpus.blend.draw(corpus_draw)
        file = corpus.files[source]
        return corpus, file, *file.locate(file_draw)


class StagedDataset:
    """The training data of a run: one data set per stage, each with sample 0 where it begins."""

    def __init__(self, parts: Sequence[tuple[int, Dataset]]) -> None:
        """`parts` holds the first sample and the data of each stage, ascending."""
        self.parts = tuple(parts)
        self._firsts = [first for first, _ in parts]
        assert self._firsts == sorted(set(self._firsts))

    def sample(self, k: int) -> Sample:
        """Sample `k` of the run, not before the first stage."""
        first, dataset = self._part(k)
        return dataset.sample(k - first)

    def locate(self, k: int) -> SampleLocation:
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
            Number of the stage, samples that it has, samples that the run needs of it.
        """
        for number, (first, dataset) in enumerate(self.parts):
            wanted = self._stop(number, count) - first
            if dataset.total is not None and wanted > dataset.total:
                return number, dataset.total, wanted
        return None

    def _stop(self, number: int, count: int) -> int:
        return min([count, *self._firsts[number + 1 : number + 2]])

    def _part(self, k: int) -> tuple[int, Dataset]:
        number = bisect_right(self._firsts, k) - 1
        assert number >= 0, f"sample {k} is before the first stage, at {self._firsts[0]}"
        return self.parts[number]


class LaterDataset:
    """An order whose sample 0 is a later sample of the run."""

    def __init__(self, first: int, dataset: SampleSource) -> None:
        """`first` is the sample of the run that `dataset` begins with."""
        self.first = first
        self.dataset = dataset

    def sample(self, k: int) -> Sample:
        """Sample `k` >= first of the run."""
        return self.dataset.sample(k - self.first)
