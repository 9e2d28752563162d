"""Two hosts joined by one slow cable: network namespaces of this machine; needs root.

The cable is two TAP devices and a process that carries frames between them: each frame waits for
those before it, at the cable's bytes a second, and arrives a latency later. (netem would do the
same, where the kernel has it.) The kernel hands over whole segments of up to 64 KiB, so 1 Gbit/s is
2,000 frames a second. Everything ends with this process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import fcntl
import math
import os
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.plan.link import Link

CARD = "eth0"
GIGABIT = Link(125e6, 100e-6)
_LARGEST = 65536 + 4096  # bytes of a frame and its virtio header
_SET_INTERFACE, _SET_OFFLOAD = 0x400454CA, 0x400454D0  # ioctls of Linux' TUN driver
_TAP_WITH_HEADER = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
_CHECKSUM_AND_TCP_SEGMENTS = 0x01 | 0x02  # TUN_F_CSUM, TUN_F_TSO4
_QUEUE = 4000  # frames that a card holds back: the sender's sockets fill before any is lost
_WAITING = 64  # frames that the cable takes from a card before their time
_PORT = 29400


@dataclass(frozen=True)
class Cable:
    """Hosts at the ends of a cable.

    Attributes:
        hosts: process ids of what keeps their networks; none: this machine's own loopback.
        carrier: process id of the cable.
        addresses: of the hosts.
        card: that the hosts talk over.
    """

    hosts: tuple[int, ...]
    carrier: int = 0
    addresses: tuple[str, ...] = ("10.78.0.1", "10.78.0.2")
    card: str = CARD

    def enter(self, rank: int, ranks: int) -> bool:
        """Moves this thread, and those it starts, into the network of a rank's host.

        Returns:
            Whether the rank is the first there.
        """
        each = ranks // max(1, len(self.hosts))
        if self.hosts:
            _enter(f"/proc/{self.hosts[rank // each]}/ns/net")
        return rank % each == 0

    def shape(self, shaped: bool) -> None:
        """From here on the cable is as slow as asked for, or as fast as the machine carries it."""
        if self.carrier:
            os.kill(self.carrier, signal.SIGUSR1 if shaped else signal.SIGUSR2)


LOOPBACK = Cable((), addresses=("127.0.0.1",), card="lo")
"""For who may not make a cable: as fast as the machine, and other programs' bytes count."""


def problem() -> str:
    """Why this process can make no hosts and cables; empty where it can."""
    if os.geteuid() != 0:
        return "a cable needs root"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not installed (iproute2, util-linux)"
    return "" if os.access("/dev/net/tun", os.W_OK) else "this kernel has no /dev/net/tun"


@contextlib.contextmanager
def cable(link: Link) -> Iterator[Cable]:
    """Two hosts, for as long as the block lasts; the latency comes on top of the machine's own."""
    with contextlib.ExitStack() as stack:
        hosts = (stack.enter_context(_host()), stack.enter_context(_host()))
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                os.setsid()  # Ctrl-C is for the parent to handle
                _carry(Cable(hosts), link)
            os._exit(1)
        made = Cable(hosts, pid)
        stack.callback(os.waitpid, pid, 0)
        stack.callback(os.kill, pid, 9)
        for host in (0, 1):
            _await_card(made, host)
        yield made


def sent() -> int:
    """Bytes that this process' host has sent, to itself included."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def tried(made: Cable, size: int = 25_000_000, trips: int = 200) -> Link:
    """What a socket gets of the cable: bytes a second, and half of a round trip."""
    listener = os.fork()
    if not listener:
        with contextlib.suppress(BaseException):
            made.enter(1, 2)
            with socket.create_server((made.addresses[1], _PORT)) as server:
                other = server.accept()[0]
                other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(trips):
                    other.send(other.recv(1))
                left = size
                while left:
                    left -= len(other.recv(min(left, 1 << 20)))
                other.send(b"!")
        os._exit(0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # this thread stays where it is
        found = pool.submit(_asks, made, size, trips).result()
    os.waitpid(listener, 0)
    return found


def _asks(made: Cable, size: int, trips: int) -> Link:
    made.enter(0, 2)
    until = time.monotonic() + 10
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            other = socket.create_connection((made.addresses[1], _PORT), timeout=10)
            break
        if time.monotonic() > until:
            raise OSError("nobody answers on the cable")
        time.sleep(0.02)
    with other:
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        for _ in range(trips):
            began = time.perf_counter()
            other.send(b"?")
            other.recv(1)
            times.append(time.perf_counter() - began)
        began = time.perf_counter()
        other.sendall(bytes(size))
        other.recv(1)
        return Link(size / (time.perf_counter() - began), statistics.median(times) / 2)


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


def _carry(made: Cable, asked: Link) -> None:
    """Is the cable, for ever."""
    now_is = [asked]
    signal.signal(signal.SIGUSR1, lambda *_: now_is.append(asked))
    signal.signal(signal.SIGUSR2, lambda *_: now_is.append(Link(math.inf, 0.0)))
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
        listening = [end for end, queue in zip(ends, waiting, strict=True) if len(queue) < _WAITING]
        for end in select.select(listening, [], [], wait)[0]:
            way = ends.index(end)
            frame = os.read(end, _LARGEST)
            link = now_is[-1]
            free[way] = max(time.monotonic(), free[way]) + len(frame) / link.bytes_per_s
            waiting[way].append((free[way] + link.latency_s, frame))
        now = time.monotonic()
        for way, queue in enumerate(waiting):
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # lost, as on a cable
                    os.write(ends[1 - way], queue.popleft()[1])


def _card(made: Cable, host: int) -> int:
    """A host's network card, and the cable's end in it."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    made.enter(host, 2)
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
