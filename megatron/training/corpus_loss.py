"""Training loss of each corpus: sums and counts beside the loss, on the ranks that compute it.

The upper half of a sample's labels carries the number of its corpus, so it is right under any
schedule, layout and order of micro-batches; labels without it (evaluation) are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.head_loss import Targets, TargetsOf

_SHIFT = 32  # token ids are below 2^31
_LABEL = (1 << _SHIFT) - 1


def plain_labels(labels: Tensor) -> Tensor:
    """Labels without the number of their corpus."""
    return labels & _LABEL


class CorpusLosses:
    """Sums of token losses, and counts of tokens, by corpus.

    Args:
        corpora: names, equal and in the same order on all ranks.
    """

    def __init__(self, corpora: Sequence[str]) -> None:
        self.corpora = tuple(corpora)
        self._numbers = {name: number for number, name in enumerate(corpora)}
        self._totals: Tensor | None = None  # (2, corpora + 1) float64: sums, counts; 0: no corpus

    def mark(self, labels: Tensor, corpora: Sequence[str]) -> Tensor:
        """Labels (B, S) that carry the corpus of each of the B samples."""
        numbers = torch.tensor([self._numbers[name] + 1 << _SHIFT for name in corpora])
        return labels + numbers.unsqueeze(1).to(labels.device, non_blocking=True)

    def counted(self, targets_of: TargetsOf) -> TargetsOf:
        """The targets of marked labels, whose losses are counted with their weights."""

        def counting(labels: Tensor) -> Targets:
            numbers = labels[:, 0] >> _SHIFT  # (B,)
            targets = targets_of(plain_labels(labels))
            return targets._replace(
                observe=lambda losses: self._add(numbers, losses, targets.weights)
            )

        return counting

    def take(self, device: torch.device) -> dict[str, float]:
        """Mean loss of each corpus since the last call, over all ranks; those unseen left out.

        An all-reduce over all ranks. Ranks with the same losses (tensor parallel) add equally to
        sums and counts, which keeps their ratio; ranks that compute no loss add nothing.
        """
        totals = self._totals_on(device)
        if dist.is_initialized():
            dist.all_reduce(totals)
        self._totals = None
        sums, counts = totals.tolist()
        return {
            name: total / count
            for name, total, count in zip(self.corpora, sums[1:], counts[1:], strict=True)
            if count
        }

    def _add(self, numbers: Tensor, losses: Tensor, weights: Tensor | None) -> None:
        weights = torch.ones_like(losses) if weights is None else weights
        sums = (losses * weights).sum(dim=1, dtype=torch.float64)
        counts = weights.sum(dim=1, dtype=torch.float64)
        self._totals = self._totals_on(losses.device)
        self._totals.index_add_(1, numbers, torch.stack([sums, counts]))

    def _totals_on(self, device: torch.device) -> Tensor:
        if self._totals is not None:
            return self._totals
        return torch.zeros(2, len(self.corpora) + 1, dtype=torch.float64, device=device)
