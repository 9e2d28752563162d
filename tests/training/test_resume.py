"""Resuming with other settings: each change of numbers is said, what cannot go on is refused."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.pace import learning_rates
from megatron.config.schedule import learning_rate
from megatron.config.schema import RunConfig, options
from megatron.parallel.control import ALONE
from megatron.training import changes
from megatron.training.changes import AT_START, COMPARED_ELSEWHERE, NUMBERS, SAME_NUMBERS
from megatron.training.resume import resume
from megatron.training.saving import manifest_of, save_checkpoint
from tests.training.run_config import tiny_run
from tests.training.test_trainer import Adder


def with_settings(run: RunConfig, **settings: Any) -> RunConfig:
    """The run with some fields set, each named `section__field`."""
    for name, value in settings.items():
        section, _, field = name.partition("__")
        part = dataclasses.replace(getattr(run, section), **{field: value})
        run = dataclasses.replace(run, **{section: part})
    return run


def text(before: RunConfig, now: RunConfig, done: int = 10) -> str:
    return changes.changes_text(now, before.to_dict(), done)


def test_every_option_is_in_one_table() -> None:
    tables = (NUMBERS, AT_START, COMPARED_ELSEWHERE, SAME_NUMBERS)
    classified = [key for table in tables for key in table]
    assert len(classified) == len(set(classified)), "none is in two"
    assert set(classified) == {option.key for option in options()}, (
        "a new option stands in one of the tables of training/changes.py"
    )


OTHER = {int: lambda v: v + 1, float: lambda v: v * 0.75 + 0.001, bool: lambda v: not v}
CHOSEN = {
    "train.dtype": "bf16",
    "train.float8": "rowwise",
    "optimizer.lr_decay_style": "linear",
    "stability.spike_policy": "rollback",
    "optimizer.weight_decay_incr_style": "cosine",
    "optimizer.start_weight_decay": 0.3,
    "optimizer.end_weight_decay": 0.3,
    "model.word_embedding_init_std": 0.3,
    "train.rampup_batch_size": "2 2 8",
    "data.valid_data_file_list": "held_out.txt",
    "data.test_data_file_list": "held_out.txt",
}
GROWING = {
    "optimizer__weight_decay_incr_style": "linear",
    "optimizer__start_weight_decay": 0.1,
    "optimizer__end_weight_decay": 0.2,
}
IN_USE = {
    "optimizer.sgd_momentum": {"optimizer__optimizer": "sgd"},
    "optimizer.muon_momentum": {"optimizer__optimizer": "muon"},
    "optimizer.sophia_beta1": {"optimizer__optimizer": "sophiag"},
    "optimizer.sophia_beta2": {"optimizer__optimizer": "sophiag"},
    "optimizer.start_weight_decay": GROWING,
    "optimizer.end_weight_decay": GROWING,
    "optimizer.sophia_rho": {"optimizer__optimizer": "sophiag"},
    "optimizer.sophia_hessian_interval": {"optimizer__optimizer": "sophiag"},
    "optimizer.lr_cooldown_fraction": {"optimizer__lr_decay_style": "infinite-cosine"},
    "optimizer.lr_constant": {"optimizer__lr_decay_style": "infinite-cosine"},
    "optimizer.lr_constant_fraction": {"optimizer__lr_decay_style": "infinite-cosine"},
    "optimizer.lr_timescale": {"optimizer__lr_decay_style": "infinite-inv-square-root"},
    "optimizer.lr_decay_fraction": {"optimizer__lr_decay_style": "warmup-stable-decay"},
    "stability.spike_threshold": {"stability__spike_policy": "skip"},
    "stability.spike_window": {"stability__spike_policy": "skip"},
    "stability.rollback_steps": {"stability__spike_policy": "rollback"},
}


def changed(run: RunConfig, key: str) -> tuple[Any, Any]:
    """A field's value, and another one."""
    section, _, field = key.partition(".")
    value = getattr(getattr(run, section), field)
    return value, CHOSEN.get(key) or OTHER[type(value)](value)


@pytest.mark.parametrize("key", [*NUMBERS, *AT_START])
def test_each_change_of_numbers_is_said_by_its_variable(key: str, tmp_path: Path) -> None:
    before = with_settings(tiny_run(tmp_path), **IN_USE.get(key, {}))
    old, new = changed(before, key)
    now = with_settings(before, **{key.replace(".", "__"): new})
    option = next(option for option in options() if option.key == key)
    plain = {True: "1", False: "0"}
    shown = plain.get(old, old) if isinstance(old, bool) else "unset" if old is None else old
    wanted = f"{option.name}  {shown} -> "
    assert wanted in text(before, now)
    assert text(before, before) == ""
    assert ("no effect" in text(before, now)) == (key in AT_START)


