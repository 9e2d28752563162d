"""Linear layers and the embedding, sharded over the tensor-parallel axis they get. No biases.

On an axis of size one they are the serial layers. With `sequence_parallel` the activations between
them are sharded along the sequence (`megatron.parallel.sequence`).
Legend: B batch, S sequence, s = S/tp with sequence_parallel, else S, H hidden, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.parallel.groups import Axis
from megatron.parallel.init import sharded_normal_
from megatron.parallel.linear import linear_in_a_graph
from megatron.parallel.mappings import (
    copied_linear,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
)
from megatron.parallel.sequence import (
    all_gather_positions,
    gathered_linear,
    reduce_scatter_positions,
)

MatMul = Callable[[Tensor, Tensor], Tensor]
"""(x (B, S, in), weight (out, in)) -> x weight^T (B, S, out), in another way than F.linear."""


def shard_size(size: int, tp: Axis, what: str) -> int:
    """`size` over the ranks of the axis.

    Raises:
        ValueError: it does not divide.
    """
    if size % tp.size:
        raise ValueError(f"{what}={size} is not a multiple of TP={tp.size}")
    return size // tp.size


def set_tensor_parallel_attributes(
    parameter: nn.Parameter,
    full_shape: tuple[int, ...],
    partition_dim: int | None,
    is_vocabulary: bool = False,
) -> nn.Parameter:
    """Records on a parameter what gradient norms, checkpoints and optimizers need to know.

    Args:
        parameter: this rank's shard.
        full_shape: of the whole parameter, padding of the vocabulary included.
        partition_dim: the dimension sharded over the axis; None where it is replicated.
        is_vocabulary: it has one row per token: an embedding or a head.

    Returns:
        The parameter with `full_shape`, `is_vocabulary` and, where sharded, `partition_dim` and
        `tensor_model_parallel = True`. Without the last DeepSpeed counts a shard on one rank only
        in the gradient norm, and silently clips wrongly.
    """
    attributes: dict[str, object] = {"full_shape": full_shape, "is_vocabulary": is_vocabulary}
    if partition_dim is not None:
        attributes |= {"partition_dim": partition_dim, "tensor_model_parallel": True}
    for key, value in attributes.items():
        setattr(parameter, key, value)
    return parameter


def sharded_weight(
    shape: tuple[int, int],
    dim: int,
    tp: Axis,
    *,
    seed: int | None,
    name: str,
    std: float,
    used_rows: int | None = None,
) -> nn.Parameter:
    """This rank's shard of a normal matrix, with its attributes.

    Args:
        shape: the whole matrix.
        dim: the dimension sharded over `tp`.
        tp: tensor-parallel axis.
        seed: of the run; None: the values are left to a checkpoint.
        name: of the parameter; decides its numbers together with the seed.
        std: standard deviation.
        used_rows: of a vocabulary matrix, the rows that are not padding (which is zero).

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
    return set_tensor_parallel_attributes(nn.Parameter(local), shape, dim, used_rows is not None)


class ColumnParallelLinear(nn.Module):
    """y = x W^T, rows of W (the outputs) sharded: x (B, s, in) -> y (B, S, out/tp).

    Communicates as `column_parallel_linear`; layers that read the same x do so once, with
    `column_parallel_linears`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        seed: int | None,
        name: str,
        std: float,
        used_rows: int | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.matmul: MatMul | None = None
        self.weight = sharded_weight(
            (out_features, in_features), 0, tp, seed=seed, name=name, std=std, used_rows=used_rows
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, s, in) -> this rank's (B, S, out/tp).

        Args:
            x: without sequence_parallel equal on all ranks.
        """
        if self.matmul is not None:
            return self.matmul(_whole_input(x, self.tp, self.sequence_parallel), self.weight)
        return column_parallel_linear(x, self.weight, self.tp, self.sequence_parallel)


