"""Stopping a run: signals are recorded, ranks agree after a step, the loop saves and ends."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers the first signal; a second SIGINT ends the process at once.

    A context manager around training, which restores the previous handlers at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._signal = 0
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in _SIGNALS:
            self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def all_reduced_signal(self) -> int:
        """The signal that any rank has received, 0 for none; a collective of one number."""
        flag = torch.tensor(self._signal, dtype=torch.int32, device=self._device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag)
