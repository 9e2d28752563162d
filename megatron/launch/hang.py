"""What counts as a hang: how far each rank is, and how long a phase may go without progress.

Knows no socket and no clock: it is told of beats and asked for a verdict, both with the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron.launch.heartbeat import Beat

START_S = 1800.0  # as the collectives' timeout
LEAST_S = 300.0  # a file system that fails over blocks this long and recovers
LEAST_AFTER_SIGNAL_S = 30.0
STEP = "step"  # the phase that HANG_TIMEOUT waits for


@dataclass
class Rank:
    """What is known of one rank.

    Attributes:
        beat: its last one.
        heard_at: when that came, s.
        progress_at: when its phase, step or ticks last changed, s.
        completed: phases that it has been through.
        doing, stacks: its answers to a request for stacks.
    """

    beat: Beat
    heard_at: float
    progress_at: float
    completed: set[str] = field(default_factory=set)
    doing: str = ""
    stacks: str = ""


@dataclass
class Limits:
    """How long a phase may take from one sign of progress to the next, learnt from how long it did.

    Attributes:
        fixed_s: HANG_TIMEOUT, for all phases once a step has begun; 0: never; None: learnt.
        stepped: a rank has begun a step.
    """

    fixed_s: float | None = None
    stepped: bool = False
    _first: dict[str, float] = field(default_factory=dict)
    _later: dict[str, float] = field(default_factory=dict)
    _learnt: set[str] = field(default_factory=set)

    def note(self, phase: str, gap_s: float, *, first: bool, ends: bool) -> None:
        """Learn from `gap_s` seconds between two signs of progress.

        Args:
            phase: in which they were.
            gap_s: seconds between them.
            first: the rank went through the phase for the first time, which may compile.
            ends: the phase ended with them.
        """
        gaps = self._first if first else self._later
        gaps[phase] = max(gaps.get(phase, 0.0), gap_s)
        if ends:
            self._learnt.add(phase)

    def usual(self, phase: str) -> float:
        """Seconds that are no surprise in this phase; infinite where nothing is known of it."""
        if phase not in self._learnt:
            return math.inf
        first = self._first.get(phase, 0.0)
        # The first time stands for the others until there are others.
        return max(10 * self._later.get(phase, first), 2 * first)

    def limit(self, phase: str) -> float:
        """Seconds without progress after which a rank in this phase hangs."""
        if self.fixed_s == 0:
            return math.inf
        if self.fixed_s is not None:
            return self.fixed_s if self.stepped else max(START_S, self.fixed_s)
        return min(START_S, max(LEAST_S, self.usual(phase)))

    def limit_after_signal(self, phase: str) -> float:
        """The same once the run was asked to stop: it should answer, and until the first step has
        ended there is nothing to lose.
        """
        if STEP not in self._learnt:
            return LEAST_AFTER_SIGNAL_S
        return min(self.limit(phase), START_S, max(LEAST_AFTER_SIGNAL_S, self.usual(phase) / 3))


class Table:
    """The ranks of a run as their beats describe them."""

    def __init__(self, limits: Limits) -> None:
        self.ranks: dict[int, Rank] = {}
        self.limits = limits

    def take(self, beat: Beat, now: float) -> None:
        """Note a beat that came at `now`, s; a late or second copy only shows that it lives."""
        known = self.ranks.get(beat.rank)
        if known is None or known.beat.pid != beat.pid or known.beat.host != beat.host:
            known = self.ranks[beat.rank] = Rank(beat, now, now)
        known.heard_at = now
        known.doing, known.stacks = beat.doing or known.doing, beat.stacks or known.stacks
        self.limits.stepped |= beat.step is not None
        if beat.number < known.beat.number:
            return
        old, known.beat = known.beat, beat
        ends = (old.phase, old.step) != (beat.phase, beat.step)
        if ends or old.ticks != beat.ticks:
            first = old.phase not in known.completed
            self.limits.note(old.phase, now - known.progress_at, first=first, ends=ends)
            known.progress_at = now
            if ends:
                known.completed.add(old.phase)

    def verdict(self, now: float, signal_at: float | None = None) -> str:
        """Why the run hangs; empty where it does not.

        Args:
            now: s.
            signal_at: when the run was asked to stop, s; None: it was not.
        """
        live = [rank for rank in self.ranks.values() if not rank.beat.closed]
        if not self.ranks:
            return ""
        since = -math.inf if signal_at is None else signal_at
        idle = now - max(since, *(rank.progress_at for rank in self.ranks.values()))
        limit = max((self._limit(rank, signal_at) for rank in live), default=START_S)
        if idle > limit:
            return f"no rank has made progress for {idle:.0f} s (limit {limit:.4g} s)"
        for rank in live:
            silent, limit = now - max(since, rank.heard_at), self._limit(rank, signal_at)
            if silent > limit and not self._overtaken(rank.beat):
                return (
                    f"rank {rank.beat.rank} has been silent for {silent:.0f} s "
                    f"(limit {limit:.4g} s)"
                )
        return ""

    def forget_answers(self) -> None:
        """The next request for stacks is a new one."""
        for rank in self.ranks.values():
            rank.doing = rank.stacks = ""

    def silent(self, now: float, for_s: float) -> list[Rank]:
        """Ranks that run and have not been heard for `for_s` seconds, by number."""
        return [
            rank
            for _, rank in sorted(self.ranks.items())
            if not rank.beat.closed and now - rank.heard_at > for_s
        ]

    def _limit(self, rank: Rank, signal_at: float | None) -> float:
        limits, phase = self.limits, rank.beat.phase
        return limits.limit(phase) if signal_at is None else limits.limit_after_signal(phase)

    def _overtaken(self, beat: Beat) -> bool:
        """Whether others are two steps ahead: then it lives, and its datagrams are lost."""
        if beat.step is None:
            return False
        return any((rank.beat.step or 0) >= beat.step + 2 for rank in self.ranks.values())


def describe(table: Table, world_size: int, now: float, silent_s: float) -> list[str]:
    """Lines that say where the ranks are, the odd ones first.

    Args:
        table: of the ranks.
        world_size: ranks that were started.
        now: s.
        silent_s: seconds without a beat after which a rank is named one by one.
    """
    silent = table.silent(now, silent_s)
    lines = [
        f"rank {rank.beat.rank} ({rank.beat.host}, pid {rank.beat.pid}) silent for "
        f"{now - rank.heard_at:.0f} s, last heard in {place(rank.beat)}"
        for rank in silent
    ]
    never = [number for number in range(world_size) if number not in table.ranks]
    if never:
        lines.append(f"{named(never)} never heard")
    groups: dict[str, list[int]] = {}
    quiet = {rank.beat.rank for rank in silent}
    for number, rank in sorted(table.ranks.items()):
        if number not in quiet:
            doing = "ended" if rank.beat.closed else f"{place(rank.beat)}: {rank.doing or '?'}"
            groups.setdefault(doing, []).append(number)
    for doing, numbers in sorted(groups.items(), key=lambda group: len(group[1])):
        lines.append(f"{named(numbers)} in {doing}")
    return lines


def suspects(table: Table, now: float, silent_s: float) -> list[int]:
    """The ranks to look at first: the silent ones, else those that are least like the others."""
    silent = [rank.beat.rank for rank in table.silent(now, silent_s)]
    if silent:
        return silent
    groups: dict[tuple[str, int | None, str], list[int]] = {}
    for number, rank in sorted(table.ranks.items()):
        if not rank.beat.closed:
            groups.setdefault((rank.beat.phase, rank.beat.step, rank.doing), []).append(number)
    # Of equal groups the one behind: the others wait for it.
    first = min(groups, key=lambda key: (len(groups[key]), key[1] or 0), default=None)
    return groups[first] if first else []


def place(beat: Beat) -> str:
    """`step 40`, or `save at step 40`, or `load`."""
    if beat.step is None:
        return beat.phase
    return f"step {beat.step}" if beat.phase == STEP else f"{beat.phase} at step {beat.step}"


def named(ranks: Iterable[int]) -> str:
    """`rank 3`, or `ranks 0-2,5`."""
    runs: list[tuple[int, int]] = []
    for number in sorted(ranks):
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"rank {text}" if text.isdecimal() else f"ranks {text}"
