"""Devices: what is chosen, with the accelerators' answers replaced."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch

from megatron.config.errors import ConfigError
from megatron.training import device
from megatron.training.device import Device, detect, peak_tflops, prepare


def visible(monkeypatch: pytest.MonkeyPatch, kind: str, count: int, name: str) -> None:
    """Makes PyTorch see `count` devices of one kind and none of the other."""
    for other in ("cuda", "xpu"):
        module = getattr(torch, other)
        monkeypatch.setattr(module, "is_available", lambda other=other: other == kind)
        monkeypatch.setattr(module, "device_count", lambda: count)
        monkeypatch.setattr(module, "get_device_name", lambda index: name)


def test_a_cpu_uses_gloo_and_has_no_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, "none", 0, "")
    found = detect(3, "bf16")
    assert (found.kind, found.index, found.backend, found.peak_tflops) == ("cpu", 0, "gloo", None)
    assert found.torch_device == torch.device("cpu")


def test_apple_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, "none", 0, "")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert detect(0, "bf16").kind == "cpu"


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 2, 2), (1, 5, 0), (4, 6, 2)])
def test_the_index_is_the_local_rank_among_the_visible(
    count: int,
    local_rank: int,
    index: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    visible(monkeypatch, "cuda", count, "NVIDIA H200")
    found = detect(local_rank, "bf16")
    assert found == Device("cuda", index, "NVIDIA H200", "nccl", 989.4)
    assert found.torch_device == torch.device("cuda", index)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert bool(warned) == (count > 1 and local_rank >= count)
    assert all("NGPU_PER_HOST=4" in text for text in warned)


@pytest.mark.parametrize(
    ("xccl", "bindings", "backend"),
    [(True, True, "xccl"), (True, False, "xccl"), (False, True, "ccl")],
)
def test_an_intel_gpu_prefers_xccl(
    xccl: bool, bindings: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch, "xpu", 12, "Intel(R) Data Center GPU Max 1550")
    monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: xccl)
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda name: object() if bindings else None
    )
    found = detect(11, "bf16")
    assert (found.kind, found.index, found.backend) == ("xpu", 11, backend)
    assert found.peak_tflops == 298.2


def test_an_intel_gpu_without_collectives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, "xpu", 12, "Intel(R) Data Center GPU Max 1550")
    monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: False)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="xccl"):
        detect(0, "bf16")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B200", 2250.0),
        ("AMD Instinct MI250X", 191.5),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_the_most_specific_name_wins(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bf16") == peak_tflops(name, "fp16") == peak
    assert peak_tflops(name, "fp32") is None


def test_resident_memory_grows_with_what_is_held() -> None:
    code = (
        "from megatron.training.device import Device\n"
        "cpu = Device('cpu', 0, '', 'gloo', None)\n"
        "before = cpu.memory_max_gib()\n"
        "held = b'x' * 2**28\n"
        "print(before, cpu.memory_max_gib() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    before, growth = map(float, done.stdout.split())
    assert 0.01 < before < 2
    assert growth == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "highest"), ("bf16", "high")])
def test_fp32_means_fp32(dtype: str, precision: str) -> None:
    former = torch.get_float32_matmul_precision()
    try:
        prepare(Device("cpu", 0, "", "gloo", None), dtype)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(former)


def test_denormals_are_flushed_on_a_cpu() -> None:
    former = torch.get_float32_matmul_precision()
    torch.set_flush_denormal(False)
    try:
        assert torch.tensor([1e-40]).mul(0.5).item() != 0
        prepare(Device("cpu", 0, "", "gloo", None), "fp32")
        assert torch.tensor([1e-40]).mul(0.5).item() == 0
    finally:
        torch.set_float32_matmul_precision(former)


def test_waiting_for_a_cpu_is_nothing() -> None:
    Device("cpu", 0, "", "gloo", None).synchronize()


def test_waiting_for_an_accelerator_names_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: 3 * 2**30)
    gpu = Device("cuda", 2, "", "nccl", None)
    gpu.synchronize()
    assert waited == [2]
    assert gpu.memory_max_gib() == 3.0


# --- What is promised and what is there -----------------------------------------------------------

PROMISE = "a host of aurora has 12 accelerators"


@pytest.mark.parametrize("there", ["cuda", "xpu", "none"])
@pytest.mark.parametrize("wanted", ["auto", "cpu", "cuda", "xpu"])
@pytest.mark.parametrize("promise", ["", PROMISE])
def test_a_device_is_what_was_asked_for_or_refused(
    there: str, wanted: str, promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible(monkeypatch, there, 0 if there == "none" else 12, "Some Accelerator")
    monkeypatch.setattr(torch.distributed, "is_xccl_available", lambda: True)
    if wanted == "cpu" or (wanted == "auto" and there == "none" and not promise):
        assert detect(3, "bf16", wanted, promise).kind == "cpu"
    elif there == wanted or (wanted == "auto" and there != "none"):
        assert detect(3, "bf16", wanted, promise).torch_device == torch.device(there, 3)
    else:
        with pytest.raises(ConfigError, match="DEVICE=cpu trains on the CPU") as refused:
            detect(3, "bf16", wanted, promise)
        text = str(refused.value)
        assert (PROMISE if wanted == "auto" else f"DEVICE={wanted} is set") in text
        assert f"torch {torch.__version__} is built for CUDA" in text


def test_a_refusal_names_what_may_hide_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    visible(monkeypatch, "none", 0, "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=7"):
        detect(0, "bf16", "cuda")
