"""Whether the losses of runs may be held beside one another, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron.analysis.comparing.compared_run import differing
from megatron.analysis.comparing.figures import EVALUATION, TRAINING, Sums

WITHOUT_EFFECT = {
    "TRAIN_RANGE_TO_SKIP", "--data-cache-path", "ALLOW_DATA_CHANGE", "DATA_CACHE_PATH",
}  # fmt: skip
"""Settings of the data that do not change what a loss is of."""


def reasons(all_sums: Sequence[Sums]) -> dict[str, str]:
    """TRAINING and EVALUATION -> why figures of it are not comparable; empty where they are.

    Runs without a step have nothing to compare.
    """
    all_sums = [sums for sums in all_sums if sums.steps]
    settings = _settings(all_sums)
    seen = _unlike("tokens seen", [sums.tokens for sums in all_sums])
    evaluated = [
        _unlike("tokens seen then", [_seen_then(sums) for sums in all_sums]),
        _unlike("samples", [sums.evaluated("samples") for sums in all_sums]),
    ]
    found = {TRAINING: [seen, *settings], EVALUATION: [*evaluated, *settings]}
    return {what: "; ".join(filter(None, texts)) for what, texts in found.items()}


def _settings(all_sums: Sequence[Sums]) -> list[str]:
    """What a sample is: the data, its tokens, its length, its order."""
    runs = [sums.run for sums in all_sums]
    relevant = {
        key for run in runs for key in run.settings if key.startswith("data.")
    } | {"model.seq_length", "train.seed"}  # fmt: skip
    only = [
        replace(
            run, settings={k: run.settings[k] for k in relevant & run.settings.keys()}, origin={}
        )
        for run in runs
    ]
    found = differing(only)
    return [_unlike(name, found[name]) for name in sorted(found) if name not in WITHOUT_EFFECT]


def _seen_then(sums: Sums) -> Any:
    """Tokens seen at the last evaluation."""
    return sums.evaluated("consumed_tokens") or sums.tokens


def _unlike(name: str, values: Sequence[Any]) -> str:
    if len({*map(str, values)}) < 2:
        return ""
    shown = [f"{v:,}" if isinstance(v, int) else "-" if v is None else str(v) for v in values]
    return f"{name} {' / '.join(dict.fromkeys(shown))}"
