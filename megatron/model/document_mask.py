"""Documents inside a sample: who attends to whom, positions, and tokens left out of the loss.

One `Documents` is shared by the attention of all blocks, the loss and the engine, which says which
micro-batch it computes. Every stage of a pipeline reads the tokens; nothing is sent.
Legend: B batch, S sequence, s = S/sp, N query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron.model.attention import Attention
from megatron.model.layer import Layer
from megatron.model.positions import LearnedPositions
from megatron.model.rope import Rope, tables_for
from megatron.parallel.groups import SERIAL, Groups
from megatron.parallel.head_loss import Targets
from megatron.parallel.ulysses import own_positions

TokensAndLabels = tuple[Tensor, Tensor]  # tokens and labels, each (B, S)


def document_numbers(tokens: Tensor, eod: int) -> Tensor:
    """(B, S) int64: how many documents of the sample end before each token.

    An end-of-document token belongs to the document that it ends.
    """
    ends = (tokens == eod).long()
    return ends.cumsum(dim=1) - ends


def document_positions(tokens: Tensor, eod: int) -> Tensor:
    """(B, S) int64: place of each token in its document, or in the part that the sample holds."""
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    begins = torch.zeros_like(tokens)
    begins[:, 1:] = torch.where(tokens[:, :-1] == eod, places[:, 1:], 0)
    return places - begins.cummax(dim=1).values


class Documents:
    """What follows from the ends of documents in the micro-batch that is being computed."""

    def __init__(
        self,
        eod: int,
        *,
        own_attention: bool,
        own_positions: bool,
        mask_loss: bool,
        no_flash: bool = False,
    ) -> None:
        """Nothing is computed yet.

        Args:
            eod: id that ends a document.
            own_attention: a token attends to its own document only.
            own_positions: positions count from the start of each document.
            mask_loss: the losses at end-of-document tokens, which predict the next document, are
                left out.
            no_flash: attention by plain matrix products.
        """
        self.eod = eod
        self.own_attention, self.own_positions = own_attention, own_positions
        self.mask_loss, self.no_flash = mask_loss, no_flash
        self._batches: list[Tensor] = []  # tokens of this step's micro-batches
        self._current = -1  # the one below is of; -1: of none of them
        self._kernel, self._mask = DENSE, None  # the mask as the kernel takes it
        self._positions: Tensor | None = None  # (B, S)
        self._weights: Tensor | None = None  # (B, s)
        self._scale = torch.ones(())
        self._sp = SERIAL

    def begin(
        self, micro_batches: Iterable[TokensAndLabels], groups: Groups, device: torch.device
    ) -> Iterator[TokensAndLabels]:
        """Takes note of a step; yields its micro-batches, and is at each as it yields it.

        With `mask_loss`, an all-reduce of one number over the data-parallel ranks, which must all
        have micro-batches or none.

        Args:
            micro_batches: this rank's (tokens, labels), each (B, S) of all positions.
            groups: of this rank.
            device: of the model.
        """
        batches = list(micro_batches)
        self._batches = [tokens.to(device) for tokens, _ in batches]
        self._sp, self._current = groups.sp, -1
        if self.mask_loss and batches:
            counted = sum(((tokens != self.eod).sum() for tokens in self._batches), start=0)
            total = torch.as_tensor(counted, dtype=torch.float64, device=device)
            if groups.dp.group is not None:
                dist.all_reduce(total, group=groups.dp.group)
            # The engine averages over micro-batches, data-parallel and sequence-parallel ranks;
            # times this, that is the mean over the counted tokens of the global batch.
            shares = len(batches) * groups.dp.size * groups.sp.size
            self._scale = (shares / total.clamp(min=1)).float()
        return self._selecting(batches)

    def _selecting(self, batches: list[TokensAndLabels]) -> Iterator[TokensAndLabels]:
        for number, batch in enumerate(batches):
            self.select(number)
            yield batch

    def select(self, number: int) -> None:
        """What is computed from now on belongs to this micro-batch of the step."""
        if number != self._current:
            self.show(self._batches[number])
            self._current = number

    def show(self, tokens: Tensor) -> None:
        """What is computed from now on belongs to these tokens (B, S), all positions of them."""
        self._current = -1
        if self.own_positions:
            self._positions = document_positions(tokens, self.eod)
        if self.own_attention:
            made = KERNELS.get(tokens.device.type, lambda: DENSE)
            self._kernel = PLAIN if self.no_flash else made()
            self._mask = self._kernel.mask(document_numbers(tokens, self.eod))
        if self.mask_loss:
            self._weights = own_positions((tokens != self.eod).float(), self._sp)

    def tables_for(self, rope: Rope, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for x (B, N, S, D): (S, D), or (B, 1, S, D) with own positions."""
        tables = tables_for(rope, x)
        if self._positions is None:
            return tables
        cos, sin = (table[self._positions].unsqueeze(1) for table in tables)
        return cos, sin

    def positions_of(self) -> Tensor:
        """(B, S) positions of the micro-batch's tokens, of all ranks."""
        assert self._positions is not None, "no micro-batch was selected"
        return self._positions

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`causal_attention` over the tokens of each one's own document.

        Args:
            q: (B, N, S, D).
            k: (B, K, S, D); query heads i*N/K .. (i+1)*N/K - 1 read head i.
            v: (B, K, S, D).

        Returns:
            (B, N, S, D).
        """
        assert self._mask is not None, "no micro-batch was selected"
        return self._kernel.attend(q, k, v, self._mask)

    @property
    def weights(self) -> Tensor:
        """(B, s) fp32, of this rank's positions: 1 where the loss counts, 0 where not."""
        assert self._weights is not None, "the loss of no micro-batch"
        return self._weights

    def targets(self, labels: Tensor) -> Targets:
        """For this micro-batch's part of the mean over all counted tokens of the global batch.

        The mean over micro-batches and data- and sequence-parallel ranks of these losses is that
        mean.

        Args:
            labels: (B, s) of this rank's positions.
        """
        return Targets(labels, self.weights, self._scale)


