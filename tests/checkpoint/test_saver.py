"""A step is committed whole or not at all, on all ranks alike, at once or behind the steps."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import saver as saver_file
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.rank_file import Digest, RankFile, write_file
from megatron.checkpoint.store import committed, damage, newest_sound, open_step, step_folder, steps
from megatron.parallel.control import ALONE, Control, make_control
from megatron.parallel.piece import WEIGHT, Piece
from tests.checkpoint.made import (
    FILE,
    FILES,
    STAGE,
    about,
    files_below,
    folders,
    make_saver,
    pieces,
    save,
    saved,
)
from tests.spawn import run

STEP = "step-00000003"
BOTH = pytest.mark.parametrize("behind", [False, True], ids=["at once", "behind"])
NAMES = ["latest", "latest_checkpointed_iteration.txt"]


@BOTH
def test_a_step_is_a_manifest_and_the_files_it_describes(behind: bool, tmp_path: Path) -> None:
    done = save(make_saver(tmp_path, behind=behind), 3)
    folder = tmp_path / STEP
    assert (done.iteration, done.path, done.error) == (3, folder, "")
    assert done.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert 0 < done.held_s <= done.elapsed_s
    assert files_below(tmp_path) == sorted([*NAMES, *(f"{STEP}/{name}" for name in FILES)])
    assert [(tmp_path / name).read_text() for name in NAMES] == [STEP, "3"]
    (checkpoint,) = committed(tmp_path)
    assert damage(checkpoint) == []
    assert torch.equal(checkpoint.reader().whole("w"), pieces(3)[0].tensors[WEIGHT])


def test_both_ways_write_the_same_bytes(tmp_path: Path) -> None:
    value = torch.randn(40, generator=torch.Generator().manual_seed(1))
    kinds = {
        "a": value[::2], "b": value.to(torch.bfloat16), "c": torch.arange(9), "d": value > 0,
        WEIGHT: value,
    }  # fmt: skip
    own = [Piece(name, (40,), None, 0, 1, 0, kinds, {"step": 1.0}) for name in ("v", "w")]
    for behind in (False, True):
        assert save(make_saver(tmp_path / str(behind), behind=behind), 3, own).path is not None
    first, second = (tmp_path / str(behind) / STEP for behind in (False, True))
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_what_is_saved_behind_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    saver, own = make_saver(tmp_path, behind=True), pieces(3)
    wanted = own[0].tensors[WEIGHT].clone()
    assert saver.save(3, own, about(3), [STAGE]) is None
    own[0].tensors[WEIGHT].zero_()  # the next step
    assert saver.in_flight
    assert (saver.wait() or pytest.fail()).path == tmp_path / STEP
    assert torch.equal(open_step(tmp_path, 3).reader().whole("w"), wanted)
    assert not saver.in_flight and not saver.pending and saver.wait() is None


@pytest.mark.flaky(reruns=1)
def test_the_steps_are_held_for_the_copy_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def slow(path: Path, file: RankFile, tick: Callable[[], None]) -> Digest:
        assert go_on.wait(20)
        return write_file(path, file, tick)

    monkeypatch.setattr(saver_file, "write_file", slow)
    saver = make_saver(tmp_path, behind=True)
    assert saver.save(3, pieces(3), about(3), []) is None
    assert saver.in_flight and saver.pending and steps(tmp_path) == []
    with pytest.raises(AssertionError, match="one save at a time"):
        saver.save(4, pieces(4), about(4), [])
    time.sleep(0.3)
    go_on.set()
    while saver.pending:
        time.sleep(0.01)
    assert saver.advance() is None and saver.in_flight  # rank 0 commits
    while saver.pending:
        time.sleep(0.01)
    done = saver.advance()
    assert done is not None and done.path == tmp_path / STEP and not saver.in_flight
    assert done.held_s < 0.3 <= done.elapsed_s


def test_before_the_rename_nothing_is_committed_and_after_it_all_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], list[str]]] = []
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        for act in (lambda: None, lambda: rename(source, target)):
            act()
            found = committed(tmp_path)
            seen.append(([c.iteration for c in found], [line for c in found for line in damage(c)]))

    monkeypatch.setattr(os, "rename", watched)
    saved(tmp_path, 3)
    assert seen == [([], []), ([3], [])]


@BOTH
def test_all_of_a_step_is_on_the_disk_before_the_rename(
    behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(source: Path, target: Path) -> None:
        for path in (source, *(source / name for name in FILES)):
            assert path.stat().st_ino in flushed, f"{path} is not flushed"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    assert save(make_saver(tmp_path, behind=behind), 3).error == ""
    assert tmp_path.stat().st_ino in flushed  # the rename itself


def test_a_committed_step_is_never_written_again(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    before = (tmp_path / STEP / MANIFEST).read_bytes()
    done = save(make_saver(tmp_path), 3)
    assert done.path is None
    assert done.error == f"step 3 was not saved: rank 0: {tmp_path / STEP} is already committed"
    assert (tmp_path / STEP / MANIFEST).read_bytes() == before
    assert damage(committed(tmp_path)[0]) == []


def test_a_folder_that_was_never_committed_is_set_aside_and_the_step_saved(tmp_path: Path) -> None:
    (tmp_path / STEP).mkdir()
    warnings: list[str] = []
    assert save(make_saver(tmp_path, warn=warnings.append), 3).path is not None
    assert [one.iteration for one in committed(tmp_path)] == [3]
    assert len(folders(tmp_path)) == 2 and f"set aside as {STEP}.damaged-" in warnings[0]


def full(path: Path, file: RankFile, tick: Callable[[], None]) -> Digest:
    """A disk that fills up while a rank writes."""
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def out_of_memory(path: Path, file: RankFile, tick: Callable[[], None]) -> Digest:
    """No memory for a block."""
    raise MemoryError


@BOTH
@pytest.mark.parametrize(
    ("where", "failure", "words"),
    [
        ("write_file", full, "No space left on device"),
        ("write_file", out_of_memory, "MemoryError"),
        ("plan_file", lambda own: 1 / 0, "ZeroDivisionError: division by zero"),
        ("write_atomically", lambda path, _: full(path, None, None), "No space left on device"),
        ("build_index", lambda names, records: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_failed_save_leaves_what_was_there(
    where: str,
    failure: Callable[..., Any],
    words: str,
    behind: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files_below(saved(tmp_path, 2))
    saver = make_saver(tmp_path, behind=behind)
    with monkeypatch.context() as patch:
        patch.setattr(saver_file, where, failure)
        done = save(saver, 3)
    assert done.path is None and done.error.startswith("step 3 was not saved: rank 0: ")
    assert words in done.error
    assert files_below(tmp_path) == before and folders(tmp_path) == ["step-00000002"]
    assert save(saver, 3).path is not None  # the next one


def test_a_manifest_that_could_not_be_read_back_is_not_committed(tmp_path: Path) -> None:
    done = make_saver(tmp_path).save(3, pieces(3), about(4), [])
    assert done is not None and "its manifest has state.iteration=4" in done.error
    assert steps(tmp_path) == []


@BOTH
def test_what_fails_after_the_rename_is_a_warning(behind: bool, tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    warnings: list[str] = []
    done = save(make_saver(tmp_path, behind=behind, warn=warnings.append), 3)
    assert done.path == tmp_path / STEP and done.error == ""
    (line,) = warnings
    assert line.startswith("step 3 is saved, but: ") and "latest" in line
    assert (tmp_path / NAMES[1]).read_text() == "3"


@BOTH
def test_an_error_that_nobody_foresaw_ends_the_save_all_the_same(
    behind: bool, tmp_path: Path
) -> None:
    def broken(line: str) -> None:
        raise ValueError("no log")

    (tmp_path / "latest").mkdir()  # which is warned of
    saver = make_saver(tmp_path, behind=behind, warn=broken)
    done = save(saver, 3)
    assert done.path is None and "ValueError: no log" in done.error and not saver.in_flight


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(0, 0, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = save(make_saver(tmp_path), 3, pieces(3, length=10_000_000))
    assert "it needs 0.08 GB, but 0.00 GB are free at" in done.error
    assert str(tmp_path) in done.error and "KEEP_LAST" in done.error
    assert files_below(tmp_path) == []


def room_of_two(root: Path) -> str:
    """Each rank's bytes fit, all of them do not."""
    control, own = make_control(), pieces(3, length=1000)
    free = 8000 + 3000
    shutil.disk_usage = lambda path: namedtuple("usage", "free")(free)  # type: ignore[assignment]
    done = save(make_saver(root, control), 3, own, control)
    return done.error


