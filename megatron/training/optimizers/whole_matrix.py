"""Update rules for whole matrices, on ZeRO's flat partitions and tensor-parallel shards.

DeepSpeed's ZeRO-1 updates flat partitions that end in the middle of a matrix. Here each matrix has
one owner among the ranks of its pipeline stage: it gathers the shards of weight and gradient,
applies the rule to the whole matrix, and the new weight is written back into the partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron.checkpoint.tensors import TensorReader
from megatron.engine import Span
from megatron.parallel.groups import Axis
from megatron.parallel.piece import WHOLE, Piece
from megatron.training.optimizers.parameter_groups import VOCABULARY
from megatron.training.optimizers.span_exchange import SpanExchange

# (whole matrix, its group) -> rule
WholeRule = Callable[[nn.Parameter, Mapping[str, Any]], Optimizer]
FlatRule = Callable[[list[dict[str, Any]]], Optimizer]  # elementwise rule of the other groups
_COUNTER = "group."  # marks a state that the rule keeps in its parameter group


@dataclass
class _Matrix:
    """One parameter of this stage.

    Attributes:
        name: global name.
        shape: this rank's shard.
        full_shape: over all tensor-parallel ranks.
        rows: rows that count; those after them pad the vocabulary and are zero.
        partition_dim: dimension sharded over tensor-parallel ranks; None: replicated.
        owner: (data-parallel rank, tensor-parallel rank) that applies the rule.
        span: where this rank's run lies in its flat partition, None where it has none.
        rule: the rule with its state, on the owner only.
    """

    name: str
    shape: torch.Size
    full_shape: torch.Size
    rows: int
    partition_dim: int | None
    owner: tuple[int, int]
    span: Span | None
    rule: Optimizer | None = None

    @property
    def used_shape(self) -> torch.Size:
        """The whole matrix as the rule sees it, without the vocabulary's padding."""
        return torch.Size([self.rows, *self.full_shape[1:]])


