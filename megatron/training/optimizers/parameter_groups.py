"""Groups of parameters for update rules: block matrices, vocabulary matrices, vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

HIDDEN = "hidden"  # matrices inside blocks
VOCABULARY = "vocabulary"  # embedding and head
VECTORS = "vectors"  # norms; never decayed


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    learning_rate: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each with "name", "params", "lr" and "weight_decay".

    An empty group is left out: a pipeline stage need not have all three.
    """
    members: dict[str, list[nn.Parameter]] = {HIDDEN: [], VOCABULARY: [], VECTORS: []}
    for _, parameter in named_parameters:
        members[_group_of(parameter)].append(parameter)
    return [
        {
            "name": name,
            "params": parameters,
            "lr": learning_rate,
            "weight_decay": 0.0 if name == VECTORS else weight_decay,
        }
        for name, parameters in members.items()
        if parameters
    ]


def decay_text(groups: Sequence[dict[str, Any]]) -> str:
    """How many tensors and parameters of this rank are decayed, and how many are not."""
    counts = {True: [0, 0], False: [0, 0]}
    for group in groups:
        count = counts[group["name"] != VECTORS]
        count[0] += len(group["params"])
        count[1] += sum(math.prod(_shape(parameter)) for parameter in group["params"])
    decayed, others = (f"{n} tensors with {size:,} parameters" for n, size in counts.values())
    return f"weight decay on this rank: {decayed}; none on {others}"


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    # ZeRO-3 may have emptied the parameter already; its full shape is kept beside it.
    return tuple(getattr(parameter, "full_shape", parameter.shape))


def _group_of(parameter: nn.Parameter) -> str:
    if len(_shape(parameter)) < 2:
        return VECTORS
    return VOCABULARY if getattr(parameter, "is_vocabulary", False) else HIDDEN
