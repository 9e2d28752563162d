"""One of each kind is added from outside: registered in one place, trained with, seen to work.

A test that trains runs in a process of its own, so what it registers ends with it.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from megatron.checkpoint.store import committed
from megatron.checkpoint.tensors import TensorReader
from megatron.config import schema
from megatron.config.option import option
from megatron.config.presets import PRESETS, Preset
from megatron.config.resolve import Site, resolve
from megatron.launch import start
from megatron.launch.machines import MACHINES, Machine, find_machine
from tests.spawn import run

if TYPE_CHECKING:
    from megatron.data.dataset import Sample
    from megatron.training.metrics_file import MetricsRecord

STEPS = 3
TINY = {
    "MODEL_ARCH": "debug", "NLAYERS": "2", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "2",
    "FFN_HIDDEN_SIZE": "48", "SEQ": "16", "MICRO_BATCH": "2", "TRAIN_ITERS": f"{STEPS}",
    "EVAL_INTERVAL": "0", "COMPILE": "0", "NO_TENSORBOARD": "1", "WANDB_MODE": "disabled",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A run that has ended: what it printed, what it recorded, what the extension brought back."""

    printed: str
    records: list[dict[str, Any]]
    tensors: TensorReader
    brought: Any
    folder: Path


def train(extend: Callable[[], Any], folder: Path) -> tuple[str, Any]:
    """In a rank of its own: extends, then trains as pretrain_gpt_alcf.py does."""
    import torch.distributed as dist

    import pretrain_gpt_alcf

    brought = extend()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = pretrain_gpt_alcf.main([])
    assert status == 0, printed.getvalue()
    assert not dist.is_initialized(), "the run left its process groups open"
    return printed.getvalue(), brought


def trained(extend: Callable[[], Any], folder: Path, **settings: str) -> Trained:
    """A tiny run with an extension."""
    environ = {**TINY, **settings, "RUN_DIR": str(folder)}
    ((printed, brought),) = run(train, 1, extend, folder, environ=environ)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoint = committed(folder / "checkpoints")[0]
    tensors = checkpoint.reader()
    return Trained(printed, records, tensors, brought, folder)


def steps(result: Trained) -> list[dict[str, Any]]:
    """The records of a run's steps."""
    return [record for record in result.records if record["event"] == "step"]


def nothing() -> None:
    """No extension."""


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The run to compare with."""
    return trained(nothing, tmp_path_factory.mktemp("usual"))


def dry_run(capsys: pytest.CaptureFixture[str], **settings: str) -> str:
    """What the dry run prints."""
    environ = {**settings, "DRY_RUN": "1"}
    assert start.main([], environ) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def add_architecture() -> None:
    """Llama without the norm before the head."""
    from megatron.model.llama import Llama
    from megatron.model.registry import ARCHITECTURES

    class Headlong(Llama):
        def layers(self, shape: Any, context: Any) -> list[Any]:
            *body, _, head = super().layers(shape, context)
            return [*body, head]

        def parameters(self, shape: Any, tensor_parallel: int = 1) -> int:
            return super().parameters(shape, tensor_parallel) - shape.hidden_size

    ARCHITECTURES["headlong"] = Headlong()


def test_an_architecture(tmp_path: Path, usual: Trained) -> None:
    result = trained(add_architecture, tmp_path, ARCHITECTURE="headlong")
    gone = set(usual.tensors.names()) - set(result.tensors.names())
    assert len(gone) == 1  # the norm; the head has taken its number
    assert steps(result)[-1]["loss"] != steps(usual)[-1]["loss"]
    kept = sum(result.tensors.whole(name).numel() for name in result.tensors.names())
    assert sum(usual.tensors.whole(name).numel() for name in usual.tensors.names()) == kept + 32
    assert f"PARAMS: {kept}\n" in result.printed  # the parameters that the log counts


def test_a_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    values = {**PRESETS["debug"].values, "NLAYERS": 3, "HIDDEN": 48, "SEQ": 96}
    monkeypatch.setitem(PRESETS, "pocket", Preset("Pocket", ("Outside/Pocket",), values))
    shown = dry_run(capsys, MODEL_ARCH="outside/pocket")
    assert "Pocket-seq96-builtin" in shown
    found = resolve({"MODEL_ARCH": "pocket", "DRY_RUN": "1"}, [], Site()).run.model
    assert (found.num_layers, found.hidden_size, found.seq_length) == (3, 48, 96)


def add_optimizer() -> None:
    """Steps of a fixed size, which it counts per weight in a state of its own."""
    import torch

    from megatron.config.update_rules import RULES, Rule

    class SignSGD(torch.optim.Optimizer):
        def __init__(self, groups: Any, settings: Any) -> None:
            super().__init__(groups, {"lr": 0.0})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight.sub_(group["lr"] * weight.grad.sign())
                        state = self.state[weight]
                        state.setdefault("taken", torch.zeros_like(weight)).add_(1)

    RULES["signsgd"] = Rule(states=1, make=SignSGD)


def test_an_optimizer(tmp_path: Path, usual: Trained) -> None:
    settings = {"OPT": "signsgd", "LR_DECAY_STYLE": "constant", "LR_WARMUP_FRAC": "0"}
    result = trained(add_optimizer, tmp_path, **settings, LR="0.25", MIN_LR="0")
    for name in result.tensors.names():
        assert result.tensors.states(name) == ["weight", "taken"]
        assert set(result.tensors.whole(name, "taken").unique().tolist()) == {STEPS}
        moved = (result.tensors.whole(name) - usual.tensors.whole(name)).abs()
        assert moved.max() > 0.2  # one of its steps is 0.25 long, AdamW's are far shorter


def add_schedule() -> None:
    """Half the rate after each step."""
    from megatron.config.schedule import STYLES

    STYLES["halving"] = lambda iteration, optimizer: optimizer.learning_rate / 2**iteration


def test_a_schedule(tmp_path: Path) -> None:
    settings = {"LR_DECAY_STYLE": "halving", "LR_WARMUP_FRAC": "0", "LR_DECAY_ITERS": "100"}
    result = trained(add_schedule, tmp_path, **settings, LR="0.016", MIN_LR="0")
    assert [record["learning_rate"] for record in steps(result)] == [0.008, 0.004, 0.002]


def add_metric() -> list[str]:
    """Bits per token; brings back the groups of the dashboards' charts."""
    import math

    from megatron.training.events import groups
    from megatron.training.metrics import METRICS, Metric

    METRICS.append(
        Metric(
            "bits",
            lambda interval: interval.losses[-1] / math.log(2),
            console="bits={bits:.3f}",
            scalars=("compression/bits",),
        )
    )
    return [*groups()]


