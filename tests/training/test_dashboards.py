"""TensorBoard and W&B: what they wrote is read back from disk."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron.config.schema import RunConfig
from megatron.training import dashboards, loggers, metrics_file, wandb_settings
from megatron.training.events import points, scalars
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


def event_reader(folder: Path) -> Any:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    reader = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return reader


def read_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = event_reader(folder)
    names = reader.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in names}


def test_tensorboard_has_each_number_of_the_records_once(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    tracker = dashboards.start_tensorboard(run, 0)
    assert tracker is not None
    for record in RECORDS:
        tracker.log(record)
    tracker.close()
    found = read_tensorboard(tmp_path / "tensorboard")
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in RECORDS:
        for name, value in points(record).items():
            expected.setdefault(name, []).append((record["iteration"], value))
    # TensorBoard replaces blanks in names.
    assert {name.replace(" ", "_") for name in expected} == {n.replace(" ", "_") for n in found}
    by_name = {name.replace(" ", "_"): points for name, points in found.items()}
    for name, wanted in expected.items():
        read = by_name[name.replace(" ", "_")]
        assert [step for step, _ in read] == [step for step, _ in wanted]
        assert [v for _, v in read] == pytest.approx([v for _, v in wanted], rel=1e-6)
    assert by_name["loss/lm_loss"] == [(1, 3.0), (3, 2.0)]
    assert not [name for name in found if name.endswith("/iteration") or "skiped" in name]


def test_tensorboard_shows_the_configuration_and_samples(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, log_interval=3)
    tracker = dashboards.start_tensorboard(run, 0)
    assert tracker is not None
    tracker.log({**make.step(5), "text": "a <b>\n| c", "prompt": "a"})
    tracker.close()
    reader = event_reader(tmp_path / "tensorboard")
    (text,) = reader.Tensors("configuration/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "| LOG_INTERVAL | 3 |\n" in table and f"| HIDDEN | {run.model.hidden_size} |\n" in table
    (sample,) = reader.Tensors("sample/text_summary")
    assert sample.step == 5 and b"    a <b>\n    | c" in sample.tensor_proto.string_val[0]
    given = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2").HParamsPluginData
    values = plugin.FromString(given).session_start_info.hparams
    assert values["GLOBAL_BATCH"].number_value == 4 and values["DTYPE"].string_value == "fp32"


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


def by_iteration(records: list[dict[str, Any]], parameters: int) -> dict[int, Any]:
    """W&B's rows: all numbers of an iteration are one."""
    rows: dict[int, Any] = {}
    for record in records:
        rows.setdefault(record["iteration"], {}).update(scalars(record, parameters))
    return {iteration: pytest.approx(row) for iteration, row in rows.items()}


@pytest.mark.usefixtures("no_key")
def test_offline_wandb_is_read_back_and_resumes_under_its_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.training import wandb_folder

    nan = make.step(4, math.nan)
    run = wandb_run(tmp_path, [*RECORDS, nan])
    (path,) = offline_runs(tmp_path)
    rows = wandb_folder.history(path)
    assert rows.keys() == {1, 2, 3, 4}  # the iterations
    assert rows[4]["throughput/tokens_per_sec"] == 64.0
    assert math.isnan(float(rows.pop(4)["loss/lm loss"]))
    assert rows == by_iteration(RECORDS, run.parameters)
    assert wandb_folder.summary(path)["val/best lm loss"] == 2.5
    assert wandb_folder.summary(path)["val/best iteration"] == 2

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
    assert wandb_folder.run(path).tags == [run.label, run.machine]
    assert (tmp_path / "wandb" / "run_id").read_text().strip() == identity

    wandb_run(tmp_path, [make.step(5)])
    assert {wandb_folder.run(path).run_id for path in offline_runs(tmp_path)} == {identity}


