"""Saver: commits steps, at once or behind the steps to come, with the same bytes either way.

Each rank writes its tensors into `step-N.tmp-<id of the start>`; rank 0 adds the data record, the
piece index and the manifest, and renames the folder. Threads touch files only, never a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, Generic, TypeVar

from megatron.checkpoint.atomic import write_atomically
from megatron.checkpoint.manifest import (
    DATA,
    FORMAT,
    MANIFEST,
    PIECES,
    TENSORS,
    DamageError,
    problem,
    read_manifest,
    seal,
)
from megatron.checkpoint.piece_index import Record, build_index
from megatron.checkpoint.rank_file import Digest, HostCopy, RankFile, write_file
from megatron.checkpoint.retention import REMOVING, Retention, remove_expired, remove_leftovers
from megatron.checkpoint.store import move_aside, step_folder
from megatron.checkpoint.tensors import plan_file
from megatron.parallel.control import Control
from megatron.parallel.piece import Piece

SHOWN_ERRORS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Saved:
    """A save that has come to its end: the same on all ranks but for the seconds, each rank's own.

    Attributes:
        iteration: the step.
        path: its folder; None where it is not committed.
        error: why it is not committed.
        bytes: of all its files.
        held_s: seconds that the steps waited for it.
        elapsed_s: seconds from its beginning to its end.
    """

    iteration: int
    path: Path | None
    error: str
    bytes: int
    held_s: float
    elapsed_s: float


@dataclass(frozen=True)
class _Written:
    """One rank's file as it lies on the disk."""

    name: str
    digest: Digest
    records: Sequence[Record]


@dataclass
class _Save:
    """A save in flight.

    Attributes:
        began: on the clock of `time.perf_counter`.
        held_s: so far.
        task: what this rank does in the present phase.
        committing: the phase after writing, in which rank 0 commits.
    """

    iteration: int
    about: Mapping[str, Any]
    data: Sequence[Any]
    began: float
    held_s: float
    task: _Task
    committing: bool = False


