"""FP8: which products are in 8 bits, what they compute, how far losses move, and who is refused."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from torch import Tensor, nn

from megatron.config.errors import ConfigError
from megatron.config.resolve import Site, resolve
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.training.build import model_layers
from megatron.training.float8 import float8_matmul, with_float8
from tests.equivalence import front
from tests.spawn import run

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON = {"DTYPE": "bf16", "FP8": "emulated"}
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao"
)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DTYPE": "fp32"}, "FP8=1 scales bf16 matrices, but DTYPE=fp32. Set DTYPE=bf16"),
        ({"ZERO_STAGE": "3"}, "Set ZERO_STAGE=2"),
        ({"FFN_HIDDEN_SIZE": "88"}, "FFN_HIDDEN_SIZE=88 / TP=1 = 88. Change it"),
        ({"TP": "4"}, r"NUM_KV_HEAD=4 x head width 8 / TP=4 = 8\."),
        ({"MICRO_BATCH": "1", "SEQ": "24"}, r"MICRO_BATCH=1 x SEQ=24 / SP=1 = 24\."),
    ],
)
def test_what_fp8_cannot_multiply_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        front.run_config({"DTYPE": "bf16", "FP8": "1", **variables})


def test_an_eager_fp8_is_warned_of() -> None:
    set_now = {**front.VARIABLES, "DTYPE": "bf16", "FP8": "tensorwise", "COMPILE": "0"}
    found = resolve(set_now, [], Site())
    assert found.run.train.float8 == "1"
    assert "FP8=1 is fast in compiled layers only" in "\n".join(found.warnings)


def test_a_device_without_fp8_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = front.run_config({"DTYPE": "bf16", "FP8": "1"})
    with pytest.raises(ConfigError, match="no fast fp8 products for cpu"):
        with_float8(run, [], CPU)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"A100 has compute capability 8\.0, and fp8 .* 8\.9"):
        with_float8(run, [], GPU)


def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"FP8=1 needs torchao .*pip install"):
        float8_matmul("1")


@needs_torchao
def test_the_matrices_of_blocks_and_no_others() -> None:
    run = front.run_config({**ON, "NLAYERS": "2"})
    layers = with_float8(run, model_layers(run), CPU)
    assert [_in_float8(layer.build()) for layer in layers] == [
        (0, 0),
        (7, 7),
        (7, 7),
        (0, 0),
        (0, 0),  # the head multiplies chunk by chunk, on its own
    ]
    assert with_float8(front.run_config({}), layers, CPU) == layers


def _in_float8(module: nn.Module) -> tuple[int, int]:
    """Sharded matrices with an fp8 product, and all of them."""
    parts = [m for m in module.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    return sum(part.matmul is not None for part in parts), len(parts)


def rounded(x: Tensor, kind: torch.dtype, dim: int | None = None) -> Tensor:
    """x in the steps of an fp8 type that is scaled to its largest value, or that of each row."""
    largest = (
        x.double().abs().amax(dim, keepdim=True) if dim is not None else x.double().abs().max()
    )
    scale = (torch.finfo(kind).max / largest).float()
    if dim is not None:
        scale = torch.exp2(scale.log2().floor())
    return (x.float() * scale).to(kind).float() / scale


@needs_torchao
def test_products_are_those_of_rounded_matrices() -> None:
    """By an independent rounding: activations and weights in e4m3, gradients in e5m2."""
    generator = torch.Generator().manual_seed(5)
    x, w, g = (
        torch.randn(rows, columns, generator=generator).bfloat16()
        for rows, columns in ((32, 64), (48, 64), (32, 48))
    )
    x.requires_grad_()
    w.requires_grad_()
    y = float8_matmul("emulated")(x.view(2, 16, 64), w)
    y.backward(g.view(2, 16, 48))
    narrow, wide = torch.float8_e4m3fn, torch.float8_e5m2
    x8, w8, g8 = rounded(x.detach(), narrow), rounded(w.detach(), narrow), rounded(g, wide)
    assert x.grad is not None and w.grad is not None
    for found, expected in (
        (y.view(32, 48), x8 @ w8.t()),
        (x.grad, g8 @ w8),
        (w.grad, g8.t() @ x8),
    ):
        torch.testing.assert_close(found, expected.bfloat16())
    assert (y.view(32, 48) - x @ w.t()).abs().max() > 0.05  # and not those of bf16


def distance(variables: dict[str, str], ranks: int, count: int) -> tuple[float, float]:
    """Largest difference of losses, and relative one of norms, of fp8 and bf16 on a layout."""
    settings = {**ON, "WORLD_SIZE": str(ranks), **variables}
    fp8 = run(front.train, ranks, settings, count)[0]
    bf16 = run(front.train, ranks, {**settings, "FP8": "0"}, count)[0]
    assert fp8 != bf16
    return (
        max(abs(a - b) for (a, _), (b, _) in zip(fp8, bf16, strict=True)),
        max(abs(math.log(a / b)) for (_, a), (_, b) in zip(fp8, bf16, strict=True)),
    )


@needs_torchao
@pytest.mark.long
@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"OPT": "adamw", "LR": "1e-3"}, 1),
        ({"TP": "2"}, 2),
        ({"TP": "2", "SEQUENCE_PARALLEL": "1", "USE_ACTIVATION_CHECKPOINTING": "1"}, 2),
        ({"ZERO_STAGE": "2"}, 2),
        ({"PP": "2", "COMPILE": "0"}, 2),
    ],
    ids=["tp1", "adamw", "tp2", "tp2-sequence-recompute", "zero2", "pp2"],
)
def test_losses_stay_near_those_of_bf16(variables: dict[str, str], ranks: int) -> None:
    loss, norm = distance(variables, ranks, 20)
    print(f"{variables}: loss {loss:.5f}, norm {norm:.4f}")
    assert loss < 0.03 and norm < 0.2  # seen: 0.013 and 0.114


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@needs_torchao
@pytest.mark.parametrize("chosen", ["1", "rowwise"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_multiplies_in_fp8(chosen: str, compiled: bool) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    results = []
    for how in (chosen, "emulated"):
        matmul = float8_matmul(how)
        multiply = torch.compile(matmul) if compiled and how == chosen else matmul
        generator = torch.Generator(GPU).manual_seed(5)
        x, w, g = (
            torch.randn(*shape, generator=generator, device=GPU, dtype=torch.bfloat16)
            for shape in ((2, 64, 256), (512, 256), (2, 64, 512))
        )
        x.requires_grad_()
        w.requires_grad_()
        y = multiply(x, w)
        y.backward(g)
        results.append((y.detach(), x.grad, w.grad))
    for found, expected in zip(*results, strict=True):
        assert found is not None and expected is not None
        assert (found - expected).norm() / expected.norm() < (0.01 if chosen == "1" else 0.06)
