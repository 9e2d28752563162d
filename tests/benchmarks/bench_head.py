"""Memory of the head's loss at its real size, beyond its two inputs and their gradients.

python -m tests.benchmarks.bench_head    # V=256,000, H=3,072, S=8,192, bf16: 39 TFLOP and 5 GB
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron.parallel.groups import SERIAL
from megatron.parallel.head_loss import Targets, head_loss


def resident(what: str) -> int:
    """Bytes: VmRSS, what this process has in memory, or VmHWM, the most that it has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def drawn(*shape: int) -> Tensor:
    """A matrix that is there in memory, not only promised."""
    generator = torch.Generator().manual_seed(1)
    row = torch.randn(shape[-1], generator=generator).mul_(0.02).bfloat16()
    return row.expand(shape).contiguous().requires_grad_()


def measured(vocabulary: int, hidden_size: int, tokens: int) -> tuple[float, float]:
    """GB beyond weight, hidden states and their gradients; seconds, forward and backward."""
    small = drawn(1, 64, 64), drawn(128, 64)
    head_loss(*small, Targets(torch.zeros(1, 64, dtype=torch.int64)), SERIAL, 128).backward()
    hidden, weight = drawn(1, tokens, hidden_size), drawn(vocabulary, hidden_size)
    labels = torch.arange(tokens)[None] * 31 % vocabulary
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    start = time.perf_counter()
    loss = head_loss(hidden, weight, Targets(labels), SERIAL, vocabulary)
    loss.backward()
    seconds, most = time.perf_counter() - start, resident("VmHWM")
    assert hidden.grad is not None and weight.grad is not None
    return (most - before - hidden.grad.nbytes - weight.grad.nbytes) / 1e9, seconds


def main() -> None:
    """Prints one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("vocabulary", 256_000), ("hidden", 3072), ("tokens", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    extra, seconds = measured(given.vocabulary, given.hidden, given.tokens)
    size = f"V={given.vocabulary} H={given.hidden} S={given.tokens}"
    logits = 2e-9 * given.tokens * given.vocabulary
    print(f"{size} bf16: {extra:.2f} GB beyond weight, hidden states and their gradients")
    print(f"all logits would have {logits:.2f} GB; {seconds:.0f} s, forward and backward")


if __name__ == "__main__":
    main()
