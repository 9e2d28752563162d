"""Commit by one rename, one error on all ranks, and a damaged step is named and passed over."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron.checkpoint import store
from megatron.checkpoint.store import MANIFEST, SaveError, committed, damage, newest_sound, save
from tests.spawn import run

STEP = "step-00000003"
FILE = "rank-00000-of-00001.safetensors"


def write(path: Path) -> None:
    """Stands for a rank's tensors."""
    path.write_bytes(b"weights of " + path.name.encode())


def refuse(path: Path) -> None:
    """A disk that fills up while a rank writes."""
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def files_below(root: Path) -> list[str]:
    """Everything in a folder."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def saved(root: Path, *iterations: int) -> Path:
    """A folder with these steps."""
    for iteration in iterations:
        save(root, iteration, write, {"state": {"iteration": iteration}})
    return root


def test_a_step_is_a_manifest_and_the_files_it_describes(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, write, {"state": {"tokens": 9}})
    assert folder == tmp_path / STEP
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["iteration"] == 3 and manifest["state"] == {"tokens": 9}
    assert manifest["files"][FILE]["bytes"] == (folder / FILE).stat().st_size
    assert (tmp_path / "latest").read_text() == STEP
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert files_below(tmp_path) == sorted(
        ["latest", "latest_checkpointed_iteration.txt", f"{STEP}/{FILE}", f"{STEP}/{MANIFEST}"]
    )


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


def test_all_of_a_step_is_on_the_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    fsync, rename = os.fsync, os.rename

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(source: Path, target: Path) -> None:
        for path in (source, source / FILE, source / MANIFEST):
            assert path.stat().st_ino in flushed, f"{path} is not flushed"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", checked)
    saved(tmp_path, 3)
    assert tmp_path.stat().st_ino in flushed  # the rename itself


def test_a_committed_step_is_never_written_again(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    before = (tmp_path / STEP / MANIFEST).read_bytes()
    with pytest.raises(SaveError, match=f"step 3 was not saved.*{STEP} is already committed"):
        save(tmp_path, 3, refuse, {})
    assert (tmp_path / STEP / MANIFEST).read_bytes() == before
    assert damage(committed(tmp_path)[0]) == []


@pytest.mark.parametrize("where", ["writing", "commit"])
def test_a_failed_save_leaves_what_was_there(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_below(saved(tmp_path, 2))
    if where == "commit":
        monkeypatch.setattr(store, "write_atomically", lambda path, _: refuse(path))
    with pytest.raises(SaveError, match=r"step 3 was not saved: rank 0: .*No space left"):
        save(tmp_path, 3, refuse if where == "writing" else write, {})
    assert files_below(tmp_path) == before
    assert not (tmp_path / f"{STEP}.tmp").exists()
    assert [checkpoint.iteration for checkpoint in committed(tmp_path)] == [2]


def two_ranks(root: Path, broken: int | None) -> tuple[str, str]:
    """A save of which one rank may fail: (kind of error, message), empty where it is saved."""
    write_own = refuse if dist.get_rank() == broken else write
    try:
        save(root, 3, write_own, {})
    except SaveError as error:
        return type(error).__name__, str(error)
    return "", ""


def test_every_rank_writes_its_file(tmp_path: Path) -> None:
    assert run(two_ranks, 2, tmp_path, None) == [("", "")] * 2
    (checkpoint,) = committed(tmp_path)
    names = [path.name for path in checkpoint.files("tensors")]
    assert names == ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert damage(checkpoint) == []


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_cannot_write_fails_all_ranks_alike(broken: int, tmp_path: Path) -> None:
    first, second = run(two_ranks, 2, tmp_path, broken)
    assert first == second
    kind, message = first
    assert kind == "SaveError"
    assert f"step 3 was not saved: rank {broken}: " in message
    assert "No space left on device" in message
    assert list(tmp_path.iterdir()) == []


def root_is_a_file(root: Path) -> tuple[str, str]:
    """Only rank 0 makes the folder; the others learn that it could not."""
    return two_ranks(root / "file", None)


def test_a_folder_that_cannot_be_made_fails_all_ranks_alike(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    first, second = run(root_is_a_file, 2, tmp_path)
    assert first == second
    assert first[0] == "SaveError" and "rank 0: " in first[1]


def test_committed_lists_the_newest_first(tmp_path: Path) -> None:
    saved(tmp_path, 9, 100, 2)
    assert [checkpoint.iteration for checkpoint in committed(tmp_path)] == [100, 9, 2]
    assert committed(tmp_path / "nowhere") == []


def test_what_was_never_committed_is_not_listed(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    leftover = tmp_path / "step-00000009.tmp"
    leftover.mkdir()
    (leftover / MANIFEST).write_text((tmp_path / STEP / MANIFEST).read_text())
    (tmp_path / "step-00000010").mkdir()  # no manifest
    torn = tmp_path / "step-00000011"
    torn.mkdir()
    (torn / MANIFEST).write_text((tmp_path / STEP / MANIFEST).read_text()[:40])
    assert [checkpoint.iteration for checkpoint in committed(tmp_path)] == [3]


def test_leftovers_of_a_dead_save_do_not_stop_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / f"{STEP}.tmp"
    leftover.mkdir(parents=True)
    (leftover / "rank-00007-of-00008.safetensors").write_bytes(b"of another layout")
    saved(tmp_path, 3)
    assert sorted(path.name for path in (tmp_path / STEP).iterdir()) == [MANIFEST, FILE]
    assert not leftover.exists()


def shorten(path: Path) -> None:
    """A file cut short."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit of a file, its length unchanged."""
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


