"""The least time that a step can take: its FLOPs and bytes by kind of work, at a machine's rates.

A kind takes at least the longer of its products at the rate of large ones and its bytes at that of
memory. Kinds follow one another. Rows are those of `profile`.
Legend: T tokens of a step, P parameters, H hidden, F feed-forward, V padded vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from tools.benchmarks.arms import gemm_size

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig
    from megatron.training.device import Device

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
STREAM_BYTES = 1 << 27  # of each operand, more than a cache
REPEATS = 9


class Rates(NamedTuple):
    """Of a machine: FLOP/s of large products, bytes/s of memory, read and written."""

    flops: float
    memory: float


class Work(NamedTuple):
    """Of one kind in a step: FLOPs of its products, bytes that it reads and writes at least."""

    flops: float
    moved: float

    def seconds(self, rates: Rates) -> float:
        """At least."""
        return max(self.flops / rates.flops, self.moved / rates.memory)


def step_work(run: RunConfig) -> dict[str, Work]:
    """Kind -> its work in a step of one rank; forward and backward, no recomputation."""
    model, architecture, width = run.model, run.architecture, BYTES[run.train.dtype]
    tokens = run.train.micro_batch_size * run.train.gradient_accumulation_steps * model.seq_length
    layers, hidden, ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
    query, key_value = model.query_size, model.key_value_size
    vocabulary, parameters = model.padded_vocab_size(), architecture.parameters(model)
    matrices = layers * architecture.block_matrices(model) + vocabulary * hidden
    # Inputs and outputs: q, k and v read x once, as do gate and up.
    ends = layers * (4 * hidden + 2 * query + 2 * key_value + 3 * ffn) + hidden
    causal = architecture.flops_per_token_causal(model)
    attention = 6 * layers * query * model.seq_length
    heads = layers * (query + key_value)
    return {
        # Forward, gradient of the input, gradient of the weight: each reads two, writes the third.
        "GEMM": Work(tokens * (causal - attention), 3 * width * (matrices + tokens * ends)),
        # Forward q, k, v, o; backward these, the gradient of o, and those of q, k and v.
        "attention": Work(tokens * attention, width * tokens * (5 * query * layers + 6 * heads)),
        # Logits: written by the product, made their own gradient, read by two products.
        "loss": Work(0, 5 * width * tokens * vocabulary),
        # Per block two norms (5 H), two sums (6 H), RoPE (4 of q and k), SwiGLU (8 F).
        "elementwise, norms": Work(
            0, width * tokens * (layers * (22 * hidden + 8 * ffn) + 4 * heads)
        ),
        # Norm and clip of the gradient; AdamW reads it and w, m, v, writes three; the bf16 copy.
        "optimizer": Work(0, parameters * (4 * 10 + (width if width < 4 else 0))),
        # Rows there and back, and the rest of the gradient, zero.
        "embedding": Work(0, width * hidden * (3 * tokens + vocabulary)),
    }


def measured_rates(device: Device, dtype: str) -> Rates:
    """Of this machine now: a large product, and a sum of two long vectors; the best of a few."""
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    size, on = gemm_size(device.kind), device.torch_device
    a, b = (torch.randn(size, size, device=on).to(kind) for _ in range(2))
    x, y, z = (torch.ones(STREAM_BYTES // 4, device=on) for _ in range(3))
    best = [float("inf")] * 2
    for _ in range(REPEATS):
        for place, work in enumerate((lambda: torch.mm(a, b), lambda: torch.add(x, y, out=z))):
            device.synchronize()
            start = time.perf_counter()
            work()
            device.synchronize()
            best[place] = min(best[place], time.perf_counter() - start)
    return Rates(2 * size**3 / best[0], 3 * STREAM_BYTES / best[1])
