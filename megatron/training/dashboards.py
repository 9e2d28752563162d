"""TensorBoard and Weights & Biases: optional, off with one line said where they cannot start."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.schema import LogConfig, RunConfig
from megatron.training.scalars import GROUPS, scalars

log = logging.getLogger(__name__)


class TensorBoardTracker:
    """Writes a record's numbers (scalars.py) into an event file."""

    def __init__(self, writer: Any, parameters: int) -> None:
        self._writer = writer
        self._parameters = parameters

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds one point a number."""
        for name, value in scalars(record, self._parameters).items():
            self._writer.add_scalar(name, value, record["iteration"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WandbTracker:
    """Sends a record's numbers (scalars.py) to a Weights & Biases run."""

    def __init__(self, wandb: Any, run: Any, parameters: int) -> None:
        self._wandb = wandb
        self._run = run
        self._parameters = parameters
        for group in GROUPS:
            run.define_metric(f"{group}/*", step_metric=f"{group}/iteration")

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds one row, if the record has numbers to show."""
        row = scalars(record, self._parameters)
        if row:
            self._run.log(row)

    def close(self) -> None:
        """Ends the run and waits until all of it is sent or on disk."""
        self._run.finish()
        # `finish` returns before the client's own process has written the last block of an offline
        # run, and that process may be killed together with a batch job.
        self._wandb.teardown()


def start_tensorboard(
    options: LogConfig, folder: Path, parameters: int, iteration: int
) -> TensorBoardTracker | None:
    """TensorBoard in `folder`, or None where it is off.

    Args:
        options: the `log` section of the configuration.
        folder: folder of the event files.
        parameters: parameters of the model.
        iteration: steps done before; what an earlier start wrote about later ones is purged.
    """
    if options.no_tensorboard:
        return None
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        log.info(f"TensorBoard is off: {error} (pip install tensorboard)")
        return None
    # A file's failure is the tracker's, not the run's (logs.Loggers says so for later ones).
    try:
        writer = tensorboard.SummaryWriter(str(folder), purge_step=iteration + 1, flush_secs=30)
    except OSError as error:
        log.warning(f"TensorBoard is off: {error}")
        return None
    return TensorBoardTracker(writer, parameters)


def start_wandb(run: RunConfig, folder: Path, parameters: int) -> WandbTracker | None:
    """Weights & Biases, or None where it is off.

    The run's id is kept in <folder>/wandb/run_id, so that a resumed run goes on in the same place.
    """
    mode = run.log.wandb_mode
    if run.log.wandb_disabled or mode == "disabled":
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        say = log.info if mode is None else log.warning
        say(f"Weights & Biases is off: {error}")
        return None
    # The client fails in many ways without a network or with a stale key; none is worth a run.
    try:
        if mode != "offline" and not wandb.login(prompt=False):
            say = log.info if mode is None else log.warning
            say(
                "Weights & Biases is off: no API key (run `wandb login`, or set WANDB_MODE=offline)"
            )
            return None
        client = wandb.init(
            project=run.log.wandb_project,
            name=folder.name,
            id=_run_id(folder / "wandb" / "run_id"),
            resume="allow",
            mode=mode or "online",
            dir=str(folder),
            config={**wandb_config(run), "num_params": parameters},
            settings=wandb.Settings(
                console="off", silent=True
            ),  # output.log already holds the console
        )
        return WandbTracker(wandb, client, parameters)
    except Exception as error:
        log.warning(
            f"Weights & Biases is off: {type(error).__name__}: {error} "
            "(WANDB_MODE=offline needs no network)"
        )
        return None


def wandb_config(run: RunConfig) -> dict[str, Any]:
    """What dashboards filter by: `args.<field>` and `env.<VARIABLE>` of all options, `machine`."""
    args: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    for section in dataclasses.fields(run):
        values = getattr(run, section.name)
        if not dataclasses.is_dataclass(values):
            continue
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            args[field.name] = value
            if field.metadata["env"] and value is not None:
                environment[field.metadata["env"][0]] = value
    return {"args": args, "env": environment, "machine": run.machine}


def _run_id(path: Path) -> str:
    """The id in `path`, made and written there at the first start."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = secrets.token_hex(4)
    path.write_text(f"{identity}\n", encoding="utf-8")
    return identity
