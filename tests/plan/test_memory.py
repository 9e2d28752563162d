"""Parts of the memory estimate: bytes of blocks and loss as measured, and how a layout shards."""

import pytest

from megatron.config.schema import RunConfig
from megatron.parallel import head_loss
from megatron.plan import memory
from megatron.plan.memory import memory_per_rank
from megatron.plan.reductions import gradient_moments
from tests.config.helpers import configured
from tests.plan.measured import blocks_keep, loss_takes

SEED = {"MODEL_ARCH": "llama3-3B", "VOCAB_SIZE": 256000, "MICRO_BATCH": 1, "WORLD_SIZE": 24}
SMALL = {
    "NLAYERS": 3, "HIDDEN": 256, "HEADS": 4, "NUM_KV_HEAD": 2, "FFN_HIDDEN_SIZE": 704, "SEQ": 256,
    "MICRO_BATCH": 2, "VOCAB_SIZE": 1024, "DTYPE": "bf16",
}  # fmt: skip


def activations(run: RunConfig, rank: int = 0) -> tuple[int, int]:
    """What the blocks of a pipeline rank keep, and what they compute again at once."""
    part = memory._part(run, {rank})
    return memory._activations(run, part, memory._in_flight(run, rank))


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
    kept, again = activations(run)
    state = 2 * run.model.seq_length * run.model.hidden_size * memory._value_bytes(run)
    assert kept - 2 * state == pytest.approx(blocks_keep(run, 3), rel=0.05)
    measured = blocks_keep(plain, 1) - blocks_keep(run, 1)
    assert again == pytest.approx(measured, rel=0.05, abs=0.02 * kept)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"VOCAB_SIZE": 20000, "HIDDEN": 64},
        {"VOCAB_SIZE": 50000, "DTYPE": "fp32", "MICRO_BATCH": 1},
        {"VOCAB_SIZE": 20000, "HIDDEN": 64, "DTYPE": "fp16", "MICRO_BATCH": 6},
        # Two minutes where products of 16 bits are emulated.
        pytest.param(
            {"VOCAB_SIZE": 50000, "DTYPE": "fp16", "MICRO_BATCH": 6}, marks=pytest.mark.long
        ),
    ],
)
def test_the_loss_takes_what_is_measured(settings: dict) -> None:
    run = configured(**SMALL | settings)
    assert memory._logits(run) == pytest.approx(loss_takes(run), rel=0.05)


def test_muon_keeps_one_number_for_matrices_and_two_for_the_vocabulary():
    count, table = 2_982_239_232, 2 * 256000 * 3072
    estimate = memory_per_rank(configured(**SEED, NLAYERS=14, OPT="muon"))
    assert estimate.optimizer == (8 * count + 4 * table) // 24


def test_a_tile_of_64_gib_holds_all_layers_of_a_3b():
    """With room for the driver; the reference held 14 layers, our logits are smaller.

    It kept the logits in fp32 several times: 14 bytes for each of them, 29.4 GB here.
    """
    full, more = (configured(**SEED, NLAYERS=36, GAS=steps) for steps in (1, 2))
    assert memory_per_rank(full).total / 2**30 < 0.95 * 64 < memory_per_rank(more).total / 2**30


def test_the_edges_of_the_reference_by_its_own_formula():
    """14 and 18 layers fitted 64 GiB with its program, 16 and 20 did not.

    Gradients of 8.5 bytes a parameter with all states, blocks as ours, and for the head the bf16
    logits, an fp32 copy, the softmax, and one more of them: 26 GB of the 28 that the edges allow.
    """

    def total(arch: str, layers: int) -> float:
        run = configured(**{**SEED, "MODEL_ARCH": arch}, NLAYERS=layers, SEQ=8192)
        blocks = layers * memory._block(run, "0")
        return 8.5 * run.parameters + blocks + 26e9

    usable = 66.5e9
    assert total("llama3-3B", 14) < usable < total("llama3-3B", 16)
    assert total("smollm3-3B", 18) < usable < total("smollm3-3B", 20)


@pytest.mark.parametrize(
    ("part", "settings", "shards"),
    [
        ("weights", {"ZERO_STAGE": 3}, 24),
        ("weights", {"TP": 2}, 2),
        ("activations", {"SP": 4}, 4),
        ("activations", {"TP": 2, "SEQUENCE_PARALLEL": 1}, 2),
    ],
)
def test_what_is_sharded(part, settings, shards):
    long = {**SEED, "NLAYERS": 20, "GAS": 2}  # the loss is the peak
    whole = getattr(memory_per_rank(configured(**long)), part)
    shard = getattr(memory_per_rank(configured(**long, **settings)), part)
    assert shard == pytest.approx(whole / shards, rel=1e-3)


@pytest.mark.parametrize(("stage", "shards"), [(1, 1), (2, 24)])
def test_what_zero_keeps_of_the_gradients_of_earlier_micro_batches(stage, shards):
    run = configured(**SEED, NLAYERS=20, GAS=2, ZERO_STAGE=stage)
    found = gradient_moments(run.sharded, 24, run.parameters, 0, tied=False)
    assert found.loss == 4 * run.parameters // shards


def test_the_head_is_the_one_that_runs() -> None:
    assert (memory.CHUNK_BYTES, memory.CHUNK_TOKENS, memory.LOSS_BLOCK) == (
        head_loss.CHUNK_BYTES,
        head_loss.CHUNK_TOKENS,
        head_loss.BLOCK_ELEMENTS,
    )


def test_the_head_takes_1_5_gb_beside_its_gradients() -> None:
    run = configured(**SEED, NLAYERS=4, SEQ=8192)
    gradients = 2 * 3072 * (256000 + 8192)
    assert memory._logits(run) - gradients == 2 * 1024 * 256000 + 2 * 4 * 2**25 < 1.5e9


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
    one, many = (configured(**settings, GAS=gas) for gas in (1, 8))
    assert memory_per_rank(one).logits > 0  # the head makes the last stage the fullest
    assert activations(one, 3) == activations(many, 3)


def test_a_pipeline_recomputes_one_micro_batch_at_a_time():
    """With 4 micro-batches in flight, 4 times what is kept, and one block recomputed."""
    settings = {"NLAYERS": 8, "HIDDEN": 1024, "SEQ": 4096, "PP": 4, "PIPELINE_CUTS": "2,2,2,2"}
    settings |= {"VOCAB_SIZE": 128, "USE_ACTIVATION_CHECKPOINTING": 1}
    one, four = (activations(configured(**settings, GAS=gas)) for gas in (1, 4))
    sent = kept = 4096 * 1024 * 4 * 16  # an input of a block, fp32, 16 samples
    assert four[0] - one[0] == 3 * (2 * kept + sent)
    assert four[1] == one[1]


def test_a_stage_with_the_head_alone_keeps_no_block():
    settings = {"NLAYERS": 4, "PP": 2, "PIPELINE_CUTS": "4,0", "VOCAB_SIZE": 256000}
    run = configured(**settings, USE_ACTIVATION_CHECKPOINTING=1)
    state = 16 * 128 * 128 * 4  # around the final norm, and on the way between the stages
    assert activations(run, 1) == (5 * state, 0)
