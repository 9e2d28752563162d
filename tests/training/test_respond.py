"""Ending a run: one rank's weights are enough, and all ranks end alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from megatron.checkpoint.state import RunState
from megatron.parallel.control import make_control
from megatron.training.guard import Unstable
from megatron.training.respond import require_finite
from tests.spawn import run


def ended(folder: str, broken: int) -> str:
    """How a check ends where one rank's weights are not finite; -1: none."""
    events: list[Any] = []
    finite = dist.get_rank() != broken
    trainer: Any = SimpleNamespace(
        control=make_control(),
        engine=SimpleNamespace(shards=lambda: SimpleNamespace(finite=lambda: finite)),
        state=RunState(iteration=7),
        guard=SimpleNamespace(bad_steps=0),
        run=SimpleNamespace(
            checkpoint_folder=Path(folder),
            run_folder=Path(folder),
            optimizer=SimpleNamespace(lr_finder=False),
        ),
        log_event=lambda event, **values: events.append(event),
        saves=SimpleNamespace(
            finish=lambda: events.append("waited"), close=lambda at_once: events.append("closed")
        ),
    )
    try:
        require_finite(trainer)
    except Unstable as error:
        return f"{events} {error}"
    return "sound"


def test_one_rank_whose_weights_are_not_finite_ends_all(tmp_path: Path) -> None:
    assert run(ended, 3, str(tmp_path), -1) == ["sound"] * 3
    texts = run(ended, 3, str(tmp_path), 2)
    assert len(set(texts)) == 1
    assert texts[0].startswith(
        "['waited', 'stop', 'closed'] weights or optimizer states are not finite after step 7; "
    )
    assert "no checkpoint is as old as step 7" in texts[0]
