"""TensorBoard and W&B: what they wrote is read back from disk."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import re
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron.config.schema import RunConfig
from megatron.training import dashboards
from megatron.training.events import scalars
from tests.training import records_factory as make
from tests.training.run_config import tiny_run

RECORDS = [make.step(1, 3.0), make.skip(2), make.evaluation(2), make.step(3, 2.0), make.save(3)]


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without credentials."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def messages(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    found = [r for r in caplog.records if r.name == dashboards.__name__]
    return [(record.levelno, record.getMessage()) for record in found]


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    names = reader.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in names}


def test_tensorboard_holds_every_number(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tracker = dashboards.start_tensorboard(run, 0)
    assert tracker is not None
    for record in RECORDS:
        tracker.log(record)
    tracker.close()
    found = read_tensorboard(tmp_path / "tensorboard")
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in RECORDS:
        for name, value in scalars(record, run.parameters).items():
            expected.setdefault(name, []).append((record["iteration"], value))
    # TensorBoard replaces blanks in names.
    assert {name.replace(" ", "_") for name in expected} == {n.replace(" ", "_") for n in found}
    by_name = {name.replace(" ", "_"): points for name, points in found.items()}
    for name, points in expected.items():
        read = by_name[name.replace(" ", "_")]
        assert [step for step, _ in read] == [step for step, _ in points]
        assert [v for _, v in read] == pytest.approx([v for _, v in points], rel=1e-6)


def test_the_folder_of_tensorboard_is_the_users(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", tensorboard_dir=str(tmp_path / "elsewhere"))
    tracker = dashboards.start_tensorboard(run, 0)
    assert tracker is not None
    tracker.log(make.step(1, 3.0))
    tracker.close()
    assert "loss/lm_loss" in {n.replace(" ", "_") for n in read_tensorboard(tmp_path / "elsewhere")}
    assert not (tmp_path / "run").exists()


def test_a_resumed_tensorboard_forgets_what_is_done_again(tmp_path: Path) -> None:
    for start, losses in ((0, {1: 3.0, 2: 9.0, 3: 9.0}), (1, {2: 2.0})):
        tracker = dashboards.start_tensorboard(tiny_run(tmp_path), start)
        assert tracker is not None
        for iteration, loss in losses.items():
            tracker.log(make.step(iteration, loss))
        tracker.close()
    found = read_tensorboard(tmp_path / "tensorboard")
    assert next(v for k, v in found.items() if k.startswith("loss/lm")) == [(1, 3.0), (2, 2.0)]


def test_after_a_rollback_tensorboard_forgets_what_it_undid(tmp_path: Path) -> None:
    tracker = dashboards.start_tensorboard(tiny_run(tmp_path), 0)
    assert tracker is not None
    for iteration, loss in enumerate((3.0, 2.0, 9.0, 8.0), start=1):
        tracker.log(make.step(iteration, loss))
    tracker.log({"event": "rollback", "iteration": 2, "rollbacks": 1})
    tracker.log(make.step(3, 1.0))
    tracker.close()
    found = read_tensorboard(tmp_path / "tensorboard")
    losses = next(v for k, v in found.items() if k.startswith("loss/lm"))
    assert losses == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_no_tensorboard(tmp_path: Path) -> None:
    assert dashboards.start_tensorboard(tiny_run(tmp_path, no_tensorboard=True), 0) is None
    assert not list(tmp_path.iterdir())


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> NoReturn:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(dashboards.importlib, "import_module", absent)


def test_missing_packages_are_said_once_and_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    missing(monkeypatch)
    caplog.set_level(logging.INFO)
    assert dashboards.start_tensorboard(tiny_run(tmp_path), 0) is None
    assert dashboards.start_wandb(tiny_run(tmp_path), 0) is None
    assert dashboards.start_wandb(tiny_run(tmp_path, wandb_mode="offline"), 0) is None
    levels = [level for level, _ in messages(caplog)]
    assert levels == [logging.INFO, logging.INFO, logging.WARNING]
    assert all("No module named" in text for _, text in messages(caplog))


def offline_runs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))


def wandb_run(folder: Path, records: list[dict[str, Any]], **log: Any) -> RunConfig:
    run = tiny_run(folder, wandb_mode="offline", **log)
    tracker = dashboards.start_wandb(run, 0)
    assert tracker is not None
    for record in records:
        tracker.log(record)
    tracker.close()
    return run


@pytest.mark.usefixtures("no_key")
def test_offline_wandb_is_read_back_and_resumes_under_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.training import wandb_folder

    nan = make.step(4, math.nan)
    run = wandb_run(tmp_path, [*RECORDS, nan])
    (path,) = offline_runs(tmp_path)
    rows = wandb_folder.history(path)
    assert rows[:-1] == [pytest.approx(scalars(record, run.parameters)) for record in RECORDS]
    assert rows[-1]["throughput/tokens_per_sec"] == 64.0
    assert math.isnan(float(rows[-1]["loss/lm loss"]))

    config = wandb_folder.config(path)
    assert config["num_params"] == run.parameters
    assert config["machine"] == run.machine
    assert config["args"]["global_batch_size"] == run.train.global_batch_size
    assert config["env"]["MODEL_ARCH"] == run.label
    assert config["args"]["model_arch"] == run.model.model_arch
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}", config["created_at"])
    assert config["hosts"] == []
    assert config["env"]["NHOSTS"] == run.launch.num_hosts
    assert wandb_folder.metrics(path)["throughput/*"] == "throughput/iteration"

    identity = wandb_folder.run(path).run_id
    assert wandb_folder.run(path).project == "AuroraGPT"
    assert wandb_folder.run(path).display_name == tmp_path.name
    named = tmp_path / "named"
    named.mkdir()
    wandb_run(named, [make.step(1)], wandb_exp_name="chosen")
    assert wandb_folder.run(offline_runs(named)[0]).display_name == "chosen"
    assert (tmp_path / "wandb" / "run_id").read_text().strip() == identity

    wandb_run(tmp_path, [make.step(5)])
    assert {wandb_folder.run(path).run_id for path in offline_runs(tmp_path)} == {identity}


class Online:
    """W&B with an account."""

    url = "https://wandb.ai/someone/AuroraGPT/runs/abc"
    Settings = dict

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}

    def login(self, prompt: bool) -> bool:
        return True

    def init(self, **settings: Any) -> Online:
        self.config = settings["config"]
        return self

    def define_metric(self, glob: str, step_metric: str) -> None:
        """Takes any."""


def test_the_runs_address_and_hosts_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what groups the runs of a study is that of the first start."""
    caplog.set_level(logging.INFO)
    (tmp_path / "run.json").write_text('{"provenance": {"hosts": ["x1", "x2"]}}')
    made = []
    for _ in range(2):
        online = Online()
        monkeypatch.setattr(dashboards.importlib, "import_module", lambda name, it=online: it)
        assert dashboards.start_wandb(tiny_run(tmp_path), 0) is not None
        assert online.config["hosts"] == ["x1", "x2"]
        made.append(online.config["created_at"])
        os.utime(tmp_path / "wandb" / "run_id", (1e9, 1e9))
    assert made[1] == time.strftime("%Y-%m-%d-%H%M%S", time.localtime(1e9)) != made[0]
    assert (tmp_path / "wandb" / "run_url").read_text() == f"{Online.url}\n"
    assert (logging.INFO, f"Weights & Biases run: {Online.url}") in messages(caplog)


