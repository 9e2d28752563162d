"""The search's rates and the weight decay, as functions of the step."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.config.pace import learning_rates, weight_decay
from tests.config.helpers import configured, refusal, resolved

DECAY = {"TRAIN_ITERS": 5, "START_WEIGHT_DECAY": 0.1, "END_WEIGHT_DECAY": 0.3}


def test_the_finder_rises_by_one_factor() -> None:
    run = configured(LR_FINDER=1, TRAIN_ITERS=7)
    rates = [learning_rates(run)(i) for i in range(1, 8)]
    assert rates == pytest.approx(np.geomspace(1e-6, 1.0, 7))
    chosen = configured(LR_FINDER=1, TRAIN_ITERS=3, LR="1e-2", MIN_LR="1e-4")
    assert [learning_rates(chosen)(i) for i in (1, 2, 3)] == pytest.approx([1e-4, 1e-3, 1e-2])
    assert learning_rates(configured(LR_FINDER=1, TRAIN_ITERS=1))(1) == pytest.approx(1e-6)


def test_a_search_is_short_and_has_a_folder_of_its_own() -> None:
    run = configured(LR_FINDER=1, DATA_FILE_LIST="builtin")
    assert run.train.train_iters == 200 and run.checkpoint.run_name.endswith("-lr-finder")
    assert (run.stability.spike_policy, run.log.eval_interval) == ("off", 0)
    assert not configured().checkpoint.run_name.endswith("-lr-finder")
    (warning,) = resolved(LR_FINDER=1, EXPORT_HF=1).warnings
    assert "EXPORT_HF=1 has no effect here" in warning
    assert "rises from MIN_LR=1.0 to LR=1.0" in refusal(LR_FINDER=1, MIN_LR=1)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("linear", np.linspace(0.1, 0.3, 5)),
        ("cosine", 0.2 - 0.1 * np.cos(np.linspace(0, np.pi, 5))),
    ],
)
def test_the_weight_decay_goes_from_start_to_end(style: str, expected: np.ndarray) -> None:
    run = configured(WEIGHT_DECAY_INCR_STYLE=style, **DECAY)
    assert [weight_decay(run, i) for i in range(1, 6)] == pytest.approx(list(expected))


def test_a_constant_weight_decay() -> None:
    assert weight_decay(configured(WEIGHT_DECAY=0.03), 7) == 0.03
    assert "START_WEIGHT_DECAY=0.1 has no effect with" in refusal(START_WEIGHT_DECAY=0.1)
    message = refusal(WEIGHT_DECAY_INCR_STYLE="linear", START_WEIGHT_DECAY=0)
    assert "END_WEIGHT_DECAY is not set" in message
    (warning,) = resolved(WEIGHT_DECAY_INCR_STYLE="linear", **DECAY, WEIGHT_DECAY=0.3).warnings
    assert "WEIGHT_DECAY=0.3 has no effect here" in warning


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"SGD_MOMENTUM": 0.5}, "SGD_MOMENTUM=0.5 has no effect here: it is for OPT=sgd"),
        ({"MUON_MOMENTUM": 0.5}, "MUON_MOMENTUM=0.5"),
        ({"ADAM_BETA1": 0.5, "OPT": "sophiag"}, "ADAM_BETA1=0.5"),
        ({"LR_TIMESCALE": 5}, "for LR_DECAY_STYLE=infinite-inv-square-root"),
        ({"TENSORBOARD_DIR": "tb", "NO_TENSORBOARD": 1}, "TENSORBOARD_DIR=tb"),
        ({"WANDB_EXP_NAME": "x", "WANDB_DISABLED": 1}, "WANDB_EXP_NAME=x"),
    ],
)
def test_settings_without_effect_are_named(settings: dict[str, object], named: str) -> None:
    assert any(named in warning for warning in resolved(**settings).warnings)
