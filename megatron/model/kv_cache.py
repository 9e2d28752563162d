"""Keys and values kept while a text grows, so that a pass computes its new tokens only.

A cache takes the two places of an `Attention` that `document_mask.py` takes too: where the rotary
tables come from, and what attends. Blocks, norms and heads know nothing of it.
Legend: B batch, S new tokens, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.attention import Attention
from megatron.model.block import Embedding
from megatron.model.layer import Layer
from megatron.model.positions import LearnedPositions
from megatron.model.rope import Rope, tables_for


class KeyValueCache:
    """Keys and values of one attention.

    Args:
        attention: whose tables and attention this takes the place of, serial.
    """

    def __init__(self, attention: Attention) -> None:
        self._whole = attention.attend
        self._kept: tuple[Tensor, Tensor] | None = None  # keys and values (B, K, capacity, D)
        self.begin(0)
        attention.tables_for, attention.attend = self.tables_for, self.attend

    def begin(self, capacity: int) -> None:
        """Forgets the text; the next may have up to `capacity` tokens."""
        self.length, self._capacity, self._kept = 0, capacity, None

    def tables_for(self, rope: Rope, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, D) of the positions after those kept; x (B, N, S, D)."""
        cos, sin = tables_for(rope, x[..., :1, :].expand(-1, -1, self._capacity, -1))
        new = slice(self.length, self.length + x.shape[-2])
        return cos[new], sin[new]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What attention over the whole text gives for its new tokens.

        Args:
            q: (B, N, S, D).
            k, v: (B, K, S, D), of the same tokens; kept.

        Returns:
            (B, N, S, D).
        """
        new, before = q.shape[2], self.length
        self.length = end = before + new
        assert end <= self._capacity, f"{end} tokens, room for {self._capacity}"
        if self._kept is None:
            room = (*k.shape[:2], self._capacity, k.shape[3])
            self._kept = k.new_empty(room), v.new_empty(room)
        for kept, own in zip(self._kept, (k, v), strict=True):
            kept[:, :, before:end] = own
        if before == 0:
            return self._whole(q, k, v)
        keys, values = (kept[:, :, :end] for kept in self._kept)
        mask = None  # one token sees all of the text
        if new > 1:
            mask = torch.ones(new, end, dtype=torch.bool, device=q.device).tril(before)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=grouped)


def can_cache(layers: Iterable[Layer]) -> bool:
    """Whether all that depends on positions is in `Attention`, which each block has."""
    first, *others = layers
    blocks = (layer for layer in others if layer.recompute)
    with torch.device("meta"):
        return first.module is Embedding and all(_attentions(block.build()) for block in blocks)


def keep_keys_and_values(model: nn.Module) -> list[KeyValueCache]:
    """Caches in all attentions of a model, for one text at a time: `begin` each with its length."""
    caches = [KeyValueCache(attention) for attention in _attentions(model)]
    for part in model.modules():
        if isinstance(part, LearnedPositions):
            part.starts_at = lambda: caches[0].length
    return caches


def _attentions(module: nn.Module) -> list[Attention]:
    return [part for part in module.modules() if isinstance(part, Attention)]
