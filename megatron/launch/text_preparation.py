"""Prepares the user's own text (DATA) before the ranks start, in a process of its own.

That process needs the libraries of the environment, which this one does not, and owns the terminal
meanwhile: Ctrl-C reaches it too, and it keeps what was done.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import survey_of
from megatron.config.schema import RunConfig
from megatron.config.text_settings import of_run
from megatron.data.own_text import require_same

PROGRAM = "megatron.data.prepare.prepare_text"
PATIENCE_S = 1.0


def prepare_text(run: RunConfig, environ: Mapping[str, str], root: Path) -> int:
    """Prepare what DATA names, unless it is prepared.

    Args:
        run: the configuration.
        environ: for the process.
        root: the project's folder.

    Returns:
        0, or the status to end with: the process has printed why.

    Raises:
        DataError: the text is gone, too short, or no longer what the run was resolved for.
    """
    own = of_run(run)
    if own is None:
        return 0
    require_same(own, run.data.data_file_list)
    path = f"{root}:{environ['PYTHONPATH']}" if environ.get("PYTHONPATH") else str(root)
    child = subprocess.Popen(
        [sys.executable, "-m", PROGRAM, own.to_json()],
        env={**environ, "PYTHONPATH": path},
    )
    if status := _ended(child):
        return status
    survey_of(run).require()  # it may be too short: known before the ranks are started
    return 0


def _ended(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # a terminal has told the process as well, `kill` has not
            with suppress(subprocess.TimeoutExpired):
                return child.wait(PATIENCE_S)
            child.send_signal(signal.SIGINT)


def require_text(run: RunConfig, environ: Mapping[str, str], root: Path) -> None:
    """As `prepare_text`; raises an error with the status of the process where that is not 0."""
    if status := prepare_text(run, environ, root):
        raise (DataError if status == DataError.exit_status else ConfigError)(
            f"DATA={run.data.data} is not prepared (status {status}, see above)"
        )
