"""torch's attention kernel is asked for, and a quadratic one is avoided, named or refused."""

from __future__ import annotations

import dataclasses
import logging
import time

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from megatron.config.errors import ConfigError
from megatron.model.attention import causal_attention
from megatron.training import attention_kernel
from megatron.training.attention_kernel import (
    RIVALS,
    TORCHS,
    AttentionChoice,
    Question,
    chosen,
    milliseconds,
    question_of,
    torchs_choice,
)
from tests.equivalence.front import run_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLASH, CUDNN, MATH = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH
EFFICIENT = SDPBackend.EFFICIENT_ATTENTION
TORCH_NAMES = {FLASH: "flash", CUDNN: "cudnn", EFFICIENT: "efficient", MATH: "math"}
LOGGER = "megatron.training.attention_kernel"


def cuda_of_today(question: Question) -> str:
    """As torch chooses on an NVIDIA GPU: flash wants 16 bits, the efficient kernel equal heads."""
    if question.dtype != "fp32":
        return "flash"
    return "efficient" if question.heads == question.kv_heads else "math"


def unasked(question: Question, kernel: str) -> float:
    raise AssertionError("nothing is measured where torch has one fused kernel")


def none_for_these(question: Question) -> str:
    return "math"


def none_but_bf16(question: Question) -> str:
    return "flash" if question.dtype == "bf16" else "math"


def said(caplog: pytest.LogCaptureFixture, level: int) -> str:
    return "\n".join(r.getMessage() for r in caplog.records if r.levelno == level)


@pytest.mark.parametrize(
    ("variables", "heads", "kv_heads"),
    [
        ({}, 8, 4),
        ({"TP": "2"}, 4, 2),
        ({"SP": "2"}, 4, 2),
        ({"SP": "8", "NUM_KV_HEAD": "4"}, 1, 1),
        ({"TP": "2", "SP": "2", "NUM_KV_HEAD": "2"}, 2, 1),
    ],
)
def test_the_question_has_a_ranks_heads(
    variables: dict[str, str], heads: int, kv_heads: int
) -> None:
    found = question_of(run_config(variables), CPU)
    assert (found.heads, found.kv_heads, found.seq_length, found.width) == (heads, kv_heads, 32, 8)


@pytest.mark.parametrize(
    ("variables", "ask", "expands", "kernel"),
    [
        ({"DTYPE": "bf16"}, cuda_of_today, False, "flash"),
        ({"DTYPE": "fp32"}, cuda_of_today, True, "efficient"),
        ({"DTYPE": "fp32", "NUM_KV_HEAD": "8"}, cuda_of_today, False, "efficient"),
        ({"DTYPE": "fp32", "NO_FLASH_ATTN": "1"}, cuda_of_today, False, "plain matrix products"),
    ],
)
def test_heads_are_copied_only_where_that_brings_a_kernel(
    variables: dict[str, str],
    ask: attention_kernel.Choose,
    expands: bool,
    kernel: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, LOGGER):
        found = chosen(run_config(variables), CPU, ask, unasked)
    assert found.expand_kv is expands
    assert found.kernels == ((SDPBackend.MATH,) if "NO_FLASH_ATTN" in variables else ())
    assert kernel in said(caplog, logging.INFO)
    assert not said(caplog, logging.WARNING)


def test_a_quadratic_kernel_is_warned_of_with_what_was_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = run_config({"DTYPE": "fp32", "SEQ": "2048"})
    assert chosen(run, CPU, none_but_bf16) == TORCHS
    assert "DTYPE=bf16 has a fused kernel" in said(caplog, logging.WARNING)
    assert "0.1 GiB" in said(caplog, logging.WARNING)  # 8 x 2048 x 2048 x 4 bytes
    caplog.clear()
    assert chosen(run, CPU, none_for_these) == TORCHS
    assert "no type has a fused kernel" in said(caplog, logging.WARNING)
    caplog.clear()
    assert chosen(run_config({"DTYPE": "fp32"}), CPU, none_but_bf16) == TORCHS
    assert not said(caplog, logging.WARNING)  # 32 positions


@pytest.mark.parametrize("variables", [{}, {"NO_FLASH_ATTN": "1"}])
def test_scores_that_no_memory_holds_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernel, "_memory", lambda device: 2**20)
    run = run_config({"SEQ": "1024", "DTYPE": "fp32"} | variables)
    with pytest.raises(ConfigError, match=r"8 heads x SEQ=1024 x 1024 x 4 bytes = 0.0 GiB"):
        chosen(run, CPU, none_for_these)


