"""Records as shown: lines character by character, names and units in W&B and TensorBoard."""

from __future__ import annotations

import math

import pytest

from megatron.training.events import EVENTS, groups, line, points, scalars
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
        "validation perplexity=12.1800 | validation accuracy=0.4375 | samples=80 | elapsed_s=1.2 | "
        "samples_per_second=64.000"
    )
    assert line(make.sample(10)) == (
        "iteration=      10/     100 | sample, generated after [...] | elapsed_s=0.5\n"
        "What is[...] an\n  LLM?"
    )
    assert line(make.save(10)) == (
        "iteration=      10/     100 | saved=runs/x/checkpoints/step-10 | size_gb=3.000 | "
        "elapsed_s=2.0 | gb_per_second=1.500"
    )
    where = {"iteration": 10, "train_iters": 100}
    stop = where | {"event": "stop", "reason": "finished"}
    assert line(stop) == "iteration=      10/     100 | stopped: finished"


def test_every_event_has_a_line() -> None:
    assert set(EVENTS) == {"step", "skip", "eval", "sample", "save", "spike", "rollback", "stop"}


SPIKE = {
    "event": "spike", "iteration": 30, "train_iters": 100, "loss": 9.0, "grad_norm": math.inf,
    "z_loss": 12.25, "z_grad_norm": math.inf, "action": "update refused", "report": "r/step-30.md",
}  # fmt: skip
ROLLBACK = {
    "event": "rollback", "iteration": 20, "train_iters": 100, "spike": 30, "skipped": "11-30",
    "rollbacks": 1, "max_rollbacks": 3,
}  # fmt: skip


def test_a_spike_and_what_was_done() -> None:
    assert line(SPIKE) == (
        "iteration=      30/     100 | spike: lm loss=9 (z=12.2) | grad_norm=inf (z=inf) | "
        "action=update refused | suspects=r/step-30.md"
    )
    assert "grad_norm=inf (z=unknown)" in line(SPIKE | {"z_grad_norm": None})
    assert scalars(SPIKE | {"z_grad_norm": None}, 1) == {
        "stability/z_loss": 12.25,
        "stability/iteration": 30,
    }
    assert line(ROLLBACK) == (
        "iteration=      20/     100 | rolled back from step 30: steps 11-30 are skipped | "
        "rollback 1 of at most 3"
    )
    assert scalars(ROLLBACK, 1)["stability/rollbacks"] == 1


def test_an_unknown_event_is_an_error() -> None:
    with pytest.raises(KeyError):
        line({"event": "nap"})


STEP = make.step(10, 2.25, data_parallel=1, grad_norm=1.5, mfu=0.25, corpus_loss={"code": 1.5},
                 timers_min={"forward": 0.125}, timers_max={"forward": 0.25},
                 optimizer_states={"weight_l2": 7.0})  # fmt: skip


def test_a_step_has_the_reference_names_with_true_units() -> None:
    found = scalars(STEP, 1_500_000_000)
    expected = {
        "learning-rate/learning-rate": 1e-3,
        "lm-loss-training/lm loss": 2.25,
        "lm-loss-training/consumed_train_tokens": 320,
        "training/grad-norm": 1.5,
        "training/iteration_time": 0.5,
        "training/iteration_time_vs_tokens": 0.5 / 320,
        "training/iteration_time_vs_samples": 0.5 / 40,
        "training/consumed_samples": 40,
        "training/consumed_tokens": 320,
        "training/skiped_iterations": 0,
        "training/skipped_iterations": 0,
        "training/nan_iterations": 0,
        "optimizer/learning_rate": 1e-3,
        "optimizer/consumed_train_tokens": 320,
        "throughput/iteration-time": 0.5,
        "throughput/elapsed_ms_per_iteration": 500.0,
        "throughput/samples_per_sec": 8.0,
        "throughput/samples_per_sec_per_replica": 8.0,
        "throughput/tokens_per_sec": 64.0,
        "throughput/tokens_per_sec_per_replica": 64.0,
        "throughput/tokens_per_gpu_per_sec": 32.0,
        "throughput/tokens_per_gpu_per_sec_per_replica": 32.0,
        "throughput/tflops": 4.0,
        "throughput/tflops-lm": 3.0,
        "throughput/tflops-causal": 2.5,
        "throughput/tflops-new": 6.0,
        "throughput/mfu": 0.25,
        "throughput/approx_params_in_billions": 1.5,
        "loss/lm loss": 2.25,
        "loss/loss_scale": 1.0,
        "loss/grad_norm": 1.5,
        "memory/max_gib": 1.5,
        "corpus-loss/code": 1.5,
        "timers/forward-time": 0.25,
        "optimizer/weight_l2": 7.0,
    }
    expected_groups = {name.partition("/")[0] for name in expected}
    assert found == expected | {f"{group}/iteration": 10 for group in expected_groups}
    assert expected_groups <= set(groups())


