"""Accelerators of this host, without torch: how many there are, who promises them, who hides them.

They are counted by the kernel's files, then by nvidia-smi.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron.launch.machines import find_machine

DISPLAY_CONTROLLER = (
    "0x0380"  # PCI class of Intel's data center GPUs; graphics of a laptop are 0x0300
)
NVIDIA_SMI_TIMEOUT_S = 5.0

# Variables that limit the devices a process sees, by vendor.
VISIBLE = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "intel": ("ZE_AFFINITY_MASK",),
}

# What DEVICE sets in the ranks: DeepSpeed chooses by a variable of its own, when it is imported.
RANK_ENVIRONMENT: dict[str, dict[str, str]] = {
    "auto": {},
    "cpu": {
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "-1",
        "HIP_VISIBLE_DEVICES": "-1",
        "ONEAPI_DEVICE_SELECTOR": "*:cpu",  # an empty ZE_AFFINITY_MASK would show all tiles
    },
    "cuda": {"DS_ACCELERATOR": "cuda"},
    "xpu": {"DS_ACCELERATOR": "xpu"},
}


def promise(environ: Mapping[str, str], hostname: str = "", root: Path = Path("/")) -> str:
    """Why a process on this host should see an accelerator; empty where nothing says so.

    Args:
        environ: the environment's variables; devices that they hide are not promised.
        hostname: this host's name, if not the operating system's.
        root: of the file system; another one in tests.
    """
    machine = find_machine(hostname or socket.gethostname(), environ)
    if machine.devices_per_host:
        if not narrowed(machine.devices_per_host, machine.vendor, environ):
            return ""
        return f"a host of {machine.name} has {machine.devices_per_host} accelerators"
    count = count_accelerators(environ, root)
    return f"the kernel of this host shows {count} accelerators" if count else ""


def count_accelerators(environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """Accelerators that a process with these variables would see; 0 where there is none.

    Args:
        environ: the environment's variables.
        root: of the file system; another one in tests.
    """
    made_by, count = _found(environ, root)
    return narrowed(count, made_by, environ) if count else 0


def vendor(root: Path = Path("/")) -> str:
    """Who made this host's accelerators: nvidia, amd or intel; empty where it has none."""
    return _found({}, root)[0]


def _found(environ: Mapping[str, str], root: Path) -> tuple[str, int]:
    """Vendor and number of the accelerators, hidden ones included."""
    counts = {"nvidia": _nvidia(root), "amd": _amd(root), "intel": _intel(root, environ)}
    return next(((name, count) for name, count in counts.items() if count), ("", 0))


def narrowed(count: int, vendor: str | None, environ: Mapping[str, str]) -> int:
    """`count` devices less those that the user hides.

    Args:
        count: devices of the host.
        vendor: nvidia, amd or intel; None: any of them.
        environ: the environment's variables.
    """
    names = (
        VISIBLE[vendor]
        if vendor
        else sorted({name for names in VISIBLE.values() for name in names})
    )
    for name in names:
        if name in environ:
            count = min(count, _listed(environ[name]))
    return count


def _listed(text: str) -> int:
    """Devices in a list such as `0,1` or `GPU-1f,GPU-2e`; a negative number ends it."""
    count = 0
    for word in text.split(","):
        if not word.strip() or word.strip().startswith("-"):
            break
        count += 1
    return count


def _nvidia(root: Path) -> int:
    """A container has the driver's list of all GPUs but only its own device files."""
    listed = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    files = sum(
        bool(re.fullmatch(r"nvidia\d+", path.name)) for path in (root / "dev").glob("nvidia*")
    )
    if listed and files:
        return min(listed, files)
    return listed or files or _nvidia_smi(root)


def _nvidia_smi(root: Path) -> int:
    """Ask nvidia-smi where the driver has no such files (WSL)."""
    lines = [] if root != Path("/") else _asked("-L")
    return sum(line.startswith("GPU ") for line in lines)


def memory_gib() -> float:
    """Memory of the smallest NVIDIA GPU of this host in GiB, as its driver says; 0: not known."""
    lines = _asked("--query-gpu=memory.total", "--format=csv,noheader,nounits")  # MiB
    sizes = [int(line) for line in lines if line.strip().isdecimal()]
    return min(sizes) / 1024 if sizes else 0.0


def _asked(*arguments: str) -> list[str]:
    """The lines that nvidia-smi prints; none where it is not there, or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        found = subprocess.run(
            [tool, *arguments],
            capture_output=True,
            text=True,
            timeout=NVIDIA_SMI_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.splitlines()


def _amd(root: Path) -> int:
    """Nodes of the kernel's compute driver that are GPUs; processors have the id 0."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id")
    return sum(_read(path) not in ("", "0") for path in nodes)


def _intel(root: Path, environ: Mapping[str, str]) -> int:
    """Data center GPUs: their tiles, or cards where the user asks for cards."""
    cards = 0
    tiles = 0
    for card in (root / "sys/class/drm").glob("card*"):
        device = card / "device"
        is_card = re.fullmatch(r"card\d+", card.name) and _read(device / "vendor") == "0x8086"
        if is_card and _read(device / "class").startswith(DISPLAY_CONTROLLER):
            cards += 1
            tiles += max(1, len(list((card / "gt").glob("gt*"))))
    composite = environ.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").upper() == "COMPOSITE"
    return cards if composite else tiles


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
