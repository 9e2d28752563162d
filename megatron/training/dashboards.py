"""TensorBoard and Weights & Biases: optional, off with one line logged where they cannot start."""

from __future__ import annotations

import importlib
import json
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from megatron.config.schema import RunConfig, options
from megatron.training.events import groups, scalars
from megatron.training.metrics_file import MetricsRecord

log = logging.getLogger(__name__)


class TensorBoardTracker:
    """Writes a record's numbers into an event file."""

    def __init__(self, writer: Any, parameters: int) -> None:
        self._writer = writer
        self._parameters = parameters

    def log(self, record: MetricsRecord) -> None:
        """Adds one point per number; a rollback first purges those of the steps it undoes."""
        if record["event"] == "rollback":
            self._purge_after(record["iteration"])
        # One event for all of them: `add_scalar` makes one each and takes ten times as long.
        summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        numbers = scalars(record, self._parameters).items()
        points = [summary.Value(tag=name, simple_value=float(value)) for name, value in numbers]
        if points:
            self._writer.file_writer.add_summary(summary(value=points), record["iteration"])
        if record["event"] == "sample":
            self._writer.add_text("sample", sample_markdown(record), record["iteration"])

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()

    def _purge_after(self, iteration: int) -> None:
        """As `purge_step` does at a start: TensorBoard drops the points after the step."""
        events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        session = events.SessionLog(status=events.SessionLog.START)
        self._writer.file_writer.add_event(events.Event(session_log=session), iteration + 1)


class WandbTracker:
    """Sends a record's numbers to a Weights & Biases run."""

    def __init__(self, wandb: Any, client: Any, parameters: int) -> None:
        self._wandb = wandb
        self._client = client
        self._parameters = parameters
        for group in groups():
            client.define_metric(f"{group}/*", step_metric=f"{group}/iteration")

    def log(self, record: MetricsRecord) -> None:
        """Adds one row, if the record has numbers or a text to show."""
        row: dict[str, Any] = {**scalars(record, self._parameters)}
        if record["event"] == "sample":
            columns = ["iteration", "prompt", "text"]
            table = self._wandb.Table(columns=columns, data=[[record[name] for name in columns]])
            row = {"sample/text": table, "sample/iteration": record["iteration"]}
        if row:
            self._client.log(row)

    def close(self) -> None:
        """Ends the run and waits until all of it is sent or on disk."""
        self._client.finish()
        # `finish` returns before the client's own process has written an offline run's last block,
        # and the end of a batch job may kill that process.
        self._wandb.teardown()


def sample_markdown(record: MetricsRecord) -> str:
    """A sampled text, its lines and spaces as they are: TensorBoard reads four spaces as code."""
    text = f"{record['prompt']}[...]{record['text']}"
    return "\n".join(f"    {line}" for line in text.splitlines())


def start_tensorboard(run: RunConfig, iteration: int) -> TensorBoardTracker | None:
    """TensorBoard in TENSORBOARD_DIR, else in the run's folder, or None where it is off.

    Args:
        run: configuration; its folder exists.
        iteration: steps done before; what an earlier start wrote about later ones is purged.
    """
    if run.log.no_tensorboard:
        return None
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        log.info(f"TensorBoard is off: {error} (pip install tensorboard)")
        return None
    # A file that cannot be written is the tracker's failure, not the run's.
    try:
        writer = tensorboard.SummaryWriter(
            run.log.tensorboard_dir or str(run.run_folder / "tensorboard"),
            purge_step=iteration + 1,
            flush_secs=30,
        )
    except OSError as error:
        log.warning(f"TensorBoard is off: {error}")
        return None
    return TensorBoardTracker(writer, run.parameters)


def start_wandb(run: RunConfig, iteration: int) -> WandbTracker | None:
    """Weights & Biases, or None where it is off.

    The run's id is kept in <folder>/wandb/run_id, so that a resumed run continues there. The client
    keeps the step itself; `iteration` is not needed.
    """
    mode, folder = run.log.wandb_mode, run.run_folder
    if run.log.wandb_disabled or mode == "disabled":
        return None
    level = logging.INFO if mode is None else logging.WARNING  # requested, so its absence matters
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        log.log(level, f"Weights & Biases is off: {error}")
        return None
    # The client fails in many ways without a network or with a stale key; none is worth a run.
    try:
        if mode != "offline" and not wandb.login(prompt=False):
            log.log(
                level,
                "Weights & Biases is off: no API key (run `wandb login`, or set"
                " WANDB_MODE=offline)",
            )
            return None
        identity = _run_id(folder / "wandb" / "run_id")
        client = wandb.init(
            project=run.log.wandb_project,
            name=run.log.wandb_exp_name or folder.name,
            id=identity,
            resume="allow",
            mode=mode or "online",
            dir=str(folder),
            config=wandb_config(run),
            # output.log holds the console already.
            settings=wandb.Settings(console="off", silent=True),
        )
        if client.url:  # an offline run has none
            log.info(f"Weights & Biases run: {client.url}")
            (folder / "wandb" / "run_url").write_text(f"{client.url}\n", encoding="utf-8")
        return WandbTracker(wandb, client, run.parameters)
    except Exception as error:
        log.warning(
            f"Weights & Biases is off: {type(error).__name__}: {error} "
            "(WANDB_MODE=offline needs no network)"
        )
        return None


def wandb_config(run: RunConfig) -> dict[str, Any]:
    """What dashboards filter by: `args.<field>` and `env.<VARIABLE>` of all options, and the place.

    MODEL_ARCH is the label with the layers; `args.model_arch` is the preset.
    """
    args: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    for option in options():
        section, _, name = option.key.partition(".")
        value = args[name] = getattr(getattr(run, section), name)
        if option.env and value is not None:
            environment[option.env[0]] = value
    environment["MODEL_ARCH"] = run.label
    began = run.run_folder / "wandb" / "run_id"
    seconds = began.stat().st_mtime if began.exists() else time.time()
    return {
        "args": args,
        "env": environment,
        "machine": run.machine,
        "hosts": _hosts(run.run_folder / "run.json"),
        "created_at": time.strftime("%Y-%m-%d-%H%M%S", time.localtime(seconds)),
        "num_params": run.parameters,
    }


def _hosts(path: Path) -> list[str]:
    """The hosts that run.json names; none where the launcher is not ours."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    return list(record.get("provenance", {}).get("hosts", []))


def _run_id(path: Path) -> str:
    """The id in `path`, made and written there at the first start."""
    if path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    identity = secrets.token_hex(4)
    path.write_text(f"{identity}\n", encoding="utf-8")
    return identity
