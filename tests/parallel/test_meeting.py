"""Ranks meet, or it is said who is missing."""

from __future__ import annotations

import os
import socket
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from megatron.config.errors import ConfigError
from megatron.launch.ranks import free_port
from megatron.parallel import meeting
from megatron.parallel.meeting import MeetingError, interface_of, local_address, meet


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setattr(meeting, "ATTEMPT_S", 0.2)


def meeting_of(
    ranks: dict[int, str], world_size: int, timeout_s: float, port: int | None = None
) -> list[Future[Any]]:
    """What `meet` gives or raises on some ranks, each with the name of its run."""
    address = f"tcp://127.0.0.1:{port or free_port()}"
    with ThreadPoolExecutor(len(ranks)) as pool:
        return [
            pool.submit(meet, address, rank, world_size, timeout_s, name)
            for rank, name in ranks.items()
        ]


def test_all_have_one_store() -> None:
    stores = [found.result() for found in meeting_of(dict.fromkeys(range(4), "run"), 4, 20)]
    stores[3].set("key", "value")
    assert all(store.get("key") == b"value" for store in stores)


def test_who_does_not_come_is_named() -> None:
    for found in meeting_of({0: "run", 2: "run"}, 4, 1.0):
        with pytest.raises(MeetingError, match=r"2 of 4 ranks \(1, 3\).* came are on ") as error:
            found.result()
        assert socket.gethostname() in str(error.value)
        assert "DISTRIBUTED_TIMEOUT_MINUTES" in str(error.value)


def test_nobody_waits_for_a_rank_0_that_does_not_come() -> None:
    (found,) = meeting_of({1: "run"}, 2, 0.5)
    with pytest.raises(MeetingError, match=r"rank 0 was not reached .* MASTER_ADDR"):
        found.result()


def test_the_ranks_of_another_run_do_not_count() -> None:
    zero, stranger = meeting_of({0: "run", 1: "another"}, 2, 1.0)
    with pytest.raises(MeetingError, match=r"1 of 2 ranks \(1\)"):
        zero.result()
    with pytest.raises(MeetingError):
        stranger.result()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (found,) = meeting_of({0: "run"}, 2, 5.0, port)
        with pytest.raises(ConfigError, match=f"port {port} .*MASTER_PORT"):
            found.result()


def test_the_interface_is_the_one_of_an_address() -> None:
    assert local_address("127.0.0.1") == "127.0.0.1"
    assert local_address("no-such-host.invalid") == ""
    assert interface_of("127.0.0.1") in ("lo", "")
    assert interface_of("192.0.2.77") == ""


def test_gloo_is_told_it_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for own, told in (("eth7", "eth7"), (None, interface_of("127.0.0.1"))):
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
        if own:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", own)
        for found in meeting_of(dict.fromkeys(range(2), "run"), 2, 20):
            found.result()
        assert os.environ.get("GLOO_SOCKET_IFNAME", "") == told


def test_a_host_whose_own_name_is_loopback_looks_at_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 0's host sees itself as 127.0.1.1; the last rank tells the way to the other hosts."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    addresses = {"n1": "127.0.0.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(meeting, "local_address", addresses.__getitem__)
    monkeypatch.setattr(meeting, "interface_of", {"10.0.0.1": "eth0", "127.0.0.1": "lo"}.get)
    monkeypatch.setattr(
        meeting, "_arrival", lambda store, rank: ("n2", "10.0.0.2") if rank else ("n1", "127.0.0.1")
    )
    monkeypatch.setattr("socket.gethostname", lambda: "n1")
    meeting._choose_interface(None, "n1", 0, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
