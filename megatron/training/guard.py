"""What follows from a step that spikes or is not finite: it is refused, counted, and at last fatal.

SPIKE_POLICY=skip and rollback judge a step before its update, which costs one wait for the device
and one message between the ranks; off and warn judge at a log line and cost nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import SupportsFloat

import torch
from torch import Tensor

from megatron.config.schema import StabilityConfig
from megatron.engine import Engine
from megatron.parallel.control import Control
from megatron.training.stability import Judgement, SpikeDetector

LOWEST_SCALE = 1.0  # of fp16; above it an overflow makes the scaler try half the scale


class Unstable(RuntimeError):
    """Not finite, or spiking beyond the policy."""

    exit_status = 5


class Later:
    """A flag on its way to the host: reading it waits for the work queued before it, not after."""

    def __init__(self, flag: bool | Tensor) -> None:
        self._flag, self._event = flag, None
        if isinstance(flag, Tensor) and flag.device.type != "cpu":
            self._flag = flag.to("cpu", non_blocking=True)
            self._event = torch.Event(flag.device)
            self._event.record()

    def read(self) -> bool:
        """The flag."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)


class Guard:
    """Judges the steps of a run; all ranks call the same methods in the same order.

    Args:
        settings: the policy.
        control: all ranks.
        scales: the loss is scaled (fp16): an overflow is the scaler's search, no spike.

    Attributes:
        bad_steps: steps in a row that should have changed the weights and did not; the search of
            fp16's scaler is left out, and so are ranges to skip.
        refused: steps that changed no weight, to be taken over and set to 0 by the Trainer.
    """

    def __init__(self, settings: StabilityConfig, control: Control, *, scales: bool) -> None:
        self.bad_steps = self.refused = 0
        self._unread: deque[Later] = deque()
        self._scale = 1.0
        self._settings, self._control, self._scales = settings, control, scales
        self._detector = SpikeDetector(settings.spike_window, settings.spike_threshold)
        self._judged: Judgement | None = None

    @property
    def gates(self) -> bool:
        """Whether steps are judged before their update."""
        return self._settings.spike_policy in ("skip", "rollback")

    def gating(self, engine: Engine) -> AbstractContextManager[None]:
        """Around a step of the engine: refuses its update where the step is a spike."""
        self._judged = None
        return engine.gated(self._gate) if self.gates else nullcontext()

    def stepped(self, loss: SupportsFloat, engine: Engine) -> Judgement | None:
        """Counts the step just taken; its judgement where it is known to be a spike.

        A flag on the device is read one step later, when the next step is queued behind it; at once
        where something depends on it: a policy, fp16's scaler, or a bad step before.
        """
        applied = engine.step_applied
        self._unread.append(Later(applied))
        self._scale = engine.loss_scale
        prompt = self.gates or self._scales or self._settings.max_bad_steps == 1
        later = isinstance(applied, Tensor) and not prompt
        if self.settle(leave=int(later)) and self.gates:
            self._judged = self._agreed(float(loss), math.inf)  # the engine refused it
        judged = self._judged
        return judged if judged is not None and judged.is_spike else None

    def settle(self, leave: int = 0) -> bool:
        """Counts the steps whose flags are unread, but for the last `leave`; before each save.

        Returns:
            Whether the last one counted was refused by the engine, not in the scaler's search.
        """
        broken = False
        while len(self._unread) > (0 if self.bad_steps else leave):
            applied = self._unread.popleft().read()
            self.refused += int(not applied)
            # The scaler's search ends at the lowest scale, or with a gradient that fits.
            broken = not applied and self._judged is None
            searching = broken and self._scales and self._scale > LOWEST_SCALE
            if searching:
                broken = False
            else:
                self.bad_steps = 0 if applied else self.bad_steps + 1
        return broken

    def recorded(
        self, steps: Sequence[tuple[float, float | None] | None], last: int
    ) -> list[tuple[int, Judgement]]:
        """The spikes among the steps of a record, where steps are not judged before.

        Args:
            steps: (loss, gradient norm) of each, None for a skipped one.
            last: number of the last one.

        Returns:
            (number, judgement) of each spike.
        """
        found = []
        for number, step in enumerate(steps, start=last - len(steps) + 1):
            loss, norm = step or (0.0, None)
            if self._settings.spike_policy != "warn" or norm is None:
                continue
            if self._scales and math.isfinite(loss) and not math.isfinite(norm):
                continue
            judgement = self._detector.judge(loss, norm)
            self._detector.add(judgement)
            if judgement.is_spike:
                found.append((number, judgement))
        return found

    @property
    def is_beyond_policy(self) -> bool:
        """Whether MAX_BAD_STEPS steps in a row have changed no weight."""
        limit = self._settings.max_bad_steps
        return limit > 0 and self.bad_steps >= limit

    def _gate(self, loss: SupportsFloat, norm: SupportsFloat) -> bool:
        self._judged = self._agreed(float(loss), float(norm))
        return not self._judged.is_spike

    def _agreed(self, loss: float, norm: float) -> Judgement:
        """This rank's scores with the verdict of all ranks: one that finds a spike decides."""
        own = self._detector.judge(loss, norm)
        (spikes,) = self._control.maximum([int(own.is_spike)])
        judgement = replace(own, is_spike=bool(spikes))
        self._detector.add(judgement)
        return judgement
