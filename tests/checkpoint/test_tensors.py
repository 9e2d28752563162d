"""What ranks wrote by shards is read back whole, for any layout, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.checkpoint import tensors
from megatron.checkpoint.piece_index import PieceIndex, build_index
from megatron.checkpoint.rank_file import write_file
from megatron.checkpoint.tensors import TensorReader, plan_file
from megatron.parallel.piece import WEIGHT, WHOLE, Piece

ROWS, COLUMNS = 12, 8


def matrix(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Tensor:
    """A matrix whose elements all differ."""
    return torch.arange(rows * COLUMNS).reshape(rows, COLUMNS).to(dtype)


def piece(
    value: Tensor,
    dim: int | None = None,
    shard: int = 0,
    shards: int = 1,
    start: int = 0,
    length: int | None = None,
    name: str = "w",
) -> Piece:
    """A run of a shard of `value`, with a state of the optimizer that is ten times the weight."""
    own = value if dim is None else value.chunk(shards, dim)[shard]
    flat = own.reshape(-1)
    flat = flat[start : flat.numel() if length is None else start + length]
    tensors = {WEIGHT: flat, "exp_avg": flat * 10}
    return Piece(name, tuple(value.shape), dim, shard, shards, start, tensors, {"step": 7.0})


def runs(value: Tensor, dim: int | None, shards: int, parts: int) -> list[Piece]:
    """All pieces of a parameter: `shards` over TP, each in `parts` runs over the ZeRO ranks."""
    size = value.numel() // shards // parts
    return [
        piece(value, dim, shard, shards, part * size, size)
        for shard in range(shards)
        for part in range(parts)
    ]


def write_pieces(path: Path, pieces: list[Piece]) -> None:
    """One rank's file."""
    write_file(path, plan_file(pieces)[0])


def write(folder: Path, pieces: list[Piece]) -> list[Path]:
    """A file for each piece, as if each were of another rank."""
    paths = [folder / f"{number}.safetensors" for number in range(len(pieces))]
    for path, one in zip(paths, pieces, strict=True):
        write_pieces(path, [one])
    return paths


LAYOUTS = [(None, 1, 1), (None, 1, 3), (0, 2, 1), (0, 3, 4), (1, 2, 3), (1, 4, 2)]


@pytest.mark.parametrize(("dim", "shards", "parts"), LAYOUTS)
def test_a_parameter_is_whole_again(
    dim: int | None, shards: int, parts: int, tmp_path: Path
) -> None:
    value = matrix()
    paths = write(tmp_path, runs(value, dim, shards, parts))
    reader = TensorReader(reversed(paths))  # the order of the files means nothing
    assert reader.names() == ["w"]
    assert sorted(reader.states("w")) == ["exp_avg", WEIGHT]
    assert reader.shape("w") == (ROWS, COLUMNS)
    assert reader.scalars("w") == {"step": 7.0}
    assert torch.equal(reader.whole("w"), value)
    assert torch.equal(reader.whole("w", "exp_avg"), value * 10)


@pytest.mark.parametrize(("dim", "shards", "parts"), LAYOUTS)
@pytest.mark.parametrize(("new_dim", "new_shards", "new_parts"), LAYOUTS)
def test_any_layout_reads_any_other(
    dim: int | None,
    shards: int,
    parts: int,
    new_dim: int | None,
    new_shards: int,
    new_parts: int,
    tmp_path: Path,
) -> None:
    value = matrix()
    reader = TensorReader(write(tmp_path, runs(value, dim, shards, parts)))
    for wanted in runs(value, new_dim, new_shards, new_parts):
        tensors, scalars = reader.for_piece(wanted)
        assert tensors.keys() == wanted.tensors.keys()
        for state, expected in wanted.tensors.items():
            assert torch.equal(tensors[state], expected), (state, wanted)
        assert scalars == {"step": 7.0}


def test_runs_that_do_not_start_where_the_stored_ones_do(tmp_path: Path) -> None:
    value = matrix()
    reader = TensorReader(write(tmp_path, runs(value, 0, 2, 3)))  # runs of 16 elements
    wanted = piece(value, 0, 1, 2, start=5, length=30)
    tensors, _ = reader.for_piece(wanted)
    assert torch.equal(tensors[WEIGHT], wanted.tensors[WEIGHT])


