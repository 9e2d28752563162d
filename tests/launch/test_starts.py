"""A start changes a run's files only once it is accepted, and has one owner all the time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import read_run
from megatron.launch import start, starts
from megatron.launch.claim import CLAIM_FILE
from tests.config.helpers import resolved

ROOT = Path(__file__).resolve().parents[2]

ACCEPT = """
import os, sys, time
from pathlib import Path
from megatron.launch.starts import accept, is_accepted
config = Path(sys.argv[2])
def accepted():
    if os.environ["RANK"] == "0":
        accept(config, config.parents[1])
    while not is_accepted(config):
        time.sleep(0.02)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("megatron.launch.site.count_accelerators", lambda environ: 0)
    monkeypatch.setattr(start, "PROGRAM", tmp_path / "program.py")
    return tmp_path / "here"


def begin(program: str, *argv: str, **environ: str) -> int:
    """Start a program in the place of the training; its exit status."""
    start.PROGRAM.write_text(ACCEPT + program, encoding="utf-8")
    return start.main(argv, {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ})


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file: what it holds, and when it was changed."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_start_is_kept_once_it_is_accepted(tmp_path: Path) -> None:
    run = resolved(RUN_DIR=tmp_path / "run")
    with starts.pending(run, {"job": "7"}) as config:
        assert config == tmp_path / "run" / "starts" / "0001.pending.json"
        assert read_run(config) == run.run
        assert [*content(tmp_path)] == ["run/starts/0001.pending.json"]
        assert not starts.is_accepted(config)
        starts.accept(config, run.run.run_folder)
        assert starts.is_accepted(config)
        before = content(tmp_path)
        starts.accept(config, run.run.run_folder)  # its ranks were started again
        assert content(tmp_path) == before
    assert {*content(tmp_path / "run")} == {"run.json", "ds_config.json", "starts/0001.json"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["provenance"] == {"job": "7"}
    assert starts.next_start(tmp_path / "run").name == "0002.pending.json"


def test_starts_count_on_from_the_newest(tmp_path: Path) -> None:
    (tmp_path / "starts").mkdir()
    for name in ("0002.json", "10000.json", "0009.pending.json", "notes.json"):
        (tmp_path / "starts" / name).write_text("{}")
    assert starts.next_start(tmp_path).name == "10001.pending.json"


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    run = resolved(RUN_DIR=tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError, match="RUN_DIR"), starts.pending(run, {}):
        pass


@pytest.mark.parametrize("status", [0, 2, 3, 4])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_refused_or_empty_start_changes_no_file(here: Path, status: int, ranks: str) -> None:
    """Neither of a run that is there, nor does it leave one that was not."""
    refuse = f"print('no'); sys.exit({status})\n"
    assert begin(refuse, "--run-dir", "new", "--tp", ranks) == status
    assert [*here.iterdir()] == []
    assert begin("accepted()\nprint('steps')\n", "--run-dir", "run") == 0
    before = content(here)
    assert {*before} == {
        f"run/{name}"
        for name in ("run.json", "ds_config.json", "output.log", "starts/0001.json")
    }  # fmt: skip
    assert begin(refuse, "--run-dir", "run", "--lr", "0.5", "--tp", ranks) == status
    assert content(here) == before
    assert not (here / "run" / "checkpoints").exists()
    assert begin("accepted()\nprint('steps')\n", "--run-dir", "run", "--lr", "0.5") == 0
    assert read_run("run/run.json").optimizer.learning_rate == 0.5
    assert read_run("run/starts/0001.json").optimizer.learning_rate != 0.5
    assert read_run("run/starts/0002.json") == read_run("run/run.json")
    log = (here / "run" / "output.log").read_text()
    assert log.count("steps\n") == 2
    assert "no\n" not in log


@pytest.mark.parametrize("end", ["sys.exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_crash_before_that_leaves_its_log_alone(here: Path, end: str) -> None:
    assert begin(f"print('hello')\nsys.stdout.flush()\n{end}\n", "--run-dir", "run") in (1, 137)
    assert {*content(here)} == {"run/output.log"}
    assert "hello\n" in (here / "run" / "output.log").read_text()


def test_the_log_has_what_came_before_the_acceptance(here: Path) -> None:
    program = "print('before')\naccepted()\nprint('after')\nsys.exit(2)\n"
    assert begin(program, "--run-dir", "run") == 2
    log = (here / "run" / "output.log").read_text()
    assert log.index("launch command: ") < log.index("before\n") < log.index("after\n")


def test_a_host_file_lasts_as_long_as_its_start(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A stand-in for Open MPI's launcher prints the file that it is given."""
    (tmp_path / "bin").mkdir()
    launcher = tmp_path / "bin" / "mpirun"
    launcher.write_text(
        '#!/bin/bash\nwhile (($#)) && [[ $1 != --hostfile ]]; do shift; done\n(($#)) && cat "$2"\n'
    )
    monkeypatch.setattr(start, "require_hosts", lambda job: None)  # there are none of these names
    launcher.chmod(0o755)
    (tmp_path / "hosts").write_text("n1\nn2\n")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    environ = {"HOSTFILE": str(tmp_path / "hosts"), "LAUNCH_WITH": "mpirun", "NGPU_PER_HOST": "2"}
    assert begin("", "--run-dir", "run", PATH=path, **environ) == 0
    assert capfd.readouterr().out.endswith("n1 slots=2\nn2 slots=2\n")
    assert [*here.iterdir()] == []


LAUNCH = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from megatron.launch import start
start.PROGRAM = Path(sys.argv[1])
sys.exit(start.main(sys.argv[2:], os.environ))
"""


def launched(tmp_path: Path, program: str, *argv: str) -> subprocess.Popen[str]:
    """The launcher as a process of its own."""
    (tmp_path / "program.py").write_text(ACCEPT + program, encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(tmp_path / "program.py"), *argv],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


TRAIN = "accepted()\nopen(config.parents[1] / 'ready', 'w').close()\ntime.sleep(100)\n"


def ready(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_second_start_is_refused_and_a_killed_one_followed(tmp_path: Path) -> None:
    first = launched(tmp_path, TRAIN, "--run-dir", "run")
    try:
        ready(tmp_path / "run" / "ready")
        before = content(tmp_path / "run")
        second = launched(tmp_path, TRAIN, "--run-dir", "run", "--lr", "0.5")
        text = second.communicate(timeout=60)[0]
        assert second.returncode == 2
        assert f"run is in use by process {first.pid}" in text
        assert "train_alcf.sh --run-dir run" in text
        after = content(tmp_path / "run")
        for name in (CLAIM_FILE, f"checkpoints/{CLAIM_FILE}"):  # renewed
            assert before.pop(name)[0] == after.pop(name)[0]
        assert after == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    third = launched(tmp_path, "accepted()\n", "--run-dir", "run")
    text = third.communicate(timeout=60)[0]
    assert third.returncode == 0, text
    assert f"took over the claim of process {first.pid}" in text
    names = {*content(tmp_path / "run")}
    assert {"starts/0001.json", "starts/0002.json"} <= names
    assert not {name for name in names if "claim" in name or "pending" in name}


def test_runs_that_share_checkpoints_exclude_each_other(tmp_path: Path) -> None:
    """Whichever of the two keeps them in its own folder."""
    inside, outside = ("--run-dir", "a"), ("--run-dir", "b", "--save", "a/checkpoints")
    for one, other in ((inside, outside), (outside, inside)):
        first = launched(tmp_path, TRAIN, *one)
        try:
            ready(tmp_path / one[1] / "ready")
            second = launched(tmp_path, TRAIN, *other)
            text = second.communicate(timeout=60)[0]
            assert second.returncode == 2
            assert f"a/checkpoints is in use by process {first.pid}" in text
            assert not (tmp_path / other[1] / CLAIM_FILE).exists()
        finally:
            first.terminate()
            first.communicate(timeout=60)
        (tmp_path / one[1] / "ready").unlink()


def test_three_starts_at_once_are_one(tmp_path: Path) -> None:
    program = "accepted()\nprint('training', flush=True)\ntime.sleep(3)\n"
    together = [launched(tmp_path, program, "--run-dir", "run") for _ in range(3)]
    texts = [process.communicate(timeout=60)[0] for process in together]
    assert sorted(process.returncode for process in together) == [0, 2, 2], texts
    assert sum("training\n" in text for text in texts) == 1
    assert [path.name for path in (tmp_path / "run" / "starts").iterdir()] == ["0001.json"]
