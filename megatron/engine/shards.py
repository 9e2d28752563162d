"""What this rank owns of weights and optimizer states, whatever ZeRO did with them.

DeepSpeed keeps fp32 weights and optimizer states in flat buffers shared out over the data-parallel
ranks. A `Span` says which run of which parameter lies where in which buffer; all else follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron.parallel.piece import WEIGHT, Piece


@dataclass(frozen=True)
class Span:
    """A run of one parameter's shard inside a flat fp32 buffer.

    Attributes:
        parameter: the model's parameter (this tensor-parallel rank's shard of it).
        flat: the buffer, 1-D; it is what the optimizer steps on.
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


def spans(zero_optimizer: Any) -> list[Span]:
    """The runs this rank steps on, for ZeRO 1, 2, 3 and DeepSpeed's bf16 optimizer."""
    kind = type(zero_optimizer).__name__
    if _is_stage3(zero_optimizer):
        return list(_stage3_spans(zero_optimizer))
    if kind == "BF16_Optimizer":
        groups, flats = zero_optimizer.bf16_groups, zero_optimizer.fp32_groups_flat_partition
    elif kind == "DeepSpeedZeroOptimizer":
        groups = zero_optimizer.bit16_groups
        flats = zero_optimizer.single_partition_of_fp32_groups
    else:
        raise AssertionError(f"no checkpoint support for DeepSpeed's {kind}")
    return [
        Span(
            parameter,
            flat,
            parameter._hp_mapping.hp_fragment_address.start,
            parameter._hp_mapping.lp_fragment_address.start,
            parameter._hp_mapping.lp_fragment_address.numel,
        )
        for group, flat in zip(groups, flats, strict=True)
        for parameter in group
        if parameter._hp_mapping is not None
    ]


def _is_stage3(zero_optimizer: Any) -> bool:
    return type(zero_optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3"


def _stage3_spans(zero_optimizer: Any) -> Iterator[Span]:
    for parameters in zero_optimizer.fp16_groups:
        for parameter in parameters:
            group, offset, _ = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
            share = parameter.ds_tensor.ds_numel
            start = zero_optimizer._get_param_partition_rank(parameter) * share
            length = min(share, parameter.ds_numel - start)  # the last rank's share is padded
            if length > 0:
                flat = zero_optimizer.fp32_partitioned_groups_flat[group]
                yield Span(parameter, flat, offset, start, length)


def refresh_weights(zero_optimizer: Any) -> None:
    """Makes the model's weights again from the fp32 ones, on all data-parallel ranks."""
    if not _is_stage3(zero_optimizer):
        zero_optimizer.update_lp_params()
        return
    zero_optimizer._partition_all_parameters()
    for group in range(len(zero_optimizer.fp16_groups)):
        zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if zero_optimizer.persistent_parameters:
        zero_optimizer.persistent_parameters[0].all_gather(zero_optimizer.persistent_parameters)
    zero_optimizer.invalidate_secondary_tensor()


class ZeroState:
    """Reads and writes the pieces of one rank.

    Args:
        module: the local part of the model.
        zero_optimizer: DeepSpeed's optimizer around `optimizer`.
        optimizer: the optimizer itself.
        tp_rank, tp_size: this rank on the tensor-parallel axis.
        replica: which of MiCS' equal copies of all states this rank is part of.
    """

    def __init__(
        self,
        module: nn.Module,
        zero_optimizer: Any,
        optimizer: torch.optim.Optimizer,
        tp_rank: int,
        tp_size: int,
        replica: int = 0,
    ) -> None:
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._zero = zero_optimizer
        self._optimizer = optimizer
        self._tp_rank = tp_rank
        self._tp_size = tp_size
        self._replica = replica

    def pieces(self, owned_only: bool = True) -> list[Piece]:
        """What this rank writes into a checkpoint; every value is written by exactly one rank.

        Args:
            owned_only: leave out what another rank writes (replicas of tensor parallelism and of
                tied weights); False for reading, where every copy wants its values.
        """
        result = []
        for span in spans(self._zero):
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

    def load(self, read: Any, load_optimizer: bool = True) -> None:
        """Fills weights and states.

        Args:
            read: `read(piece) -> (tensors, scalars)` with `piece.tensors["weight"]` giving the
                length wanted; tensors are 1-D on the host.
            load_optimizer: False takes the weights alone.
        """
        for span in spans(self._zero):
            tensors, scalars = read(self._piece(span, {WEIGHT: span.view(span.flat.detach())}, {}))
            with torch.no_grad():
                span.view(span.flat.detach()).copy_(tensors[WEIGHT])
            if not load_optimizer:
                continue
            state = self._optimizer.state[span.flat]
            for key, value in tensors.items():
                if key == WEIGHT:
                    continue
                if key not in state:
                    state[key] = torch.zeros_like(span.flat, requires_grad=False)
                span.view(state[key]).copy_(value)
            for key, value in scalars.items():
                state[key] = self._step(value, span.flat) if key == "step" else value
        if not _is_stage3(self._zero):
            self._zero._hp_optimizer_states_linked = False  # linked anew at the next step
        refresh_weights(self._zero)

    def _step(self, value: float, flat: Tensor) -> Tensor:
        # torch keeps the step as a tensor: on the host, or beside the weights when fused.
        fused = self._optimizer.defaults.get("fused") or self._optimizer.defaults.get("capturable")
        return torch.tensor(value, device=flat.device if fused else "cpu")

    def _piece(self, span: Span, tensors: dict[str, Tensor], scalars: dict[str, float]) -> Piece:
        parameter = span.parameter
        sharded = self._tp_size > 1 and getattr(parameter, "tensor_model_parallel", False)
        shape = getattr(parameter, "full_shape", None)
        if shape is None:
            shape = getattr(parameter, "ds_shape", parameter.shape)
        return Piece(
            name=self._names[id(parameter)],
            shape=tuple(shape),
            partition_dim=parameter.partition_dim if sharded else None,
            shard=self._tp_rank if sharded else 0,
            shards=self._tp_size if sharded else 1,
            start=span.start,
            tensors=tensors,
            scalars=scalars,
        )

    def _written_elsewhere(self, parameter: nn.Parameter) -> bool:
        if self._replica > 0:
            return True  # the first replica writes everything
        if getattr(parameter, "ds_pipe_replicated", False):
            return True  # a tied weight; the first stage writes it
        return self._tp_rank > 0 and not getattr(parameter, "tensor_model_parallel", False)
