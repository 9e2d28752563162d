"""A run without ranks, through the launcher's screen: what tmux shows is looked at by tests.

`python -m tests.display.replay LOG [STEPS] [ENDING]`: ENDING is finish, error, or hold, which waits
to be stopped after half of the steps.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from megatron.display.run_view import run_view
from megatron.launch.heartbeat import Beat
from megatron.launch.screen import Screen
from megatron.training.log import TRAINING_LOG, PrefixFormatter

BOX = "==== ARCHITECTURE ====\nMODEL_ARCH: debug\nPARAMS: 1787008\n======================"
LONG = "a warning of many words " * 20


def step(number: int, last: int) -> dict[str, Any]:
    """A record of a step."""
    return {
        "event": "step", "iteration": number, "train_iters": last, "time": 0.0,
        "consumed_samples": 16 * number, "consumed_tokens": 2048 * number,
        "learning_rate": 3e-3, "global_batch_size": 16, "seq_length": 128, "world_size": 1,
        "data_parallel": 1, "skipped_iterations": 0, "nan_iterations": 0, "steps": 1,
        "loss": 8.5 - number / last, "grad_norm": 1.5, "loss_scale": 1.0, "elapsed_s": 0.25,
        "samples_per_s": 64.0, "tokens_per_s": 8192.0, "tokens_per_gpu_per_s": 8192.0,
        "tflops_lm": 0.071, "tflops_ds": 0.09, "tflops_causal": 0.07, "mfu": None,
        "memory_max_gib": 0.5,
    }  # fmt: skip


def evaluation(number: int, last: int) -> dict[str, Any]:
    """A record of an evaluation."""
    return {
        "event": "eval", "iteration": number, "train_iters": last, "split": "validation",
        "loss": 5.5, "perplexity": 244.7, "samples": 80, "elapsed_s": 0.5,
    }  # fmt: skip


class Rank:
    """Rank 0, as its launcher hears it."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self._log = PrefixFormatter(0, marks=True)
        self.phase("start")

    def phase(self, name: str, number: int | None = None, ticks: int = 0, total: int = 0) -> None:
        """A heartbeat, and a turn of the launcher's loop."""
        self.screen.turn(Beat(0, "host", 1, 1, name, number, ticks, total=total))

    def says(self, text: str, name: str = TRAINING_LOG, level: int = logging.INFO) -> None:
        """A line of its log."""
        self._line(logging.LogRecord(name, level, "", 0, text, None, None))

    def logs(self, record: dict[str, Any]) -> None:
        """The line of a record, as long as a real one."""
        text = f"iteration={record['iteration']:8d}/{record['train_iters']:8d} | {'field | ' * 40}"
        line = logging.LogRecord(TRAINING_LOG, logging.INFO, "", 0, text, None, None)
        line.made_from = record
        self._line(line)

    def _line(self, record: logging.LogRecord) -> None:
        self.screen.line(f"{self._log.format(record)}\n".encode())


def main(log: str, steps: str = "200", ending: str = "finish") -> int:
    """A run; returns its status."""
    last = int(steps)
    with closing(Screen(Path(log), view=run_view("auto", sys.stdout)[0])) as screen:
        screen.print("run folder: runs/debug-seq128-builtin")
        screen.print("launch command: python3 -m megatron.launch -n 1 -- " + "program " * 30)
        rank = Rank(screen)
        screen.print(BOX)
        rank.says("attention: torch's flash kernel", "megatron.training.attention_kernel")
        rank.says(LONG, "megatron.training.run_data", logging.WARNING)
        for number in range(1, last + 1):
            time.sleep(0.4 / last)
            rank.phase("step", number)
            rank.logs(step(number, last))
            if number % (last // 2) == 0:
                rank.phase("evaluate", number, 3, 20)
                rank.logs(evaluation(number, last))
                screen.line(f"stray words of a library {'x' * 150}\n".encode(), True)
            while ending == "hold" and number == last // 2:
                rank.phase("step", number)
                time.sleep(0.05)
        if ending == "error":
            screen.print("rank 0 failed with status 1:\nValueError: it broke", is_error=True)
            return 1
        rank.phase("sample", last)
        screen.print("Sample from the model:\n\n" + "words of the model " * 20)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
