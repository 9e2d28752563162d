"""RunState: counting, and what a checkpoint keeps of it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from megatron.checkpoint.state import RunState


def test_a_step_makes_the_next_state_and_keeps_the_old_one() -> None:
    start = RunState(iteration=4, consumed_samples=32, consumed_tokens=256, skipped_iterations=1)
    after = start.after(8, 64)
    assert after == RunState(5, 40, 320, 1)
    assert start.iteration == 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        start.iteration = 5  # type: ignore[misc]


def test_a_skipped_step_consumes_its_samples() -> None:
    assert RunState().after(8, 64, skipped=True) == RunState(1, 8, 64, 1)


def test_non_finite_losses_are_added() -> None:
    assert RunState(nan_iterations=1).with_nan(2).nan_iterations == 3


def test_the_dictionary_survives_json() -> None:
    state = RunState(7, 56, 448, 2, 1, ((2, 3), (6, 6)))
    assert RunState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


def test_a_state_written_before_there_were_rollbacks_is_read() -> None:
    values = RunState(iteration=4, rollbacks=2).to_dict()
    assert RunState.from_dict(values).rollbacks == 2
    del values["rollbacks"]
    assert RunState.from_dict(values) == RunState(iteration=4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"iteration": -1}, "iteration=-1"),
        ({"iteration": 1.5}, "iteration=1.5"),
        ({"consumed_samples": True}, "consumed_samples=True"),
        ({"epoch": 1}, "epoch"),
    ],
)
def test_a_damaged_dictionary_is_refused(change: dict[str, object], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RunState.from_dict(RunState().to_dict() | change)


def test_a_missing_counter_is_refused() -> None:
    values = RunState().to_dict()
    del values["consumed_tokens"]
    with pytest.raises(ValueError, match="consumed_tokens"):
        RunState.from_dict(values)
