"""The first and the last thing that a rank does: quick answers before torch, its status at the end.

Importing torch and DeepSpeed takes seconds, in which a wrong place is to be refused and a signal
not to kill.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from megatron.config.errors import ConfigError, DataError
from megatron.launch.failure import end_line
from megatron.launch.ranks import EXPECTED, find_ranks
from megatron.launch.start import information, print_dry_run


def begin(argv: Sequence[str], environ: Mapping[str, str]) -> list[int]:
    """A list that SIGUSR1 is noted in until training listens.

    The other signals end a rank that has nothing to save, Ctrl-C without a traceback.

    Raises:
        SystemExit: `--help`, `--version` or a dry run is printed, or the place is refused.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    came: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: came.append(number))
    text = information(argv)
    if text is not None:
        print(text, end="")
        raise SystemExit(0)
    try:
        printed = print_dry_run(environ, argv, find_ranks(environ))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    if printed:
        raise SystemExit(0)
    return came


def run_to_end(main: Callable[[], int], environ: Mapping[str, str]) -> int:
    """Run `main`; returns its status, and tells it to our launcher."""
    ranks = find_ranks(environ)
    try:
        status = main()
    except Exception:
        status = 1
        prefix = f"[rank{ranks.rank}]: " if ranks.world_size > 1 else ""
        lines = traceback.format_exc().splitlines()
        print("\n".join(f"{prefix}{line}" for line in lines), file=sys.stderr)
    if environ.get(EXPECTED):
        print(end_line(ranks.rank, status), file=sys.stderr)
    return status
