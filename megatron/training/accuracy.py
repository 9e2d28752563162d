"""How often the likeliest token is the right one, found beside the loss, a chunk at a time.

Only evaluations ask: the targets of a training step stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.control import Control
from megatron.parallel.groups import Axis
from megatron.parallel.head_loss import Targets, TargetsOf
from megatron.parallel.layers import check_token_ids


def perplexity(loss: float) -> float:
    """e to a loss, which is taken to be 20 at most."""
    return math.exp(min(loss, 20.0))  # this order keeps a nan


def with_correct(
    targets: Targets, tp: Axis, vocab_size: int, seen: Callable[[Tensor, Tensor], None]
) -> Targets:
    """The targets, for which `seen` gets the losses (B, S) and which tokens are right (B, S).

    Forward: for each chunk an all-gather of two numbers per token over `tp`.

    Args:
        targets: whose labels are (B, S).
        tp: tensor-parallel axis.
        vocab_size: the vocabulary without padding.
        seen: called once, without a gradient.
    """
    assert targets.sample is None, "labels that are drawn are not right or wrong"
    check_token_ids(targets.labels, vocab_size, "label")
    chunks: list[Tensor] = []

    def sample(logits: Tensor, labels: Tensor) -> Tensor:
        chunks.append(likeliest(logits, tp) == labels)
        return labels

    def observe(losses: Tensor) -> None:
        seen(losses, torch.cat(chunks).view_as(losses))
        if targets.observe is not None:
            targets.observe(losses)

    return targets._replace(sample=sample, observe=observe)


def likeliest(logits: Tensor, tp: Axis) -> Tensor:
    """Ids (C,) of the largest logits; of equal ones the lowest id, at every TP.

    Args:
        logits: (C, V/tp), this rank's columns.
        tp: tensor-parallel axis.
    """
    largest, column = logits.max(dim=1)
    ids = column + tp.rank * logits.shape[1]
    if tp.size == 1:
        return ids
    exact = torch.promote_types(logits.dtype, torch.float32)  # for ids below 2^24
    mine = torch.stack([largest.to(exact), ids.to(exact)])
    every = mine.new_empty(tp.size, *mine.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=tp.group)
    rank = every[:, 0].argmax(dim=0, keepdim=True)  # the first of equal ones
    return every[:, 1].gather(0, rank).squeeze(0).long()


class Accuracy:
    """The tokens of an evaluation that are predicted right, as a share of those that count.

    Args:
        tp: tensor-parallel axis.
        vocab_size: the vocabulary without padding.
    """

    def __init__(self, tp: Axis, vocab_size: int) -> None:
        self._tp, self._vocab_size = tp, vocab_size
        self._sums: list[Tensor] = []  # (2,): right, counted

    def counted(self, targets_of: TargetsOf) -> TargetsOf:
        """The same targets, whose tokens are counted."""

        def counting(labels: Tensor) -> Targets:
            targets = targets_of(labels)
            return with_correct(
                targets,
                self._tp,
                self._vocab_size,
                lambda _, correct: self._add(correct, targets.weights),
            )

        return counting

    def share(self, control: Control) -> float:
        """Over all ranks; nan where no token counts. A collective.

        Ranks with the same tokens (tensor parallel) add equally to both numbers.
        """
        own = torch.stack(self._sums).sum(0).tolist() if self._sums else [0, 0]
        right, counted = control.sum(own)
        return right / counted if counted else float("nan")

    def _add(self, correct: Tensor, weights: Tensor | None) -> None:
        counts = torch.ones_like(correct) if weights is None else weights > 0
        self._sums.append(torch.stack([(correct & counts).sum(), counts.sum()]))
