"""Damage is named, passed over and moved aside; nothing is moved or deleted without need."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint import store
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.store import Found, committed, damage, newest_sound, open_step, steps
from megatron.parallel.control import ALONE, make_control
from tests.checkpoint.made import FILE, STAGE, folders, make_saver, save, saved
from tests.spawn import run

STEP = "step-00000003"
BEFORE = Path(__file__).parent / "written_before"


def find(root: Path, *, set_aside: bool = True) -> tuple[Found, list[str]]:
    """The newest sound step, and the warnings."""
    warnings: list[str] = []
    return newest_sound(root, ALONE, warnings.append, set_aside=set_aside), warnings


def test_steps_are_listed_the_newest_first(tmp_path: Path) -> None:
    saved(tmp_path, 9, 100, 2)
    for name in ("step-00000011.tmp-1234", "step-00000012.removing", "step-13", "step-0000x014"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000015.damaged-20250101T000000Z").mkdir()
    assert steps(tmp_path) == [100, 9, 2]
    assert [one.iteration for one in committed(tmp_path)] == [100, 9, 2]
    assert steps(tmp_path / "nowhere") == [] == committed(tmp_path / "nowhere")


def test_a_step_gives_its_state_with_the_record_of_its_data(tmp_path: Path) -> None:
    state = open_step(saved(tmp_path, 3), 3).state()
    assert (state.iteration, state.consumed_samples) == (3, 24)
    assert [stage.record for stage in state.data] == [{"seed": 1}]
    assert "data" not in json.loads((tmp_path / STEP / MANIFEST).read_text())["state"]


def test_a_step_of_the_format_before_is_read() -> None:
    checkpoint = open_step(BEFORE, 3)
    assert checkpoint.state().data[0].record["seed"] == 1234
    reader = checkpoint.reader()
    assert reader.whole(reader.names()[0]).numel() > 0 and damage(checkpoint) == []


def test_nothing_there_is_no_damage(tmp_path: Path) -> None:
    assert find(tmp_path) == (Found(None, ()), [])
    assert find(tmp_path / "nowhere") == (Found(None, ()), [])


def shorten(path: Path) -> None:
    """A file cut short."""
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    """One bit of a file, its length unchanged."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    """A file of no bytes."""
    path.write_bytes(b"")


def replace_by_folder(path: Path) -> None:
    """A folder under the file's name."""
    path.unlink()
    path.mkdir()


HARMS = [Path.unlink, shorten, flip, empty, replace_by_folder]


