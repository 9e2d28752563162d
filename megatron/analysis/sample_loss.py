"""Loss of single samples under a checkpoint, by one process on the CPU in fp32."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron.checkpoint import store
from megatron.config.errors import DataError
from megatron.config.schema import RunConfig
from megatron.model.document_mask import follow_documents
from megatron.model.stack import Stack
from megatron.parallel.head_loss import Targets
from megatron.training.build import documents_followed, model_layers
from megatron.training.optimizers.schedule_free import evaluation_weight


class SampleLosses:
    """The whole model of a checkpoint, and its mean loss on a sample."""

    def __init__(self, folder: Path, eod: int = -1) -> None:
        """Reads a checkpoint's folder, written in any layout.

        Args:
            folder: `step-<N>`.
            eod: id that ends a document, for a run whose masks or losses follow documents.

        Raises:
            DataError: it holds none, or a damaged one.
        """
        found = [c for c in store.committed(folder.parent) if c.folder.name == folder.name]
        if not found:
            raise DataError(f"{folder} is no checkpoint: give a folder checkpoints/step-<N>")
        (checkpoint,) = found
        damage = store.damage(checkpoint)
        if damage:
            raise DataError("\n".join(damage))
        self.iteration = checkpoint.iteration
        run = RunConfig.from_dict(checkpoint.manifest["run"])
        self._documents = followed = documents_followed(run, eod)
        layers = model_layers(run)
        layers = [follow_documents(x, followed) for x in layers] if followed else layers
        self._model = Stack(layers, targets=self._targets)
        reader = checkpoint.reader()
        beta1 = run.optimizer.adam_beta1 if run.optimizer.optimizer == "adamwschedulefree" else None
        for name, parameter in self._model.named_parameters():
            weight = reader.whole(name)
            if beta1 is not None and "z" in reader.states(name):
                weight = evaluation_weight(weight, reader.whole(name, "z"), beta1)
            with torch.no_grad():
                parameter.copy_(weight[: len(parameter)])  # its padding depends on TP

    @torch.no_grad()
    def losses(self, samples: Iterable[Tensor]) -> list[float]:
        """Mean loss over the tokens of each sample that count, int64 (S + 1,)."""
        return [self._mean(sample) for sample in samples]

    def _mean(self, sample: Tensor) -> float:
        followed = self._documents
        if followed is not None:
            followed.show(sample[None, :-1])
        return float(self._model(sample[None, :-1], sample[None, 1:]))

    def _targets(self, labels: Tensor) -> Targets:
        followed = self._documents
        if followed is None or not followed.mask_loss:
            return Targets(labels)
        return Targets(labels, followed.weights, 1 / followed.weights.sum().clamp(min=1))
