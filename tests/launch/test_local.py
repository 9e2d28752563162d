"""Real processes: their ranks, their output, their ends."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from megatron.launch import local
from megatron.launch.process import Child, watch

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"


def launch(
    tmp_path: Path, ranks: int, script: str, *options: str, **environ: str
) -> subprocess.Popen[str]:
    """`python -m megatron.launch -n RANKS -- python script`, output captured."""
    program = tmp_path / "program.py"
    program.write_text(PRELUDE + script, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "megatron.launch",
        "-n",
        str(ranks),
        *options,
        "--",
        sys.executable,
    ]
    return subprocess.Popen(
        [*command, str(program)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str], list[str], float]:
    """Status, lines on standard output and error, and the seconds that it took."""
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err.splitlines(), time.monotonic() - began


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def gone(pid: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def wait_for(paths: list[Path], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"not there in time: {paths}"
        time.sleep(0.02)


def test_each_rank_has_its_numbers(tmp_path: Path) -> None:
    script = (
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT '\n"
        "names += 'OMP_NUM_THREADS'\n"
        "print(*(os.environ[name] for name in names.split()))\n"
    )
    status, out, err, _ = finish(launch(tmp_path, 3, script))
    assert (status, err) == (0, [])
    rows = sorted(line.split() for line in out)
    assert [row[:5] for row in rows] == [[str(r), str(r), "3", "3", "127.0.0.1"] for r in range(3)]
    assert len({row[5] for row in rows}) == 1
    assert {row[6] for row in rows} == {str(max(1, local.usable_cores() // 3))}


def test_threads_that_the_user_chose_stay() -> None:
    environ = local.rank_environment({"OMP_NUM_THREADS": "5"}, 0, 2, 1234, 8)
    assert environ["OMP_NUM_THREADS"] == "5"
    assert local.rank_environment({}, 0, 2, 1234, 8)["OMP_NUM_THREADS"] == "4"
    assert local.rank_environment({}, 0, 16, 1234, 8)["OMP_NUM_THREADS"] == "1"


def test_lines_stay_whole(tmp_path: Path) -> None:
    script = (
        "for n in range(200):\n"
        "    sys.stdout.write('a' * 50); sys.stdout.flush(); sys.stdout.write('b' * 50 + '\\n')\n"
        "sys.stdout.write('the end without a newline')\n"
    )
    status, out, _, _ = finish(launch(tmp_path, 3, script))
    assert status == 0
    assert len(out) == 603
    assert set(out) == {"a" * 50 + "b" * 50, "the end without a newline"}


@pytest.mark.flaky(reruns=1)
@pytest.mark.long
def test_a_failing_rank_takes_the_run_down_and_has_the_last_word(tmp_path: Path) -> None:
    """Rank 2 fails, then 3 because of it; 0 sleeps, 1 is deaf to SIGTERM and has a child."""
    script = f"""
def mark(name, value):
    with open(r"{tmp_path}/." + name, "w") as file:
        file.write(str(value))
    os.replace(r"{tmp_path}/." + name, r"{tmp_path}/" + name)
mark(f"pid{{rank}}", os.getpid())
if rank == 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    mark("child", child.pid)
while not os.path.exists(r"{tmp_path}/child"):
    time.sleep(0.02)
if rank == 3:
    time.sleep(0.7)
    raise ConnectionError("connection closed by peer")
if rank == 2:
    try:
        raise ValueError("wrong shape in layer 7")
    finally:
        sys.stderr.flush()
print("waiting", flush=True)
time.sleep(100)
"""
    status, _, err, seconds = finish(launch(tmp_path, 4, script))
    assert status == 1
    assert seconds < 30
    header = err.index("rank 2 failed with status 1:")
    assert err[header + 1] == "Traceback (most recent call last):"
    assert err[-1] == "ValueError: wrong shape in layer 7"
    pids = [int(path.read_text()) for path in (tmp_path / "child", *tmp_path.glob("pid*"))]
    assert len(pids) == 5
    assert [pid for pid in pids if not gone(pid, 2)] == []


@pytest.mark.flaky(reruns=1)
@pytest.mark.parametrize(
    ("end", "status", "header"),
    [
        ("sys.exit(3)", 3, "rank 1 failed with status 3:"),
        (
            "os.kill(os.getpid(), signal.SIGSEGV)",
            139,
            "rank 1 failed with status 139 (killed by SIGSEGV):",
        ),
    ],
)
def test_status_of_the_first_failure(tmp_path: Path, end: str, status: int, header: str) -> None:
    script = (
        f"if rank == 1:\n    print('last words', file=sys.stderr, flush=True)\n    {end}\n"
        "time.sleep(60)\n"
    )
    found, _, err, seconds = finish(launch(tmp_path, 2, script))
    assert found == status
    assert err[-2:] == [header, "last words"]
    assert seconds < 15


@pytest.mark.parametrize("first", [True, False])
def test_the_error_of_rank_1_is_the_last_thing_on_the_screen(tmp_path: Path, first: bool) -> None:
    """Twenty starts: it says its error and ends, while rank 0 loses its peer, sooner or later."""
    script = """