@pytest.mark.parametrize("name", [FILE, MANIFEST, "data.json", "pieces.json"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_step_is_named_set_aside_and_saved_again(
    harm: Callable[[Path], Any], name: str, tmp_path: Path
) -> None:
    saved(tmp_path, 1, 2, 3)
    harm(tmp_path / STEP / name)
    found, warnings = find(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.iteration == 2
    named, moved = warnings
    assert found.damaged == (named,)
    assert named.startswith(f"checkpoint {STEP} is not usable: {tmp_path / STEP / name} ")
    (aside,) = (folder for folder in folders(tmp_path) if "damaged" in folder)
    assert moved == f"checkpoint {STEP} is set aside as {aside}"
    assert aside.startswith(f"{STEP}.damaged-2") and aside.endswith("Z")
    assert steps(tmp_path) == [2, 1]
    saved(tmp_path, 3)
    again, warnings = find(tmp_path)
    assert again.checkpoint is not None and again.checkpoint.iteration == 3 and warnings == []
    assert aside in folders(tmp_path)


def test_each_byte_region_of_a_step_is_seen(tmp_path: Path) -> None:
    """Sixty places over all files: each is seen before the step is used."""
    saved(tmp_path, 2, 3)
    files = [tmp_path / STEP / name for name in (FILE, MANIFEST, "data.json", "pieces.json")]
    for path in files:
        content = path.read_bytes()
        for part in range(15):
            wrong = bytearray(content)
            wrong[part * (len(content) - 1) // 14] ^= 1
            path.write_bytes(wrong)
            found, (named,) = find(tmp_path, set_aside=False)
            assert found.checkpoint is not None and found.checkpoint.iteration == 2
            assert str(path) in named
        path.write_bytes(content)
    assert find(tmp_path)[0].damaged == ()


def test_all_damaged_files_of_a_step_are_named(tmp_path: Path) -> None:
    for iteration in (2, 3):
        run(saved_by_two, 2, tmp_path, iteration)
    for path in (tmp_path / STEP).glob("rank-*"):
        shorten(path)
    assert len(damage(committed(tmp_path)[0])) == 2
    assert len(find(tmp_path)[0].damaged) == 2


def test_an_empty_folder_and_a_file_under_a_steps_name_are_damage(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-00000005").write_text("")
    found, warnings = find(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.iteration == 1
    assert "step-00000005 is not a folder" in warnings[0] and "is missing" in warnings[1]
    assert steps(tmp_path) == [1]


def test_a_step_under_another_steps_name_is_damage(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    (tmp_path / STEP).rename(tmp_path / "step-00000008")
    found, warnings = find(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.iteration == 2
    assert "iteration=3, but the folder is of step 8" in warnings[0]


def test_where_no_step_is_sound_all_are_named_and_none_is_moved(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        flip(tmp_path / f"step-{step:08d}" / (MANIFEST if step == 2 else FILE))
    before = folders(tmp_path)
    found, warnings = find(tmp_path)
    assert found.checkpoint is None and len(found.damaged) == 3 == len(warnings)
    assert folders(tmp_path) == before


def test_a_file_system_that_fails_is_damage_and_nothing_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(folder: Path, iteration: int) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied", str(folder))

    before = folders(saved(tmp_path, 1, 2))
    monkeypatch.setattr(store, "read_manifest", unreadable)
    found, warnings = find(tmp_path)
    assert found.checkpoint is None and len(warnings) == 2
    assert "Permission denied" in found.damaged[0]
    assert folders(tmp_path) == before


def test_a_folder_that_cannot_be_listed_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(path: Path) -> list[str]:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "listdir", unreadable)
    found, _ = find(tmp_path)
    assert found.checkpoint is None and "cannot be listed" in found.damaged[0]


def test_steps_that_were_set_aside_still_count_where_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / f"{STEP}.damaged-20250101T000000Z").mkdir()
    found, _ = find(tmp_path)
    assert found.checkpoint is None and "set aside as damaged" in found.damaged[0]


def test_in_the_folder_of_another_run_nothing_is_moved(tmp_path: Path) -> None:
    saved(tmp_path, 2, 3)
    flip(tmp_path / STEP / FILE)
    found, warnings = find(tmp_path, set_aside=False)
    assert found.checkpoint is not None and found.checkpoint.iteration == 2
    assert len(warnings) == 1 and STEP in folders(tmp_path)


def test_what_cannot_be_set_aside_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    saved(tmp_path, 2, 3)
    flip(tmp_path / STEP / FILE)
    monkeypatch.setattr(os, "rename", refused)
    found, warnings = find(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.iteration == 2
    assert "could not be set aside" in warnings[1] and "Read-only" in warnings[1]


def test_two_damages_in_one_second_have_two_names(tmp_path: Path) -> None:
    for _ in range(3):
        saved(tmp_path, 3)
        store.move_aside(tmp_path / STEP)
    assert len(folders(tmp_path)) == 3


def saved_by_two(root: Path, iteration: int) -> None:
    """A step of two ranks."""
    control = make_control()
    assert save(make_saver(root, control), iteration, control=control).path is not None


def chosen_by_two(root: Path) -> tuple[int, list[Any], list[str]]:
    """The step that this rank takes, its data, and its warnings."""
    warnings: list[str] = []
    found = newest_sound(root, make_control(), warnings.append, set_aside=True)
    assert found.checkpoint is not None
    state = found.checkpoint.state()
    return state.iteration, [stage.record for stage in state.data], warnings


@pytest.mark.parametrize("name", ["rank-00001-of-00002.safetensors", MANIFEST])
def test_ranks_agree_on_a_damage_that_one_of_them_found(name: str, tmp_path: Path) -> None:
    for iteration in (2, 3):
        run(saved_by_two, 2, tmp_path, iteration)
    flip(tmp_path / STEP / name)
    first, second = run(chosen_by_two, 2, tmp_path)
    assert first == second
    iteration, records, (named, moved) = first
    assert iteration == 2 and name in named and "set aside" in moved
    assert records == [STAGE["record"]]
