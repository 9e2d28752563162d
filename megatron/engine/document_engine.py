"""Engines that tell `Documents` which micro-batch they compute: masks and positions follow it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.runtime.pipe import schedule
from torch import Tensor

from megatron.engine.interface import MicroBatches
from megatron.engine.one_stage import OneStageEngine
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.sharded import ShardedEngine
from megatron.engine.zero import ZeroEngine
from megatron.model.document_mask import Documents
from megatron.parallel.ulysses import all_positions


class FollowsDocuments(OneStageEngine):
    """One stage: the backward pass of a micro-batch follows its forward pass at once."""

    _documents: Documents

    def follow(self, documents: Documents) -> None:
        """Sets what follows this engine; comes before the first step."""
        self._documents = documents

    def _to_device(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        followed = self._documents.begin(micro_batches, self.groups, self.device)
        return super()._to_device(followed)

    def _forward(self, tokens: Tensor) -> Tensor | None:
        self._documents.show(all_positions(tokens, self.groups.sp))
        return super()._forward(tokens)


class DocumentZeroEngine(FollowsDocuments, ZeroEngine):
    """Under DeepSpeed."""


class DocumentShardedEngine(FollowsDocuments, ShardedEngine):
    """Under the sharded engine."""


class DocumentPipelineEngine(FollowsDocuments, PipelineEngine):
    """Several stages: each counts its passes, which take the micro-batches in order.

    Forward and backward passes alternate, so a recomputed forward pass needs its own micro-batch
    back. DualPipeV's two stages of a rank count apart.
    """

    def follow(self, documents: Documents) -> None:
        super().follow(documents)
        self._passes: Counter[tuple[str, int]] = Counter()
        table = self._deepspeed._INSTRUCTION_MAP
        self._deepspeed._INSTRUCTION_MAP = {
            **table,
            schedule.ForwardPass: self._at_its_batch("forward", table[schedule.ForwardPass]),
            schedule.BackwardPass: self._at_its_batch("backward", table[schedule.BackwardPass]),
        }

    def _to_device(self, micro_batches: MicroBatches) -> Iterator[tuple[Tensor, Tensor]]:
        self._passes.clear()
        return super()._to_device(micro_batches)

    def _at_its_batch(self, kind: str, run: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*args: Any, **kwargs: Any) -> None:
            key = kind, kwargs.get("phase", 0)
            self._documents.select(self._passes[key])
            self._passes[key] += 1
            run(*args, **kwargs)

        return wrapped
