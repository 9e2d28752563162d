"""The chunked head against torch's matrix product and cross entropy, which keep all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron.parallel import head_loss as file
from megatron.parallel.groups import SERIAL
from megatron.parallel.head_loss import Targets, chunk_tokens, head_loss
from tests.parallel.axis import whole_world
from tests.plan.engine_peak import Held
from tests.spawn import RankError, run

BATCH, LENGTH, HIDDEN = 2, 6, 5
Result = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, token losses, gradients of hidden and weight


def inputs(vocab: int, padded: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, a weight whose padding would win, labels and token weights."""
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(BATCH, LENGTH, HIDDEN, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64)
    weight[vocab:] = 100.0
    labels = torch.arange(BATCH * LENGTH).mul(7).add(vocab - 1).remainder(vocab)
    weights = torch.linspace(-1, 2, BATCH * LENGTH)
    shape = (BATCH, LENGTH)
    return hidden.to(dtype), weight.to(dtype), labels.view(shape), weights.view(shape)


def reference(vocab: int, padded: int, dtype: torch.dtype, weighted: bool) -> Result:
    """In fp64, from the same rounded inputs."""
    hidden, weight, labels, weights = inputs(vocab, padded, dtype)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t())[..., :vocab]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(labels.shape)
    loss = 0.25 * (losses * weights).sum() if weighted else losses.mean()
    loss.backward()
    return loss.detach(), losses.detach(), hidden.grad, weight.grad


def chunked(
    vocab: int,
    padded: int,
    dtype: torch.dtype,
    weighted: bool,
    tokens: int,
    block: int,
    positions: bool = False,
) -> Result:
    """On this rank, in chunks of so many tokens; `positions`: the hidden states are sharded."""
    tp = whole_world()
    hidden, weight, labels, weights = inputs(vocab, padded, dtype)
    hidden = hidden.chunk(tp.size, 1)[tp.rank].clone() if positions else hidden
    hidden, weight = hidden.requires_grad_(), weight.chunk(tp.size)[tp.rank].clone()
    weight.requires_grad_()
    seen: list[Tensor] = []
    more: dict[str, Any] = {"weights": weights, "scale": torch.tensor(0.25)} if weighted else {}
    targets = Targets(labels, observe=seen.append, **more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file, "chunk_tokens", lambda *_: tokens)
        patch.setattr(file, "BLOCK_PER_THREAD", block)
        loss = head_loss(hidden, weight, targets, tp, vocab, positions)
    assert not seen[0].requires_grad
    (2 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), seen[0], hidden.grad / 2, weight.grad / 2


