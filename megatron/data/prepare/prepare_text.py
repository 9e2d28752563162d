"""Fills the folder of a user's own text: `python -m megatron.data.prepare.prepare_text JSON`.

A process of its own, before the ranks: what it needs is freed before training, and it resumes where
it was interrupted or killed. The list is written last. Exit status as of tools/preprocess_data.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron.checkpoint.atomic import write_atomically
from megatron.config.errors import ConfigError, DataError
from megatron.data.file_lock import locked
from megatron.data.own_text import BUILTIN_TOKENIZER, MODEL, RECORD, OwnText, earlier
from megatron.data.prepare.encode import Recipe
from megatron.data.prepare.preprocess import preprocess
from megatron.data.prepare.token_list import write_list
from megatron.data.prepare.tokenizer import builtin_model
from megatron.data.text_files import HUB, is_plain
from megatron.display.progress import BYTES, progress

INTERRUPTED = 130
BYTES_PER_WORKER = 8 << 20  # less text is tokenised sooner than processes are started
_READ = 1 << 22
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Prepare what a JSON value names; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both keep what was done
        signal.signal(number, signal.default_int_handler)
    _end_with_parent()
    own = OwnText.from_json(arguments[0])
    try:
        prepare(own)
    except (ConfigError, DataError) as error:
        given = "" if str(error).startswith(own.given) else f"DATA={own.given}: "
        print(f"error: {given}{error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0


def _end_with_parent() -> None:
    """Get SIGTERM where whoever started us is killed; Linux only."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def prepare(own: OwnText) -> None:
    """Make what is missing of the folder; processes that race make it once.

    Raises:
        DataError: the text cannot be read.
        ConfigError: the tokenizer cannot be loaded or the folder cannot be written.
    """
    folder = Path(own.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".lock", wait=True):
            if not own.is_prepared:
                _prepare(own)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written ({error}): set DATA_CACHE_PATH to a folder that can be"
        ) from error


def _prepare(own: OwnText) -> None:
    before = earlier(own)
    if before:
        _say(f"{own.given} has changed since it was prepared in {before}: it is prepared anew")
    _keep_tokenizer(own)
    recipe = Recipe(
        own.tokenizer_type, own.tokenizer_model, own.vocab_size, (own.key,), append_eod=True
    )
    # A text of other content has other names in the record of a checkpoint.
    digest = _digest(own.paths)
    prefix = f"{own.folder}/{own.corpus}-{digest}"
    title = f"preparing {Path(own.given).name}"
    made = preprocess(own.paths, prefix, recipe, _workers(own.size), title=title)
    write_atomically(Path(own.folder) / RECORD, json.dumps(asdict(own), indent=1) + "\n")
    tokens = write_list(
        Path(own.data_file_list), [(own.corpus, made.prefixes[0])], f"made from {own.given}"
    )
    plain = all(is_plain(path) for path in own.paths)
    rate = f", {own.size / tokens:.2f} bytes per token" if plain else ""
    _say(f"DATA={own.given}: {made.line}{rate}")


def _keep_tokenizer(own: OwnText) -> None:
    """The built-in tokenizer changes with Python's own library: what was made here keeps it."""
    model = Path(own.folder) / MODEL
    own_model = own.tokenizer_type == BUILTIN_TOKENIZER and own.tokenizer_model == str(model)
    if own_model and not model.is_file():
        write_atomically(model, Path(builtin_model()).read_bytes())


def _digest(paths: Sequence[str]) -> str:
    """Hash of the content of all files, of which eight digits; of a name where the Hub has them."""
    digest = hashlib.blake2b(digest_size=4)
    if paths[0].startswith(HUB):
        digest.update(paths[0].encode())
        return digest.hexdigest()
    total = sum(os.path.getsize(path) for path in paths)
    with progress("reading", total, BYTES) as bar:
        for block in _blocks(paths):
            digest.update(block)
            bar.advance(len(block))
    return digest.hexdigest()


def _blocks(paths: Sequence[str]) -> Iterator[bytes]:
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(_READ):
                yield block


def _workers(size: int) -> int:
    cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count()
    return max(1, min(cores or 1, size // BYTES_PER_WORKER))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
