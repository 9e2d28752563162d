"""Several pairs as one: the bytes of all `.bin` end to end, the tables of all `.idx` joined."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from megatron.config.errors import DataError
from megatron.data.indexed import IndexedDataset, commit_pair
from megatron.data.prepare.fingerprint import data_digest, save_note
from megatron.data.tokenizer_note import kept_model, model_of, note_path, read_note
from megatron.display.progress import Advance, ignored

_BLOCK = 1 << 20  # entries of a table copied at a time
_COPY_BYTES = 1 << 24


def merge_pairs(
    prefixes: Sequence[str], output: str, advance: Advance = ignored
) -> tuple[int, int]:
    """Write `<output>.bin` and `.idx`, and a note where all inputs have the same one.

    Args:
        prefixes: of the inputs, in their order.
        output: prefix.
        advance: told of the bytes of tokens that have been written.

    Returns:
        Documents and tokens of the output.

    Raises:
        DataError: an input is damaged, leaves tokens out, has another dtype or another tokenizer.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    first = datasets[0]
    for dataset in datasets:
        if dataset.header.left_out:
            raise DataError(
                f"{dataset.prefix}.bin has {dataset.header.left_out} tokens that its index leaves "
                "out; mend the index with tools/mend_index.py before merging"
            )
        if dataset.dtype != first.dtype:
            raise DataError(
                f"{dataset.prefix}.idx has {dataset.dtype.name} tokens, {first.prefix}.idx "
                f"{first.dtype.name}: they were made for vocabularies of other sizes; merge those "
                "of one kind, or list both in a data list"
            )
    notes = {prefix: note for prefix in prefixes if (note := read_note(prefix))}
    for prefix, note in notes.items():
        known_prefix, known = next(iter(notes.items()))
        if note.maker != known.maker:
            raise DataError(
                f"{prefix} was made with another tokenizer or end of document than {known_prefix} "
                f"({note.named}, {known.named}); do not merge them"
            )
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work,
        tempfile.TemporaryFile(dir=work) as lengths,
        tempfile.TemporaryFile(dir=work) as documents,
    ):
        data = Path(work) / "bin"
        _copy_tokens(prefixes, data, advance)
        _join_tables(datasets, lengths, documents)
        note_path(output).unlink(missing_ok=True)  # of an earlier output
        commit_pair(data, output, first.dtype, lengths, documents)
    if all(prefix in notes for prefix in prefixes):
        note = notes[prefixes[0]]
        model = kept_model(model_of(note, prefixes[0]), output)
        save_note(output, replace(note, data=data_digest(output), model=model))
    count = sum(max(dataset.header.document_boundaries - 1, 0) for dataset in datasets)
    return count, sum(dataset.header.tokens for dataset in datasets)


def _copy_tokens(prefixes: Sequence[str], target: Path, advance: Advance) -> None:
    with open(target, "wb") as file:
        for prefix in prefixes:
            with open(f"{prefix}.bin", "rb") as source:
                while block := source.read(_COPY_BYTES):
                    file.write(block)
                    advance(len(block))
        file.flush()
        os.fsync(file.fileno())


def _join_tables(
    datasets: Sequence[IndexedDataset], lengths: IO[bytes], documents: IO[bytes]
) -> None:
    documents.write(bytes(8))
    before = 0
    for dataset in datasets:
        for start in range(0, len(dataset), _BLOCK):
            lengths.write(dataset.lengths[start : start + _BLOCK].tobytes())
        table = dataset.documents
        for start in range(1, len(table), _BLOCK):
            documents.write((table[start : start + _BLOCK] + before).astype("<i8").tobytes())
        before += len(dataset)
