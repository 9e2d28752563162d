"""The loss of each corpus is the mean over its tokens on all ranks, however they are spread."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.head_loss import Targets
from megatron.training.corpus_loss import CorpusLosses, plain_labels
from tests.spawn import run

NAMES = ("a", "b", "unseen")
# rank -> micro-batches of (corpus, loss of each token of a sample); the last rank computes none
SHARES = (
    [[("a", 1.0), ("a", 2.0)], [("b", 3.0), ("a", 6.0)]],
    [[("b", 5.0), ("b", 10.0)], [("b", 30.0), ("b", 2.0)]],
    [],
)


def observe(targets: Targets, losses: Tensor) -> None:
    """What the head does with the losses of its tokens."""
    assert torch.equal(targets.labels, torch.full((len(losses), 4), 7))  # no mark is left
    assert targets.observe is not None
    targets.observe(losses)


def losses_on_a_rank() -> list[dict[str, float]]:
    corpora = CorpusLosses(NAMES)
    targets_of = corpora.counted(Targets)
    for samples in SHARES[dist.get_rank()]:
        labels = torch.full((len(samples), 4), 7)
        losses = torch.tensor([[value] * 4 for _, value in samples])
        marked = corpora.mark(labels, [name for name, _ in samples])
        assert torch.equal(plain_labels(marked), labels)
        observe(targets_of(marked), losses)
        observe(targets_of(labels), 100 * losses)  # an evaluation: not marked, not counted
    device = torch.device("cpu")
    return [corpora.take(device), corpora.take(device)]


def test_means_are_over_the_tokens_of_all_ranks() -> None:
    wanted = {"a": (1 + 2 + 6) / 3, "b": (3 + 5 + 10 + 30 + 2) / 5}
    assert run(losses_on_a_rank, 3) == [[wanted, {}]] * 3


def test_tokens_left_out_of_the_loss_are_left_out_of_the_corpora() -> None:
    corpora, weights = CorpusLosses(NAMES), torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(2, 4)
    targets_of = corpora.counted(lambda labels: Targets(labels, weights))
    losses = torch.tensor([[1.0, 3.0, 50.0, 50.0], [5.0, 7.0, 50.0, 50.0]])
    targets = targets_of(corpora.mark(torch.full((2, 4), 7), ["a", "b"]))
    assert targets.weights is weights
    observe(targets, losses)
    assert corpora.take(torch.device("cpu")) == {"a": 2.0, "b": 6.0}
