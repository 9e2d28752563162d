"""`step`: our training step against other programs' on one device, in one run.

Every arm trains the same weights on the same tokens; its first loss must be ours. Rates are medians
over rounds in which the arms take turns, beside the rate of matrix products of the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.launch.launch_plan import ON_CPU
from tools.benchmarks import arms, peers
from tools.benchmarks.record import Record, spread
from tools.benchmarks.rounds import Arm, Train
from tools.benchmarks.workload import Workload, export, shape_variables

PEERS: Mapping[str, tuple[Train, tuple[str, ...]]] = {
    "hf": (peers.hugging_face, ("transformers",)),
    "hf-compile": (partial(peers.hugging_face, compile=True), ("transformers",)),
    "hf-bf16": (partial(peers.hugging_face, pure=True), ("transformers",)),
    "hf-bf16-compile": (
        partial(peers.hugging_face, compile=True, pure=True),
        ("transformers",),
    ),
    "hf-trainer": (peers.hugging_face_trainer, ("transformers", "accelerate")),
    "litgpt": (peers.litgpt, ("litgpt", "lightning")),
    "litgpt-eager": (partial(peers.litgpt, compile=False), ("litgpt", "lightning")),
    "plain": (peers.plain, ()),
    "plain-compile": (partial(peers.plain, compile=True), ()),
    "fsdp2": (peers.fsdp2, ("transformers",)),
    "fsdp2-compile": (partial(peers.fsdp2, compile=True), ("transformers",)),
}
"""Name -> the arm, and the packages that it needs."""

USUAL = ("ours", "ours:COMPILE=1", "hf", "hf-compile", "hf-trainer", "litgpt", "fsdp2")
FIRST_LOSS = {"fp32": 1e-4, "bf16": 5e-3}
"""How far an arm's first loss may be from ours: bf16 rounds logits of 10 by up to 0.03."""

WARM_UP = 3  # steps
COLUMNS = (
    "arm", "tokens/s, median (range)", "of the fastest peer", "TFLOP/s", "of GEMM", "MFU",
    "peak GiB", "first loss", "warm-up s",
)  # fmt: skip


