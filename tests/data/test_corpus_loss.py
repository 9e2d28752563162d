"""The loss of each corpus is the mean over its tokens on all ranks, however they are spread."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.training.corpus_loss import CorpusLosses, plain_labels
from tests.spawn import run

NAMES = ("a", "b", "unseen")
# rank -> micro-batches of (corpus, loss of each token of a sample); the last rank computes none
SHARES = (
    [[("a", 1.0), ("a", 2.0)], [("b", 3.0), ("a", 6.0)]],
    [[("b", 5.0), ("b", 10.0)], [("b", 30.0), ("b", 2.0)]],
    [],
)


def losses_on_a_rank() -> list[dict[str, float]]:
    corpora = CorpusLosses(NAMES)

    def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
        assert torch.equal(labels, torch.full_like(labels, 7))  # nothing left of the mark
        return logits

    loss = corpora.counted(token_loss)
    for samples in SHARES[dist.get_rank()]:
        labels = torch.full((len(samples), 4), 7)
        logits = torch.tensor([[value] * 4 for _, value in samples])
        marked = corpora.mark(labels, [name for name, _ in samples])
        assert torch.equal(plain_labels(marked), labels)
        assert loss(logits, marked).item() == logits.mean().item()
        loss(100 * logits, labels)  # an evaluation: not marked, not counted
    device = torch.device("cpu")
    return [corpora.take(device), corpora.take(device)]


def test_means_are_over_the_tokens_of_all_ranks() -> None:
    wanted = {"a": (1 + 2 + 6) / 3, "b": (3 + 5 + 10 + 30 + 2) / 5}
    assert run(losses_on_a_rank, 3) == [[wanted, {}]] * 3


class Half:
    """Documents of which the second half of each sample does not count."""

    weights = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(2, 4)

    def mean(self, losses: Tensor) -> Tensor:
        return (losses * self.weights).sum()


def masked_losses() -> tuple[float, dict[str, float]]:
    corpora = CorpusLosses(NAMES)
    loss = corpora.counted(lambda logits, _: logits, Half())
    logits = torch.tensor([[1.0, 3.0, 50.0, 50.0], [5.0, 7.0, 50.0, 50.0]])
    value = loss(logits, corpora.mark(torch.zeros(2, 4, dtype=torch.long), ["a", "b"]))
    return float(value), corpora.take(torch.device("cpu"))


def test_tokens_left_out_of_the_loss_are_left_out_of_the_corpora() -> None:
    assert masked_losses() == (16.0, {"a": 2.0, "b": 6.0})
