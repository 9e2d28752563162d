"""The head and its cross entropy, a chunk of tokens at a time: [tokens, vocabulary] never exists.

A chunk's logits become their own gradient in place. Where gradients are wanted, those of the hidden
states and of the weight are formed at once, in the forward pass, and only scaled in the backward.
Legend: B batch, S sequence, s = S/tp with sequence_parallel, else S, T = B*S tokens, C tokens of a
chunk, H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron.parallel.groups import Axis
from megatron.parallel.layers import check_token_ids
from megatron.parallel.sequence import all_gather_positions, reduce_scatter_positions
from megatron.parallel.waiting import wait_for

CHUNK_BYTES, CHUNK_TOKENS = 1 << 29, 1 << 10
"""A chunk's logits take up to so many bytes, or, where that is more, have so many tokens: fewer
would leave a GPU's matrix units idle, and round a bf16 gradient of the weight more often."""
BLOCK_ELEMENTS, BLOCK_PER_THREAD = 1 << 25, 1 << 17
"""Logits turned into fp32 at once: 128 MiB, which has rows for all units of a GPU; on a CPU what
a core's cache holds."""


class Targets(NamedTuple):
    """What a head's loss is measured against, and how it is averaged.

    Attributes:
        labels: (B, S) integers; with `sample`, what it takes in their place.
        weights: (B, S) fp32, of the tokens' losses; None: all 1.
        scale: of the weighted sum, a scalar; None: 1/T.
        sample: (logits (C, V/tp), labels (C,)) -> integers (C,); its logits are not to be changed.
        observe: gets the losses of all tokens, (B, S) fp32, without a gradient.
    """

    labels: Tensor
    weights: Tensor | None = None
    scale: Tensor | None = None
    sample: Callable[[Tensor, Tensor], Tensor] | None = None
    observe: Callable[[Tensor], None] | None = None


TargetsOf = Callable[[Tensor], Targets]  # from a micro-batch's labels


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets,
    tp: Axis,
    vocab_size: int,
    sequence_parallel: bool = False,
) -> Tensor:
    """scale * sum(weights * cross entropy of the logits hidden @ weight.T).

    Forward: for each chunk an all-gather of two numbers per token and, where a gradient is wanted,
    an all-reduce of the chunk's hidden gradient; with `sequence_parallel` one all-gather of the
    hidden states and one reduce-scatter of their gradient instead. Backward: no communication.

    Args:
        hidden: (B, s, H); without sequence_parallel equal on all ranks.
        weight: (V/tp, H), this rank's rows.
        targets: equal on all ranks.
        tp: tensor-parallel axis.
        vocab_size: the vocabulary without padding; columns beyond it have probability 0.
        sequence_parallel: `hidden` is this rank's positions.

    Returns:
        A scalar, fp32 (fp64 for fp64 logits), equal on all ranks.

    Raises:
        ValueError: a label is outside [0, vocab_size), at every TP.
    """
    if targets.sample is None:
        check_token_ids(targets.labels, vocab_size, "label")
    total, losses = _HeadLoss.apply(hidden, weight, targets, tp, vocab_size, sequence_parallel)  # type: ignore[no-untyped-call]
    if targets.observe is not None:
        targets.observe(losses)
    scaled: Tensor = total / losses.numel() if targets.scale is None else total * targets.scale
    return scaled


