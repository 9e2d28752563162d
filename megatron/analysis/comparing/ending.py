"""How a run ended, in a few words, from what it left in its folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

from megatron.analysis.comparing.compared_run import ComparedRun
from megatron.launch.claim import CLAIM_FILE, STALE_S

FINISHED, RUNNING, OUT_OF_MEMORY, HUNG = "finished", "running", "OOM", "hung"
HUNG_STATUS = 124
KILLED_STATUS = 137  # by the kernel, where a host has no memory left
REFUSED = {2: "setting refused", 3: "data refused", 4: "no checkpoint", 5: "diverged"}
TAIL_BYTES = 1 << 16

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|DefaultCPUAllocator"
    r"|OUT_OF_(?:HOST_|DEVICE_)?(?:MEMORY|RESOURCES)"  # Intel GPUs
)
_HUNG = re.compile(r"^HUNG: |the run hung and was killed", re.MULTILINE)
_STATUS = re.compile(r"failed with status (\d+)|ended with status (\d+)")
_START = re.compile(r"^.*launch command: ", re.MULTILINE)


def ending(run: ComparedRun) -> str:
    """finished, stopped: why, running, OOM, hung, status N, or how far it came."""
    claim = run.folder / CLAIM_FILE
    if claim.exists() and time.time() - claim.stat().st_mtime < 2 * STALE_S:
        return RUNNING
    status = run.row.get("status")
    if status:
        return str(run.row.get("why") or of_status(int(status), _tail(run.folder)))
    last = run.records[-1] if run.records else {"event": ""}
    if last["event"] == "stop":
        reason = str(last["reason"])
        stopped = OUT_OF_MEMORY if _OUT_OF_MEMORY.search(reason) else f"stopped: {reason}"
        return FINISHED if reason == FINISHED else stopped
    return of_text(_tail(run.folder)) or _reached(run)


def of_status(status: int, said: str) -> str:
    """What an exit status means, beside the last lines that a run has printed."""
    if status == HUNG_STATUS:
        return HUNG
    if status in REFUSED:
        return REFUSED[status]
    if status == KILLED_STATUS or _OUT_OF_MEMORY.search(said):
        return OUT_OF_MEMORY
    return f"status {status}" if status else FINISHED


def of_text(said: str) -> str:
    """The same from the lines alone; empty where they do not tell."""
    if _HUNG.search(said):
        return HUNG
    status = max((int(a or b) for a, b in _STATUS.findall(said)), default=0)
    if status or _OUT_OF_MEMORY.search(said):
        return of_status(status or 1, said) if status else OUT_OF_MEMORY
    return ""


def _tail(folder: Path) -> str:
    """The last lines of output.log, of its last start."""
    path = folder / "output.log"
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        text = file.read().decode(errors="replace")
    starts = [match.end() for match in _START.finditer(text)]
    return text[starts[-1] :] if starts else text


def _reached(run: ComparedRun) -> str:
    steps = [record for record in run.records if "train_iters" in record]
    if not steps:
        return "no step"
    last = steps[-1]
    done = last["iteration"] >= last["train_iters"]
    return FINISHED if done else f"ended at step {last['iteration']} of {last['train_iters']}"
