"""TensorBoard and Weights & Biases: optional, off with one line logged where they cannot start."""

from __future__ import annotations

import importlib
import logging
import math
from pathlib import Path
from typing import Any

from megatron.config.schema import RunConfig
from megatron.training import metrics_file, wandb_settings
from megatron.training.events import groups, points, scalars
from megatron.training.metrics_file import MetricsRecord

log = logging.getLogger(__name__)

FINISH_S = 120
"""W&B may send for so long at the end; what is left then is on disk, for `wandb sync`."""

BEST = ("val/best lm loss", "val/best iteration")  # in the summary
TEXTS = ("prompt", "text")  # of a sampled text


class TensorBoardTracker:
    """Writes a record's numbers into an event file."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, record: MetricsRecord) -> None:
        """Adds one point per number; a rollback first purges those of the steps it undoes."""
        if record["event"] == "rollback":
            self._purge_after(record["iteration"])
        if TEXTS[-1] in record:
            self._writer.add_text("sample", _quoted(record), record["iteration"])
        # One event for all of them: `add_scalar` makes one each and takes ten times as long.
        summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        values = [
            summary.Value(tag=name, simple_value=float(value))
            for name, value in points(record).items()
        ]
        if values:
            self._writer.file_writer.add_summary(summary(value=values), record["iteration"])

    def configure(self, run: RunConfig, iteration: int) -> None:
        """Adds the configuration, as text and for the table of hyperparameters."""
        given = wandb_settings.variables(run)
        rows = "".join(f"| {name} | {value} |\n" for name, value in given.items())
        self._writer.add_text("configuration", f"| option | value |\n|---|---|\n{rows}", iteration)
        summary = importlib.import_module("torch.utils.tensorboard.summary")
        for one in summary.hparams(given, dict.fromkeys(("loss/lm loss", "val/lm loss"))):
            self._writer.file_writer.add_summary(one, iteration)

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()

    def _purge_after(self, iteration: int) -> None:
        """As `purge_step` does at a start: TensorBoard drops the points after the step."""
        events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        session = events.SessionLog(status=events.SessionLog.START)
        self._writer.file_writer.add_event(events.Event(session_log=session), iteration + 1)


class WandbTracker:
    """Sends a record's numbers to a Weights & Biases run.

    W&B's own step is the iteration. It only grows, so after a rollback, or a crash behind the
    checkpoint, it runs ahead by the steps that are done again; `<group>/iteration` is always true.

    Args:
        wandb: the module.
        client: of the run.
        run: the configuration.
        iteration: steps done before.
    """

    def __init__(self, wandb: Any, client: Any, run: RunConfig, iteration: int) -> None:
        self._wandb, self._client, self._parameters = wandb, client, run.parameters
        self._metrics = run.run_folder / "metrics.jsonl"
        self._last = client.step - 1  # that W&B has
        self._ahead = max(0, self._last - iteration)
        self._best = math.inf, 0
        self._summarize(best_validation(self._metrics))
        self._samples: list[list[Any]] = []
        for group in groups():
            client.define_metric(f"{group}/*", step_metric=f"{group}/iteration")

    def log(self, record: MetricsRecord) -> None:
        """Adds to the row of the iteration, which is sent when the next one begins."""
        row: dict[str, Any] = dict(scalars(record, self._parameters))
        if TEXTS[-1] in record:
            self._samples.append([record.get(name) for name in ("iteration", *TEXTS)])
            columns = ["iteration", *TEXTS]
            row["samples"] = self._wandb.Table(columns=columns, data=self._samples[-100:])
        self._last = max(self._last, record["iteration"] + self._ahead)
        if row:
            self._client.log(row, step=self._last)
        if record["event"] == "rollback":
            self._ahead = self._last - record["iteration"]
            self._summarize(best_validation(self._metrics))
        if record["event"] == "eval" and record["split"] == "validation":
            self._summarize(min(self._best, _score(record)))

    def close(self) -> None:
        """Ends the run and waits until all of it is sent or on disk."""
        self._client.finish()
        # `finish` returns before the client's own process has written an offline run's last block,
        # and the end of a batch job may kill that process.
        self._wandb.teardown()

    def _summarize(self, best: tuple[float, int]) -> None:
        known, self._best = self._best, best
        if best != known and best[0] < math.inf:
            self._client.summary.update(dict(zip(BEST, best, strict=True)))


def best_validation(path: Path) -> tuple[float, int]:
    """Lowest validation loss of a metrics.jsonl, and its step; (inf, 0) where there is none."""
    if not path.exists():
        return math.inf, 0
    with path.open(encoding="utf-8", errors="replace") as file:
        found = [metrics_file.decode(line) for line in file if '"event": "eval"' in line]
    return min((_score(r) for r in found if r["split"] == "validation"), default=(math.inf, 0))


def _score(record: MetricsRecord) -> tuple[float, int]:
    loss = record["loss"]
    return (loss if math.isfinite(loss) else math.inf), record["iteration"]


def _quoted(record: MetricsRecord) -> str:
    return "\n\n".join(f"    {record.get(name)}".replace("\n", "\n    ") for name in TEXTS)


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
    folder = run.log.tensorboard_dir or str(run.run_folder / "tensorboard")
    # A file that cannot be written is the tracker's failure, not the run's.
    try:
        writer = tensorboard.SummaryWriter(folder, purge_step=iteration + 1, flush_secs=30)
        tracker = TensorBoardTracker(writer)
        tracker.configure(run, iteration)
    except OSError as error:
        log.warning(f"TensorBoard is off: {error}")
        return None
    return tracker


def start_wandb(run: RunConfig, iteration: int) -> WandbTracker | None:
    """Weights & Biases, or None where it is off.

    The run's id is kept in <folder>/wandb/run_id, so that a resumed run continues there. Without a
    network the run is written to disk, to be sent later.

    Args:
        run: configuration; its folder exists.
        iteration: steps done before.
    """
    mode = run.log.wandb_mode
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
        client = _client(wandb, run, mode or "online")
        if client is None:
            log.log(
                level,
                "Weights & Biases is off: no API key (run `wandb login`, or set"
                " WANDB_MODE=offline)",
            )
            return None
        if not client.offline:
            log.info(f"Weights & Biases run: {client.url}")
            address = run.run_folder / "wandb" / "run_url"
            address.write_text(f"{client.url}\n", encoding="utf-8")
        return WandbTracker(wandb, client, run, iteration)
    except Exception as error:
        log.warning(
            f"Weights & Biases is off: {type(error).__name__}: {error} "
            "(WANDB_MODE=offline needs no network)"
        )
        return None


def _client(wandb: Any, run: RunConfig, mode: str) -> Any:
    """W&B's client, offline where it cannot be reached; None without a key."""
    quiet = {"console": "off", "silent": True}  # output.log holds the console already
    try:
        settings = wandb.Settings(**quiet, finish_timeout=FINISH_S)
    except ValueError:  # an older W&B has no such limit
        settings = wandb.Settings(**quiet)
    try:
        if mode != "offline" and not wandb.login(prompt=False):
            return None
        return wandb.init(mode=mode, settings=settings, **wandb_settings.arguments(run))
    except Exception as error:
        if mode == "offline":
            raise
        log.warning(
            f"Weights & Biases cannot be reached ({type(error).__name__}: {error}): the run is "
            f"written to {run.log.wandb_dir or run.run_folder}/wandb; `wandb sync` sends it later"
        )
        return _client(wandb, run, "offline")
