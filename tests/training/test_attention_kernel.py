"""torch's attention kernel is asked for, and a quadratic one is avoided, named or refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megatron.config.errors import ConfigError
from megatron.model.attention import causal_attention
from megatron.training import attention_kernel
from megatron.training.attention_kernel import Question, expands_kv, question_of, torchs_choice
from tests.equivalence.front import run_config

CPU = torch.device("cpu")
LOGGER = "megatron.training.attention_kernel"


def cuda_of_today(question: Question) -> str:
    """As torch chooses on an NVIDIA GPU: flash wants 16 bits, the efficient kernel equal heads."""
    if question.dtype != "fp32":
        return "flash"
    return "efficient" if question.heads == question.kv_heads else "math"


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
        assert expands_kv(run_config(variables), CPU, ask) is expands
    assert kernel in said(caplog, logging.INFO)
    assert not said(caplog, logging.WARNING)


def test_a_quadratic_kernel_is_warned_of_with_what_was_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = run_config({"DTYPE": "fp32", "SEQ": "2048"})
    assert not expands_kv(run, CPU, none_but_bf16)
    assert "DTYPE=bf16 has a fused kernel" in said(caplog, logging.WARNING)
    assert "0.1 GiB" in said(caplog, logging.WARNING)  # 8 x 2048 x 2048 x 4 bytes
    caplog.clear()
    assert not expands_kv(run, CPU, none_for_these)
    assert "no type has a fused kernel" in said(caplog, logging.WARNING)
    caplog.clear()
    assert not expands_kv(run_config({"DTYPE": "fp32"}), CPU, none_but_bf16)
    assert not said(caplog, logging.WARNING)  # 32 positions


@pytest.mark.parametrize("variables", [{}, {"NO_FLASH_ATTN": "1"}])
def test_scores_that_no_memory_holds_are_refused(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernel, "_memory", lambda device: 2**20)
    run = run_config({"SEQ": "1024", "DTYPE": "fp32"} | variables)
    with pytest.raises(ConfigError, match=r"8 heads x SEQ=1024 x 1024 x 4 bytes = 0.0 GiB"):
        expands_kv(run, CPU, none_for_these)


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
    gpu = torch.device("cuda", 0)
    run = run_config({"DTYPE": dtype, "NUM_KV_HEAD": str(kv_heads), "HIDDEN": "512", "SEQ": "2048"})
    expand = expands_kv(run, gpu)
    question = question_of(run, gpu)
    if expand:
        question = Question(8, 8, 2048, 64, dtype, gpu)
    chosen = torchs_choice(question)
    assert chosen != "math"
    assert ran(gpu, kv_heads, attention_kernel.DTYPES[dtype], expand, 2048, 64) == {chosen}


def ran(
    device: torch.device,
    kv_heads: int,
    dtype: torch.dtype,
    expand_kv: bool,
    length: int = 64,
    width: int = 16,
) -> set[str]:
    """Kernels that a forward and a backward of the model's attention ran, by the profiler."""
    heads = (8, kv_heads, kv_heads)
    q, k, v = (
        torch.randn(1, n, length, width, dtype=dtype, device=device, requires_grad=True)
        for n in heads
    )
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        torch.autograd.backward([causal_attention(q, k, v, False, expand_kv).sum()])
    names = " ".join(event.key for event in trace.key_averages())
    return {
        name for name in ("flash", "efficient", "cudnn", "math") if f"_{name}_attention" in names
    }


def test_copied_heads_change_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, 9, 4, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 9, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scores = torch.einsum("bnsd,bntd->bnst", q, k[:, [0, 0, 0, 1, 1, 1]]) / 2
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
    expected = torch.einsum("bnst,bntd->bnsd", scores.softmax(-1), v[:, [0, 0, 0, 1, 1, 1]])
    for expand in (False, True):
        torch.testing.assert_close(causal_attention(q, k, v, False, expand), expected)
