"""The end of a run takes nothing from it: what fails there is a warning."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.analysis import finish
from megatron.parallel.control import ALONE
from megatron.parallel.groups import SERIAL
from megatron.training import metrics_file
from tests.training import records_factory as make
from tests.training.run_config import tiny_run


class Tokens:
    vocab_size, eod = 10, 9

    def decode(self, ids: list[int]) -> str:
        return "".join(str(number) for number in ids)


class Engine:
    """Always the same token; `at` is what each pass does first."""

    def __init__(self, at: Callable[[], Any]) -> None:
        self.groups = SimpleNamespace(tp=SERIAL, pp=SERIAL)
        self.device, self.last_stage = torch.device("cpu"), 0
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        self.lengths: list[int] = []
        self._at = at

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self._at()
        self.lengths.append(tokens.shape[1])
        logits = torch.full((1, tokens.shape[1], 10), -1e9)
        logits[..., 4] = 0.0
        return logits

    def refresh_weights(self) -> None:
        pass


def data_of(sample: Callable[[int], Any]) -> Any:
    splits = SimpleNamespace(valid=SimpleNamespace(sample=sample), train=None)
    return SimpleNamespace(splits=splits, tokenizer=Tokens())


def first(number: int) -> Any:
    return SimpleNamespace(tokens=torch.tensor([1, 2, 3]))


def unreadable(number: int) -> Any:
    raise OSError("the file has gone")


def nothing() -> None:
    pass


def out_of_memory() -> None:
    raise RuntimeError("out of memory")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with two steps."""
    (tmp_path / "run.json").write_text(json.dumps({"config": tiny_run(tmp_path).to_dict()}))
    records = [metrics_file.encode(make.step(number, 5.0 - number)) for number in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in records))
    return tmp_path


def report(folder: Path, engine: Engine, data: Any, **settings: Any) -> None:
    finish.report(tiny_run(folder), engine, data, ALONE, **settings)  # type: ignore[arg-type]


def test_a_sample_is_short_of_a_whole_sequence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(folder)
    object.__setattr__(run.model, "seq_length", 4096)
    engine = Engine(nothing)
    finish.report(run, engine, data_of(first), ALONE)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "Sample from the model" in printed and f"123[...]{'4' * 64}" in printed
    assert set(engine.lengths) == {3 + 64}


@pytest.mark.parametrize(
    ("engine", "sample", "message"),
    [
        (Engine(out_of_memory), first, "out of memory"),
        (Engine(nothing), unreadable, "the file has gone"),
    ],
)
def test_a_sample_that_fails_is_a_warning(
    engine: Engine,
    sample: Callable[[int], Any],
    message: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        report(folder, engine, data_of(sample))
    (record,) = caplog.records
    assert message in record.message and "the run is complete" in record.message
    printed = capsys.readouterr().out
    assert "report.html" in printed and "Sample from" not in printed


def test_a_summary_that_fails_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        report(tmp_path / "gone", Engine(nothing), data_of(first))
    assert "no summary" in caplog.text


def test_a_sample_that_hangs_ends_the_process_with_the_runs_status(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    released, ended = threading.Event(), []

    def end(status: int) -> None:
        ended.append(status)
        released.set()

    def hang() -> None:
        assert released.wait(20)
        raise RuntimeError("the process would have ended")

    with caplog.at_level(logging.WARNING):
        report(folder, Engine(hang), data_of(first), status=6, limit_s=0.2, end=end)
    assert ended == [6]
    assert "it has not ended after 0 s" in caplog.text
    assert "report.html" in capsys.readouterr().out


def test_a_sample_in_time_ends_nothing(folder: Path) -> None:
    ended: list[int] = []
    report(folder, Engine(nothing), data_of(first), limit_s=0.5, end=ended.append)
    threading.Event().wait(0.7)
    assert ended == []


def test_pictures_that_fail_are_a_warning(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: object) -> None:
        raise MemoryError("no room to draw")

    monkeypatch.setattr(finish, "write_page", fails)
    with caplog.at_level(logging.WARNING):
        finish.print_summary(tiny_run(folder), "")
    (record,) = caplog.records
    assert record.message == "no pictures: MemoryError: no room to draw (the run is complete)"
    printed = capsys.readouterr().out
    assert "report.md" in printed and "resume" in printed  # the rest is there


def test_without_matplotlib_a_line_says_what_to_install(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.INFO):
        finish.print_summary(tiny_run(folder), "")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "pip install matplotlib" in caplog.text
    assert "report.md" in capsys.readouterr().out
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("columns", [60, 200])
def test_the_plot_is_as_wide_as_the_launchers_terminal(
    folder: Path,
    columns: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    finish.print_summary(tiny_run(folder), "")
    drawn = capsys.readouterr().out.partition("report ")[0]
    assert max(map(len, drawn.splitlines())) == columns