def dense_mask(numbers: Tensor) -> Tensor:
    """(B, 1, S, S) bool from document numbers (B, S): same document and not after; S^2 memory."""
    same = numbers.unsqueeze(2) == numbers.unsqueeze(1)
    return same.tril().unsqueeze(1)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _dense_attention(q, k, v, mask)


class Kernel(NamedTuple):
    """A mask from document numbers (B, S), and the attention (q, k, v, mask) that takes it."""

    mask: Callable[[Tensor], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]


DENSE = Kernel(dense_mask, _dense_attention)
PLAIN = Kernel(dense_mask, _plain_attention)


@cache
def flex_kernel(compiled: bool = True) -> Kernel:
    """FlexAttention, which skips blocks of 128 x 128 tokens that see nothing of each other.

    Compiled it holds no S x S mask; inside a compiled block it is compiled with the block.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    make: Callable[..., Any] = create_block_mask
    compute: Callable[..., Any] = flex_attention
    if compiled:
        make, compute = torch.compile(make), torch.compile(compute)

    def mask(numbers: Tensor) -> Any:
        def visible(b: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (numbers[b, query] == numbers[b, key])

        batch, length = numbers.shape
        return make(visible, batch, None, length, length, device=numbers.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        y: Tensor = compute(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return y

    return Kernel(mask, attend)


KERNELS: dict[str, Callable[[], Kernel]] = {"cuda": flex_kernel}
"""Device -> its kernel, where it has a better one than the dense."""


def follow_documents(layer: Layer, documents: Documents) -> Layer:
    """The layer, its attention within documents.

    Raises:
        ValueError: when a block is built that has no `Attention` to change.
    """

    def build() -> nn.Module:
        module = layer.build()
        attentions = [part for part in module.modules() if isinstance(part, Attention)]
        reset = documents.own_attention or documents.own_positions
        if reset and layer.recompute and not attentions:  # blocks are what may be recomputed
            raise ValueError(
                f"{layer.module.__name__} has an attention of its own, to which "
                "RESET_ATTENTION_MASK and RESET_POSITION_IDS do not apply: unset them"
            )
        for attention in attentions:
            if documents.own_attention:
                attention.attend = documents.attend
            if documents.own_positions:
                attention.tables_for = documents.tables_for
        if documents.own_positions:
            for part in module.modules():
                if isinstance(part, LearnedPositions):
                    part.positions_of = documents.positions_of
        return module

    return dataclasses.replace(layer, build=build)
