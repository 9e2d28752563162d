"""Layers are balanced over pipeline stages by what they cost, or cut as told."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config.errors import ConfigError
from megatron.config.pipeline_stages import (
    balanced_blocks,
    modelled_bubble,
    parse_cuts,
    stage_bounds,
    stage_costs,
)
from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from megatron.plan.report import dry_run_text
from tests.config.helpers import configured, resolved

LLAMA = ARCHITECTURES["llama"]


def shape(layers: int, vocabulary: int = 32000) -> ModelShape:
    return ModelShape(
        num_layers=layers, hidden_size=64, num_attention_heads=4, num_key_value_heads=4,
        ffn_hidden_size=172, seq_length=128, vocab_size=vocabulary,
    )  # fmt: skip


def costs(model: ModelShape) -> tuple[int, int]:
    """FLOPs of a block and of the head."""
    return LLAMA.block_flops(model), LLAMA.head_flops(model)


def test_costs_are_the_formulas() -> None:
    """Forward FLOPs of all stages are a third of those of a step."""
    model = shape(5)
    block, head = costs(model)
    assert 3 * (5 * block + head) == LLAMA.flops_per_token_lm(model)


@given(st.integers(1, 5), st.integers(0, 5), st.integers(128, 100_000))
def test_no_cut_has_a_faster_slowest_stage(stages: int, more: int, vocabulary: int) -> None:
    model = shape(stages + more, vocabulary)
    blocks = balanced_blocks(model.num_layers, stages, *costs(model))
    assert sum(blocks) == model.num_layers and len(blocks) == stages
    assert all(count > 0 for count in blocks[:-1]) or stages == 1
    others = (
        other
        for other in product(range(model.num_layers + 1), repeat=stages)
        if sum(other) == model.num_layers
    )
    slowest = max(stage_costs(blocks, *costs(model)))
    assert slowest <= min(max(stage_costs(other, *costs(model))) for other in others)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"NLAYERS": 4, "PP": 1}, (4,)),
        ({"MODEL_ARCH": "7B", "VOCAB_SIZE": 32000, "PP": 4}, (8, 8, 8, 8)),
        ({"MODEL_ARCH": "llama3-3B", "VOCAB_SIZE": 256000, "PP": 4}, (8, 8, 9, 3)),
        ({"NLAYERS": 22, "PP": 4, "PIPELINE_CUTS": "5,6,6,5"}, (5, 6, 6, 5)),
    ],
)
def test_stages_of_a_run(settings: dict, blocks: tuple[int, ...]) -> None:
    assert configured(**settings).stage_blocks == blocks


def test_a_rank_has_two_stages_with_dualpipev() -> None:
    run = configured(NLAYERS=8, PP=2, GAS=4, PIPELINE_SCHEDULE="dualpipev", VOCAB_SIZE=128)
    assert len(run.stage_blocks) == 4 and sum(run.stage_blocks) == 8


def test_bounds_hold_every_layer_once() -> None:
    assert stage_bounds((2, 3, 1)) == (0, 3, 6, 9)
    assert stage_bounds((4,)) == (0, 7)


@pytest.mark.parametrize("text", ["", "3;4", "3,-1", "a,b"])
def test_cuts_that_are_no_list(text: str) -> None:
    with pytest.raises(ConfigError, match="PIPELINE_CUTS"):
        parse_cuts(text)


def test_the_modelled_bubble() -> None:
    assert modelled_bubble(1, 8) == 0
    assert modelled_bubble(4, 8) == pytest.approx(3 / 11)


def test_the_dry_run_draws_the_stages() -> None:
    text = dry_run_text(resolved(NLAYERS=6, PP=2, PIPELINE_CUTS="4,2", GAS=7), "")
    assert "embedding + 4 blocks" in text and "2 blocks + norm, head" in text
    assert "0-4" in text and "5-8" in text and "12.5%" in text
    assert "pipeline stages" not in dry_run_text(resolved(NLAYERS=6), "")
