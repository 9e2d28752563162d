"""PROFILE: files of the chosen steps on the chosen ranks, and losses as without it."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from megatron.config.errors import ConfigError
from megatron.parallel.control import make_control
from megatron.training import profiles
from megatron.training.device import detect
from megatron.training.trainer import Trainer
from tests.spawn import run
from tests.training.run_config import tiny_run
from tests.training.test_stalls import trainer_of


def trained(variables: dict[str, str]) -> tuple[list[float], list[str]]:
    """Losses of five steps on this rank, and what was logged."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    profiles.log.addHandler(handler)
    profiles.log.setLevel(logging.INFO)
    settings = {"TRAIN_ITERS": "5", "LOG_INTERVAL": "1", **variables}
    trainer = trainer_of(settings, detect(0, "fp32"), make_control())
    records: list[dict[str, Any]] = []
    trainer.tracker = SimpleNamespace(log=records.append, close=lambda: None)
    with trainer.read_ahead() as loader, profiles.profiled(trainer):
        for _ in range(5):
            trainer.step(loader)
            trainer.record()
    return [record["loss"] for record in records], said


def test_a_trace_of_the_chosen_steps_and_ranks(tmp_path: Path) -> None:
    (plain, quiet), _ = run(trained, 2, {"WORLD_SIZE": "2"})
    assert not quiet
    asked = {
        "PROFILE": "torch", "PROFILE_STEPS": "2 3", "PROFILE_RANKS": "1", "WORLD_SIZE": "2",
        "TRACE_DIR": str(tmp_path),
    }  # fmt: skip
    (losses, quiet), (_, said) = run(trained, 2, asked)
    assert losses == plain and not quiet
    assert said[0] == "profiling from step 2 on, whose times are longer for it"
    stem = tmp_path / "steps-2-3-rank-1"
    assert said[1] == f"profile of steps 2 to 3: {stem}.json.gz, {stem}.txt"
    assert len(said) == 2 and len(list(tmp_path.iterdir())) == 2
    with gzip.open(f"{stem}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert {name for name in names if re.fullmatch(r"step \d", name)} == {"step 2", "step 3"}
    assert "aten::mm" in names and "aten::mm" in Path(f"{stem}.txt").read_text()


def test_a_call_tree_as_html_and_text(tmp_path: Path) -> None:
    pytest.importorskip("pyinstrument")
    asked = {"PROFILE": "pyinstrument", "PROFILE_STEPS": "4 5", "TRACE_DIR": str(tmp_path)}
    ((_, said),) = run(trained, 1, asked)
    assert said[-1].startswith("profile of steps 4 to 5: ")
    text = (tmp_path / "steps-4-5-rank-0.txt").read_text()
    assert "Trainer.step" in text and "ShardedEngine.train_batch" in text
    assert "<html" in (tmp_path / "steps-4-5-rank-0.html").read_text()


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    asked = {"PROFILE": "torch", "PROFILE_STEPS": "1", "TRACE_DIR": str(tmp_path / "file")}
    ((losses, said),) = run(trained, 1, asked)
    assert len(losses) == 5 and said[-1].startswith("the profile is not written: ")


def test_a_run_that_ends_earlier_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    class Recorder:
        start = step = stop = lambda self, *given: calls.append(given)

        def write(self, stem: str) -> list[Path]:
            calls.append(Path(stem).name)
            return []

    monkeypatch.setitem(profiles.PROFILERS, "torch", Recorder)
    config = tiny_run(tmp_path, profile="torch", profile_steps="3 9")
    trainer = SimpleNamespace(
        run=config, changes=[], state=SimpleNamespace(iteration=5),
        control=SimpleNamespace(rank=0), heartbeat=SimpleNamespace(enter=lambda *given: None),
        meter=SimpleNamespace(off_the_clock=lambda: torch.no_grad()),
    )  # fmt: skip
    with pytest.raises(RuntimeError), profiles.profiled(cast(Trainer, trainer)):
        for iteration in range(1, 6):
            trainer.changes[0](iteration)
        raise RuntimeError("a step failed")
    assert calls == [(), (3,), (4,), (5,), (), "steps-3-5-rank-0"]
    calls.clear()
    with profiles.profiled(cast(Trainer, trainer)):
        trainer.changes[1](1)  # ends before the first step that it waits for
    assert not calls


def test_a_profiler_that_is_missing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles.importlib.util, "find_spec", lambda name: None)
    profiles.require_profiler(tiny_run(tmp_path, profile="torch"))
    with pytest.raises(ConfigError, match="pip install pyinstrument"):
        profiles.require_profiler(tiny_run(tmp_path, profile="pyinstrument"))