def test_a_metric(tmp_path: Path) -> None:
    result = trained(add_metric, tmp_path, NO_TENSORBOARD="0")
    for record in steps(result):
        assert record["bits"] == pytest.approx(record["loss"] * 1.442695)
        assert f" | bits={record['bits']:.3f}" in result.printed
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert events.read_bytes().count(b"compression/bits") == STEPS
    assert "compression" in result.brought


def add_tracker() -> list[str]:
    """Remembers the events of the records."""
    from megatron.training.loggers import TRACKERS

    events: list[str] = []

    class Memory:
        def log(self, record: MetricsRecord) -> None:
            events.append(record["event"])

        def close(self) -> None:
            events.append("closed")

    TRACKERS["memory"] = lambda run, iteration: Memory()
    return events


def test_a_tracker(tmp_path: Path) -> None:
    result = trained(add_tracker, tmp_path)
    assert result.brought == [*["step"] * STEPS, "save", "stop", "closed"]


def add_data_source() -> list[int]:
    """Every sample counts upwards from its number; remembers the numbers that were asked for."""
    import numpy as np

    from megatron.config.schema import DATA_ORDERS
    from megatron.data.dataset import Sample, Splits
    from megatron.training.run_data import ORDERS

    asked: list[int] = []

    class Counting:
        def sample(self, k: int) -> Sample:
            asked.append(k)
            tokens = (k + np.arange(17, dtype=np.int64)) % 64
            return Sample("counting", "", 0, k, tokens=tokens)

    DATA_ORDERS.append("counting")
    ORDERS["counting"] = lambda run, stages, headers: Splits(Counting(), None, None, ())
    return asked


def test_a_data_source(tmp_path: Path, usual: Trained) -> None:
    """Anything with `sample(k)`: step i asks for the samples of step i, once and in order."""
    result = trained(add_data_source, tmp_path, GRAD_ACC_STEPS="2", DATA_ORDER="counting")
    assert result.brought == [*range(STEPS * 4), 0]  # 0: the prompt of the sampled text
    assert steps(result)[-1]["loss"] != steps(usual)[-1]["loss"]


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine in the table."""
    row = Machine(
        name="attic",
        scheduler="none",
        launcher="local",
        hosts=(r"attic\d+",),
        devices_per_host=2,
        is_hpc=False,
        environment={"NCCL_ATTIC": "1"},
        defaults=lambda hosts: {"TP": "2"},
    )
    MACHINES.append(row)
    yield row
    MACHINES.remove(row)


def test_a_machine(
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert find_machine("attic7", {}) is machine
    monkeypatch.setattr("socket.gethostname", lambda: "attic7")
    _, resolved, planned = start.check([], {"DRY_RUN": "1"})
    assert resolved.run.machine == "attic"
    assert resolved.run.parallel.tensor_parallel == 2
    assert planned.environ["NCCL_ATTIC"] == "1"
    assert "-m megatron.launch -n 2 -- " in dry_run(capsys)  # a rank per device


@pytest.fixture
def own_option(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A section with one more field."""

    @dataclass(frozen=True)
    class LogConfig(schema.LogConfig):
        motto: str = option("none", "MOTTO", "--motto", "words to train by", ("none", "onward"))

    tables: tuple[Any, ...] = (schema.options, schema.by_key, schema.by_variable, schema.by_flag)
    monkeypatch.setitem(schema.SECTIONS, "log", LogConfig)
    for table in tables:
        table.cache_clear()
    yield
    monkeypatch.undo()
    for table in tables:
        table.cache_clear()


@pytest.mark.usefixtures("own_option")
def test_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    """One field is its variable, its flag, its check, its help and its place in run.json."""

    def motto(environ: Mapping[str, str], *argv: str) -> str:
        found = resolve({**environ, "DRY_RUN": "1"}, argv, Site()).run
        assert schema.RunConfig.from_dict(found.to_dict()) == found
        return str(found.log.motto)  # type: ignore[attr-defined]

    assert motto({}) == "none"
    assert motto({"MOTTO": "onward"}) == "onward"
    assert motto({}, "--motto", "onward") == "onward"
    assert start.main([], {"MOTTO": "backward", "DRY_RUN": "1"}) == 2
    assert "MOTTO=backward is not one of none, onward" in capsys.readouterr().err
    assert start.main(["--help"], {}) == 0
    assert "words to train by" in capsys.readouterr().out
