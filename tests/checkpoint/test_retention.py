"""What is kept is what was asked for, and what goes never looks sound on its way."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import pytest

from megatron.checkpoint.retention import Retention, remove_expired
from megatron.checkpoint.store import committed, steps
from tests.checkpoint.made import about, folders, make_saver, pieces, save, saved

LOSSES = {0: None, 10: 3.0, 20: 2.0, 30: math.nan, 40: 2.5, 50: 2.6}


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [0, 10, 20, 30, 40, 50]),
        (Retention(every=20, best=1), [0, 10, 20, 30, 40, 50]),
        (Retention(last=1), [50]),
        (Retention(last=2), [40, 50]),
        (Retention(last=9), [0, 10, 20, 30, 40, 50]),
        (Retention(last=1, every=20), [0, 20, 40, 50]),
        (Retention(last=1, best=1), [20, 50]),
        (Retention(last=1, best=2), [20, 40, 50]),
        (Retention(last=1, best=9), [10, 20, 40, 50]),
        (Retention(last=1, every=30, best=1), [0, 20, 30, 50]),
    ],
)
def test_what_is_kept(retention: Retention, kept: list[int]) -> None:
    assert sorted(retention.kept(LOSSES)) == kept


def test_of_equal_losses_the_newer_one_stays() -> None:
    assert Retention(last=1, best=1).kept({1: 2.0, 2: 2.0, 3: 9.0}) == {2, 3}


@pytest.mark.parametrize("behind", [False, True])
def test_a_commit_removes_what_has_expired(behind: bool, tmp_path: Path) -> None:
    saver = make_saver(tmp_path, retention=Retention(last=2, best=1), behind=behind)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, None), (5, 1.5)):
        own = about(step, validation_loss=loss)
        assert (saver.save(step, pieces(step), own, []) or saver.wait()).path is not None
    assert steps(tmp_path) == [5, 4, 2]
    assert len(folders(tmp_path)) == 3


def test_a_later_start_knows_the_losses_of_an_earlier_one(tmp_path: Path) -> None:
    for step, loss in ((1, 1.0), (2, 2.0)):
        make_saver(tmp_path).save(step, pieces(step), about(step, validation_loss=loss), [])
    saver = make_saver(tmp_path, retention=Retention(last=1, best=1))
    save(saver, 3)
    assert steps(tmp_path) == [3, 1]


def test_nothing_goes_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1)
    saver = make_saver(tmp_path, retention=Retention(last=1))
    monkeypatch.setattr("megatron.checkpoint.saver.seal", lambda content: 1 / 0)
    assert save(saver, 2).path is None
    assert steps(tmp_path) == [1]


def test_later_steps_and_the_one_just_committed_stay(tmp_path: Path) -> None:
    """A run that went back and goes on from an older step."""
    saved(tmp_path, 1, 2, 9, 12)
    save(make_saver(tmp_path, retention=Retention(last=1)), 5)
    assert steps(tmp_path) == [12, 9, 5]


def test_damaged_steps_stay(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000001/manifest.json").write_text("{}")
    (tmp_path / "step-00000002.damaged-20250101T000000Z").mkdir()
    save(make_saver(tmp_path, retention=Retention(last=1)), 3)
    assert folders(tmp_path) == [
        "step-00000001", "step-00000002.damaged-20250101T000000Z", "step-00000003",
    ]  # fmt: skip


def test_a_kill_in_the_middle_leaves_nothing_that_looks_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1, 2)

    def killed(folder: Path) -> None:
        (folder / "data.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_expired(tmp_path, Retention(last=1), 2, {}, print)
    assert [one.iteration for one in committed(tmp_path)] == [2] == steps(tmp_path)
    assert folders(tmp_path) == ["step-00000001.removing", "step-00000002"]
    make_saver(tmp_path)  # the next start
    assert folders(tmp_path) == ["step-00000002"]


def test_what_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 1)
    rename, warnings = os.rename, list[str]()

    def refused(source: Path, target: Path) -> None:
        if str(target).endswith(".removing"):
            raise PermissionError("read-only")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refused)
    done = save(make_saver(tmp_path, retention=Retention(last=1), warn=warnings.append), 2)
    assert done.path is not None
    assert warnings == ["checkpoint step-00000001 is not removed: read-only"]
    assert steps(tmp_path) == [2, 1]
