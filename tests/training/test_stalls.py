"""No step waits: not for the device between two log lines, nor for dashboards or the collector."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.checkpoint.state import RunState
from megatron.config.errors import ConfigError
from megatron.config.schema import StabilityConfig
from megatron.data.dataset import Sample
from megatron.data.loader import Loader, StepPlan
from megatron.data.prepare.plain_tokenizers import ByteTokenizer
from megatron.engine import start_distributed
from megatron.parallel.control import ALONE, Control, make_control
from megatron.parallel.groups import make_groups
from megatron.training import garbage, guard
from megatron.training.device import Device, detect
from megatron.training.evaluation import evaluate
from megatron.training.guard import Guard
from megatron.training.loggers import Behind
from megatron.training.rank_tokenizer import KnownTokenizer, shared_tokenizer
from megatron.training.stop import StopRequest
from megatron.training.trainer import Trainer
from pretrain_gpt_alcf import build_engine
from tests.equivalence import front
from tests.spawn import run
from tests.training import records_factory as make

WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
"""What makes the host wait for the device: float(), bool(), item(), tolist(), a mask's indices."""

NOT_OURS = {
    "megatron/parallel/layers.py": "ids outside the vocabulary, on the CPU only",
    "megatron/parallel/head_loss.py": "a gradient's factor, on the CPU only",
    "megatron/engine/sharded.py": "the CPU, and rules without a fused kernel, look at the norm",
    "deepspeed": "its norm, which decides on the host whether it updates",
}


