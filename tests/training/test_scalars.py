"""Names and units in W&B and TensorBoard."""

from __future__ import annotations

import pytest

from megatron.training.scalars import GROUPS, scalars
from tests.training import records_factory as make

STEP = make.step(10, 2.25, data_parallel=1, grad_norm=1.5, mfu=0.25, corpus_loss={"code": 1.5})


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
    }
    groups = {name.partition("/")[0] for name in expected}
    assert found == expected | {f"{group}/iteration": 10 for group in groups}
    assert groups <= set(GROUPS)


def test_what_is_unknown_is_left_out() -> None:
    found = scalars(STEP | {"mfu": None, "grad_norm": None}, 1)
    assert not {"throughput/mfu", "loss/grad_norm", "training/grad-norm"} & found.keys()


@pytest.mark.parametrize(("split", "group"), [("validation", "val"), ("test", "test")])
def test_an_evaluation(split: str, group: str) -> None:
    found = scalars(make.evaluation(10) | {"split": split}, 1)
    assert found == {
        f"{group}/iteration": 10,
        f"{group}/lm loss": 2.5,
        f"{group}/ppl_lm loss": 12.18,
    }


def test_a_skipped_step_has_no_rate_and_no_loss() -> None:
    found = scalars(make.skip(3), 1)
    assert found["training/skiped_iterations"] == 1
    assert not [name for name in found if name.startswith(("throughput/", "loss/", "lm-loss"))]


def test_saving_is_a_timer_and_a_stop_is_nothing() -> None:
    assert scalars(make.save(10), 1) == {
        "timers/save-checkpoint-time": 2.0,
        "timers/iteration": 10,
    }
    assert scalars({"event": "stop", "iteration": 10}, 1) == {}
