"""`bash train_alcf.sh` from outside: equal layouts, going on, statuses, signals, dead ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron.config.schema import read_run
from megatron.training.metrics_file import read
from tests.e2e.front_door import TINY, command, environment, tool, train

EQUAL = {"OPT": "sgd", "LR": "0.1", "CLIP_GRAD": "0.3", "EVAL_INTERVAL": "0", "SAVE_INTERVAL": "0"}


@pytest.mark.long
def test_layouts_are_equal_and_said_to_be(tmp_path: Path) -> None:
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    assert train({**EQUAL, "RUN_DIR": one}).returncode == 0
    result = train({**EQUAL, "RUN_DIR": many, "TP": "2", "PP": "2"})
    assert result.returncode == 0, result.stdout
    assert min(row["grad_norm"] for row in read(Path(one) / "metrics.jsonl")[:4]) > 0.3
    compared = tool("compare_runs.py", one, many, "--assert-equal", "1e-5")
    assert compared.returncode == 0, compared.stdout
    # The same tool says no where the runs differ.
    other = str(tmp_path / "other")
    assert train({**EQUAL, "RUN_DIR": other, "LR": "0.2"}).returncode == 0
    assert tool("compare_runs.py", one, other, "--assert-equal", "1e-5").returncode == 1


def test_a_run_goes_on_and_says_when_it_is_done(tmp_path: Path) -> None:
    run = {"RUN_DIR": str(tmp_path / "run"), "SAVE_INTERVAL": "2"}
    first = train({**run, "TRAIN_ITERS": "4"})
    assert first.returncode == 0, first.stdout
    for word in ("==== ARCHITECTURE ====", "Sample from the model", "report.html", "TRAIN_ITERS=8"):
        assert word in first.stdout
    more = train({**run, "TRAIN_ITERS": "6"})
    assert more.returncode == 0 and "resumed from" in more.stdout
    steps = [
        row["iteration"]
        for row in read(tmp_path / "run" / "metrics.jsonl")
        if row["event"] == "step"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]

    # A flipped bit in the newest checkpoint: named, and the step before is used.
    damaged = next((tmp_path / "run" / "checkpoints" / "step-00000006").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    result = train({**run, "TRAIN_ITERS": "5"})
    assert result.returncode == 0
    assert f"{damaged} differs from what was written" in result.stdout
    assert "step-00000004" in result.stdout


def test_only_an_accepted_start_changes_a_run_and_resume_needs_its_name_alone(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    variables = {"RUN_DIR": str(run), "TRAIN_ITERS": "2", "EVAL_INTERVAL": "0"}
    assert train(variables).returncode == 0

    def content() -> dict[str, tuple[bytes, int]]:
        files = (path for path in run.rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    before = content()
    done = train({**variables, "LOG_INTERVAL": "2"})
    assert (done.returncode, "has done its 2 steps" in done.stdout) == (0, True)
    another = train({**variables, "LR": "0.5"})
    assert (another.returncode, "add RUN_DIR=" in another.stdout) == (2, True)
    refused = train({**variables, "NLAYERS": "2"})
    assert (refused.returncode, "NLAYERS 4 -> 2" in refused.stdout) == (2, True)
    other = train({**variables, "LOAD": str(tmp_path / "nowhere")})
    assert (other.returncode, "which began without LOAD" in other.stdout) == (2, True)
    assert content() == before

    more = subprocess.run(
        command("--resume", str(run)),
        env=environment({"TRAIN_ITERS": "3"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert more.returncode == 0, more.stdout
    assert "changed: TRAIN_ITERS 2 -> 3, " in more.stdout
    assert f"TRAIN_ITERS=6 bash train_alcf.sh --resume {run}" in more.stdout
    assert [row["iteration"] for row in read(run / "metrics.jsonl") if row["event"] == "step"] == [
        1,
        2,
        3,
    ]
    one, two = (read_run(run / "starts" / f"000{number}.json") for number in (1, 2))
    assert one.model == two.model and one.train.train_iters + 1 == two.train.train_iters
    assert read_run(run / "run.json") == two


def test_statuses(tmp_path: Path) -> None:
    missing = train(
        {"RUN_DIR": str(tmp_path / "a"), "LOAD": str(tmp_path / "nowhere")},
        "--exit-on-missing-checkpoint",
    )
    assert missing.returncode == 4, missing.stdout
    assert "does not exist" in missing.stdout.strip().splitlines()[-1]


@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize(
    ("variables", "status", "word"),
    [
        ({"TP": "3", "HEADS": "8", "HIDDEN": "64"}, 2, "TP"),
        ({"PP": "2", "ZERO_STAGE": "3"}, 2, "ZERO_STAGE"),
        ({"MODEL_ARCH": "3B"}, 2, "MODEL_ARCH"),
        ({"GLOBAL_BATCH": "7"}, 2, "GLOBAL_BATCH"),
        ({"DATA_FILE_LIST": "missing.txt"}, 3, "DATA_FILE_LIST"),
        ({"TRAIN_RANGE_TO_SKIP": "10 20 25"}, 2, "TRAIN_RANGE_TO_SKIP"),
    ],
)
def test_wrong_settings_start_nothing(
    variables: dict[str, str], status: int, word: str, tmp_path: Path
) -> None:
    # No interpreter with torch is needed, nor looked for: this is what a login node sees.
    env = {**environment(TINY), **variables, "RUN_DIR": str(tmp_path / "run")}
    began = time.perf_counter()
    result = subprocess.run(command(), env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == status
    assert word in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
    assert time.perf_counter() - began < 10  # a second on an idle host


def started(tmp_path: Path, **variables: str) -> subprocess.Popen[str]:
    """A long run that has taken its second step."""
    run = tmp_path / "run"
    env = environment({**TINY, "RUN_DIR": str(run), "TRAIN_ITERS": "100000", **variables})
    process = subprocess.Popen(
        command(), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            return process
        time.sleep(0.2)
    process.kill()
    raise AssertionError(f"the run did not start:\n{process.communicate()[0]}")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)]
)
def test_a_signal_saves_and_leaves(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path, TP="2", EVAL_INTERVAL="0", SAVE_INTERVAL="0")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert f"{number.name}: saved step" in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.flaky(reruns=1)
def test_a_dead_rank_takes_the_run_down(tmp_path: Path) -> None:
    process = started(tmp_path, TP="2", EVAL_INTERVAL="0", SAVE_INTERVAL="0")
    victim = rank_process(process.pid, "1")
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 128 + signal.SIGKILL, output
    assert "rank 1 failed with status 137" in output.splitlines()[-1], output[-2000:]


def rank_process(ancestor: int, rank: str) -> int:
    """The process of a rank of the run that `ancestor` started."""
    ours = variables_of(Path(f"/proc/{ancestor}"))
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            found = variables_of(entry)
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has ended meanwhile
        same_run = found.get("RUN_DIR") == ours["RUN_DIR"] and found.get("RANK") == rank
        if same_run and b"pretrain_gpt_alcf.py" in line:
            return int(entry.name)
    raise AssertionError(f"no process of rank {rank}")


def variables_of(entry: Path) -> dict[str, str]:
    """Environment of a process."""
    text = (entry / "environ").read_bytes().decode(errors="replace")
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
