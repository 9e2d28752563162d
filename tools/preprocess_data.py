#!/usr/bin/env python3
"""Turn JSON lines, Parquet and plain text into Megatron's `.bin/.idx` pairs.

Writes `<output-prefix>_<key>_document.{bin,idx,tokenizer.json}`, one pair per JSON key. A `.txt`
file is one document. Memory stays constant, documents keep their order for any number of workers,
and an interrupted run resumes when the same command is given again.
Exit status: 0 done, 2 a setting is wrong, 3 the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.data.indexed import token_dtype
from megatron.data.prepare import text_input
from megatron.data.prepare.encode import Encoded, Recipe, encode_all, tokenizer_of
from megatron.data.prepare.fingerprint import write_note
from megatron.data.prepare.plain_tokenizers import CharTokenizer
from megatron.data.prepare.sharded_writer import ShardedWriter
from megatron.data.prepare.text_input import SUFFIXES
from megatron.data.prepare.tokenizer import TOKENIZERS, Tokenizer

SHOWN_BAD_LINES = 10
SAVE_SECONDS = 10.0  # between two entries of the journal
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, read, tokenise, write; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        paths = _input_files(options.input, options.json_keys)
        model = _tokenizer_model(options, paths)
        recipe = Recipe(
            options.tokenizer_type,
            model,
            options.vocab_size,
            tuple(options.json_keys),
            options.append_eod,
        )
        preprocess(
            paths,
            options.output_prefix,
            recipe,
            options.workers,
            options.max_bad_lines,
            options.log_interval,
        )
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted: the same command resumes from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def preprocess(
    paths: Sequence[str],
    output_prefix: str,
    recipe: Recipe,
    workers: int = 1,
    max_bad_lines: int = 100,
    log_interval: float = 5.0,
) -> None:
    """Tokenise files into one pair per key; no pair appears unless all of them are complete.

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
        progress = PreprocessingProgress(paths, writer, log_interval)
        try:
            _write_all(paths, recipe, workers, writer, progress, max_bad_lines)
            writer.commit()
            for prefix in prefixes:
                write_note(prefix, tokenizer, recipe.append_eod)
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
    progress.finish(prefixes)


def _write_all(
    paths: Sequence[str],
    recipe: Recipe,
    workers: int,
    writer: ShardedWriter,
    progress: PreprocessingProgress,
    max_bad_lines: int,
) -> None:
    """Append every unit that is not yet written, in order."""
    first = progress.units
    units = enumerate(text_input.units(paths, recipe.keys))
    saved = time.monotonic()
    for number, encoded in encode_all(islice(units, first, None), recipe, workers, writer):
        writer.append(number, encoded.lengths, encoded.unit.ends_document)
        messages = progress.add(encoded)
        for message in messages[: max(SHOWN_BAD_LINES - progress.bad + len(messages), 0)]:
            print(f"bad line: {message}", file=sys.stderr)
        if progress.bad > max_bad_lines:
            raise DataError(
                f"{progress.bad} bad lines, more than --max-bad-lines {max_bad_lines}; the last: "
                f"{messages[-1]}; correct the input or raise the limit"
            )
        if time.monotonic() - saved >= SAVE_SECONDS:
            saved = time.monotonic()
            writer.save(progress.counters())
    writer.save(progress.counters())
    if not writer.tokens:
        raise DataError(f"no document with text in {len(paths)} file(s); are --json-keys right?")


