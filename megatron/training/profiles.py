"""PROFILE: some steps of some ranks, looked at by torch's profiler or by pyinstrument."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.config import profile as chosen
from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.training.trainer import Trainer

log = logging.getLogger(__name__)

SAMPLED_S = 0.001  # between two samples of pyinstrument
ROWS = 40  # of torch's table


class TorchProfile:
    """A Chrome trace of all kernels, and a table of those that took longest."""

    def __init__(self) -> None:
        profiler: Any = torch.profiler
        self._profile = profiler.profile(activities=profiler.supported_activities())
        self._step: Any = None

    def start(self) -> None:
        """Begins to record."""
        self._profile.start()

    def step(self, iteration: int) -> None:
        """Marks the beginning of a step in the trace."""
        self._end_step()
        self._step = torch.profiler.record_function(f"step {iteration}")
        self._step.__enter__()

    def stop(self) -> None:
        """Ends recording; waits for the device."""
        self._end_step()
        self._profile.stop()

    def write(self, stem: str) -> list[Path]:
        """Writes both files; `stem` is their path without an ending."""
        trace, table = Path(f"{stem}.json.gz"), Path(f"{stem}.txt")
        self._profile.export_chrome_trace(str(trace))
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        averages = self._profile.key_averages()
        order = f"self_{device.type}_time_total"
        table.write_text(averages.table(sort_by=order, row_limit=ROWS), encoding="utf-8")
        return [trace, table]

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None


class CallTree:
    """Where the host's main thread spends its time, by samples of its stack."""

    def __init__(self) -> None:
        pyinstrument = importlib.import_module("pyinstrument")
        self._profiler = pyinstrument.Profiler(interval=SAMPLED_S, async_mode="disabled")

    def start(self) -> None:
        """Begins to sample."""
        self._profiler.start()

    def step(self, iteration: int) -> None:
        """A call tree has no steps."""

    def stop(self) -> None:
        """Ends sampling."""
        self._profiler.stop()

    def write(self, stem: str) -> list[Path]:
        """Writes both files; `stem` is their path without an ending."""
        page, text = Path(f"{stem}.html"), Path(f"{stem}.txt")
        page.write_text(self._profiler.output_html(), encoding="utf-8")
        text.write_text(self._profiler.output_text(unicode=True), encoding="utf-8")
        return [page, text]


PROFILERS: dict[str, Callable[[], TorchProfile | CallTree]] = {
    "torch": TorchProfile,
    "pyinstrument": CallTree,
}


class Profile:
    """Profiles the steps `first` to `last` of a trainer; what follows the last belongs to it."""

    def __init__(self, trainer: Trainer, first: int, last: int) -> None:
        log_settings = trainer.run.log
        self._trainer, self._first, self._last = trainer, first, last
        self._profiler = PROFILERS[log_settings.profile]()
        self._folder = Path(log_settings.trace_dir or trainer.run.run_folder / "profile")
        self._began = self._done = 0  # steps

    def before_step(self, iteration: int) -> None:
        """Begins with the first of the steps, ends before the one behind the last."""
        if self._began and not self._done and iteration > self._last:
            self.end(iteration - 1)
        if not self._began and self._first <= iteration <= self._last:
            self._began = iteration
            log.info(f"profiling from step {iteration} on, whose times are longer for it")
            self._profiler.start()
        if self._began and not self._done:
            self._profiler.step(iteration)

    def end(self, iteration: int) -> None:
        """Writes what was recorded; `iteration` was the last step. A failure is a warning."""
        if not self._began or self._done:
            return
        self._done = iteration
        self._trainer.heartbeat.enter("profile", iteration)
        name = f"steps-{self._began}-{iteration}-rank-{self._trainer.control.rank}"
        with self._trainer.meter.off_the_clock():
            self._profiler.stop()
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                files = self._profiler.write(str(self._folder / name))
            except (OSError, RuntimeError) as error:
                log.warning(f"the profile is not written: {error}")
                return
        log.info(f"profile of steps {self._began} to {iteration}: {', '.join(map(str, files))}")


def require_profiler(run: RunConfig) -> None:
    """Refuses a profiler that is not installed; alike on all ranks.

    Raises:
        ConfigError: it is missing.
    """
    if run.log.profile == "pyinstrument" and not importlib.util.find_spec("pyinstrument"):
        raise ConfigError(
            "PROFILE=pyinstrument needs its package: pip install pyinstrument, or PROFILE=torch"
        )


@contextmanager
def profiled(trainer: Trainer) -> Iterator[None]:
    """Inside it, steps of the trainer are profiled as the run asks, on the ranks that it names."""
    run, rank = trainer.run, trainer.control.rank
    settings, world = run.log, run.parallel.world_size
    if settings.profile == "off" or rank not in chosen.ranks(settings.profile_ranks, world):
        yield
        return
    last = run.train.train_iters
    profile = Profile(trainer, *chosen.steps(settings.profile, settings.profile_steps, last))
    trainer.changes.append(profile.before_step)
    try:
        yield
    finally:
        profile.end(trainer.state.iteration)