class Saver:
    """Saves of one start of a run; all ranks call the same methods in the same order.

    Args:
        root: folder of checkpoints, on a file system that all ranks share.
        control: all ranks.
        retention: what is kept after a commit.
        asynchronous: hold the steps for the copy to the host's memory only.
        warn: called on rank 0, also from a thread, with what does not make a save fail.
        tick: called from the main thread while it writes or waits.
        in_use: gives the checkpoints that are being read, which must not be removed yet.
    """

    def __init__(
        self,
        root: Path,
        control: Control,
        retention: Retention,
        *,
        asynchronous: bool,
        warn: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
        in_use: Callable[[], Collection[Path]] = tuple,
    ) -> None:
        self._root, self._control, self._retention = root, control, retention
        self._asynchronous, self._warn = asynchronous, warn
        self._tick, self._in_use = tick, in_use
        self._id = control.broadcast(uuid.uuid4().hex[:8] if control.rank == 0 else None)
        self._host = HostCopy()
        self._losses: dict[int, float | None] = {}
        self._save: _Save | None = None
        if control.rank == 0:
            left = [*root.glob("step-*.tmp*"), *root.glob(f"step-*{REMOVING}")]
            remove_leftovers(left, warn)

    @property
    def in_flight(self) -> bool:
        """Whether a save has not come to its end; the same on all ranks."""
        return self._save is not None

    @property
    def pending(self) -> bool:
        """Whether this rank still works on the present phase; no collective."""
        return self._save is not None and not self._save.task.done

    def save(
        self,
        iteration: int,
        pieces: Iterable[Piece],
        about: Mapping[str, Any],
        data: Sequence[Any],
    ) -> Saved | None:
        """Begins the save of a step, and ends it too where saves are not asynchronous.

        Args:
            iteration: number of the step.
            pieces: what this rank writes.
            about: further entries of the manifest, JSON-ready: `state` without the data, `model`,
                `optimizer`, `layout`, `run`, `counters`, `loss_scaler`, `validation_loss`.
            data: the record of the data, JSON-ready.

        Returns:
            How it ended; None where it is in flight.
        """
        assert self._save is None, "one save at a time: call wait() first"
        began = time.perf_counter()
        planned = _attempt(lambda: plan_file(pieces))
        size = planned.value[0].size if planned.value is not None else 0
        (needed,) = self._control.sum([size])
        refusal = None
        if self._control.rank == 0:
            refusal = _attempt(lambda: self._prepare(iteration, int(needed))).error
            refusal = refusal and f"rank 0: {refusal}"
        refusal = self._control.broadcast(refusal)
        if refusal:
            spent = time.perf_counter() - began
            return Saved(iteration, None, _failure(iteration, [refusal]), 0, spent, spent)
        task = self._writing(iteration, planned)
        self._save = _Save(iteration, about, data, began, time.perf_counter() - began, task)
        return None if self._asynchronous else self.wait()

    def advance(self) -> Saved | None:
        """The next phase of the save in flight; a collective, once no rank is `pending`.

        Returns:
            How it ended; None where rank 0 has now begun to commit it.
        """
        save = self._save
        assert save is not None, "no save is in flight"
        entered = time.perf_counter()
        saved: Saved | None = None
        if save.committing:
            outcome = save.task.outcome
            lost = Saved(save.iteration, None, _failure(save.iteration, [outcome.error]), 0, 0, 0)
            saved = self._control.broadcast(outcome.value or lost)
            self._save = None
        else:
            outcomes = self._control.gather(save.task.outcome)
            action = partial(self._finish, save, outcomes) if outcomes is not None else _nothing
            save.committing = True
            save.task = _Task(action, behind=self._asynchronous and outcomes is not None)
        now = time.perf_counter()
        save.held_s += now - entered
        if saved is None:
            return None
        held = save.held_s if self._asynchronous else now - save.began
        return replace(saved, held_s=held, elapsed_s=now - save.began)

    def wait(self) -> Saved | None:
        """Brings the save in flight to its end; a collective. None where there is none."""
        saved = None
        while self._save is not None:
            entered = time.perf_counter()
            self._save.task.join(self._tick)
            self._save.held_s += time.perf_counter() - entered
            saved = self.advance()
        return saved

    def _writing(self, iteration: int, planned: _Outcome[tuple[RankFile, list[Record]]]) -> _Task:
        """The task that writes this rank's file, its copy to the host already made."""
        rank, world = self._control.rank, self._control.size
        path = self._temporary(iteration) / f"rank-{rank:05d}-of-{world:05d}.safetensors"

        def copied() -> tuple[RankFile, list[Record]]:
            file, records = planned.get()
            return (self._host.of(file) if self._asynchronous else file), records

        ready = _attempt(copied)
        tick = _nothing if self._asynchronous else self._tick

        def write() -> _Written:
            file, records = ready.get()
            return _Written(path.name, write_file(path, file, tick), records)

        return _Task(write, behind=self._asynchronous)

    def _prepare(self, iteration: int, needed: int) -> None:
        """An empty folder to write into, with room for `needed` bytes; on rank 0."""
        final, temporary = step_folder(self._root, iteration), self._temporary(iteration)
        if final.exists():
            try:
                read_manifest(final, iteration)
            except DamageError as error:
                self._warn(f"{error}: set aside as {move_aside(final).name}")
            else:
                raise FileExistsError(f"{final} is already committed")
        self._root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._root).free
        if free < needed:
            raise OSError(
                f"it needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free at {self._root};"
                " make room, or keep fewer checkpoints with KEEP_LAST"
            )
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()

    def _finish(self, save: _Save, outcomes: Sequence[_Outcome[_Written]]) -> Saved:
        """Commits what the ranks have written, or removes it; on rank 0."""
        errors = [f"rank {n}: {one.error}" for n, one in enumerate(outcomes) if one.error]
        final, temporary = step_folder(self._root, save.iteration), self._temporary(save.iteration)
        if not errors:
            written = [one.get() for one in outcomes]
            committed = _attempt(lambda: self._commit(save, written, temporary, final))
            if committed.value is not None:
                self._after_commit(save, final)
                return Saved(save.iteration, final, "", committed.value, 0.0, 0.0)
            errors = [f"rank 0: {committed.error}"]
        shutil.rmtree(temporary, ignore_errors=True)
        return Saved(save.iteration, None, _failure(save.iteration, errors), 0, 0.0, 0.0)

    def _commit(
        self, save: _Save, written: Sequence[_Written], temporary: Path, final: Path
    ) -> int:
        """One rename after everything is on the disk; returns the bytes of all files."""
        files = {one.name: _entry(TENSORS, one.digest) for one in written}
        index = build_index([one.name for one in written], (one.records for one in written))
        for role, value in ((DATA, list(save.data)), (PIECES, index.to_dict())):
            content = json.dumps(value).encode()
            write_atomically(temporary / f"{role}.json", content)
            digest = Digest(len(content), hashlib.sha256(content).hexdigest())
            files[f"{role}.json"] = _entry(role, digest)
        manifest = {"format": FORMAT, "iteration": save.iteration, **save.about, "files": files}
        text = seal(manifest)
        wrong = problem(json.loads(text), save.iteration)
        if wrong:
            raise ValueError(f"its manifest {wrong}")
        write_atomically(temporary / MANIFEST, text)
        _flush(temporary)
        os.rename(temporary, final)
        return len(text) + sum(int(entry["bytes"]) for entry in files.values())

    def _after_commit(self, save: _Save, final: Path) -> None:
        """What may fail without harm to the step that is committed."""
        named = {"latest": final.name, "latest_checkpointed_iteration.txt": str(save.iteration)}
        self._losses[save.iteration] = save.about.get("validation_loss")
        actions: list[Callable[[], None]] = [
            partial(_flush, self._root),
            *(partial(write_atomically, self._root / name, text) for name, text in named.items()),
            lambda: remove_expired(
                self._root,
                self._retention,
                save.iteration,
                self._losses,
                self._warn,
                self._in_use(),
            ),
        ]
        for action in actions:
            error = _attempt(action).error
            if error:
                self._warn(f"step {save.iteration} is saved, but: {error}")

    def _temporary(self, iteration: int) -> Path:
        final = step_folder(self._root, iteration)
        return final.with_name(f"{final.name}.tmp-{self._id}")


