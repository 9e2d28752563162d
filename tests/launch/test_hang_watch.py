"""Ranks that beat, stop, wait and are asked for their stacks: real sockets, real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.launch import hang_watch, launch_plan
from megatron.launch.hang_watch import HangWatch, main_stack, reachable_name
from megatron.launch.heartbeat import Beat, Heartbeat
from megatron.launch.launch_plan import LaunchPlan, LaunchRequest
from megatron.launch.local import Attempt, attempt
from megatron.launch.screen import Screen
from tests.launch.places import at, pbs_job

PRELUDE = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from megatron.launch.heartbeat import HEARTBEAT, Heartbeat
rank = int(os.environ['RANK'])
heartbeat = Heartbeat(os.environ.get(HEARTBEAT, ''), rank)
"""


def plan(folder: Path, ranks: int, script: str) -> LaunchPlan:
    """A local start of a program that begins with a heartbeat."""
    path = folder / "program.py"
    path.write_text(PRELUDE + script, encoding="utf-8")
    request = LaunchRequest(ranks, 1, ranks, launcher="local")
    environ = {"PATH": os.environ["PATH"]}
    return launch_plan.make_plan(request, [sys.executable, str(path)], environ, at("laptop", {}))


def run(
    folder: Path, ranks: int, script: str, timeout_s: float | None
) -> tuple[Attempt, list[str], float]:
    """How it ended, what was written, and the seconds that it took."""
    began = time.monotonic()
    with closing(Screen(folder / "output.log")) as screen:
        ended = attempt(plan(folder, ranks, script), screen, folder / "hangs", timeout_s)
    lines = (folder / "output.log").read_text(encoding="utf-8").splitlines()
    return ended, lines, time.monotonic() - began


def step_forever(what: str, when: str) -> str:
    """Steps of 0.1 s; `what` happens in step 5 where `when` holds."""
    return f"""
def wait_in_a_collective():
    time.sleep(100)
for step in range(1, 1000):
    heartbeat.enter('step', step)
    if step >= 5 and {when}:
        {what}
    elif step > 5:
        wait_in_a_collective()
    time.sleep(0.1)
"""


