"""The cached files of an order, each with what it is made from and how."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedDataset
from megatron.data.megatron_order.array_file import NewArray, write_arrays
from megatron.data.megatron_order.build_once import CacheFile
from megatron.data.megatron_order.epochs import plan_epochs
from megatron.data.megatron_order.file_index import (
    document_index,
    sample_index,
    shuffle_dtype,
    shuffle_index,
)
from megatron.data.megatron_order.mixing import (
    Picks,
    blend,
    corpus_order,
    corpus_weights,
    number_dtype,
    source_dtype,
)
from megatron.data.megatron_order.settings import (
    CorpusPlan,
    FilePlan,
    OrderSettings,
    SplitPlan,
    exact_epochs,
    file_stamp,
)

_FORMAT = 2  # part of every key: raise it when what is written changes


def file_recipe(folder: Path, file: FilePlan, settings: OrderSettings) -> CacheFile:
    """The index of a file in a split: arrays `documents`, `samples` and `shuffle`."""
    key = _key(
        "file",
        file=os.path.abspath(file.prefix),
        stamp=file.stamp,
        documents=[file.documents.start, file.documents.stop],
        request=file.request,
        seq_length=settings.seq_length,
        seed=settings.seed,
        exact_epochs=exact_epochs(file, settings),
    )
    title = f"the {file.split} index of {file.prefix}"
    return CacheFile(folder, "file", key, title, partial(_write_file, key, file, settings))


def corpus_recipe(
    folder: Path, corpus: CorpusPlan, available: Sequence[int], settings: OrderSettings
) -> CacheFile:
    """The order within a corpus: arrays `sources` (files) and `numbers` (samples of them).

    Args:
        folder: of the cache.
        corpus: with its files.
        available: samples that each file has; only a blend calls it.
        settings: of the run.
    """
    requests = [file.request for file in corpus.files]
    key = _key(
        "corpus",
        requests=requests,
        available=available if settings.blend_in_corpus else None,
        shuffled=settings.shuffle_in_corpus,
        seed=settings.seed if settings.shuffle_in_corpus else None,
    )
    order = partial(
        corpus_order, requests, available, settings.blend_in_corpus, settings.shuffle_in_corpus,
        settings.seed,
    )  # fmt: skip
    build = partial(_write_picks, key, order, len(requests), corpus.size)
    return CacheFile(folder, "corpus", key, f"the order of corpus {corpus.name}", build)


def blend_recipe(folder: Path, plan: SplitPlan) -> CacheFile:
    """The order of the corpora of a split: arrays `sources` (corpora) and `numbers`."""
    sizes = [corpus.size for corpus in plan.corpora]
    key = _key("blend", sizes=sizes, train_total=plan.train_total)
    order = partial(blend, corpus_weights(sizes, plan.train_total), plan.size, sizes)
    build = partial(_write_picks, key, order, len(sizes), plan.size)
    return CacheFile(folder, "blend", key, f"the blend of the {plan.name} corpora", build)


def _key(kind: str, **content: Any) -> str:
    return json.dumps({"format": _FORMAT, "kind": kind, **content}, sort_keys=True)


def _write_file(key: str, file: FilePlan, settings: OrderSettings, stream: IO[bytes]) -> None:
    dataset = IndexedDataset(file.prefix)  # reads and checks the whole .idx
    lengths, documents = dataset.lengths, file.documents
    tokens = int(lengths[documents.start : documents.stop].sum(dtype=np.int64))
    where = f"{file.prefix} ({file.split})"
    epochs = plan_epochs(
        tokens, settings.seq_length, file.request, where, exact_epochs(file, settings)
    )
    rng = np.random.RandomState(settings.seed)
    order = document_index(documents, epochs, rng)
    samples = epochs.samples
    arrays = {
        "documents": NewArray(np.dtype("<i4"), order.shape, [order]),
        "samples": NewArray(
            np.dtype("<i8"), (samples + 1, 2),
            sample_index(order, lengths, settings.seq_length, samples),
        ),
        "shuffle": NewArray(
            shuffle_dtype(samples), (samples,), _later(lambda: shuffle_index(epochs, rng))
        ),
    }  # fmt: skip
    facts = {"tokens": tokens, "epochs": epochs.passes, "samples": samples}
    write_arrays(stream, key, facts, arrays)
    if file_stamp(file.prefix) != file.stamp:
        raise DataError(f"{file.prefix}: changed while its index was built; start again")


def _later(make: Callable[[], npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """One block, made when it is consumed."""
    yield make()


def _write_picks(
    key: str, order: Callable[[], Iterable[Picks]], sources: int, size: int, stream: IO[bytes]
) -> None:
    """Write sources and numbers of picks in one pass over them."""
    source_type, number_type = source_dtype(sources), number_dtype(size)
    # One array must be complete before the next is written: the narrow one waits in memory.
    waiting = np.empty(size, dtype=source_type)

    def numbers() -> Iterator[npt.NDArray[Any]]:
        done = 0
        for picks in order():
            stop = done + len(picks.sources)
            waiting[done:stop] = picks.sources
            done = stop
            yield picks.numbers

    arrays = {
        "numbers": NewArray(number_type, (size,), numbers()),
        "sources": NewArray(source_type, (size,), _later(lambda: waiting)),
    }
    write_arrays(stream, key, {"size": size}, arrays)
