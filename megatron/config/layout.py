"""The layout of the ranks: arithmetic between a rank and its coordinates on the four axes.

rank = ((pp_rank * dp + dp_rank) * sp + sp_rank) * tp + tp_rank: tensor-parallel neighbours are
adjacent (the fastest links), then the ranks of a sequence, pipeline stages furthest apart. With the
sequence axis counted as data it is the order of DeepSpeed's topology: pipe, data, model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SHOWN_HOSTS = 4  # drawn of many hosts, besides the last


class Coordinates(NamedTuple):
    """A rank's coordinates, the slowest axis first."""

    pp: int
    dp: int
    sp: int
    tp: int


class LayoutAxis(NamedTuple):
    """One axis of parallelism.

    Attributes:
        name: as the user sets it.
        size: ranks per group.
        stride: from one rank of a group to the next.
        divides: what is divided over the ranks of a group.
    """

    name: str
    size: int
    stride: int
    divides: str

    def ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks of the group that `rank` is in, in order."""
        first = rank - rank // self.stride % self.size * self.stride
        return tuple(first + place * self.stride for place in range(self.size))


@dataclass(frozen=True)
class Layout:
    """Sizes of the four axes.

    Attributes:
        tp: tensor-parallel ranks, which shard each matrix.
        pp: pipeline stages.
        dp: data-parallel ranks, which read different samples.
        sp: sequence-parallel ranks (Ulysses), which hold a part of each sample.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp), ("SP", self.sp)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be 1 or more")

    @property
    def world(self) -> int:
        """Total number of ranks."""
        return self.tp * self.pp * self.dp * self.sp

    def without_sequence(self) -> Layout:
        """The same ranks in the same order, the sequence axis counted as data.

        For ZeRO and gradient averaging, sequence-parallel ranks are data-parallel ranks.
        """
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp * self.sp)

    def rank(self, pp_rank: int, dp_rank: int, tp_rank: int, sp_rank: int = 0) -> int:
        """The rank at these coordinates."""
        assert 0 <= pp_rank < self.pp and 0 <= dp_rank < self.dp
        assert 0 <= sp_rank < self.sp and 0 <= tp_rank < self.tp
        return ((pp_rank * self.dp + dp_rank) * self.sp + sp_rank) * self.tp + tp_rank

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of a rank."""
        assert 0 <= rank < self.world
        rest, tp_rank = divmod(rank, self.tp)
        rest, sp_rank = divmod(rest, self.sp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return Coordinates(pp_rank, dp_rank, sp_rank, tp_rank)

    def tp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the shards of this rank's matrices, itself included, in shard order."""
        return self.axis("TP").ranks(rank)

    def sp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that split this rank's samples, itself included, in sequence order."""
        return self.axis("SP").ranks(rank)

    def dp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks with the same weights and part of the sequence, itself included, in data order."""
        return self.axis("DP").ranks(rank)

    def pp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks of this rank's pipeline, itself included, in stage order."""
        return self.axis("PP").ranks(rank)

    @property
    def axes(self) -> tuple[LayoutAxis, ...]:
        """All axes, the fastest first."""
        tp, sp, dp = self.tp, self.sp, self.dp
        return (
            LayoutAxis("TP", tp, 1, "each matrix"),
            LayoutAxis("SP", sp, tp, "the sequence of each sample"),
            LayoutAxis("DP", dp, tp * sp, "each step's samples"),
            LayoutAxis("PP", self.pp, tp * sp * dp, "the layers"),
        )

    def axis(self, name: str) -> LayoutAxis:
        """The axis called TP, SP, DP or PP."""
        return next(axis for axis in self.axes if axis.name == name)

    def hosts_per_group(self, axis: LayoutAxis, ranks_per_host: int) -> int:
        """Most hosts that one group of an axis spans."""
        return max(
            len({member // ranks_per_host for member in axis.ranks(rank)})
            for rank in range(self.world)
            if rank // axis.stride % axis.size == 0
        )

    def drawing(self, ranks_per_host: int) -> list[str]:
        """One line per host: a TP group in (), an SP group in [], stages named."""
        hosts = -(-self.world // ranks_per_host)
        shown = [*range(hosts)]
        if hosts > SHOWN_HOSTS + 1:
            shown = [*range(SHOWN_HOSTS), hosts - 1]
        lines = [f"host {host}: {self._ranks_of(host, ranks_per_host)}" for host in shown]
        if len(shown) < hosts:
            lines.insert(SHOWN_HOSTS, f"... {hosts - len(shown)} more")
        return lines

    def _ranks_of(self, host: int, ranks_per_host: int) -> str:
        first = host * ranks_per_host
        last = min(first + ranks_per_host, self.world)
        return " ".join(self._drawn(rank, rank == first) for rank in range(first, last))

    def _drawn(self, rank: int, begins_host: bool) -> str:
        """A rank with the brackets that open or close at it."""
        text = str(rank)
        for size, (left, right), axis in (
            (self.tp, "()", self.tp),
            (self.tp * self.sp, "[]", self.sp),
        ):
            if axis > 1:
                text = left * (rank % size == 0) + text + right * (rank % size == size - 1)
        stage, place = divmod(rank, self.tp * self.sp * self.dp)
        named = self.pp > 1 and (begins_host or place == 0)
        return f"stage {stage}: {text}" if named else text

    def __str__(self) -> str:
        sequence = f" sp{self.sp}" if self.sp > 1 else ""
        return f"tp{self.tp}{sequence} pp{self.pp} dp{self.dp}"


def crossing_warning(layout: Layout, ranks_per_host: int) -> str | None:
    """The warning about tensor-parallel groups that span hosts; None where none does."""
    tp, per_host = layout.tp, ranks_per_host
    if layout.hosts_per_group(layout.axis("TP"), per_host) == 1:
        return None
    fitting = max(size for size in range(1, tp + 1) if tp % size == 0 and per_host % size == 0)
    return (
        f"TP={tp} does not divide the {per_host} ranks of a host: some groups cross hosts, and the "
        f"collectives of every layer go over the network. Use TP={fitting}, or a multiple of {tp} "
        "for NGPU_PER_HOST"
    )
