"""A rank's heartbeat: its phase, step and progress, once a second, to the launcher that watches.

A thread sends it, so it also comes while the main thread waits in a collective. The launcher may
answer with a request for the stacks of all threads, which are written to a file.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron.launch.whereabouts import flight_recorder, whereabouts

HEARTBEAT = "MEGATRON_HEARTBEAT"
"""Variable with the launcher's address, HOST:PORT:TOKEN; empty or unset: nobody listens."""

INTERVAL_S = 1.0
LOOKUP_S = 30.0  # between two attempts to find the launcher's host
LARGEST = 1 << 16


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        rank, host, pid: who it is.
        number: counts the beats of this process; they may arrive in another order.
        phase: what it does, such as "step" or "save"; step: in which step, None: in none.
        ticks: how often it has made progress.
        closed: it ends as it should.
        doing: the collective or the line that its main thread is in; empty: not asked.
        stacks: file with the stacks of its threads, or why there is none; empty: not written.
        total: ticks of the whole phase; 0: not known.
    """

    rank: int
    host: str
    pid: int
    number: int
    phase: str
    step: int | None
    ticks: int
    closed: bool = False
    doing: str = ""
    stacks: str = ""
    total: int = 0

    def encode(self, token: str) -> bytes:
        """As a datagram."""
        return json.dumps({"token": token, **asdict(self)}).encode()

    @classmethod
    def decode(cls, data: bytes, token: str) -> Beat | None:
        """From a datagram; None where it is not ours."""
        try:
            values = json.loads(data)
            if values.pop("token") != token:
                return None
            beat = cls(**values)
            return beat if isinstance(beat.rank, int) and isinstance(beat.number, int) else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Heartbeat:
    """Tells the launcher where this rank is; without a launcher that listens it does nothing.

    Args:
        address: value of the variable HEARTBEAT.
        rank: of this process.
    """

    def __init__(self, address: str = "", rank: int = 0) -> None:
        self._rank, self._number = rank, 0
        self._place: tuple[str, int | None] = ("start", None)
        self._ticks = self._total = 0
        self._over = threading.Event()
        self._launcher: tuple[str, int] | None = None
        self._thread: threading.Thread | None = None
        if address:
            self._host, port, self._token = address.rsplit(":", 2)
            self._port = int(port)
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def enter(self, phase: str, step: int | None = None, total: int = 0) -> None:
        """The rank begins something that can hang, of `total` ticks (0: not known)."""
        changed = phase != self._place[0]
        self._place, self._total = (phase, step), total
        if changed and self._thread is not None:  # it may hang before the next beat is due
            self._send()

    def tick(self) -> None:
        """The phase has made progress: a micro-batch, a batch of an evaluation, a file."""
        self._ticks += 1

    def close(self) -> None:
        """The rank ends as it should: silence from here on is no hang."""
        if self._thread is not None and not self._over.is_set():
            self._over.set()
            for _ in range(3):  # nothing follows that would make up for a lost one
                self._send()

    def _run(self) -> None:
        """Send once a second, and answer requests, until closed."""
        due = time.monotonic()
        while not self._over.is_set():
            if self._launcher is None:
                self._launcher = self._look_up()
                if self._launcher is None:
                    self._over.wait(LOOKUP_S)
                    continue
            now = time.monotonic()
            if now >= due:
                due = now + INTERVAL_S
                self._send()
            self._socket.settimeout(max(0.01, due - now))
            try:
                data, _ = self._socket.recvfrom(LARGEST)
            except TimeoutError:
                continue
            except OSError:  # the network is down, or the launcher is gone
                self._over.wait(INTERVAL_S)
                continue
            self._answer(data)

    def _look_up(self) -> tuple[str, int] | None:
        """The launcher's address as a number: a name server is not asked each second."""
        try:
            found = socket.getaddrinfo(self._host, self._port, socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:
            return None
        host, port = found[0][4][:2]
        return str(host), int(port)

    def _send(self, doing: str = "", stacks: str = "") -> None:
        """One datagram; one that is lost is made up for by the next."""
        if self._launcher is None:
            return
        self._number += 1
        phase, step = self._place
        closed = self._over.is_set()
        beat = Beat(
            self._rank, socket.gethostname(), os.getpid(), self._number, phase, step, self._ticks,
            closed, doing, stacks, self._total,
        )  # fmt: skip
        try:
            self._socket.sendto(beat.encode(self._token), self._launcher)
        except OSError:
            return

    def _answer(self, data: bytes) -> None:
        """Write the stacks of all threads into the folder that the launcher names."""
        try:
            request = json.loads(data)
            if request["token"] != self._token:
                return
            folder = Path(request["folder"])
        except (ValueError, TypeError, KeyError):
            return
        main = threading.main_thread().ident or 0
        doing = whereabouts(sys._current_frames(), main, threading.get_ident())
        self._send(doing)  # first: the file system may be what hangs
        path = folder / f"rank-{self._rank}.txt"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"rank {self._rank}, main thread {main:#018x}, {doing}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                self._send(doing, str(path))
                file.write(flight_recorder())
        except OSError as error:
            self._send(doing, f"not written: {error}")
