"""A step sends the bytes that docs/parallelism.md says, counted call by call.

L layers, x bytes of a hidden state, P parameters of a rank, m micro-batches, as on that page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.equivalence import front
from tests.spawn import run

LONG = pytest.mark.long


class Sent(NamedTuple):
    """Bytes of the whole arrays of a kind of collective, over groups of a size."""

    kind: str
    ranks: int
    dtype: torch.dtype


BF16, FP32 = torch.bfloat16, torch.float32
# Where the whole array is: an all-gather's output, a reduce-scatter's input.
WHOLE = {
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather": (0, "tensor_list"),
    "reduce_scatter_tensor": (1, "input"),
    "all_to_all_single": (1, "input"),
    "send": (0, "tensor"),
}


def counted(kind: str, sent: Counter[Sent]) -> None:
    """From here on a kind of collective adds its bytes to `sent`."""
    original = getattr(dist, kind)
    place, name = WHOLE[kind]

    def call(*args: Any, **kwargs: Any) -> Any:
        whole = args[place] if len(args) > place else kwargs[name]
        ranks = 2 if kind == "send" else dist.get_world_size(kwargs.get("group"))
        for tensor in [whole] if isinstance(whole, Tensor) else whole:
            sent[Sent(kind, ranks, tensor.dtype)] += tensor.numel() * tensor.element_size()
        return original(*args, **kwargs)

    setattr(dist, kind, call)


def sent_in_a_step(variables: Mapping[str, str]) -> dict[Sent, int]:
    """Of this rank's third step; the first makes what is kept, the second what a trace learns."""
    sent: Counter[Sent] = Counter()
    for kind in WHOLE:  # before DeepSpeed starts, which keeps some of torch's functions
        counted(kind, sent)

    config = front.run_config(variables)
    engine = front.build(config, large=True)
    front.steps(config, engine, 0, 2)
    sent.clear()
    front.steps(config, engine, 2, 3)
    return {key: size for key, size in sent.items() if key.ranks > 1}


COMMON = {
    "DTYPE": "bf16",
    "HIDDEN": "128",
    "NUM_KV_HEAD": "4",  # d = H / 2
    "FFN_HIDDEN_SIZE": "256",
    "NLAYERS": "4",
    "SEQ": "64",
    "MICRO_BATCH": "1",
    "GRAD_ACC_STEPS": "4",
}  # fmt: skip
L, m, b = 4, 4, 2
x = 64 * 128 * b
P = front.run_config({**COMMON, "WORLD_SIZE": "1", "GLOBAL_BATCH": "4"}).parameters


def gradients(ranks: int, size: int, kind: str = "all_reduce", dtype: Any = BF16) -> dict:
    return {Sent(kind, ranks, dtype): size}


def weights(ranks: int, size: int) -> dict:
    return {Sent("all_gather_into_tensor", ranks, BF16): size}