def _whole_input(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """What the ranks multiply with their rows: all positions, and one sum of its gradient."""
    return all_gather_positions(x, tp) if sequence_parallel else copy_to_tensor_parallel(x, tp)


def column_parallel_linear(x: Tensor, weight: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """x (B, s, in) with this rank's rows (out/tp, in) of a matrix -> (B, S, out/tp).

    Communicates as `copied_linear`, with `sequence_parallel` as `gathered_linear`.
    """
    if tp.size == 1:
        return _linear(x, weight)
    linear = gathered_linear if sequence_parallel else copied_linear
    return linear(x, [weight], tp)[0]


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return (linear_in_a_graph if torch.compiler.is_compiling() else F.linear)(x, weight)


def column_parallel_linears(
    x: Tensor, layers: Sequence[ColumnParallelLinear]
) -> tuple[Tensor, ...]:
    """x through several layers of one axis, which communicate as one.

    Args:
        x: (B, s, in), as each layer takes it.
        layers: that read it.

    Returns:
        (B, S, out/tp) for each layer.
    """
    tp = layers[0].tp
    if tp.size == 1:
        return tuple(layer(x) for layer in layers)
    if layers[0].matmul is not None:
        x = _whole_input(x, tp, layers[0].sequence_parallel)
        return tuple(layer.matmul(x, layer.weight) for layer in layers if layer.matmul)
    # After the first time, ZeRO-3 gathers weights that a parent reads together with the parent.
    linear = gathered_linear if layers[0].sequence_parallel else copied_linear
    return linear(x, [layer.weight for layer in layers], tp)


class RowParallelLinear(nn.Module):
    """y = x W^T, columns of W (the inputs) sharded: x (B, S, in/tp) -> y (B, s, out).

    Forward: one all-reduce of the partial products. Backward: no communication. With
    `sequence_parallel` a reduce-scatter, and an all-gather.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tp: Axis,
        *,
        seed: int | None,
        name: str,
        std: float,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        self.matmul: MatMul | None = None
        self.weight = sharded_weight(
            (out_features, in_features), 1, tp, seed=seed, name=name, std=std
        )

    def forward(self, x: Tensor) -> Tensor:
        """This rank's x (B, S, in/tp) -> (B, s, out); without sequence_parallel equal on all."""
        partial = (self.matmul or _linear)(x, self.weight)
        return reduce_partial_output(partial, self.tp, self.sequence_parallel)


def reduce_partial_output(x: Tensor, tp: Axis, sequence_parallel: bool) -> Tensor:
    """The sum of the ranks' x (B, S, H): whole on all ranks, or own positions (B, s, H).

    x is the caller's own, as `reduce_from_tensor_parallel` has it.

    Forward: all-reduce, or reduce-scatter. Backward: the identity, or all-gather.
    """
    if tp.size == 1:
        return x
    if sequence_parallel:
        return reduce_scatter_positions(x, tp)
    return reduce_from_tensor_parallel(x, tp)


def check_token_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Stops the run where an id is outside [0, vocab_size), at every TP.

    Over several ranks an id that none owns would give a zero embedding and a zero logit: the bad
    data that stops a serial run would train silently. On the CPU the check raises here. On an
    accelerator it is queued with the kernels, so that the step never waits for it, and fails as a
    device-side assertion.

    Args:
        ids: integers, any shape.
        vocab_size: the vocabulary without padding.
        what: "token" or "label", for the message.

    Raises:
        ValueError: an id is outside (CPU).
    """
    if ids.is_meta or ids.numel() == 0:
        return
    if ids.device.type != "cpu":
        message = f"{what} id outside the vocabulary [0, {vocab_size})"
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), message)
        return
    lowest, highest = (int(value) for value in torch.aminmax(ids))
    if lowest < 0 or highest >= vocab_size:
        worst = lowest if lowest < 0 else highest
        raise ValueError(
            f"{what} id {worst} is outside the vocabulary [0, {vocab_size}): "
            "the data was made with another tokenizer than TOKENIZER_MODEL, or VOCAB_SIZE is wrong"
        )


class VocabParallelEmbedding(nn.Module):
    """Rows of W (V, H) looked up by token, the rows sharded over the axis; padded rows are zero.

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
        seed: int | None,
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
        return reduce_partial_output(hidden, self.tp, self.sequence_parallel)