def test_tensorboard_has_each_number_of_a_step_once() -> None:
    assert points(STEP) == {
        "optimizer/learning_rate": 1e-3,
        "loss/lm loss": 2.25,
        "loss/grad_norm": 1.5,
        "loss/loss_scale": 1.0,
        "training/consumed_samples": 40,
        "training/consumed_tokens": 320,
        "training/skipped_iterations": 0,
        "training/nan_iterations": 0,
        "throughput/iteration-time": 0.5,
        "throughput/samples_per_sec": 8.0,
        "throughput/tokens_per_sec": 64.0,
        "throughput/tokens_per_gpu_per_sec": 32.0,
        "throughput/tflops": 4.0,
        "throughput/tflops-lm": 3.0,
        "throughput/tflops-causal": 2.5,
        "throughput/mfu": 0.25,
        "memory/max_gib": 1.5,
        "corpus-loss/code": 1.5,
        "timers/forward-time": 0.25,
        "optimizer/weight_l2": 7.0,
    }
    assert points(make.evaluation(10)) == {
        "val/lm loss": 2.5, "val/ppl_lm loss": 12.18, "val/accuracy": 0.4375,
        "val/samples_per_s": 64.0,
    }  # fmt: skip


def test_what_is_unknown_has_no_number() -> None:
    found = scalars(STEP | {"mfu": None, "grad_norm": None}, 1)
    assert not {"throughput/mfu", "loss/grad_norm", "training/grad-norm"} & found.keys()


@pytest.mark.parametrize(("split", "group"), [("validation", "val"), ("test", "test")])
def test_an_evaluation(split: str, group: str) -> None:
    found = scalars(make.evaluation(10) | {"split": split}, 1)
    assert found == {
        f"{group}/iteration": 10,
        f"{group}/lm loss": 2.5,
        f"{group}/ppl_lm loss": 12.18,
        f"{group}/accuracy": 0.4375,
        f"{group}/samples_per_s": 64.0,
    }


def test_a_skipped_step_has_no_number_of_rate_or_loss() -> None:
    assert scalars(make.skip(3), 1) == {
        "learning-rate/learning-rate": 1e-3,
        "optimizer/learning_rate": 1e-3,
        "optimizer/consumed_train_tokens": 96,
        "training/consumed_samples": 12,
        "training/consumed_tokens": 96,
        "training/skiped_iterations": 1,
        "training/skipped_iterations": 1,
        "training/nan_iterations": 0,
        **{f"{group}/iteration": 3 for group in ("learning-rate", "optimizer", "training")},
    }


def test_saving_is_a_timer_and_a_stop_is_nothing() -> None:
    assert scalars(make.save(10), 1) == {
        "timers/save-checkpoint-time": 2.0,
        "timers/iteration": 10,
    }
    assert scalars({"event": "stop", "iteration": 10}, 1) == {}
