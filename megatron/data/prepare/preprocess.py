"""Text files into pairs: read, tokenised by several processes, written, resumed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed import token_dtype
from megatron.data.prepare import text_input
from megatron.data.prepare.encode import Encoded, Recipe, encode_all, tokenizer_of
from megatron.data.prepare.fingerprint import Named, write_note
from megatron.data.prepare.sharded_writer import ShardedWriter
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.data.text_files import HUB
from megatron.display.progress import BYTES, Bar, progress

SHOWN_BAD_LINES = 10
SAVE_SECONDS = 10.0  # between two entries of the journal, of which the first come sooner
FIRST_SECONDS = 1.0


class Made(NamedTuple):
    """What a call of `preprocess` has made."""

    prefixes: list[str]
    line: str


def preprocess(
    paths: Sequence[str],
    output_prefix: str,
    recipe: Recipe,
    workers: int = 1,
    max_bad_lines: int = 100,
    log_interval: float = 5.0,
    title: str = "tokenising",
) -> Made:
    """Tokenise files into one pair per key; no pair appears unless all of them are complete.

    Returns:
        The prefixes of the pairs, in the order of the keys, and what was done in words.

    Raises:
        DataError: too many bad lines, no document at all, or text that is no UTF-8.
        ConfigError: the tokenizer cannot be loaded or the output cannot be written.
    """
    tokenizer = tokenizer_of(recipe)  # its errors come before any process is started
    prefixes = [f"{output_prefix}_{key}_document" for key in recipe.keys]
    folder = Path(f"{output_prefix}.partial")
    try:
        task = _task(paths, recipe, tokenizer)
        writer = ShardedWriter(prefixes, token_dtype(tokenizer.vocab_size), folder, task)
        counts = Counts(writer)
        total = _total_bytes(paths)
        if counts.units:
            share = f"{counts.bytes / total:.1%}" if total else f"{counts.units} units"
            print(f"going on from {share}: {counts.documents:,} documents are done already",
                  file=sys.stderr)  # fmt: skip
        try:
            with progress(title, total, BYTES, done=counts.bytes, interval_s=log_interval) as bar:
                _write_all(paths, recipe, workers, writer, counts, max_bad_lines, bar)
            writer.commit()
            for prefix in prefixes:
                named = Named(recipe.tokenizer_type, recipe.tokenizer_model)
                write_note(prefix, tokenizer, recipe.append_eod, named)
            writer.abandon()
        except DataError:
            writer.abandon()  # other input is another task
            raise
        finally:
            writer.close()
    except OSError as error:
        raise ConfigError(
            f"--output-prefix {output_prefix} cannot be written ({error}); what was done is kept "
            f"in {folder}"
        ) from error
    return Made(prefixes, counts.line())


def _write_all(
    paths: Sequence[str],
    recipe: Recipe,
    workers: int,
    writer: ShardedWriter,
    counts: Counts,
    max_bad_lines: int,
    bar: Bar,
) -> None:
    """Append every unit that is not yet written, in order."""
    first = counts.units
    units = enumerate(text_input.units(paths, recipe.keys))
    saved, interval = time.monotonic(), min(FIRST_SECONDS, SAVE_SECONDS)
    for number, encoded in encode_all(islice(units, first, None), recipe, workers, writer):
        writer.append(number, encoded.lengths, encoded.unit.ends_document)
        messages = counts.add(encoded)
        bar.detail = counts.rate()
        bar.advance(encoded.unit.input_bytes)
        for message in messages[: max(SHOWN_BAD_LINES - counts.bad + len(messages), 0)]:
            bar.say(f"bad line: {message}")
        if counts.bad > max_bad_lines:
            raise DataError(
                f"{counts.bad} bad lines, more than --max-bad-lines {max_bad_lines}; the last: "
                f"{messages[-1]}; correct the input or raise the limit"
            )
        if time.monotonic() - saved >= interval:
            saved, interval = time.monotonic(), min(2 * interval, SAVE_SECONDS)
            writer.save(counts.journal())
    writer.save(counts.journal())
    if not writer.tokens:
        raise DataError(
            f"no document with text in {len(paths)} file(s); are --json-keys (DATA_KEY) right?"
        )


class Counts:
    """What was written, by this start and those before it.

    Attributes:
        units, documents, bytes, bad: numbers so far; bytes of the input.
    """

    def __init__(self, writer: ShardedWriter) -> None:
        """Start to count, or resume from the writer's journal."""
        self._writer = writer
        self._started = time.monotonic()
        known = writer.progress
        self.units = int(known.get("units", 0))
        self.bad = int(known.get("bad", 0))
        self.documents = int(known.get("documents", 0))
        self.bytes = int(known.get("bytes", 0))
        self._path, self._lines = known.get("lines", ["", 0])
        self._before = (self.documents, writer.tokens)

    def add(self, encoded: Encoded) -> list[str]:
        """Count a unit that was written; returns its bad lines, with file and line."""
        unit = encoded.unit
        if unit.path != self._path:
            self._path, self._lines = unit.path, 0
        messages = [
            f"{unit.path}:{self._lines + bad.line + 1}: {bad.reason}" for bad in encoded.bad
        ]
        self._lines += encoded.lines
        self.units += 1
        self.bad += len(encoded.bad)
        self.documents += encoded.documents
        self.bytes += unit.input_bytes
        return messages

    def journal(self) -> dict[str, Any]:
        """What a later start needs to resume."""
        return {
            "units": self.units,
            "bad": self.bad,
            "documents": self.documents,
            "bytes": self.bytes,
            "lines": [self._path, self._lines],
        }

    def rate(self) -> str:
        """Tokens so far, and per second of this start."""
        did = self._writer.tokens - self._before[1]
        bad = f", {self.bad} bad lines" if self.bad else ""
        return f"{self._writer.tokens:,} tokens, {did / self._seconds():,.0f}/s{bad}"

    def line(self) -> str:
        """What was done, at the end."""
        seconds = self._seconds()
        documents, tokens = self._before
        return (
            f"{self.documents:,} document(s), {self._writer.tokens:,} tokens in {seconds:.1f} s: "
            f"{(self.documents - documents) / seconds:,.0f} documents/s, "
            f"{(self._writer.tokens - tokens) / seconds:,.0f} tokens/s"
            + (f", {self.bad} bad lines left out" if self.bad else "")
        )

    def _seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)


def _total_bytes(paths: Sequence[str]) -> int | None:
    """Bytes of the input; None where only the Hub knows."""
    if any(path.startswith(HUB) for path in paths):
        return None
    return sum(os.path.getsize(path) for path in paths)


def _task(paths: Sequence[str], recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the output."""
    return {
        "inputs": [_identity(path) for path in paths],
        "keys": recipe.keys,
        "append_eod": recipe.append_eod,
        "tokenizer": tokenizer.fingerprint(),
        "units": [text_input.UNIT_BYTES, text_input.PIECE_CHARACTERS],
    }


def _identity(path: str) -> list[Any]:
    if path.startswith(HUB):
        return [path]
    stat = os.stat(path)
    return [str(Path(path).absolute()), stat.st_size, stat.st_mtime_ns]