def compare(results: list[Result], want: Result, positions: bool, **tolerance: float) -> None:
    """Every rank's loss, and the gradients put together."""
    for loss, losses, hidden, _ in results:
        torch.testing.assert_close(loss.double(), want[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(losses.double(), want[1], rtol=1e-5, atol=1e-5)
        if not positions:
            torch.testing.assert_close(hidden.double(), want[2], **tolerance)
    if positions:
        whole = torch.cat([hidden for _, _, hidden, _ in results], dim=1)
        torch.testing.assert_close(whole.double(), want[2], **tolerance)
    weight = torch.cat([result[3] for result in results])
    torch.testing.assert_close(weight.double(), want[3], **tolerance)


SIZES = [(16, 16), (13, 16), (9, 32), (3, 16)]  # the last ones leave ranks with padding alone


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("vocab", "padded"), SIZES)
def test_losses_and_gradients_are_those_of_torch(
    vocab: int, padded: int, ranks: int, positions: bool
) -> None:
    if positions and LENGTH % ranks:
        ranks = 3
        padded = 3 * padded
    for weighted, tokens, block in [(False, 12, 1 << 17), (True, 5, 1)]:
        want = reference(vocab, padded, torch.float32, weighted)
        results = run(
            chunked, ranks, vocab, padded, torch.float32, weighted, tokens, block, positions
        )
        compare(results, want, positions, rtol=1e-5, atol=1e-5)
        assert not torch.cat([result[3] for result in results])[vocab:].any()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 64), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_any_chunk_and_block(
    tokens: int, block: int, vocab: int, padding: int, weighted: bool
) -> None:
    """Tokens that chunks do not divide, and blocks that rows do not."""
    sizes = (vocab, vocab + padding, torch.float64, weighted)
    want = reference(*sizes)
    got = one_process(*sizes, tokens, block)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def one_process(*arguments: Any) -> Result:
    """`chunked` here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.__globals__, "whole_world", lambda: SERIAL)
        return chunked(*arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [1, 2])
def test_half_precision_has_fp32_losses_and_rounds_gradients(
    ranks: int, dtype: torch.dtype
) -> None:
    """A rounding of bf16 is 2^-9; a gradient has a few, of softmax, product, sum and scale."""
    want = reference(13, 16, dtype, True)
    small = 2.0**-6 if dtype == torch.bfloat16 else 2.0**-9
    results = run(chunked, ranks, 13, 16, dtype, True, 5, 1 << 17)
    for loss, losses, hidden, weight in results:
        assert loss.dtype == losses.dtype == torch.float32 and hidden.dtype == weight.dtype == dtype
        assert float(loss) == pytest.approx(float(want[0]), rel=small / 2)  # logits are rounded
    weight = torch.cat([result[3] for result in results]).double()
    for got, exact in ((results[0][2].double(), want[2]), (weight, want[3])):
        assert float((got - exact).norm() / exact.norm()) < small


def random(vocab: int, tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states (1, T, H), weight and labels; both floats want gradients."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).mul(0.05).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocab, (1, tokens), generator=generator)


def test_eight_chunks_in_bf16_are_as_good_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's sum is rounded once per chunk: its error, 0.2%, becomes at most twice that."""
    errors = {}
    hidden, weight, labels = random(64, 512, 32, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    F.cross_entropy((exact[0] @ exact[1].t())[0], labels[0]).backward()
    for tokens in (512, 64):
        monkeypatch.setattr(file, "chunk_tokens", lambda *_, tokens=tokens: tokens)
        weight.grad = None
        head_loss(hidden, weight, Targets(labels), SERIAL, 64).backward()
        assert weight.grad is not None and exact[1].grad is not None
        difference = weight.grad.double() - exact[1].grad
        errors[tokens] = float(difference.norm() / exact[1].grad.norm())
    assert errors[512] < 0.003 and errors[64] < 0.006, errors


def test_an_fp16_sum_does_not_overflow_before_it_is_scaled() -> None:
    """4,096 tokens with one label: the sum over them is beyond 65,504, their mean is not."""
    hidden, weight, labels = random(64, 4096, 8, torch.float16)
    hidden = torch.full_like(hidden, 30.0).requires_grad_()
    head_loss(hidden, weight, Targets(torch.zeros_like(labels)), SERIAL, 64).backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())
    assert float(weight.grad[0].abs().min()) > 10


def test_a_confident_prediction_keeps_its_gradient_in_bf16() -> None:
    """The softmax at the label rounds to 1; its gradient is the loss, not 0."""
    hidden = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    head_loss(hidden, weight, Targets(torch.zeros(1, 1, dtype=torch.int64)), SERIAL, 2).backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([-3.35e-4, 3.35e-4], rel=0.01)


@pytest.mark.parametrize("gap", [80.0, 95.0, 3000.0])
def test_a_label_next_to_impossible_has_its_loss(gap: float) -> None:
    """Its softmax is no normal number of fp32, or 0; other tokens of its block have theirs."""
    hidden = torch.tensor([[[1.0], [-1.0], [0.25]]], requires_grad=True)
    weight = torch.tensor([[0.0], [gap], [gap / 2]], requires_grad=True)
    labels = torch.tensor([[0, 2, 1]])
    seen: list[Tensor] = []
    head_loss(hidden, weight, Targets(labels, observe=seen.append), SERIAL, 3).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy((exact[0] @ exact[1].t())[0], labels[0], reduction="none")
    want.mean().backward()
    torch.testing.assert_close(seen[0][0].double(), want.detach(), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-6, atol=1e-6 * gap)


def test_a_scale_that_bf16_cannot_hold_is_not_rounded() -> None:
    """Else each gradient would be wrong by one factor, which no sum averages out."""
    scale = torch.tensor(1 / 3 * (1 + 2**-9))
    results = []
    for factor in (torch.tensor(1.0), scale):
        hidden, weight, labels = random(64, 32, 16, torch.bfloat16)
        head_loss(hidden, weight, Targets(labels, scale=factor), SERIAL, 64).backward()
        assert weight.grad is not None and hidden.grad is not None
        results.append(torch.cat([weight.grad.flatten(), hidden.grad.flatten()]).double())
    ratio = float((results[1] @ results[0]) / (results[0] @ results[0]))
    assert ratio == pytest.approx(float(scale), rel=2e-4)


