"""Bytes of gradients under the sharded engine, at the moments of a step that may be its peak.

A gradient is copied into the buffer of its bucket and freed; a bucket lives until it is reduced
(`megatron/engine/reduction.py`). Buckets of the blocks' matrices follow the head's; those of the
norms, which are small, and of the embedding are the last.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.engine_choice import ShardedSettings

UNDER_WAY = 1 << 24  # elements of reductions at once, at most


class Moments(NamedTuple):
    """Bytes of gradients, new ones and those on their way among them.

    Attributes:
        loss: when the loss is computed.
        first: with the head's gradient, or, tied, with its part of the embedding's.
        last: with the embedding's.
        block: in the first block of the backward pass.
        end: in the last reduction.
    """

    loss: int
    first: int
    last: int
    block: int
    end: int


def gradient_moments(
    settings: ShardedSettings, ranks: int, parameters: int, table: int, *, tied: bool
) -> Moments:
    """The moments of the last micro-batch.

    Args:
        settings: of the engine.
        ranks: that own slices.
        parameters: of this rank before ZeRO.
        table: of them, those of the embedding; an untied head has as many.
        tied: head and embedding are one.
    """
    new = 2 if settings.dtype == "bf16" else 4
    several = settings.accumulation_steps > 1
    if ranks == 1:
        copied = 4 if new == 2 else 0  # fp32 gradients stay where autograd puts them
        before = 4 * parameters if several else 0
        held = copied or (new if several else 0)
        head = new * table if tied or several else (new + copied) * table
        last = 4 * parameters + (new * table if held else 0) + (new * table if tied else 0)
        block = before + (new * table if tied else 0 if several else 4 * table)
        return Moments(before, before + head, last, block, 4 * parameters)
    sent = 2 if settings.sent_in == "bf16" else 4
    each = settings.reduces_each
    sums = several and not each  # buffers of all parameters, in fp32
    kept = 4 if sums else sent
    slices = 4 * parameters // ranks
    before = 4 * parameters if sums else slices if several else 0
    flying = sent + sent // ranks  # for each element of a bucket under way
    if tied:
        first = block = before + new * table
    else:
        first = before + (new if sums else new + kept) * table
        block = before + (0 if sums else flying * table)
    others = parameters - table  # than the embedding
    under_way = min(others, UNDER_WAY)
    landed = slices if each and several else (others - under_way) * 4 // ranks
    last = landed + flying * under_way + (kept + new * (2 if tied else 1)) * table
    end = slices + (sent * table if not sums else max(kept, sent) * table)
    return Moments(before, first, last, block, end)