class Waits(TorchDispatchMode):
    """Counts by the file that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in WAITS:
            calls = reversed(traceback.extract_stack())
            self.files[next(name for call in calls if (name := whose(call.filename)))] += 1
        return function(*args, **(kwargs or {}))


def whose(file: str) -> str:
    """`deepspeed`, `megatron/...` of a file; empty for torch's and the test's."""
    if "/site-packages/" in file:
        return "deepspeed" if "/site-packages/deepspeed/" in file else ""
    _, found, name = file.rpartition("/megatron/")
    return f"megatron/{name}" if found else ""


class Random:
    """Samples of the tiny run."""

    def sample(self, k: int) -> Sample:
        tokens = np.random.default_rng(k).integers(0, 200, 33)
        return Sample("corpus", "file", 0, k, tokens=tokens)


def trainer_of(variables: dict[str, str], device: Device, control: Control) -> Trainer:
    """The real Trainer around the real engine, which logs every 10 steps."""
    settings = {"LOG_INTERVAL": "10", "EVAL_ITERS": "3", "SAVE_INTERVAL": "0", **variables}
    config = front.run_config(settings)
    engine = build_engine(config, make_groups(config.layout), device)
    splits = SimpleNamespace(train=Random(), valid=Random(), test=None)
    data: Any = SimpleNamespace(splits=splits, corpus_losses=None, record=None)
    records: Any = SimpleNamespace(log=lambda record: None, close=lambda: None)
    return Trainer(config, engine, data, device, records, StopRequest(), RunState(), control)


def waits(variables: dict[str, str]) -> list[dict[str, int]]:
    """Who waited in steps 2 to 9, in the record of the tenth, and in an evaluation."""
    rank = torch.distributed.get_rank()
    start_distributed("gloo", rank, torch.distributed.get_world_size(), 0, "", 60)
    trainer = trainer_of(variables, detect(rank, "fp32"), make_control())
    found = []
    with trainer.read_ahead() as loader:
        trainer.step(loader)
        for some in (range(8), range(1)):
            with Waits() as counted:
                for _ in some:
                    trainer.step(loader)
                    trainer.agree()
            found.append(dict(counted.files))
    with Waits() as counted:
        trainer.record()
    found.append(dict(counted.files))
    with Waits() as counted:
        assert evaluate(trainer, "validation", trainer.data.splits.valid) == 0
    return [*found, dict(counted.files)]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"TIMING_LOG_LEVEL": "1"},
        {"DTYPE": "bf16", "WORLD_SIZE": "2", "ZERO_STAGE": "1"},
        {"PP": "2", "TIMING_LOG_LEVEL": "1"},
    ],
    ids=lambda variables: " ".join(variables) or "one",
)
def test_between_two_logs_nothing_of_ours_waits(variables: dict[str, str]) -> None:
    for steps, last, record, evaluation in run(waits, front.world(variables), variables):
        for files in (steps, last, evaluation):
            assert set(files) <= set(NOT_OURS)
        assert record["megatron/training/meter.py"] > 0  # the counter sees what does wait


# --- A refused update, known late -----------------------------------------------------------------


class Decided:
    """An engine whose device decides; `applied` of the last step."""

    loss_scale = 1.0

    def __init__(self, *, on_device: bool) -> None:
        self._on_device, self.applied = on_device, True

    @property
    def step_applied(self) -> bool | torch.Tensor:
        return torch.tensor(self.applied) if self._on_device else self.applied


@given(flags=st.lists(st.booleans(), max_size=20), limit=st.integers(0, 4))
def test_a_flag_read_late_ends_the_run_at_the_same_step(flags: list[bool], limit: int) -> None:
    settings = StabilityConfig(spike_policy="warn", max_bad_steps=limit)
    both = [(Guard(settings, ALONE, scales=False), Decided(on_device=late)) for late in (0, 1)]
    for flag in flags:
        beyond = []
        for own, engine in both:
            engine.applied = flag
            assert own.stepped(1.0, engine) is None  # type: ignore[arg-type]
            beyond.append(own.is_beyond_policy)
        assert beyond[0] is beyond[1]
    for own, _ in both:
        own.settle()
    at_once, late = (own for own, _ in both)
    assert late.refused == at_once.refused == flags.count(False)
    assert late.bad_steps == at_once.bad_steps


def test_a_flag_of_the_device_is_read_behind_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Noted(guard.Later):
        def read(self) -> bool:
            log.append("read")
            return super().read()

    monkeypatch.setattr(guard, "Later", Noted)
    engine = Decided(on_device=True)
    orders = {
        "warn": ["step", "step", "read", "step", "read"],
        "skip": ["step", "read", "step", "read", "step", "read"],
    }
    for policy, expected in orders.items():
        own = Guard(StabilityConfig(spike_policy=policy, max_bad_steps=9), ALONE, scales=False)
        log.clear()
        for _ in range(3):
            log.append("step")
            own.stepped(1.0, engine)  # type: ignore[arg-type]
        assert log == expected


# --- The collector --------------------------------------------------------------------------------


class Knot:
    """Garbage in a cycle."""

    def __init__(self) -> None:
        self.itself = self


def alive() -> int:
    return sum(type(one) is Knot for one in gc.get_objects())


def test_garbage_is_collected_at_chosen_steps_only() -> None:
    with garbage.at_chosen_steps():
        for iteration in range(1, garbage.EVERY):
            Knot()
            garbage.step_ended(iteration)
        young = [object() for _ in range(10**5)]  # far above the limits of automatic collection
        assert alive() == garbage.EVERY - 1
        garbage.step_ended(garbage.EVERY)
        assert alive() == 0
        del young
        old = Knot()
        garbage.step_ended(garbage.EVERY)
        garbage.step_ended(garbage.EVERY)
        del old
        garbage.step_ended(garbage.EVERY)
        garbage.saved()
        assert alive() == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0


# --- Dashboards -----------------------------------------------------------------------------------


class Slow:
    """A tracker behind a network that stalls."""

    def __init__(self) -> None:
        self.go, self.seen, self.closed_after = threading.Event(), [], -1

    def log(self, record: dict[str, Any]) -> None:
        self.go.wait(10)
        self.seen.append(record["iteration"])

    def close(self) -> None:
        self.closed_after = len(self.seen)


def test_a_dashboard_that_stalls_holds_no_step_and_gets_every_record() -> None:
    slow = Slow()
    tracker = Behind(slow)
    for iteration in range(100):
        tracker.log(make.step(iteration))
    assert slow.seen == []
    slow.go.set()
    tracker.close()
    assert slow.seen == [*range(100)] and slow.closed_after == 100


# --- The tokenizer --------------------------------------------------------------------------------


def loads(fails: bool) -> tuple[bool, Any]:
    """Whether this rank has loaded, and what it knows."""
    loaded = []

    def load() -> ByteTokenizer:
        loaded.append(True)
        if fails:
            raise ConfigError("TOKENIZER_MODEL=nothing cannot be loaded")
        return ByteTokenizer()

    try:
        tokenizer = shared_tokenizer(load, make_control())
    except ConfigError as error:
        return bool(loaded), str(error)
    facts = tokenizer.vocab_size, tokenizer.eod, tokenizer.fingerprint()
    return bool(loaded), (isinstance(tokenizer, KnownTokenizer), *facts)


def test_one_rank_loads_the_tokenizer() -> None:
    own = ByteTokenizer()
    facts = own.vocab_size, own.eod, own.fingerprint()
    assert run(loads, 2, False) == [(True, (False, *facts)), (False, (True, *facts))]
    error = "TOKENIZER_MODEL=nothing cannot be loaded"
    assert run(loads, 2, True) == [(True, error), (False, error)]


# --- Blocks ---------------------------------------------------------------------------------------


def test_a_micro_batch_is_one_block_without_a_copy() -> None:
    with Loader(Random(), StepPlan(2, 2, 1, 0, 1), [(1, 0)]) as loader:
        batch = next(loader)
    assert batch.block.shape == (2, 33) and batch.block.is_contiguous()
    assert batch.tokens.data_ptr() == batch.block.data_ptr()
    assert batch.labels.data_ptr() == batch.block.data_ptr() + 8


def on_a_gpu(folder: str) -> None:
    """Steps on a GPU; fails where one of ours waits for it, or copies from pageable memory."""
    start_distributed("nccl", 0, 1, 0, "", 60)
    device = detect(0, "bf16")
    torch.cuda.set_device(0)
    trainer = trainer_of({"DTYPE": "bf16", "RUN_DIR": folder}, device, make_control())
    with trainer.read_ahead() as loader:
        assert loader is not None
        for _ in range(3):
            trainer.step(loader)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            for _ in range(5):
                trainer.step(loader)
            torch.cuda.set_sync_debug_mode("default")
        ours = [str(one) for one in caught if "/megatron/" in one.filename]
        assert not ours, ours
        batch = next(loader)
        assert batch.tokens.is_cuda and batch.labels.data_ptr() == batch.block.data_ptr() + 8
        waiting = loader._ready.get(timeout=10)
        assert isinstance(waiting, list) and waiting[0].block.is_pinned()
    assert guard.Later(torch.ones((), device="cuda").isfinite()).read()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_no_step_on_a_gpu_waits(tmp_path: Path) -> None:
    code = f"from tests.training.test_stalls import on_a_gpu; on_a_gpu({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
