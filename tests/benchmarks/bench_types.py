"""Rates of bf16 and fp16 beside fp32 on this CPU: products, then steps of a model; alternating.

python -m tests.benchmarks.bench_types          # under a minute, with AMX
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m tests.benchmarks.bench_types   # as an older CPU
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
import torch.nn.functional as F

from megatron.config.resolve import Site, resolve
from megatron.model.stack import Stack
from megatron.training.attention_kernel import DTYPES
from megatron.training.build import loss_function, model_layers

ROUNDS = 5
PRODUCTS = [(2048, 128, 128), (2048, 352, 128), (1024, 512, 512), (2048, 512, 1408), (2048,) * 3]
COMMON = {"DRY_RUN": "1", "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": "4096", "DTYPE": "fp32"}
STEPS = {
    "debug": {"MICRO_BATCH": "16"},
    "40M": {
        "NLAYERS": "8", "HIDDEN": "512", "HEADS": "8", "NUM_KV_HEAD": "4",
        "FFN_HIDDEN_SIZE": "1408", "VOCAB_SIZE": "16384", "SEQ": "256", "MICRO_BATCH": "1",
    },
}  # fmt: skip


def compare(what: str, arms: Mapping[str, Callable[[], object]], repeats: int) -> None:
    """Prints the rate of each arm beside fp32's, medians of rounds that alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + 1):
        for name, arm in arms.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                arm()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: median(taken[1:]) for name, taken in seconds.items()}  # the first warms up
    rates = ", ".join(f"{name} {medians['fp32'] / taken:.2f}" for name, taken in medians.items())
    print(
        f"{what:24} {1000 * medians['fp32'] / repeats:9.2f} ms in fp32; rates: {rates}", flush=True
    )


def product(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> Callable[[], object]:
    x, w = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    return lambda: F.linear(x, w)


def step(variables: Mapping[str, str], dtype: torch.dtype) -> Callable[[], object]:
    """Forward, backward and fused AdamW."""
    run = resolve({**COMMON, **variables}, [], Site()).run
    model, loss = Stack(model_layers(run)).to(dtype), loss_function(run)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    shape = (run.train.micro_batch_size, run.model.seq_length)
    tokens = torch.randint(0, run.model.vocab_size, shape)

    def whole() -> None:
        loss(model(tokens), tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return whole


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    for shape in PRODUCTS:
        compare(str(shape), {name: product(*shape, dtype) for name, dtype in DTYPES.items()}, 5)
    for name, variables in STEPS.items():
        compare(name, {kind: step(variables, DTYPES[kind]) for kind in ("fp32", "bf16")}, 1)
