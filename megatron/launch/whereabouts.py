"""Where the threads of a process stand: in which collective, at which line of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

COLLECTIVES = "torch/distributed/distributed_c10d.py"
WAITS = "megatron/parallel/waiting.py"  # for collectives that run on by themselves


def whereabouts(frames: Mapping[int, FrameType], main: int, own: int) -> str:
    """The innermost collective of a thread, or the line of ours that its main thread is in.

    Args:
        frames: innermost frame of each thread, by its number.
        main: the main thread.
        own: the thread that asks; left out.
    """
    threads = [main, *(thread for thread in frames if thread not in (main, own))]
    stacks = [_outward(frames[thread]) for thread in threads if thread in frames]
    for stack in stacks:
        for place, frame in enumerate(stack):
            file = frame.f_code.co_filename.replace(os.sep, "/")
            if file.endswith(COLLECTIVES):
                return f"{frame.f_code.co_name}{_line_of_ours(stack)}"
            if file.endswith(WAITS):
                return f"{frame.f_locals['collective']}{_line_of_ours(stack[place + 1 :])}"
    if not stacks or not stacks[0]:
        return "unknown"
    innermost = stacks[0][0].f_code
    return f"{innermost.co_name} of {Path(innermost.co_filename).name}{_line_of_ours(stacks[0])}"


def _outward(frame: FrameType | None) -> list[FrameType]:
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _line_of_ours(stack: list[FrameType]) -> str:
    """`, called at megatron/FILE:LINE`, the innermost; empty where there is none."""
    for frame in stack:
        path = frame.f_code.co_filename.replace(os.sep, "/").rpartition("/megatron/")
        if path[1]:
            return f", called at megatron/{path[2]}:{frame.f_lineno}"
    return ""


def flight_recorder() -> str:
    """NCCL's record of the collectives that have not ended, as JSON; empty without NCCL."""
    distributed = sys.modules.get("torch.distributed")
    c10d = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(c10d, "_dump_nccl_trace_json", None)
    if distributed is None or dump is None or not distributed.is_initialized():
        return ""
    if "nccl" not in distributed.get_backend():
        return ""
    try:
        record = dump(includeCollectives=True, onlyActive=True)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"\nflight recorder of NCCL: {error}\n"
    text = record.decode(errors="replace") if isinstance(record, bytes) else str(record)
    return f"\nflight recorder of NCCL, collectives that have not ended:\n{text}\n"
