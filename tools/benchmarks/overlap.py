"""`overlap`: what communication adds to a step on a slow cable, for us and for torch's own ways.

Two hosts are made of network namespaces, joined by a cable of 1 Gbit/s and 100 us; that needs root.
Without it the ranks talk over this machine's loopback, and only the steps' times say anything.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.config.errors import ConfigError
from megatron.plan import link
from tools.benchmarks import wire
from tools.benchmarks.cable_arms import FORWARD_S, Arm, ddp, fsdp2, ours, run_config
from tools.benchmarks.exposed import Row, measured
from tools.benchmarks.record import Record, spread

DEEPSPEED = {"ENGINE": "deepspeed"}
STATES = {
    "ours, ZeRO 0 and 1": Arm(ours, {"ZERO_STAGE": "1"}),
    "ours, ZeRO 2": Arm(ours, {"ZERO_STAGE": "2"}),
    "DeepSpeed, ZeRO 0 and 1": Arm(ours, {"ZERO_STAGE": "1", **DEEPSPEED}),
    "DeepSpeed, ZeRO 2": Arm(ours, {"ZERO_STAGE": "2", **DEEPSPEED}),
    "DeepSpeed, ZeRO 2, overlap_comm": Arm(
        ours, {"ZERO_STAGE": "2", **DEEPSPEED}, {"overlap_comm": True}
    ),
    "torch DDP": Arm(ddp, {}),
    "torch FSDP2": Arm(fsdp2, {}),
}
# A hidden state of 512 KiB, and little arithmetic for it.
LARGE_STATES = {
    "DTYPE": "fp32",
    "NLAYERS": "4",
    "HIDDEN": "64",
    "FFN_HIDDEN_SIZE": "64",
    "SEQ": "32",
    "MICRO_BATCH": "64",
    "VOCAB_SIZE": "128",
}
FAMILIES: Mapping[str, tuple[Mapping[str, str], Mapping[str, Arm]]] = {
    "fp32": ({"DTYPE": "fp32"}, STATES),
    "bf16": ({"DTYPE": "bf16"}, STATES),
    "bf16-reduced": ({"DTYPE": "bf16", "GRAD_REDUCE_IN_BF16": "1"}, STATES),
    "layouts": (
        LARGE_STATES,
        {
            "TP=2": Arm(ours, {"TP": "2"}),
            "PP=2, 2 micro-batches": Arm(ours, {"PP": "2", "GRAD_ACC_STEPS": "2"}),
            "PP=2, 4 micro-batches": Arm(ours, {"PP": "2", "GRAD_ACC_STEPS": "4"}),
        },
    ),
}
"""Name -> variables of all its arms, and the arms."""

COLUMNS = (
    "arm", "MB a rank sends", "by the formula", "on the cable alone, ms", "step, ms",
    "fast cable, ms", "exposed, ms", "model, ms", "model / step",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("family", choices=FAMILIES, help="precision of DP, or TP and PP")
    parser.add_argument("--rounds", type=int, default=7, help="in which the arms take turns")
    parser.add_argument("--ranks", type=int, default=2, help="half of them on each host; DP only")
    parser.add_argument("--arms", help="a regular expression: those with such names only")
    parser.add_argument("--gbit", type=float, default=1.0, help="of the cable, a second")
    parser.add_argument("--latency-us", type=float, default=100.0, help="of the cable, one way")


def main(options: argparse.Namespace) -> int:
    """Measures, and prints the table."""
    arms = _chosen(options)
    asked = link.Link(options.gbit * 125e6, options.latency_us * 1e-6)
    record = Record("overlap", f"Exposed communication, {options.family}", COLUMNS)
    with _cable(asked) as cable:
        if cable is wire.LOOPBACK:
            got = asked
            record.notes.append(
                f"**over the loopback, not on a cable** ({wire.problem()}): nothing here is slow, "
                "and the bytes are those of both ranks and of any other program"
            )
        else:
            got = wire.tried(cable)
            record.notes.append(
                f"the cable: {got.bytes_per_s / 1e6:.1f} MB/s, {got.latency_s * 1e6:.0f} us one "
                f"way by a socket's measure ({asked.bytes_per_s / 1e6:.0f} MB/s and "
                f"{asked.latency_s * 1e6:.0f} us asked for)"
            )
        rows = measured(arms, cable, options.rounds, options.ranks)
    for row in rows:
        record.rows.append(_cells(row, arms[row.name], options, got))
    record.data["rows"] = [row._asdict() for row in rows]
    record.data["link"] = got._asdict()
    record.notes.append(
        f"{options.ranks} ranks on two hosts; each block sleeps {FORWARD_S * 1e3:.0f} ms forward "
        f"and {2 * FORWARD_S * 1e3:.0f} backward, as an accelerator would compute; buckets are a "
        "16th of the default ones, of DDP too, as the model is small"
    )
    record.notes.append(
        f"medians of {options.rounds} rounds; exposed: step on the cable less the step of the same "
        "processes with the cable's limits off, median (range) of the rounds' differences"
    )
    record.write(options.out)
    return 0


def _chosen(options: argparse.Namespace) -> dict[str, Arm]:
    variables, arms = FAMILIES[options.family]
    chosen = {
        name: arm._replace(variables={**variables, **arm.variables})
        for name, arm in arms.items()
        if re.search(options.arms or "", name)
    }
    if not chosen:
        raise ConfigError(f"--arms {options.arms}: none of {', '.join(arms)}")
    if options.ranks % 2 or options.ranks < 2:
        raise ConfigError(f"--ranks {options.ranks}: half of them on each of two hosts")
    if options.family == "layouts" and options.ranks != 2:
        raise ConfigError(f"--ranks {options.ranks}: the layouts are those of 2")
    return chosen


@contextlib.contextmanager
def _cable(asked: link.Link) -> Iterator[wire.Cable]:
    if wire.problem():
        yield wire.LOOPBACK
    else:
        with wire.cable(asked) as made:
            yield made


def _cells(row: Row, arm: Arm, options: argparse.Namespace, got: link.Link) -> list[str]:
    run = run_config(arm, options.ranks)
    layout = run.parallel
    modelled, formula = "", ""
    traffic: Any = None
    if layout.tensor_parallel > 1:
        traffic = link.tensor_parallel(run)
        formula = f"{traffic.size / 1e6:.2f}"
    elif layout.pipeline_parallel > 1:
        traffic = link.pipeline(run)
        formula = f"{traffic.size / 2 / 1e6:.2f}"  # a stage sends half of what is on its path
    elif arm.make is ours:
        formula = f"{(link.gradients(run).size + link.weights(run).size) / 1e6:.2f}"
    model_s = link.step_seconds(row.alone_s, traffic, got) if traffic else 0.0
    if traffic:
        modelled = f"{model_s * 1e3:.0f}"
    return [
        row.name,
        f"{row.sent / 1e6:.2f}",
        formula,
        f"{row.sent / got.bytes_per_s * 1e3:.0f}",
        f"{row.step_s * 1e3:.0f}",
        f"{row.alone_s * 1e3:.0f}",
        spread([1e3 * value for value in row.rounds]),
        modelled,
        f"{model_s / row.step_s:.2f}" if traffic else "",
    ]
