"""Processes that race for one cold cache while one of them is killed.

    python -m tests.data.megatron_race FOLDER ROUNDS

A program of its own: it forks, which a process with threads must not. Ends with 0 and a line of
JSON: how many victims were killed before their end, and how many of them while they wrote a file.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

from tests.data.megatron_cases import build, write_pair

PROCESSES = 8
DEADLINE_S = 60.0


def digest(splits):
    crc = 0
    for split in (splits.train, splits.valid):
        for k in range(0, len(split), 17):
            crc = zlib.crc32(split.sample(k).tokens.tobytes(), crc)
    return crc


def lines_of(folder):
    draw = random.Random(1)
    lines = []
    for i in range(8):
        prefix = write_pair(folder / f"f{i}", [draw.randint(0, 40) for _ in range(3000)])
        lines.append((1.0 + i, prefix, f"c{i % 3}"))
    return lines


def child(cache, lines, expected):
    """What each process does; its exit status tells."""
    os._exit(0 if digest(build(cache, lines, train_iters=1500)) == expected else 3)


def race(cache, lines, expected, draw, usual_s):
    """One round; whether the victim was killed before its end, and while it wrote a file."""
    children = []
    for _ in range(PROCESSES):
        pid = os.fork()
        if pid == 0:
            try:
                child(cache, lines, expected)
            finally:
                os._exit(4)
        children.append(pid)
    time.sleep(draw.uniform(0, usual_s))
    victim = draw.choice(children)
    os.kill(victim, signal.SIGKILL)  # not waited for yet, so the id is still its own
    deadline = time.monotonic() + DEADLINE_S
    killed, torn = False, bool(list(cache.glob(f".*-{victim}-*.partial")))
    waiting = set(children)
    while waiting:
        for pid in list(waiting):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                waiting.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                if pid == victim and code == -signal.SIGKILL:
                    killed = True
                elif code != 0:
                    raise SystemExit(f"a process ended with {code}")
        if time.monotonic() > deadline:
            for pid in waiting:
                os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"{len(waiting)} processes hang")
        time.sleep(0.002)
    said = []
    assert digest(build(cache, lines, said.append, 1 << 40, train_iters=1500)) == expected
    assert not said, said  # the cache was complete, and every array is whole
    assert not list(cache.glob(".*.partial"))
    return killed, torn


def main(folder, rounds):
    lines = lines_of(folder / "data")
    expected = digest(build(folder / "alone", lines, train_iters=1500))
    draw = random.Random(os.getpid())
    usual_s, results = 0.2, []
    for number in range(rounds):
        started = time.monotonic()
        cache = folder / f"cache{number}"
        results.append(race(cache, lines, expected, draw, usual_s))
        usual_s = min(2.0, time.monotonic() - started) * 0.5
        shutil.rmtree(cache)
    killed, torn = (sum(column) for column in zip(*results, strict=True))
    print(json.dumps({"rounds": rounds, "killed": killed, "torn": torn}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
