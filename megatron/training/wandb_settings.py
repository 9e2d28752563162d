"""What Weights & Biases is told of a run: its identity, and the configuration panels filter by."""

from __future__ import annotations

import json
import secrets
import time
from pathlib import Path
from typing import Any

from megatron.config.schema import RunConfig, options


def arguments(run: RunConfig) -> dict[str, Any]:
    """Those of `wandb.init` that identify and describe the run; its first start makes the id."""
    settings, folder = run.log, run.run_folder
    tags = settings.wandb_tags
    return {
        "project": settings.wandb_project,
        "name": settings.wandb_exp_name or folder.name,
        "id": _run_id(folder / "wandb" / "run_id", settings.wandb_run_id),
        "resume": "allow",
        "dir": settings.wandb_dir or str(folder),
        "group": settings.wandb_group,
        "tags": [run.label, run.machine] if tags is None else tags.replace(",", " ").split(),
        "notes": settings.wandb_notes,
        "config": configuration(run),
    }


def configuration(run: RunConfig) -> dict[str, Any]:
    """What dashboards filter by: `args.<field>` and `env.<VARIABLE>` of all options, and the place.

    MODEL_ARCH is the label with the layers; `args.model_arch` is the preset.
    """
    values = {option.key.partition(".")[2]: _value(run, option.key) for option in options()}
    began = run.run_folder / "wandb" / "run_id"
    seconds = began.stat().st_mtime if began.exists() else time.time()
    return {
        "args": values,
        "env": variables(run),
        "machine": run.machine,
        "hosts": _hosts(run.run_folder / "run.json"),
        "created_at": time.strftime("%Y-%m-%d-%H%M%S", time.localtime(seconds)),
        "num_params": run.parameters,
    }


def variables(run: RunConfig) -> dict[str, Any]:
    """Variable -> value of every option that has both; MODEL_ARCH is the label with the layers."""
    found = {one.env[0]: _value(run, one.key) for one in options() if one.env}
    known = {name: value for name, value in found.items() if value is not None}
    return known | {"MODEL_ARCH": run.label}


def _value(run: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(run, section), name)


def _hosts(path: Path) -> list[str]:
    """The hosts that run.json names; none where the launcher is not ours."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return list(record.get("provenance", {}).get("hosts", []))


def _run_id(path: Path, chosen: str | None) -> str:
    """The id that was chosen, else the one in `path`; what holds is written there."""
    kept = path.read_text(encoding="utf-8").strip() if path.exists() else None
    identity = chosen or kept or secrets.token_hex(4)
    if identity != kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{identity}\n", encoding="utf-8")
    return identity
