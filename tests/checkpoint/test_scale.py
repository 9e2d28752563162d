"""At 3,072 ranks a rank opens and receives what it does at 96: its share, one manifest, one index.

The world is played: rank 0's messages are recorded and given to any other rank; every rank's file
is really written, small, and every open is counted.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import rank_file, tensors
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.saver import Saved, Saver
from megatron.checkpoint.store import newest_sound
from megatron.parallel.control import Control
from megatron.parallel.piece import WEIGHT, Piece
from tests.checkpoint.made import KEEP_ALL, STAGE, about

WORLDS = (96, 3072)
PARAMETERS, LENGTH = 6, 4


class Played(Control):
    """A rank of a large world. Rank 0's `broadcast` is recorded, or given again to another rank.

    Args:
        said: what rank 0 broadcast; filled by rank 0.
        others: rank 0's gather: from its own value to all ranks' values.
    """

    def __init__(
        self, rank: int, size: int, said: list[Any], others: Callable[[Any], list[Any]]
    ) -> None:
        super().__init__(rank, size)
        self.said, self.others, self.received = said, others, 0
        self._next = iter(list(said))

    def sum(self, values: Any) -> list[float]:
        return [value * self.size for value in values]

    def gather(self, value: Any) -> list[Any] | None:
        self.received += len(pickle.dumps(value))  # sent, rather
        return self.others(value) if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        if self.rank == 0:
            self.said.append(value)
            return value
        value = next(self._next)
        self.received += len(pickle.dumps(value))
        return value


def pieces(rank: int, world: int) -> list[Piece]:
    """ZeRO-3's share: a run of every parameter."""
    value = torch.full((LENGTH,), float(rank))
    states = {WEIGHT: value, "exp_avg": value + 0.5}
    return [
        Piece(f"layers.{n}.weight", (world * LENGTH,), None, 0, 1, rank * LENGTH, states)
        for n in range(PARAMETERS)
    ]


COUNTED: list[list[str]] = []


def note_open(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: files and folders that are opened, and what is listed."""
    if COUNTED and event in ("open", "os.listdir", "os.scandir"):
        COUNTED[-1].append(str(arguments[0]))


sys.addaudithook(note_open)  # cannot be removed; does nothing outside `opens`


@contextmanager
def opens(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names below `root` that are opened inside, safetensors' own opens included."""
    safe_open, seen = tensors.safe_open, list[str]()

    def noted(path: Path, framework: str) -> Any:
        seen.append(str(path))
        return safe_open(path, framework=framework)

    monkeypatch.setattr(tensors, "safe_open", noted)
    COUNTED.append(seen)
    try:
        yield seen
    finally:
        COUNTED.pop()
        monkeypatch.setattr(tensors, "safe_open", safe_open)
        seen[:] = [Path(name).name for name in seen if name.startswith(str(root))]


def write(root: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[Any]]:
    """Rank 0's save of a step of `world` ranks: its opens, and what it broadcast."""
    said: list[Any] = []

    def others(own: Any) -> list[Any]:
        """The other ranks write as rank 0 has."""
        folder = next(root.glob("step-*.tmp-*"))
        outcomes, counted = [own], COUNTED.pop()
        for rank in range(1, world):
            file, records = tensors.plan_file(pieces(rank, world))
            name = f"rank-{rank:05d}-of-{world:05d}.safetensors"
            digest = rank_file.write_file(folder / name, file)
            outcomes.append(type(own)(type(own.value)(name, digest, records)))
        COUNTED.append(counted)
        return outcomes

    saver = make(root, Played(0, world, said, others))
    with opens(root, monkeypatch) as seen:
        done = saver.save(7, pieces(0, world), about(7), [STAGE] * 50)
    assert done is not None and done.path is not None, done
    return seen, said


def make(root: Path, control: Control) -> Saver:
    """A saver of the played world."""
    return Saver(root, control, KEEP_ALL, asynchronous=False, warn=print)


def read(
    root: Path, control: Played, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], list[Any]]:
    """A rank's resume: its opens."""
    rank, world = control.rank, control.size
    with opens(root, monkeypatch) as seen:
        found = newest_sound(root, control, print, set_aside=True)
        assert found.checkpoint is not None and found.checkpoint.state().iteration == 7
        reader = found.checkpoint.reader()
        for piece in pieces(rank, world):
            values, _ = reader.for_piece(piece)
            assert torch.equal(values["exp_avg"], piece.tensors["exp_avg"])
    return seen, control.said


def save_beside(
    root: Path, rank: int, world: int, start: str, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Another rank's save, into the folder that rank 0 would have made: its opens."""
    (root / f"step-00000008.tmp-{start}").mkdir()
    said = [start, "", Saved(8, root, "", 1, 0.0, 0.0)]
    with opens(root, monkeypatch) as seen:
        saver = make(root, Played(rank, world, said, list))
        assert saver.save(8, pieces(rank, world), about(8), []) is not None
    return seen


def measure(root: Path, world: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What rank 0 and one other rank open, receive and leave on the disk."""
    rank = world - 5
    saves, said = write(root, world, monkeypatch)
    beside = save_beside(root, rank, world, said[0], monkeypatch)
    first, said = read(root, Played(0, world, [], lambda own: [own] * world), monkeypatch)
    other = Played(rank, world, said, list)
    second, _ = read(root, other, monkeypatch)
    folder = root / "step-00000007"
    small = [folder / name for name in (MANIFEST, "data.json", "pieces.json")]
    return {
        "save": (saves, beside),
        "resume": (first, second),
        "received": other.received,
        "small": [path.stat().st_size for path in small],
        "rows": json.loads(small[2].read_text())["rows"],
    }


@pytest.fixture(scope="module")
def cost(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """The figures of each world."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        return {world: measure(tmp_path_factory.mktemp("world"), world, patch) for world in WORLDS}


@pytest.mark.parametrize("way", ["save", "resume"])
@pytest.mark.parametrize("who", [0, 1], ids=["rank 0", "another rank"])
def test_a_rank_opens_as_many_files_in_any_world(
    way: str, who: int, cost: dict[int, dict[str, Any]]
) -> None:
    small, large = (len(cost[world][way][who]) for world in WORLDS)
    print(way, who, small, large, cost[WORLDS[1]][way][who])
    assert small == large <= 12


def test_another_rank_opens_its_share_and_its_own_file(cost: dict[int, dict[str, Any]]) -> None:
    world = WORLDS[1]
    name = f"rank-{world - 5:05d}-of-{world:05d}.safetensors"
    assert cost[world]["resume"][1] == [name, name]  # hashed, then read
    assert cost[world]["save"][1] == [name]


def test_a_rank_receives_one_manifest_one_record_and_one_index(
    cost: dict[int, dict[str, Any]],
) -> None:
    for world in WORLDS:
        print(world, cost[world]["received"], cost[world]["small"])
        assert cost[world]["received"] < 1.2 * sum(cost[world]["small"]) + 2000


def test_the_index_does_not_grow_with_the_world_but_for_the_names(
    cost: dict[int, dict[str, Any]],
) -> None:
    small, large = (len(json.dumps(cost[world]["rows"])) for world in WORLDS)
    assert large < small + 40 * PARAMETERS  # longer numbers