class WholeMatrixOptimizer(Optimizer):
    """A rule for whole matrices as a client optimizer of DeepSpeed's ZeRO-1.

    Memory per rank: states are sharded, about 1/N of the stage's on each of its N = DP x TP ranks.
    During a step an owner also holds weight and gradient of its matrices, 8 bytes per parameter of
    its 1/N (at least its largest matrix), and as much on its way. A rank sends 8 bytes for each
    parameter of its own partition to the owners, and 4 for each of its matrices back.

    Args:
        param_groups: groups with a unique "name".
        whole: makes the rule of one matrix.
        whole_groups: names of the groups it is for.
        elementwise: makes one optimizer for all other groups; it updates the flat partitions
            directly, and its states are this optimizer's `state`.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        whole: WholeRule,
        whole_groups: Collection[str],
        elementwise: FlatRule | None = None,
    ) -> None:
        self._whole = whole
        self._matrices: dict[str, list[_Matrix]] | None = None
        # DeepSpeed replaces each group's parameters by one flat partition: remember them.
        self._members = {
            group["name"]: list(group["params"])
            for group in param_groups
            if group["name"] in whole_groups
        }
        others = [group for group in param_groups if group["name"] not in whole_groups]
        self._elementwise: Optimizer | None = None
        if others:
            assert elementwise is not None, f"no rule for {[g['name'] for g in others]}"
            self._elementwise = elementwise(others)
        # Its dicts of groups are shared with the elementwise optimizer: one place for the rate.
        super().__init__(param_groups, self._elementwise.defaults if self._elementwise else {})

    def bind(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        dp: Axis,
        tp: Axis,
        spans: Iterable[Span],
        vocabulary_size: int,
    ) -> None:
        """Sets where the shards of each matrix lie; called once, by all ranks of the stage.

        Args:
            named_parameters: of the local part of the model.
            dp: data-parallel axis, over which ZeRO partitions the flat buffers.
            tp: tensor-parallel axis.
            spans: the runs of parameters that this rank updates.
            vocabulary_size: rows of embedding and head without padding.
        """
        names = {id(parameter): name for name, parameter in named_parameters}
        located = {id(span.parameter): span for span in spans}
        owners = _Owners(dp.size, tp.size)
        self._dp, self._tp = dp, tp
        self._matrices, self._exchanges = {}, dict[str, SpanExchange]()
        for group in self.param_groups:
            members = self._members.get(group["name"], [])
            matrices = [
                _matrix(names[id(p)], p, tp, located.get(id(p)), group["name"], vocabulary_size)
                for p in members
            ]
            for matrix in sorted(matrices, key=lambda m: (-m.full_shape.numel(), m.name)):
                matrix.owner = owners.next(matrix.full_shape.numel())
                if matrix.owner == (dp.rank, tp.rank):
                    matrix.rule = self._whole(_placeholder(matrix, group["params"][0]), group)
            self._matrices[group["name"]] = matrices
            if matrices:
                places = [matrix.owner[0] for matrix in matrices]
                runs = [(m.span.start, m.span.length) if m.span else (0, 0) for m in matrices]
                device = group["params"][0].device
                self._exchanges[group["name"]] = SpanExchange(dp, places, runs, device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the groups in `param_groups` (DeepSpeed passes them one at a time)."""
        assert closure is None, "DeepSpeed gives no closure"
        if self._matrices is None:
            # DeepSpeed may make states by a step on zero gradients before bind: nothing to do.
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            assert not any(g is not None and g.any() for g in gradients), "bind() was not called"
            return
        for group in self.param_groups:
            if group["name"] in self._members:
                self._step_whole(group, self._matrices[group["name"]])
        others = [group for group in self.param_groups if group["name"] not in self._members]
        if self._elementwise is not None and others:
            self._elementwise.param_groups = others
            self._elementwise.state = self.state
            self._elementwise.step()

    def whole_state(self) -> dict[str, dict[str, Tensor | float]]:
        """State of the matrices that this rank owns, by global name.

        The union over the ranks of a stage is the stage's state; no name is owned twice in it.
        Tensors have the matrix' whole shape or a factor of it, without padding of the vocabulary.
        """
        result: dict[str, dict[str, Tensor | float]] = {}
        for matrix in self._owned():
            assert matrix.rule is not None
            (group,) = matrix.rule.param_groups
            state = dict(matrix.rule.state.get(group["params"][0], {}))
            for key, value in group.items():
                if key not in matrix.rule.defaults and key != "params":
                    state[_COUNTER + key] = value
            result[matrix.name] = state
        return result

    def owned_names(self) -> list[str]:
        """Global names of the matrices whose state this rank must load."""
        return [matrix.name for matrix in self._owned()]

    def load_whole_state(self, states: Mapping[str, Mapping[str, Tensor | float]]) -> None:
        """Loads what `whole_state` gave, in this or any other layout.

        Args:
            states: at least the names of `owned_names()`.

        Raises:
            ValueError: a name is missing.
        """
        missing = [name for name in self.owned_names() if name not in states]
        if missing:
            raise ValueError(f"no optimizer state of {', '.join(missing)}")
        for matrix in self._owned():
            assert matrix.rule is not None
            saved = states[matrix.name]
            contents = matrix.rule.state_dict()
            contents["state"] = {0: {k: v for k, v in saved.items() if not k.startswith(_COUNTER)}}
            for key, value in saved.items():
                if key.startswith(_COUNTER):
                    contents["param_groups"][0][key.removeprefix(_COUNTER)] = value
            matrix.rule.load_state_dict(contents)

    def pieces(self) -> Iterator[Piece]:
        """State of the matrices that this rank owns, as a checkpoint holds it."""
        for name, states in self.whole_state().items():
            for key, value in states.items():
                tensor = torch.as_tensor(value)
                shape = tuple(tensor.shape)
                yield Piece(name, shape, None, 0, 1, 0, {WHOLE + key: tensor.reshape(-1)})

    def load_pieces(self, reader: TensorReader) -> None:
        """Loads what the ranks' `pieces` gave, in this or any other layout."""
        self.load_whole_state({name: _whole_state(reader, name) for name in self.owned_names()})

    def _owned(self) -> list[_Matrix]:
        assert self._matrices is not None, "bind() was not called"
        return [m for matrices in self._matrices.values() for m in matrices if m.rule is not None]

    def _step_whole(self, group: Mapping[str, Any], matrices: list[_Matrix]) -> None:
        like, exchange = group["params"][0], self._exchanges[group["name"]]
        whole = exchange.to_owners([_run(matrix, like) for matrix in matrices])
        for number, both in whole.items():
            self._to_rule(matrices[number], both)
        for matrix in matrices:
            if matrix.rule is not None:
                for name in ("lr", "weight_decay"):  # what may change from step to step
                    matrix.rule.param_groups[0][name] = group[name]
                matrix.rule.step()
        new = {number: self._from_rule(matrices[number], like) for number in whole}
        for matrix, run in zip(matrices, exchange.from_owners(new, like.detach()), strict=True):
            if matrix.span is not None:
                matrix.span.view(matrix.span.flat).copy_(run)

    def _to_rule(self, matrix: _Matrix, both: Tensor) -> None:
        """Weight and gradient of a shard, (2, elements), to the whole; a collective over TP."""
        shards = [both]
        if matrix.partition_dim is not None and self._tp.group is not None:
            shards = [torch.empty_like(both) for _ in range(self._tp.size)]
            dist.all_gather(shards, both, group=self._tp.group)
        if matrix.rule is None:
            return
        parameter = matrix.rule.param_groups[0]["params"][0]
        weights, gradients = (
            torch.cat([s[i].view(matrix.shape) for s in shards], dim=matrix.partition_dim or 0)
            for i in (0, 1)
        )
        # The rule does not see rows of padding, whose number depends on the layout.
        parameter.data = weights[: matrix.rows].contiguous()
        parameter.grad = gradients[: matrix.rows].contiguous()

    def _from_rule(self, matrix: _Matrix, like: Tensor) -> Tensor:
        """This TP rank's shard of the new weight, 1-D; a collective over TP."""
        whole = torch.zeros(matrix.full_shape, dtype=like.dtype, device=like.device)
        if matrix.rule is not None:
            parameter = matrix.rule.param_groups[0]["params"][0]
            whole[: matrix.rows] = parameter.data
            _release(parameter)
        if self._tp.group is not None:
            _, tp_owner = matrix.owner
            dist.broadcast(whole, src=self._tp.ranks[tp_owner], group=self._tp.group)
        if matrix.partition_dim is not None:
            whole = whole.chunk(self._tp.size, dim=matrix.partition_dim)[self._tp.rank]
        return whole.reshape(-1)


