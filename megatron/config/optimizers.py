"""OPT: the accepted optimizers, and why other well-known ones are refused."""

from __future__ import annotations

import difflib

_APEX = "apex is not a dependency; torch's own kernel does the same update"
_IPEX = "Intel's extension for PyTorch is no longer released; torch runs on Intel GPUs without it"
_COMPRESSED = "its compressed communication needs DeepSpeed's own gradient path"
_EIGHT_BIT = "needs bitsandbytes, which has CUDA kernels only"
_GALORE = "projects each gradient matrix, which ZeRO's flat partitions do not keep"
_CLIP = "rescales attention logits inside the optimizer, which the model does not expose"

# name -> None where accepted, else (reason, nearest accepted name)
OPTIMIZERS: dict[str, tuple[str, str] | None] = {
    "adamw": None,
    "adam": None,
    "sgd": None,
    "muon": None,
    "lamb": None,
    "adafactor": None,
    "adamwschedulefree": None,
    "sophiag": None,
    "apex.adam": (_APEX, "adamw"),
    "apex.sgd": (_APEX, "sgd"),
    "ds.adamw": ("DeepSpeed would compile FusedAdam; torch's fused AdamW does the same", "adamw"),
    "ds.fusedlamb": ("DeepSpeed's FusedLamb is compiled for CUDA only", "lamb"),
    "ds.onebitlamb": (_COMPRESSED, "lamb"),
    "ipex.lamb": (_IPEX, "lamb"),
    "ipex.fusedlamb": (_IPEX, "lamb"),
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

# These compute norms, factors or orthogonal bases of a whole matrix.
WHOLE_MATRIX = ("muon", "lamb", "adafactor")
# torch's rules step on the flat partitions wherever they lie.
ON_THE_HOST = ("adamw", "adam", "sgd")


def accepted() -> tuple[str, ...]:
    """Names that can be trained with."""
    return tuple(name for name, refusal in OPTIMIZERS.items() if refusal is None)


def problem(value: str, name: str = "OPT") -> str | None:
    """Why `value` cannot be used, with the nearest name that can; None where it can."""
    if value in OPTIMIZERS:
        refusal = OPTIMIZERS[value]
        if refusal is None:
            return None
        reason, nearest = refusal
        return f"{name}={value} is not offered: {reason}. Nearest: {name}={nearest}."
    close = difflib.get_close_matches(value.lower(), accepted(), n=1, cutoff=0.5)
    nearest_text = f" Did you mean {close[0]}?" if close else ""
    return (
        f"{name}={value} is not a known optimizer.{nearest_text} Accepted: {', '.join(accepted())}."
    )
