"""How well a saved model predicts data: loss, perplexity and accuracy, corpus by corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RunConfig
from megatron.data.data_list import parse_data_list
from megatron.data.dataset import Dataset, SampleSource
from megatron.data.indexed_header import IndexHeader
from megatron.data.prepare.checks import check_files
from megatron.data.prepare.tokenizer import Tokenizer
from megatron.data.splits import build_datasets
from megatron.parallel.control import ALONE
from megatron.training.accuracy import perplexity
from megatron.training.run_data import build_data
from megatron.training.saved_model import WholeModel

CorpusSample = tuple[str, Tensor]  # corpus, int64 (S + 1,)
ALL = "all"


def of_run(run: RunConfig, split: str, wanted: int | None) -> Iterator[CorpusSample]:
    """The samples of a run's own evaluations: EVAL_ITERS batches, or the first `wanted`.

    Raises:
        ConfigError: it has no such data.
        DataError: the data cannot be read.
    """
    source = getattr(build_data(run, ALONE).splits, {"validation": "valid"}.get(split, split))
    if source is None:
        raise ConfigError(f"the run has no {split} data: give a LIST, or --data TEXT")
    return _read(source, wanted or run.log.eval_iters * run.train.global_batch_size)


def of_list(
    path: str, length: int, tokenizer: Tokenizer, vocab_size: int, wanted: int | None
) -> Iterator[CorpusSample]:
    """All samples of a list once, or `wanted` of them mixed by its weights.

    Args:
        path: the list.
        length: S, tokens of a sample without the last.
        tokenizer: of the model.
        vocab_size: of the model.
        wanted: samples at most; None: all.

    Raises:
        DataError: the data is wrong.
    """
    sources = parse_data_list(path, "LIST")
    report = check_files(sources, vocab_size, tokenizer)
    report.raise_problems()
    headers: dict[str, IndexHeader] = dict(report.headers)
    built = build_datasets(sources, length, (0.0, 1.0, 0.0), headers=headers)
    if not isinstance(built.valid, Dataset):
        raise DataError(f"{path}: {'; '.join(built.warnings)}")
    if wanted is not None:
        return _read(built.valid, wanted)
    files = [(corpus.name, file) for corpus in built.valid.corpora for file in corpus.files]
    return (
        (name, torch.from_numpy(file.read(number))) for name, file in files for number in file.share
    )


def of_text(
    text: str, length: int, tokenizer: Tokenizer, wanted: int | None
) -> Iterator[CorpusSample]:
    """A text in pieces of the model's length, a last shorter one included.

    Raises:
        DataError: it has no two tokens.
    """
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    if len(ids) < 2:
        raise DataError(f"--data: the text has {len(ids)} tokens, and a loss needs two")
    starts = range(0, len(ids) - 1, length)
    pieces = (("text", torch.from_numpy(ids[start : start + length + 1])) for start in starts)
    return islice(pieces, wanted)


def scores(
    model: WholeModel,
    samples: Iterable[CorpusSample],
    batch: int,
    tick: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, Any]]:
    """Corpus -> its figures, `ALL` last: loss, perplexity, accuracy, tokens, samples and rates.

    Args:
        model: is asked.
        samples: of any length; neighbours of one length are computed together.
        batch: samples computed at a time.
        tick: told how many are done.
    """
    sums: dict[str, list[float]] = {}  # loss, right, tokens, samples
    began, done = time.perf_counter(), 0
    for corpora, block in _blocks(samples, batch):
        losses, correct, counts = model.score(block)
        rows = torch.stack([losses.double() * counts, correct * counts, counts]).sum(2).cpu()
        for place, corpus in enumerate(corpora):
            own = sums.setdefault(corpus, [0.0] * 4)
            added = [*rows[:, place].tolist(), 1]
            sums[corpus] = [a + b for a, b in zip(own, added, strict=True)]
        done += len(corpora)
        tick(done)
    seconds = time.perf_counter() - began
    whole = [sum(column) for column in zip(*sums.values(), strict=True)]
    found = {corpus: _figures(*own) for corpus, own in sums.items()}
    tokens, count = found.setdefault(ALL, _figures(*whole))["tokens"], whole[3]
    found[ALL] |= {
        "seconds": seconds, "samples_per_s": count / seconds, "tokens_per_s": tokens / seconds,
    }  # fmt: skip
    return found


def _figures(loss: float, right: float, tokens: float, samples: float) -> dict[str, Any]:
    mean = loss / tokens if tokens else float("nan")
    return {
        "loss": mean,
        "perplexity": perplexity(mean),
        "accuracy": right / tokens if tokens else float("nan"),
        "tokens": int(tokens),
        "samples": int(samples),
    }


def _read(source: SampleSource, count: int) -> Iterator[CorpusSample]:
    for number in range(count):
        sample = source.sample(number)
        yield sample.corpus, torch.from_numpy(sample.tokens)


def _blocks(samples: Iterable[CorpusSample], batch: int) -> Iterator[tuple[list[str], Tensor]]:
    """Corpora and tokens (B, S + 1) of up to `batch` neighbours of one length."""
    kept: list[CorpusSample] = []
    for one in samples:
        if kept and (len(kept) == batch or len(one[1]) != len(kept[0][1])):
            yield [corpus for corpus, _ in kept], torch.stack([tokens for _, tokens in kept])
            kept = []
        kept.append(one)
    if kept:
        yield [corpus for corpus, _ in kept], torch.stack([tokens for _, tokens in kept])
