"""Numbers of weights, gradients, optimizer states and phases, only where and when they are asked.

LOG_PARAMS_NORM, LOG_NUM_ZEROS_IN_GRAD, LOG_OPTIMIZER_STATES, TIMING_LOG_LEVEL. Each rank looks at
what it owns, so an element counts once in any layout; the vocabulary's padding does not count.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.engine.phases import Phases
from megatron.parallel.control import Control
from megatron.parallel.piece import WEIGHT, WHOLE
from megatron.training.optimizers.sophia import SophiaG
from megatron.training.optimizers.whole_matrix import WholeMatrixOptimizer
from megatron.training.phase_times import across_ranks

STATES = {"exp_avg": "momentum", "momentum_buffer": "momentum", "exp_avg_sq": "variance"}
"""State of an update rule -> its name on dashboards; `weight` is there for every rule."""

QUANTITIES = ("weight", "momentum", "variance", "variance_sqrt")


class Probes:
    """What a run asks to be looked at.

    Args:
        run: the configuration.
        engine: whose weights, gradients and states.
        control: all ranks.
    """

    def __init__(self, run: RunConfig, engine: Engine, control: Control) -> None:
        self._run, self._engine, self._control = run, engine, control
        self._phases = Phases(engine) if run.log.timing_log_level else None
        self._armed, self._zeros = False, [torch.zeros(())]
        if run.log.log_num_zeros_in_grad:
            self._owned = list(engine.shards().owned(run.model.vocab_size))
            engine.optimizer.register_step_pre_hook(self._count_zeros)

    def before_step(self, iteration: int) -> None:
        """Looks at the gradient of this step, if a record follows it."""
        train, interval = self._run.train, self._run.log.log_interval
        self._armed = iteration % interval == 0 or iteration == train.train_iters
        self._zeros = []

    def measured(self) -> dict[str, Any]:
        """What METRICS show, by key; a collective of all ranks."""
        log, found = self._run.log, dict[str, Any]()
        if self._phases is not None:
            found |= across_ranks(self._phases, self._control)
        if log.log_params_norm:
            found["params_norm"] = self._statistics(["weight"])["weight_l2"]
        if log.log_num_zeros_in_grad:
            # A step that was refused has no gradient to look at, on any rank.
            count, looked = self._control.sum([float(sum(self._zeros)), float(len(self._zeros))])
            found |= {"num_zeros": count} if looked else {}
        if log.log_optimizer_states:
            found["optimizer_states"] = self._statistics(QUANTITIES)
        return found

    def _count_zeros(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before the optimizer's step, which DeepSpeed may call once for each group."""
        estimates = isinstance(optimizer, SophiaG) and optimizer.hessian_tokens > 0
        if not self._armed or estimates:
            return
        flats = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        for span in self._owned:
            if id(span.flat) in flats and span.flat.grad is not None:
                gradient = span.view(span.flat.grad)
                self._zeros.append(gradient.numel() - gradient.count_nonzero())

    def _statistics(self, names: list[str] | tuple[str, ...]) -> dict[str, float]:
        """`<name>_l2`, `_l1` and `_abs_max` of each quantity that the update rule has."""
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        for name, values in self._tensors():
            if name in rows:
                norms = [torch.linalg.vector_norm(values, order) for order in (2, 1, math.inf)]
                rows[name].append(torch.stack(norms).float().cpu())
        sums: list[float] = []
        largest: list[int] = []
        for parts in rows.values():
            table = torch.stack(parts).double() if parts else torch.zeros(1, 3).double()
            sums += [float(table[:, 0].square().sum()), float(table[:, 1].sum()), len(parts)]
            largest.append(_ordered(float(table[:, 2].max())))
        sums, largest = self._control.sum(sums), self._control.maximum(largest)
        found: dict[str, float] = {}
        for place, name in enumerate(names):
            square, absolute, count = sums[3 * place : 3 * place + 3]
            if count:
                found |= {f"{name}_l2": math.sqrt(square), f"{name}_l1": absolute}
                found[f"{name}_abs_max"] = _number(largest[place])
        return found

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, values) of all weights and states that this rank owns."""
        optimizer = self._engine.optimizer
        pieces = self._engine.shards().pieces()
        if isinstance(optimizer, WholeMatrixOptimizer):
            pieces += optimizer.pieces()
        for piece in pieces:
            for key, values in piece.tensors.items():
                name = STATES.get(key.removeprefix(WHOLE), "weight" if key == WEIGHT else "")
                if name:
                    yield name, values
                if name == "variance":
                    yield "variance_sqrt", values.sqrt()


def _ordered(value: float) -> int:
    """A number >= 0 as a whole number of the same order: ranks compare whole numbers."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return int(bits)


def _number(ordered: int) -> float:
    (value,) = struct.unpack("<d", struct.pack("<q", ordered))
    return float(value)
