"""Where a rank stands: pure arithmetic between a rank and its coordinates on the four axes.

rank = ((pp_rank * dp + dp_rank) * sp + sp_rank) * tp + tp_rank: tensor-parallel neighbours are
adjacent (the fastest links), then the ranks of a sequence, pipeline stages furthest apart. With the
sequence axis counted as data it is the order of DeepSpeed's topology: pipe, data, model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Place(NamedTuple):
    """A rank's coordinates, the slowest axis first."""

    pp: int
    dp: int
    sp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of the four axes.

    Attributes:
        tp: ranks that share each matrix.
        pp: pipeline stages.
        dp: ranks that read different samples.
        sp: ranks that share each sample, a piece of the sequence each.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for name, size in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp), ("SP", self.sp)):
            if size < 1:
                raise ValueError(f"{name}={size}: must be 1 or more")

    @classmethod
    def of_world(cls, world: int, tp: int = 1, pp: int = 1, sp: int = 1) -> Layout:
        """The layout of `world` ranks: whatever TP, PP and SP leave is data parallel.

        Raises:
            ValueError: TP x PP x SP does not divide the world.
        """
        copy = tp * pp * sp
        if world % copy:
            raise ValueError(
                f"WORLD_SIZE={world} is not a multiple of TP x PP x SP = {tp} x {pp} x {sp} = "
                f"{copy}: use {world // copy * copy or copy} ranks, or change TP, PP or SP"
            )
        return cls(tp=tp, pp=pp, dp=world // copy, sp=sp)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.pp * self.dp * self.sp

    def without_sequence(self) -> Layout:
        """The same ranks in the same order, the sequence axis counted as data.

        To whatever shares out weights and averages gradients, the ranks of a sequence are ranks
        with other tokens.
        """
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp * self.sp)

    def rank(self, pp_rank: int, dp_rank: int, tp_rank: int, sp_rank: int = 0) -> int:
        """The rank at these coordinates."""
        assert 0 <= pp_rank < self.pp and 0 <= dp_rank < self.dp
        assert 0 <= sp_rank < self.sp and 0 <= tp_rank < self.tp
        return ((pp_rank * self.dp + dp_rank) * self.sp + sp_rank) * self.tp + tp_rank

    def coordinates(self, rank: int) -> Place:
        """Where a rank stands."""
        assert 0 <= rank < self.world
        rest, tp_rank = divmod(rank, self.tp)
        rest, sp_rank = divmod(rest, self.sp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return Place(pp_rank, dp_rank, sp_rank, tp_rank)

    def tp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that share this rank's matrices, itself included, in slice order."""
        pp, dp, sp, _ = self.coordinates(rank)
        return tuple(self.rank(pp, dp, i, sp) for i in range(self.tp))

    def sp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that share this rank's samples, itself included, in sequence order."""
        pp, dp, _, tp = self.coordinates(rank)
        return tuple(self.rank(pp, dp, tp, i) for i in range(self.sp))

    def dp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks with this one's weights and place in the sequence, itself too, in data order."""
        pp, _, sp, tp = self.coordinates(rank)
        return tuple(self.rank(pp, i, tp, sp) for i in range(self.dp))

    def pp_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks of this rank's pipeline, itself included, in stage order."""
        _, dp, sp, tp = self.coordinates(rank)
        return tuple(self.rank(i, dp, tp, sp) for i in range(self.pp))

    def __str__(self) -> str:
        sequence = f" sp{self.sp}" if self.sp > 1 else ""
        return f"tp{self.tp}{sequence} pp{self.pp} dp{self.dp}"