@pytest.mark.flaky(reruns=1)
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="stops a process")
def test_a_stopped_rank_ends_the_run_with_124(tmp_path: Path) -> None:
    stop = "time.sleep(1.2); os.kill(os.getpid(), signal.SIGSTOP)"
    script = step_forever(stop, "rank == 1")
    ended, lines, seconds = run(tmp_path, 3, script, 3.5)
    assert ended.status == 124
    assert ended.ranks == (1,)
    assert seconds < 40
    odd = next(line for line in lines if "silent for" in line and "pid" in line)
    assert odd.startswith("  rank 1 (") and odd.endswith("last heard in step 5")
    assert any(line.startswith("  ranks 0,2 in step 6: wait_in_a_collective") for line in lines)
    (folder,) = (tmp_path / "hangs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"rank-0.txt", "rank-2.txt", "report.txt"}
    assert str(folder) in "\n".join(lines)
    assert "wait_in_a_collective" in "\n".join(main_stack(folder / "rank-0.txt"))
    assert lines[-1].startswith("the run hung and was killed, status 124: ")


@pytest.mark.long
def test_a_rank_that_goes_another_way_is_shown_with_its_stack(tmp_path: Path) -> None:
    script = "def lost():\n    time.sleep(100)\n" + step_forever("lost()", "rank == 1")
    ended, lines, _ = run(tmp_path, 3, script, 2.5)
    assert ended.status == 124
    assert ended.ranks == (1,)
    where = next(i for i, line in enumerate(lines) if line == "rank 1, innermost call first:")
    assert "in lost" in lines[where + 1]
    table = [line for line in lines if line.startswith("  rank")]
    assert table[0].startswith("  rank 1 in step 5: lost of program.py")


@pytest.mark.long
def test_a_run_that_works_is_left_alone(tmp_path: Path) -> None:
    """It is slower than HANG_TIMEOUT in all, not in a step."""
    script = """
for step in range(1, 6):
    heartbeat.enter('step', step)
    time.sleep(0.8)
heartbeat.close()
"""
    ended, lines, _ = run(tmp_path, 2, script, 3.5)
    assert (ended.status, ended.reason, lines) == (0, "", [])
    assert not (tmp_path / "hangs").exists()


@pytest.mark.long
def test_a_failure_is_no_hang(tmp_path: Path) -> None:
    """The others take long to end; the reason is the rank that failed."""
    script = """
signal.signal(signal.SIGTERM, lambda number, frame: None)
heartbeat.enter('step', 1)
time.sleep(1)
if rank == 1:
    sys.exit('error: no such file')
until = time.monotonic() + 5
while time.monotonic() < until:
    time.sleep(0.1)
"""
    ended, lines, _ = run(tmp_path, 2, script, 3.5)
    assert (ended.status, ended.reason) == (1, "rank 1 failed with status 1")
    assert lines[-1] == "error: no such file"


@pytest.mark.flaky(reruns=1)
@pytest.mark.long
def test_a_signal_that_is_not_answered_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is stopped, the others note SIGTERM and wait for it."""
    monkeypatch.setattr("megatron.launch.hang.LEAST_AFTER_SIGNAL_S", 1.5)
    monkeypatch.setattr(hang_watch, "SILENT_S", 1.5)
    script = "signal.signal(signal.SIGTERM, lambda number, frame: print('noted', flush=True))\n"
    script += step_forever("time.sleep(1.2); os.kill(os.getpid(), signal.SIGSTOP)", "rank == 1")
    timer = threading.Timer(2.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    ended, lines, seconds = run(tmp_path, 2, script, 0.0)  # hangs alone are not watched for
    timer.join()
    assert ended.status == 143
    assert "noted" in lines
    assert any("SIGTERM was passed on" in line and "not answered" in line for line in lines)
    assert seconds < 40


@pytest.mark.long
def test_a_rank_that_never_gives_up_the_interpreter_prints_its_stack(tmp_path: Path) -> None:
    """Its heartbeat cannot answer; the handler of SIGUSR2 needs no interpreter."""
    script = """
import faulthandler
faulthandler.register(signal.SIGUSR2, all_threads=True)
def stuck_in_c():
    sum(range(10**12))
""" + step_forever("time.sleep(1.2); stuck_in_c()", "rank == 1")
    ended, lines, _ = run(tmp_path, 2, script, 4.5)
    assert (ended.status, ended.ranks) == (124, (1,))
    assert any("in stuck_in_c" in line for line in lines)


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[tuple[HangWatch, Clock, list[str]]]:
    """A watch of two ranks with HANG_TIMEOUT=60, its clock, and what it says."""
    clock, said = Clock(), list[str]()
    with closing(
        HangWatch("127.0.0.1", 2, tmp_path, 60.0, said.append, own=False, clock=clock)
    ) as watch:
        yield watch, clock, said


def send(watch: HangWatch, beat: Beat) -> None:
    """As the rank would."""
    host, port, token = watch.address.rsplit(":", 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(beat.encode(token), (host, int(port)))


def test_a_launcher_that_was_stopped_itself_sees_no_hang(
    watch: tuple[HangWatch, Clock, list[str]],
) -> None:
    """A laptop sleeps for an hour; afterwards the seconds count on from where they were."""
    watcher, clock, said = watch
    for rank in range(2):
        send(watcher, Beat(rank, "host", rank, 1, "step", 3, 0))
    for _ in range(50):
        clock.now += 1
        assert not watcher.poll([], False)
    clock.now += 3600
    assert not watcher.poll([], False)
    assert said == []
    for _ in range(20):
        clock.now += 1
        watcher.poll([], False)
    assert said and said[0].startswith("HUNG: ")


def test_a_rank_that_moves_again_while_stacks_are_asked_for_is_no_hang(
    watch: tuple[HangWatch, Clock, list[str]],
) -> None:
    watcher, clock, said = watch
    beat = Beat(0, "host", 7, 1, "step", 3, 0)
    send(watcher, beat)
    for _ in range(62):
        clock.now += 1
        assert not watcher.poll([], False)
    assert said and said[-1].endswith("asking for stacks")
    send(watcher, replace(beat, number=2, step=4, doing="all_reduce", stacks="rank-0.txt"))
    for _ in range(60):
        clock.now += 1
        assert not watcher.poll([], False)
    assert said[-1] == "a rank has made progress meanwhile: no hang, the run goes on"
    for _ in range(2):
        clock.now += 1
        watcher.poll([], False)
    assert said[-1].endswith("asking for stacks")
    assert watcher.table.ranks[0].stacks == ""


def test_a_program_without_heartbeats_is_said_once(
    watch: tuple[HangWatch, Clock, list[str]],
) -> None:
    watcher, clock, said = watch
    for _ in range(4000):
        clock.now += 1
        assert not watcher.poll([], False)
    assert said == ["no heartbeat of a rank in 600 s: hangs are not watched for"]


def test_datagrams_of_strangers_are_ignored(watch: tuple[HangWatch, Clock, list[str]]) -> None:
    watcher, _, _ = watch
    host, port, _ = watcher.address.rsplit(":", 2)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for data in (b"hello", Beat(0, "h", 1, 1, "step", 1, 0).encode("guess")):
            sender.sendto(data, (host, int(port)))
    watcher.poll([], False)
    assert watcher.table.ranks == {}


def test_a_heartbeat_without_a_launcher_does_nothing() -> None:
    before = threading.active_count()
    heartbeat = Heartbeat()
    heartbeat.enter("step", 1)
    heartbeat.tick()
    heartbeat.close()
    assert threading.active_count() == before


def test_a_heartbeat_says_what_changed_and_answers_only_its_launcher(tmp_path: Path) -> None:
    said: list[str] = []
    with closing(HangWatch("127.0.0.1", 1, tmp_path, None, said.append, own=False)) as watcher:
        heartbeat = Heartbeat(watcher.address, 0)
        heartbeat.enter("step", 40)
        heartbeat.tick()

        def until_heard(phase: str, ticks: int) -> Beat:
            """The first beat that says so: one may leave between entering and ticking."""
            until = time.monotonic() + 5
            while True:
                watcher.poll([], False)
                heard = watcher.table.ranks.get(0)
                if heard and (heard.beat.phase, heard.beat.ticks) == (phase, ticks):
                    return heard.beat
                assert time.monotonic() < until
                time.sleep(0.01)

        beat = until_heard("step", 1)
        assert (beat.step, beat.pid) == (40, os.getpid())
        assert (beat.host, beat.closed) == (socket.gethostname(), False)
        request = {"token": "guess", "folder": str(tmp_path / "stranger")}
        watcher._socket.sendto(json.dumps(request).encode(), watcher._addresses[0])
        heartbeat.enter("save", 41)
        until_heard("save", 1)
        assert not (tmp_path / "stranger").exists()
        heartbeat.close()
        until = time.monotonic() + 5
        while not watcher.table.ranks[0].beat.closed:
            assert time.monotonic() < until
            watcher.poll([], False)
            time.sleep(0.01)


def test_where_the_ranks_find_the_launcher() -> None:
    hosts = ("x1.cm.aurora", "x2.cm.aurora")
    assert reachable_name(hosts[:1], "127.0.0.1", "x1") == "127.0.0.1"
    assert reachable_name((), "", "laptop") == "127.0.0.1"
    assert reachable_name(hosts, "x1.hsn.cm.aurora", "x1") == "x1.hsn.cm.aurora"
    assert reachable_name(hosts, "x1.hsn.cm.aurora", "x2") == "x2.cm.aurora"
    assert reachable_name(hosts, "x1.hsn.cm.aurora", "login3") == socket.getfqdn()


def test_shown_stacks_are_those_of_the_main_thread(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.txt"
    path.write_text(
        "rank 0, main thread 0x00007f0000000001, all_reduce\n\n"
        'Current thread 0x00007f0000000002 (most recent call first):\n  File "heartbeat.py"\n\n'
        'Thread 0x00007f0000000001 (most recent call first):\n  File "a.py"\n  File "b.py"\n\n'
        "flight recorder\n",
        encoding="utf-8",
    )
    assert main_stack(path) == ['  File "a.py"', '  File "b.py"']
    assert main_stack(tmp_path / "none.txt") == []


MPIEXEC = """#!{python}
import os, subprocess, sys, time
program = sys.argv[next(i for i, word in enumerate(sys.argv) if '/python' in word) :]
ranks = [
    subprocess.Popen(program, env=dict(os.environ, RANK=str(rank), PALS_RANKID=str(rank)))
    for rank in range(2)
]
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.02)
time.sleep(0.3)
for rank in ranks:
    rank.kill()
