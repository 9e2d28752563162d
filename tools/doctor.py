#!/usr/bin/env python3
"""What is wrong here, and how to mend it: a line per check, `ok`, `warn` or `FAIL` with the fix.

    python3 tools/doctor.py [--json]

Takes the settings from the variables, as train_alcf.sh does; works before there is an environment.
Exit status: 0 nothing fails, 1 something does.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, not installed
if sys.version_info < (3, 10):  # noqa: UP036  it is what may be wrong here
    sys.exit(f"FAIL  python: {sys.version.split()[0]}\n      fix: use Python 3.10 or later")

from megatron.launch.checkup import CHECKS, FAIL, OK, Finding, Place, look  # noqa: E402


def main(arguments: Sequence[str], environ: Mapping[str, str], place: Place | None = None) -> int:
    """Prints the findings; returns the exit status."""
    if not set(arguments) <= {"--json"}:
        print(__doc__)
        return 0 if {"-h", "--help"} & set(arguments) else 2
    place = place or look(environ, ROOT)
    findings = [(name, found) for name, check in CHECKS.items() for found in check(place)]
    if arguments:
        print(
            json.dumps([{"check": name, **found._asdict()} for name, found in findings], indent=1)
        )
    else:
        print("\n".join(_text(name, found) for name, found in findings))
    verdicts = [found.verdict for _, found in findings]
    if not arguments:
        print(
            f"{len(verdicts)} checks: "
            + ", ".join(
                f"{verdicts.count(verdict)} {verdict}"
                for verdict in dict.fromkeys([FAIL, *verdicts])
            )
        )
    return int(FAIL in verdicts)


def _text(name: str, found: Finding) -> str:
    """A line, and below it what to do."""
    line = f"{found.verdict:<5} {name}: {found.text}"
    return line if found.verdict == OK or not found.fix else f"{line}\n      fix: {found.fix}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
