"""Everything wrong is refused with the variable as the user wrote it, the arithmetic and a fix."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Site, resolve
from megatron.config.update_rules import REFUSED, accepted
from tests.config.helpers import refusal, resolved

NOBODY = 65534

BAD = [
    ({"TP": 3, "HEADS": 8, "HIDDEN": 64}, ["TP=3", "HEADS=8", "8 / 3 leaves 2", "Set TP=2"]),
    ({"TP": 3, "NHEADS": 8, "HIDDEN": 64}, ["TP=3", "NHEADS=8"]),
    ({"TP": 4, "HEADS": 8, "NUM_KV_HEAD": 2, "HIDDEN": 64}, ["NUM_KV_HEAD=2", "2 / 4 leaves 2"]),
    ({"TP": 2, "FFN_HIDDEN_SIZE": 353}, ["TP=2", "FFN_HIDDEN_SIZE=353", "353 / 2 leaves 1"]),
    ({"HEADS": 3, "NUM_KV_HEAD": 3}, ["HEADS=3", "HIDDEN=128", "128 / 3 leaves 2"]),
    ({"NUM_KV_HEAD": 3}, ["NUM_KV_HEAD=3", "HEADS=4", "4 / 3 leaves 1"]),
    ({"HIDDEN": 12, "HEADS": 4}, ["HIDDEN=12", "odd", "HIDDEN=16"]),
    ({"PP": 4, "NLAYERS": 2}, ["PP=4", "NLAYERS=2", "2 < 4"]),
    ({"PP": 3, "NUM_LAYERS": 2}, ["PP=3", "NUM_LAYERS=2", "2 < 3"]),
    ({"PP": 2, "ZERO_STAGE": 3}, ["ZERO_STAGE=3", "PP=2", "ZERO_STAGE=1"]),
    ({"PP": 2, "ZERO_STAGE": 2}, ["ZERO_STAGE=2", "PP=2"]),
    ({"EOD_MASK_LOSS": 1, "OPT": "sophiag"}, ["OPT=sophiag", "EOD_MASK_LOSS", "OPT=adamw"]),
    ({"KEEP_EVERY": 500}, ["KEEP_EVERY=500", "without KEEP_LAST", "KEEP_LAST=3"]),
    ({"KEEP_BEST": 2}, ["KEEP_BEST=2", "without KEEP_LAST", "unset KEEP_BEST"]),
    ({"ZERO_STAGE": 4}, ["ZERO_STAGE=4", "at most 3"]),
    ({"NHOSTS": 2}, ["NHOSTS=2", "WORLD_SIZE=1", "TP x PP x SP", "1 of them", "NGPU_PER_HOST"]),
    ({"WORLD_SIZE": 3, "TP": 2}, ["WORLD_SIZE=3", "3 / 2 leaves 1", "WORLD_SIZE=4"]),
    (
        {"SP": 3, "HEADS": 8, "HIDDEN": 64, "SEQ": 96},
        ["TP=1 x SP=3", "HEADS=8", "8 / 3 leaves 2", "SP=2", "HEADS=9"],
    ),
    ({"SP": 4, "TP": 2, "HEADS": 4, "NUM_KV_HEAD": 2}, ["TP=2 x SP=4", "4 / 8 leaves 4", "SP=2"]),
    ({"SP": 2, "SEQ": 127}, ["SP=2", "SEQ=127", "127 / 2 leaves 1", "SEQ=128"]),
    (
        {"SP": 2, "TP": 2, "SEQ": 126, "SEQUENCE_PARALLEL": 1},
        ["SP=2 x TP=2", "SEQ=126", "126 / 4 leaves 2", "SEQUENCE_PARALLEL", "SEQ=128"],
    ),
    (
        {"MICS_SHARD_SIZE": 3, "ZERO_STAGE": 3, "WORLD_SIZE": 4},
        ["MICS_SHARD_SIZE=3", "DP=4", "4 / 3 leaves 1"],
    ),
    ({"MICS_SHARD_SIZE": 1, "ZERO_STAGE": 3}, ["MICS_SHARD_SIZE=1", "shards nothing"]),
    ({"MICS_SHARD_SIZE": 2, "WORLD_SIZE": 4}, ["MICS_SHARD_SIZE=2", "ZERO_STAGE=1", "=3"]),
    (
        {"MICS_SHARD_SIZE": 2, "ZERO_STAGE": 3, "WORLD_SIZE": 4, "ZERO_HPZ_PARTITION_SIZE": 2},
        ["MICS_SHARD_SIZE=2", "ZERO_HPZ_PARTITION_SIZE=2", "unset one"],
    ),
    (
        {"MICS_SHARD_SIZE": 2, "ZERO_STAGE": 3, "WORLD_SIZE": 4, "CPU_OPTIMIZER": 1},
        ["MICS_SHARD_SIZE=2", "CPU_OPTIMIZER", "one of them"],
    ),
    ({"PIPELINE_SCHEDULE": "dualpipev"}, ["PIPELINE_SCHEDULE=dualpipev", "PP=1", "PP=2"]),
    (
        {"PIPELINE_SCHEDULE": "dualpipev", "PP": 2, "GAS": 3, "NLAYERS": 4},
        ["dualpipev", "PP=2", "GAS=3", "GAS=4"],
    ),
    (
        {"PIPELINE_SCHEDULE": "dualpipev", "PP": 2, "GAS": 4, "NLAYERS": 3},
        ["dualpipev", "NLAYERS=3", "4 stages", "PP=1"],
    ),
    ({"PIPELINE_CUTS": "2,x", "PP": 2}, ["PIPELINE_CUTS=2,x", "5,6,6,5"]),
    ({"PIPELINE_CUTS": "2,1,1", "PP": 2, "NLAYERS": 4}, ["PIPELINE_CUTS", "3 stages", "PP=2"]),
    ({"PIPELINE_CUTS": "2,1", "PP": 2, "NLAYERS": 4}, ["2 + 1 = 3", "NLAYERS=4"]),
    ({"PIPELINE_CUTS": "0,4", "PP": 2, "NLAYERS": 4}, ["PIPELINE_CUTS=0,4", "the head"]),
    ({"CPU_OPTIMIZER": 1, "OPTIM": "muon"}, ["CPU_OPTIMIZER", "OPTIM=muon", "adamw"]),
    (
        {"ZERO_HPZ_PARTITION_SIZE": 2, "WORLD_SIZE": 4},
        ["ZERO_HPZ_PARTITION_SIZE=2", "ZERO_STAGE=3"],
    ),
    ({"ZERO_HPZ_PARTITION_SIZE": 3, "ZERO_STAGE": 3, "WORLD_SIZE": 4}, ["4 / 3 leaves 1"]),
    ({"GLOBAL_BATCH": 7, "MICRO_BATCH": 2}, ["GLOBAL_BATCH=7", "MICRO_BATCH=2", "7 / 2 leaves 1"]),
    ({"GLOBAL_BATCH": 7, "WORLD_SIZE": 2}, ["GLOBAL_BATCH=7", "DP=2", "7 / 2 leaves 1"]),
    ({"GLOBAL_BATCH": 8, "GAS": 3}, ["GLOBAL_BATCH=8", "GAS=3", "8 / 3 leaves 2"]),
    ({"GLOBAL_BATCH": 8, "GAS": 2, "MICRO_BATCH": 2}, ["GLOBAL_BATCH=8", "GAS=2", "= 4"]),
    ({"GAS": 2, "GRAD_ACC_STEPS": 3}, ["GAS=2", "GRAD_ACC_STEPS=3", "unset one"]),
    ({"SEQ": 64, "SEQ_LEN": 128}, ["SEQ=64", "SEQ_LEN=128"]),
    ({"TRAIN_ITERS": 10, "TRAIN_TOKENS": 99999}, ["TRAIN_ITERS=10", "TRAIN_TOKENS=99999", "20480"]),
    ({"TRAIN_TOKENS": 5}, ["TRAIN_TOKENS=5", "2048 tokens per step"]),
    ({"NLAYERS": "abc"}, ["NLAYERS=abc", "whole number"]),
    ({"NLAYERS": 2.5}, ["NLAYERS=2.5", "whole number"]),
    ({"NLAYERS": 0}, ["NLAYERS=0", "at least 1"]),
    ({"SEQ_LENGTH": -4}, ["SEQ_LENGTH=-4", "at least 1"]),
    ({"LR": 0}, ["LR=0", "above 0"]),
    ({"LR": "nan"}, ["LR=nan", "not a number"]),
    ({"CLIP_GRAD": -1}, ["CLIP_GRAD=-1", "at least 0"]),
    ({"ADAM_BETA2": 1}, ["ADAM_BETA2=1", "below 1"]),
    ({"LR_WARMUP_FRACTION": 1.5}, ["LR_WARMUP_FRACTION=1.5", "below 1"]),
    ({"MIN_LR": 1}, ["MIN_LR=1", "LR=0.003"]),
    ({"LR_DECAY_STYLE": "nosuch"}, ["LR_DECAY_STYLE=nosuch", "cosine"]),
    (
        {"LR_DECAY_STYLE": "infinite-cosine", "LR_COOLDOWN_FRACTION": 0.99},
        ["LR_COOLDOWN_FRACTION=0.99"],
    ),
    (
        {"LR_DECAY_STYLE": "infinite-cosine", "LR": 1e-5, "MIN_LR": 0},
        ["LR_CONSTANT=0.00011", "LR=1e-05"],
    ),
    (
        {"LR_DECAY_STYLE": "warmup-stable-decay", "LR_DECAY_FRACTION": 0.99},
        ["LR_DECAY_FRACTION=0.99"],
    ),
    (
        {"GRAD_REDUCE_IN_BF16": 1, "DTYPE": "fp16"},
        ["GRAD_REDUCE_IN_BF16 is", "DTYPE=fp16", "Unset GRAD_REDUCE_IN_BF16"],
    ),
    ({"DTYPE": "int8"}, ["DTYPE=int8", "bf16, fp16, fp32"]),
    ({"WANDB_DISABLED": "maybe"}, ["WANDB_DISABLED=maybe", "1/true/yes/on"]),
    ({"NO_FLASH_ATTN": "2"}, ["NO_FLASH_ATTN=2", "0/false/no/off"]),
    ({"MODEL_ARCH": "3B"}, ["MODEL_ARCH=3B", "smollm3-3B", "SmolLM2-135M", "debug"]),
    ({"OPT": "nosuch"}, ["OPT=nosuch", "adamw, adam, sgd"]),
    ({"OPTIMIZER": "muonclip"}, ["OPTIMIZER=muonclip", "Nearest: OPTIMIZER=muon"]),
    ({"OPT": "muon", "ZERO_STAGE": 2}, ["OPT=muon", "ZERO_STAGE=2", "whole matrices"]),
    ({"OPT": "lamb", "ZERO_STAGE": 3}, ["OPT=lamb", "ZERO_STAGE=3"]),
    ({"TRAIN_RANGE_TO_SKIP": "10 20 25"}, ["TRAIN_RANGE_TO_SKIP", "3 / 2 leaves 1"]),
    ({"TRAIN_RANGE_TO_SKIP": "20 10"}, ["TRAIN_RANGE_TO_SKIP", "20 > 10"]),
    ({"ROPE_SCALING": "yarn"}, ["ROPE_SCALING=yarn", "llama3:factor"]),
    ({"ROPE_SCALING": "llama3:8,4,1,8192"}, ["ROPE_SCALING", "low < high"]),
    ({"VAL_SPLIT": 0}, ["VAL_SPLIT=0", "EVAL_INTERVAL=0"]),
    ({"RUN_NAME": "a/b"}, ["RUN_NAME=a/b", "RUN_DIR"]),
    ({"TOKENIZER_TYPE": "NullTokenizer"}, ["NullTokenizer", "VOCAB_SIZE"]),
    ({"TOKENIZER_MODEL": "nobody/knows-it"}, ["TOKENIZER_MODEL=nobody/knows-it", "VOCAB_SIZE"]),
    ({"TOKENIZER_TYPE": "CharTokenizer"}, ["CharTokenizer", "TOKENIZER_MODEL"]),
    (
        {"USE_ACTIVATION_CHECKPOINTING": 1, "ACT_CKPT_NUM_LAYERS": 5},
        ["ACT_CKPT_NUM_LAYERS=5", "= 4"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), BAD, ids=lambda value: str(value)[:50])
def test_wrong_settings(settings, words):
    message = refusal(**settings)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


def test_wrong_settings_have_status_2_and_wrong_data_3():
    with pytest.raises(ConfigError) as setting:
        resolve({"TP": "3"}, [], Site())
    with pytest.raises(DataError) as data:
        resolve({"DATA_FILE_LIST": "missing.txt"}, [], Site())
    assert (setting.value.exit_status, data.value.exit_status) == (2, 3)
    assert "DATA_FILE_LIST=missing.txt" in str(data.value)


def test_everything_wrong_is_reported_at_once():
    message = refusal("--nosuch", NLAYERS="abc", LR="x", DTYPE="int8")
    assert all(word in message for word in ("--nosuch", "NLAYERS=abc", "LR=x", "DTYPE=int8"))


def test_a_flag_is_named_as_the_flag():
    assert "--tensor-model-parallel-size=3" in refusal("--tensor-model-parallel-size", "3")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_optimizers_name_an_accepted_one(name):
    reason, nearest = REFUSED[name]
    message = refusal(OPT=name)
    assert nearest in accepted() and reason in message and f"OPT={nearest}" in message


@pytest.mark.parametrize("name", accepted())
def test_accepted_optimizers(name):
    assert resolved(OPT=name).run.optimizer.optimizer == name


def test_a_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "RUN_DIR" in refusal(RUN_DIR=tmp_path / "file" / "run")
    assert "CKPT_DIR" in refusal(CKPT_DIR=tmp_path / "file" / "run")
    assert "SAVE" in refusal(SAVE=tmp_path / "file")


def test_a_folder_without_rights_is_refused():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o555)
        child = multiprocessing.get_context("fork").Process(
            target=_refused_to_a_plain_user, args=(folder,)
        )
        child.start()
        child.join(60)
        assert child.exitcode == 0


def _refused_to_a_plain_user(folder: str) -> None:
    if os.geteuid() == 0:  # root may write everywhere
        try:
            os.setuid(NOBODY)
        except OSError:  # a container that has no other user
            return
    assert "RUN_DIR" in refusal(RUN_DIR=Path(folder) / "run")
