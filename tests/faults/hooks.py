"""What a case does inside a rank, called by the fork server before the program starts.

Arguments come in FAULTS_* variables, which the program does not know.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def note_steps() -> None:
    """Rank 0 writes the number of the step that it begins; FAULTS_STEP_S makes a step slow."""
    from megatron.training.trainer import Trainer

    step, seconds = Trainer.step, float(os.environ.get("FAULTS_STEP_S", "0"))
    note = Path(os.environ["FAULTS_PIDS"]) / "step"

    def noted(self: Trainer, *arguments: Any) -> Any:
        if os.environ["RANK"] == "0":
            note.with_suffix(".new").write_text(str(self.state.iteration + 1))
            note.with_suffix(".new").replace(note)
        time.sleep(seconds)
        return step(self, *arguments)

    Trainer.step = noted  # type: ignore[method-assign]


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
