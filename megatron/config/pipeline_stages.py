"""Which layers a pipeline stage holds: pure, so that the dry run draws what the engine builds.

A model is [embedding, L blocks, final norm, head]; the blocks of each stage define the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.config.errors import ConfigError

SCHEDULES = {"1f1b": 1, "dualpipev": 2}
"""Stages that a rank holds, by schedule."""


def num_stages_per_rank(schedule: str) -> int:
    """Stages that a rank holds."""
    return SCHEDULES[schedule]


def balanced_blocks(num_layers: int, stages: int, block: int, head: int) -> tuple[int, ...]:
    """Blocks of each stage such that the slowest stage is as fast as possible.

    The embedding is a lookup and costs nothing. Of equally light stages the last gets the next
    block: it keeps the fewest micro-batches in flight.

    Args:
        num_layers: blocks of the model, L.
        stages: pipeline stages, at most L.
        block: cost of a block, in FLOPs.
        head: cost of the head.

    Returns:
        Blocks of each stage, L in all. The last has none where the head alone outweighs the rest.
    """
    assert 1 <= stages <= num_layers, f"{num_layers} layers for {stages} stages"
    costs = [0] * stages
    costs[-1] += head
    blocks = [0] * stages
    for _ in range(num_layers):
        # Blocks cost the same, so giving each to the lightest stage is optimal.
        stage = min(range(stages), key=lambda s: (costs[s], -s))
        costs[stage] += block
        blocks[stage] += 1
    return tuple(blocks)


def stage_costs(blocks: Sequence[int], block: int, head: int) -> tuple[float, ...]:
    """Cost of each stage in blocks: its blocks, and on the last the head's cost over a block's."""
    last = len(blocks) - 1
    return tuple(count + head / block * (stage == last) for stage, count in enumerate(blocks))


def stage_bounds(blocks: Sequence[int]) -> tuple[int, ...]:
    """Bounds into the layer list; stage s holds layers bounds[s] .. bounds[s + 1].

    Args:
        blocks: of each stage; the first also has the embedding, the last final norm and head.
    """
    bounds = [0]
    for stage, count in enumerate(blocks):
        bounds.append(bounds[-1] + count + (stage == 0) + 2 * (stage == len(blocks) - 1))
    return tuple(bounds)


def parse_cuts(text: str, name: str = "PIPELINE_CUTS") -> tuple[int, ...]:
    """`5,6,6,5` -> (5, 6, 6, 5).

    Raises:
        ConfigError: it is not a list of numbers.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise ConfigError(
            f"{name}={text}: give the layers of each pipeline stage, for example {name}=5,6,6,5"
        )
    return tuple(int(word) for word in words)


def modelled_bubble(stages: int, micro_batches: int) -> float:
    """Fraction of a 1F1B step in which a stage idles, where all stages take equally long."""
    return (stages - 1) / (micro_batches + stages - 1)
