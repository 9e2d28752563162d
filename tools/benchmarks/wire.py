"""Two hosts joined by one slow cable: network namespaces of this machine; needs root.

The cable is two TAP devices and a process that carries frames between them: each frame waits for
those before it, at the cable's bytes a second, and arrives a latency later. (The kernel's netem does
the same where there is one; its tbf shapes without a latency.) The kernel hands over whole segments
of up to 64 KiB, so 1 Gbit/s is 2,000 frames a second. Everything ends with this process.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import math
import os
import select
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CARD = "eth0"
GBIT = 125e6  # bytes a second of 1 Gbit/s
_LARGEST = 65536 + 4096  # bytes of a frame and its virtio header
_SET_INTERFACE, _SET_OFFLOAD = 0x400454CA, 0x400454D0  # ioctls of Linux' TUN driver
_TAP_WITH_HEADER = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_CHECKSUM_AND_TCP_SEGMENTS = 0x01 | 0x02  # TUN_F_CSUM, TUN_F_TSO4
_QUEUE = 4000  # frames that a card holds back: the sender's sockets fill before any is lost


@dataclass(frozen=True)
class Cable:
    """Hosts at the ends of a cable.

    Attributes:
        hosts: process ids of what keeps their networks.
        carrier: process id of the cable.
        addresses: of their cards.
    """

    hosts: tuple[int, int]
    carrier: int
    addresses: tuple[str, str] = ("10.78.0.1", "10.78.0.2")

    def enter(self, host: int) -> None:
        """Moves this thread, and those it starts, into a host's network."""
        _enter(f"/proc/{self.hosts[host]}/ns/net")

    def shape(self, shaped: bool) -> None:
        """From here on the cable is as slow as asked for, or as fast as the machine carries it."""
        os.kill(self.carrier, signal.SIGUSR1 if shaped else signal.SIGUSR2)


def possible() -> bool:
    """Whether this process may make hosts and cables."""
    return os.geteuid() == 0 and os.access("/dev/net/tun", os.W_OK)


@contextlib.contextmanager
def cable(bytes_per_s: float, latency_s: float) -> Iterator[Cable]:
    """Two hosts, for as long as the block lasts.

    Args:
        bytes_per_s: each way; infinity for as fast as the machine.
        latency_s: one way, on top of the machine's own.
    """
    with contextlib.ExitStack() as stack:
        hosts = (stack.enter_context(_host()), stack.enter_context(_host()))
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os.setsid()  # Ctrl-C is for the parent to handle
                _carry(Cable(hosts, 0), bytes_per_s, latency_s)
            os._exit(1)
        made = Cable(hosts, pid)
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, 9)
        for host in (0, 1):
            _await_card(made, host)
        yield made


def sent(cards: tuple[str, ...] = (CARD,)) -> int:
    """Bytes that this process' host has sent over some cards."""
    total = 0
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]:
        name, numbers = line.split(":")
        total += int(numbers.split()[8]) * (name.strip() in cards)
    return total


@contextlib.contextmanager
def _host() -> Iterator[int]:
    words = ["unshare", "--net", "cat"]  # ends when the pipe does: with this process
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as anchor:
        until = time.monotonic() + 10
        while Path(f"/proc/{anchor.pid}/comm").read_text(encoding="ascii").strip() != "cat":
            if anchor.poll() is not None or time.monotonic() > until:
                raise OSError("no network namespace can be made")
            time.sleep(0.01)
        try:
            yield anchor.pid
        finally:
            anchor.kill()


def _carry(made: Cable, bytes_per_s: float, latency_s: float) -> None:
    """Is the cable, for ever."""
    shape = [(bytes_per_s, latency_s)]
    signal.signal(signal.SIGUSR1, lambda *_: shape.append((bytes_per_s, latency_s)))
    signal.signal(signal.SIGUSR2, lambda *_: shape.append((math.inf, 0.0)))
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    ends = [_card(made, host) for host in (0, 1)]
    with contextlib.suppress(OSError):  # a late cable is a slow one
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    waiting: tuple[collections.deque[tuple[float, bytes]], ...]
    waiting = (collections.deque(), collections.deque())
    free = [0.0, 0.0]  # when the last frame of each way has left its card
    while True:
        due = min((queue[0][0] for queue in waiting if queue), default=None)
        wait = None if due is None else max(0.0, due - time.monotonic())
        # A full card blocks its senders, as a full socket does.
        listening = [end for end, queue in zip(ends, waiting, strict=True) if len(queue) < 64]
        for end in select.select(listening, [], [], wait)[0]:
            way = ends.index(end)
            frame = os.read(end, _LARGEST)
            rate, latency = shape[-1]
            free[way] = max(time.monotonic(), free[way]) + len(frame) / rate
            waiting[way].append((free[way] + latency, frame))
        now = time.monotonic()
        for way, queue in enumerate(waiting):
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # lost, as on a cable
                    os.write(ends[1 - way], queue.popleft()[1])


def _card(made: Cable, host: int) -> int:
    """A host's network card, and the cable's end in it."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    made.enter(host)
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _SET_INTERFACE, struct.pack("16sH22x", CARD.encode(), _TAP_WITH_HEADER))
    fcntl.ioctl(end, _SET_OFFLOAD, _CHECKSUM_AND_TCP_SEGMENTS)
    for words in (
        f"link set {CARD} mtu 9000 txqueuelen {_QUEUE}",
        f"addr add {made.addresses[host]}/24 dev {CARD}",
        "link set lo up",
        f"link set {CARD} up",
    ):
        subprocess.run(["ip", *words.split()], check=True, timeout=10)
    _enter(f"/proc/self/fd/{home}")
    os.close(home)
    return end


def _await_card(made: Cable, host: int) -> None:
    until = time.monotonic() + 10
    words = ["nsenter", "-t", str(made.hosts[host]), "-n", "ip", "-br", "addr", "show", "up"]
    while made.addresses[host] not in subprocess.check_output(words, text=True, timeout=10):
        if time.monotonic() > until:
            raise OSError("no cable can be made: is there /dev/net/tun?")
        time.sleep(0.02)


def _enter(path: str) -> None:
    namespace = os.open(path, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
            raise OSError(ctypes.get_errno(), f"setns {path}")
    finally:
        os.close(namespace)
