"""Ports for rank 0 to listen on."""

from __future__ import annotations

import random
import socket
import zlib

PORTS = range(20000, 30000)  # below those that operating systems hand out to outgoing connections


def port_of(key: str) -> int:
    """A port made from `key`: the same on every host, without asking."""
    return PORTS[zlib.crc32(key.encode()) % len(PORTS)]


def free_port() -> int:
    """A port of this host on which nothing listens at the moment."""
    for port in random.SystemRandom().sample(PORTS, k=100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"100 ports between {PORTS[0]} and {PORTS[-1]} were tried and all are in use")
