"""Claims of a folder, with real processes: held, refused, killed, raced for, taken over."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.launch import claim
from megatron.launch.claim import CLAIM_FILE, claimed

ROOT = Path(__file__).resolve().parents[2]

HOLD = """
import sys, time
from pathlib import Path
from megatron.launch import claim
folder = Path(sys.argv[1])
with claim.claimed(folder, "holder --lr 1", "77", print):
    print("mine", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of the rules, a twentieth of what they are."""
    for name in ("REFRESH_S", "WATCH_S", "STALE_S", "LOOK_S"):
        monkeypatch.setattr(claim, name, getattr(claim, name) / 20)


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that owns `folder`."""
    process = start(HOLD, folder)
    assert process.stdout is not None
    try:
        while process.stdout.readline() != "mine\n":
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


def say_nothing(line: str) -> None:
    raise AssertionError(line)


def claim_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / CLAIM_FILE).read_text(encoding="utf-8"))
    return found


def write_claim(folder: Path, age_s: float = 0.0, **changes: object) -> Path:
    """A claim of another host, renewed `age_s` seconds ago."""
    about = {**claim._about("train", "12"), "host": "elsewhere", **changes}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CLAIM_FILE
    path.write_text(json.dumps(about), encoding="utf-8")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_claim_says_who_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with claimed(folder, "train --lr 1", "77", say_nothing):
        about = claim_of(folder)
        assert files(folder) == {CLAIM_FILE}
    wanted = {"pid": os.getpid(), "host": socket.gethostname(), "job": "77"}
    assert {name: about[name] for name in wanted} == wanted
    assert about["command"] == "train --lr 1"
    assert files(tmp_path) == set()


def test_only_what_it_made_and_what_is_empty_goes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with claimed(tmp_path / "empty", "", "", say_nothing):
        pass
    with claimed(tmp_path / "full", "", "", say_nothing):
        (tmp_path / "full" / "run.json").write_text("{}")
    assert files(tmp_path) == {"empty", "full"}
    assert files(tmp_path / "full") == {"run.json"}


def test_a_second_start_is_refused_by_name(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        before = (tmp_path / "run" / CLAIM_FILE).read_bytes()
        with (
            pytest.raises(ConfigError) as refused,
            claimed(tmp_path / "run", "second", "", say_nothing),
        ):
            pass
        for word in (f"process {first.pid}", socket.gethostname(), "job 77", "since", "--lr 1"):
            assert word in str(refused.value)
        assert (tmp_path / "run" / CLAIM_FILE).read_bytes() == before
        assert files(tmp_path / "run") == {CLAIM_FILE}
        assert first.communicate("", timeout=20) and first.returncode == 0
    with claimed(tmp_path / "run", "second", "", say_nothing):
        assert claim_of(tmp_path / "run")["pid"] == os.getpid()


@pytest.mark.flaky(reruns=1)
def test_a_killed_owner_blocks_nobody(tmp_path: Path) -> None:
    """It is not waited for: the number of a process that has ended may stay taken."""
    said: list[str] = []
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        time.sleep(0.3)
        began = time.monotonic()
        with claimed(tmp_path, "second", "", said.append):
            assert claim_of(tmp_path)["pid"] == os.getpid()
            assert files(tmp_path) == {CLAIM_FILE}
        assert time.monotonic() - began < 5
    assert len(said) == 1
    assert f"took over the claim of process {first.pid}" in said[0]


def test_a_process_of_the_same_number_is_another(tmp_path: Path) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid()}
    write_claim(tmp_path, **about)
    with pytest.raises(ConfigError), claimed(tmp_path, "", "", say_nothing):
        pass
    write_claim(tmp_path, **about, process_started="1")
    said: list[str] = []
    with claimed(tmp_path, "", "", said.append):
        assert len(said) == 1


def test_a_process_that_is_hidden_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may show each user the own processes alone."""

    def kill(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", kill)
    write_claim(tmp_path, host=socket.gethostname(), pid=2**30)
    with pytest.raises(ConfigError), claimed(tmp_path, "", "", say_nothing):
        pass
    monkeypatch.undo()
    with claimed(tmp_path, "", "", lambda line: None):
        assert claim_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_an_owner_elsewhere_lives_while_it_renews(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old its claim looks: clocks may differ."""
    path, ended = write_claim(tmp_path, age_s=3600), threading.Event()

    def renew() -> None:
        shift = 0.0
        while not ended.wait(claim.REFRESH_S):
            shift += 1
            os.utime(path, (time.time() - 3600 + shift,) * 2)

    thread = threading.Thread(target=renew)
    thread.start()
    said: list[str] = []
    try:
        with pytest.raises(ConfigError, match="elsewhere"), claimed(tmp_path, "", "", said.append):
            pass
    finally:
        ended.set()
        thread.join()
    assert ["sign of life" in line for line in said] == [True]
    assert files(tmp_path) == {CLAIM_FILE}