DEEPSPEED = {"ENGINE": "deepspeed"}  # below ZeRO-3 it all-reduces
EXCHANGE = "all_to_all_single"  # of slices: what gloo sends for a reduce-scatter
# Once per step the norms' gradients in fp32.
NORMS = gradients(2, (2 * L + 1) * 128 * 4, dtype=FP32)
ZERO3 = {"ZERO_STAGE": "3", "WORLD_SIZE": "4"}
MEGATRON = {"TP": "2", "SEQUENCE_PARALLEL": "1"}
# Each: variables, type of the gradient reduction, bytes that are sent.
CASES: dict[str, tuple[dict[str, str], str, dict[Sent, float]]] = {
    "zero1": ({"WORLD_SIZE": "2"}, "bf16", gradients(2, b * P, EXCHANGE) | weights(2, b * P)),
    "zero1-fp32": (
        {"WORLD_SIZE": "2"},
        "fp32",
        gradients(2, 4 * P, EXCHANGE, FP32) | weights(2, b * P),
    ),
    "zero2": (
        {"WORLD_SIZE": "2", "ZERO_STAGE": "2"},
        "bf16",
        gradients(2, m * b * P, EXCHANGE) | weights(2, b * P),
    ),
    "zero2-fp32": (
        {"WORLD_SIZE": "2", "ZERO_STAGE": "2"},
        "fp32",
        gradients(2, m * 4 * P, EXCHANGE, FP32) | weights(2, b * P),
    ),
    "muon": (  # 8 bytes of each matrix to its owner, 4 back; a rank has half of them
        {"WORLD_SIZE": "2", "OPT": "muon"},
        "bf16",
        gradients(2, b * P, EXCHANGE)
        | weights(2, b * P)
        | gradients(2, (8 + 4) * L * (3 * 128 * 128 + 3 * 128 * 256) / 2, EXCHANGE, FP32),
    ),
    "deepspeed-zero1": (
        {**DEEPSPEED, "WORLD_SIZE": "2"},
        "bf16",
        gradients(2, b * P) | weights(2, b * P),
    ),
    "deepspeed-zero1-fp32": (
        {**DEEPSPEED, "WORLD_SIZE": "2"},
        "fp32",
        gradients(2, 4 * P, dtype=FP32) | weights(2, b * P),
    ),
    "deepspeed-zero2": (
        {**DEEPSPEED, "WORLD_SIZE": "2", "ZERO_STAGE": "2"},
        "bf16",
        gradients(2, m * b * P) | weights(2, b * P),
    ),
    "deepspeed-zero2-fp32": (
        {**DEEPSPEED, "WORLD_SIZE": "2", "ZERO_STAGE": "2"},
        "fp32",
        gradients(2, m * 4 * P, dtype=FP32) | weights(2, b * P),
    ),
    "zero3": (
        {**ZERO3, "WORLD_SIZE": "2"},
        "bf16",
        gradients(2, m * b * P, "reduce_scatter_tensor") | weights(2, 2 * m * b * P),
    ),
    "zero3-fp32": (
        ZERO3,
        "fp32",
        gradients(4, m * 4 * P, "reduce_scatter_tensor", FP32) | weights(4, 2 * m * b * P),
    ),
    "hpz": (  # the first gathering of a step is that of all ranks
        {**ZERO3, "ZERO_HPZ_PARTITION_SIZE": "2"},
        "bf16",
        gradients(4, m * b * P, "reduce_scatter_tensor")
        | weights(4, b * P)
        | weights(2, (2 * m - 1) * b * P),
    ),
    "mics": (
        {**ZERO3, "MICS_SHARD_SIZE": "2"},
        "bf16",
        gradients(2, m * b * P, "reduce_scatter_tensor")
        | weights(2, 2 * m * b * P)
        | gradients(2, b * P / 2),
    ),
    "mics-fp32": (
        {**ZERO3, "MICS_SHARD_SIZE": "2"},
        "fp32",
        gradients(2, m * 4 * P, "reduce_scatter_tensor", FP32)
        | weights(2, 2 * m * b * P)
        | gradients(2, 4 * P / 2, dtype=FP32),
    ),
    "tp": ({"TP": "2"}, "bf16", gradients(2, m * (4 * L + 2) * x)),
    "sequence": (
        MEGATRON,
        "bf16",
        NORMS
        | gradients(2, m * (4 * L + 2) * x, "reduce_scatter_tensor")
        | weights(2, m * (6 * L + 2) * x),
    ),
    "sequence-full": (  # all but the last collective of a layer's forward again
        {**MEGATRON, "USE_ACTIVATION_CHECKPOINTING": "1"},
        "bf16",
        NORMS
        | gradients(2, m * (5 * L + 2) * x, "reduce_scatter_tensor")
        | weights(2, m * (8 * L + 2) * x),
    ),
    "ulysses": (
        {"SP": "2"},
        "bf16",
        gradients(2, m * L * 4 * (x / 2) * 1.5 + b * P, EXCHANGE) | weights(2, b * P),
    ),
    "ulysses-selective": (  # the attention's output goes twice
        {"SP": "2", "USE_ACTIVATION_CHECKPOINTING": "selective"},
        "bf16",
        gradients(2, m * L * (4 * (x / 2) * 1.5 + x / 2) + b * P, EXCHANGE) | weights(2, b * P),
    ),
    "pp": ({"PP": "2"}, "bf16", gradients(2, m * x, "send")),
    "pp-tp": (  # the first stage has half of the layers; it gathers its output and the gradient
        {"PP": "2", "TP": "2"},
        "bf16",
        gradients(2, m * x / 2, "send")
        | gradients(2, m * (2 * L + 1) * x)
        | weights(2, m * 2 * x),
    ),
}  # fmt: skip
QUICK = ("zero1-fp32", "zero2", "zero3", "hpz", "tp")


@pytest.mark.parametrize("case", [x if x in QUICK else pytest.param(x, marks=LONG) for x in CASES])
def test_bytes_of_a_step(case: str) -> None:
    variables, reduced_in, expected = CASES[case]
    variables = {**COMMON, **variables, "GRAD_REDUCE_IN_BF16": str(int(reduced_in == "bf16"))}
    ranks = front.world({**variables, "GLOBAL_BATCH": ""})
    sent = run(sent_in_a_step, ranks, {**variables, "GLOBAL_BATCH": ""})[0]
    # Norms, losses and flags are a few bytes; the losses of tokens two numbers of each TP rank.
    small = 100 + 2 * 2 * 4 * m * 64
    large = {key: size for key, size in sent.items() if size > small}
    assert set(large) == set(expected)
    for key, size in large.items():
        assert size == pytest.approx(expected[key], rel=0.01), key
