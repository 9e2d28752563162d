"""Our own arms, and the rate of matrix products that every other figure is held against."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tools.benchmarks.rounds import Rounds
from tools.benchmarks.workload import Workload

if TYPE_CHECKING:
    from megatron.config.schema import RunConfig
    from megatron.engine import Engine
    from megatron.training.device import Device

GEMM = "GEMM"
OURS = "ours"


def with_variables(text: str) -> tuple[str, partial[None]]:
    """`ours:COMPILE=1,ENGINE=sharded` -> the arm's name and its function."""
    pairs = (part.partition("=") for part in text.partition(":")[2].split(",") if part)
    variables = {name: value for name, _, value in pairs}
    return text, partial(ours, variables=variables)


def ours(rounds: Rounds, work: Workload, variables: dict[str, str]) -> None:
    """The engine that a training run makes, stepped as the Trainer does."""
    run = replace(work, variables={"COMPILE": "0", **work.variables, **variables}).run()
    engine, batches = build(run, rounds.device), work.batches()
    rate = run.optimizer.learning_rate
    wanted = rounds.wait()
    while wanted:
        engine.set_learning_rate(rate)
        wanted = rounds.done(engine.train_batch(next(batches)))


def build(run: RunConfig, device: Device, rank: int = 0, init: str = "") -> Engine:
    """The engine of a rank, by the entry's own function."""
    from megatron.engine import start_distributed
    from megatron.parallel.groups import make_groups
    from pretrain_gpt_alcf import build_engine

    start_distributed(device.backend, rank, run.parallel.world_size, device.index, init, 120)
    return build_engine(run, make_groups(run.layout), device)


def gemm(rounds: Rounds, work: Workload) -> None:
    """Square matrix products in the run's precision; a step is the FLOPs of `gemm_flops`."""
    import torch

    run, on = work.run(), rounds.device.torch_device
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[run.train.dtype]
    size = gemm_size(rounds.device.kind)
    a, b = (torch.randn(size, size, device=on).to(kind) for _ in range(2))
    out = torch.empty_like(a)
    wanted = rounds.wait()
    while wanted:
        torch.mm(a, b, out=out)
        wanted = rounds.done(float(size))


def gemm_size(kind: str) -> int:
    """Rows of the matrices: large enough for a device's best rate."""
    return 2048 if kind == "cpu" else 8192


def gemm_rate(answer: dict[str, object]) -> float:
    """TFLOP/s of a round of `gemm`."""
    losses, seconds = answer["losses"], answer["seconds"]
    assert isinstance(losses, list) and isinstance(seconds, float)
    rate: float = 2 * losses[0] ** 3 / seconds / 1e12
    return rate