def chunk_tokens(tokens: int, columns: int, dtype: torch.dtype) -> int:
    """Tokens of all chunks but the last, which may be smaller: C from T, V/tp and the type."""
    most = max(CHUNK_TOKENS, CHUNK_BYTES // (columns * dtype.itemsize))
    if dtype == torch.float16:
        most = CHUNK_TOKENS  # sums over more tokens could overflow
    chunks = -(-tokens // most)
    return -(-tokens // max(1, chunks))


class _HeadLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets,
        tp: Axis,
        vocab_size: int,
        sequence_parallel: bool,
    ) -> tuple[Tensor, Tensor]:
        gathers = sequence_parallel and tp.size > 1
        whole = all_gather_positions(hidden, tp) if gathers else hidden  # (B, S, H)
        rows = whole.flatten(0, 1)  # (T, H)
        chunks = _Chunks(weight, tp, vocab_size, chunk_tokens(len(rows), len(weight), weight.dtype))
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if wanted:
            chunks.prepare_gradients(rows)
        losses = torch.empty(len(rows), dtype=chunks.exact, device=rows.device)
        labels = targets.labels.flatten()
        weights = None if targets.weights is None else targets.weights.flatten()
        for part in chunks.parts(len(rows)):
            logits = chunks.logits(rows[part])
            chosen = labels[part]
            if targets.sample is not None:
                chosen = targets.sample(logits, chosen)
            own_weights = None if weights is None else weights[part]
            losses[part] = chunks.losses(logits, chosen, own_weights, wanted)
            if wanted:
                chunks.add_gradients(logits, rows, part, reduce=not gathers)
        if wanted:
            hidden_grad = chunks.hidden_gradient().view_as(whole)
            if gathers:
                hidden_grad = reduce_scatter_positions(hidden_grad, tp)
            ctx.save_for_backward(hidden_grad, chunks.weight_grad)
            ctx.dtype = weight.dtype
        total = (losses if weights is None else losses * weights).sum()
        losses = losses.view(targets.labels.shape)
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        weight_grad = _scaled_(weight_grad, grad).to(ctx.dtype)
        return _scaled_(hidden_grad, grad), weight_grad, None, None, None, None


class _Chunks:
    """The arithmetic of one pass: a buffer of logits that each chunk writes anew."""

    def __init__(self, weight: Tensor, tp: Axis, vocab_size: int, step: int) -> None:
        self.weight, self.tp, self.step = weight, tp, step
        self.exact = torch.promote_types(weight.dtype, torch.float32)
        columns = weight.shape[0]
        self._first = tp.rank * columns
        self._used = min(max(vocab_size - self._first, 0), columns)  # the rest are padding
        self._buffer = weight.new_empty(step, columns)
        on_cpu = weight.device.type == "cpu"
        elements = BLOCK_PER_THREAD * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS
        self._block = max(1, elements // columns)
        self._handles: list[Any] = []

    def parts(self, tokens: int) -> Iterator[slice]:
        """The chunks of T tokens."""
        return _slices(tokens, self.step)

    def logits(self, rows: Tensor) -> Tensor:
        """(C, V/tp) from (C, H), in the buffer; padded columns have the lowest number there is."""
        logits = torch.mm(rows, self.weight.t(), out=self._buffer[: len(rows)])
        # Not -inf: a rank may have no other columns.
        logits[:, self._used :] = torch.finfo(logits.dtype).min
        return logits

    def losses(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None, differentiate: bool
    ) -> Tensor:
        """Losses (C,) of labels (C,).

        Args:
            logits: (C, V/tp); with `differentiate` they become the gradient of the weighted losses.
            labels: of the whole vocabulary.
            weights: (C,) or None.
            differentiate: whether a gradient is wanted.
        """
        column = labels - self._first  # (C,)
        here = (column >= 0) & (column < self._used)
        column = column.clamp(0, logits.shape[1] - 1).unsqueeze(1)
        target = logits.gather(1, column).squeeze(1).to(self.exact).masked_fill(~here, 0.0)
        own = self._softmax(logits, column, keep=differentiate)
        normaliser, target = _over_ranks(own, target, self.tp)
        losses = normaliser - target
        if differentiate:
            if self.tp.size > 1 or weights is not None:
                factor = (own - normaliser).exp_()  # of this rank's softmax
                factor = factor if weights is None else factor.mul_(weights)
                for block in _slices(len(logits), self._block):
                    logits[block].mul_(factor[block].unsqueeze(1))
            # softmax - 1 at the label, from the loss: a softmax near 1 is rounded
            label_grad = torch.expm1(-losses)
            label_grad = label_grad if weights is None else label_grad.mul_(weights)
            place = torch.arange(len(logits), device=logits.device), column.squeeze(1)
            # Not scatter_: on a CPU it copies the logits twice.
            logits[place] = torch.where(here, label_grad.to(logits.dtype), logits[place])
        return losses

    def _softmax(self, logits: Tensor, column: Tensor, keep: bool) -> Tensor:
        """Log-sum-exp (C,) of this rank's columns; with `keep` their softmax takes their place.

        Any logit less its softmax's logarithm: of `column` (C, 1), if none is next to 0.
        """
        result = torch.empty(len(logits), dtype=self.exact, device=logits.device)
        for block in _slices(len(logits), self._block):
            part = logits[block]
            softmax = torch.softmax(part, dim=-1, dtype=self.exact)
            logit, likely = part.gather(1, column[block]), softmax.gather(1, column[block])
            # Only on a CPU is that no wait.
            if not (part.is_cpu and likely.min() >= torch.finfo(self.exact).tiny):
                logit, likely = (x.amax(dim=-1, keepdim=True) for x in (part, softmax))
            result[block] = (logit.to(self.exact) - likely.log()).squeeze(1)
            if keep:
                part.copy_(softmax)
            del softmax  # before the next one
        return result

    def prepare_gradients(self, rows: Tensor) -> None:
        """Room for the gradients of the hidden states (T, H) and of the weight."""
        self._hidden_grad = torch.empty_like(rows)
        # An fp16 sum over all tokens could overflow before it is scaled.
        exact = self.weight.dtype == torch.float16
        self.weight_grad = torch.empty_like(self.weight, dtype=self.exact if exact else None)

    def add_gradients(self, grad: Tensor, rows: Tensor, part: slice, *, reduce: bool) -> None:
        """Of a chunk, from the gradient of its logits (C, V/tp); `reduce`: sum hidden's over TP."""
        hidden_grad = torch.mm(grad, self.weight, out=self._hidden_grad[part])
        if reduce and self.tp.size > 1:  # beside the product below and the next chunk
            work = dist.all_reduce(hidden_grad, group=self.tp.group, async_op=True)
            self._handles.append(work)
        total = self.weight_grad
        if total.dtype != grad.dtype:
            product = torch.mm(grad.t(), rows[part])
            total.copy_(product) if part.start == 0 else total.add_(product)
        elif part.start == 0:
            torch.mm(grad.t(), rows[part], out=total)
        else:
            total.addmm_(grad.t(), rows[part])

    def hidden_gradient(self) -> Tensor:
        """(T, H), once all sums over the ranks are there."""
        for work in self._handles:
            wait_for(work, "all_reduce of hidden gradients")
        return self._hidden_grad


def _slices(count: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


def _over_ranks(own: Tensor, target: Tensor, tp: Axis) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all ranks' columns, and the label's logit, from each rank's own (C,)."""
    if tp.size == 1:
        return own, target
    mine = torch.stack([own, target])
    every = mine.new_empty(tp.size, *mine.shape)
    dist.all_gather_into_tensor(every.flatten(0, 1), mine, group=tp.group)
    return every[:, 0].logsumexp(dim=0), every[:, 1].sum(dim=0)


def _scaled_(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor in place. A factor without a dimension would be rounded to x's type first."""
    return x.mul_(factor.item() if factor.device.type == "cpu" else factor.view(1, 1))
