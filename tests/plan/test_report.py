"""The ARCHITECTURE box and what a dry run prints."""

import json

from megatron.config.deepspeed import deepspeed_config
from megatron.plan.report import architecture_box, dry_run_text, placement_text
from tests.config.helpers import configured, resolved, write_pair

FIELDS = [
    "MODEL_ARCH", "PARAMS", "TP", "PP", "SP", "DP", "ZERO", "MBS", "GAS", "GBS", "NLAYERS",
    "HIDDEN", "HEADS", "SEQ", "FFN_HIDDEN_SIZE", "NUM_KV_HEAD", "USE_ACTIVATION_CHECKPOINTING",
    "DTYPE", "OPT",
]  # fmt: skip


def test_box():
    lines = architecture_box(
        configured(MODEL_ARCH="70B", VOCAB_SIZE=32000, PP=8, ZERO_STAGE=0)
    ).splitlines()
    assert lines[0] == "==== ARCHITECTURE ===="
    box = dict(line.split(": ") for line in lines[1:-1])
    assert list(box) == FIELDS
    assert (box["PARAMS"], box["PP"], box["ZERO"]) == ("68976648192", "8", "0")


def test_dry_run_holds_everything(tmp_path):
    write_pair(tmp_path / "a", [3000])
    (tmp_path / "list.txt").write_text(f"1 {tmp_path}/a wiki\n")
    plan = resolved(
        "--train-range-to-skip", "10", "20", "--swiglu",
        DATA_FILE_LIST=tmp_path / "list.txt", VOCAB_SIZE=32000, NLAYER=3, TRAIN_ITERS=30,
    )  # fmt: skip
    text = dry_run_text(plan, "torchrun --nproc-per-node 1 pretrain_gpt_alcf.py")
    run = plan.run
    for words in (
        "WARNING: NLAYER=3 has no effect",
        "note: --swiglu changes nothing",
        f"{run.parameters:,}",
        str(run.parameters),
        architecture_box(run),
        "wiki",
        "3,000",
        f"10-20: 11 steps, {11 * 16} samples, {11 * 16 * 128:,} tokens",
        json.dumps(deepspeed_config(run), indent=2),
        "torchrun --nproc-per-node 1",
        "GiB",
        "-- ranks --\none rank",
    ):
        assert words in text, words
    row = next(line for line in text.splitlines() if line.startswith("TRAIN_ITERS "))
    assert row.split() == ["TRAIN_ITERS", "30", "TRAIN_ITERS"]
    assert f"{30 * 2048 / (3000 * 0.99):.4f}" in text  # epochs


def test_ranks_are_drawn():
    run = configured(
        TP=2, SP=2, PP=2, ZERO_STAGE=1, WORLD_SIZE=16, NHOSTS=2, NGPU_PER_HOST=8
    )  # fmt: skip
    assert placement_text(run).splitlines() == [
        "axis  size  ranks  hosts per group  divides",
        "TP    2     0 1    1                each matrix",
        "SP    2     0 2    1                the sequence of each sample",
        "DP    2     0 4    1                each step's samples",
        "PP    2     0 8    2                the layers",
        "host 0: stage 0: [(0 1) (2 3)] [(4 5) (6 7)]",
        "host 1: stage 1: [(8 9) (10 11)] [(12 13) (14 15)]",
        "ranks: the group of rank 0; () ranks of a TP group, [] of an SP group",
        "ZeRO 1: optimizer states sharded over the 4 ranks of DP x SP",
    ]
    many = placement_text(configured(WORLD_SIZE=96, NHOSTS=8, NGPU_PER_HOST=12, ZERO_STAGE=3))
    assert "DP    96    0 1 2 .. 95  8 " in many


def test_missing_data_is_a_warning_in_a_dry_run():
    text = dry_run_text(resolved(DATA_FILE_LIST="gone.txt", VOCAB_SIZE=256), "")
    assert "WARNING: a real run would stop here with status 3: DATA_FILE_LIST=gone.txt" in text
