"""The device of a rank: name, collectives' backend, peak, synchronisation and peak memory.

One row of PEAK_TFLOPS and one branch of `detect` per accelerator. Apple's GPUs have no collectives
and no matching fp32 reductions, so a Mac trains on its CPU.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.config.errors import ConfigError
from megatron.launch.accelerators import VISIBLE

log = logging.getLogger(__name__)

PEAK_TFLOPS = (
    ("GB200", 2500.0),  # NVIDIA GB200 NVL72 data sheet, per GPU
    ("B200", 2250.0),  # NVIDIA DGX B200 data sheet
    ("H200", 989.4),  # NVIDIA H200 data sheet
    ("GH200", 989.4),  # NVIDIA GH200 data sheet
    ("H100 NVL", 835.5),  # NVIDIA H100 data sheet
    ("H100 PCIe", 756.0),  # NVIDIA H100 data sheet
    ("H100", 989.4),  # NVIDIA H100 data sheet, SXM5
    ("H800", 989.4),  # as H100 SXM5 but for NVLink
    ("A100", 312.0),  # NVIDIA A100 data sheet
    ("A800", 312.0),  # as A100 but for NVLink
    ("L40S", 362.0),  # NVIDIA L40S data sheet
    ("MI300X", 1307.4),  # AMD Instinct MI300X data sheet
    (
        "MI250X",
        191.5,
    ),  # AMD Instinct MI250X data sheet: 383 for the two dies that PyTorch sees as two devices
    ("Data Center GPU Max 1550", 298.2),  # per tile: 448 vector engines x 512 operations x 1.3 GHz
)
"""Part of a device's name -> its vendor's dense bf16 (and fp16) TFLOPS; the first match counts."""

ONECCL = "oneccl_bindings_for_pytorch"


@dataclass(frozen=True)
class Device:
    """One rank's device.

    Attributes:
        kind: cuda (NVIDIA and AMD), xpu (Intel) or cpu.
        index: index among the devices this process sees; 0 on a CPU.
        name: the vendor's name.
        backend: torch.distributed backend: nccl, xccl, ccl or gloo.
        peak_tflops: dense peak in the run's precision; None where unknown (CPUs, fp32, unlisted
            devices).
    """

    kind: str
    index: int
    name: str
    backend: str
    peak_tflops: float | None

    @property
    def torch_device(self) -> torch.device:
        """The device as PyTorch names it."""
        return (
            torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)
        )

    def synchronize(self) -> None:
        """Waits for the work queued on the device."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.index)
        elif self.kind == "xpu":
            torch.xpu.synchronize(self.index)

    def memory_max_gib(self) -> float:
        """Most GiB this process ever held: tensors on an accelerator, resident memory on a CPU."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated(self.index) / 2**30
        if self.kind == "xpu":
            return torch.xpu.max_memory_allocated(self.index) / 2**30
        return _resident_peak() / 2**30


def detect(local_rank: int, dtype: str, wanted: str = "auto", promise: str = "") -> Device:
    """The device of the process that is number `local_rank` on its host.

    Args:
        local_rank: 0-based; it is no device's index: a launcher may show each rank one device.
        dtype: bf16, fp16 or fp32; decides which peak applies.
        wanted: DEVICE: auto, cpu, cuda or xpu.
        promise: why this host should have an accelerator; empty where nothing says so.

    Raises:
        ConfigError: DEVICE, or what the host is known to have, is not there; or an Intel GPU has no
            backend for its collectives.
    """
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        index = _index(local_rank, torch.cuda.device_count())
        name = torch.cuda.get_device_name(index)
        return Device("cuda", index, name, "nccl", peak_tflops(name, dtype))
    if wanted in ("auto", "xpu") and torch.xpu.is_available():
        index = _index(local_rank, torch.xpu.device_count())
        name = torch.xpu.get_device_name(index)
        return Device("xpu", index, name, _xpu_backend(), peak_tflops(name, dtype))
    if wanted in ("cuda", "xpu") or (wanted == "auto" and promise):
        raise ConfigError(_nothing_seen(promise if wanted == "auto" else f"DEVICE={wanted} is set"))
    return Device("cpu", 0, platform.processor() or platform.machine(), "gloo", None)


def prepare(device: Device, dtype: str) -> None:
    """Sets this process' flags; call it once, before the first tensor on the device.

    fp32 is not TF32, which would make a run depend on the accelerator's generation. On a CPU,
    denormals are flushed: they cost a hundred times a normal number and do not matter here.
    """
    if device.kind == "cuda":
        torch.cuda.set_device(device.index)
    elif device.kind == "xpu":
        torch.xpu.set_device(device.index)
        if device.backend == "ccl":
            importlib.import_module(ONECCL)  # registers the backend with torch.distributed
    else:
        torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest" if dtype == "fp32" else "high")


def peak_tflops(name: str, dtype: str) -> float | None:
    """Dense peak of the device called `name`; None in fp32 and for a device that is not listed."""
    if dtype == "fp32":
        return None
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def _resident_peak() -> int:
    """Bytes; on Linux not from getrusage, which a process inherits from its parent."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].removesuffix("kB")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _index(local_rank: int, visible: int) -> int:
    """A launcher may show each process one device or all of them."""
    if visible > 1 and local_rank >= visible:
        log.warning(
            f"local rank {local_rank} shares a device: only {visible} are visible; "
            f"set NGPU_PER_HOST={visible}"
        )
    return local_rank % visible


def _nothing_seen(reason: str) -> str:
    """What torch was asked, why it may see nothing, and what to do."""
    version = torch.version
    variables = sorted({name for names in VISIBLE.values() for name in names} & os.environ.keys())
    hidden = (
        ", ".join(f"{name}={os.environ[name]}" for name in variables) or "no variable hides one"
    )
    return (
        f"{reason}, but torch sees no such device: torch {torch.__version__} is built for CUDA "
        f"{version.cuda}, ROCm {version.hip}, XPU {version.xpu}; torch.cuda has "
        f"{torch.cuda.device_count()} devices, torch.xpu {torch.xpu.device_count()}; {hidden}. "
        f"Use the machine's own Python (its module) or a torch for its accelerator and driver; "
        f"DEVICE=cpu trains on the CPU"
    )


def _xpu_backend() -> str:
    if torch.distributed.is_available() and torch.distributed.is_xccl_available():
        return "xccl"
    if importlib.util.find_spec(ONECCL) is not None:
        return "ccl"
    raise ConfigError(
        f"Intel GPU without collectives: use a PyTorch with xccl (2.8 or later) or install {ONECCL}"
    )
