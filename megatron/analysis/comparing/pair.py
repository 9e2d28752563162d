"""Two runs beside one another: every figure, the steps, the settings that differ."""

from __future__ import annotations

import math

from megatron.analysis.comparing.comparable import reasons
from megatron.analysis.comparing.compared_run import ComparedRun, differing, names_of
from megatron.analysis.comparing.figures import FIGURES, Figure, Shown, Sums
from megatron.analysis.comparing.identities import violations
from megatron.analysis.comparing.result_table import ResultTable, plain
from megatron.analysis.comparing.step_gaps import step_gaps

STEPS = {
    "matched_iterations": "steps in both",
    "only_in_a": "steps in the first alone",
    "only_in_b": "steps in the second alone",
    "max_loss_difference": "largest difference of a loss",
    "first_iteration_with_different_loss": "first step with another loss",
    "max_grad_norm_difference": "largest difference of a norm",
    "first_iteration_with_different_grad_norm": "first step with another norm",
}
"""Key of `step_gaps` -> its row."""


def pair(a: ComparedRun, b: ComparedRun) -> ResultTable:
    """The table of two runs: figures, then steps, then settings."""
    both = Sums(a), Sums(b)
    why = reasons(both)
    gaps = step_gaps(a.records, b.records)
    settings = differing([a, b])
    rows = [_row(figure, *both, why) for figure in FIGURES]
    common = gaps["matched_iterations"]
    rows += [
        (name, gaps[key] if common or "difference" not in key else None, "", "", "")
        for key, name in STEPS.items()
    ]
    rows += [(name, plain(x), plain(y), "", "setting") for name, (x, y) in settings.items()]
    names = names_of([a, b])
    wrong = {name: violations(sums) for name, sums in zip(names, both, strict=True)}
    return ResultTable(
        heading=("what", *names, "B / A", "note"),
        rows=rows,
        loud=[f"{name}: {line}" for name, lines in wrong.items() for line in lines],
        more={
            "runs": names,
            "not_comparable": {what: text for what, text in why.items() if text},
            "steps": gaps,
            "configuration": settings,
            "violated_identities": wrong,
        },
    )


def _row(figure: Figure, a: Sums, b: Sums, why: dict[str, str]) -> tuple[Shown, ...]:
    x, y = figure.value(a), figure.value(b)
    ratio: Shown = ""
    if figure.rate and isinstance(x, float) and isinstance(y, float) and x and math.isfinite(x):
        ratio = y / x
    reason = why.get(figure.of, "") if (x, y) != (None, None) else ""
    return figure.name, x, y, ratio, f"not comparable: {reason}" if reason else ""
