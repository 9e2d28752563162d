"""Data and finished runs that many cases start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import harness

Finished = Callable[..., Path]
"""Layout and further variables -> the folder of a run that was never disturbed."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A list of small files."""
    return str(harness.write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Makes each run once; who changes it must copy it."""
    made: dict[tuple[str, ...], Path] = {}

    def run(layout: str, **variables: str) -> Path:
        key = (layout, *(f"{name}={value}" for name, value in sorted(variables.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("finished") / layout
            settings = {"DATA_FILE_LIST": data, **harness.LAYOUTS[layout], **variables}
            ended = harness.train(folder, **settings)
            assert ended.status == 0, ended.output
            made[key] = folder
        return made[key]

    return run
