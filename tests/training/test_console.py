"""The printed lines, character by character."""

from __future__ import annotations

import math

import pytest

from megatron.training.console import LINES, line
from tests.training import records_factory as make

# A line of a Megatron-DeepSpeed run as published, without its prefix.
PUBLISHED = (
    "iteration=       2/  635782 | consumed_samples=        1536 | consumed_tokens=     6291456 | "
    "elapsed_time_per_iteration_ms=8457.2 | learning_rate=1.88744e-08 | global_batch_size=768 | "
    "lm loss=11.164009 | loss_scale=1.0 | grad_norm=6.271 | actual_seqlen= 4096 | "
    "number_of_skipped_iterations=  0 | number_of_nan_iterations=  0 | samples_per_second=90.810 | "
    "tokens_per_gpu_per_second_tgs=15498.234 | [LM]TFLOPs=70.98| [DS]TFLOPs=91.53 |"
)

RECORD = make.step(
    2,
    11.164009,
    train_iters=635782,
    consumed_samples=1536,
    consumed_tokens=6291456,
    learning_rate=0.0003 * 2 / (0.05 * 635782),
    global_batch_size=768,
    seq_length=4096,
    grad_norm=6.271,
    elapsed_s=8.4572,
    samples_per_s=90.810,
    tokens_per_gpu_per_s=15498.234,
    tflops_lm=70.98,
    tflops_ds=91.53,
)


def test_a_step_is_the_published_line() -> None:
    """But for its separators: one is missing a space, the last one ends the line."""
    assert line(RECORD) == PUBLISHED.replace("70.98|", "70.98 |").removesuffix(" |")


def test_a_nan_prints_as_nan() -> None:
    printed = line(RECORD | {"loss": math.nan, "grad_norm": math.nan, "nan_iterations": 1})
    assert "| lm loss=nan |" in printed
    assert "| grad_norm=nan |" in printed
    assert "| number_of_nan_iterations=  1 |" in printed


def test_what_the_engine_does_not_know_is_left_out() -> None:
    printed = line(RECORD | {"grad_norm": None, "loss_scale": None})
    assert "grad_norm" not in printed
    assert "loss_scale" not in printed
    assert " |  | " not in printed


def test_a_skipped_step_has_no_rate_and_no_loss() -> None:
    assert line(make.skip(3)) == (
        "iteration=       3/     100 | consumed_samples=          12 | "
        "consumed_tokens=          96 | skipped | learning_rate=0.001 | global_batch_size=4 | "
        "actual_seqlen=    8 | number_of_skipped_iterations=  1 | number_of_nan_iterations=  0"
    )


def test_the_other_lines() -> None:
    assert line(make.evaluation(10)) == (
        "iteration=      10/     100 | validation lm loss=2.500000 | "
        "validation perplexity=12.1800 | samples=80 | elapsed_s=1.2"
    )
    assert line(make.save(10)) == (
        "iteration=      10/     100 | saved=runs/x/checkpoints/step-10 | size_gb=3.000 | "
        "elapsed_s=2.0 | gb_per_second=1.500"
    )
    where = {"iteration": 10, "train_iters": 100}
    spike = where | {"event": "spike", "message": "loss", "loss": 9.5, "grad_norm": None}
    assert line(spike) == "iteration=      10/     100 | suspect: loss | lm loss=9.500000"
    stop = where | {"event": "stop", "reason": "finished"}
    assert line(stop) == "iteration=      10/     100 | stopped: finished"


def test_every_event_has_a_line() -> None:
    assert set(LINES) == {"step", "skip", "eval", "save", "spike", "stop"}


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(KeyError):
        line({"event": "nap"})
