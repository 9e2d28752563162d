"""A terminal of tmux's, of any size, that a program runs in."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ENDED = "[ended with"


class Terminal:
    """A program in a terminal of its own server, which `close` ends.

    Args:
        folder: for its socket.
        width, height: cells.
        command: the program.
        environ: its variables, all of them.
    """

    def __init__(
        self, folder: Path, width: int, height: int, command: Sequence[str],
        environ: Mapping[str, str],
    ) -> None:  # fmt: skip
        words = ["env", "-i", *(f"{name}={value}" for name, value in environ.items()), *command]
        script = f"{shlex.join(words)}; echo '{ENDED} '$?]; exec sleep 600"
        self._tmux = ["tmux", "-S", str(folder / "tmux"), "-f", "/dev/null"]
        size = ["-x", str(width), "-y", str(height)]
        self._run("set-option", "-g", "history-limit", "9000", ";", "new-session", "-d", *size,
                  "bash", "-c", script, start=True)  # fmt: skip

    def _run(self, *words: str, start: bool = False) -> str:
        first = [*self._tmux, "start-server", ";"] if start else self._tmux
        done = subprocess.run(
            [*first, *words], capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout

    def close(self) -> None:
        """End the program and the terminal."""
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=60, check=False)

    def lines(self, *, joined: bool = False, colours: bool = False) -> list[str]:
        """What the terminal shows, scrolled lines included, without blank lines at the end.

        Args:
            joined: a line that the terminal has broken is one.
            colours: with escape sequences.
        """
        options = ["-J"] * joined + ["-e"] * colours
        text = self._run("capture-pane", "-p", *options, "-S", "-")
        return [line.rstrip() for line in text.rstrip().splitlines()]

    def press(self, key: str) -> None:
        """A key, such as C-c."""
        self._run("send-keys", key)

    def resize(self, width: int, height: int) -> None:
        """Another size."""
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def cursor_shown(self) -> bool:
        """Whether the cursor can be seen."""
        return self._run("display-message", "-p", "#{cursor_flag}").strip() == "1"

    def wait_for(self, text: str, within_s: float) -> list[str]:
        """The lines, once one of them holds `text`."""
        until = time.monotonic() + within_s
        while True:
            lines = self.lines()
            if any(text in line for line in lines):
                return lines
            assert time.monotonic() < until, "\n".join([f"no {text!r}:", *lines])
            time.sleep(0.05)

    def ended(self, within_s: float) -> int:
        """Wait for the program's end; its status."""
        lines = self.wait_for(ENDED, within_s)
        (line,) = (line for line in lines if ENDED in line)
        return int(line.rpartition(" ")[2].rstrip("]"))
