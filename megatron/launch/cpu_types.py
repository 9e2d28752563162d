"""Types that this host's CPU multiplies slowly, without torch.

A CPU multiplies 16-bit numbers faster than fp32 with AMX only; what it is not known to have counts
as slow. The figures are rates of torch's matrix products beside fp32's: docs/performance.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

AMX = "amx_bf16"
VECTOR = "avx512_bf16"
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep oneDNN, whose products torch takes, from instructions that a CPU has."""


def slow_types(environ: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """DTYPE -> why it is slow on this host's CPU; empty where the CPU has AMX.

    Args:
        environ: the environment's variables.
        root: of the file system; another one in tests.
    """
    limit = next((environ[name].upper() for name in LIMITS if environ.get(name)), "")
    flags = cpu_flags(root)
    may = "AMX" in limit or limit in ("", "ALL", "DEFAULT")
    if AMX in flags and may:
        return {}
    vector = VECTOR in flags and (may or limit.endswith("_BF16"))
    reason = (
        "this CPU has no AMX; products by avx512_bf16 are about 1.6 times slower than in fp32"
        if vector
        else "emulated on this CPU: products are about 5 times slower than in fp32, or more"
    )
    return {
        "bf16": reason,
        "fp16": "emulated on this CPU: products are about 10 times slower than in fp32, or more",
    }


def cpu_flags(root: Path = Path("/")) -> frozenset[str]:
    """What the kernel says that the first CPU can do; empty where it does not say (macOS)."""
    try:
        with (root / "proc/cpuinfo").open(encoding="ascii", errors="replace") as lines:
            found = next((line for line in lines if re.match(r"flags\s*:", line)), "")
    except OSError:
        return frozenset()
    return frozenset(found.partition(":")[2].split())