@pytest.mark.flaky(reruns=1)
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("age_s", "least_s", "most_s"), [(3600, 0.7, 2.4), (0.5, 2.4, 6), (-3600, 3, 6)]
)
@pytest.mark.long
def test_an_owner_elsewhere_is_dead_once_it_is_silent(
    tmp_path: Path, age_s: float, least_s: float, most_s: float
) -> None:
    """Watched for 0.75 s at least, and until its claim is 3 s old by the file system's clock."""
    write_claim(tmp_path, age_s)
    said: list[str] = []
    began = time.monotonic()
    with claimed(tmp_path, "", "", said.append):
        assert least_s <= time.monotonic() - began < most_s
    assert "took over the claim of process" in said[-1] and "elsewhere, job 12" in said[-1]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff\xfe"])
@pytest.mark.long
def test_a_claim_that_cannot_be_read_is_watched_too(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CLAIM_FILE).write_bytes(content)
    said: list[str] = []
    began = time.monotonic()
    with claimed(tmp_path, "", "", said.append):
        assert time.monotonic() - began >= 2.4
        assert "cannot be read" in said[-1]


@pytest.mark.flaky(reruns=1)
@pytest.mark.usefixtures("quick")
def test_a_claim_that_is_released_meanwhile_is_free(tmp_path: Path) -> None:
    path = write_claim(tmp_path)
    threading.Timer(0.3, path.unlink).start()
    began = time.monotonic()
    with claimed(tmp_path, "", "", lambda line: None):
        assert time.monotonic() - began < 2
        assert claim_of(tmp_path)["pid"] == os.getpid()


@pytest.mark.usefixtures("quick")
def test_the_time_of_a_claim_is_renewed(tmp_path: Path) -> None:
    with claimed(tmp_path, "", "", say_nothing):
        first = (tmp_path / CLAIM_FILE).stat().st_mtime
        time.sleep(1.6)
        assert (tmp_path / CLAIM_FILE).stat().st_mtime > first + 0.4


@pytest.mark.usefixtures("quick")
def test_a_lost_claim_is_said_once_and_left_alone(tmp_path: Path) -> None:
    said: list[str] = []
    with claimed(tmp_path / "a", "", "", said.append):
        shutil.rmtree(tmp_path / "a")
        time.sleep(1.8)
    assert ["was removed" in line for line in said] == [True]
    said.clear()
    with claimed(tmp_path / "b", "", "", said.append):
        write_claim(tmp_path / "b")
        time.sleep(1.8)
    assert ["two runs write into it" in line for line in said] == [True]
    assert claim_of(tmp_path / "b")["host"] == "elsewhere"


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    write_claim(tmp_path, host=socket.gethostname(), process_started="1")
    said: list[str] = []
    with claimed(tmp_path, "", "", said.append):
        assert claim_of(tmp_path)["pid"] == os.getpid()
        with pytest.raises(ConfigError), claimed(tmp_path, "", "", say_nothing):
            pass
    assert len(said) == 1
    assert files(tmp_path) == set()


@pytest.mark.parametrize("name", ["link", "replace"])
def test_an_answer_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """NFS sends a request again, and then reports that it was done before."""
    function = getattr(os, name)

    def repeated(source: Path, target: Path) -> None:
        function(source, target)
        function(source, target)

    monkeypatch.setattr(os, name, repeated)
    write_claim(tmp_path, host=socket.gethostname(), process_started="1")
    with claimed(tmp_path, "", "", lambda line: None):
        assert claim_of(tmp_path)["pid"] == os.getpid()
    assert files(tmp_path) == set()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="RUN_DIR"),
        claimed(tmp_path / "file" / "run", "", "", say_nothing),
    ):
        pass


def test_a_taker_that_was_killed_half_way_blocks_nobody(tmp_path: Path) -> None:
    """Its claim follows the dead one's, and has not replaced it."""
    here = {"host": socket.gethostname(), "process_started": "1"}
    first = write_claim(tmp_path, **here).read_bytes()
    second = json.dumps({**claim._about("", ""), **here}).encode()
    claim._after(tmp_path, first).write_bytes(second)
    said: list[str] = []
    with claimed(tmp_path, "", "", said.append):
        assert claim_of(tmp_path)["pid"] == os.getpid()
        assert files(tmp_path) == {CLAIM_FILE}
    assert len(said) == 1


