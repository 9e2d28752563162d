"""The weights and optimizer states that this rank owns, under any engine and ZeRO stage.

Engines keep fp32 weights and optimizer states in flat buffers, partitioned over the data-parallel
ranks; nothing else reads them. A `Span` locates a run of a parameter in a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron.parallel.groups import Axis
from megatron.parallel.piece import WEIGHT, Piece

# Piece to read -> its values by state, 1-D on the host, and its scalars.
ReadPiece = Callable[[Piece], tuple[Mapping[str, Tensor], Mapping[str, float]]]

COUNTERS = ("k", "weight_sum", "lr_max", "scheduled_lr")
"""Keys that schedule-free rules keep in their parameter groups instead of their states."""

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of DeepSpeed's dynamic loss scaler."""


@dataclass(frozen=True)
class Span:
    """A run of one parameter's shard inside a flat fp32 buffer.

    Attributes:
        parameter: the model's parameter (this tensor-parallel rank's shard of it).
        flat: the buffer, 1-D, which the optimizer updates.
        flat_start: first element in the buffer.
        start: first element in the flattened shard.
        length: elements.
    """

    parameter: nn.Parameter
    flat: Tensor
    flat_start: int
    start: int
    length: int

    def view(self, buffer: Tensor) -> Tensor:
        """This run of `buffer`, which is shaped like `flat`."""
        return buffer.narrow(0, self.flat_start, self.length)


class Shards:
    """Reads and writes what one rank owns; made by `Engine.shards`.

    Args:
        module: the local part of the model.
        optimizer: of the flat buffers.
        tp: tensor-parallel axis.
        spans: the runs that this rank updates.
        refresh: rebuilds the model's weights from the fp32 ones, on all data-parallel ranks.
        writes: False for MiCS' replicas after the first; only the first writes.
        scaler: of the loss (fp16).
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        tp: Axis,
        spans: list[Span],
        refresh: Callable[[], None],
        *,
        writes: bool = True,
        scaler: Any = None,
    ) -> None:
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._optimizer, self._tp = optimizer, tp
        self._spans, self._refresh = spans, refresh
        self._writes, self._scaler = writes, scaler

    def spans(self) -> list[Span]:
        """The runs this rank updates."""
        return self._spans

    def owned(self, vocab_size: int) -> Iterator[Span]:
        """The runs that this rank writes: every element of a layout is in one of one rank.

        Args:
            vocab_size: rows of embedding and head that count; those after them are padding.
        """
        for span in self.spans():
            parameter = span.parameter
            if self._written_elsewhere(parameter):
                continue
            length = span.length
            if getattr(parameter, "is_vocabulary", False):
                rows, width = self._piece(span, {}, {}).shape
                sharded = self._tp.size > 1
                first = self._tp.rank * rows // self._tp.size if sharded else 0
                length = min(length, max(0, (vocab_size - first) * width - span.start))
            if length:
                yield replace(span, length=length)

    def pieces(self, owned_only: bool = True) -> list[Piece]:
        """What this rank writes into a checkpoint; every value is written by exactly one rank.

        Args:
            owned_only: leave out what another rank writes (replicas of tensor parallelism and of
                tied weights); False for reading, where every replica needs its values.
        """
        result = []
        for span in self.spans():
            if owned_only and self._written_elsewhere(span.parameter):
                continue
            state = self._optimizer.state.get(span.flat, {})
            tensors = {WEIGHT: span.view(span.flat.detach())}
            scalars = {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == span.flat.shape:
                    tensors[key] = span.view(value)
                elif isinstance(value, Tensor):
                    scalars[key] = float(value)
                elif value is not None:
                    scalars[key] = value
            result.append(self._piece(span, tensors, scalars))
        return result

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether this rank's fp32 weights and optimizer states are; waits for the device.

        Reads them once and needs no memory for it: a minimum and a maximum keep a NaN.
        """
        values = (tensor for piece in self.pieces(False) for tensor in piece.tensors.values())
        ends = [end for value in values if value.numel() for end in value.aminmax()]
        return not ends or bool(torch.stack(ends).isfinite().all())

    def load(self, read: ReadPiece, load_optimizer: bool = True) -> None:
        """Loads weights and states, and the model's weights from them; a collective.

        Args:
            read: `read(piece) -> (tensors, scalars)` with `piece.tensors["weight"]` giving the
                length to read; tensors are 1-D on the host.
            load_optimizer: False loads the weights alone.
        """
        for span in self.spans():
            weight = span.view(span.flat.detach())
            tensors, scalars = read(self._piece(span, {WEIGHT: weight}, {}))
            weight.copy_(tensors[WEIGHT])
            if not load_optimizer:
                continue
            state = self._optimizer.state[span.flat]
            for key, value in tensors.items():
                if key == WEIGHT:
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(span.flat, requires_grad=False)
                span.view(state[key]).copy_(value)
            for key, number in scalars.items():
                state[key] = self._step(number, span.flat) if key == "step" else number
        self._refresh()

    def counters(self) -> dict[str, float]:
        """Numbers that belong to the whole optimizer, kept beside the states."""
        group = self._optimizer.param_groups[0]  # all groups have the same counters
        return {key: group[key] for key in COUNTERS if key in group}

    def load_counters(self, values: Mapping[str, float]) -> None:
        """Loads what `counters` gave."""
        for group in self._optimizer.param_groups:
            group.update(values)

    def scaler_state(self) -> dict[str, float]:
        """The numbers of fp16's loss scaler; empty in bf16 and fp32."""
        scaler = {} if self._scaler is None else vars(self._scaler)
        return {key: scaler[key] for key in SCALER_STATE if key in scaler}

    def load_scaler_state(self, values: Mapping[str, float]) -> None:
        """Loads what `scaler_state` gave; does nothing where the precision has changed."""
        if values and self._scaler is not None:
            vars(self._scaler).update(values)

    def _step(self, value: float, flat: Tensor) -> Tensor:
        # torch keeps the step as a tensor: on the host, or beside the weights when fused.
        fused = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
        return torch.tensor(value, device=flat.device if fused else "cpu")

    def _piece(self, span: Span, tensors: dict[str, Tensor], scalars: dict[str, float]) -> Piece:
        parameter = span.parameter
        sharded = self._tp.size > 1 and getattr(parameter, "tensor_model_parallel", False)
        # ZeRO-3 has emptied the parameter.
        shape = getattr(parameter, "ds_shape", parameter.shape)
        return Piece(
            name=self._names[id(parameter)],
            shape=tuple(getattr(parameter, "full_shape", shape)),
            partition_dim=getattr(parameter, "partition_dim", None) if sharded else None,
            shard=self._tp.rank if sharded else 0,
            shards=self._tp.size if sharded else 1,
            start=span.start,
            tensors=tensors,
            scalars=scalars,
        )

    def _written_elsewhere(self, parameter: nn.Parameter) -> bool:
        if not self._writes:
            return True
        if getattr(parameter, "ds_pipe_replicated", False):
            return True  # a tied weight; the first stage writes it
        return self._tp.rank > 0 and not getattr(parameter, "tensor_model_parallel", False)
