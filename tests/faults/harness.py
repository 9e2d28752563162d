"""Starts runs as `bash train_alcf.sh` does, in a second instead of ten, to break them.

The launcher is a real process with its real code; its ranks are forked by a warm server
(`fork_server.py`) instead of importing torch each. Signals, kills, statuses, pipes and files are
those of a user's run.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from megatron.data.indexed import IndexedWriter
from megatron.training.metrics_file import read

T = TypeVar("T")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VOCAB_SIZE = 160
STARTED_WITHIN_S = 120.0
CASES_AT_ONCE = 2

TINY = {
    "NLAYERS": "2", "HIDDEN": "32", "HEADS": "4", "NUM_KV_HEAD": "2", "FFN_HIDDEN_SIZE": "48",
    "SEQ": "16", "VOCAB_SIZE": str(VOCAB_SIZE), "TOKENIZER_TYPE": "NullTokenizer", "DTYPE": "fp32",
    "GLOBAL_BATCH": "8", "MICRO_BATCH": "2", "TRAIN_ITERS": "12", "LR_DECAY_ITERS": "12",
    "EVAL_INTERVAL": "0", "SAVE_INTERVAL": "4", "OPT": "adamw", "LR": "0.01", "COMPILE": "0",
    "NO_TENSORBOARD": "1", "WANDB_MODE": "disabled", "LAUNCH_WITH": "local",
}  # fmt: skip

LAYOUTS = {
    "one": {"WORLD_SIZE": "1"},
    "tp2": {"TP": "2", "WORLD_SIZE": "2"},
    "pp2": {"PP": "2", "WORLD_SIZE": "2"},
    "dp2": {"WORLD_SIZE": "2"},
    "zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
    "tp2-pp2": {"TP": "2", "PP": "2", "WORLD_SIZE": "4"},
    "tp2-dp2": {"TP": "2", "WORLD_SIZE": "4"},
    "dp4": {"WORLD_SIZE": "4"},
}


@dataclass
class Ended:
    """How a start ended: exit status, all that it printed, seconds that it took."""

    status: int
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line on the screen."""
        return self.output.strip().splitlines()[-1] if self.output.strip() else ""


@dataclass
class Started:
    """A start that may still be running.

    Attributes:
        launcher: the process that a user's shell waits for.
        folder: of the run.
        scratch: pids of the ranks and the screen.
    """

    launcher: subprocess.Popen[bytes]
    folder: Path
    scratch: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def output(self) -> str:
        """All that was printed so far."""
        return (self.scratch / "screen").read_text(errors="replace")

    def running(self) -> bool:
        """Whether the launcher has not ended."""
        return self.launcher.poll() is None

    def pid(self, rank: int) -> int:
        """The process of a rank; waits until it exists."""
        path = self.scratch / f"rank-{rank}.pid"
        self.wait_until(path.exists)
        return int(path.read_text())

    def signal(self, number: int, rank: int | None = None) -> None:
        """Sends a signal to a rank, to the launcher if None; one that has ended gets none."""
        with contextlib.suppress(ProcessLookupError):
            if rank is None:
                self.launcher.send_signal(number)
            else:
                os.kill(self.pid(rank), number)

    def wait_until(self, true: Callable[[], Any], within_s: float = STARTED_WITHIN_S) -> bool:
        """Waits for a condition; False where the run ended before.

        Raises:
            AssertionError: neither happened in time.
        """
        until = time.monotonic() + within_s
        while not true():
            if not self.running():
                return bool(true())
            assert time.monotonic() < until, f"not in {within_s} s:\n{self.output}"
            time.sleep(0.01)
        return True

    def wait_for(self, moment: str, least: int = 0, within_s: float = STARTED_WITHIN_S) -> bool:
        """Waits until rank 0 is in a moment, a step number at least (hooks.moments)."""
        note = self.scratch / moment

        def reached() -> bool:
            return note.exists() and int(note.read_text() or 0) >= least

        return self.wait_until(reached, within_s)

    def step(self) -> int:
        """The step that rank 0 began last."""
        return int((self.scratch / "step").read_text())

    def wait(self, within_s: float = STARTED_WITHIN_S) -> Ended:
        """Waits for the end.

        Raises:
            AssertionError: it did not come in time.
        """
        try:
            status = self.launcher.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {within_s} s:\n{self.output}") from None
        status = status if status >= 0 else 128 - status
        return Ended(status, self.output, time.monotonic() - self.began)


