"""What a step waits for beside its work, here or in two checkouts, in alternating rounds.

python -m tests.benchmarks.bench_stalls [OLD NEW] [--rounds 5]    # 3 minutes on two quiet cores

Each round is processes of its own: a record with file and console, and with every tracker (W&B
offline); the message after a step between 2 and 4 ranks; the times of 150 steps of a tiny run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

STEPS = {
    "MODEL_ARCH": "debug", "NLAYERS": "2", "HIDDEN": "64", "HEADS": "4", "FFN_HIDDEN_SIZE": "160",
    "SEQ": "64", "COMPILE": "0", "TRAIN_ITERS": "150", "SAVE_INTERVAL": "0", "EVAL_INTERVAL": "0",
    "LOG_INTERVAL": "1", "WANDB_MODE": "disabled",
}  # fmt: skip
DEVICE_S = 0.005  # a step's, in which a thread may work


def timed(action: Callable[[], object], pause_s: float = 0.0) -> tuple[float, float]:
    """Median milliseconds of 200 calls, on the clock and of this thread's own time."""
    seconds, own = list[float](), list[float]()
    for _ in range(200):
        start, worked = time.perf_counter(), time.thread_time()
        action()
        seconds.append(time.perf_counter() - start)
        own.append(time.thread_time() - worked)
        time.sleep(pause_s)
    return 1000 * median(seconds), 1000 * median(own)


def message() -> float:
    """Of what all ranks agree on after a step."""
    from megatron.parallel.control import make_control

    control = make_control()
    return timed(lambda: control.maximum([0, 0]))[0]


def record(wandb_mode: str) -> tuple[float, float]:
    """Of a step's record, and of handing it to the trackers."""
    import torch

    from megatron.checkpoint.state import RunState
    from megatron.training.device import Device
    from megatron.training.loggers import make_tracker
    from megatron.training.meter import Meter
    from tests.training.run_config import tiny_run

    off = wandb_mode == "disabled"
    run = tiny_run(Path(tempfile.mkdtemp()), wandb_mode=wandb_mode, no_tensorboard=off)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, train_iters=10**6))
    meter, state = Meter(run, Device("cpu", 0, "processor", "gloo", None)), RunState()
    tracker = make_tracker(run, logs=True, iteration=0)

    def one() -> None:
        nonlocal state
        state = state.after(4, 32)
        meter.step(torch.tensor(3.0), torch.tensor(1.0), 1.0)
        tracker.log(meter.record(state, 1e-4))

    found = timed(one, DEVICE_S)
    tracker.close()
    return found


def probe() -> None:
    """Prints the medians of the checkout that is on the path."""
    import stalls_probe  # this file, where the ranks find it

    from megatron.training.log import setup
    from tests.spawn import run

    setup(0, "INFO")
    found = dict[str, float]()
    for name, mode in {"file, console": "disabled", "and dashboards": "offline"}.items():
        found[f"record: {name}"], found[f"record: {name}, CPU time"] = record(mode)
    for ranks in (2, 4):
        found[f"message, {ranks} ranks"] = run(stalls_probe.message, ranks)[0]
    print(json.dumps(found))


def measured(checkout: Path, folder: Path) -> dict[str, float]:
    """Milliseconds in a checkout, by row of the table."""
    environ = {**os.environ, "PYTHONPATH": f"{checkout}:{folder}", "OMP_NUM_THREADS": "1"}

    def output(*command: str, **more: str) -> str:
        done = subprocess.run(
            command, cwd=checkout, env=environ | more, capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.stdout

    found = json.loads(
        output(sys.executable, str(folder / "stalls_probe.py"), "--probe").splitlines()[-1]
    )
    run = tempfile.mkdtemp(dir=folder)
    output("bash", "train_alcf.sh", **STEPS, RUN_DIR=run)
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    steps = [one for line in lines if (one := json.loads(line))["event"] == "step"]
    times = sorted(1000 * one["elapsed_s"] for one in steps[10:])
    tail = {"step: 99th of 100": times[len(times) * 99 // 100], "step: longest": times[-1]}
    return {**found, "step: median": median(times), **tail}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.probe:
        probe()
        return 0
    rows: dict[str, list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(__file__, Path(name) / "stalls_probe.py")
        checkouts = given.checkouts or [Path(__file__).parents[2]]
        for _ in range(given.rounds):
            for place, checkout in enumerate(checkouts):
                for row, value in measured(checkout.resolve(), Path(name)).items():
                    rows.setdefault(row, [[] for _ in checkouts])[place].append(value)
    columns = " | ".join(str(checkout) for checkout in checkouts)
    print(f"| ms, median of rounds (range) | {columns} | last/first |")
    print("|---" * (len(checkouts) + 2) + "|")
    for row, sides in rows.items():
        shown = [f"{median(side):.3f} ({min(side):.3f} to {max(side):.3f})" for side in sides]
        print(f"| {row} | {' | '.join(shown)} | {median(sides[-1]) / median(sides[0]):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
