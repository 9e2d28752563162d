"""What a layer sends runs beside its products, and is not copied first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.parallel import mappings, sequence
from megatron.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    column_parallel_linears,
)
from megatron.parallel.partial_gradients import sum_parts
from tests.parallel.axis import whole_world
from tests.spawn import run

B, S, IN, OUT = 1, 8, 12, 8
DRAWN: dict[str, Any] = {"seed": 3, "std": 0.5}
COPIES = {"clone", "copy_", "_to_copy", "cat"}
NOTED = {"mm", "addmm_", "allreduce_", "_allgather_base_", "_reduce_scatter_base_", *COPIES}


class Noted(TorchDispatchMode):
    """Products, collectives, copies, and waiting, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in NOTED:
            self.names.append(name)
        return func(*args, **kwargs or {})

    def wait(self, pending: Any) -> Tensor:
        result: Tensor = _FINISHED(pending)
        if self.names[-1:] == ["copy_"]:  # gloo's, of its own result
            del self.names[-1]
        self.names.append("wait")
        return result


_FINISHED = mappings.finished


def steps_of(kind: str, sequence_parallel: bool) -> tuple[list[str], list[str]]:
    """Of a forward and of a backward pass through three column-parallel layers, or a row's."""
    tp, noted = whole_world(), Noted()
    mappings.finished = sequence.finished = noted.wait  # type: ignore[attr-defined]
    options = {**DRAWN, "tp": tp, "sequence_parallel": sequence_parallel}
    length = S // tp.size if sequence_parallel else S
    with noted:
        if kind == "column":
            layers = [ColumnParallelLinear(IN, OUT, name=name, **options) for name in "qkv"]
            x = torch.ones(B, length, IN, requires_grad=True)
            noted.names.clear()
            ys = column_parallel_linears(x, layers)
        else:
            row = RowParallelLinear(IN, OUT, name="o", **options)
            x = torch.ones(B, S, IN // tp.size, requires_grad=True)
            noted.names.clear()
            ys = (row(x),)
        forward, grads = list(noted.names), [torch.ones_like(y) for y in ys]
        noted.names.clear()
        torch.autograd.backward(ys, grads)
    return forward, noted.names


GATHERED, SCATTERED = ["_allgather_base_", "wait"], ["_reduce_scatter_base_", "wait"]
DGRAD, WGRAD = ["mm", "addmm_", "addmm_"], ["mm"] * 3
EXPECTED = {
    ("column", False): (["mm"] * 3, [*DGRAD, "allreduce_", *WGRAD, "wait"]),
    ("column", True): (
        [*GATHERED, *["mm"] * 3],
        ["_allgather_base_", *DGRAD, "wait", "_reduce_scatter_base_", *WGRAD, "wait"],
    ),
    ("row", False): (["mm", "allreduce_"], ["mm", "mm"]),
    ("row", True): (["mm", *SCATTERED], [*GATHERED, "mm", "mm"]),
}


@pytest.mark.parametrize(("kind", "sequence_parallel"), EXPECTED, ids=str)
def test_collectives_run_beside_products_and_nothing_is_copied(
    kind: str, sequence_parallel: bool
) -> None:
    expected = EXPECTED[kind, sequence_parallel]
    assert run(steps_of, 2, kind, sequence_parallel) == [expected, expected]


def compiled_backward(sequence_parallel: bool) -> list[str]:
    """Products, collectives and waiting of the three layers' compiled backward pass, in order."""
    graphs: list[list[str]] = []

    def note(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        graphs.append([call.__name__.split(".")[0] for call in calls])
        return graph

    tp = whole_world()
    options = {**DRAWN, "tp": tp, "sequence_parallel": sequence_parallel}
    layers = [ColumnParallelLinear(IN, OUT, name=name, **options) for name in "qkv"]
    x = torch.ones(B, S // tp.size if sequence_parallel else S, IN, requires_grad=True)
    backend = aot_autograd(fw_compiler=note, bw_compiler=note)
    compiled = torch.compile(column_parallel_linears, backend=backend, fullgraph=True)
    ys = compiled(x, layers)
    torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
    (_, backward) = graphs
    return [name for name in backward if name in COMPILED]


COMPILED = {
    "mm": "mm",
    "addmm": "addmm_",
    "all_reduce": "allreduce_",
    "all_gather_into_tensor": "_allgather_base_",
    "reduce_scatter_tensor": "_reduce_scatter_base_",
    "wait_tensor": "wait",
}  # as `Noted` has them


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_compiled_graph_has_the_same_order(sequence_parallel: bool) -> None:
    compiling = {"TORCHDYNAMO_DISABLE": "0"}
    for names in run(compiled_backward, 2, sequence_parallel, environ=compiling):
        assert [COMPILED[name] for name in names] == EXPECTED["column", sequence_parallel][1]


def summed(dtype: torch.dtype) -> tuple[list[Tensor], int]:
    """Of three tensors, and the number of collectives."""
    tp, noted = whole_world(), Noted()
    parts = [torch.full((2, 3), 1.0 + 2.0**-8 * tp.rank, dtype=dtype), torch.ones(5, dtype=dtype)]
    parts.append(torch.arange(8, dtype=dtype)[2:4] * dist.get_rank())  # a part of a buffer
    with noted:
        sum_parts(parts, tp)
    return parts, noted.names.count("allreduce_")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parts_are_summed_in_fp32_by_one_collective(dtype: torch.dtype) -> None:
    each = [torch.full((2, 3), 1.0 + 2.0**-8 * rank, dtype=dtype) for rank in range(3)]
    total = sum(part.double() for part in each)
    for parts, count in run(summed, 3, dtype):
        assert count == 1
        torch.testing.assert_close(parts[0], total.to(dtype), rtol=0, atol=0)
        torch.testing.assert_close(parts[1], torch.full((5,), 3.0, dtype=dtype))
        torch.testing.assert_close(parts[2], torch.tensor([6.0, 9.0], dtype=dtype))
