"""Which MPI's mpiexec or mpirun is on PATH: they have the same names and other options."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Mapping

from megatron.launch.command import HYDRA, INTEL, OPEN_MPI, PALS

TIMEOUT_S = 5.0

# Part of what `--version` prints, in lower case -> dialect; the first match counts.
SAYS = (
    ("intel(r) mpi", INTEL),
    ("hydra", HYDRA),
    ("open mpi", OPEN_MPI),
    ("openrte", OPEN_MPI),
    ("open-mpi", OPEN_MPI),
    ("prrte", OPEN_MPI),
    ("pals", PALS),
)

Ask = Callable[[str], "str | None"]
"""Takes mpiexec or mpirun, gives its dialect; None where it is not there or not known."""


def asker(environ: Mapping[str, str]) -> Ask:
    """Asks the commands on the PATH of `environ`, each once.

    Args:
        environ: the environment's variables; without PATH nothing is found.
    """
    path = environ.get("PATH", "")
    return functools.cache(lambda name: _ask(name, path, dict(environ)))


def _ask(name: str, path: str, environ: dict[str, str]) -> str | None:
    command = shutil.which(name, path=path) if path else None
    if command is None:
        return None
    said = _says(command, "--version", environ)
    found = next((dialect for part, dialect in SAYS if part in said), None)
    if found is None and "--line-buffer" in _says(command, "--help", environ):
        return PALS
    return found


def _says(command: str, option: str, environ: dict[str, str]) -> str:
    """What a launcher prints, in lower case; empty where it does not end in time."""
    try:
        done = subprocess.run(
            [command, option],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.lower()
