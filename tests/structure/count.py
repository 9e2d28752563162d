"""Counts what a reader enters: the files of a training step, of a save, and of ZERO_STAGE's way.

A tiny run is traced: every file of which a function is called, and every file that defines a type
in the annotations of these functions. Whole files are counted. `python -m tests.structure.count`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = str(ROOT / "megatron") + os.sep
VARIABLE, FIELD = "ZERO_STAGE", "zero_stage"


@dataclass(frozen=True)
class Journey:
    """A way through the sources, with its limits.

    Attributes:
        title: for the printed table.
        entry: `module:function` whose call is traced; empty for the way of VARIABLE.
        own_file: whether the entry's file counts; peers' figures for a save leave the caller out.
        types: whether files count that only define types in the annotations of what is called.
        files, lines, folders: most that are allowed; 0 is no limit.
    """

    title: str
    entry: str
    own_file: bool
    types: bool
    files: int
    lines: int = 0
    folders: int = 0


JOURNEYS = {
    "step": Journey(
        "one training step", "megatron.training.trainer:Trainer.step", True, True, 30, 4350
    ),
    "save": Journey(
        "one save", "megatron.training.saving:save_checkpoint", False, False, 12, folders=4
    ),
    "setting": Journey(f"{VARIABLE} to the engine", "", True, False, 8),
}

RUN = {
    "MODEL_ARCH": "debug", "TRAIN_ITERS": "3", "SAVE_INTERVAL": "2", "EVAL_INTERVAL": "0",
    "COMPILE": "0", "NO_TENSORBOARD": "1", "WANDB_MODE": "disabled", VARIABLE: "1",
}  # fmt: skip
"""The default run, smaller: one process, three steps, nothing compiled, nothing evaluated."""


def count(files: dict[str, int]) -> tuple[int, int, int]:
    """(files, lines, folders) of a journey's table."""
    return len(files), sum(files.values()), len({Path(name).parent for name in files})


def over_limit(journey: str, files: dict[str, int]) -> list[str]:
    """What of a journey is above its limits, in words."""
    limits = JOURNEYS[journey]
    names = ("files", "lines", "folders")
    allowed = (limits.files, limits.lines, limits.folders)
    return [
        f"{limits.title}: {found} {name}, at most {most}"
        for name, found, most in zip(names, count(files), allowed, strict=True)
        if most and found > most
    ]


