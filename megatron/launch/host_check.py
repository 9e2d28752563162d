"""Whether the hosts of a list that a user wrote exist, each under one name."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from megatron.config.errors import ConfigError
from megatron.launch.site import Job

TIMEOUT_S = 10.0
THREADS = 32
SCHEDULERS = ("PBS_NODEFILE", "PBS_JOBID")  # they know their hosts

LookUp = Callable[[str], str]
"""Name of a host -> its address; OSError where it has none."""


def require_hosts(job: Job, look_up: LookUp = socket.gethostbyname) -> None:
    """Refuse a host file that names a host that nobody knows, or one host by two names.

    Hosts that are not found within seconds are left to the launcher.

    Args:
        job: whose hosts are to be used.
        look_up: asks the name service.

    Raises:
        ConfigError: naming the file and the hosts.
    """
    if job.hostfile is None or job.source in SCHEDULERS or len(job.hosts) < 2:
        return
    name = f"{job.source}={job.hostfile}"
    names: dict[str, str] = {}
    for host, address in _addresses(job.hosts, look_up):
        if isinstance(address, OSError):
            raise ConfigError(
                f"{name} names {host}, which no name service knows ({address.strerror}): "
                f"correct the file"
            )
        first = names.setdefault("this host" if address.startswith("127.") else address, host)
        if first != host:
            raise ConfigError(
                f"{name} names {first} and {host}, which are one host ({address}): name it once"
            )


def _addresses(hosts: Sequence[str], look_up: LookUp) -> list[tuple[str, str | OSError]]:
    """Each host with its address or what went wrong, as far as they were found in time."""
    pool = ThreadPoolExecutor(min(THREADS, len(hosts)))
    asked = {pool.submit(look_up, host): host for host in hosts}
    done = wait(asked, TIMEOUT_S).done
    pool.shutdown(wait=False, cancel_futures=True)
    found: list[tuple[str, str | OSError]] = []
    for future, host in asked.items():
        if future in done:
            error = future.exception()
            if error is not None and not isinstance(error, OSError):
                raise error
            found.append((host, future.result() if error is None else error))
    return found