def test_one_that_comes_late_sees_that_another_was_quicker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the dead claim and its own, another takes over and tidies up."""
    write_claim(tmp_path, host=socket.gethostname(), process_started="1")
    is_dead, others = claim._is_dead, []

    def slowly(*arguments: object) -> bool:
        dead = is_dead(*arguments)  # type: ignore[arg-type]
        if dead and not others:
            others.append(holder(tmp_path))
            others.append(others[0].__enter__())
        return dead

    monkeypatch.setattr(claim, "_is_dead", slowly)
    try:
        with pytest.raises(ConfigError), claimed(tmp_path, "", "", say_nothing):
            pass
        assert claim_of(tmp_path)["pid"] == others[1].pid
        assert files(tmp_path) == {CLAIM_FILE}
    finally:
        others[0].__exit__(None, None, None)


RACE = """
import os, random, sys, time
from pathlib import Path
from megatron.config.errors import ConfigError
from megatron.launch import claim
folder, go = Path(sys.argv[1]), Path(sys.argv[2])
def slowly(function):
    def slow(*arguments):
        time.sleep(random.random() * 0.01)
        return function(*arguments)
    return slow
for name in ("_last", "_create", "_read", "_sweep", "_is_dead"):
    setattr(claim, name, slowly(getattr(claim, name)))
while not go.exists():
    time.sleep(0.001)
try:
    with claim.claimed(folder, "", "", lambda line: None):
        print("won", flush=True)
        if sys.argv[3] == "die":
            os.kill(os.getpid(), 9)
        sys.stdin.read()
except ConfigError:
    print("refused", flush=True)
"""


@pytest.mark.parametrize("number", range(6))
def test_of_many_that_see_a_dead_claim_one_wins(tmp_path: Path, number: int) -> None:
    folder, go = tmp_path / "run", tmp_path / "go"
    if number:  # the first time there is none
        write_claim(folder, host=socket.gethostname(), process_started="1")
    racers = [start(RACE, folder, go, "live") for _ in range(10)]
    go.touch()
    results = []
    for racer in racers:
        assert racer.stdout is not None
        results.append(racer.stdout.readline())
    try:
        assert sorted(results) == ["refused\n"] * 9 + ["won\n"]
        winner = racers[results.index("won\n")]
        assert claim_of(folder)["pid"] == winner.pid
    finally:
        for racer in racers:
            racer.communicate("")
    assert not folder.exists() or files(folder) == set()


def test_winners_that_die_at_once_are_followed_by_one_at_a_time(tmp_path: Path) -> None:
    """Those that win kill themselves while the others race; one more start then finds it free."""
    folder, go = tmp_path / "run", tmp_path / "go"
    racers = [start(RACE, folder, go, "die") for _ in range(10)]
    go.touch()
    results = [racer.communicate("", timeout=60)[0] for racer in racers]
    assert results.count("won\n") >= 1
    assert set(results) <= {"won\n", "refused\n"}
    with claimed(folder, "", "", lambda line: None):
        assert claim_of(folder)["pid"] == os.getpid()
        assert files(folder) == {CLAIM_FILE}


CHURN = """
import os, random, sys, time
from pathlib import Path
from megatron.config.errors import ConfigError
from megatron.launch import claim
folder, witness, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def slowly(function):
    def slow(*arguments):
        time.sleep(random.random() * 0.003)
        return function(*arguments)
    return slow
for name in ("_last", "_create", "_read", "_sweep", "_is_dead"):
    setattr(claim, name, slowly(getattr(claim, name)))
def own():
    with claim.claimed(folder, "", "", lambda line: None):
        os.close(os.open(witness, os.O_CREAT | os.O_EXCL))
        time.sleep(random.random() * 0.005)
        witness.unlink()
        if random.random() < 0.5:
            os.kill(os.getpid(), 9)
until, ends = time.monotonic() + seconds, {}
while time.monotonic() < until:
    pid = os.fork()
    if pid == 0:
        random.seed(os.getpid())
        try:
            own()
        except ConfigError:
            os._exit(2)
        except FileExistsError:
            os._exit(99)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    ends[status] = ends.get(status, 0) + 1
print(*(ends.get(status, 0) for status in (0, -9, 2, 99)), sum(ends.values()))
"""


@pytest.mark.long
def test_never_two_owners_among_starts_that_end_and_are_killed(tmp_path: Path) -> None:
    """Each owner makes a file that must not be there, and half of them then kill themselves."""
    workers = [start(CHURN, tmp_path / "run", tmp_path / "witness", 4) for _ in range(6)]
    rows = [list(map(int, worker.communicate("", timeout=60)[0].split())) for worker in workers]
    ended, killed, refused, twice, all_ends = map(sum, zip(*rows, strict=True))
    assert twice == 0
    assert ended + killed + refused == all_ends
    assert min(ended, killed, refused) > 5, rows
