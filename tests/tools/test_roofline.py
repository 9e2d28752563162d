"""The roofline's FLOPs are those that torch counts, its bytes those counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.model.stack import Stack
from megatron.training.build import model_layers
from tools.benchmarks.roofline import Rates, Work, step_work
from tools.benchmarks.workload import SHAPES, Workload

TINY = Workload(SHAPES["tiny"])  # L2 H64 F176 heads 4/2 V512 S64 B2


def test_flops_are_those_that_torch_counts() -> None:
    work, model = step_work(TINY.run()), Stack(model_layers(TINY.run()))
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # As batched products of all positions; a causal kernel leaves half of them out.
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens).backward()
    counted = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in counted.items() if "bmm" in str(op))
    assert work["attention"].flops == attention / 2 > 0
    assert work["GEMM"].flops == sum(counted.values()) - attention


def test_bytes_of_a_shape_by_hand() -> None:
    work, tokens, parameters = step_work(TINY.run()), 128, 2 * (46080 + 128) + 2 * 512 * 64 + 64
    assert work["optimizer"].moved == 40 * parameters
    assert work["loss"].moved == 5 * 4 * tokens * 512
    assert work["embedding"].moved == 4 * 64 * (3 * tokens + 512)
    # One block: q, k and v of x; o; gate and up; down. Then the head's weight and input.
    shapes = [(64, 128), (64, 64), (64, 352), (176, 64)]
    matrices = 2 * sum(a * b for a, b in shapes) + 512 * 64
    ends = 2 * sum(a + b for a, b in shapes) + 64
    assert work["GEMM"].moved == 3 * 4 * (matrices + tokens * ends)


def test_half_the_bytes_and_a_bf16_copy_of_the_weights() -> None:
    fp32, bf16 = (step_work(Workload(SHAPES["40m"], kind).run()) for kind in ("fp32", "bf16"))
    for kind in fp32.keys() - {"optimizer"}:
        assert bf16[kind] == (fp32[kind].flops, fp32[kind].moved / 2)
    assert bf16["optimizer"].moved / fp32["optimizer"].moved == pytest.approx(42 / 40)


def test_a_kind_takes_the_longer_of_its_products_and_its_bytes() -> None:
    assert Work(4e9, 1e9).seconds(Rates(1e9, 1e9)) == 4.0
    assert Work(4e9, 1e9).seconds(Rates(1e12, 1e9)) == 1.0
