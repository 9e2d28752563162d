"""The commands that README.md and docs/ show: in blocks of code, and in the cells of tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GENERATED = "docs/seeds.md"  # of tests/seeds, which types each command of it
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
]

_ASSIGNED = r"(?:[A-Z][A-Z0-9_]*=(?:\"[^\"]*\"|'[^']*'|\S*)\s+)*"
_NAMES = "bash|python3?|source|launch(?! command:)|lm_eval|mpiexec|mpirun|srun|torchrun|touch|pip"
_PROGRAM = rf"(?:{_NAMES}) \S"
COMMAND = re.compile(rf"(?:\$ )?({_ASSIGNED}{_PROGRAM}.*)")


class Shown(NamedTuple):
    """A command, and where it is shown."""

    page: str
    heading: str
    text: str

    @property
    def trains(self) -> bool:
        """Whether it is train_alcf.sh with variables and flags."""
        return re.fullmatch(rf"{_ASSIGNED}bash train_alcf\.sh\b.*", self.text) is not None


def shown(page: str) -> list[Shown]:
    """The commands of a page, in order."""
    return list(_commands(page, (ROOT / page).read_text(encoding="utf-8")))


def _commands(page: str, text: str) -> Iterator[Shown]:
    text = text.partition("<!-- options:")[0].replace("\\\n", " ")
    heading, in_block = "", False
    for line in text.splitlines():
        if line.startswith("```"):
            in_block = not in_block
        elif in_block:
            found = COMMAND.fullmatch(line.strip())
            if found:  # what stands behind two spaces and a # is a remark
                yield Shown(page, heading, " ".join(re.split(r"\s+# ", found[1])[0].split()))
        elif line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            for code in re.findall(r"`([^`]+)`", line):
                found = COMMAND.fullmatch(code)
                if found:
                    yield Shown(page, heading, " ".join(found[1].split()))
