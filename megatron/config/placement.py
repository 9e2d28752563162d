"""Which ranks share what, and on which hosts they are: pure arithmetic, drawn before a launch.

Ranks count TP fastest, then SP, then DP, with PP outermost, and fill one host after the other.
"""

from __future__ import annotations

from typing import NamedTuple

SHOWN_HOSTS = 4  # of many, the first ones and the last


class Axis(NamedTuple):
    """One way in which ranks are neighbours.

    Attributes:
        name: as the user sets it.
        size: ranks of a group.
        stride: from one rank of a group to the next.
        shares: what the ranks of a group have in common, or cut between them.
    """

    name: str
    size: int
    stride: int
    shares: str

    def group(self, rank: int) -> tuple[int, ...]:
        """The ranks of a rank's group, in order."""
        first = rank - rank // self.stride % self.size * self.stride
        return tuple(first + place * self.stride for place in range(self.size))


class Placement(NamedTuple):
    """Sizes of the axes, and ranks that a host has.

    Attributes:
        tp, sp, dp, pp: sizes of the axes.
        ranks_per_host: ranks of each host but perhaps the last.
    """

    tp: int
    sp: int
    dp: int
    pp: int
    ranks_per_host: int

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.tp * self.sp * self.dp * self.pp

    @property
    def axes(self) -> tuple[Axis, ...]:
        """All axes, the fastest first."""
        tp, sp, dp, pp, _ = self
        return (
            Axis("TP", tp, 1, "each matrix"),
            Axis("SP", sp, tp, "each sample, a piece of the sequence each"),
            Axis("DP", dp, tp * sp, "each step's samples"),
            Axis("PP", pp, tp * sp * dp, "the layers"),
        )

    def hosts_of_a_group(self, axis: Axis) -> int:
        """Hosts that the group of an axis is on, at most."""
        return max(
            len({member // self.ranks_per_host for member in axis.group(rank)})
            for rank in range(self.world)
            if rank // axis.stride % axis.size == 0
        )

    def drawing(self) -> list[str]:
        """A line a host: ranks of a TP group in (), those of an SP group in [], stages named."""
        hosts = -(-self.world // self.ranks_per_host)
        shown = [*range(hosts)]
        if hosts > SHOWN_HOSTS + 1:
            shown = [*range(SHOWN_HOSTS), hosts - 1]
        lines = [f"host {host}: {self._ranks_of(host)}" for host in shown]
        if len(shown) < hosts:
            lines.insert(SHOWN_HOSTS, f"... {hosts - len(shown)} more")
        return lines

    def _ranks_of(self, host: int) -> str:
        first = host * self.ranks_per_host
        last = min(first + self.ranks_per_host, self.world)
        return " ".join(self._drawn(rank, rank == first) for rank in range(first, last))

    def _drawn(self, rank: int, begins_host: bool) -> str:
        """A rank with the brackets that open or close at it."""
        text = str(rank)
        for size, (left, right), cut in (
            (self.tp, "()", self.tp),
            (self.tp * self.sp, "[]", self.sp),
        ):
            if cut > 1:
                text = left * (rank % size == 0) + text + right * (rank % size == size - 1)
        stage, place = divmod(rank, self.tp * self.sp * self.dp)
        named = self.pp > 1 and (begins_host or place == 0)
        return f"stage {stage}: {text}" if named else text


def crossing_warning(placement: Placement) -> str | None:
    """What is slow about tensor-parallel groups that lie on several hosts; None where none does."""
    tp, per_host = placement.tp, placement.ranks_per_host
    axis = placement.axes[0]
    if placement.hosts_of_a_group(axis) == 1:
        return None
    fitting = max(size for size in range(1, tp + 1) if tp % size == 0 and per_host % size == 0)
    return (
        f"TP={tp} does not divide the {per_host} ranks of a host: some groups cross hosts, and the "
        f"collectives of every layer go over the network. Use TP={fitting}, or a multiple of {tp} "
        "for NGPU_PER_HOST"
    )