import random, socket
random.seed(int(os.environ["SEED"]) * 2 + rank)
if rank == 1:
    time.sleep(random.uniform(0, 0.02))
    listener = socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"])))
    peer, _ = listener.accept()
    if FIRST:
        print("[rank 1] error: tokens.bin ends at byte 7", file=sys.stderr, flush=True)
    peer.close()
    time.sleep(random.choice([0, 0.002, 0.1]))
    if not FIRST:
        print("[rank 1] error: tokens.bin ends at byte 7", file=sys.stderr, flush=True)
    sys.exit(3)
while True:
    try:
        peer = socket.create_connection(("127.0.0.1", int(os.environ["MASTER_PORT"])))
        break
    except ConnectionRefusedError:
        time.sleep(0.01)
if not peer.recv(1):
    raise ConnectionError("connection closed by peer")
""".replace("FIRST", str(first))
    ends = []
    for batch in range(0, 20, 5):
        running = [launch(tmp_path, 2, script, SEED=str(seed)) for seed in range(batch, batch + 5)]
        ends += [finish(process) for process in running]
    for status, _, err, _ in ends:
        assert status == 3
        assert err[-2:] == [
            "rank 1 failed with status 3:",
            "[rank 1] error: tokens.bin ends at byte 7",
        ]


def test_an_error_has_time_to_become_a_status(tmp_path: Path) -> None:
    """Rank 1 takes longer to end than others get once one has failed."""
    script = """
if rank == 1:
    print("[rank 1] error: tokens.bin ends at byte 7", file=sys.stderr, flush=True)
    time.sleep(2.5)
    sys.exit(3)
time.sleep(0.5)
raise ConnectionError("connection closed by peer")
"""
    status, _, err, _ = finish(launch(tmp_path, 2, script))
    assert status == 3
    assert err[-1] == "[rank 1] error: tokens.bin ends at byte 7"


def test_one_rank_alone_is_not_repeated(tmp_path: Path) -> None:
    status, _, err, _ = finish(launch(tmp_path, 1, "sys.exit('error: HIDDEN=7 is odd')\n"))
    assert (status, err) == (1, ["error: HIDDEN=7 is odd"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_passed_on_and_the_ranks_status_counts(tmp_path: Path, number: int) -> None:
    """Each rank notes the signal, saves, and ends in its own time with 0."""
    script = f"""
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: got.append(int(number)))
open(r"{tmp_path}/ready" + str(rank), "w").close()
while not got:
    time.sleep(0.02)
time.sleep(1.5)
print(f"rank {{rank}} saved after {{got}}")
"""
    process = launch(tmp_path, 2, script)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(number)
    status, out, err, _ = finish(process)
    assert (status, err) == (0, [])
    assert sorted(out) == [f"rank {rank} saved after [{int(number)}]" for rank in (0, 1)]


def test_nohup_holds(tmp_path: Path) -> None:
    """A terminal that is closed does not stop what was started with nohup."""
    script = f"open(r'{tmp_path}/ready' + str(rank), 'w').close()\ntime.sleep(1)\n"
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = launch(tmp_path, 1, script)
    finally:
        signal.signal(signal.SIGHUP, former)
    wait_for([tmp_path / "ready0"])
    process.send_signal(signal.SIGHUP)
    assert finish(process)[0] == 0


def test_a_terminal_that_is_closed_leaves_the_run_its_time_to_save(tmp_path: Path) -> None:
    """It sends SIGHUP, and what is printed from then on is an input/output error."""
    script = f"""
got = []
signal.signal(signal.SIGHUP, lambda number, frame: got.append(number))
open(r"{tmp_path}/ready" + str(rank), "w").close()
while not got:
    time.sleep(0.02)
