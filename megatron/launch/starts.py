"""The starts of a run: each keeps its configuration, `starts/0001.json` and so on.

A start is pending until its resume is accepted and a step is to be made. One that is refused, or
finds nothing to do, changes no file of the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron.checkpoint.atomic import write_atomically
from megatron.config.deepspeed import deepspeed_config
from megatron.config.errors import ConfigError
from megatron.config.resolve import Resolved
from megatron.config.schema import RUN_FILE, read_run

STARTS = "starts"
HOSTFILE = "hostfile"  # beside a pending start, where its launcher needs one
DEEPSPEED_FILE = "ds_config.json"
PENDING = ".pending.json"


def next_start(run_folder: Path) -> Path:
    """The pending configuration of the start that comes next; only a run's owner makes it."""
    accepted = (path.stem for path in (run_folder / STARTS).glob("*.json"))
    newest = max((int(stem) for stem in accepted if stem.isdecimal()), default=0)
    return run_folder / STARTS / f"{newest + 1:04d}{PENDING}"


def is_pending(config: Path) -> bool:
    """Whether `config` is of a start that a launcher has begun, and so owns the run."""
    return config.name.endswith(PENDING)


def is_accepted(config: Path) -> bool:
    """Whether the start with the pending configuration `config` was accepted."""
    with suppress(OSError):  # a file system in trouble: asked again with the next line
        return _kept(config).exists()
    return False


@contextmanager
def pending(resolved: Resolved, origin: Mapping[str, Any]) -> Iterator[Path]:
    """Write the configuration of a start, with its provenance `origin`, for as long as it lasts.

    Raises:
        ConfigError: where the run's folder cannot be written.
    """
    record = {
        "config": resolved.run.to_dict(),
        "sources": [f"{key}: {source}" for key, source in sorted(resolved.sources.items())],
        "provenance": dict(origin),
    }
    path = next_start(resolved.run.run_folder)
    try:
        with _refused_as_setting():
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_pending(path.parent)  # of starts that were killed
            write_atomically(path, json.dumps(record, indent=2) + "\n")
        yield path
    finally:
        with suppress(OSError):
            _remove_pending(path.parent)
            path.parent.rmdir()  # empty where no start was ever accepted


def accept(config: Path, run_folder: Path) -> None:
    """Keep a pending start: the run now is what it says.

    Writes `ds_config.json`, `run.json` and, last, the start's own file. For rank 0, once a
    resume is accepted and a step is to be made. Nothing is done for a configuration that is not
    pending (given by hand), nor for a start accepted before (its ranks were started again).

    Raises:
        ConfigError: where the run's folder cannot be written.
    """
    if not is_pending(config) or is_accepted(config):
        return
    run = read_run(config)
    with _refused_as_setting():
        content = config.read_bytes()
        ds_config = json.dumps(deepspeed_config(run), indent=2) + "\n"
        write_atomically(run_folder / DEEPSPEED_FILE, ds_config)
        write_atomically(run_folder / RUN_FILE, content)
        write_atomically(_kept(config), content)


def _remove_pending(folder: Path) -> None:
    for path in (*folder.glob(f"*{PENDING}"), folder / HOSTFILE):
        path.unlink(missing_ok=True)


def _kept(config: Path) -> Path:
    """The file that a pending start becomes."""
    return config.with_name(config.name.removesuffix(PENDING) + ".json")


@contextmanager
def _refused_as_setting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error}. Set RUN_DIR to a folder that can be"
        ) from None
