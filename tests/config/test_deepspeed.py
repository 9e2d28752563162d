"""The DeepSpeed configuration, for every stage, precision, pipeline and offload."""

import json

import pytest

from megatron.config.deepspeed import deepspeed_config
from tests.config.helpers import configured

PRECISION = {
    "fp32": {},
    "fp16": {
        "fp16": {
            "enabled": True, "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2,
            "min_loss_scale": 1,
        }
    },
    "bf16": {"bf16": {"enabled": True}, "communication_data_type": "fp32"},
}  # fmt: skip
STAGE_3 = {
    "stage3_prefetch_bucket_size": 1787008,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 3_000_000_000,
    "stage3_max_reuse_distance": 3_000_000_000,
}


# (stage, pipeline stages, offload): the combinations that are not refused before launch
LAYOUTS = [
    (stage, pp, offload)
    for stage in (0, 1, 2, 3)
    for pp in (1, 2)
    for offload in (0, 1)
    if pp == 1 or stage < 2
]


def test_deepspeed_counts_pieces_of_samples():
    config = deepspeed_config(configured(SP=2, WORLD_SIZE=4, MICRO_BATCH=2, GAS=4))
    assert config["train_batch_size"] == 2 * 4 * 4
    assert config["train_micro_batch_size_per_gpu"] == 2


def test_stages_send_whole_activations_where_tensor_parallel_ranks_hold_other_positions():
    whole = {"pipe_partitioned": False, "grad_partitioned": False}
    cut = configured(TP=2, PP=2, WORLD_SIZE=4, SEQUENCE_PARALLEL=1)
    assert deepspeed_config(cut)["pipeline"] == whole
    assert "pipeline" not in deepspeed_config(configured(TP=2, PP=2, WORLD_SIZE=4))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("stage", "pp", "offload"), LAYOUTS)
def test_golden(stage, dtype, pp, offload):
    run = configured(
        ZERO_STAGE=stage, DTYPE=dtype, PP=pp, CPU_OPTIMIZER=offload,
        MICRO_BATCH=2, GAS=4, WORLD_SIZE=4, CLIP_GRAD=0.3,
        ZERO_HPZ_PARTITION_SIZE=2 if stage == 3 else 1,
    )  # fmt: skip
    zero = {"stage": max(stage, 1), "reduce_bucket_size": 1787008}
    zero |= (
        {**STAGE_3, "zero_hpz_partition_size": 2}
        if stage == 3
        else {"allgather_bucket_size": 1787008}
    )
    expected = {
        "train_batch_size": 2 * 4 * 4 // pp,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.3,
        "steps_per_print": 2147483647,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        **PRECISION[dtype],
    }
    if dtype == "bf16" and stage <= 1:
        expected["data_types"] = {"grad_accum_dtype": "fp32"}
        expected["bf16"] = {"enabled": True, "immediate_grad_update": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        expected["zero_force_ds_cpu_optimizer"] = False
    config = deepspeed_config(run)
    assert config == expected
    assert json.loads(json.dumps(config)) == config
    assert deepspeed_config(run) == config


@pytest.mark.parametrize("asked", [["--grad-reduce-in-bf16"], []])
def test_gradients_are_averaged_in_bf16_on_request_only(asked):
    config = deepspeed_config(configured(*asked, DTYPE="bf16"))
    assert config["communication_data_type"] == ("bf16" if asked else "fp32")


def test_mics_batch_is_that_of_a_shard_group():
    """DeepSpeed checks its batch sizes against the ranks that it sees."""
    config = deepspeed_config(
        configured(ZERO_STAGE=3, MICS_SHARD_SIZE=2, WORLD_SIZE=8, MICRO_BATCH=3, GAS=5)
    )
    assert config["train_batch_size"] == 2 * 3 * 5


@pytest.mark.parametrize(("schedule", "given"), [("1f1b", False), ("dualpipev", True)])
def test_dualpipev_sends_whole_activations(schedule, given):
    settings = {"PP": 2, "TP": 2, "GAS": 4, "NLAYERS": 4, "PIPELINE_SCHEDULE": schedule}
    assert ("pipeline" in deepspeed_config(configured(**settings))) is given


def test_buckets_do_not_grow_with_the_model():
    zero = deepspeed_config(configured(MODEL_ARCH="70B", VOCAB_SIZE=32000))["zero_optimization"]
    assert zero["reduce_bucket_size"] == 200_000_000


def test_every_key_is_known_to_deepspeed():
    """DeepSpeed ignores top-level keys that it does not know; its models refuse theirs."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import precision_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in (1, 3):
        config = deepspeed_config(configured(ZERO_STAGE=stage, DTYPE="fp16"))
        read = DeepSpeedZeroConfig(**config["zero_optimization"])
        assert (int(read.stage), read.reduce_bucket_size) == (stage, 1787008)
        assert precision_config.DeepSpeedFP16Config(**config["fp16"]).enabled
        known = _top_level_keys()
        assert set(config) <= known, set(config) - known
    assert set(deepspeed_config(configured(DTYPE="bf16", CPU_OPTIMIZER=1))) <= _top_level_keys()


def _top_level_keys() -> set[str]:
    """Strings that DeepSpeed's configuration modules name as constants."""
    from deepspeed.runtime import constants, precision_config
    from deepspeed.runtime.zero import config as zero

    modules = (constants, precision_config, zero)
    return {
        value for module in modules for value in vars(module).values() if isinstance(value, str)
    }
