"""RETRIES: a run that failed or hung is started again, after a pause and without bad hosts."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.schema import RunConfig
from megatron.launch import process
from megatron.launch.hang_watch import STOPS
from megatron.launch.launch_plan import LaunchPlan
from megatron.launch.local import Attempt, attempt
from megatron.launch.screen import Screen

STACKS_FOLDER = "hangs"
FIRST_PAUSE_S = 5.0
LONGEST_PAUSE_S = 300.0
BLAMED = 2  # a host whose ranks failed first so often is left out
TURN_S = 0.05

# Finished, a wrong setting, wrong data, no checkpoint, a diverged run, no such command: another
# start would end alike.
FINAL = {0, 2, 3, 4, 5, 126, 127}

_STEP = re.compile(r"step-(\d+)")


def run_with_retries(
    planned: LaunchPlan,
    screen: Screen,
    run: RunConfig,
    first_pause_s: float = FIRST_PAUSE_S,
    early: Sequence[int] = (),
) -> int:
    """Start the ranks and wait for their end, up to RETRIES more times; returns the last status.

    Started again is what failed or hung, not what has a status of FINAL or was sent a signal. The
    pause doubles from one failure to the next; a checkpoint between them makes it short again.

    Args:
        planned: the first start.
        screen: takes what the ranks print.
        run: the configuration.
        first_pause_s: seconds before the first retry.
        early: signals that came before: the ranks get them.
    """
    blamed = Counter[str]()
    left_out: list[str] = []
    pauses = 0
    with process.forwarding_signals() as signals:
        signals += early
        for number in range(1, run.launch.retries + 2):
            if planned.hostfile:
                write_atomically(*planned.hostfile)
            before = newest_step(run.checkpoint_folder)
            stacks = run.run_folder / STACKS_FOLDER
            ended = attempt(planned, screen, stacks, run.launch.hang_timeout, signals)
            if number > run.launch.retries or is_final(ended):
                return ended.status
            blamed.update(ended.hosts)
            for host in ended.hosts:
                if blamed[host] == BLAMED:
                    _leave_out(host, left_out, planned, screen)
            planned = planned.anew(number + 1, left_out)
            pauses = 0 if newest_step(run.checkpoint_folder) > before else pauses
            pause_s = min(LONGEST_PAUSE_S, first_pause_s * 2**pauses)
            pauses += 1
            screen.print(
                f"retry {number} of {run.launch.retries} in {pause_s:g} s: {ended.reason}; "
                f"resumes from the newest sound checkpoint",
                is_error=True,
            )
            if stopped := _pause(pause_s, signals):
                name = signal.Signals(stopped).name
                screen.print(f"{name} before the retry: not started again", is_error=True)
                return 128 + stopped
    raise AssertionError("the last start returns")


def is_final(ended: Attempt) -> bool:
    """Whether another start makes no sense, or is not wanted."""
    return ended.status in FINAL or any(number in STOPS for number in ended.signals)


def newest_step(folder: Path) -> int:
    """Largest number of a committed checkpoint in `folder`; 0 where there is none."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(match[1]) for name in names if (match := _STEP.fullmatch(name))), default=0)


def _leave_out(host: str, left_out: list[str], planned: LaunchPlan, screen: Screen) -> None:
    """Add `host` to those left out, if the job has another in its place."""
    if planned.anew(1, [*left_out, host]).problem is None:
        left_out.append(host)
        text = "it is left out from now on, another one of the job takes its place"
    else:
        text = "but the job has no host to spare: it stays"
    screen.print(f"ranks of {host} failed first {BLAMED} times: {text}", is_error=True)


def _pause(seconds: float, signals: Sequence[int]) -> int:
    """Wait; the signal to stop that came before the end, 0 where none did."""
    until = time.monotonic() + seconds
    while True:
        stop = next((number for number in signals if number in STOPS), 0)
        if stop or time.monotonic() >= until:
            return stop
        time.sleep(TURN_S)
