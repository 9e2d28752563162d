"""A start goes on with the experiment in its run's folder, and with no other by accident."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.config.resolve import Site
from megatron.config.schema import RunConfig
from tests.config.helpers import AURORA, refusal, resolved, started

STEP = '{"event": "step", "iteration": 1}\n'


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(*argv: str, site: Site | None = None, **environ: object) -> RunConfig:
    """A run that has made a step."""
    run = started(*argv, site=site, **environ)
    (run.run_folder / "metrics.jsonl").write_text(STEP)
    return run


def accepted(*argv: str, site: Site | None = None, **environ: object) -> list[str]:
    """The notes of a start that nothing speaks against."""
    found = resolved(*argv, site=site, **environ)
    assert not any("another experiment" in warning for warning in found.warnings), found.warnings
    return found.notes


NAME = {"RUN_NAME": "one"}
OTHER: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, {"LR": 0.001}, ["LR 0.003 -> 0.001", "RUN_NAME=one-lr0.001"]),
    ({"LR": 0.001}, {}, ["LR 0.001 -> 0.003"]),  # the next start has forgotten it
    ({}, {"SEED": 7}, ["SEED 1234 -> 7", "RUN_NAME=one-seed7"]),
    ({}, {"OPT": "muon"}, ["OPT adamw -> muon", "RUN_NAME=one-optmuon"]),
    ({}, {"SEQ_LEN": 64}, ["SEQ_LEN 128 -> 64", "RUN_NAME=one-seq_len64"]),
    ({}, {"NLAYERS": 8}, ["NLAYERS 4 -> 8", "RUN_NAME=one-nlayers8"]),
    ({}, {"MODEL_ARCH": "SmolLM2-135M", "VOCAB_SIZE": 4096, "SEQ": 128}, ["HIDDEN 128 -> 576"]),
    ({"GAS": 1}, {"GAS": 4}, ["GAS 1 -> 4", "GLOBAL_BATCH 16 -> 64", "RUN_NAME=one-gas4."]),
    ({"GLOBAL_BATCH": 16}, {"GLOBAL_BATCH": 32}, ["GLOBAL_BATCH 16 -> 32", "one-global_batch32"]),
    ({"WORLD_SIZE": 4}, {"WORLD_SIZE": 4, "TP": 2}, ["TP 1 -> 2", "GLOBAL_BATCH 64 -> 32"]),
    ({}, {"DTYPE": "bf16"}, ["DTYPE fp32 -> bf16"]),
    ({}, {"LR_DECAY_STYLE": "linear"}, ["LR_DECAY_STYLE cosine -> linear"]),
    ({}, {"EOD_MASK_LOSS": 1}, ["EOD_MASK_LOSS 0 -> 1"]),
    ({}, {"DATA_FILE_LIST": "my.txt", "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": 4096},
     ["DATA_FILE_LIST builtin -> my.txt", "data_file_listmy", "ALLOW_DATA_CHANGE=1"]),
]  # fmt: skip


@pytest.mark.parametrize(("first", "second", "words"), OTHER)
def test_another_experiment_is_refused(
    first: dict[str, Any], second: dict[str, Any], words: list[str]
) -> None:
    trained(**NAME, **first)
    message = refusal(**NAME, **second)
    for word in ["runs/one holds another experiment", "--resume runs/one", *words]:
        assert word in message, message
    # A dry run says it, too.
    assert any("status 2: runs/one" in text for text in resolved(**NAME, **second).warnings)
    # What the message offers works: another name is another folder.
    anew = message.partition("add ")[2].partition(". To go")[0]
    variables = dict(word.split("=", 1) for word in shlex.split(anew))
    accepted(**{**NAME, **second, **variables})


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"TRAIN_ITERS": 100}, {"TRAIN_ITERS": 300}),  # a longer run
    ({"LR": 0.001}, {"LR": "1e-3"}),
    ({"WORLD_SIZE": 4, "GLOBAL_BATCH": 64}, {"WORLD_SIZE": 4, "TP": 2, "GLOBAL_BATCH": 64}),
    ({"WORLD_SIZE": 2}, {"WORLD_SIZE": 4}),  # another node count
    ({}, {"ZERO_STAGE": 3, "USE_ACTIVATION_CHECKPOINTING": 1, "COMPILE": 0}),
    ({}, {"MICRO_BATCH": 8, "GAS": 2}),  # the same GLOBAL_BATCH
    ({}, {"SAVE_INTERVAL": 10, "EVAL_ITERS": 2, "SPIKE_POLICY": "skip", "KEEP_LAST": 2}),
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_experiment_goes_on(first: dict[str, Any], second: dict[str, Any]) -> None:
    trained(**NAME, **first)
    accepted(**NAME, **second)


def test_a_batch_that_follows_from_the_nodes_is_said() -> None:
    settings = {"VOCAB_SIZE": 32000, "DATA_FILE_LIST": "my.txt", "MODEL_ARCH": "2B"}
    trained(site=AURORA, **settings)
    more = Site("aurora", True, 4, 12, {"GRAD_ACC_STEPS": "8", "MICRO_BATCH": "1"})
    assert accepted(site=more, **settings) == accepted(site=AURORA, **settings)  # 24 x 16 = 48 x 8
    four = Site("aurora", True, 4, 12, AURORA.defaults)
    (note,) = (n for n in accepted(site=four, **settings) if "GLOBAL_BATCH" in n)
    assert note.startswith("GLOBAL_BATCH 384 -> 768 follows from WORLD_SIZE 24 -> 48")


def test_the_rows_of_a_sweep_have_folders_of_their_own() -> None:
    """As a sweep is typed: the integers of a 70B, micro-batches and tensor parallelism by row."""
    shape = {"NLAYERS": 80, "HIDDEN": 8192, "HEADS": 64, "FFN_HIDDEN_SIZE": 28672, "SEQ": 4096}
    site = Site("aurora", True, 8, 12, AURORA.defaults)
    base = {**shape, "VOCAB_SIZE": 32000, "DATA_FILE_LIST": "books.txt", "MICRO_BATCH": 1, "PP": 8}
    run = trained(site=site, **base, GAS=1, TP=1)
    assert run.run_folder == Path("runs/AuroraGPT-70B-seq4096-books")
    for row in ({"GAS": 2, "TP": 1}, {"GAS": 1, "TP": 2}, {"GAS": 32, "TP": 2}):
        (warning,) = (
            text
            for text in resolved(site=site, **base, **row).warnings
            if "another experiment" in text
        )
        marks = [f"{name.lower()}{value}" for name, value in row.items() if value > 1]
        assert all(mark in warning for mark in marks), warning


def test_a_start_that_made_no_step_may_be_corrected() -> None:
    run = started(**NAME)
    accepted(**NAME, LR=0.5)
    (run.run_folder / "metrics.jsonl").write_text('{"event": "stop", "iteration": 0}\n')
    accepted(**NAME, LR=0.5)
    (run.run_folder / "checkpoints/step-00000001").mkdir(parents=True)
    assert "LR 0.003 -> 0.5" in refusal(**NAME, LR=0.5)


def test_a_resume_by_name_takes_the_changes_beside_it() -> None:
    trained(**NAME)
    notes = accepted("--resume", "one", LR=0.5)
    assert any("changed: LR 0.003 -> 0.5" in note for note in notes)
    accepted("--resume", "one", NLAYERS=8)  # the checkpoint's own check refuses it


def test_other_folders_follow_in_the_advice() -> None:
    trained(RUN_DIR="here", CKPT_DIR="steps")
    message = refusal(RUN_DIR="here", CKPT_DIR="steps", LR=0.5)
    assert "add RUN_DIR=here-lr0.5 CKPT_DIR=steps-lr0.5. To go on" in message


def test_a_list_that_moved_is_the_same_data(here: Path) -> None:
    settings = {**NAME, "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": 500}
    for name, text in (("a.txt", "1 x\n"), ("b.txt", "1 x\n"), ("c.txt", "2 x\n")):
        (here / name).write_text(text)
    trained(**settings, DATA_FILE_LIST="a.txt")
    accepted(**settings, DATA_FILE_LIST="b.txt")
    assert "DATA_FILE_LIST a.txt -> c.txt" in refusal(**settings, DATA_FILE_LIST="c.txt")
    accepted(**settings, DATA_FILE_LIST="c.txt", ALLOW_DATA_CHANGE=1)


def test_a_new_data_stage_may_have_longer_samples() -> None:
    trained(**NAME)
    assert "ALLOW_DATA_CHANGE=1 begins a new data stage" in refusal(**NAME, SEQ=256)
    accepted(**NAME, SEQ=256, ALLOW_DATA_CHANGE=1)


def test_a_damaged_record_is_left_to_the_checkpoint() -> None:
    run = trained(**NAME)
    (run.run_folder / "run.json").write_text("{")
    accepted(**NAME, LR=0.5)
