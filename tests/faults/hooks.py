"""What a case does inside a rank, called by the fork server before the program starts.

Arguments come in FAULTS_* variables, which the program does not know.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def moments() -> None:
    """Rank 0 notes what it begins in a file named by it; FAULTS_<MOMENT>_S makes it slow.

    The moments are data, step, skip, evaluate, save and sample; step's note holds its number.
    """
    from megatron.training import evaluation, run_data, sample, trainer

    def number(arguments: tuple[Any, ...]) -> int:
        return arguments[0].state.iteration + 1

    run_data.check_files = _noted("data", run_data.check_files)
    sample.generate = _noted("sample", sample.generate)
    os.fsync = _of_checkpoints(os.fsync, _noted("save", os.fsync))
    for owner, moment in (
        (trainer.Trainer, "step"),
        (trainer.Trainer, "skip"),
        (trainer, "evaluate"),  # of the test split
        (evaluation, "evaluate"),
    ):
        setattr(owner, moment, _noted(moment, getattr(owner, moment), number))


def _of_checkpoints(plain: Any, noted: Any) -> Any:
    """Other files are flushed, too: those of an accepted start."""

    def flush(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        here = "/checkpoints/step-" in os.readlink(f"/proc/self/fd/{number}")
        (noted if here else plain)(file)

    return flush


def _noted(moment: str, action: Any, number: Any = lambda arguments: 0) -> Any:
    seconds = float(os.environ.get(f"FAULTS_{moment.upper()}_S", "0"))
    note = Path(os.environ["FAULTS_PIDS"]) / moment

    def noted(*arguments: Any, **named: Any) -> Any:
        if os.environ["RANK"] == "0":
            partial = note.with_suffix(f".{threading.get_ident()}")
            partial.write_text(str(number(arguments)))
            partial.replace(note)
        time.sleep(seconds)
        return action(*arguments, **named)

    return noted


def hang() -> None:
    """Rank FAULTS_RANK never comes back from its step FAULTS_STEP, in the first start only."""

    def stand_still() -> None:
        time.sleep(1e6)

    _at_step(stand_still)


def fail() -> None:
    """Rank FAULTS_RANK raises in its step FAULTS_STEP; with FAULTS_ALWAYS in every start."""

    def planted() -> None:
        raise RuntimeError(f"planted in rank {os.environ['RANK']}")

    _at_step(planted)


def _at_step(action: Callable[[], None]) -> None:
    """Inside the step: in the engine, after the step has begun for all who watch it."""
    from megatron.engine.pipeline import PipelineEngine
    from megatron.engine.sharded import ShardedEngine
    from megatron.engine.zero import ZeroEngine
    from megatron.training.trainer import Trainer

    if os.environ["RANK"] != os.environ["FAULTS_RANK"]:
        return
    step, number, done = Trainer.step, [0], Path(os.environ["FAULTS_PIDS"]) / "done"

    def numbered(self: Trainer, *arguments: Any) -> Any:
        number[0] = self.state.iteration + 1
        return step(self, *arguments)

    def planted(train_batch: Any) -> Any:
        def train(self: Any, micro_batches: Any) -> Any:
            again = "FAULTS_ALWAYS" in os.environ or not done.exists()
            if number[0] == int(os.environ["FAULTS_STEP"]) and again:
                done.touch()
                action()
            return train_batch(self, micro_batches)

        return train

    Trainer.step = numbered  # type: ignore[method-assign]
    for engine in (ShardedEngine, ZeroEngine, PipelineEngine):
        engine.train_batch = planted(engine.train_batch)


def die_at_file_event() -> None:
    """Rank FAULTS_RANK kills itself at its FAULTS_EVENT-th write below the checkpoint folder.

    An event is a file opened to be written, a folder made, a rename or a removal: between two of
    them a crash leaves what a crash can leave.
    """
    if os.environ["RANK"] != os.environ["FAULTS_RANK"]:
        return
    left = [int(os.environ["FAULTS_EVENT"])]
    root = os.path.join(os.environ["RUN_DIR"], "checkpoints")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & writing:
                return
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path = arguments[0]
        else:
            return
        if isinstance(path, bytes):
            path = path.decode(errors="replace")
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(root):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def plant() -> None:
    """Rank FAULTS_RANK goes wrong in the steps FAULTS_STEP; with FAULTS_ALWAYS in all after, too.

    FAULTS_KIND: `nan` or `spike` in the gradient of one of its weights, or `misread`: its loss,
    as its spike detector alone is told. Each rank notes which updates were applied.
    """
    from megatron.engine.pipeline import PipelineEngine
    from megatron.engine.sharded import ShardedEngine
    from megatron.engine.zero import ZeroEngine
    from megatron.training.stability import SpikeDetector
    from megatron.training.trainer import Trainer

    rank, kind = os.environ["RANK"], os.environ["FAULTS_KIND"]
    spots = [int(number) for number in os.environ["FAULTS_STEP"].split(",")]
    always = "FAULTS_ALWAYS" in os.environ
    note = Path(os.environ["FAULTS_PIDS"]) / f"applied-{rank}"
    here = rank == os.environ["FAULTS_RANK"]
    step, judge, wrong = Trainer.step, SpikeDetector.judge, [False]

    def noted_step(self: Trainer, *arguments: Any) -> Any:
        number = self.state.iteration + 1
        wrong[0] = here and (number in spots or (always and number > spots[0]))
        try:
            return step(self, *arguments)
        finally:
            with note.open("a") as file:
                file.write(f"{number} {int(self.engine.step_applied)}\n")

    def planted(train_batch: Any) -> Any:
        def train(self: Any, micro_batches: Any) -> Any:
            if not wrong[0] or kind == "misread":
                return train_batch(self, micro_batches)
            factor = math.nan if kind == "nan" else 1e6
            weight = next(p for p in self.module.parameters() if hasattr(p, "partition_dim"))
            handle = weight.register_hook(lambda gradient: gradient * factor)
            try:
                return train_batch(self, micro_batches)
            finally:
                handle.remove()

        return train

    def misread(self: SpikeDetector, loss: float, norm: float) -> Any:
        return judge(self, loss * 1e3 if wrong[0] and kind == "misread" else loss, norm)

    Trainer.step, SpikeDetector.judge = noted_step, misread  # type: ignore[method-assign]
    for engine in (ShardedEngine, ZeroEngine, PipelineEngine):
        engine.train_batch = planted(engine.train_batch)


def limit_files() -> None:
    """No file of this rank grows above FAULTS_FSIZE bytes."""
    import resource

    size = int(os.environ["FAULTS_FSIZE"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as any interpreter does


def note_batches() -> None:
    """Each rank notes the checksum of every sample that it feeds to the engine, by step."""
    import zlib

    from megatron.engine.pipeline import PipelineEngine
    from megatron.engine.sharded import ShardedEngine
    from megatron.engine.zero import ZeroEngine
    from megatron.training.trainer import Trainer

    note = Path(os.environ["RUN_DIR"]) / f"fed-{os.environ['RANK']}.txt"
    step, number = Trainer.step, [0]

    def numbered(self: Trainer, *arguments: Any) -> Any:
        number[0] = self.state.iteration + 1
        return step(self, *arguments)

    def noted(train_batch: Any) -> Any:
        def train(self: Any, micro_batches: Any) -> Any:
            batches = list(micro_batches)
            rows = [
                zlib.crc32(row.contiguous().numpy().tobytes())
                for tokens, _ in batches
                for row in tokens
            ]
            with note.open("a") as file:
                file.write(f"{number[0]} {' '.join(map(str, rows))}\n")
            return train_batch(self, batches)

        return train

    Trainer.step = numbered  # type: ignore[method-assign]
    for engine in (ShardedEngine, ZeroEngine, PipelineEngine):
        engine.train_batch = noted(engine.train_batch)
