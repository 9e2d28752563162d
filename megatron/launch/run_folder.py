"""run.json and ds_config.json of a run's folder: written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.deepspeed import deepspeed_config
from megatron.config.errors import ConfigError
from megatron.config.resolve import Resolved
from megatron.config.schema import RunConfig

RUN_FILE = "run.json"
DEEPSPEED_FILE = "ds_config.json"


def write_run(resolved: Resolved, origin: Mapping[str, Any]) -> Path:
    """Make the run's folder and write what it was started with.

    Args:
        resolved: the configuration.
        origin: its provenance.

    Returns:
        The path of run.json.

    Raises:
        ConfigError: where the folder cannot be written.
    """
    run = resolved.run
    folder = run.run_folder
    record = {
        "config": run.to_dict(),
        "sources": [f"{key}: {source}" for key, source in sorted(resolved.sources.items())],
        "provenance": dict(origin),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DEEPSPEED_FILE, deepspeed_config(run))
        write_json(folder / RUN_FILE, record)
    except OSError as error:
        raise ConfigError(
            f"the run's folder cannot be written: {error}. Set RUN_DIR to a folder that can be"
        ) from None
    return folder / RUN_FILE


def require_writable(folder: Path) -> None:
    """Try what a run will do: only the file system itself knows.

    Raises:
        ConfigError: where `folder` cannot be made or written; nothing is left behind.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error.strerror}: {existing}). "
            f"Set RUN_DIR or CKPT_DIR to a folder that can be"
        ) from None


def read_run(path: str | Path) -> RunConfig:
    """The configuration in a run.json.

    Raises:
        ConfigError: where it cannot be read or is not one of this version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ConfigError(f"--config {path} is not a run.json: it has no section 'config'")
    return RunConfig.from_dict(record["config"])


def write_json(path: Path, value: Any) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """The same for text.

    Raises:
        OSError: where it cannot be written; the old file then stays.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