def test_the_bytes_of_all_ranks_count(tmp_path: Path) -> None:
    first, second = run(room_of_two, 2, tmp_path)
    assert first == second and "are free at" in first


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750)]
)
def test_files_are_readable_as_the_umask_says(
    umask: int, file: int, folder: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        saved(tmp_path / "checkpoints", 3)
    finally:
        os.umask(before)
    root = tmp_path / "checkpoints"
    assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {file}
    assert {path.stat().st_mode & 0o777 for path in (root, root / STEP)} == {folder}


def test_leftovers_of_dead_starts_are_removed_and_each_start_has_a_name_of_its_own(
    tmp_path: Path,
) -> None:
    for name in (f"{STEP}.tmp", f"{STEP}.tmp-0123abcd", "step-00000009.tmp-0123abcd"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "rank-00007-of-00008.safetensors").write_bytes(b"of another layout")
    savers = [make_saver(tmp_path) for _ in range(2)]
    assert folders(tmp_path) == []
    names = []
    rename = os.rename

    def noted(source: Path, target: Path) -> None:
        names.append(source.name)
        rename(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", noted)
        for number, saver in enumerate(savers):
            save(saver, number)
    assert len({name.partition("tmp-")[2] for name in names}) == 2


class Failing(list[Piece]):
    """Pieces that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Piece]:
        raise self.error


def two_ranks(
    root: Path, behind: bool, broken: int | None, error: Exception
) -> list[tuple[Any, ...]]:
    """Two saves, of which one rank may fail in the first: what each came to."""
    control = make_control()
    saver, results = make_saver(root, control, behind=behind), []
    for iteration in (3, 4):
        own = Failing(error) if control.rank == broken and iteration == 3 else None
        done = save(saver, iteration, own, control)
        results.append((done.iteration, done.path, done.error, done.bytes))
    return results


@BOTH
def test_every_rank_writes_its_file(behind: bool, tmp_path: Path) -> None:
    first, second = run(two_ranks, 2, tmp_path, behind, None, OSError())
    assert first == second and [path for _, path, _, _ in first] == [
        step_folder(tmp_path, step) for step in (3, 4)
    ]
    found = newest_sound(tmp_path, ALONE, print, set_aside=True)
    assert found.checkpoint is not None and found.checkpoint.iteration == 4
    names = [path.name for path in found.checkpoint.files("tensors")]
    assert names == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    wanted = torch.cat([pieces(4, rank, 2)[0].tensors[WEIGHT] for rank in range(2)])
    assert torch.equal(found.checkpoint.reader().whole("w"), wanted)


@BOTH
@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), RuntimeError("CUDA error")],
)
def test_a_rank_that_fails_fails_all_ranks_alike(
    error: Exception, broken: int, behind: bool, tmp_path: Path
) -> None:
    first, second = run(two_ranks, 2, tmp_path, behind, broken, error)
    assert first == second
    (_, path, message, _), (_, good, _, _) = first
    assert path is None and message.startswith(f"step 3 was not saved: rank {broken}: ")
    assert str(error) in message
    assert good is not None and steps(tmp_path) == [4] and len(folders(tmp_path)) == 1


def test_a_folder_that_cannot_be_made_fails_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = save(make_saver(tmp_path / "file"), 3)
    assert done.path is None and "rank 0: " in done.error


def test_the_present_save_is_told_of_while_it_is_written(tmp_path: Path) -> None:
    ticks: list[None] = []
    saver = saver_file.Saver(
        tmp_path,
        Control(),
        saver_file.Retention(),
        asynchronous=False,
        warn=print,
        tick=lambda: ticks.append(None),
    )
    assert save(saver, 3).path is not None and ticks
    assert (tmp_path / STEP / FILE).is_file()
