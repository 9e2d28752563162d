"""What Hugging Face's Trainer reads: our run's samples, or a stream of text."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from megatron.config.errors import ConfigError
from megatron.data.dataset import SampleSource

Example = dict[str, Tensor]


class Encoder(Protocol):
    """A tokenizer, as a stream needs it."""

    @property
    def eod(self) -> int:
        """Ends a text."""

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text."""


def example(tokens: Iterable[int]) -> Example:
    """S + 1 tokens as inputs and what follows each: the loss is over S predictions, as ours is."""
    whole = torch.as_tensor(list(tokens) if not isinstance(tokens, Tensor) else tokens)
    labels = whole[1:].to(torch.int64)
    return {"input_ids": whole[:-1].to(torch.int64), "labels": labels, "shift_labels": labels}


class NumberedSamples(Dataset[Example]):
    """Samples 0 .. count - 1 of an order: read one after the other they are those of our steps."""

    def __init__(self, source: SampleSource, count: int) -> None:
        """`source` gives a sample by its number."""
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return example(torch.from_numpy(self.source.sample(index).tokens))


class StreamedText(IterableDataset[Example]):
    """Texts one after the other, each with its end, cut into samples: nothing is kept on disk."""

    def __init__(self, name: str, encoder: Encoder, length: int, first: int, count: int) -> None:
        """Samples first .. first + count - 1 of the data set `name`, of `length` tokens each."""
        self.name, self.encoder, self.length = name, encoder, length
        self.first, self.count = first, count

    def __iter__(self) -> Iterator[Example]:
        samples = packed(texts(self.name), self.encoder, self.length)
        yield from itertools.islice(samples, self.first, self.first + self.count)


def packed(rows: Iterable[str], encoder: Encoder, length: int) -> Iterator[Example]:
    """Samples of `length` predictions; each begins with the last token of the one before."""
    kept: list[int] = []
    for row in rows:
        kept += [*encoder.encode(row), encoder.eod]
        while len(kept) > length:
            yield example(kept[: length + 1])
            del kept[:length]


def texts(name: str) -> Iterator[str]:
    """The texts of a data set of the Hub, or of a file or folder of it, for ever.

    Raises:
        ConfigError: the package `datasets` is missing, or there is no such data set.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise ConfigError("--dataset_name needs datasets: pip install datasets==5.2.0") from None
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
    path = Path(name)
    arguments: dict[str, Any] = {"path": name}
    if path.is_file():
        if path.suffix not in kinds:
            raise ConfigError(f"--dataset_name {name}: a file is one of {', '.join(kinds)}")
        arguments = {"path": kinds[path.suffix], "data_files": name}
    try:
        rows = datasets.load_dataset(**arguments, split="train", streaming=True)
    except Exception as error:  # of any kind: the Hub, its files, the network
        raise ConfigError(f"--dataset_name {name} cannot be read: {error}") from None
    while True:
        for row in rows:
            yield str(row["text"])
