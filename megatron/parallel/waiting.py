"""The one place where a collective is waited for that runs on by itself.

A hang's report (`launch/whereabouts.py`) knows a rank that stands here, and says for what.
"""

from __future__ import annotations

import torch.distributed as dist


def wait_for(work: dist.Work, collective: str) -> None:
    """Waits on the host, or makes the device's present stream wait.

    Args:
        work: the collective under way.
        collective: what it is, in words of the field.
    """
    work.wait()
    del collective  # whereabouts reads it from this frame