def test_without_a_gradient_there_are_losses_alone() -> None:
    hidden, weight, labels = random(40, 24, 8, torch.float32)
    want = head_loss(hidden, weight, Targets(labels), SERIAL, 40)
    with torch.no_grad(), Held() as held:
        held.reset()
        before = held.peak
        got = head_loss(hidden, weight, Targets(labels), SERIAL, 40)
    assert torch.equal(got, want.detach()) and not got.requires_grad
    assert held.peak - before < 3 * 4 * 24 * 40


def test_labels_are_drawn_from_the_logits_of_their_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = random(40, 24, 8, torch.float32)
    monkeypatch.setattr(file, "chunk_tokens", lambda *_: 7)
    draws = torch.linspace(0, 1, 24).view(1, 24)

    def sample(logits: Tensor, draws: Tensor) -> Tensor:
        return (logits.argmax(-1) + (draws > 0.5).long()).remainder(40)

    labels = sample((hidden @ weight.t())[0], draws[0]).view(1, 24)
    got = head_loss(hidden, weight, Targets(draws, sample=sample), SERIAL, 40)
    torch.testing.assert_close(got, head_loss(hidden, weight, Targets(labels), SERIAL, 40))


def test_a_nan_stays_a_nan_and_stays_in_its_token() -> None:
    hidden, weight, labels = random(40, 24, 8, torch.float32)
    hidden.data[0, 3] = torch.nan
    seen: list[Tensor] = []
    loss = head_loss(hidden, weight, Targets(labels, observe=seen.append), SERIAL, 40)
    assert bool(loss.isnan()) and seen[0].isnan().nonzero().tolist() == [[0, 3]]


def test_a_second_backward_is_refused() -> None:
    """The gradients are scaled in place: a second time would scale them again."""
    hidden, weight, labels = random(40, 24, 8, torch.float32)
    loss = head_loss(hidden, weight, Targets(labels), SERIAL, 40)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def loss_of_label(label: int) -> None:
    tp = whole_world()
    targets = Targets(torch.tensor([[0, label]]))
    head_loss(torch.zeros(1, 2, 3), torch.zeros(16 // tp.size, 3), targets, tp, 13)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("label", [-100, -1, 13, 16])
def test_a_label_outside_the_vocabulary_raises_at_every_size(label: int, ranks: int) -> None:
    with pytest.raises(RankError, match=rf"label id {label} is outside the vocabulary \[0, 13\)"):
        run(loss_of_label, ranks, label)


@pytest.mark.parametrize(
    ("tokens", "columns", "dtype", "chunk"),
    [
        (8192, 256000, torch.bfloat16, 1024),
        (8192, 256000, torch.float32, 1024),
        (8192, 128256, torch.bfloat16, 2048),
        (2048, 16384, torch.float32, 2048),
        (5000, 256000, torch.bfloat16, 1000),
        (8192, 1000, torch.float16, 1024),
        (1, 256000, torch.bfloat16, 1),
    ],
)
def test_chunks_are_equal_and_fill_the_budget(
    tokens: int, columns: int, dtype: torch.dtype, chunk: int
) -> None:
    assert chunk_tokens(tokens, columns, dtype) == chunk


def held_by_the_head(tokens: int, vocab: int, width: int, dtype: torch.dtype) -> int:
    """Bytes at the most beside hidden states, weight and the gradients of the two."""
    hidden, weight, labels = random(vocab, tokens, width, dtype)
    with Held() as held:
        held.reset()
        before = held.peak
        head_loss(hidden, weight, Targets(labels), SERIAL, vocab).backward()
    gradients = sum(x.untyped_storage().nbytes() for x in (hidden, weight))
    return held.peak - before - gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_beside_the_gradients_there_is_one_chunk(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, vocab, width = 256, 4096, 8
    monkeypatch.setattr(file, "CHUNK_TOKENS", 32)
    monkeypatch.setattr(file, "CHUNK_BYTES", 1)
    monkeypatch.setattr(file, "BLOCK_PER_THREAD", 1)
    extra = held_by_the_head(tokens, vocab, width, dtype)
    chunk, block = 32 * vocab * dtype.itemsize, 4 * torch.get_num_threads() * vocab
    assert chunk < extra < chunk + 2 * block + 64 * tokens


@pytest.mark.long
def test_256000_words_take_less_than_1_5_gb() -> None:
    """Two chunks of the real shape; the extra bytes depend on neither tokens nor width."""
    assert held_by_the_head(2048, 256000, 16, torch.bfloat16) < 1.5e9
