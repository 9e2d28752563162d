"""OPT: the accepted optimizers, and why other well-known ones are refused."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_APEX = "apex is not a dependency"
_IPEX = "Intel's extension for PyTorch is no longer released; torch runs on Intel GPUs without it"
_COMPRESSED = "its compressed communication needs DeepSpeed's own gradient path"
_EIGHT_BIT = "needs bitsandbytes, which has CUDA kernels only"
_GALORE = "projects each gradient matrix, which ZeRO's flat partitions do not keep"
_CLIP = "rescales attention logits inside the optimizer, which the model does not expose"


@dataclass(frozen=True)
class Rule:
    """An update rule that can be trained with.

    Attributes:
        states: numbers per weight that it keeps beside the fp32 weight.
        whole_matrix: computes norms, factors or orthogonal bases of whole matrices.
        on_the_host: steps on flat partitions on any device, as torch's own rules do.
        make: (parameter groups, the section `optimizer`) -> optimizer; None: the function of its
            name in training/optimizers/rules.py.
    """

    states: int = 2
    whole_matrix: bool = False
    on_the_host: bool = False
    make: Callable[..., Any] | None = None


RULES: dict[str, Rule] = {
    "adamw": Rule(on_the_host=True),
    "adam": Rule(on_the_host=True),
    "sgd": Rule(states=1, on_the_host=True),
    "muon": Rule(states=1, whole_matrix=True),
    "lamb": Rule(whole_matrix=True),
    "adafactor": Rule(states=0, whole_matrix=True),
    "adamwschedulefree": Rule(),
    "sophiag": Rule(),
}

# Other libraries' kernels -> the rule that they compute, and why they are not used.
KERNELS: dict[str, tuple[str, str]] = {
    "apex.adam": ("adamw", _APEX),
    "apex.sgd": ("sgd", _APEX),
    "ds.adamw": ("adamw", "DeepSpeed would compile FusedAdam"),
    "ds.fusedlamb": ("lamb", "DeepSpeed's FusedLamb is compiled for CUDA only"),
    "ipex.lamb": ("lamb", _IPEX),
    "ipex.fusedlamb": ("lamb", _IPEX),
}

# name -> (reason, nearest accepted name)
REFUSED: dict[str, tuple[str, str]] = {
    "ds.onebitlamb": (_COMPRESSED, "lamb"),
    "adam8bit": (_EIGHT_BIT, "adamw"),
    "galoreadamw": (_GALORE, "adamw"),
    "galoreadamw8bit": (_GALORE, "adamw"),
    "galoreadamw8bitperlayer": (_GALORE, "adamw"),
    "galore_adamw": (_GALORE, "adamw"),
    "galore_adamw8bit": (_GALORE, "adamw"),
    "galore_adafactor": (_GALORE, "adafactor"),
    "dshampooadamw": ("distributed Shampoo is not on PyPI and does its own partitioning", "muon"),
    "shampoo": ("keeps Kronecker factors of whole matrices, which ZeRO would partition", "muon"),
    "sgdschedulefree": ("schedule-free averaging is offered for AdamW only", "adamwschedulefree"),
    "adopt": ("is not in torch; AdamW with a higher beta2 is close", "adamw"),
    "muonclip": (_CLIP, "muon"),
    "lion": ("is not in torch; its sign update is close to sophiag's clipped one", "sophiag"),
}  # fmt: skip


def accepted() -> tuple[str, ...]:
    """Names that can be trained with."""
    return tuple(RULES)


def notes(settings: Sequence[tuple[str, str, str]]) -> list[str]:
    """One note for each (key, text, name) that names the kernel of another library."""
    return [
        f"{name}={text} is trained with {KERNELS[text.lower()][0]}, the same rule: "
        f"{KERNELS[text.lower()][1]}"
        for key, text, name in settings
        if key == "optimizer.optimizer" and text.lower() in KERNELS
    ]


def problem(value: str, name: str = "OPT") -> str | None:
    """Why `value` cannot be used, with the nearest name that can; None where it can."""
    if value in RULES:
        return None
    if value in REFUSED:
        reason, nearest = REFUSED[value]
        return f"{name}={value} is not offered: {reason}. Nearest: {name}={nearest}."
    close = difflib.get_close_matches(value.lower(), accepted(), n=1, cutoff=0.5)
    nearest_text = f" Did you mean {close[0]}?" if close else ""
    return (
        f"{name}={value} is not a known optimizer.{nearest_text} Accepted: {', '.join(accepted())}."
    )