def measure(folder: Path) -> dict[str, dict[str, int]]:
    """Trace a run in a process of its own: journey -> file -> lines.

    Args:
        folder: for the run's files.
    """
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "PATH", "TMPDIR")}
    environ = {**kept, **RUN, "RUN_DIR": str(folder / "run"), "OMP_NUM_THREADS": "1"}
    result = folder / "journeys.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.structure.count", str(result)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        raise RuntimeError(f"the traced run failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, dict[str, int]] = json.loads(result.read_text())
    return found


def tables(journeys: dict[str, dict[str, int]]) -> str:
    """The tables that docs show."""
    blocks = []
    for name, files in journeys.items():
        number, lines, folders = count(files)
        head = f"{JOURNEYS[name].title}: {number} files, {lines:,} lines, {folders} folders"
        blocks.append("\n".join([head, *(f"{files[file]:6} {file}" for file in sorted(files))]))
    return "\n\n".join(blocks)


class _Calls:
    """The code of the sources' functions that are called while `watched` ones run."""

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Profiler: a call."""
        if event == "call" and frame.f_code.co_filename.startswith(SOURCE):
            self.codes.add(frame.f_code)

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls noted."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(self.note)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return call


def _replace(entry: str, change: Callable[[Any], Any]) -> Any:
    """Puts `change(function)` in the place of `module:dotted.name`; returns the function."""
    module, _, path = entry.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    function = getattr(owner, name)
    setattr(owner, name, change(function))
    return function


def _functions(namespace: dict[str, Any], module: str) -> Iterator[Any]:
    """Functions and methods that a module defines."""
    for value in list(namespace.values()):
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        value = inspect.unwrap(value) if callable(value) else value
        if inspect.isclass(value) and value.__module__ == module:
            yield from _functions(vars(value), module)
        elif inspect.isfunction(value):
            yield value


def _files_of_types(codes: set[CodeType]) -> set[str]:
    """Files of the sources that define the types in the annotations of functions."""
    files = set()
    for module in [m for name, m in list(sys.modules.items()) if name.startswith("megatron.")]:
        for function in _functions(vars(module), module.__name__):
            if function.__code__ not in codes:
                continue
            text = " ".join(str(value) for value in function.__annotations__.values())
            for name in re.findall(r"[A-Za-z_]\w*", text):
                kind = function.__globals__.get(name)
                if inspect.isclass(kind) and kind.__module__.startswith("megatron."):
                    files.add(str(sys.modules[kind.__module__].__file__))
    return files


def _stack(frame: FrameType | None) -> set[str]:
    """Files of the project that a frame was reached through, its own included."""
    files = set()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SOURCE) or file == str(ROOT / "pretrain_gpt_alcf.py"):
            files.add(file)
        frame = frame.f_back
    return files


def _setting_moments() -> dict[str, set[str]]:
    """Watches VARIABLE: parsed, read into the engine's settings, given to the engine."""
    from megatron.config import option, schema
    from megatron.engine.sharded import ShardedEngine

    moments: dict[str, set[str]] = {}
    parse, initialize = option.Option.parse, ShardedEngine.__init__

    def parsed(self: option.Option, text: str, name: str) -> Any:
        if name == VARIABLE:
            own = {parse.__code__.co_filename}
            moments.setdefault("parsed", own | _stack(sys._getframe(1)))
        return parse(self, text, name)

    def read(self: Any, name: str) -> Any:
        if name == FIELD:
            caller = sys._getframe(1)
            if caller.f_code.co_name == "sharded":
                moments["read"] = _stack(caller)
        return object.__getattribute__(self, name)

    def given(*args: Any, **kwargs: Any) -> None:
        moments["given"] = _stack(sys._getframe(1)) | {initialize.__code__.co_filename}
        initialize(*args, **kwargs)

    option.Option.parse = parsed  # type: ignore[method-assign]
    schema.ParallelConfig.__getattribute__ = read  # type: ignore[method-assign, assignment]
    ShardedEngine.__init__ = given  # type: ignore[method-assign, assignment]
    return moments


def _trace() -> dict[str, dict[str, int]]:
    """Runs RUN in this process: the launcher's half, then the only rank's."""
    from megatron.launch import start

    calls = {name: _Calls() for name, journey in JOURNEYS.items() if journey.entry}
    entries = {name: _replace(JOURNEYS[name].entry, noted.watched) for name, noted in calls.items()}
    moments = _setting_moments()
    folder = Path(os.environ["RUN_DIR"])
    start.PROGRAM = folder.with_name("nothing.py")  # the rank is this process
    start.PROGRAM.write_text(
        "import sys\nfrom pathlib import Path\nfrom megatron.launch.starts import accept\n"
        "accept(Path(sys.argv[2]), Path(sys.argv[2]).parents[1])\n"
    )
    assert start.main([], {**os.environ, "PYTHONPATH": str(ROOT)}) == 0
    assert set(moments) == {"parsed"}, sorted(moments)
    threading.setprofile(calls["step"].note)  # the thread that reads ahead
    program = importlib.import_module("pretrain_gpt_alcf")
    config = shutil.copy(folder / "starts/0001.json", folder / "starts/0001.pending.json")
    assert program.main(["--config", config]) == 0  # as a launcher starts ranks again
    assert set(moments) == {"parsed", "read", "given"}, sorted(moments)

    found = {}
    for name, noted in calls.items():
        files = {code.co_filename for code in noted.codes}
        if JOURNEYS[name].types:
            files |= _files_of_types(noted.codes)
        if not JOURNEYS[name].own_file:
            files.discard(entries[name].__code__.co_filename)
        found[name] = files
    # The script that users call and the file that declares the option belong to the way.
    ends = {str(ROOT / "train_alcf.sh"), str(ROOT / "megatron" / "config" / "schema.py")}
    found["setting"] = ends.union(*moments.values())
    return {
        name: {
            str(Path(file).relative_to(ROOT)): len(Path(file).read_text().splitlines())
            for file in sorted(files)
        }
        for name, files in found.items()
    }


if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(_trace()))
    else:
        with tempfile.TemporaryDirectory() as _folder:
            print(tables(measure(Path(_folder))))