@pytest.mark.parametrize("rows", [10, 16])
def test_padding_of_the_vocabulary_follows_the_reader(rows: int, tmp_path: Path) -> None:
    """Fewer padded rows are dropped, more are zero; the rows in both are the same."""
    reader = TensorReader(write(tmp_path, runs(matrix(), 0, 2, 2)))
    expected = torch.zeros(rows, COLUMNS)
    common = min(rows, ROWS)
    expected[:common] = matrix()[:common]
    found = [reader.for_piece(one)[0][WEIGHT] for one in runs(expected, 0, 2, 1)]
    assert torch.equal(torch.cat(found).view(rows, COLUMNS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_dtypes_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    value = matrix(dtype)
    reader = TensorReader(write(tmp_path, runs(value, 0, 2, 2)))
    assert reader.whole("w").dtype == dtype
    assert torch.equal(reader.whole("w"), value)
    assert reader.for_piece(piece(value, 0, 1, 2))[0][WEIGHT].dtype == dtype


def test_values_that_are_not_finite_and_the_smallest_ones_are_kept(tmp_path: Path) -> None:
    value = torch.tensor([float("inf"), float("nan"), -0.0, 1e-45]).view(2, 2)
    reader = TensorReader(write(tmp_path, [piece(value)]))
    assert reader.whole("w").view(torch.int32).equal(value.view(torch.int32))


@pytest.mark.parametrize("lost", range(4))
def test_the_file_of_a_rank_is_missing(lost: int, tmp_path: Path) -> None:
    value = matrix()
    paths = write(tmp_path, runs(value, 0, 2, 2))
    del paths[lost]
    reader = TensorReader(paths)
    with pytest.raises(ValueError, match=r"w: weight of shard \d holds 24 of the elements 0\.\.48"):
        reader.whole("w")
    with pytest.raises(ValueError, match="a rank's file is missing from the checkpoint"):
        reader.for_piece(piece(value))
    # What the other files hold is there.
    kept = runs(value, 0, 2, 2)[(lost + 1) % 4]
    assert torch.equal(reader.for_piece(kept)[0][WEIGHT], kept.tensors[WEIGHT])


def test_all_files_of_a_shard_are_missing(tmp_path: Path) -> None:
    paths = write(tmp_path, runs(matrix(), 0, 2, 2))[:2]
    with pytest.raises(ValueError, match="shard 1 holds 0 of the elements"):
        TensorReader(paths).whole("w")


def test_a_parameter_that_is_not_stored(tmp_path: Path) -> None:
    reader = TensorReader(write(tmp_path, [piece(matrix())]))
    with pytest.raises(KeyError, match="other"):
        reader.for_piece(piece(matrix(), name="other"))


def test_states_of_whole_matrices_are_not_given_for_a_run(tmp_path: Path) -> None:
    """They have shapes of their own; their optimizer reads them with `whole`."""
    factors = torch.arange(3.0)
    kept = Piece("w", (3,), None, 0, 1, 0, {f"{WHOLE}factors": factors})
    reader = TensorReader(write(tmp_path, [piece(matrix()), kept]))
    tensors, _ = reader.for_piece(piece(matrix()))
    assert sorted(tensors) == ["exp_avg", WEIGHT]
    assert torch.equal(reader.whole("w", f"{WHOLE}factors"), factors)


def test_one_file_holds_many_parameters(tmp_path: Path) -> None:
    path = tmp_path / "rank.safetensors"
    write_pieces(path, [piece(matrix(), name=name) for name in ("b", "a")])
    reader = TensorReader([path])
    assert reader.names() == ["a", "b"]
    assert torch.equal(reader.whole("a"), reader.whole("b"))


def test_a_file_put_in_the_place_of_another_is_read(tmp_path: Path) -> None:
    """As after a rollback, when a step is saved again."""
    path = tmp_path / "rank.safetensors"
    for factor in (1, 2):
        write_pieces(path, [piece(matrix() * factor)])
        assert torch.equal(TensorReader([path]).whole("w"), matrix() * factor)
        path.rename(tmp_path / f"aside-{factor}")


def test_what_cannot_be_written_is_the_systems_error(tmp_path: Path) -> None:
    """So that a full disk and a missing folder end in SaveError."""
    with pytest.raises(OSError, match="nowhere"):
        write_pieces(tmp_path / "nowhere" / "rank.safetensors", [piece(matrix())])


def test_values_that_do_not_lie_side_by_side(tmp_path: Path) -> None:
    value = torch.arange(8.0)
    strided = Piece("w", (4,), None, 0, 1, 0, {WEIGHT: value[::2]})
    assert torch.equal(TensorReader(write(tmp_path, [strided])).whole("w"), value[::2])


@pytest.mark.parametrize(("dim", "shards", "parts"), LAYOUTS)
def test_the_index_gives_what_the_headers_give_and_opens_only_what_it_needs(
    dim: int | None, shards: int, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = runs(matrix(), dim, shards, parts)
    paths = write(tmp_path, pieces)
    index = build_index([path.name for path in paths], [plan_file([one])[1] for one in pieces])
    index = PieceIndex.from_dict(json.loads(json.dumps(index.to_dict())))
    opened: list[Path] = []
    safe_open = tensors.safe_open

    def noted(path: Path, framework: str) -> Any:
        opened.append(path)
        return safe_open(path, framework=framework)

    monkeypatch.setattr(tensors, "safe_open", noted)
    reader = TensorReader(paths, index)
    assert opened == []
    for path, wanted in zip(paths, pieces, strict=True):
        found, scalars = reader.for_piece(wanted)
        assert opened.pop() == path and opened == []
        assert all(torch.equal(found[state], wanted.tensors[state]) for state in wanted.tensors)
        assert scalars == {"step": 7.0}
    assert torch.equal(TensorReader(paths, index).whole("w"), TensorReader(paths).whole("w"))


def test_the_index_keeps_every_kind_of_piece() -> None:
    """States of whole matrices, other lengths, other scalars, and no order among the starts."""
    kept = Piece("w", (3,), None, 0, 1, 0, {f"{WHOLE}factors": torch.zeros(3)})
    ranks = [[piece(matrix(), 0, 1, 2), kept], [], [piece(matrix(), 0, 0, 2, name="v")]]
    records = [plan_file(own)[1] for own in ranks]
    index = build_index(["a", "b", "c"], records)
    assert {(row.name, row.states) for row in index.rows} == {
        ("w", (WEIGHT, "exp_avg")), ("w", (f"{WHOLE}factors",)), ("v", (WEIGHT, "exp_avg")),
    }  # fmt: skip
    found = sorted(
        (run.file, run.item, run.shard, run.start, run.length)
        for row in index.rows
        for own in row.runs().values()
        for run in own
    )
    assert found == [(0, 0, 1, 0, 48), (0, 1, 0, 0, 3), (2, 0, 0, 0, 48)]
