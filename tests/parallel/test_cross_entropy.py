from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.parallel.cross_entropy import (
    mean_vocab_parallel_cross_entropy,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from megatron.parallel import cross_entropy
from megatron.parallel.groups import SERIAL
from tests.parallel.axis import whole_world
from tests.spawn import RankError, run

BATCH, LENGTH = 2, 5


def logits_of(vocab: int, padded: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Large logits, and larger ones in the padding, which must not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(BATCH, LENGTH, padded, generator=generator)
    logits[..., vocab:] = 1000.0
    return logits.to(dtype)


def labels_of(vocab: int) -> Tensor:
    return torch.arange(BATCH * LENGTH).mul(7).add(vocab - 1).remainder(vocab).view(BATCH, LENGTH)


def token_weights() -> Tensor:
    return torch.linspace(-1, 2, BATCH * LENGTH).view(BATCH, LENGTH)


def on_ranks(vocab: int, padded: int, dtype: torch.dtype, block: int) -> tuple[Tensor, Tensor]:
    cross_entropy.ELEMENTS_PER_BLOCK = block
    tp = whole_world()
    logits = logits_of(vocab, padded, dtype).chunk(tp.size, -1)[tp.rank].clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(logits, labels_of(vocab), tp, vocab)
    losses.backward(token_weights())
    return losses.detach(), logits.grad


def reference(vocab: int, padded: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits = logits_of(vocab, padded, dtype).requires_grad_()
    used = logits[..., :vocab].float().transpose(1, 2)
    losses = F.cross_entropy(used, labels_of(vocab), reduction="none")
    losses.backward(token_weights())
    return losses.detach(), logits.grad


@pytest.mark.parametrize("block", [1, 48, 1 << 24])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("vocab", "padded"), [(16, 16), (13, 16), (9, 32), (3, 16)])
def test_losses_and_gradients_are_those_of_torch(
    vocab: int, padded: int, ranks: int, block: int
) -> None:
    results = run(on_ranks, ranks, vocab, padded, torch.float32, block)
    want_losses, want_grad = reference(vocab, padded, torch.float32)
    for losses, _ in results:
        torch.testing.assert_close(losses, want_losses, rtol=1e-6, atol=2e-6)
    grad = torch.cat([grad for _, grad in results], -1)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)
    assert torch.count_nonzero(grad[..., vocab:]) == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_logits_have_fp32_losses(ranks: int) -> None:
    results = run(on_ranks, ranks, 13, 16, torch.bfloat16, 1 << 24)
    want_losses, want_grad = reference(13, 16, torch.bfloat16)
    for losses, grad in results:
        assert losses.dtype == torch.float32 and grad.dtype == torch.bfloat16
        torch.testing.assert_close(losses, want_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(torch.cat([grad for _, grad in results], -1), want_grad)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = logits_of(5, 8, torch.float64).requires_grad_()
    labels = labels_of(5)
    assert torch.autograd.gradcheck(
        lambda x: vocab_parallel_cross_entropy(x, labels, SERIAL, 5), logits
    )


def test_the_logits_are_left_as_they_were() -> None:
    logits = logits_of(13, 16).requires_grad_()
    before = logits.detach().clone()
    mean_vocab_parallel_cross_entropy(logits, labels_of(13), SERIAL, 13).backward()
    assert torch.equal(logits, before)


def test_the_mean_is_over_tokens() -> None:
    logits, labels = logits_of(13, 16), labels_of(13)
    mean = mean_vocab_parallel_cross_entropy(logits, labels, SERIAL, 13)
    torch.testing.assert_close(
        mean, F.cross_entropy(logits[..., :13].reshape(-1, 13), labels.reshape(-1))
    )


def test_a_nan_logit_gives_a_nan_loss() -> None:
    logits = logits_of(13, 16)
    logits[0, 0, 3] = torch.nan
    losses = vocab_parallel_cross_entropy(logits, labels_of(13), SERIAL, 13)
    assert torch.isnan(losses[0, 0]) and torch.isfinite(losses[1]).all()


def test_nothing_of_fp32_size_is_kept_for_the_backward() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits = torch.randn(4, 8, 1024, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        vocab_parallel_cross_entropy(logits, torch.zeros(4, 8, dtype=torch.int64), SERIAL, 1024)
    others = [tensor for tensor in kept if tensor.data_ptr() != logits.data_ptr()]
    assert len(others) < len(kept) and all(tensor.numel() <= 4 * 8 for tensor in others)


def loss_of_label(label: int) -> None:
    tp = whole_world()
    labels = torch.tensor([[0, label]])
    vocab_parallel_cross_entropy(torch.zeros(1, 2, 16 // tp.size), labels, tp, 13)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("label", [-100, -1, 13, 16])
def test_a_label_outside_the_vocabulary_raises_at_every_size(label: int, ranks: int) -> None:
    with pytest.raises(RankError, match=rf"label id {label} is outside the vocabulary \[0, 13\)"):
        run(loss_of_label, ranks, label)
