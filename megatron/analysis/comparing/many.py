"""Many runs, a line each: how it ended, how good, how fast, how it was laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron.analysis.comparing.comparable import reasons
from megatron.analysis.comparing.compared_run import ComparedRun, differing, names_of
from megatron.analysis.comparing.figures import FIGURES, LAYOUT, Shown, Sums
from megatron.analysis.comparing.identities import violations
from megatron.analysis.comparing.result_table import ResultTable, plain

BATCH = {"MBS", "devices", "GBS", "seq"}
"""Columns of FIGURES that are settings."""

SHOWN = {
    "MODEL_ARCH", "NLAYERS", "NHOSTS", "TP", "PP", "SP", "ZERO_STAGE", "GRAD_ACC_STEPS", "DTYPE",
    "USE_ACTIVATION_CHECKPOINTING", "MICRO_BATCH", "WORLD_SIZE", "GLOBAL_BATCH", "SEQ",
    "TRAIN_TOKENS",
}  # fmt: skip
"""Variables with a column of theirs."""


def many(runs: Sequence[ComparedRun]) -> ResultTable:
    """The table of any number of runs; settings that differ and have no column of theirs follow."""
    sums, names = [Sums(run) for run in runs], names_of(runs)
    columns: dict[str, Callable[[Sums], Shown]] = {
        figure.short: figure.value for figure in FIGURES if figure.short
    } | {name: _setting(key) for name, key in LAYOUT.items()}
    settings = {name: v for name, v in differing(runs).items() if name not in SHOWN}
    rows = [
        (name, *(column(one) for column in columns.values()), *own)
        for name, one, own in zip(names, sums, _by_run(settings.values(), len(runs)), strict=True)
    ]
    why = {what: text for what, text in reasons(sums).items() if text}
    return ResultTable(
        heading=("run", *columns, *settings),
        rows=rows,
        notes=[f"Losses ({what}) are not comparable: {text}." for what, text in why.items()],
        loud=[
            f"{name}: {line}"
            for name, one in zip(names, sums, strict=True)
            for line in violations(one)
        ],
        more={"not_comparable": why},
        folded=BATCH | LAYOUT.keys(),
        unprinted={"report"},
    )


def _setting(key: str) -> Callable[[Sums], Shown]:
    return lambda sums: sums.setting(key)


def _by_run(columns: Iterable[Sequence[Any]], count: int) -> list[tuple[Shown, ...]]:
    values = [[plain(value) for value in column] for column in columns]
    return [tuple(column[index] for column in values) for index in range(count)]
