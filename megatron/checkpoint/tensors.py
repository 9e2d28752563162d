"""A checkpoint's tensors: one safetensors file per rank, read back by parameter for any layout.

An entry is a run of a parameter's flattened tensor-parallel shard. The file's header names the
parameter, the shard and the run's start, as the piece index does for all files at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron.checkpoint.piece_index import IndexRow, PieceIndex, Record, build_index
from megatron.checkpoint.rank_file import RankFile, lay_out
from megatron.parallel.piece import WEIGHT, WHOLE, Piece

MOST_MAPPED = 1 << 27
"""Bytes that are read before files are closed: mapped, they count as this process' memory."""


def plan_file(pieces: Iterable[Piece]) -> tuple[RankFile, list[Record]]:
    """One rank's file, not written yet, and its records for the piece index."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, dict[str, Any]] = {}
    for number, piece in enumerate(pieces):
        tensors |= {f"{number}/{state}": value for state, value in piece.tensors.items()}
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
    return lay_out(tensors, {"pieces": json.dumps(header)}), _records(header)


def _records(header: dict[str, dict[str, Any]]) -> list[Record]:
    """The records of a file's header."""
    records = []
    for number, item in header.items():
        lengths: dict[int, list[str]] = {}
        for state, length in item["states"].items():
            lengths.setdefault(length, []).append(state)
        for length, states in lengths.items():
            records.append(
                Record(
                    item["name"],
                    tuple(item["shape"]),
                    item["partition_dim"],
                    item["shards"],
                    item["shard"],
                    item["start"],
                    int(number),
                    length,
                    tuple(states),
                    tuple(item["scalars"].items()),
                )
            )
    return records


@dataclass
class Stored:
    """One state of one parameter: its full shape, its partition, and the rows of its runs."""

    shape: tuple[int, ...]
    partition_dim: int | None
    shards: int
    rows: list[IndexRow] = field(default_factory=list)

    def shard_shape(self) -> tuple[int, ...]:
        """Shape of one tensor-parallel shard."""
        shape = list(self.shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] //= self.shards
        return tuple(shape)


class TensorReader:
    """All parameters of a checkpoint; opens only the files that hold what it is asked for.

    Args:
        paths: the safetensors files of all ranks.
        index: of what they hold; None reads the header of every file.
    """

    def __init__(self, paths: Iterable[Path], index: PieceIndex | None = None) -> None:
        self._paths = {path.name: path for path in paths}
        self._index = index or _index_of(list(self._paths.values()))
        self._stored: dict[str, dict[str, Stored]] = {}
        self._scalars: dict[str, dict[str, float]] = {}
        for row in self._index.rows:
            self._scalars.setdefault(row.name, {}).update(row.scalars)
            states = self._stored.setdefault(row.name, {})
            for state in row.states:
                stored = states.setdefault(state, Stored(row.shape, row.partition_dim, row.shards))
                stored.rows.append(row)
        self._runs = lru_cache(maxsize=8)(IndexRow.runs)  # the states of a parameter share a row
        self._open = lru_cache(maxsize=64)(_open)
        self._read = 0

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
                tensors[state] = part_of(self.whole(piece.name, state), piece)
        self._read += sum(values.nbytes for values in tensors.values())
        if self._read > MOST_MAPPED:
            self._open.cache_clear()
            self._read = 0
        return tensors, self._scalars[piece.name]

    def _run(self, name: str, state: str, shard: int, start: int, length: int) -> Tensor:
        """Elements start .. start + length of a flattened shard, 1-D; only these are read."""
        result = None
        filled = 0
        runs = [
            run for row in self._stored[name][state].rows for run in self._runs(row).get(shard, [])
        ]
        for run in runs:
            first = max(start, run.start)
            last = min(start + length, run.start + run.length)
            if first >= last:
                continue
            file = self._open(self._paths[self._index.files[run.file]])
            values = file.get_slice(f"{run.item}/{state}")[first - run.start : last - run.start]
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


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    """The run of a whole parameter that `piece` is, 1-D; rows that it lacks are zero."""
    shard = _shard_of(_fit_rows(whole, piece.shape), piece).reshape(-1)
    return shard[piece.start : piece.start + piece.tensors[WEIGHT].numel()]


def _index_of(paths: Sequence[Path]) -> PieceIndex:
    """The index of files by their headers."""
    records = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            records.append(_records(json.loads(file.metadata()["pieces"])))
    return build_index([path.name for path in paths], records)


def _fit_rows(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = shape[0] - value.shape[0]
    if missing > 0:
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value[: shape[0]]


def _shard_of(value: Tensor, piece: Piece) -> Tensor:
    if piece.partition_dim is None:
        return value
    return value.chunk(piece.shards, dim=piece.partition_dim)[piece.shard]


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")
