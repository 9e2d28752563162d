"""Which documents a sample's tokens belong to, and which samples a document's tokens are in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron.config.errors import DataError
from megatron.data.dataset import Dataset
from megatron.data.indexed import DocumentPart, IndexedDataset


def parts_of(dataset: IndexedDataset, start: int, count: int) -> list[DocumentPart]:
    """The documents that `count` tokens from token `start` of a file belong to, in order."""
    parts = []
    document = _document_at(dataset, start)
    while count > 0:
        first, stop = document_range(dataset, document)
        length = min(stop - start, count)
        if length > 0:
            parts.append(DocumentPart(document, start - first, length))
            start, count = start + length, count - length
        document += 1
    return parts


def document_range(dataset: IndexedDataset, document: int) -> tuple[int, int]:
    """First token of a document, and the one after its last.

    Raises:
        DataError: the file has no such document.
    """
    count = len(dataset.documents) - 1
    if not 0 <= document < count:
        raise DataError(f"{dataset.prefix} has documents 0 to {count - 1}, not {document}")
    first, stop = dataset.documents[document : document + 2].tolist()
    return _first_token(dataset, first), _first_token(dataset, stop)


def samples_with(
    dataset: Dataset, prefix: str, tokens: tuple[int, int], seq_length: int, count: int
) -> Iterator[tuple[int, int]]:
    """Samples of the first `count` that hold some of a file's tokens, and the epoch of each.

    Args:
        dataset: the order.
        prefix: of the file.
        tokens: first, and the one after the last.
        seq_length: S; sample j of a file is its tokens j*S to (j+1)*S, both included.
        count: samples searched; fewer if limits of epochs leave fewer.
    """
    first, stop = tokens
    numbers = range(max(-(-(first - seq_length) // seq_length), 0), (stop - 1) // seq_length + 1)
    drawn = dataset.drawn(count if dataset.total is None else min(count, dataset.total))
    for corpus, about in enumerate(dataset.corpora):
        for place, file in enumerate(about.files):
            if file.prefix != prefix:
                continue
            epochs = range(
                file.drawn // len(file.share), -(-drawn[file.identity] // len(file.share))
            )
            for epoch in epochs:
                for index in numbers:
                    if index not in file.share:
                        continue
                    draw = file.draw_of(epoch, index)
                    if 0 <= draw < drawn[file.identity] - file.drawn:
                        yield dataset.position(corpus, place, draw), epoch


def _document_at(dataset: IndexedDataset, token: int) -> int:
    """The document that holds a token."""
    byte = token * dataset.dtype.itemsize
    # The last sequence that begins there or before; empty ones begin where the next one does.
    sequence = int(np.searchsorted(dataset.pointers, byte, side="right")) - 1
    return int(np.searchsorted(dataset.documents, sequence, side="right")) - 1


def _first_token(dataset: IndexedDataset, sequence: int) -> int:
    if sequence == len(dataset):
        return dataset.header.tokens
    return int(dataset.pointers[sequence]) // dataset.dtype.itemsize
