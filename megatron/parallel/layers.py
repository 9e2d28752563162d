"""Linear layers and the embedding, cut over the tensor-parallel axis they are given. No biases.

On an axis of size one they are the serial layers. With `sequence_parallel` what lies between them
is cut along the sequence (`megatron.parallel.sequence`).
Legend: B batch, S sequence, s = S/tp with sequence_parallel, else S, H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.groups import Axis
from megatron.parallel.init import sharded_normal_
from megatron.parallel.mappings import copy_to_tensor_parallel, reduce_from_tensor_parallel
from megatron.parallel.sequence import gathered_linear, reduce_scatter_positions
from megatron.parallel.vocabulary import check_token_ids


def shard_size(size: int, tp: Axis, what: str) -> int:
    """`size` over the ranks of the axis.

    Raises:
        ValueError: it does not divide.
    """
    if size % tp.size:
        raise ValueError(f"{what}={size} is not a multiple of TP={tp.size}")
    return size // tp.size


def mark(
    parameter: nn.Parameter, full_shape: tuple[int, ...], partition_dim: int | None
) -> nn.Parameter:
    """Writes on a parameter how it is cut: what gradient norms and checkpoints need to know.

    Args:
        parameter: this rank's slice.
        full_shape: of the whole parameter, padding of the vocabulary included.
        partition_dim: the dimension cut over the axis; None where every rank holds the whole.

    Returns:
        The parameter with `full_shape` and, where cut, `partition_dim` and
        `tensor_model_parallel = True`. Without the last DeepSpeed counts a cut parameter on one
        rank only in the gradient norm, and clips wrongly without a word.
    """
    marks: dict[str, object] = {"full_shape": full_shape}
    if partition_dim is not None:
        marks |= {"partition_dim": partition_dim, "tensor_model_parallel": True}
    for key, value in marks.items():
        setattr(parameter, key, value)
    return parameter


def sharded_weight(
    shape: tuple[int, int],
    dim: int,
    tp: Axis,
    *,
    seed: int,
    name: str,
    std: float,
    used_rows: int | None = None,
) -> nn.Parameter:
    """This rank's slice of a normal matrix, marked.

    Args:
        shape: the whole matrix.
        dim: the dimension cut over `tp`.
        tp: tensor-parallel axis.
        seed: of the run.
        name: of the parameter; decides its numbers together with the seed.
        std: standard deviation.
        used_rows: rows that are not padding (which is zero); default all.

    Raises:
        ValueError: the dimension is not a multiple of TP.
    """
    size = shard_size(shape[dim], tp, f"dimension {dim} of {name}")
    # DeepSpeed's zero.Init and torch.device contexts decide where empty tensors live and in which
    # dtype.
    local = torch.empty((size, shape[1]) if dim == 0 else (shape[0], size))
    drawn = (shape[0] if used_rows is None else used_rows, shape[1])
    sharded_normal_(
        local, seed=seed, name=name, shape=drawn, std=std, dim=dim, start=tp.rank * size
    )
    return mark(nn.Parameter(local), shape, dim)


class ColumnParallelLinear(nn.Module):
    """y = x W^T, the rows of W (the outputs) cut over the axis: x (B, s, in) -> y (B, S, out/tp).

    Communicates as `column_product`; layers that read the same x do so once: `column_products`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        seed: int,
        name: str,
        std: float,
        used_rows: int | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_weight(
            (out_features, in_features), 0, tp, seed=seed, name=name, std=std, used_rows=used_rows
        )

    def forward(self, x: Tensor, communicate: bool = True) -> Tensor:
        """x (B, s, in) -> this rank's (B, S, out/tp).

        Args:
            x: without sequence_parallel equal on all ranks.
            communicate: False for x (B, S, in) whose gradient the caller adds up.
        """
        if not communicate:
            return F.linear(x, self.weight)
        return column_product(x, self.weight, self.tp, self.sequence_parallel)


def column_product(x: Tensor, weight: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """x (B, s, in) with this rank's rows (out/tp, in) of a matrix -> (B, S, out/tp).

    Forward: no communication. Backward: one all-reduce of x's gradient. With `sequence_parallel` as
    `gathered_linear`.
    """
    if sequence_parallel:
        return gathered_linear(x, [weight], tp)[0]
    return F.linear(copy_to_tensor_parallel(x, tp), weight)


def column_products(x: Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[Tensor, ...]:
    """x through several layers of one axis, which communicate as one.

    Args:
        x: (B, s, in), as each layer takes it.
        layers: that read it.

    Returns:
        (B, S, out/tp) for each layer.
    """
    tp = layers[0].tp
    if layers[0].sequence_parallel and tp.size > 1:
        # ZeRO-3 gathers weights that a parent reads with the parent, once it has seen it happen.
        return gathered_linear(x, [layer.weight for layer in layers], tp)
    x = copy_to_tensor_parallel(x, tp)
    return tuple(layer(x, communicate=False) for layer in layers)


class RowParallelLinear(nn.Module):
    """y = x W^T, the columns of W (the inputs) cut over the axis: x (B, S, in/tp) -> y (B, s, out).

    Forward: one all-reduce of the partial products. Backward: no communication. With
    `sequence_parallel` a reduce-scatter, and an all-gather.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        seed: int,
        name: str,
        std: float,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_weight(
            (out_features, in_features), 1, tp, seed=seed, name=name, std=std
        )

    def forward(self, x: Tensor) -> Tensor:
        """This rank's x (B, S, in/tp) -> (B, s, out); without sequence_parallel equal on all."""
        return summed(F.linear(x, self.weight), self.tp, self.sequence_parallel)


def summed(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """The sum of the ranks' x (B, S, H): all of it on all ranks, or own positions (B, s, H).

    Forward: all-reduce, or reduce-scatter. Backward: the identity, or all-gather.
    """
    if sequence_parallel:
        return reduce_scatter_positions(x, tp)
    return reduce_from_tensor_parallel(x, tp)


class VocabParallelEmbedding(nn.Module):
    """Rows of W (V, H) looked up by token, the rows cut over the axis; padded rows are zero.

    Forward: one all-reduce (each token's row comes from the rank that owns it). Backward: no
    communication. With `sequence_parallel` a reduce-scatter, and an all-gather.
    """

    def __init__(
        self,
        vocab_size: int,
        padded_vocab_size: int,
        hidden_size: int,
        tp: Axis,
        *,
        seed: int,
        name: str,
        std: float,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.weight = sharded_weight(
            (padded_vocab_size, hidden_size),
            0,
            tp,
            seed=seed,
            name=name,
            std=std,
            used_rows=vocab_size,
        )
        # Not weight.shape[0]: ZeRO-3 empties the weight between uses.
        self.rows = padded_vocab_size // tp.size

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, S) -> (B, s, H); without sequence_parallel equal on all ranks.

        Raises:
            ValueError: a token is outside [0, vocab_size), at every TP.
        """
        check_token_ids(tokens, self.vocab_size, "token")
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        hidden = F.embedding(local.masked_fill(elsewhere, 0), self.weight)  # (B, S, H)
        hidden = hidden.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return summed(hidden, self.tp, self.sequence_parallel)
