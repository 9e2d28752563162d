"""A whole run, from configuration to report, with a note of each sample read and batch fed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from megatron.config.resolve import Site, resolve
from megatron.data.dataset import Dataset
from megatron.data.indexed import IndexedWriter
from megatron.engine import Engine
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.sharded import ShardedEngine
from megatron.engine.zero import ZeroEngine
from megatron.launch import starts
from megatron.launch.ranks import Ranks
from pretrain_gpt_alcf import pretrain

VOCAB_SIZE = 160
VARIABLES = {
    "NLAYERS": "2", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "48",
    "SEQ": "16", "VOCAB_SIZE": str(VOCAB_SIZE), "TOKENIZER_TYPE": "NullTokenizer", "DTYPE": "fp32",
    "GLOBAL_BATCH": "8", "MICRO_BATCH": "2", "TRAIN_ITERS": "12", "LR_DECAY_ITERS": "12",
    "EVAL_INTERVAL": "0", "SAVE_INTERVAL": "0", "OPT": "adamw", "LR": "0.01",
    "NO_TENSORBOARD": "1", "WANDB_MODE": "disabled",
}  # fmt: skip


@dataclass
class Recording:
    """What one rank did.

    Attributes:
        fed: checksum of the tokens of each step the engine took, in order.
        read: numbers of the samples read.
        status: of the run.
    """

    fed: list[int] = field(default_factory=list)
    read: set[int] = field(default_factory=set)
    status: int = -1


def write_data(folder: Path, files: int = 2, tokens: int = 4000) -> Path:
    """A list of small files of random tokens."""
    rng = np.random.default_rng(7)
    lines = []
    for number in range(files):
        prefix = folder / f"part_{number}"
        with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
            for _ in range(tokens // 40):
                writer.add_document(rng.integers(0, VOCAB_SIZE, 40))
        lines.append(f"{1 + number} {prefix} corpus_{number % 2}\n")
    path = folder / "list.txt"
    path.write_text("".join(lines))
    return path


def train_recorded(variables: Mapping[str, str]) -> Recording:
    """Trains on every rank; what the tests run."""
    recording = Recording()
    sample = Dataset.sample

    def noted_sample(self: Dataset, k: int):
        recording.read.add(k)
        return sample(self, k)

    def noted(train_batch: Callable[[Engine, Any], Tensor]) -> Callable[[Engine, Any], Tensor]:
        def noted_train_batch(self: Engine, micro_batches):
            batches = list(micro_batches)
            text = b"".join(tokens.contiguous().numpy().tobytes() for tokens, _ in batches)
            recording.fed.append(zlib.crc32(text))
            return train_batch(self, batches)

        return noted_train_batch

    Dataset.sample = noted_sample
    for kind in (ShardedEngine, ZeroEngine, PipelineEngine):
        kind.train_batch = noted(kind.train_batch)
    resolved = resolve({**VARIABLES, **variables}, [], Site())
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        with starts.pending(resolved, {}) as config:
            starts.accept(config, resolved.run.run_folder)
    dist.barrier()
    recording.status = pretrain(resolved.run, Ranks(rank, rank, world, world, "test"))
    return recording
