"""tools/sweep.py with a program in the place of train_alcf.sh that ends as it is told."""

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
from tools import sweep
from tools.sweeping import sweep_rows

PROGRAM = r"""
echo $$ > pid
echo "$NLAYERS $RUN_DIR $RUN_NAME" >> started
mkdir -p "$RUN_DIR"
case $NLAYERS in
  1) echo '{"event": "stop", "iteration": 2, "reason": "finished"}' > "$RUN_DIR/metrics.jsonl" ;;
  2) echo "torch.OutOfMemoryError: CUDA out of memory"; exit 1 ;;
  3) exit 124 ;;
  4) exec sleep 30 ;;
  5) rmdir "$RUN_DIR"; echo "error: NLAYERS=5 is one too many"; exit 2 ;;
esac
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train_alcf.sh").write_text(PROGRAM)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    return tmp_path


def run(place: Path, *words: str, **variables: str) -> int:
    environ = {"PATH": os.environ["PATH"], **variables}
    return sweep.main(["--runs", str(place / "runs"), "--name", "s", *words], environ)


def started(place: Path) -> list[str]:
    path = place / "started"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[0] for line in lines]


def test_every_row_has_its_status_and_the_sweep_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["NLAYERS=1,2,3,4,5", "--minutes", "0.005"]
    assert run(place, *words, "--format", "json") == 1
    text = capsys.readouterr().out
    rows = json.loads(text[text.index("{\n") :])["rows"]
    assert [(row["run"], row["status"]) for row in rows] == [
        ("NLAYERS1", "finished"),
        ("NLAYERS2", "OOM"),
        ("NLAYERS3", "hung"),
        ("NLAYERS4", "stopped after 0.005 min"),
        ("NLAYERS5", "setting refused"),
    ]
    assert "error: NLAYERS=5 is one too many" in text
    assert "<table>" in (place / "runs" / "s" / "table.html").read_text()
    assert started(place) == ["1", "2", "3", "4", "5"]
    # Again: nothing is run twice; with --retry what failed, and a row that is new.
    assert run(place, *words) == 1
    assert started(place) == []
    assert run(place, "NLAYERS=1,2,6", "--retry") == 1
    assert started(place) == ["2", "6"]


def test_rows_of_other_settings_are_not_added(place: Path) -> None:
    assert run(place, "NLAYERS=1", SEQ="32") == 0
    assert run(place, "NLAYERS=1,2", SEQ="64") == 2
    assert run(place, "NLAYERS=1,2", "--", "--lr", "1") == 2
    assert started(place) == ["1"]


def test_a_dry_run_prints_the_commands(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(place, "NLAYERS=4,8", "GAS=1,2", "--dry-run", "--", "--lr", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    folder = place / "runs" / "s"
    assert lines[1] == (
        f"NLAYERS=4 GAS=2 RUN_NAME=s-NLAYERS4-GAS2 RUN_DIR={folder}/NLAYERS4-GAS2 "
        "bash train_alcf.sh --lr 1"
    )
    assert len(lines) == 4 and not (place / "runs").exists()


def test_rows_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("NLAYERS PIPELINE_CUTS # names\n\n4 2,2\n8 3,5\n")
    rows = sweep_rows.from_file(path)
    assert rows == [
        {"NLAYERS": "4", "PIPELINE_CUTS": "2,2"},
        {"NLAYERS": "8", "PIPELINE_CUTS": "3,5"},
    ]
    assert sweep_rows.named(rows[0]) == "NLAYERS4-PIPELINE_CUTS2_2"
    path.write_text("NLAYERS GAS\n4\n")
    with pytest.raises(ConfigError, match=":2: 1 values for 2 names"):
        sweep_rows.from_file(path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to sweep"),
        (["NLAYERS"], "write NAME=value,value"),
        (["NLAYRES=1"], "Did you mean NLAYERS"),
        (["RUN_NAME=a,b"], "RUN_NAME is set by the sweep"),
        (["--rows", "/no/such"], "--rows /no/such"),
    ],
)
def test_what_is_refused(
    place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, *words) == 2
    assert said in capsys.readouterr().err
    assert started(place) == []


@pytest.mark.parametrize("start_s", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_row_and_leaves_it_for_the_next_start(
    place: Path, number: signal.Signals, start_s: int
) -> None:
    """One that comes while the row is started, too, which takes long on a busy host."""
    code = (
        "import subprocess, sys, time; from pathlib import Path; from tools import sweep\n"
        "class Slow(subprocess.Popen):\n"
        "    def __init__(self, *words, **options):\n"
        f"        super().__init__(*words, **options); time.sleep({start_s})\n"
        "subprocess.Popen = Slow\n"
        "sweep.ROOT = Path(sys.argv[1]); sweep.listen(); "
        "sys.exit(sweep.main(sys.argv[2:], {'PATH': '/usr/bin:/bin'}))"
    )
    words = ["NLAYERS=4", "--runs", str(place / "runs"), "--name", "s"]
    process = subprocess.Popen([sys.executable, "-c", code, str(place), *words])
    for _ in range(400):
        if (place / "started").exists():
            break
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert not (place / "runs" / "s" / "NLAYERS4" / "sweep_row.json").exists()
    row = int((place / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(row, 0)


def test_a_hangup_that_nohup_ignores_stops_nothing() -> None:
    code = (
        "import signal; from tools import sweep; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
        "sweep.listen(); signal.raise_signal(signal.SIGHUP)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
