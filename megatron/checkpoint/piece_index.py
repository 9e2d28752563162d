"""The piece index: which run of which parameter lies in which file, without opening the files.

`pieces.json` has one row for each parameter and partition, with columns over its runs. A column
holds [difference, times] pairs: a parameter sharded evenly over thousands of ranks takes one line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, groupby, pairwise, repeat
from typing import Any

Column = list[list[int]]
_COLUMNS = ("file", "item", "shard", "start", "length")


@dataclass(frozen=True)
class Record:
    """A piece as a rank wrote it: all states that have the same length.

    Attributes:
        name, shape, partition_dim, shards, shard, start: as of `Piece`.
        item: its number in the file; a tensor's key is `item/state`.
        length: elements.
        states: what is stored.
        scalars: the optimizer's numbers.
    """

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    shards: int
    shard: int
    start: int
    item: int
    length: int
    states: tuple[str, ...]
    scalars: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Run:
    """A stored run of a flattened shard: key `item/state` of the file with this number."""

    file: int
    item: int
    shard: int
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class IndexRow:
    """All runs of some states of one parameter that are partitioned alike."""

    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    shards: int
    states: tuple[str, ...]
    scalars: Mapping[str, float]
    columns: Mapping[str, Column]

    def runs(self) -> dict[int, list[Run]]:
        """Its runs by shard; made anew at each call."""
        found: dict[int, list[Run]] = {}
        for values in zip(*(_decoded(self.columns[name]) for name in _COLUMNS), strict=True):
            run = Run(*values)
            found.setdefault(run.shard, []).append(run)
        return found


@dataclass(frozen=True)
class PieceIndex:
    """The rows of a checkpoint, and the names of the files that they number."""

    files: tuple[str, ...]
    rows: tuple[IndexRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {"files": list(self.files), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PieceIndex:
        """Reads what `to_dict` wrote; its file is guarded by a hash in the manifest."""
        rows = (
            IndexRow(**{**row, "shape": tuple(row["shape"]), "states": tuple(row["states"])})
            for row in values["rows"]
        )
        return cls(tuple(values["files"]), tuple(rows))


def build_index(files: Sequence[str], written: Iterable[Iterable[Record]]) -> PieceIndex:
    """The index of what the ranks wrote.

    Args:
        files: name of each rank's file.
        written: the records of each of these files.
    """
    grouped: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
    for number, (_, records) in enumerate(zip(files, written, strict=True)):
        for one in records:
            key = (
                one.name, one.shape, one.partition_dim, one.shards, one.states, one.scalars,
            )  # fmt: skip
            run = (number, one.item, one.shard, one.start, one.length)
            grouped.setdefault(key, []).append(run)
    return PieceIndex(tuple(files), tuple(_row(key, runs) for key, runs in grouped.items()))


def _row(key: tuple[Any, ...], runs: list[tuple[int, ...]]) -> IndexRow:
    name, shape, partition_dim, shards, states, scalars = key
    columns = {of: _encoded([run[at] for run in runs]) for at, of in enumerate(_COLUMNS)}
    return IndexRow(name, shape, partition_dim, shards, states, dict(scalars), columns)


def _encoded(values: Sequence[int]) -> Column:
    steps = (after - before for before, after in pairwise(chain([0], values)))
    return [[step, len(list(same))] for step, same in groupby(steps)]


def _decoded(column: Column) -> Iterable[int]:
    return accumulate(chain.from_iterable(repeat(step, times) for step, times in column))