sys.exit(max(rank.wait() for rank in ranks))
"""


def run_behind_a_launcher(
    folder: Path, script: str, timeout_s: float | None
) -> tuple[Attempt, list[str]]:
    """Two ranks on two hosts, as far as the plan knows; the launcher is on the first."""
    launcher = folder / "bin" / "mpiexec"
    launcher.parent.mkdir()
    launcher.write_text(MPIEXEC.format(python=sys.executable), encoding="utf-8")
    launcher.chmod(0o755)
    (folder / "program.py").write_text(PRELUDE + script, encoding="utf-8")
    environ = pbs_job(folder, socket.gethostname(), "node2") | {
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
        "MASTER_ADDR": "localhost",
    }
    request = LaunchRequest(2, 2, 1, launcher="mpiexec", folder=folder)
    program = [sys.executable, str(folder / "program.py")]
    planned = launch_plan.make_plan(request, program, environ, at(socket.gethostname(), environ))
    planned = replace(planned, command=(str(launcher), *planned.command[1:]))
    with closing(Screen(folder / "output.log")) as screen:
        ended = attempt(planned, screen, folder / "hangs", timeout_s)
    return ended, (folder / "output.log").read_text(encoding="utf-8").splitlines()


@pytest.mark.long
def test_ranks_of_other_hosts_are_watched_over_the_network(tmp_path: Path) -> None:
    script = step_forever("os.kill(os.getpid(), signal.SIGSTOP)", "rank == 1")
    ended, lines = run_behind_a_launcher(tmp_path, script, 2.5)
    assert (ended.status, ended.ranks) == (124, (1,))
    assert any(line.startswith("  rank 0 in step 6: wait_in_a_collective") for line in lines)


def test_the_first_error_behind_a_launcher_is_the_last_thing_on_the_screen(tmp_path: Path) -> None:
    script = """
if rank == 1:
    time.sleep(0.2)
    print('[rank 1] error: tokens.bin ends at byte 7', file=sys.stderr, flush=True)
    time.sleep(0.3)
    sys.exit(3)
time.sleep(0.4)
for n in range(500):
    print('[rank0]: Traceback (most recent call last):', n, file=sys.stderr)
sys.stderr.flush()
time.sleep(20)
"""
    ended, lines = run_behind_a_launcher(tmp_path, script, None)
    assert (ended.status, ended.ranks, ended.hosts) == (3, (1,), (socket.gethostname(),))
    assert lines[-2:] == [
        "rank 1 failed with status 3:",
        "[rank 1] error: tokens.bin ends at byte 7",
    ]
