"""A checkpoint's tensors: one safetensors file per rank, read back by parameter for any layout.

An entry is a run of a parameter's flattened tensor-parallel shard. The file's header names the
parameter, the shard and the run's start, so a reader assembles any part of any parameter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.parallel.piece import WEIGHT, WHOLE, Piece


def write_pieces(path: Path, pieces: Iterable[Piece]) -> None:
    """Writes one rank's pieces; tensors are copied to the host."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, dict[str, Any]] = {}
    for number, piece in enumerate(pieces):
        for state, value in piece.tensors.items():
            tensors[f"{number}/{state}"] = value.detach().to("cpu").contiguous()
        header[str(number)] = {
            "name": piece.name,
            "shape": piece.shape,
            "partition_dim": piece.partition_dim,
            "shard": piece.shard,
            "shards": piece.shards,
            "start": piece.start,
            "states": {state: value.numel() for state, value in piece.tensors.items()},
            "scalars": dict(piece.scalars),
        }
    try:
        save_file(tensors, path, metadata={"pieces": json.dumps(header)})
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error  # a full disk, most likely


@dataclass(frozen=True)
class _Run:
    """A stored run of a flattened shard."""

    path: Path
    key: str
    start: int
    length: int


@dataclass
class Stored:
    """One state of one parameter: its full shape, its partition, and its runs by shard."""

    shape: tuple[int, ...]
    partition_dim: int | None
    shards: int
    runs: dict[int, list[_Run]] = field(default_factory=dict)

    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one tensor-parallel shard."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] //= self.shards
        return tuple(shape)


class TensorReader:
    """All parameters of a checkpoint.

    Args:
        paths: the safetensors files of all ranks.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        _open.cache_clear()  # after a rollback a path may hold another file than before
        self._stored: dict[str, dict[str, Stored]] = {}
        self._scalars: dict[str, dict[str, float]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["pieces"])
            for number, item in header.items():
                self._scalars.setdefault(item["name"], {}).update(item["scalars"])
                states = self._stored.setdefault(item["name"], {})
                for state, length in item["states"].items():
                    shape = tuple(item["shape"])
                    stored = states.setdefault(
                        state, Stored(shape, item["partition_dim"], item["shards"])
                    )
                    run = _Run(path, f"{number}/{state}", item["start"], length)
                    stored.runs.setdefault(item["shard"], []).append(run)

    def names(self) -> list[str]:
        """All parameters, sorted."""
        return sorted(self._stored)

    def states(self, name: str) -> list[str]:
        """What is stored of a parameter: `weight` and the optimizer's states."""
        return list(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of a parameter as it was written (its vocabulary padded)."""
        return self._stored[name][WEIGHT].shape

    def scalars(self, name: str) -> dict[str, float]:
        """The optimizer's numbers for a parameter."""
        return self._scalars[name]

    def whole(self, name: str, state: str = WEIGHT) -> Tensor:
        """A whole parameter or one of its states, in the shape it was written with."""
        stored = self._stored[name][state]
        shape = stored.shard_shape()
        shards = [
            self._run(name, state, shard, 0, math.prod(shape)).view(shape)
            for shard in range(stored.shards)
        ]
        return (
            shards[0] if stored.partition_dim is None else torch.cat(shards, stored.partition_dim)
        )

    def for_piece(self, piece: Piece) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The stored values of a run in the reader's own layout.

        Where the partition is the same, only the run is read; else the whole parameter is
        assembled first. The vocabulary's padding depends on the layout: rows beyond the stored
        ones are zero.

        Returns:
            1-D tensors by state, and the optimizer's numbers.

        Raises:
            KeyError: the checkpoint has no such parameter.
            ValueError: a part of it is missing.
        """
        length = piece.tensors[WEIGHT].numel()
        tensors = {}
        for state, stored in self._stored[piece.name].items():
            if state.startswith(WHOLE):
                continue
            partition = (stored.shape, stored.partition_dim, stored.shards)
            if partition == (piece.shape, piece.partition_dim, piece.shards):
                tensors[state] = self._run(piece.name, state, piece.shard, piece.start, length)
            else:
                shard = _shard_of(_fit_rows(self.whole(piece.name, state), piece.shape), piece)
                tensors[state] = shard.reshape(-1)[piece.start : piece.start + length]
        return tensors, self._scalars[piece.name]

    def _run(self, name: str, state: str, shard: int, start: int, length: int) -> Tensor:
        """Elements start .. start + length of a flattened shard, 1-D; only these are read."""
        result = None
        filled = 0
        for run in self._stored[name][state].runs.get(shard, []):
            first = max(start, run.start)
            last = min(start + length, run.start + run.length)
            if first >= last:
                continue
            values = _open(run.path).get_slice(run.key)[first - run.start : last - run.start]
            if result is None:
                result = torch.empty(length, dtype=values.dtype)
            result[first - start : last - start] = values
            filled += last - first
        if result is None or filled != length:
            raise ValueError(
                f"{name}: {state} of shard {shard} holds {filled} of the elements"
                f" {start}..{start + length}; a rank's file is missing from the checkpoint"
            )
        return result


def _fit_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = shape[0] - value.shape[0]
    if missing > 0:
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value[: shape[0]]


def _shard_of(value: Tensor, piece: Piece) -> Tensor:
    if piece.partition_dim is None:
        return value
    return value.chunk(piece.shards, dim=piece.partition_dim)[piece.shard]


@lru_cache(maxsize=64)
def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")
