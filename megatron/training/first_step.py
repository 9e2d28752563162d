"""What is logged behind a start's first steps, for the rank that logs: its memory."""

from __future__ import annotations

import logging

import torch

from megatron.config.schema import RunConfig
from megatron.training.metrics_file import MetricsRecord

log = logging.getLogger(__name__)

MIB = 2**20


class FirstStep:
    """Logs the memory of this process after the first steps.

    Args:
        run: the configuration.
    """

    def __init__(self, run: RunConfig) -> None:
        self._on_cpu = run.launch.device == "cpu"
        self._logged = False

    def log(self, record: MetricsRecord) -> None:
        """Logs the memory behind the first record of a step."""
        if record["event"] == "step" and not self._logged:
            self._logged = True
            text = " | ".join(f"{name}: {size:.1f}" for name, size in self._memory(record).items())
            log.info(f"[Rank 0] (after {record['iteration']} iterations) memory (MiB) | {text}")

    def close(self) -> None:
        """Nothing is pending."""

    def _memory(self, record: MetricsRecord) -> dict[str, float]:
        """MiB by kind: of the accelerator, as torch's allocator counts, or resident on a CPU."""
        if self._on_cpu or not (torch.cuda.is_available() or torch.xpu.is_available()):
            return {"max resident": 1024 * record["memory_max_gib"]}
        device = torch.accelerator
        return {
            "allocated": device.memory_allocated() / MIB,
            "max allocated": device.max_memory_allocated() / MIB,
            "reserved": device.memory_reserved() / MIB,
            "max reserved": device.max_memory_reserved() / MIB,
        }