@dataclass
class Result:
    """Of one arm.

    Attributes:
        name: of the arm.
        why: it could not be measured.
        warm_s: seconds of the first steps, with compilation.
        losses: of these steps.
        seconds: per step, one value a round.
        gemm: TFLOP/s of matrix products just before each round.
        peak_gib: of memory, after the warm-up.
    """

    name: str
    why: str = ""
    warm_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)
    peak_gib: float = 0.0

    def take(self, answer: dict[str, Any], gemm: float) -> None:
        """A round's answer."""
        if "error" in answer:
            self.why = answer["error"]
            return
        self.seconds.append(answer["seconds"])
        self.gemm.append(gemm)
        self.peak_gib = answer["peak_gib"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--shape", default="40m", help="a name, or VARIABLE=value,...")
    parser.add_argument("--dtype", default="fp32", choices=sorted(FIRST_LOSS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round, about")
    parser.add_argument("--threads", type=int, default=0, help="of OpenMP; 0: torch's choice")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=USUAL,
        metavar="ARM",
        help=f"ours:VARIABLE=value,... or {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--turns",
        choices=("auto", "together", "alone"),
        default="auto",
        help="all arms in memory, round by round, or one after the other; auto: alone on a device",
    )


def main(options: argparse.Namespace) -> int:
    """Measures and prints; 1 where an arm does not compute our loss."""
    work = Workload(shape_variables(options.shape), options.dtype, threads=options.threads)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        weights = Path(folder, "weights")
        weights.mkdir()
        export(work, weights)
        work = Workload(work.variables, work.dtype, weights, work.threads)
        results = measure(work, options, Path(folder))
    record = report(work, options.shape, results)
    record.write(options.out)
    return int(any("differs" in result.why for result in results))


def measure(work: Workload, options: argparse.Namespace, folder: Path) -> list[Result]:
    """Starts the arms and lets them take turns."""
    results = [Result(name, missing(name)) for name in options.arms]
    wanted = [result for result in results if not result.why]
    gemm = Arm(arms.GEMM, arms.gemm, work, folder / "gemm.log")
    products = max(1, round(options.seconds / 4 / gemm.round(WARM_UP)["seconds"]))
    groups = [[result] for result in wanted] if alone(options.turns) else [wanted]
    for group in groups:
        running = {}
        for result in group:  # one by one: imports and compilation want the whole machine
            running[result.name] = start(result, work, folder, options.out)
            warm_up(result, running[result.name], results, work.dtype)
        steps = steps_of(running, group, options.seconds)
        for _ in range(options.rounds):
            for result in group:
                if not result.why:
                    rate = arms.gemm_rate(gemm.round(products))
                    result.take(running[result.name].round(steps), rate)
        for arm in running.values():
            arm.close()
    gemm.close()
    return results


def start(result: Result, work: Workload, folder: Path, out: Path | None) -> Arm:
    """The process of an arm; what it prints stays where there is an output folder."""
    name = result.name.replace(":", "-").replace("=", "").replace(",", "-")
    if out is not None:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    log = (folder if out is None else out / "logs") / f"{name}.log"
    return Arm(result.name, function_of(result.name), work, log, environment_of(result.name))


def environment_of(name: str) -> Mapping[str, str]:
    """What a run's launcher would give our ranks; peers start as their users start them."""
    return ON_CPU if name.startswith(arms.OURS) and not accelerated() else {}


def warm_up(result: Result, arm: Arm, results: Sequence[Result], dtype: str) -> None:
    """The first steps; an arm that computes another loss than the first one is not measured."""
    answer = arm.round(WARM_UP)
    if "error" in answer:
        result.why = answer["error"]
        return
    print(f"{result.name}: warm, {answer['seconds']:.3g} s a step", file=sys.stderr, flush=True)
    result.warm_s, result.losses = answer["seconds"] * WARM_UP, answer["losses"]
    first = next(other.losses[0] for other in results if other.losses)
    if not abs(result.losses[0] - first) <= FIRST_LOSS[dtype]:
        result.why = f"first loss {result.losses[0]:.6f} differs from {first:.6f}"


def steps_of(running: Mapping[str, Arm], group: Sequence[Result], seconds: float) -> int:
    """Steps in a round, equal for all arms: the quickest works about `seconds`."""
    answers = [running[result.name].round(2) for result in group if not result.why]
    times = [answer["seconds"] for answer in answers if "error" not in answer]
    return max(2, round(seconds / min(times))) if times else 2


def function_of(name: str) -> Train:
    """The arm of a name."""
    return arms.with_variables(name)[1] if name.startswith(arms.OURS) else PEERS[name][0]


def missing(name: str) -> str:
    """What an arm lacks to run here; empty: nothing."""
    if name.startswith(arms.OURS):
        return ""
    if name not in PEERS:
        return f"unknown: ours:VARIABLE=value, or one of {', '.join(PEERS)}"
    lacking = [package for package in PEERS[name][1] if find_spec(package) is None]
    return f"not installed: pip install {' '.join(lacking)}" if lacking else ""


def alone(turns: str) -> bool:
    """Whether arms do not share the memory: on an accelerator all of them would not fit."""
    return accelerated() if turns == "auto" else turns == "alone"


def accelerated() -> bool:
    """Whether this host has a device of torch's."""
    import torch

    return torch.cuda.is_available() or torch.xpu.is_available()


def report(work: Workload, shape: str, results: Sequence[Result]) -> Record:
    """The table."""
    from megatron.training.device import detect

    run = work.run()
    tokens = run.train.global_batch_size * run.model.seq_length
    flops = tokens * run.architecture.flops_per_token_lm(run.model)
    peak = detect(0, work.dtype).peak_tflops
    measured = [result for result in results if result.seconds]
    theirs = [result for result in measured if not result.name.startswith(arms.OURS)]
    fastest = min(theirs, key=lambda one: statistics.median(one.seconds), default=None)
    record = Record(
        f"step-{shape.split(',')[0].split('=')[0]}-{work.dtype}",
        f"A training step: {shape}, {work.dtype}, {tokens:,} tokens",
        COLUMNS,
    )
    for result in results:
        if not result.seconds:
            record.rows.append((result.name, result.why, *[""] * (len(COLUMNS) - 2)))
            continue
        rates = [flops / seconds / 1e12 for seconds in result.seconds]
        tflops = statistics.median(rates)
        record.rows.append(
            (
                result.name,
                spread([tokens / seconds for seconds in result.seconds]),
                "" if fastest is None else ratio(fastest.seconds, result.seconds),
                f"{tflops:.3g}",
                f"{statistics.median(r / g for r, g in zip(rates, result.gemm, strict=True)):.0%}",
                "" if peak is None else f"{tflops / peak:.1%}",
                f"{result.peak_gib:.2f}",
                f"{result.losses[0]:.5f}",
                f"{result.warm_s:.1f}",
            )
        )
    gemm = [rate for result in measured for rate in result.gemm]
    if gemm:
        record.notes.append(f"GEMM in the same rounds: {spread(gemm, 3)} TFLOP/s, {work.dtype}")
    record.notes.append(
        f"{len(measured[0].seconds) if measured else 0} rounds; TFLOP/s by Megatron-LM's count; "
        "`of the fastest peer`: round by round"
    )
    record.data = {
        "shape": dict(work.variables),
        "dtype": work.dtype,
        "tokens_per_step": tokens,
        "flops_per_step": flops,
        "parameters": run.architecture.parameters(run.model),
        "peak_tflops": peak,
        "fastest_peer": None if fastest is None else fastest.name,
        "arms": [vars(result) for result in results],
    }
    return record


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """How much faster, median (range) over the rounds."""
    return spread([one / two for one, two in zip(theirs, ours, strict=False)], 2)
