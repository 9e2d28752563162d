"""What the rows at the bottom say, with a clock of the test's and no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron.display.run_view import RunView, step_fields
from tests.display.replay import evaluation, step


class Shown:
    """A view on a screen of text, and its clock."""

    def __init__(self, width: int = 120) -> None:
        self.now, self.text = 100.0, io.StringIO()
        console = Console(
            file=self.text,
            width=width,
            force_terminal=True,
            color_system=None,
            _environ={"TERM": "xterm"},  # whatever terminal the tests have
        )
        self.view = RunView(console, lambda: self.now)

    def rows(self, seconds: float = 1.0) -> str:
        """What is drawn after so many seconds."""
        self.now += seconds
        self.text.truncate(0)
        self.view.turn()
        return self.text.getvalue()


def test_the_start_is_counted_in_seconds() -> None:
    shown = Shown()
    assert "importing torch ... 3 s" in shown.rows(3)
    shown.view.entered("data", None, 0, 200)
    shown.view.show("[d 10:00:00.1][INFO][attention_kernel] - attention: flash")
    shown.view.entered("data", None, 50, 200)
    rows = shown.rows(2)
    assert "reading the data 25%, 0:00:06 left" in rows and "attention: flash" in rows
    shown.view.entered("build", None, 50, 0)
    assert "building the model ... 4 s" in shown.rows(4)


def test_the_time_left_counts_from_this_starts_first_step() -> None:
    shown = Shown()
    for number in (51, 52, 53):
        shown.view.show("", step(number, 200))
        shown.now += 10
    shown.view.entered("step", 54, 0, 0)
    rows = shown.rows(0.3)
    # 52 and 53 took 10 s each; the third pause is that of the step to come.
    assert " 26% " in rows and "0:37:07 left" in rows  # 147 steps of 30.3 s / 2


@pytest.mark.parametrize(("width", "lines"), [(74, 1), (73, 2)])
def test_a_line_is_broken_where_it_does_not_fit(width: int, lines: int) -> None:
    shown = Shown(width)
    said = "start-up time: 8.3 s: imports 7.7, ranks 0.4, data 0.1, model 0.1"
    shown.view.show(f"[d 10:00:00.1][INFO][start_up] - {said}")
    printed = shown.text.getvalue().splitlines()
    found = [line for line in printed if "10:00" in line or "0.1" in line]
    assert len(found) == lines and max(map(len, found)) <= width


@pytest.mark.parametrize("phase", ["evaluate", "save"])
def test_work_between_steps_is_named_after_a_second(phase: str) -> None:
    shown = Shown()
    shown.view.show("", step(1, 200))
    shown.view.entered(phase, 1, 0, 0)
    assert "..." not in shown.rows(0.5)
    assert "... 8 s" in shown.rows(7.6)
    shown.view.entered("step", 2, 1, 0)
    shown.view.entered(phase, 2, 1, 0)
    assert "... 2 s of about 8 s" in shown.rows(2)


def test_a_step_that_takes_long_is_named() -> None:
    shown = Shown()
    shown.view.show("", step(7, 200))
    shown.view.entered("step", 8, 0, 0)
    assert "step 8" not in shown.rows(9)
    assert "step 8 ... 11 s" in shown.rows(2)
    shown.view.entered("step", 8, 1, 0)  # a micro-batch
    assert "step 8" not in shown.rows(2)


def test_what_is_not_finite_is_shown_and_what_is_unknown_left_out() -> None:
    record = step(1, 200) | {"loss": float("nan"), "grad_norm": None}
    text = "  ".join(field.plain for field in step_fields(record))
    assert text == "  1/200  loss nan  lr 3.00e-03  250 ms  8.19k tok/s  71GFLOPS"
    skipped = {"event": "skip", "iteration": 12, "train_iters": 200}
    assert [field.plain for field in step_fields(skipped)] == [" 12/200", "skipped"]


def test_lines_that_stay() -> None:
    shown = Shown()
    for number in range(1, 1001):
        shown.view.show("", step(number, 1000))
    shown.view.show("", evaluation(1000, 1000))
    shown.now += 300
    shown.view.show("", step(999, 1000))  # a rollback
    kept = [
        line for line in shown.text.getvalue().replace("\r", "\n").splitlines() if "/1000" in line
    ]
    numbers = {line.split("/")[0].split("\x1b[2K")[-1].strip() for line in kept}
    assert {"1", "250", "500", "750", "1000", "999"} <= numbers and len(numbers) < 12
