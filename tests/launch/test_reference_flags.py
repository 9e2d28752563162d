"""Every flag and variable of the reference has a class: none is silent, no guess misleads."""

from __future__ import annotations

import re

import pytest

from megatron.config import reference_flags as tables
from megatron.config import schema
from megatron.config.flags import read_command_line, why_refused
from megatron.config.resolve import Site
from megatron.config.strays import found
from tests.config.helpers import refusal, resolved
from tests.launch.reference_names import (
    BARE,
    NOTED,
    OUTSIDE,
    REFUSED,
    VALUES,
    VARIABLES_MEANT,
    VARIABLES_NAMED,
    VARIABLES_THAT_WORK,
    WORK,
)

ALL = [*WORK, *NOTED, *REFUSED, *OUTSIDE]
ONE_LETTER_OFF = 0.9  # of the guesses for a slip find the flag that was meant


def words_of(flag: str) -> list[str]:
    """A flag as a user would type it."""
    return [flag] if flag in BARE else [flag, *VALUES.get(flag, "1").split()]


def test_every_name_of_the_reference_is_there_once() -> None:
    assert len(ALL) == len(set(ALL)) == 348  # 346 options, two of them with two names


def test_no_flag_has_two_classes() -> None:
    named = [
        *schema.by_flag(), *tables.SHORTHANDS, *tables.RENAMED, *tables.ALWAYS,
        *tables.ALWAYS_VALUED, *tables.ONLY, *tables.REFUSED,
        *(flag for flags in tables.ELSEWHERE.values() for flag in flags),
    ]  # fmt: skip
    assert sorted(named) == sorted(set(named))


@pytest.mark.parametrize("flag", WORK)
def test_what_works_sets_its_option(flag: str) -> None:
    line = read_command_line([*words_of(flag), "--run-name", "next"])
    assert not line.problems
    assert len(line.settings) == (4 if flag == "--split" else 2)
    assert line.settings[-1] == ("checkpoint.run_name", "next", "--run-name")


@pytest.mark.parametrize("flag", NOTED)
def test_what_is_always_so_is_accepted_and_said(flag: str) -> None:
    line = read_command_line([*words_of(flag), "--num-layers", "2"])
    assert line.settings == [("model.num_layers", "2", "--num-layers")]
    assert not line.problems
    (note,) = line.notes
    assert note.startswith(flag) and "changes nothing: " in note


@pytest.mark.parametrize("flag", REFUSED)
def test_what_is_refused_says_what_to_do(flag: str) -> None:
    line = read_command_line([flag, "5", "--num-layers", "2"])
    assert line.problems == [f"{flag} is not offered: {tables.REFUSED[flag]}"]
    assert line.settings == [("model.num_layers", "2", "--num-layers")]


def test_advice_names_flags_and_variables_that_work() -> None:
    texts = [*tables.REFUSED.values(), *tables.ALWAYS.values(), *tables.ALWAYS_VALUED.values()]
    flags = {flag for text in texts for flag in re.findall(r"--[\w-]+", text)}
    assert flags <= schema.by_flag().keys()
    names = {name for text in texts for name in re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)}
    assert names <= schema.by_variable().keys()


@pytest.mark.parametrize("flag", OUTSIDE)
def test_what_this_program_is_not_says_so(flag: str) -> None:
    (problem,) = read_command_line([flag, "5"]).problems
    assert problem.startswith(f"{flag} is not for this program: ")
    assert "Did you mean" not in problem


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--num_layers", "--num-layers"), ("--num-layer", "--num-layers"),
        ("--learning-rate", "--lr"), ("--max-steps", "--train-iters"),
        ("--nlayers", "--num-layers"), ("--lr-find", "--lr-finder"),
        ("--n-layers", "--num-layers"), ("--hidden", "--hidden-size"), ("--gas", "--gradient-acc"),
        ("--checkpoint-dir", "--save"), ("--epochs", "--train-tokens"),
        ("--universal-checkpoints", "--universal-checkpoint"), ("--finetun", "--finetune"),
    ],
)  # fmt: skip
def test_slips_and_words_of_others_are_led_to_the_right_flag(flag: str, meant: str) -> None:
    assert f"Did you mean {meant}" in why_refused(flag)


NO_SLIPS = (
    "--train", "--exit-steps", "--attention-mask", "--rank", "--top-k", "--workers",
    "--temperature", "--checkpoint-universal", "--moe", "--rng", "--loss", "--experts", "--stream",
    "--fsdp", "--lora-rank", "--report-to", "--push-to-hub", "--max-samples", "--do-train",
)  # fmt: skip


@pytest.mark.parametrize("flag", NO_SLIPS)
def test_words_that_are_no_slip_get_no_guess(flag: str) -> None:
    assert "Did you mean" not in why_refused(flag)


def test_a_guess_is_a_flag_that_works_and_near_what_was_typed() -> None:
    """Each flag with a letter left out, doubled or exchanged, at a few places."""
    right = wrong = 0
    for flag in schema.by_flag():
        if len(flag) < 8:
            continue
        for place in (len(flag) // 2 + 1, len(flag) - 2):
            for slip in (
                flag[:place] + flag[place + 1 :],
                flag[:place] + flag[place] + flag[place:],
                flag[:place] + flag[place + 1] + flag[place] + flag[place + 2 :],
            ):
                if slip in ALL or slip in schema.by_flag():
                    continue
                said = why_refused(slip)
                right += said.endswith(f"Did you mean {flag}?")
                wrong += "Did you mean" in said and f"mean {flag}?" not in said
    assert right / (right + wrong) > ONE_LETTER_OFF
    assert right > 300


def test_variables_that_work_are_options() -> None:
    assert set(VARIABLES_THAT_WORK) <= set(schema.by_variable())


@pytest.mark.parametrize("name", VARIABLES_NAMED)
def test_variables_without_effect_are_named_and_stop_nothing(name: str) -> None:
    (warning,) = resolved(site=Site(in_job=True), DRY_RUN=0, **{name: "1"}).warnings
    assert warning.startswith(name) and "has no effect" in warning


@pytest.mark.parametrize(("name", "meant"), VARIABLES_MEANT.items())
def test_variables_that_are_meant_as_options_are_refused_in_a_job(name: str, meant: str) -> None:
    message = refusal(site=Site(in_job=True), **{name: "1"})
    assert message.startswith(f"{name}=1 has no effect") and meant in message
    assert f"IGNORE_VARIABLES={name}" in message
    (warning,) = resolved(DRY_RUN=0, **{name: "1"}).in_vain
    assert warning in message


def test_a_flag_of_any_class_written_as_a_variable_is_named() -> None:
    """All but those that are ours, the launchers' or too short to be told from other words."""
    silent = []
    for flag in ALL:
        name = flag[2:].replace("-", "_").upper()
        if name not in schema.by_variable() and not found({name: "1"}):
            silent.append(name)
    assert sorted({*silent}) == ["KD", "LOCAL_RANK", "MOS", "TOPK"]