@pytest.mark.parametrize("key", sorted(IN_USE))
def test_what_does_not_act_is_not_said(key: str, tmp_path: Path) -> None:
    before = tiny_run(tmp_path)
    now = with_settings(before, **{key.replace(".", "__"): changed(before, key)[1]})
    assert text(before, now) == ""


def test_the_rate_of_the_next_step_is_shown_under_both_schedules(tmp_path: Path) -> None:
    before = tiny_run(tmp_path)
    now = with_settings(before, train__train_iters=50, optimizer__lr_decay_iters=50)
    old, new = learning_rate(11, before.optimizer), learning_rate(11, now.optimizer)
    assert old != new
    lines = text(before, now).splitlines()
    assert lines[0] == "settings that differ from those of the checkpoint of step 10:"
    assert "  TRAIN_ITERS     100 -> 50" in lines and "  LR_DECAY_ITERS  100 -> 50" in lines
    assert lines[-1] == f"  the learning rate of step 11: {old:.6g} -> {new:.6g}"
    assert "the learning rate" not in text(before, with_settings(before, optimizer__adam_eps=1e-8))


def test_sophia_had_adams_betas_before_it_had_its_own(tmp_path: Path) -> None:
    run = with_settings(tiny_run(tmp_path), optimizer__optimizer="sophiag")
    stored = run.to_dict()
    del stored["optimizer"]["sophia_beta1"], stored["optimizer"]["sophia_beta2"]
    lines = changes.changes_text(run, stored, 3)
    assert "SOPHIA_BETA1  0.9 -> 0.965" in lines and "SOPHIA_BETA2  0.95 -> 0.99" in lines


def test_the_next_rate_of_a_growing_batch(tmp_path: Path) -> None:
    before = tiny_run(tmp_path)
    now = with_settings(before, train__rampup_batch_size="2 2 40")
    old, new = learning_rates(before)(11), learning_rates(now)(11)
    assert old != new and f"step 11: {old:.6g} -> {new:.6g}" in text(before, now)


def test_an_older_manifest_lacks_sections_and_fields(tmp_path: Path) -> None:
    run = with_settings(tiny_run(tmp_path), stability__spike_policy="rollback")
    assert changes.changes_text(run, {}, 3) == "", "an imported model has no settings"
    partial = {"optimizer": {"learning_rate": 0.1}, "unknown": 3}
    assert "LR  0.1 -> 0.0002" in changes.changes_text(tiny_run(tmp_path), partial, 3)
    stored = tiny_run(tmp_path).to_dict()
    del stored["stability"], stored["train"]["grad_reduce_in_bf16"]
    stored["optimizer"] |= {"lr_decay_style": "a style of before", "gone": 1}
    now = with_settings(run, train__grad_reduce_in_bf16=True)
    lines = changes.changes_text(now, stored, 3)
    for line in ("GRAD_REDUCE_IN_BF16  0 -> 1", "SPIKE_POLICY         warn -> rollback"):
        assert line in lines
    assert "learning rate of step" not in lines, "the old schedule is not known"


def saved(run: RunConfig, step: int = 10) -> Adder:
    engine = Adder()
    state = RunState(iteration=step)
    shards = engine.shards()
    saver = Saver(run.checkpoint_folder, ALONE, KEEP_ALL, asynchronous=False, warn=print)
    done = save_checkpoint(saver, shards, engine.optimizer, state, manifest_of(run))
    assert done is not None and done.path is not None, done
    return engine


def test_a_resume_logs_the_changes_in_one_block(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(tmp_path)
    engine = saved(run)
    with caplog.at_level(logging.WARNING):
        resume(with_settings(run, optimizer__adam_beta2=0.99, train__seed=5), engine)
    (record,) = caplog.records
    assert "SEED        1234 -> 5" in record.message
    assert "ADAM_BETA2  0.95 -> 0.99" in record.message
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        resume(with_settings(run, log__log_interval=7, train__micro_batch_size=4), engine)
    assert not caplog.records


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"model__num_layers": 4}, "NLAYERS 3 -> 4"),
        ({}, {"model__rope_theta": 1e4}, "ROPE_THETA 50000.0 -> 10000.0"),
        ({}, {"optimizer__optimizer": "sgd"}, "set OPT=adamw"),
        (
            {"optimizer__optimizer": "adamwschedulefree"},
            {"optimizer__adam_beta1": 0.8},
            "set ADAM_BETA1=0.9",
        ),
    ],
)
def test_another_experiment_is_refused_with_both_ways_on(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = with_settings(tiny_run(tmp_path), **before)
    engine = saved(run)
    with pytest.raises(ConfigError) as refused:
        resume(with_settings(run, **now), engine)
    assert message in str(refused.value)
    assert "or start a new run with another RUN_NAME" in str(refused.value)
