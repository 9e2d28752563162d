"""What is logged once a start, for the rank that logs: its start-up time and its first memory."""

from __future__ import annotations

import importlib
import logging
import time

import torch

from megatron.config.schema import RunConfig
from megatron.training.metrics_file import MetricsRecord

log = logging.getLogger(__name__)

MIB = 2**20


class FirstStep:
    """Logs how long this process took to be ready, and after the first steps its memory.

    Args:
        run: the configuration.
    """

    def __init__(self, run: RunConfig) -> None:
        self._on_cpu = run.launch.device == "cpu"
        self._logged = False
        psutil = importlib.import_module("psutil")  # which DeepSpeed requires
        seconds = time.time() - psutil.Process().create_time()
        log.info(f"start-up time: {seconds:.1f} s, imports, data and checkpoint included")

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
