"""A tiny run through the Trainer on every rank: numbered samples, real engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.state import RunState
from megatron.data.dataset import Sample
from megatron.parallel.control import make_control
from megatron.training.device import detect
from megatron.training.resume import resume
from megatron.training.stop import StopRequest
from megatron.training.trainer import Trainer
from tests.equivalence.front import build, run_config


class Numbered:
    """Sample k is drawn from the number k."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self._length, self._vocab_size = length, vocab_size

    def sample(self, k: int) -> Sample:
        generator = torch.Generator().manual_seed(7000 + k)
        tokens = torch.randint(0, self._vocab_size, (self._length + 1,), generator=generator)
        return Sample("corpus", "file", 0, k, tokens=tokens.numpy())


class Records(list[dict[str, Any]]):
    """A tracker that keeps what it gets."""

    def log(self, record: dict[str, Any]) -> None:
        self.append(record)

    def close(self) -> None:
        pass


def trained(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    """Records of this rank's run, resumed where its folder holds a checkpoint."""
    run, control = run_config(variables), make_control()
    engine = build(run, large=True)
    numbers = Numbered(run.model.seq_length, run.model.vocab_size)
    splits = SimpleNamespace(train=numbers, valid=numbers, test=None)
    data: Any = SimpleNamespace(splits=splits, corpus_losses=None, record=None)
    records = Records()
    state: RunState = resume(run, engine, None, control)
    device = detect(dist.get_rank(), run.train.dtype)
    Trainer(run, engine, data, device, records, StopRequest(), state, control).train()
    return records
