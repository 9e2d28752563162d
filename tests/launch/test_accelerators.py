"""Counting accelerators in file systems that have some."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.launch import accelerators
from megatron.launch.accelerators import VISIBLE, count_accelerators, memory_gib, promise
from megatron.launch.machines import MACHINES


def _write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def _nvidia(root: Path, listed: int, files: int) -> None:
    for number in range(listed):
        _write(root / f"proc/driver/nvidia/gpus/0000:0{number}:00.0/information")
    for name in [f"nvidia{number}" for number in range(files)] + ["nvidiactl", "nvidia-uvm"]:
        _write(root / "dev" / name)


def _intel_card(root: Path, number: int, kind: str, tiles: int) -> None:
    card = root / f"sys/class/drm/card{number}"
    _write(card / "device/vendor", "0x8086\n")
    _write(card / "device/class", f"{kind}\n")
    for tile in range(tiles):
        _write(card / f"gt/gt{tile}/id")


def test_no_accelerator(tmp_path: Path) -> None:
    assert count_accelerators({}, tmp_path) == 0


@pytest.mark.parametrize(("listed", "files", "count"), [(8, 8, 8), (8, 1, 1), (4, 0, 4), (0, 2, 2)])
def test_nvidia(tmp_path: Path, listed: int, files: int, count: int) -> None:
    _nvidia(tmp_path, listed, files)
    assert count_accelerators({}, tmp_path) == count


@pytest.mark.parametrize(
    ("visible", "count"),
    [("", 0), ("-1", 0), ("0", 1), ("2,3", 2), ("GPU-1f,GPU-2e,GPU-3d", 3), ("0,-1,1", 1)],
)
def test_hidden_devices_do_not_count(tmp_path: Path, visible: str, count: int) -> None:
    _nvidia(tmp_path, 4, 4)
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == count


def test_a_list_of_devices_makes_none(tmp_path: Path) -> None:
    assert count_accelerators({"CUDA_VISIBLE_DEVICES": "0,1"}, tmp_path) == 0


def test_amd_counts_nodes_with_a_gpu(tmp_path: Path) -> None:
    for number, gpu in enumerate(["0", "0", "4711", "4712"]):
        _write(tmp_path / f"sys/class/kfd/kfd/topology/nodes/{number}/gpu_id", f"{gpu}\n")
    assert count_accelerators({}, tmp_path) == 2
    assert count_accelerators({"ROCR_VISIBLE_DEVICES": "1"}, tmp_path) == 1


def test_intel_counts_tiles_and_no_graphics(tmp_path: Path) -> None:
    _intel_card(tmp_path, 0, "0x030000", 1)  # a laptop's
    assert count_accelerators({}, tmp_path) == 0
    for number in (1, 2):
        _intel_card(tmp_path, number, "0x038000", 2)
    assert count_accelerators({}, tmp_path) == 4
    assert count_accelerators({"ZE_FLAT_DEVICE_HIERARCHY": "COMPOSITE"}, tmp_path) == 2


# --- Who promises accelerators --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hostname", "environ", "promised"),
    [
        ("x4217c2s6b0n0", {}, "a host of aurora has 12 accelerators"),
        ("x4217c2s6b0n0", {"CUDA_VISIBLE_DEVICES": ""}, "a host of aurora has 12 accelerators"),
        ("x4217c2s6b0n0", {"ZE_AFFINITY_MASK": "3"}, "a host of aurora has 12 accelerators"),
        ("x4217c2s6b0n0", {"ZE_AFFINITY_MASK": "-1"}, ""),
        ("x3006c0s13b1n0", {"CUDA_VISIBLE_DEVICES": ""}, ""),
        ("frontier00001", {"ROCR_VISIBLE_DEVICES": "0"}, "a host of frontier has 8 accelerators"),
        ("laptop", {}, ""),
    ],
)
def test_a_machine_promises_its_accelerators(
    tmp_path: Path, hostname: str, environ: dict[str, str], promised: str
) -> None:
    assert promise(environ, hostname, tmp_path) == promised


def test_a_drivers_files_promise_accelerators(tmp_path: Path) -> None:
    _nvidia(tmp_path, 2, 2)
    assert promise({}, "laptop", tmp_path) == "the kernel of this host shows 2 accelerators"
    assert promise({"CUDA_VISIBLE_DEVICES": "-1"}, "laptop", tmp_path) == ""


def test_a_machine_with_devices_has_their_vendor() -> None:
    for machine in MACHINES:
        assert (machine.vendor in VISIBLE) == bool(machine.devices_per_host)


def _answering(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n", encoding="ascii")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "gib"),
    [
        ("echo 81920; echo 40960", 40.0),
        ("echo 'Failed to initialize NVML'", 0.0),
        ("echo '[N/A]'; exit 9", 0.0),
        ("exec sleep 20", 0.0),
    ],
)
def test_memory_of_a_gpu(
    script: str, gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answering(tmp_path, monkeypatch, script)
    monkeypatch.setattr(accelerators, "NVIDIA_SMI_TIMEOUT_S", 0.3 if "sleep" in script else 5.0)
    assert memory_gib() == gib


def test_memory_where_no_driver_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert memory_gib() == 0.0