@pytest.mark.usefixtures("no_key")
def test_what_the_user_calls_the_run_is_its_name(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from tests.training import wandb_folder

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wandb_run(
        tmp_path, [make.step(1)], wandb_exp_name="chosen", wandb_run_id="mine", wandb_group="sweep",
        wandb_tags="a, b", wandb_notes="a line", wandb_dir=str(elsewhere),
    )  # fmt: skip
    assert not offline_runs(tmp_path)
    run = wandb_folder.run(offline_runs(elsewhere)[0])
    assert (run.display_name, run.run_id, run.run_group) == ("chosen", "mine", "sweep")
    assert (list(run.tags), run.notes) == (["a", "b"], "a line")
    given = [None, "other", None]  # at the starts to come
    runs = [tiny_run(tmp_path, wandb_run_id=identity) for identity in given]
    assert [wandb_settings.arguments(run)["id"] for run in runs] == ["mine", "other", "other"]


class Client:
    """W&B's run, which takes rows and refuses a step that is over, as W&B does."""

    def __init__(self, step: int = 0) -> None:
        self.step = step  # the next
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.calls: list[str] = []

    def define_metric(self, glob: str, step_metric: str) -> None:
        assert step_metric == glob.replace("*", "iteration")

    def log(self, row: dict[str, Any], step: int) -> None:
        assert step >= self.step, "W&B drops this row"
        self.step = step
        self.rows.append((step, row))

    def finish(self) -> None:
        self.calls.append("finish")

    def teardown(self) -> None:
        self.calls.append("teardown")

    def Table(self, columns: list[str], data: list[list[Any]]) -> Any:
        return columns, list(data)


def test_wandbs_step_is_the_iteration_and_only_grows(tmp_path: Path) -> None:
    """Over a rollback, a save that is committed late, and a start after a crash."""
    run, client = tiny_run(tmp_path), Client()
    tracker = dashboards.WandbTracker(client, client, run, 0)
    rollback = {"event": "rollback", "iteration": 2, "rollbacks": 1}
    for record in (*map(make.step, (1, 2, 3, 4)), make.save(2), rollback, *map(make.step, (3, 4))):
        tracker.log(record)
    assert [step for step, _ in client.rows] == [1, 2, 3, 4, 4, 4, 5, 6]
    assert [row.get("loss/iteration") for _, row in client.rows] == [1, 2, 3, 4, None, None, 3, 4]
    crashed = Client(step=8)  # the server has 7
    dashboards.WandbTracker(crashed, crashed, run, 4).log(make.step(5))
    assert crashed.rows[0][0] == 8
    plain = Client(step=5)
    dashboards.WandbTracker(plain, plain, run, 4).log(make.step(5))
    assert plain.rows[0][0] == 5


def test_the_best_validation_is_that_of_the_whole_run(tmp_path: Path) -> None:
    run, client = tiny_run(tmp_path), Client()
    path = tmp_path / "metrics.jsonl"
    done = [make.step(1), make.evaluation(1, math.nan), make.evaluation(2, 2.0), make.step(3)]
    path.write_text("".join(f"{metrics_file.encode(record)}\n" for record in done))
    tracker = dashboards.WandbTracker(client, client, run, 2)
    assert client.summary == {"val/best lm loss": 2.0, "val/best iteration": 2}
    for iteration, loss in ((4, math.nan), (6, 3.0), (8, 1.5), (10, 1.75)):
        tracker.log(make.evaluation(iteration, loss))
    assert client.summary == {"val/best lm loss": 1.5, "val/best iteration": 8}
    # A rollback undoes evaluations as well; by then the file lacks them.
    tracker.log({"event": "rollback", "iteration": 2, "rollbacks": 1})
    assert client.summary == {"val/best lm loss": 2.0, "val/best iteration": 2}


def test_a_sampled_text_is_a_row_of_a_table(tmp_path: Path) -> None:
    client = Client()
    tracker = dashboards.WandbTracker(client, client, tiny_run(tmp_path), 0)
    for iteration in (1, 2):
        tracker.log({**make.step(iteration), "prompt": "a", "text": "ab"})
    columns, rows = client.rows[-1][1]["samples"]
    assert columns == ["iteration", "prompt", "text"]
    assert rows == [[1, "a", "ab"], [2, "a", "ab"]]


class Online:
    """W&B with an account."""

    offline, step = False, 0
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


def test_closing_waits_for_the_client_that_writes_the_last_block(tmp_path: Path) -> None:
    client = Client()
    dashboards.WandbTracker(client, client, tiny_run(tmp_path), 0).close()
    assert client.calls == ["finish", "teardown"]


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
    class Unreachable(Online):
        def init(self, **settings: Any) -> NoReturn:
            raise ConnectionError("no route")

    monkeypatch.setattr(dashboards.importlib, "import_module", lambda name: Unreachable())
    assert dashboards.start_wandb(tiny_run(tmp_path), 0) is None
    _, (level, text) = messages(caplog)
    assert level == logging.WARNING
    assert "ConnectionError: no route" in text
    assert "WANDB_MODE=offline" in text


@pytest.mark.parametrize("at", ["login", "init"])
def test_without_a_network_the_run_is_written_to_disk(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Cut(Online):
        offline = True

        def login(self, prompt: bool) -> bool:
            return at != "login" or fail()

        def init(self, **settings: Any) -> Online:
            return super().init(**settings) if settings["mode"] == "offline" else fail()

    def fail() -> NoReturn:
        raise ConnectionError("no route")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(dashboards.importlib, "import_module", lambda name: Cut())
    assert dashboards.start_wandb(tiny_run(tmp_path), 0) is not None
    ((level, text),) = messages(caplog)
    assert level == logging.WARNING and "no route" in text
    assert f"written to {tmp_path}/wandb; `wandb sync`" in text
    assert not (tmp_path / "wandb" / "run_url").exists()


class Broken(Online):
    """W&B whose every call fails once the run has begun."""

    offline = True
    step = 0

    def log(self, row: dict[str, Any], step: int) -> NoReturn:
        raise ConnectionError("log")

    def finish(self) -> NoReturn:
        raise RuntimeError("finish")


def test_a_client_that_fails_in_every_call_costs_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dashboards.importlib, "import_module", lambda name: Broken())
    tracker = loggers.make_tracker(tiny_run(tmp_path, no_tensorboard=True), logs=True, iteration=0)
    for record in RECORDS:
        tracker.log(record)
    tracker.close()
    assert metrics_file.read(tmp_path / "metrics.jsonl") == RECORDS
    said = [record.getMessage() for record in caplog.records if record.name == loggers.__name__]
    assert said == [
        "WandbTracker failed: ConnectionError: log; tried again every 60 s",
        "WandbTracker failed: RuntimeError: finish: it was not closed cleanly",
    ]


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from megatron.training import dashboards, loggers
from tests.training import records_factory as make
from tests.training.run_config import tiny_run
logging.basicConfig(level="WARNING")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tracker = dashboards.start_tensorboard(tiny_run(Path(sys.argv[1])), 0)
tracker._writer.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
both = loggers.Behind(loggers.Trackers([tracker]))
for iteration in range(1, 301):
    both.log(make.step(iteration))
both.close()
print("closed")
"""


@pytest.mark.long
def test_a_full_disk_stops_tensorboard_and_nothing_else(tmp_path: Path) -> None:
    """A file size limit refuses as a disk does; the writer's own thread meets it."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.endswith("closed\n")
    assert "TensorBoardTracker failed: OSError: [Errno 27] File too large" in done.stderr
    kept = next(v for k, v in read_tensorboard(tmp_path / "tensorboard").items() if "lm" in k)
    assert kept[0] == (1, 2.0) and len(kept) < 300


def test_a_folder_that_cannot_be_written_leaves_tensorboard_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    run = tiny_run(tmp_path, tensorboard_dir=str(tmp_path / "file" / "below"))
    assert dashboards.start_tensorboard(run, 0) is None
    ((level, text),) = messages(caplog)
    assert level == logging.WARNING and text.startswith("TensorBoard is off: ")