@pytest.mark.parametrize(
    ("times", "kernels", "words"),
    [
        ({"flash": 2.0, "cudnn": 1.0}, (CUDNN, FLASH, EFFICIENT, MATH), "flash 2.00, cudnn 1.00"),
        ({"flash": 2.0, "cudnn": 1.95}, (), "torch's flash kernel"),  # nearly a tie
        ({"flash": 2.0, "cudnn": None}, (), "torch's flash kernel (8 query"),
        ({"flash": 2.0, "efficient": 1.5}, (EFFICIENT, FLASH, CUDNN, MATH), "efficient 1.50"),
    ],
)
def test_the_fastest_kernel_is_taken(
    times: dict[str, float | None],
    kernels: tuple[SDPBackend, ...],
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = []

    def measure(question: Question, kernel: str) -> float | None:
        asked.append((question.batch, question.seq_length))
        return times.get(kernel)

    run = run_config({"DTYPE": "bf16", "MICRO_BATCH": "4"})
    with caplog.at_level(logging.INFO, LOGGER):
        assert chosen(run, GPU, cuda_of_today, measure) == AttentionChoice(kernels)
    assert asked == [(4, 32)] * 3
    assert words in said(caplog, logging.INFO)


def test_a_measurement_is_of_a_kernel_that_computes_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    question = Question(8, 4, 64, 16, "bf16", CPU, batch=2)
    assert (milliseconds(question, "flash") or 0) > 0
    assert (milliseconds(question, "math") or 0) > 0
    assert milliseconds(question, "cudnn") is None  # a CPU has none
    right = attention_kernel.causal_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, kernels: tuple[SDPBackend, ...]) -> Tensor:
        return right(q, k, v * 1.1 if kernels else v, kernels)

    monkeypatch.setattr(attention_kernel, "causal_attention", wrong)
    assert milliseconds(question, "flash") is None
    assert "flash kernel is wrong" in said(caplog, logging.WARNING)


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [((), "flash"), ((MATH,), "math"), ((CUDNN, FLASH, MATH), "flash")],
)
def test_the_first_kernel_that_fits_is_run(kernels: tuple[SDPBackend, ...], expected: str) -> None:
    """Also from inside a compiled layer, without a break of its graph."""
    found = ran(CPU, 4, torch.bfloat16, expand_kv=False, kernels=kernels)
    assert found == {expected}
    q, k, v = torch.randn(3, 1, 4, 8, 16)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, kernels), causal_attention(q, k, v, kernels))


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_a_cpu_takes_flash(kv_heads: int) -> None:
    """Held to the operator that a step really runs."""
    assert torchs_choice(Question(8, kv_heads, 64, 16, "bf16", CPU)) == "flash"
    assert ran(CPU, kv_heads, torch.bfloat16, expand_kv=False) == {"flash"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_a_gpu_runs_what_it_answers(dtype: str, kv_heads: int) -> None:
    run = run_config({"DTYPE": dtype, "NUM_KV_HEAD": str(kv_heads), "HIDDEN": "512", "SEQ": "2048"})
    found, question = chosen(run, GPU), question_of(run, GPU)
    if found.expand_kv:
        question = dataclasses.replace(question, kv_heads=8)
    expected = {TORCH_NAMES[found.kernels[0]]} if found.kernels else {torchs_choice(question)}
    heads = (GPU, kv_heads, attention_kernel.DTYPES[dtype], found.expand_kv, 2048, 64)
    assert expected != {"math"}
    assert ran(*heads, found.kernels) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpus_kernels_are_measured_in_a_second() -> None:
    question = Question(24, 8, 8192, 128, "bf16", GPU)
    begin = time.perf_counter()
    times = {kernel: milliseconds(question, kernel) for kernel in RIVALS["cuda"]}
    assert time.perf_counter() - begin < 10  # a first use of cuDNN compiles
    print(times)
    assert times["flash"] and 0 < times["flash"] < 1000
    assert times["efficient"] is None  # it refuses grouped heads


def ran(
    device: torch.device,
    kv_heads: int,
    dtype: torch.dtype,
    expand_kv: bool,
    length: int = 64,
    width: int = 16,
    kernels: tuple[SDPBackend, ...] = (),
) -> set[str]:
    """Kernels that a forward and a backward of the model's attention ran, by the profiler."""
    heads = (8, kv_heads, kv_heads)
    q, k, v = (
        torch.randn(1, n, length, width, dtype=dtype, device=device, requires_grad=True)
        for n in heads
    )
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        torch.autograd.backward([causal_attention(q, k, v, kernels, expand_kv).sum()])
    names = " ".join(event.key for event in trace.key_averages())
    return {
        name
        for name in ("flash", "efficient", "cudnn", "math")
        if f"_{name}_attention" in names or f"_attention_{name}" in names
    }


def test_copied_heads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 9, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.einsum("bnsd,bntd->bnst", q, k[:, [0, 0, 0, 1, 1, 1]]) / 2
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bnst,bntd->bnsd", scores.softmax(-1), v[:, [0, 0, 0, 1, 1, 1]])
    for expand in (False, True):
        torch.testing.assert_close(causal_attention(q, k, v, (), expand), expected)
