"""What the configuration has to know of the machine; filled by the launcher, read by resolve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Site:
    """A machine as far as defaults depend on it.

    Attributes:
        machine: name of the machine.
        is_hpc: a known HPC machine: its defaults are those of production runs.
        num_hosts: hosts of the job.
        devices_per_host: accelerators of a host; 0: none.
        defaults: variable -> value that this machine prefers.
    """

    machine: str = "generic"
    is_hpc: bool = False
    num_hosts: int = 1
    devices_per_host: int = 0
    defaults: Mapping[str, str] = field(default_factory=dict)