DAMAGES = [(Path.unlink, "is missing"), (shorten, "bytes, but"), (flip, "SHA-256")]


@pytest.mark.parametrize(("harm", "words"), DAMAGES)
def test_each_kind_of_damage_is_named(
    harm: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    saved(tmp_path, 3)
    path = tmp_path / STEP / FILE
    harm(path)
    (line,) = damage(committed(tmp_path)[0])
    assert line.startswith(str(path)) and words in line
    assert damage(committed(tmp_path)[0], []) == []
    assert damage(committed(tmp_path)[0], [FILE]) == [line]


@pytest.mark.parametrize(("harm", "words"), DAMAGES)
def test_the_newest_sound_step_is_chosen(
    harm: Callable[[Path], Any], words: str, tmp_path: Path
) -> None:
    saved(tmp_path, 1, 2, 3)
    harm(tmp_path / STEP / FILE)
    warnings: list[str] = []
    found = newest_sound(tmp_path, warnings.append)
    assert found is not None and found.iteration == 2
    assert len(warnings) == 1
    assert warnings[0].startswith(f"checkpoint {STEP} is not usable: ") and words in warnings[0]


def test_no_sound_step_is_none(tmp_path: Path) -> None:
    assert newest_sound(tmp_path, print) is None
    saved(tmp_path, 3)
    flip(tmp_path / STEP / FILE)
    assert newest_sound(tmp_path, lambda line: None) is None


def chosen_by_two(root: Path) -> tuple[int, list[str]]:
    """The step that this rank takes, and its warnings."""
    warnings: list[str] = []
    found = newest_sound(root, warnings.append)
    assert found is not None
    return found.iteration, warnings


def test_ranks_agree_on_a_damage_that_one_of_them_found(tmp_path: Path) -> None:
    for iteration in (2, 3):
        run(saved_by_two, 2, tmp_path, iteration)
    flip(tmp_path / STEP / "rank-00001-of-00002.safetensors")
    first, second = run(chosen_by_two, 2, tmp_path)
    assert first == second
    iteration, (warning,) = first
    assert iteration == 2 and "rank-00001-of-00002" in warning


def saved_by_two(root: Path, iteration: int) -> None:
    """A step of two ranks."""
    save(root, iteration, write, {})
