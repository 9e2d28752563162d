"""Units of text to shards of tokens, in order, by one process or several."""

from __future__ import annotations

import functools
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context

import numpy as np
import numpy.typing as npt

from megatron.data.indexed import token_dtype
from megatron.data.prepare import text_input
from megatron.data.prepare.sharded_writer import ShardedWriter
from megatron.data.prepare.text_input import Bad, Unit
from megatron.data.prepare.tokenizer import HFTokenizer, LoadedTokenizer, Tokenizer, build_tokenizer
from megatron.data.prepare.words import WordEncoder

UNITS_PER_WORKER = 3  # in flight; bounds memory and disk when the writer is the slow one
BATCH_DOCUMENTS = 256  # tokenised at a time


@dataclass(frozen=True)
class Recipe:
    """What a worker must know; small, since it is sent with every unit."""

    tokenizer_type: str
    tokenizer_model: str | None
    vocab_size: int | None
    keys: tuple[str, ...]
    append_eod: bool


@dataclass(frozen=True)
class Encoded:
    """A tokenised unit, whose tokens are in its shards.

    Attributes:
        unit: without its data.
        lengths: tokens of each document, for each key.
        documents: number that ended in it.
        lines: lines read, bad ones included.
        bad: lines left out.
    """

    unit: Unit
    lengths: list[npt.NDArray[np.int64]]
    documents: int
    lines: int
    bad: list[Bad]


def encode_all(
    units: Iterable[tuple[int, Unit]], recipe: Recipe, workers: int, writer: ShardedWriter
) -> Iterator[tuple[int, Encoded]]:
    """Number and result of each unit, in order, once its shards are written."""
    keys = range(len(recipe.keys))
    shards = functools.partial(_shards, writer, keys)
    if workers == 1:
        for number, unit in units:
            yield number, encode_unit(unit, recipe, shards(number))
        return
    # Spawned, not forked: the tokenizers library's threads do not survive a fork.
    loaded = _loaded(recipe)
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (recipe, loaded)) as pool:
        waiting: deque[tuple[int, Future[Encoded]]] = deque()
        try:
            for number, unit in units:
                with _ctrl_c_held():
                    future = pool.submit(encode_unit, unit, recipe, shards(number))
                waiting.append((number, future))
                if len(waiting) > UNITS_PER_WORKER * workers:
                    number, future = waiting.popleft()
                    yield number, future.result()
            while waiting:
                number, future = waiting.popleft()
                yield number, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


@contextmanager
def _ctrl_c_held() -> Iterator[None]:
    """What is started in the block hears no Ctrl-C: the process that started it ends it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _shards(writer: ShardedWriter, keys: range, number: int) -> list[str]:
    return [str(writer.shard_path(number, key)) for key in keys]


Loaded = tuple[str, int, int]  # definition, vocabulary and end of document of an HFTokenizer


def _loaded(recipe: Recipe) -> Loaded | None:
    """The tokenizer in parts, so that workers need not import transformers."""
    tokenizer = tokenizer_of(recipe)
    if not isinstance(tokenizer, HFTokenizer):
        return None
    return tokenizer.definition(), tokenizer.vocab_size, tokenizer.eod


def _start_worker(recipe: Recipe, loaded: Loaded | None) -> None:
    # One process per core is the parallelism; threads inside each would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if loaded is not None:
        tokenizer = LoadedTokenizer(*loaded)
        _ENCODERS[recipe] = tokenizer, WordEncoder(tokenizer, token_dtype(tokenizer.vocab_size))


_ENCODERS: dict[Recipe, tuple[Tokenizer, WordEncoder]] = {}


def _encoder(recipe: Recipe) -> tuple[Tokenizer, WordEncoder]:
    """The tokenizer, loaded once per process."""
    if recipe not in _ENCODERS:
        tokenizer = build_tokenizer(
            recipe.tokenizer_type, recipe.tokenizer_model, recipe.vocab_size
        )
        _ENCODERS[recipe] = tokenizer, WordEncoder(tokenizer, token_dtype(tokenizer.vocab_size))
    return _ENCODERS[recipe]


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer, loaded once per process.

    Raises:
        ConfigError: as `build_tokenizer`.
    """
    return _encoder(recipe)[0]


def encode_unit(unit: Unit, recipe: Recipe, shards: Sequence[str]) -> Encoded:
    """Write the tokens of a unit to its shards; the end-of-document id counts as a token."""
    tokenizer, encoder = _encoder(recipe)
    dtype = token_dtype(tokenizer.vocab_size)
    found = text_input.texts(unit, recipe.keys)
    ends = recipe.append_eod and unit.ends_document
    end = np.array([tokenizer.eod], dtype).tobytes() if ends else b""
    lengths = []
    for key, shard in zip(recipe.keys, shards, strict=True):
        documents = found.by_key[key]
        sizes: list[int] = []
        with open(shard, "wb") as file:
            for first in range(0, len(documents), BATCH_DOCUMENTS):
                pieces = [
                    text_input.split_text(t) for t in documents[first : first + BATCH_DOCUMENTS]
                ]
                ids = iter(encoder.encode([piece for parts in pieces for piece in parts]))
                for parts in pieces:
                    document = b"".join([*islice(ids, len(parts)), end])
                    file.write(document)
                    sizes.append(len(document) // dtype.itemsize)
        lengths.append(np.array(sizes, dtype=np.int64))
    done = Unit(**{**asdict(unit), "data": b""})
    count = len(lengths[0]) if unit.ends_document else 0
    return Encoded(done, lengths, count, found.lines, found.bad)
