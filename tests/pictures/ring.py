"""An all-reduce over a ring, played step by step."""

from __future__ import annotations

Buffers = list[list[frozenset[int]]]
"""By rank, then by chunk: the ranks whose numbers are summed there."""


def all_reduce(ranks: int) -> list[Buffers]:
    """The buffers at the start and after each of 2 (ranks - 1) steps.

    In the first half each rank adds the chunk that it receives (reduce-scatter), in the second it
    replaces its own by it (all-gather). A step sends one chunk from each rank to the next.
    """
    state = [[frozenset({rank}) for _ in range(ranks)] for rank in range(ranks)]
    states = [state]
    for step in range(2 * (ranks - 1)):
        adding = step < ranks - 1
        state = [row[:] for row in state]
        for rank in range(ranks):
            chunk = (rank - step) % ranks
            sent, to = states[-1][rank][chunk], (rank + 1) % ranks
            state[to][chunk] = state[to][chunk] | sent if adding else sent
        states.append(state)
    return states