print("stopping", flush=True)
print("stopping", file=sys.stderr, flush=True)
time.sleep(0.5)
open(r"{tmp_path}/saved" + str(rank), "w").close()
"""
    program = tmp_path / "program.py"
    program.write_text(PRELUDE + script, encoding="utf-8")
    command = [sys.executable, "-m", "megatron.launch", "-n", "2", "--", sys.executable]
    master, terminal = pty.openpty()
    environ = {"PATH": os.environ["PATH"]}
    process = subprocess.Popen(
        [*command, str(program)], cwd=ROOT, env=environ, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


@pytest.mark.flaky(reruns=1)
def test_a_signal_that_kills_the_ranks_is_the_status(tmp_path: Path) -> None:
    script = f"open(r'{tmp_path}/ready' + str(rank), 'w').close()\ntime.sleep(60)\n"
    process = launch(tmp_path, 2, script)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(signal.SIGTERM)
    status, _, err, seconds = finish(process)
    assert status == 143
    assert seconds < 15
    assert "SIGTERM, which the run was sent" in err[-1]


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells a child of its parent's end"
)
def test_ranks_do_not_outlive_a_starter_that_is_killed(tmp_path: Path) -> None:
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(r"{tmp_path}/." + str(rank), "w") as file:
    file.write(str(os.getpid()))
os.replace(r"{tmp_path}/." + str(rank), r"{tmp_path}/pid" + str(rank))
time.sleep(100)
"""
    process = launch(tmp_path, 2, script)
    wait_for([tmp_path / "pid0", tmp_path / "pid1"])
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in (0, 1)]
    assert all(alive(pid) for pid in pids)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert all(gone(pid, 5) for pid in pids)


@pytest.mark.flaky(reruns=1)
def test_a_rank_leaves_no_process_behind(tmp_path: Path) -> None:
    """Its child holds its output open, too: the run must not wait for it."""
    script = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
with open(r"{tmp_path}/child", "w") as file:
    file.write(str(child.pid))
"""
    status, _, _, seconds = finish(launch(tmp_path, 1, script))
    assert status == 0
    assert seconds < 20
    assert gone(int((tmp_path / "child").read_text()), 2)


@pytest.mark.flaky(reruns=1)
def test_silence_ends_a_run_with_124(tmp_path: Path) -> None:
    script = "print('hello', flush=True)\ntime.sleep(60)\n"
    status, out, err, seconds = finish(launch(tmp_path, 2, script, "--timeout", "1.5"))
    assert status == 124
    assert out == ["hello", "hello"]
    assert "no output for 1.5 s" in err[-1]
    assert seconds < 15


def test_a_reader_that_leaves_does_not_stop_the_run(tmp_path: Path) -> None:
    script = (
        "print('first', flush=True)\ntime.sleep(0.5)\n"
        "for n in range(5000):\n    print('more')\n"
        f"open(r'{tmp_path}/done', 'w').close()\n"
    )
    process = launch(tmp_path, 1, script)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.flaky(reruns=1)
def test_a_command_that_is_not_there() -> None:
    lines: list[bytes] = []
    sleeper = Child([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ))
    began = time.monotonic()
    with pytest.raises(FileNotFoundError):
        watch([sleeper, Child(["/no/such/program"], {})], lambda line, is_error: lines.append(line))
    assert time.monotonic() - began < 10


def test_a_signal_that_came_before_the_ranks_reaches_them() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    watched = watch([Child(command, os.environ)], lambda line, error: None, early=[signal.SIGINT])
    assert watched.signals == [signal.SIGINT] and watched.ended[0].status in (1, 130)
    assert time.monotonic() - began < 30


def test_ctrl_c_is_held_back_until_a_rank_can_end_in_silence() -> None:
    said: list[bytes] = []
    program = (
        "import signal, time\ntime.sleep(0.5)\nprint('held')\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})\nprint('not reached')\n"
    )
    child = Child([sys.executable, "-u", "-c", program], os.environ, holds_ctrl_c=True)
    watched = watch([child], lambda line, error: said.append(line), early=[signal.SIGINT])
    assert (watched.ended[0].status, said) == (128 + signal.SIGINT, [b"held\n"])


def test_ranks_know_how_wide_the_terminal_is(tmp_path: Path) -> None:
    """They write into pipes; in a file or a pipe nobody is told a width."""
    script = "print('COLUMNS', os.environ.get('COLUMNS'))"
    assert "COLUMNS None" in finish(launch(tmp_path, 1, script))[1]
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 123, 0, 0))
    command = [sys.executable, "-m", "megatron.launch", "-n", "1", "--", sys.executable]
    environ = {"PATH": os.environ["PATH"]}
    subprocess.run([*command, str(tmp_path / "program.py")], cwd=ROOT, env=environ,
                   stdout=follower, stderr=follower, timeout=60, check=True)  # fmt: skip
    os.close(follower)
    assert b"COLUMNS 123" in os.read(leader, 65536)
    os.close(leader)