class PreprocessingProgress:
    """Counts what was written; logs it, with rates and the time left, every few seconds."""

    def __init__(self, paths: Sequence[str], writer: ShardedWriter, interval: float) -> None:
        """Start to count, or resume from the writer's journal; `interval` in seconds."""
        self._writer = writer
        self._interval = interval
        self._started = self._said = time.monotonic()
        self._total_bytes = sum(os.path.getsize(path) for path in paths)
        known = writer.progress
        self.units = int(known.get("units", 0))
        self.bad = int(known.get("bad", 0))
        self._documents = int(known.get("documents", 0))
        self._bytes = int(known.get("bytes", 0))
        self._path, self._lines = known.get("lines", ["", 0])
        self._before = (self._documents, writer.tokens, self._bytes)
        if self.units:
            print(f"resuming after {self.units} units, {self._documents:,} documents",
                  file=sys.stderr)  # fmt: skip

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
        self._documents += encoded.documents
        self._bytes += unit.input_bytes
        now = time.monotonic()
        if now - self._said >= self._interval:
            self._said = now
            print(self._line(), file=sys.stderr, flush=True)
        return messages

    def counters(self) -> dict[str, Any]:
        """What a later start needs to resume."""
        return {
            "units": self.units,
            "bad": self.bad,
            "documents": self._documents,
            "bytes": self._bytes,
            "lines": [self._path, self._lines],
        }

    def finish(self, prefixes: Sequence[str]) -> None:
        """Log what was written."""
        print(f"{self._line()}; wrote {', '.join(prefixes)}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        documents, tokens, read = self._before
        tokens_now = self._writer.tokens
        share = self._bytes / max(self._total_bytes, 1)
        rate = (self._bytes - read) / seconds
        left = (self._total_bytes - self._bytes) / rate if rate else float("inf")
        return (
            f"{share:.1%}: {self._documents:,} documents, {tokens_now:,} tokens in {seconds:.1f} s"
            f": {(self._documents - documents) / seconds:,.0f} documents/s, "
            f"{(tokens_now - tokens) / seconds:,.0f} tokens/s, {left:,.0f} s left"
            + (f", {self.bad} bad lines left out" if self.bad else "")
        )


def _task(paths: Sequence[str], recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the output."""
    files = [(str(Path(path).absolute()), os.stat(path)) for path in paths]
    return {
        "inputs": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in files],
        "keys": recipe.keys,
        "append_eod": recipe.append_eod,
        "tokenizer": tokenizer.fingerprint(),
        "units": [text_input.UNIT_BYTES, text_input.PIECE_CHARACTERS],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn JSON lines, Parquet and plain text into .bin/.idx pairs."
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files or globs: .jsonl and .json (one document per line), these as .gz or .zst, "
        ".parquet, .txt",
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        help="keys to take, one pair each (default: text)",
    )
    add("--tokenizer-type", required=True, choices=sorted(TOKENIZERS), help="kind of tokenizer")
    add(
        "--tokenizer-model",
        help="name or path; CharTokenizer without one makes its alphabet from the input",
    )
    add("--vocab-file", help="GPT2BPETokenizer: vocab.json")
    add("--merge-file", help="GPT2BPETokenizer: merges.txt")
    add("--vocab-size", type=int, help="NullTokenizer: number of ids, end of document included")
    add("--append-eod", action="store_true", help="end each document with the end-of-document id")
    add("--output-prefix", required=True, help="writes <prefix>_<key>_document.bin and .idx")
    add("--workers", type=_positive, default=1, help="processes that tokenise (default: 1)")
    add("--max-bad-lines", type=int, default=100, help="more unusable lines than this: status 3")
    add("--log-interval", type=float, default=5.0, help="seconds between lines of progress")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 1 or more")
    return int(text)


def _input_files(patterns: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Files of the patterns, in the order given, those of a glob sorted."""
    paths: list[str] = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise ConfigError(f"--input {pattern}: no such file")
        paths += found
    for path in paths:
        if not path.endswith(SUFFIXES):
            known = ", ".join(SUFFIXES)
            raise ConfigError(f"--input {path}: unknown kind of file; known: {known}")
        if path.endswith(".txt") and len(keys) != 1:
            raise ConfigError(
                f"--input {path}: plain text has no keys, but --json-keys names {len(keys)}"
            )
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--json-keys {' '.join(keys)}: a key is named twice")
    return paths


def _tokenizer_model(options: argparse.Namespace, paths: Sequence[str]) -> str | None:
    """TOKENIZER_MODEL, from whichever flag gave it; an alphabet is made where none is given."""
    if (options.vocab_file is None) != (options.merge_file is None):
        raise ConfigError("--vocab-file and --merge-file go together")
    if options.vocab_file is not None:
        if options.tokenizer_type != "GPT2BPETokenizer" or options.tokenizer_model is not None:
            raise ConfigError(
                "--vocab-file and --merge-file are for GPT2BPETokenizer without --tokenizer-model"
            )
        return f"{options.vocab_file},{options.merge_file}"
    if options.tokenizer_type == "CharTokenizer" and options.tokenizer_model is None:
        path = f"{options.output_prefix}_alphabet.json"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        characters: set[str] = set()
        for unit in text_input.units(paths, options.json_keys):
            for texts in text_input.texts(unit, options.json_keys).by_key.values():
                characters.update(*texts)
        CharTokenizer.write_alphabet(characters, path)
        print(f"alphabet of {len(characters)} characters: {path}", file=sys.stderr)
        return path
    model: str | None = options.tokenizer_model
    return model


if __name__ == "__main__":
    sys.exit(main())
