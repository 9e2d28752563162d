"""A host without a compiler runs eager: found before the model is compiled, agreed, and said."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from megatron.parallel.control import ALONE, make_control
from megatron.training import log as run_log
from megatron.training.compiler import compiles, problem
from tests.equivalence.front import run_config
from tests.spawn import run

LOGGER = "megatron.training.compiler"


def program(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_host_with_a_compiler_can() -> None:
    import os

    assert problem("cpu", os.environ) == ""


def test_no_compiler_is_named_with_its_variable(tmp_path: Path) -> None:
    found = problem("cpu", {"PATH": str(tmp_path)})
    assert "has no compiler (g++ or clang++; CXX names another)" in found
    assert "no-such" in problem("cpu", {"PATH": str(tmp_path), "CXX": "no-such -O2"})


def test_a_compiler_without_pythons_headers_is_not_enough(tmp_path: Path) -> None:
    broken = program(tmp_path, "g++", "echo 'fatal error: Python.h: no such file' >&2; exit 1")
    found = problem("cpu", {"CXX": broken})
    assert "compiles no extension of Python: fatal error: Python.h" in found


def test_an_accelerator_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for kind in ("cuda", "xpu"):
        assert problem(kind, {}).endswith("has no package triton")


@pytest.mark.parametrize(
    ("variables", "kind", "expected"),
    [
        ({}, "cpu", False),  # auto
        ({"COMPILE": "0"}, "cpu", False),
        ({"COMPILE": "1"}, "cpu", True),
        ({"COMPILE": "1", "ZERO_STAGE": "3"}, "cpu", False),
    ],
)
def test_what_is_asked_for_is_done(variables: dict[str, str], kind: str, expected: bool) -> None:
    import os

    assert compiles(run_config(variables), kind, os.environ, ALONE) == expected


def test_eager_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger(run_log.ROOT).propagate = True
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not compiles(run_config({"COMPILE": "1"}), "cpu", {"PATH": str(tmp_path)}, ALONE)
        assert not compiles(run_config({}), "cpu", {"PATH": str(tmp_path)}, ALONE)
    (record,) = caplog.records
    assert record.getMessage().startswith("COMPILE=1: blocks run eager: ")


def one_host_lacks_it(folder: str) -> bool:
    import os

    control = make_control()
    environ = {"PATH": folder} if control.rank == 1 else os.environ
    return compiles(run_config({"COMPILE": "1"}), "cpu", environ, control)


def test_one_host_without_a_compiler_decides_for_all(tmp_path: Path) -> None:
    assert run(one_host_lacks_it, 2, str(tmp_path)) == [False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_host_compiles_a_block_with_triton() -> None:
    import os

    from megatron.model.norm import RMSNorm

    assert problem("cuda", os.environ) == ""
    norm = RMSNorm(64, 1e-5).cuda()
    x = torch.randn(4, 64, device="cuda")
    torch.testing.assert_close(torch.compile(norm)(x), norm(x))