def _run(matrix: _Matrix, like: Tensor) -> Tensor:
    """Weight and gradient of this rank's run, (2, elements)."""
    if matrix.span is None:
        return like.detach().new_empty(2, 0)
    flat = matrix.span.flat
    assert flat.grad is not None
    return torch.stack([matrix.span.view(flat.detach()), matrix.span.view(flat.grad)])


def _whole_state(reader: TensorReader, name: str) -> dict[str, Tensor | float]:
    """A matrix' state from a checkpoint, by key."""
    state: dict[str, Tensor | float] = {}
    for stored in reader.states(name):
        if stored.startswith(WHOLE):
            key, value = stored.removeprefix(WHOLE), reader.whole(name, stored)
            state[key] = value.item() if key.startswith(_COUNTER) else value
    return state


class _Owners:
    """Gives each matrix, largest first, to the rank with the fewest elements so far."""

    def __init__(self, dp_size: int, tp_size: int) -> None:
        self._load = {(d, t): 0 for d in range(dp_size) for t in range(tp_size)}

    def next(self, elements: int) -> tuple[int, int]:
        owner = min(self._load, key=lambda rank: (self._load[rank], rank))
        self._load[owner] += elements
        return owner


def _matrix(
    name: str,
    parameter: nn.Parameter,
    tp: Axis,
    span: Span | None,
    group_name: str,
    vocabulary_size: int,
) -> _Matrix:
    sharded = tp.size > 1 and getattr(parameter, "tensor_model_parallel", False)
    full_shape = torch.Size(getattr(parameter, "full_shape", parameter.shape))
    rows = full_shape[0]
    if group_name == VOCABULARY:
        rows = min(rows, vocabulary_size)
    dim = getattr(parameter, "partition_dim", None) if sharded else None
    return _Matrix(name, parameter.shape, full_shape, rows, dim, (0, 0), span)


def _placeholder(matrix: _Matrix, like: Tensor) -> nn.Parameter:
    """A zero-storage (expanded) parameter with the full shape; holds the matrix during a step."""
    return nn.Parameter(like.new_zeros(()).expand(matrix.used_shape))


def _release(parameter: nn.Parameter) -> None:
    parameter.data = parameter.new_zeros(()).expand(parameter.shape)
    parameter.grad = None
