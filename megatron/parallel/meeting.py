"""How the ranks of a run find each other: through a store on rank 0's host.

The ranks that do not come are named, and gloo is told the interface that leads to the others.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from megatron.config.errors import ConfigError

log = logging.getLogger(__name__)

ATTEMPT_S = 2.0  # a call into torch hears no signal: none takes longer
FIRST_WARNING_S = 60.0
POLL_S = 0.02
SHOWN = 8
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915  # Linux: address of an interface


class MeetingError(RuntimeError):
    """Ranks did not come in time."""

    exit_status = 1


def meet(init_method: str, rank: int, world_size: int, timeout_s: float, name: str) -> Store:
    """The store of the run's ranks, once all have come to it; a collective.

    Args:
        init_method: `tcp://host:port`, the same on all ranks.
        rank: this process, 0 .. world_size - 1.
        world_size: total number of processes.
        timeout_s: seconds that ranks wait for each other.
        name: of the run, the same on all its ranks: another run's ranks are not mistaken for them.

    Raises:
        ConfigError: the port is in use, or the address is not of rank 0's host.
        MeetingError: not all ranks have come in time.
    """
    host, _, port = init_method.removeprefix("tcp://").rpartition(":")
    until = time.monotonic() + timeout_s
    # torchrun's own process may keep the store, which outlives its restarts of the ranks.
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not agent:
        tcp = _serve(host, int(port))
    else:
        tcp = _connect(host, int(port), until, timeout_s)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent else "0"
    store = PrefixStore(f"{name} {world_size} {attempt}", tcp)
    try:
        store.set(f"came/{rank}", f"{socket.gethostname()} {local_address(host)}")
        store.add("count", 1)
        if rank == 0:
            _wait_for_all(store, world_size, until, timeout_s)
        else:
            _wait_for_rank_0(store, until + 10 * ATTEMPT_S)
        _choose_interface(store, host, rank, world_size)
    except dist.DistError as error:
        raise MeetingError(
            f"rank 0 at {host}:{port} has gone while the ranks met ({_line(error)})"
        ) from None
    tcp.set_timeout(timedelta(seconds=timeout_s))
    return store


def _serve(host: str, port: int) -> TCPStore:
    """The store, on this host."""
    timeout = timedelta(seconds=10 * ATTEMPT_S)
    try:
        return TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False)
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {port} of this host, at which the ranks are to meet, is in use by another "
                f"program or run: set MASTER_PORT to a free one, the same on all ranks"
            ) from None
        raise ConfigError(
            f"rank 0 runs on {socket.gethostname()}, which it does not reach as {host}:{port} "
            f"({_line(error)}): set MASTER_ADDR to the name of rank 0's host"
        ) from None


def _connect(host: str, port: int, until: float, timeout_s: float) -> TCPStore:
    """The store, on rank 0's host."""
    timeout = timedelta(seconds=ATTEMPT_S)
    warn_at = time.monotonic() + FIRST_WARNING_S
    while True:
        try:
            return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except dist.DistError as error:
            now = time.monotonic()
            if now >= until:
                raise MeetingError(
                    f"rank 0 was not reached at {host}:{port} in {timeout_s:g} s "
                    f"({_line(error)}): does it run, is MASTER_ADDR its host, can hosts connect?"
                ) from None
            if now >= warn_at:
                log.warning(f"still waiting for rank 0 at {host}:{port}")
                warn_at = now + FIRST_WARNING_S
            time.sleep(POLL_S)


def _wait_for_all(store: Store, world_size: int, until: float, timeout_s: float) -> None:
    warn_at = time.monotonic() + FIRST_WARNING_S
    while store.add("count", 0) < world_size:
        now = time.monotonic()
        if now >= warn_at or now >= until:
            missing = _missing(store, world_size)
            if now >= until:
                text = f"{missing} did not come in {timeout_s:g} s"
                store.set("go", text)
                raise MeetingError(f"{text} (DISTRIBUTED_TIMEOUT_MINUTES)")
            log.warning(f"still waiting for {missing}")
            warn_at = now + FIRST_WARNING_S
        time.sleep(POLL_S)
    store.set("go", "")


def _wait_for_rank_0(store: Store, until: float) -> None:
    while True:
        try:
            store.wait(["go"], timedelta(seconds=ATTEMPT_S))
            break
        except dist.DistStoreError:
            if time.monotonic() >= until:
                raise
    text = store.get("go").decode()
    if text:
        raise MeetingError(f"{text} (DISTRIBUTED_TIMEOUT_MINUTES)")


def _missing(store: Store, world_size: int) -> str:
    """Which ranks have not come, and where those are that have."""
    came = [rank for rank in range(world_size) if store.check([f"came/{rank}"])]
    missing = sorted(set(range(world_size)) - set(came))
    hosts = list(dict.fromkeys(_arrival(store, rank)[0] for rank in came))
    return (
        f"{len(missing)} of {world_size} ranks ({_some(missing)}); "
        f"those that came are on {_some(hosts)}"
    )


def _some(things: list[int] | list[str]) -> str:
    more = f" and {len(things) - SHOWN} more" if len(things) > SHOWN else ""
    return ", ".join(str(thing) for thing in things[:SHOWN]) + more


def _arrival(store: Store, rank: int) -> tuple[str, str]:
    """Host and address of a rank, as it has said."""
    host, _, address = store.get(f"came/{rank}").decode().partition(" ")
    return host, address


def _line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _choose_interface(store: Store, host: str, rank: int, world_size: int) -> None:
    """Tell gloo the interface that leads to the other ranks, unless the user has.

    It would take the one of this host's name, which a hosts file often gives to loopback.
    """
    if GLOO_INTERFACE in os.environ:
        return
    own = local_address(host)
    if own.startswith("127."):  # this is rank 0's host: where do the ranks of others sit?
        here = socket.gethostname()
        others = (_arrival(store, other) for other in reversed(range(world_size)))
        address = next((a for name, a in others if name != here and a), "")
        own = local_address(address) if address else own
    interface = interface_of(own)
    if interface:
        os.environ[GLOO_INTERFACE] = interface


def local_address(host: str) -> str:
    """The IPv4 address of this host that leads to `host`; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return ""
        address: str = probe.getsockname()[0]
        return address


def interface_of(address: str) -> str:
    """The interface that has an IPv4 address; empty where none has, and elsewhere than on Linux."""
    if not address or not sys.platform.startswith("linux"):
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address or (
                name == "lo" and address.startswith("127.")
            ):
                return name
    return ""
