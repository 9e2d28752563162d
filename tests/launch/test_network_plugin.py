"""NCCL's plugin on Polaris: only where the user asks for it, and what is unset stays unset."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNSET = "unset NCCL_COLLNET_ENABLE NCCL_CROSS_NIC NCCL_NET NCCL_NET_GDR_LEVEL; "


def after(plugin: Path, commands: str, environ: dict[str, str]) -> dict[str, str]:
    """Variables of NCCL and the libraries after the function, in a strict shell."""
    script = f"set -euo pipefail; source ALCF/helpers.sh; {commands} aws_plugin {plugin}; env"
    ended = subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.partition("=") for line in ended.stdout.splitlines())
    return {name: text for name, _, text in lines if name.startswith(("NCCL_", "LD_LIBRARY"))}


@pytest.mark.parametrize("commands", ["", UNSET])
@pytest.mark.parametrize("environ", [{}, {"NCCL_NET": ""}, {"NCCL_CROSS_NIC": "0"}])
def test_nothing_is_set_that_was_not_asked_for(
    tmp_path: Path, commands: str, environ: dict[str, str]
) -> None:
    kept = {} if commands else environ
    assert after(tmp_path, commands, environ) == kept


def test_the_plugin_is_used_where_it_is_asked_for(tmp_path: Path) -> None:
    asked = {"NCCL_NET": "AWS Libfabric", "NCCL_CROSS_NIC": "0"}
    found = after(tmp_path, "", asked)
    assert found.pop("LD_LIBRARY_PATH").startswith(f"{tmp_path}:")
    assert found == asked | {"NCCL_COLLNET_ENABLE": "1", "NCCL_NET_GDR_LEVEL": "PHB"}
    assert after(tmp_path / "absent", "", asked) == asked
