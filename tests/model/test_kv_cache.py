"""Tokens given one after the other, with keys and values kept, have the logits of a whole pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.model.kv_cache import can_cache, keep_keys_and_values
from megatron.model.layer import Layer
from tests.model.tiny import KINDS, batch, build, layers, tiny


def test_every_kind_can() -> None:
    assert all(can_cache(layers(tiny(kind))) for kind in KINDS)


def test_a_model_with_positions_of_its_own_cannot() -> None:
    """Its embedding would take each new token for the first."""
    first, *others = layers(tiny())
    other = type("LearnedPositions", (first.module,), {})
    assert not can_cache([dataclasses.replace(first, module=other), *others])
    bare = Layer("1", torch.nn.Identity, torch.nn.Identity, recompute=True)
    assert not can_cache([first, bare, *others])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(parts=st.lists(st.integers(1, 6), min_size=2, max_size=5))
def test_parts_have_the_logits_of_the_whole(kind: str, parts: list[int]) -> None:
    model = build(tiny(kind))
    tokens, _ = batch(tiny(kind), length=sum(parts))
    with torch.no_grad():
        want = model(tokens)
        caches = keep_keys_and_values(model)
        assert len(caches) == 4
        for _ in range(2):  # a second text finds nothing of the first
            for cache in caches:
                cache.begin(sum(parts))
            got = torch.cat([model(part) for part in tokens.split(parts, dim=1)], dim=1)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
