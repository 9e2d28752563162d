"""PROFILE and its companions: which steps on which ranks, and what is refused."""

from __future__ import annotations

import pytest

from megatron.config.errors import ConfigError
from megatron.config.profile import ranks, steps
from tests.config.helpers import refusal, resolved


def test_steps_as_written_and_usual_ones_within_a_short_run() -> None:
    for text in ("10 12", "10-12", "10,12", " 10, 12 "):
        assert steps("torch", text, 12) == (10, 12)
    assert steps("torch", "7", 12) == (7, 7)
    assert [steps("torch", None, last) for last in (200, 11, 2, 1)] == [
        (10, 12), (9, 11), (1, 2), (1, 1),
    ]  # fmt: skip
    assert steps("pyinstrument", None, 60) == (1, 60)


@pytest.mark.parametrize("text", ["3 2", "0 2", "a", "1 2 3", "-1", "2 x", "10 13"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"PROFILE_STEPS={text}"):
        steps("torch", text, 12)


def test_ranks() -> None:
    assert list(ranks("all", 3)) == [0, 1, 2]
    assert ranks("0, 2", 3) == [0, 2]
    for text in ("3", "x", "0 -1"):
        with pytest.raises(ConfigError, match="ranks of 0 to 2"):
            ranks(text, 3)


def test_the_references_names_are_taken() -> None:
    assert resolved("--profile", "pt", TRAIN_ITERS=20).run.log.profile == "torch"
    found = resolved("--profile_steps", "2,3", "--profile-ranks", "0", "1", WORLD_SIZE=2, PROFILE=1)
    assert (found.run.log.profile_steps, found.run.log.profile_ranks) == ("2,3", "0 1")
    assert resolved(PYINSTRUMENT_PROFILER=1).run.log.profile == "pyinstrument"
    assert resolved(TORCH_PROFILER_ENABLE=2).run.log.profile == "torch"
    off = resolved(TORCH_PROFILER_ENABLE=0)
    assert off.run.log.profile == "off" and not off.warnings
    assert resolved(TIMING_LOG_LEVEL=1).run.log.timing_log_level == 1
    assert "set the same option" in refusal(TORCH_PROFILER_ENABLE=1, PYINSTRUMENT_PROFILER=1)


def test_what_is_wrong_or_has_no_effect_is_said() -> None:
    assert "TRAIN_ITERS=5" in refusal(PROFILE="torch", PROFILE_STEPS="4 9", TRAIN_ITERS=5)
    assert "PROFILE_RANKS=4" in refusal(PROFILE="torch", PROFILE_RANKS=4)
    (warning,) = resolved(PROFILE_STEPS="4 9").warnings
    assert warning.startswith("PROFILE_STEPS=4 9 has no effect here")
