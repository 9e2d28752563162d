"""The memory estimate: held to bytes measured on this host, and following the layout."""

import pytest

from megatron.plan.memory import memory_per_rank
from tests.config.helpers import configured
from tests.plan.measured import blocks_keep, loss_takes

SEED = {"MODEL_ARCH": "llama3-3B", "VOCAB_SIZE": 256000, "MICRO_BATCH": 1, "WORLD_SIZE": 24}
SMALL = {
    "NLAYERS": 3, "HIDDEN": 256, "HEADS": 4, "NUM_KV_HEAD": 2, "FFN_HIDDEN_SIZE": 704, "SEQ": 256,
    "MICRO_BATCH": 2, "VOCAB_SIZE": 1024, "DTYPE": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("recompute", ["0", "1", "selective"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"HEADS": 8, "NUM_KV_HEAD": 1, "FFN_HIDDEN_SIZE": 256},
        {"NUM_KV_HEAD": 4, "HIDDEN": 512, "SEQ": 128, "DTYPE": "fp32"},
        {"NO_FLASH_ATTN": 1},
    ],
)
def test_blocks_keep_what_is_measured(shape: dict, recompute: str) -> None:
    """At the end of the forward pass, and with what the backward pass computes again at once."""
    plain = configured(**SMALL | shape)
    run = configured(**SMALL | shape, USE_ACTIVATION_CHECKPOINTING=recompute)
    measured = blocks_keep(run, 3) + blocks_keep(plain, 1) - blocks_keep(run, 1)
    assert memory_per_rank(run).activations == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [{}, {"VOCAB_SIZE": 50000}, {"VOCAB_SIZE": 50000, "DTYPE": "fp32", "MICRO_BATCH": 1}],
)
def test_the_loss_takes_what_is_measured(settings: dict) -> None:
    run = configured(**SMALL | settings)
    assert memory_per_rank(run).logits == pytest.approx(loss_takes(run), rel=0.05)


def test_muon_keeps_one_number_for_matrices_and_two_for_the_vocabulary():
    count, table = 2_982_239_232, 2 * 256000 * 3072
    estimate = memory_per_rank(configured(**SEED, NLAYERS=14, OPT="muon"))
    assert estimate.optimizer == (8 * count + 4 * table) // 24


def test_a_tile_of_64_gb_holds_26_layers_and_not_28():
    """The parts are measured above and in tests/equivalence/test_zero_layouts.py.

    The reference held 14 layers: it kept the logits in fp32 several times, 14 bytes per logit.
    """
    fits, full = (memory_per_rank(configured(**SEED, NLAYERS=n)).total / 2**30 for n in (26, 28))
    assert fits < 64 < full


@pytest.mark.parametrize(
    ("part", "settings", "shards"),
    [
        ("gradients", {"ZERO_STAGE": 2}, 24 * 3),  # bf16 alone, not accumulated in fp32
        ("weights", {"ZERO_STAGE": 3}, 24),
        ("weights", {"TP": 2}, 2),
        ("activations", {"SP": 4}, 4),
        ("activations", {"TP": 2, "SEQUENCE_PARALLEL": 1}, 2),
    ],
)
def test_what_is_sharded(part, settings, shards):
    whole = getattr(memory_per_rank(configured(**SEED, NLAYERS=4)), part)
    shard = getattr(memory_per_rank(configured(**SEED, NLAYERS=4, **settings)), part)
    assert shard == pytest.approx(whole / shards, rel=1e-3)


def test_logits_are_sharded_and_the_block_of_the_loss_is_not():
    whole, tp, sp = (
        memory_per_rank(configured(**SEED, NLAYERS=4, **more)).logits
        for more in ({}, {"TP": 2}, {"SP": 2})
    )
    assert tp == sp and 2 * tp - whole == 2 * 64 * 2**20


def test_states_are_sharded_over_the_ranks_of_a_sequence_too():
    one, four = (memory_per_rank(configured(**SEED, NLAYERS=4, SP=sp)) for sp in (1, 4))
    assert (four.optimizer, four.weights) == (one.optimizer, one.weights)


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


def test_a_pipeline_recomputes_one_micro_batch_at_a_time():
    """With 4 micro-batches in flight, 4 times what is kept, and one block recomputed."""
    settings = {"NLAYERS": 8, "HIDDEN": 1024, "SEQ": 4096, "PP": 4, "PIPELINE_CUTS": "2,2,2,2"}
    settings |= {"VOCAB_SIZE": 128, "USE_ACTIVATION_CHECKPOINTING": 1}
    one, four = (memory_per_rank(configured(**settings, GAS=gas)).activations for gas in (1, 4))
    kept = 2 * 4096 * 1024 * 4 * 16  # two inputs of blocks, fp32, 16 samples
    assert four - one == 3 * kept


def test_a_stage_with_the_head_alone_keeps_no_block():
    settings = {"NLAYERS": 4, "PP": 2, "PIPELINE_CUTS": "4,0", "VOCAB_SIZE": 256000}
    assert memory_per_rank(configured(**settings, USE_ACTIVATION_CHECKPOINTING=1)).activations == 0
