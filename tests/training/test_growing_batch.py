"""The loop with a batch that grows: every sample once, right counters, rates and records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron.config.schema import RunConfig
from tests.training.test_trainer import Adder, config, trained

SIZES = [2, 2, 4, 6, 8, 8, 8]  # RAMPUP_BATCH_SIZE="2 2 12" of GLOBAL_BATCH=8
ENDS = [sum(SIZES[: n + 1]) for n in range(len(SIZES))]


def growing(folder: Path, steps: int = 7, **kwargs: object) -> RunConfig:
    run = config(folder, steps, **kwargs)  # type: ignore[arg-type]
    train = dataclasses.replace(
        run.train,
        global_batch_size=8,
        gradient_accumulation_steps=4,
        rampup_batch_size="2 2 12",
    )
    optimizer = dataclasses.replace(
        run.optimizer, lr_decay_style="linear", lr_decay_iters=7, lr_warmup_fraction=0.0
    )
    return dataclasses.replace(run, train=train, optimizer=optimizer)


def test_each_step_takes_the_next_samples(tmp_path: Path) -> None:
    engine = Adder()
    outcome, records = trained(growing(tmp_path), engine)
    assert engine.trained == [*range(ENDS[-1])]
    assert engine.accumulation == [size // 2 for size in SIZES]
    steps = records.of("step")
    assert [record["global_batch_size"] for record in steps] == SIZES
    assert [record["consumed_samples"] for record in steps] == ENDS
    assert [record["consumed_tokens"] for record in steps] == [8 * end for end in ENDS]
    assert outcome.state.consumed_samples == ENDS[-1]
    expected = [2e-4 * (1 - end / ENDS[-1]) for end in ENDS]
    assert engine.rates == pytest.approx(expected, abs=1e-12)
    for record, size in zip(steps, SIZES, strict=True):
        assert record["samples_per_s"] * record["elapsed_s"] == pytest.approx(size)
        assert record["tokens_per_s"] == pytest.approx(8 * record["samples_per_s"])


def test_rates_of_a_line_are_those_of_all_its_samples(tmp_path: Path) -> None:
    _, records = trained(growing(tmp_path, log_interval=4), Adder())
    first, second = records.of("step")
    assert first["samples_per_s"] * first["elapsed_s"] * 4 == pytest.approx(14)
    assert second["samples_per_s"] * second["elapsed_s"] * 3 == pytest.approx(24)
    assert (first["global_batch_size"], second["global_batch_size"]) == (6, 8)


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_resume_in_the_middle_goes_on(cut: int, tmp_path: Path) -> None:
    whole, first, second = Adder(), Adder(), Adder()
    trained(growing(tmp_path / "whole"), whole)
    trained(growing(tmp_path / "parts", cut), first)
    outcome, _ = trained(growing(tmp_path / "parts"), second)
    assert first.trained + second.trained == whole.trained
    assert second.rates == whole.rates[cut:]
    assert outcome.state.consumed_tokens == 8 * ENDS[-1] and second.total == whole.total


def test_skipped_steps_keep_their_samples(tmp_path: Path) -> None:
    engine = Adder()
    _, records = trained(growing(tmp_path, skip="2-3"), engine)
    assert engine.trained == [0, 1, *range(ENDS[2], ENDS[-1])]
    skipped = records.of("skip")
    assert [record["consumed_samples"] for record in skipped] == ENDS[1:3]
    assert [record["global_batch_size"] for record in skipped] == SIZES[1:3]


def test_an_evaluation_has_the_full_batch(tmp_path: Path) -> None:
    engine = Adder()
    trained(growing(tmp_path, eval_interval=2, eval_iters=2), engine)
    assert engine.evaluated[:2] == [[*range(8)], [*range(8, 16)]]


def test_a_weight_decay_that_changes_is_set_before_each_step(tmp_path: Path) -> None:
    run = config(tmp_path, 5)
    optimizer = dataclasses.replace(
        run.optimizer,
        weight_decay_incr_style="linear",
        start_weight_decay=0.1,
        end_weight_decay=0.3,
    )
    engine, seen = Adder(), []
    engine.optimizer.param_groups[0]["name"] = "hidden"
    engine.optimizer.add_param_group({"params": [], "name": "vectors", "weight_decay": 0.0})
    for call in range(1, 6):
        engine._at[call] = lambda: seen.append(
            [group["weight_decay"] for group in engine.optimizer.param_groups]
        )
    _, records = trained(dataclasses.replace(run, optimizer=optimizer), engine)
    assert [hidden for hidden, _ in seen] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
    assert {vectors for _, vectors in seen} == {0.0}
    logged = [record["weight_decay"] for record in records.of("step")]
    assert logged == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])
