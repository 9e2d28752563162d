"""The memory estimate follows the layout."""

import pytest

from megatron.plan.memory import memory_per_rank
from tests.config.helpers import configured

SEED = {"MODEL_ARCH": "llama3-3B", "VOCAB_SIZE": 256000, "MICRO_BATCH": 1, "WORLD_SIZE": 24}


def test_parts_of_one_rank():
    estimate = memory_per_rank(configured(**SEED, NLAYERS=14, ZERO_STAGE=0))
    count = 2_982_239_232
    assert estimate.weights == 2 * count
    assert estimate.gradients == 6 * count
    assert estimate.optimizer == 12 * count // 24
    assert estimate.logits == 14 * 8192 * 256000
    assert estimate.total == sum(estimate)


def test_muon_keeps_one_number_for_matrices_and_two_for_the_vocabulary():
    count, table = 2_982_239_232, 2 * 256000 * 3072
    estimate = memory_per_rank(configured(**SEED, NLAYERS=14, OPT="muon"))
    assert estimate.optimizer == (8 * count + 4 * table) // 24


def test_a_tile_of_64_gb_holds_14_layers_and_not_16():
    fits, full = (memory_per_rank(configured(**SEED, NLAYERS=n)).total / 1e9 for n in (14, 16))
    assert fits < 68.7 < full  # 64 GiB


@pytest.mark.parametrize(
    ("part", "settings", "share"),
    [
        ("gradients", {"ZERO_STAGE": 2}, 24 * 3),  # bf16 alone, and no fp32 copy of them
        ("weights", {"ZERO_STAGE": 3}, 24),
        ("weights", {"TP": 2}, 2),
        ("logits", {"TP": 2}, 2),
        ("logits", {"SP": 4}, 4),
        ("activations", {"SP": 4}, 4),
        ("activations", {"TP": 2, "SEQUENCE_PARALLEL": 1}, 2),
    ],
)
def test_what_is_cut(part, settings, share):
    whole = getattr(memory_per_rank(configured(**SEED, NLAYERS=4)), part)
    cut = getattr(memory_per_rank(configured(**SEED, NLAYERS=4, **settings)), part)
    assert cut == pytest.approx(whole / share, rel=1e-3)


def test_states_are_shared_out_over_the_ranks_of_a_sequence_too():
    plain, cut = (memory_per_rank(configured(**SEED, NLAYERS=4, SP=sp)) for sp in (1, 4))
    assert (cut.optimizer, cut.weights) == (plain.optimizer, plain.weights)


def test_recompute_and_offload_save():
    plain = memory_per_rank(configured(**SEED, NLAYERS=8))
    whole = memory_per_rank(configured(**SEED, NLAYERS=8, USE_ACTIVATION_CHECKPOINTING=1))
    selective = memory_per_rank(
        configured(**SEED, NLAYERS=8, USE_ACTIVATION_CHECKPOINTING="selective")
    )
    assert whole.activations < selective.activations < plain.activations
    assert memory_per_rank(configured(**SEED, NLAYERS=8, CPU_OPTIMIZER=1)).optimizer == 0


def test_a_pipeline_keeps_as_many_micro_batches_as_it_has_stages():
    one, four, eight = (
        memory_per_rank(configured(NLAYERS=8, HIDDEN=1024, SEQ=4096, PP=4, GAS=gas)).activations
        for gas in (1, 4, 8)
    )
    assert one < four == eight


def test_the_last_stage_keeps_one_micro_batch():
    settings = {"NLAYERS": 8, "HIDDEN": 256, "SEQ": 1024, "VOCAB_SIZE": 256000, "PP": 4}
    one, many = (memory_per_rank(configured(**settings, GAS=gas)) for gas in (1, 8))
    assert one.logits > 0  # the head makes the last stage the fullest
    assert many == one
