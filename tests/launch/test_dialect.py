"""Which MPI is installed is asked, not assumed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron.launch import dialect
from megatron.launch.dialect import asker


def command(folder: Path, text: str, name: str = "mpiexec") -> dict[str, str]:
    """An environment whose PATH has a script with this body."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho asked >>{folder}/asked\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("HYDRA build details:\n    Version:      4.0.2", "Hydra"),
        ("mpiexec (OpenRTE) 4.1.4", "Open MPI"),
        ("mpirun (Open MPI) 5.0.3", "Open MPI"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.12 (based on HYDRA)", "Intel MPI"),
        ("mpiexec version 1.4.0 of PALS", "PALS"),
        ("mpiexec 0.0.0 of nobody", None),
    ],
)
def test_what_it_says(tmp_path: Path, said: str, found: str | None) -> None:
    assert asker(command(tmp_path, f"cat <<'END'\n{said}\nEND"))("mpiexec") == found


def test_pals_is_known_by_its_options(tmp_path: Path) -> None:
    body = 'if [ "$1" = --help ]; then echo "  -b, --line-buffer  lines"; else echo 1.4.0; fi'
    assert asker(command(tmp_path, body))("mpiexec") == "PALS"


def test_it_is_asked_once(tmp_path: Path) -> None:
    ask = asker(command(tmp_path, "echo HYDRA"))
    assert [ask("mpiexec"), ask("mpiexec")] == ["Hydra", "Hydra"]
    assert (tmp_path / "asked").read_text().splitlines() == ["asked"]


def test_one_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "TIMEOUT_S", 0.2)
    assert asker(command(tmp_path, "exec sleep 20"))("mpiexec") is None
    assert asker({})("mpiexec") is None
    assert asker({"PATH": str(tmp_path)})("mpirun") is None


@pytest.mark.parametrize(
    ("name", "found"), [("mpiexec.hydra", "Hydra"), ("mpirun.openmpi", "Open MPI")]
)
def test_the_real_ones(name: str, found: str) -> None:
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    assert asker(os.environ)(name) == found
