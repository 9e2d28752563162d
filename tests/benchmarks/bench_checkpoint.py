#!/usr/bin/env python3
"""Times a save beside its peers, in alternating rounds; prints medians as a table.

    python3 tests/benchmarks/bench_checkpoint.py [--parameters 32e6] [--rounds 5] [--folder DIR]

A state of AdamW in fp32, 12 bytes a parameter. at once, behind: `Saver`, held is what a step waits.
as before: safetensors' writer, then each file read again for its hash. cp: of the same bytes, and
flushed. Memory: 12 bytes a parameter, 24 with `behind`, 36 for a moment with `as before`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from a checkout, not installed

import torch
from safetensors.torch import save_file

from megatron.checkpoint.atomic import write_atomically
from megatron.checkpoint.rank_file import write_file
from megatron.checkpoint.retention import KEEP_ALL
from megatron.checkpoint.saver import Saver
from megatron.checkpoint.state import RunState
from megatron.checkpoint.tensors import plan_file
from megatron.parallel.control import ALONE
from megatron.parallel.piece import WEIGHT, Piece

MATRICES = 16
STATES = (WEIGHT, "exp_avg", "exp_avg_sq")
Contender = Callable[[Path], tuple[float, float]]  # a round; seconds held and in all


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=32e6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default the system's")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        measure(Path(folder), state(int(chosen.parameters)), chosen.rounds, chosen.without)
    return 0


def state(parameters: int) -> list[Piece]:
    """A model of a few matrices, its values random."""
    length = parameters // MATRICES
    generator = torch.Generator().manual_seed(1)
    return [
        Piece(
            f"layers.{n}.weight", (length,), None, 0, 1, 0,
            {name: torch.randn(length, generator=generator) for name in STATES}, {"step": 1.0},
        )
        for n in range(MATRICES)
    ]  # fmt: skip


def measure(folder: Path, pieces: list[Piece], rounds: int, without: Sequence[str]) -> None:
    """Prints the table."""
    file, _ = plan_file(pieces)
    source = folder / "source"
    write_file(source, file)
    values = RunState(iteration=1).to_dict()
    del values["data"]
    about = {
        **{"state": values, "model": {}, "optimizer": "adamw", "layout": "", "run": {}},
        **{"counters": {}, "loss_scaler": {}},
    }
    savers = {
        behind: Saver(folder / "ours", ALONE, KEEP_ALL, asynchronous=behind, warn=print)
        for behind in (False, True)
    }

    def saved(behind: bool) -> tuple[float, float]:
        saver, began = savers[behind], time.perf_counter()
        done = saver.save(1, pieces, about, [])
        held = time.perf_counter() - began
        done = done or saver.wait()
        assert done is not None and done.path is not None, done
        return held, time.perf_counter() - began

    def timed(action: Callable[[], object]) -> tuple[float, float]:
        began = time.perf_counter()
        action()
        spent = time.perf_counter() - began
        return spent, spent

    def hash_only() -> None:
        digest = hashlib.sha256()
        for tensor in file.tensors:
            digest.update(tensor.numpy().data)

    contenders: dict[str, Callable[[], tuple[float, float]]] = {
        "save, at once": lambda: saved(False),
        "save, behind": lambda: saved(True),
        "as before": lambda: timed(lambda: save_as_before(folder / "before", pieces)),
        "cp, flushed": lambda: timed(lambda: copy(source, folder / "copy")),
        "write and flush, no hash": lambda: timed(lambda: write_only(folder / "copy", source)),
        "hash, no write": lambda: timed(hash_only),
    }
    for name in without:
        del contenders[name]
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            results[name].append(contender())
            shutil.rmtree(folder / "ours", ignore_errors=True)
            for path in (folder / "copy", folder / "before"):
                path.unlink(missing_ok=True)
    megabytes = file.size / 1e6
    print(f"{megabytes:,.0f} MB, {rounds} rounds\n")
    print("| | held, s, median | in all, s, median | MB/s | rounds, s in all |")
    print("|---|---|---|---|---|")
    for name, found in results.items():
        held, total = (statistics.median(column) for column in zip(*found, strict=True))
        each = " ".join(f"{seconds:.2f}" for _, seconds in found)
        print(f"| {name} | {held:.2f} | {total:.2f} | {megabytes / total:,.0f} | {each} |")


def save_as_before(path: Path, pieces: list[Piece]) -> None:
    """The save that this one replaced, one rank's file and the commit."""
    named = {f"{n}/{key}": value for n, p in enumerate(pieces) for key, value in p.tensors.items()}
    save_file({key: value.detach().to("cpu").contiguous() for key, value in named.items()}, path)
    flush(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    for name in ("manifest.json", "latest", "latest_checkpointed_iteration.txt"):
        write_atomically(path.parent / name, digest.hexdigest())
    for _ in range(2):  # its folder, and the one of all steps
        flush(path.parent)


def copy(source: Path, target: Path) -> None:
    """The system's own copy."""
    subprocess.run(["cp", str(source), str(target)], check=True)
    flush(target)


def write_only(target: Path, source: Path) -> None:
    """The bytes from the page cache, as a writer that hashes nothing."""
    with source.open("rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 1 << 23)
    flush(target)


def flush(path: Path) -> None:
    """Onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


if __name__ == "__main__":
    sys.exit(main())
