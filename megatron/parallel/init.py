"""Initial weights that no layout changes: each is a function of (seed, name, full shape, std).

A weight is drawn in blocks of rows, each from its own generator, so a rank draws only the blocks
that its shard touches and still gets the numbers of the whole matrix. Always fp32 on the CPU, then
cast: no device changes a weight.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

ROWS_PER_BLOCK = 128
"""Rows drawn from one generator. Changing it changes the initial weights of all models."""


def block_seed(seed: int, name: str, block: int) -> int:
    """64-bit seed of a block, the same in every process (the built-in hash is salted)."""
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@torch.no_grad()
def sharded_normal_(
    out: Tensor,
    *,
    seed: int | None,
    name: str,
    shape: tuple[int, int],
    std: float,
    dim: int = 0,
    start: int = 0,
) -> Tensor:
    """Fills `out` with a slice of the normal matrix called `name`.

    Args:
        out: (rows, columns), any dtype and device; written in place. Nothing is drawn for a meta
            tensor.
        seed: the run's seed; None: nothing is drawn, a checkpoint is to bring every value.
        name: the parameter's name; each name has its own numbers.
        shape: the whole matrix. Rows of `out` beyond it are zero (padding of the vocabulary).
        std: standard deviation; the mean is 0.
        dim: the dimension that is sharded; along the other `out` is whole.
        start: where `out` begins along `dim`.

    Returns:
        `out`.
    """
    first_row, first_column = (start, 0) if dim == 0 else (0, start)
    columns = slice(first_column, first_column + out.shape[1])
    assert dim in (0, 1) and columns.stop <= shape[1] and (dim == 0 or out.shape[0] == shape[0])
    if out.is_meta or seed is None:
        return out
    last_row = min(first_row + out.shape[0], shape[0])
    if last_row <= first_row:
        return out.zero_()
    out[last_row - first_row :].zero_()
    for block in range(first_row // ROWS_PER_BLOCK, -(-last_row // ROWS_PER_BLOCK)):
        top = block * ROWS_PER_BLOCK
        rows = _draw_block(seed, name, block, min(ROWS_PER_BLOCK, shape[0] - top), shape[1], std)
        low, high = max(top, first_row), min(top + ROWS_PER_BLOCK, last_row)
        out[low - first_row : high - first_row].copy_(rows[low - top : high - top, columns])
    return out


def _draw_block(seed: int, name: str, block: int, rows: int, columns: int, std: float) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(block_seed(seed, name, block))
    # DeepSpeed's zero.Init patches torch.empty to give the training dtype; .to() still gives fp32.
    values = torch.empty(rows, columns, device="cpu", dtype=torch.float32).to(torch.float32)
    return values.normal_(0.0, std, generator=generator)
