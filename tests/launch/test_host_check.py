"""Host files that do not say the truth."""

from __future__ import annotations

import socket
import threading

import pytest

from megatron.config.errors import ConfigError
from megatron.launch import host_check
from megatron.launch.host_check import require_hosts
from megatron.launch.site import Job

NAMES = {"n1": "10.0.0.1", "n1.org": "10.0.0.1", "n2": "10.0.0.2", "own": "127.0.1.1"}


def look_up(host: str) -> str:
    if host not in NAMES | {"localhost": ""}:
        raise socket.gaierror(-2, "Name or service not known")
    return NAMES.get(host, "127.0.0.1")


def job(*hosts: str, source: str = "HOSTFILE") -> Job:
    return Job("none", "", hosts, "hosts.txt", source)


def test_hosts_that_exist() -> None:
    require_hosts(job("n1", "n2", "own"), look_up)
    require_hosts(job("n9"), look_up)  # one host is this one
    require_hosts(job("n1", "n9", source="PBS_NODEFILE"), look_up)


def test_a_host_that_does_not_exist_is_named() -> None:
    with pytest.raises(ConfigError, match=r"HOSTFILE=hosts.txt names n9, .*not known"):
        require_hosts(job("n1", "n9"), look_up)


@pytest.mark.parametrize("twice", [("n1", "n1.org"), ("localhost", "own")])
def test_one_host_by_two_names_is_named(twice: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"names {twice[0]} and {twice[1]}, which are one host"):
        require_hosts(job("n2", *twice), look_up)


def test_a_slow_name_service_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_check, "TIMEOUT_S", 0.1)
    release = threading.Event()

    def slow(host: str) -> str:
        release.wait(20)
        return look_up(host)

    try:
        require_hosts(job("n1", "n9"), slow)
    finally:
        release.set()
