"""A run whose checkpoints are damaged: it goes back to a sound one, or does not start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.store import committed, damage, step_folder
from megatron.config.errors import MissingCheckpoint
from tests.checkpoint.made import FILE, folders
from tests.checkpoint.test_store import empty, flip
from tests.training.test_trainer import Adder, config, trained


@pytest.mark.parametrize("name", [FILE, MANIFEST, "data.json", "pieces.json"])
@pytest.mark.parametrize("harm", [flip, empty, Path.unlink])
def test_the_damaged_last_step_is_trained_and_saved_again(
    harm: Callable[[Path], Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = config(tmp_path, 6, save=2)
    trained(run, Adder())
    harm(step_folder(run.checkpoint_folder, 6) / name)
    again = Adder()
    with caplog.at_level(logging.ERROR):
        outcome, _ = trained(run, again)
    assert outcome.state.iteration == 6 and again.trained == [*range(16, 24)]
    assert name in caplog.text and "is set aside as step-00000006.damaged-" in caplog.text
    newest = committed(run.checkpoint_folder)[0]
    assert newest.iteration == 6 and damage(newest) == []
    assert sum("damaged" in folder for folder in folders(run.checkpoint_folder)) == 1
    assert again.total == sum(range(24))


@pytest.mark.parametrize("name", [FILE, MANIFEST])
def test_all_damaged_never_means_new_weights(name: str, tmp_path: Path) -> None:
    run = config(tmp_path, 6, save=2)
    trained(run, Adder())
    for step in (2, 4, 6):
        empty(step_folder(run.checkpoint_folder, step) / name)
    before = folders(run.checkpoint_folder)
    again = Adder()
    with pytest.raises(MissingCheckpoint, match=r"every checkpoint in .* is damaged"):
        trained(run, again)
    assert again.trained == [] and folders(run.checkpoint_folder) == before