class _FailedError(Exception):
    """An earlier action of this rank failed; the message is its error."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """The value of an action, or its error in words."""

    value: T | None
    error: str = ""

    def get(self) -> T:
        """The value; where there is none, the error is raised."""
        if self.value is None:
            raise _FailedError(self.error)
        return self.value


def _attempt(action: Callable[[], T]) -> _Outcome[T]:
    """What an action gives; whatever it raises must reach the other ranks, not end this one."""
    try:
        return _Outcome(action())
    except (OSError, _FailedError) as error:
        return _Outcome(None, str(error))
    except Exception as error:
        return _Outcome(None, f"{type(error).__name__}: {error}")


class _Task:
    """An action, in a thread of its own where `behind`, and its outcome."""

    def __init__(self, action: Callable[[], Any], *, behind: bool) -> None:
        self.outcome: _Outcome[Any] = _Outcome(None)
        self._action = action
        # A daemon: a process that must end does not wait for a disk.
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True) if behind else None
        if self._thread is None:
            self._run()
        else:
            self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the outcome is known."""
        return self._thread is None or not self._thread.is_alive()

    def join(self, tick: Callable[[], None]) -> None:
        """Returns once it is done."""
        while not self.done and self._thread is not None:
            self._thread.join(0.2)
            tick()

    def _run(self) -> None:
        self.outcome = _attempt(self._action)
        self._action = _nothing  # its tensors are free


def _nothing() -> None:
    """Does nothing."""


def _failure(iteration: int, errors: Sequence[str]) -> str:
    more = f"; and {len(errors) - SHOWN_ERRORS} more ranks" if len(errors) > SHOWN_ERRORS else ""
    return f"step {iteration} was not saved: {'; '.join(errors[:SHOWN_ERRORS])}{more}"


def _entry(role: str, digest: Digest) -> dict[str, Any]:
    return {"role": role, "bytes": digest.bytes, "sha256": digest.sha256}


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
