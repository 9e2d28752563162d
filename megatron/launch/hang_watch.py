"""Listens to the ranks' heartbeats in the launcher's loop, and reports a hang before it is ended.

A hang: all ranks are asked for their stacks, a table says who waits where, and the run is killed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from megatron.launch import hang
from megatron.launch.heartbeat import LARGEST, Beat

SILENT_S = 4.0  # four beats that did not come
ANSWER_S = 5.0  # for the stacks
ASK_AGAIN_S = 1.0
SUSPENDED_S = 5.0  # the launcher's loop turns many times a second
UNHEARD_S = 600.0
RECEIVE_BUFFER = 4 << 20
MOST_AT_ONCE = 10_000  # datagrams: the lines of the ranks are to be read, too
SUSPECTS = 2
SHOWN_LINES = 30
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

Tell = Callable[[str], None]


class HangWatch:
    """What the launcher asks in each turn of its loop: does the run hang?

    Args:
        host: name or number under which the ranks reach this host.
        world_size: ranks of the run.
        folder: the stacks of a hang go into a folder of their own below it.
        timeout_s: HANG_TIMEOUT; None: learnt, 0: never.
        tell: prints a text.
        own: the ranks are our children: SIGUSR2 makes a silent one print its stacks.
        clock: s.

    Attributes:
        address: for the ranks, the value of the variable HEARTBEAT.
        table: what is known of the ranks.
        verdict: why the run hangs; empty: it does not.
        suspects: the ranks to look at first, once it hangs.
    """

    def __init__(
        self,
        host: str,
        world_size: int,
        folder: Path,
        timeout_s: float | None,
        tell: Tell,
        *,
        own: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with suppress(OSError):  # what the system allows
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        self._socket.bind(("127.0.0.1" if host == "127.0.0.1" else "", 0))
        self._socket.setblocking(False)
        self._token = secrets.token_hex(8)
        self.address = f"{host}:{self._socket.getsockname()[1]}:{self._token}"
        self.table = hang.Table(hang.Limits(timeout_s))
        self.verdict, self.suspects = "", list[int]()
        self._addresses: dict[int, tuple[str, int]] = {}
        self._world_size, self._tell, self._own = world_size, tell, own
        self._root = self._folder = folder
        self._clock, self._polled, self._lost = clock, clock(), 0.0
        self._began = self._polled
        self._signal_at: float | None = None
        self._hung_at = self._ask_at = 0.0
        self._said_unheard = False

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def poll(self, signals: Sequence[int], failing: bool) -> bool:
        """Take the beats that came; True once the run hangs and all is said.

        Args:
            signals: that were passed on to the ranks so far.
            failing: a rank has failed and the others are being ended: no hang begins.
        """
        now = self._now()
        self._receive(now)
        if self._signal_at is None and any(number in STOPS for number in signals):
            self._signal_at = now
        if not self.verdict:
            self._say_unheard(now)
            self.verdict = "" if failing else self.table.verdict(now, self._signal_at)
            if not self.verdict:
                return False
            if self._signal_at is not None:
                names = [signal.Signals(number).name for number in signals if number in STOPS]
                asked = f"{names[0]} was passed on {now - self._signal_at:.0f} s ago"
                self.verdict = f"{asked} and is not answered: {self.verdict}"
            self._tell(f"HUNG: {self.verdict}; asking for stacks")
            self._begin(now)
        if now >= self._ask_at:
            self._ask_at = now + ASK_AGAIN_S
            self._ask()
        silent = self.table.silent(now, SILENT_S)
        live = [rank for rank in self.table.ranks.values() if not rank.beat.closed]
        answered = sum(bool(rank.stacks) for rank in live) >= len(live) - len(silent)
        waited = now - self._hung_at
        if waited < (ASK_AGAIN_S if answered else ANSWER_S):
            return False
        if not self.table.verdict(now, self._signal_at):
            self._tell("a rank has made progress meanwhile: no hang, the run goes on")
            self.verdict = ""
            self.table.forget_answers()
            return False
        self._report(now)
        return True

    def host_of(self, rank: int) -> str | None:
        """The host that a rank said it is on; None where it was never heard."""
        known = self.table.ranks.get(rank)
        return known.beat.host if known else None

    def all_began(self) -> bool:
        """Whether a rank is past the start, which all ranks leave together."""
        return any(rank.beat.phase != "start" for rank in self.table.ranks.values())

    def _now(self) -> float:
        """Seconds, without those in which this process itself was stopped or blocked."""
        now = self._clock()
        if now - self._polled > SUSPENDED_S:
            self._lost += now - self._polled
        self._polled = now
        return now - self._lost

    def _receive(self, now: float) -> None:
        for _ in range(MOST_AT_ONCE):
            try:
                data, address = self._socket.recvfrom(LARGEST)
            except BlockingIOError:
                return
            except OSError:  # an answer to what was sent to a rank that has ended
                continue
            beat = Beat.decode(data, self._token)
            if beat is not None:
                self.table.take(beat, now)
                self._addresses[beat.rank] = address

    def _say_unheard(self, now: float) -> None:
        """A program without heartbeats, or a network that loses them: said once."""
        if self.table.ranks or self._said_unheard or now - self._began < UNHEARD_S:
            return
        self._said_unheard = True
        self._tell(f"no heartbeat of a rank in {UNHEARD_S:.0f} s: hangs are not watched for")

    def _begin(self, now: float) -> None:
        """Make the folder; silent children of ours print their stacks themselves."""
        self._hung_at = now
        self._folder = self._root / datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._tell(f"the stacks cannot be kept: {error}")
        for rank in self.table.silent(now, SILENT_S) if self._own else []:
            with suppress(ProcessLookupError):
                os.kill(rank.beat.pid, signal.SIGUSR2)

    def _ask(self) -> None:
        request = json.dumps({"token": self._token, "folder": str(self._folder.absolute())})
        for number, rank in self.table.ranks.items():
            if not rank.stacks and not rank.beat.closed:
                with suppress(OSError):
                    self._socket.sendto(request.encode(), self._addresses[number])

    def _report(self, now: float) -> None:
        lines = hang.describe(self.table, self._world_size, now, SILENT_S)
        self.suspects = hang.suspects(self.table, now, SILENT_S)
        text = "\n".join([f"HUNG: {self.verdict}", *(f"  {line}" for line in lines)])
        shown = [number for number in self.suspects if self.table.ranks[number].stacks]
        for number in (shown or sorted(self.table.ranks))[:SUSPECTS]:
            stack = main_stack(self._folder / f"rank-{number}.txt")
            if stack:
                text += "\n".join([f"\nrank {number}, innermost call first:", *stack])
        text += f"\nall stacks: {self._folder}"
        try:
            (self._folder / "report.txt").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            text += f" (the report cannot be kept: {error})"
        self._tell(text)


def main_stack(path: Path) -> list[str]:
    """The lines of the main thread in a file that a rank wrote; empty where it wrote none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    main = lines[0].partition("main thread ")[2].partition(",")[0] if lines else ""
    starts = [i for i, line in enumerate(lines) if i and main and main in line]
    if not starts:
        return []
    stack = lines[starts[0] + 1 :]
    end = next((i for i, line in enumerate(stack) if not line.startswith("  ")), len(stack))
    return stack[: min(end, SHOWN_LINES)]


def reachable_name(hosts: Sequence[str], master: str, hostname: str) -> str:
    """The name under which ranks on `hosts` reach this host; loopback where all of them are on it.

    Args:
        hosts: of the ranks, as the job names them.
        master: address of the first one, known to all ranks.
        hostname: of this host.
    """
    here = [host for host in hosts if host_name(host) in (host_name(hostname), "localhost")]
    if len(here) == len(hosts):
        return "127.0.0.1"
    if here and here[0] == hosts[0]:
        return master
    return here[0] if here else socket.getfqdn()


def host_name(host: str) -> str:
    """The name of a host without its domain; a number as it is."""
    return host if host.replace(".", "").isdecimal() else host.partition(".")[0]
