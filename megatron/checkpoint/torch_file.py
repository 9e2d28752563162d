"""Files of torch.save that others wrote, read without running anything that they name.

torch's weights-only reader makes tensors and plain values. Every other class or function that a
file names becomes a `Inert`, which keeps what it is given and does nothing.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals


class Inert:
    """Stands for an object of another program: its state as attributes; arguments are dropped."""

    def __new__(cls, *args: Any) -> Inert:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        """Takes any arguments."""

    def __setstate__(self, state: Any) -> None:
        """Keeps the state: an attribute per field, or all of it as `state`."""
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def load(path: Path) -> Any:
    """What a file holds; its tensors stay on disk until they are used.

    Raises:
        ValueError: it is damaged, or no file of torch.save.
        OSError: it cannot be read.
    """
    try:
        named = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(Inert, name) for name in named]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, AttributeError, UnpicklingError) as error:
        # Around its reason torch advises an unsafe way of reading.
        lines = str(error).replace("WeightsUnpickler error: ", "").splitlines()
        reasons = [line for line in lines if line.strip() and "weights_only" not in line]
        reason = reasons[0].strip() if reasons else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None


def read(path: Path) -> dict[str, Any]:
    """The dictionary of a file; errors as of `load`, also where it holds something else."""
    content = load(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, no dictionary")
    return content