def test_a_sampled_text_is_in_tensorboard(tmp_path: Path) -> None:
    tracker = dashboards.start_tensorboard(tiny_run(tmp_path), 0)
    assert tracker is not None
    tracker.log(make.sample(10))
    tracker.close()
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    reader = module.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    (event,) = reader.Tensors("sample/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    assert (event.step, shown) == (10, "    What is[...] an\n      LLM?")


@pytest.mark.usefixtures("no_key")
def test_a_sampled_text_is_a_table_in_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.training import wandb_folder

    wandb_run(tmp_path, [make.sample(10)])
    (path,) = offline_runs(tmp_path)
    (row,) = wandb_folder.history(path)
    assert row["sample/iteration"] == 10
    (table,) = tmp_path.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[10, "What is", " an\n  LLM?"]]


def test_closing_waits_for_the_client_that_writes_the_last_block() -> None:
    calls: list[str] = []

    class Client:
        def define_metric(self, glob: str, step_metric: str) -> None:
            assert step_metric == glob.replace("*", "iteration")

        def finish(self) -> None:
            calls.append("finish")

        def teardown(self) -> None:
            calls.append("teardown")

    client = Client()
    dashboards.WandbTracker(client, client, 1).close()
    assert calls == ["finish", "teardown"]


@pytest.mark.usefixtures("no_key")
def test_without_a_key_wandb_is_off_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("wandb")
    caplog.set_level(logging.INFO)
    assert dashboards.start_wandb(tiny_run(tmp_path), 0) is None
    assert dashboards.start_wandb(tiny_run(tmp_path, wandb_mode="online"), 0) is None
    (level, text), (asked_level, asked_text) = messages(caplog)
    assert (level, asked_level) == (logging.INFO, logging.WARNING)
    assert "no API key" in text
    assert text == asked_text
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("off", [{"wandb_disabled": True}, {"wandb_mode": "disabled"}])
def test_disabled_is_silent(
    off: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert dashboards.start_wandb(tiny_run(tmp_path, **off), 0) is None
    assert not messages(caplog)


def test_a_client_that_cannot_start_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unreachable:
        @staticmethod
        def login(prompt: bool) -> NoReturn:
            raise ConnectionError("no route")

    monkeypatch.setattr(dashboards.importlib, "import_module", lambda name: Unreachable)
    assert dashboards.start_wandb(tiny_run(tmp_path), 0) is None
    ((level, text),) = messages(caplog)
    assert level == logging.WARNING
    assert "ConnectionError: no route" in text
    assert "WANDB_MODE=offline" in text
