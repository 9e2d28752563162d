"""A run on a terminal: a line for what stays, and below two rows that show where the run is.

It is given what goes into output.log, with the records of the lines that have one, and the phase
that rank 0 is in; output.log holds all of it in full.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

from megatron.display.footer import Footer
from megatron.display.progress import clock, terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

DRAW_S = 0.25
KEPT = 4  # lines of steps that stay beside the first, evenly over the run,
KEPT_S = 300.0  # and one after so many seconds at the latest
SPINNER = "|/-\\"
PATIENCE_S = 1.0  # a phase between steps is named after so long,
SLOW_S = 10.0  # and the step after so long without a sign of progress

Numbers = Mapping[str, Any]
"""A record of metrics.jsonl."""

PHASES = {
    "": "starting the ranks: importing torch",
    "start": "connecting the ranks",
    "data": "reading the data",
    "build": "building the model",
    "load": "looking for a checkpoint to resume from",
    "restore": "resuming",
    "step": "first step",
    "evaluate": "evaluating",
    "save": "saving a checkpoint",
    "export": "exporting for Hugging Face",
    "sample": "drawing a sample",
}
"""Phase of a heartbeat -> what is shown; others are shown by their names."""

DETAILS = {"attention_kernel", "compiler", "rules", "first_step"}
"""Modules whose INFO lines are shown while they are the newest, and stay in output.log alone."""

_LOG_LINE = re.compile(r"\[\S+ (\S+)\.\d+\]\[(\w+)\]\[(\w+)\](?:\[(rank \d+)\])? - (.*)")
_COMMAND = re.compile(r"(.*  |)((?:\w+=\S+ )*(?:bash|python3?) [^'\"]+)")
_LAUNCH = "launch command: "
_BOX, _BOX_END = "==== ARCHITECTURE ====", "======================"
_LEVELS = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}


class RunView:
    """What one terminal shows of a run; used by one thread at a time.

    Args:
        console: of the terminal.
        now: s.
    """

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._footer = Footer(console)
        self._drawn = self._kept_at = self._phase_at = self._moved_at = now()
        self._place: tuple[str, int | None, int] = ("", None, 0)
        self._phase, self._ticks, self._done, self._total = "", 0, 0, 0
        self._took: dict[str, float] = {}  # s, of each phase when it was there last
        self._detail = ""
        self._box: list[str] | None = None
        self._last = ""
        self._latest: Numbers | None = None
        self._origin: tuple[int, float] | None = None  # step, when: for the time left
        self._step = self._kept = 0
        self._validation = self._saved = ""
        self._stopped = False

    def close(self) -> None:
        """Nothing is drawn from now on."""
        self._footer.draw([])

    def show(self, line: str, record: Numbers | None = None) -> bool:
        """Show a line of standard output, or what stands for it.

        Args:
            line: without its end.
            record: that it was made from, if any.

        Returns:
            False where it is to be printed as it is, with `clear` called before.
        """
        if record is not None and record["event"] in FORMS:
            FORMS[record["event"]](self, record)
            return True
        if record is not None and record.get("reason") == "finished":
            return True
        if self._boxed(line) or line == self._last == "":  # many blank lines are one
            return True
        self._last = line
        found = _LOG_LINE.fullmatch(line)
        if found:
            self._log_line(*found.groups())
        elif line.startswith(_LAUNCH):
            self._print(_text((line, "dim")), crop=True)
        elif len(line) <= self._console.width:
            return False
        elif command := _COMMAND.fullmatch(line):
            for part in _continued(command[1], command[2].split(), self._console.width):
                self._print(_text((part, "")))
        else:
            self._print(_text((line, "")))
        return True

    def clear(self) -> None:
        """Make room for something that others print; the rows come back with the next turn."""
        self._footer.draw([])
        self._drawn = -math.inf

    def entered(self, phase: str, step: int | None, ticks: int, total: int) -> None:
        """Rank 0 is in a phase: of `total` ticks, 0 where nobody knows."""
        if phase != self._phase:
            now = self._now()
            self._took[self._phase] = now - self._phase_at
            self._phase, self._phase_at, self._ticks = phase, now, ticks
            self._detail = ""
        if self._place != (phase, step, ticks):
            self._place, self._moved_at = (phase, step, ticks), self._now()
        self._done, self._total = ticks - self._ticks, total
        if phase == "step" and step is not None:
            self._step = max(self._step, step - 1)

    def turn(self) -> None:
        """Draw the rows again if it is time to; called many times a second."""
        now = self._now()
        if now - self._drawn >= DRAW_S:
            self._drawn = now
            self._footer.draw(self._rows(now))

    def _print(self, text: Text, *, crop: bool = False, indent: int = 0) -> None:
        """A text that stays, broken at words, or cropped to one line."""
        width = max(self._console.width, 10)
        if crop:
            text.truncate(width, overflow="ellipsis")
        with self._console:
            self._footer.erase()
            fits = "\n" not in text.plain and text.cell_len <= width
            lines = [text] if fits else text.wrap(self._console, width - indent)
            for number, line in enumerate(lines):
                line.rstrip()
                pad = " " * (indent if number else 0)
                self._console.print(pad, line, sep="", soft_wrap=True)
            self._footer.draw(self._rows(self._now()))

    def _boxed(self, line: str) -> bool:
        """Take a line of the box of the architecture, which becomes a few lines."""
        if line == _BOX:
            self._box = []
        elif self._box is None:
            return False
        elif line == _BOX_END:
            words = " ".join(part.replace(": ", "=") for part in self._box)
            self._box = None
            self._print(_text((words, "cyan")))
        else:
            self._box.append(line)
        return True

    def _log_line(self, at: str, level: str, module: str, rank: str | None, text: str) -> None:
        """`[date time][LEVEL][module] - text`, shorter."""
        if level == "INFO" and module in DETAILS:
            self._detail = text
            return
        style = _LEVELS.get(level, "")
        named = (f"{level}: " if style else "") + (f"{rank}: " if rank else "")
        self._print(_text((f"{at} ", "dim"), (named + text, style)), indent=len(at) + 1)

    def _step_taken(self, record: Numbers) -> None:
        """Note a step; its line stays where it is due."""
        now, number, last = self._now(), record["iteration"], record["train_iters"]
        self._latest, self._step = record, number
        if self._origin is None or number <= self._origin[0]:  # a rollback
            self._origin, self._kept = (number, now), -1
        stretch = number * KEPT // last
        if stretch != self._kept or now - self._kept_at >= KEPT_S:
            self._kept, self._kept_at = stretch, now
            self._print(_joined(step_fields(record), self._console.width))

    def _evaluated(self, record: Numbers) -> None:
        split, loss = record["split"], f"{record['loss']:.4f}"
        number, last = record["iteration"], record["train_iters"]
        self._validation = f"{split[:3]} {loss} @ {number}"
        about = f"{split} loss {loss}  perplexity {record['perplexity']:.4g}"
        self._print(_text((f"{number:>{len(str(last))}}/{last}  ", ""), (about, "bold magenta")))

    def _was_saved(self, record: Numbers) -> None:
        self._saved = f"saved @ {record['iteration']}"

    def _unseen(self, record: Numbers) -> None:
        """The rows show it all the time."""

    def _rows(self, now: float) -> list[Text]:
        """What is drawn at the bottom."""
        width = self._console.width - 1
        if self._latest is None or self._phase in ("export", "sample"):
            return [self._waiting(now)]
        last = self._latest["train_iters"]
        share = min(1.0, self._step / last)
        words = [(f"{share:4.0%}", "bold")]
        if left := self._left(now):
            words.append((f"{left} left", "cyan"))
        if self._phase != "step" and now - self._phase_at >= PATIENCE_S:
            words.append((self._doing(now), "yellow"))
        elif now - self._moved_at >= SLOW_S:
            words.append((f"step {self._step + 1} ... {now - self._moved_at:.0f} s", "yellow"))
        memory = self._latest.get("memory_max_gib")
        words += [(self._validation, "magenta"), (self._saved, "green")]
        words.append(("" if memory is None else f"{memory:.2f} GiB", ""))
        about = _joined([_text(word) for word in words if word[0]], width - 12)
        bar = self._bar(share, max(10, min(40, width - 2 - about.cell_len)))
        fields = _joined(step_fields(self._latest), width)
        return [fields, _text((" ", "")).join([bar, about])]

    def _waiting(self, now: float) -> Text:
        """The row before the first step, and after the last one."""
        words = f"{SPINNER[int(now / DRAW_S) % len(SPINNER)]} {self._doing(now)}"
        return _text((words, "bold cyan"), (f"  {self._detail}" if self._detail else "", "dim"))

    def _doing(self, now: float) -> str:
        """The phase, with how far it is and since when."""
        name = PHASES.get(self._phase, self._phase)
        seconds = now - self._phase_at
        if not self._total:
            took = self._took.get(self._phase, 0.0)
            about = f" of about {took:.0f} s" if took >= PATIENCE_S else ""
            return f"{name} ... {seconds:.0f} s{about}"
        left = ""
        if 0 < self._done < self._total:
            left = f", {clock(seconds * (self._total - self._done) / self._done)} left"
        return f"{name} {min(self._done / self._total, 1):.0%}{left}"

    def _left(self, now: float) -> str:
        """Until the last step, at the rate of this start so far, evaluation and saving included."""
        assert self._latest is not None
        if self._origin is None or self._step <= self._origin[0]:
            return ""
        first, began = self._origin
        steps = self._latest["train_iters"] - self._step
        return clock(steps * (now - began) / (self._step - first)) if steps > 0 else ""

    def _bar(self, share: float, width: int) -> Text:
        from rich.progress_bar import ProgressBar

        options = self._console.options.update(width=width)
        bar = ProgressBar(1.0, share, width)
        parts = self._console.render(bar, options)
        return _text(*((part.text, part.style or "") for part in parts))


FORMS: dict[str, Callable[[RunView, Numbers], None]] = {
    "step": RunView._step_taken,
    "skip": RunView._step_taken,
    "eval": RunView._evaluated,
    "save": RunView._was_saved,
    "progress": RunView._unseen,
}
"""Event -> what stands for its line; the lines of others are shown."""


def step_fields(record: Numbers) -> list[Text]:
    """What the line of a step shows, the most important first."""
    number, last = record["iteration"], record["train_iters"]
    fields = [_text((f"{number:>{len(str(last))}}/{last}", "bold"))]
    if record["event"] == "skip":
        return [*fields, _text(("skipped", "yellow"))]
    for label, key, form, style in FIELDS:
        if (value := record.get(key)) is not None:
            finite = math.isfinite(value)
            shown = form(value) if finite else str(value)
            text = _text((label, "dim"), (shown, style if finite else "bold red"))
            fields.append(text)
    return fields


def _scaled(value: float) -> str:
    """`8.21k`, `1.23M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _time(seconds: float) -> str:
    return f"{seconds * 1000:3.0f} ms" if seconds < 1 else f"{seconds:4.3g} s"


FIELDS: list[tuple[str, str, Callable[[float], str], str]] = [
    ("loss ", "loss", "{:.4f}".format, "bold green"),
    ("norm ", "grad_norm", "{:.2f}".format, ""),
    ("lr ", "learning_rate", "{:.2e}".format, ""),
    ("", "elapsed_s", _time, ""),
    ("", "tokens_per_s", lambda value: f"{_scaled(value):>5} tok/s", "cyan"),
    ("", "tflops_lm", lambda value: f"{_scaled(value * 1e12)}FLOPS", ""),
]
"""Label, key of the record, form and style of each field behind the step's number."""


def _text(*parts: tuple[str, Any]) -> Text:
    from rich.text import Text

    return Text.assemble(*parts)


def _continued(label: str, words: Iterable[str], width: int) -> list[str]:
    """A command over several lines, as a shell takes it: it can be copied."""
    lines = [label]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width and len(lines[-1]) > len(label):
            lines[-1] += "\\"
            lines.append(" " * len(label))
        lines[-1] += f"{word} "
    return [line.rstrip() for line in lines]


def _joined(fields: Iterable[Text], width: int) -> Text:
    """As many fields as fit, two blanks between them; the first one always."""
    line = _text()
    for field in fields:
        if line and line.cell_len + 2 + field.cell_len > width:
            break
        line = line + "  " + field if line else field
    return line


def run_view(style: str, stream: TextIO) -> tuple[RunView | None, str]:
    """The view of a run, None where lines are printed as they are; and why, if that needs a word.

    Args:
        style: LOG_STYLE.
        stream: standard output.
    """
    console = None if style == "line" else terminal(stream)
    if console is not None:
        return RunView(console), ""
    missing = stream.isatty() and find_spec("rich") is None
    if missing and style != "line":
        return None, f"note: the log is shown in full: {sys.executable} has no package rich"
    if style == "live":
        return None, "note: LOG_STYLE=live has no effect: standard output is no live terminal"
    return None, ""
