"""Times what the blocks do on a CPU: own functions against torch's, steps with and without HEAP.

OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_blocks     # CPU time, about two minutes, quiet
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.shape import ModelShape
from megatron.launch.launch_plan import HEAP
from megatron.model.layer import ModelContext
from megatron.model.norm import rms_norm
from megatron.model.registry import ARCHITECTURES
from megatron.model.rope import Rope, apply_rope, rotary_tables
from megatron.model.stack import Stack

SHAPE = ModelShape(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=16384,
    seq_length=512,
)
BATCH, ROUNDS = 4, 7


def medians(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU milliseconds of each, rounds alternating, two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + 2):
        for name, arm in arms.items():
            start = time.process_time()
            arm()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def plain_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def functions(dtype: torch.dtype) -> None:
    """Forward and backward of norm and rope."""
    x = torch.randn(BATCH, 512, 512).to(dtype).requires_grad_()
    weight = torch.ones(512, dtype=dtype, requires_grad=True)
    tables = rotary_tables(Rope(64, 1e4), torch.arange(512), dtype)
    heads = lambda: x.view(BATCH, 512, 8, 64).transpose(1, 2)  # noqa: E731

    def both(forward: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(y := forward(), x, torch.ones_like(y))

    for row in (
        {"F.rms_norm": lambda: F.rms_norm(x, weight.shape, weight, 1e-5),
         "own norm": lambda: rms_norm(x, weight, 1e-5)},
        {"plain rope": lambda: plain_rope(heads(), *tables),
         "own rope": lambda: apply_rope(heads(), tables)},
    ):  # fmt: skip
        found = medians({name: both(forward) for name, forward in row.items()})
        (before, a), (after, b) = found.items()
        print(f"{dtype} {before} {a:.2f} ms, {after} {b:.2f} ms: {a / b:.2f}x", flush=True)


def step(dtype: torch.dtype) -> None:
    """Prints the median CPU milliseconds of a plain step of the 40M shape."""
    model = Stack(ARCHITECTURES["llama"].layers(SHAPE, ModelContext())).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, SHAPE.vocab_size, (BATCH, SHAPE.seq_length))

    def once() -> None:
        logits = model(tokens).flatten(0, 1)
        F.cross_entropy(logits.float(), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    print(medians({"step": once})["step"])


def main() -> None:
    """All of it."""
    torch.set_flush_denormal(True)
    if len(sys.argv) > 1:
        return step(getattr(torch, sys.argv[1]))
    for dtype in ("float32", "bfloat16"):
        functions(getattr(torch, dtype))
        found: dict[str, list[float]] = {"usual": [], "HEAP": []}
        for _ in range(2):
            for name, environ in (("usual", {}), ("HEAP", {"GLIBC_TUNABLES": HEAP})):
                command = [sys.executable, "-m", "tests.benchmarks.bench_blocks", dtype]
                text = subprocess.check_output(command, env={**os.environ, **environ}, text=True)
                found[name].append(float(text))
        a, b = (statistics.mean(found[name]) for name in ("usual", "HEAP"))
        print(f"{dtype} step: usual heap {a:.0f} ms, HEAP {b:.0f} ms: {a / b:.2f}x", flush=True)


if __name__ == "__main__":
    main()
