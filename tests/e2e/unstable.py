"""A run whose samples of one step are garbage, for the tests of what spikes do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron.checkpoint import store
from megatron.checkpoint.tensors import TensorReader
from megatron.config.resolve import Site, resolve
from megatron.data.data_list import parse_data_stages
from megatron.data.indexed import IndexedWriter
from megatron.data.indexed_header import read_header
from megatron.data.splits import build_stages
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.sharded import ShardedEngine
from megatron.engine.zero import ZeroEngine
from tests.e2e.recorded import VARIABLES, VOCAB_SIZE, Recording, train_recorded

SPIKE, STEPS, BATCH, SEQUENCE = 30, 40, 8, 16
SETTINGS = {
    "TRAIN_ITERS": str(STEPS), "LR_DECAY_ITERS": str(STEPS), "SAVE_INTERVAL": "5",
    "SPIKE_WINDOW": "16", "ROLLBACK_STEPS": "6",
}  # fmt: skip


def write_spiked_data(folder: Path, steps: int = 1) -> Path:
    """A list of one file that is easy to learn, but for what `steps` steps from SPIKE on read."""
    rng = np.random.default_rng(5)
    text = (np.arange(8000) * 7 % 40).astype(np.uint16)
    path = folder / "list.txt"
    path.write_text(f"1 {folder / 'text'} corpus\n")
    _write(folder, text)
    run = resolve({**VARIABLES, **SETTINGS, "DATA_FILE_LIST": str(path)}, [], Site()).run
    stages = parse_data_stages(str(path))
    headers = {str(folder / "text"): read_header(str(folder / "text"))}
    shares = run.data.train_split, run.data.valid_split, run.data.test_split
    order = build_stages(stages, SEQUENCE, shares, run.train.seed, headers=headers).train
    assert order is not None
    for sample in range((SPIKE - 1) * BATCH, (SPIKE - 1 + steps) * BATCH):
        start = order.sample(sample).index * SEQUENCE
        text[start : start + SEQUENCE] = rng.integers(40, VOCAB_SIZE, SEQUENCE)
    _write(folder, text)
    return path


def _write(folder: Path, text: np.ndarray) -> None:
    with IndexedWriter(str(folder / "text"), np.dtype(np.uint16)) as writer:
        for start in range(0, len(text), 400):
            writer.add_document(text[start : start + 400])


def train_poisoned(variables: Mapping[str, str], step: int) -> Recording:
    """Trains; in one step the gradient of a weight is NaN, on the last rank alone."""
    if dist.get_rank() == dist.get_world_size() - 1:
        for kind in (ShardedEngine, ZeroEngine, PipelineEngine):
            kind.train_batch = _poisoned(kind.train_batch, step)
    return train_recorded(variables)


def _poisoned(train_batch: Any, step: int) -> Any:
    calls = 0

    def train(self: Any, micro_batches: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != step:
            return train_batch(self, micro_batches)
        weight = next(p for p in self.module.parameters() if hasattr(p, "partition_dim"))
        handle = weight.register_hook(lambda gradient: gradient * math.nan)
        try:
            return train_batch(self, micro_batches)
        finally:
            handle.remove()

    return train


def contents(root: Path) -> dict[int, dict[str, Any]]:
    """Every tensor of every checkpoint in a run's folder, whole, by step."""
    return {one.iteration: tensors(one) for one in store.committed(root / "checkpoints")}


def tensors(checkpoint: store.Checkpoint) -> dict[str, Any]:
    """Weights and optimizer states by `<name> <state>`."""
    reader = TensorReader(checkpoint.files("tensors"))
    return {f"{name} {state}": reader.whole(name, state) for name, state in _names(reader)}


def _names(reader: TensorReader) -> list[tuple[str, str]]:
    return sorted((name, state) for name in reader.names() for state in reader.states(name))