@contextmanager
def started(
    folder: Path,
    *flags: str,
    hooks: Iterable[str] = (),
    tiny: Mapping[str, str] = MappingProxyType(TINY),
    **variables: str,
) -> Iterator[Started]:
    """Starts a run; whatever is left of it at the end is killed.

    Args:
        folder: of the run.
        flags: of train_alcf.sh.
        hooks: functions of `hooks.py` that every rank calls before it starts.
        tiny: variables of every start.
        variables: of train_alcf.sh, over those; an empty one is left out.
    """
    with tempfile.TemporaryDirectory(prefix="faults-start-") as scratch:
        environ = environment(folder, Path(scratch), hooks, {**tiny, **variables})
        command = [sys.executable, str(HERE / "launcher.py"), *flags]
        with open(Path(scratch) / "screen", "wb") as screen:
            launcher = subprocess.Popen(
                command,
                env=environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=screen,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield Started(launcher, folder, Path(scratch))
        finally:
            if launcher.poll() is None:
                launcher.kill()  # the ranks die with it
            launcher.wait()


def train(folder: Path, *flags: str, within_s: float = STARTED_WITHIN_S, **variables: Any) -> Ended:
    """A start from its beginning to its end; arguments as of `started`."""
    with started(folder, *flags, **variables) as run:
        return run.wait(within_s)


def environment(
    folder: Path, scratch: Path, hooks: Iterable[str], variables: Mapping[str, str]
) -> dict[str, str]:
    """Variables of a start: a login shell's, the tiny run's, and the harness' own."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "FAULTS_PYTHON": str(server().interpreter),
        "FAULTS_PIDS": str(scratch),
        "FAULTS_HOOK": ",".join(f"tests.faults.hooks:{name}" for name in hooks),
        **{k: v for k, v in {"RUN_DIR": str(folder), **variables}.items() if v},
    }


class _Server:
    """The fork server, started by the first case and ended with this process."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-server-"))
        self.interpreter = self.folder / "python"
        socket = self.folder / "socket"
        words = [sys.executable, "-I", "-S", str(HERE / "client.py"), str(socket)]
        self.interpreter.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        self.interpreter.chmod(0o755)
        one_thread = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server", str(socket)],
            cwd=ROOT,
            env={
                **os.environ,
                **dict.fromkeys(one_thread, "1"),
                "TORCHDYNAMO_DISABLE": "1",
                "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "",
                "PYTHONUNBUFFERED": "1",
                "PYTHONPATH": str(ROOT),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        until = time.monotonic() + STARTED_WITHIN_S
        while not socket.exists():
            assert self.process.poll() is None and time.monotonic() < until, "no fork server"
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.kill()  # its ranks die with it
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_SERVERS: list[_Server] = []


def server() -> _Server:
    """The fork server of this process."""
    if not _SERVERS:
        _SERVERS.append(_Server())
        atexit.register(_SERVERS[0].stop)
    return _SERVERS[0]


def write_data(folder: Path, files: int = 2, tokens: int = 6000) -> Path:
    """A list of small files that a tiny model can learn: each token mostly decides the next."""
    rng = np.random.default_rng(7)
    follows = rng.permutation(VOCAB_SIZE)
    lines = []
    for number in range(files):
        prefix = folder / f"part_{number}"
        with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
            for _ in range(tokens // 40):
                document = [int(rng.integers(VOCAB_SIZE))]
                while len(document) < 40:
                    document.append(int(follows[document[-1]]))
                writer.add_document(np.array(document))
        lines.append(f"1 {prefix} corpus_{number}\n")
    path = folder / "list.txt"
    path.write_text("".join(lines))
    return path


def steps(folder: Path, event: str = "step") -> list[int]:
    """Numbers of a run's steps in metrics.jsonl, in order."""
    return [row["iteration"] for row in read(folder / "metrics.jsonl") if row["event"] == event]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss."""
    return {
        row["iteration"]: row["loss"]
        for row in read(folder / "metrics.jsonl")
        if row["event"] == "step"
    }


def committed(folder: Path) -> list[int]:
    """Steps whose folder has its final name and a manifest."""
    return sorted(
        int(path.parent.name.removeprefix("step-"))
        for path in (folder / "checkpoints").glob("step-*/manifest.json")
        if path.parent.name.removeprefix("step-").isdecimal()
    )


def step_folder(folder: Path, step: int) -> Path:
    """Folder of a committed step."""
    return folder / "checkpoints" / f"step-{step:08d}"


def tensor_digests(folder: Path, step: int) -> dict[str, str]:
    """File name -> SHA-256 of every tensors file of a step."""
    files = sorted(step_folder(folder, step).glob("*.safetensors"))
    assert files, f"{step_folder(folder, step)} has no tensors"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def digests(folder: Path, *but: str) -> dict[str, str]:
    """Path -> SHA-256 of every file below a folder, except those named `but`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in but
    }


def not_finite(folder: Path) -> list[str]:
    """Tensors of any checkpoint of a run that hold a NaN or an infinity."""
    from safetensors.numpy import load_file

    return [
        f"{path.parent.name}/{path.name}: {name}"
        for path in (folder / "checkpoints").glob("step-*/*.safetensors")
        for name, value in load_file(path).items()
        if value.dtype.kind == "f" and not np.isfinite(value).all()
    ]


def each(case: Callable[[T], str | None], cases: Iterable[T]) -> None:
    """Runs cases, some at once; fails with the findings of all that found something.

    Args:
        case: returns what is wrong, None or "" where nothing is; an AssertionError is a finding.
        cases: their arguments.
    """

    def finding(argument: T) -> str | None:
        try:
            found = case(argument)
        except AssertionError as error:
            found = str(error) or "assertion"
        return f"--- {argument}: {found}" if found else None

    cases = list(cases)
    assert cases
    server()
    with ThreadPoolExecutor(CASES_AT_ONCE) as pool:
        findings = [one for one in pool.map(finding, cases) if one]
    assert not findings, f"{len(findings)} of {len(cases)} cases:\n" + "\n".join(findings)


def signal_name(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def load_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())
