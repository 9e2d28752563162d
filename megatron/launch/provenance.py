"""Where a run came from: commit, versions, machine, job, command, and no secret.

Variables are taken from a list of names, so that keys and tokens never are.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron import __version__
from megatron.config import schema
from megatron.launch.machines import MACHINES
from megatron.launch.site import Location

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "sentencepiece", "safetensors", "wandb")

# Besides the options' own variables and those that machines set.
RECORDED = (
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
    "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "CONDA_DEFAULT_ENV", "VIRTUAL_ENV",
    "NCCL_NET", "NCCL_CROSS_NIC", "NCCL_COLLNET_ENABLE", "NCCL_NET_GDR_LEVEL", "NCCL_SOCKET_IFNAME",
    "DS_ACCELERATOR",
    "TORCHDYNAMO_DISABLE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "PBS_JOBID", "PBS_JOBNAME", "PBS_QUEUE", "PBS_NODEFILE", "PBS_O_WORKDIR",
    "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NODELIST",
    "SLURM_SUBMIT_DIR",
)  # fmt: skip


def provenance(
    environ: Mapping[str, str], argv: Sequence[str], location: Location, root: Path
) -> dict[str, Any]:
    """Plain values for run.json.

    Args:
        environ: the environment's variables.
        argv: the command line without the program's name.
        location: machine and job.
        root: folder of the project.
    """
    return {
        "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command_line": list(argv),
        "commit": commit(root),
        "versions": {"megatron": __version__, "python": platform.python_version(), **versions()},
        "executable": sys.executable,
        "platform": platform.platform(),
        "machine": location.machine.name,
        "hostname": location.hostname,
        "hosts": list(location.job.hosts),
        "devices_per_host": location.devices_per_host,
        "scheduler": location.job.scheduler,
        "job": location.job.id,
        "environment": recorded_environment(environ),
    }


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that shape a run, and no others: keys and tokens live in the rest."""
    names = set(RECORDED) | set(schema.by_variable())
    for machine in MACHINES:
        names |= {*machine.environment, *machine.mpi_environment}
    return {name: environ[name] for name in sorted(names) if name in environ}


def versions() -> dict[str, str]:
    """Installed packages that a run's numbers depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path) -> str:
    """The commit that a clone is at, read without git; "unknown" where it is no clone."""
    try:
        git = root / ".git"
        if git.is_file():  # a worktree or a submodule
            git = (root / git.read_text(encoding="utf-8").partition(":")[2].strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        reference = head.partition(":")[2].strip()
        common = git / "commondir"
        shared = (git / common.read_text(encoding="utf-8").strip()) if common.is_file() else git
        for folder in (git, shared):
            if (folder / reference).is_file():
                return (folder / reference).read_text(encoding="utf-8").strip()
        for line in (shared / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {reference}"):
                return line.split()[0]
    except (OSError, UnicodeDecodeError):
        pass
    return "unknown"
