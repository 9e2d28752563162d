"""A measurement as markdown and JSON, with command, commit, hardware and date."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron.launch.provenance import commit, versions

ROOT = Path(__file__).resolve().parents[2]
CPU_FLAGS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


@dataclass
class Record:
    """What a subcommand found.

    Attributes:
        name: of the files it is written to.
        about: one line: what was measured.
        columns: of the table.
        rows: of the table, cells as text.
        data: all figures.
        notes: lines below the table.
    """

    name: str
    about: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Heading, table, notes, and where the figures come from."""
        where = origin()
        lines = [f"## {self.about}", "", _row(self.columns), _row("---" for _ in self.columns)]
        lines += [_row(row) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)]
        lines += [
            f"- `{where['command']}`, commit {where['commit'][:10]}, {where['date']}",
            f"- {where['hardware']}; {where['software']}",
        ]
        return "\n".join(lines) + "\n"

    def write(self, out: Path | None) -> None:
        """Prints the markdown; with a folder, also NAME.md and NAME.json in it."""
        text = self.markdown()
        print(text, flush=True)
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.name}.md").write_text(text, encoding="utf-8")
        document = {"about": self.about, **origin(), "notes": self.notes, **self.data}
        (out / f"{self.name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")


def origin() -> dict[str, str]:
    """Command, commit, date, hardware and software; no name of a host."""
    found = versions()
    names = ("torch", "deepspeed", "transformers")
    return {
        "command": shlex.join(["python3", *(_short(word) for word in sys.argv)]),
        "commit": commit(ROOT),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "hardware": hardware(),
        "software": ", ".join(
            [f"Python {platform.python_version()}"] + [f"{name} {found[name]}" for name in names]
        ),
    }


def hardware() -> str:
    """Processor, cores and what of it speeds up bf16; the first accelerator where there is one."""
    cores = f"{len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()} cores"
    model, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(
            (key.strip(), value.strip())
            for key, _, value in (line.partition(":") for line in info.read_text().splitlines())
        )
        model, flags = lines.get("model name", model), set(lines.get("flags", "").split())
    parts = [model, cores, *(flag for flag in CPU_FLAGS if flag in flags)]
    return ", ".join([*parts, *_accelerators()])


def _accelerators() -> Iterable[str]:
    import torch

    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        yield f"{count} x {about.name} ({about.total_memory / 2**30:.0f} GiB)"
    elif torch.xpu.is_available():
        yield f"{torch.xpu.device_count()} x {torch.xpu.get_device_name(0)}"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (lowest to highest)."""
    low, high = min(values), max(values)
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _short(word: str) -> str:
    """A path below the project relative to it."""
    path = Path(word)
    return str(path.relative_to(ROOT)) if path.is_absolute() and ROOT in path.parents else word


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
