"""The names that Megatron-DeepSpeed gives the files of this order in its own cache.

Nothing here reads them. They tell whether two runs agree on what decides the order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from megatron.data.megatron_order.greedy import FloatArray


def file_name(
    prefix: str,
    split_name: str,
    request: int,
    epochs: int,
    seq_length: int,
    seed: int,
    split: str,
) -> str:
    """Name of a file's index.

    Args:
        prefix: as in the list.
        split_name: train, valid or test.
        request: samples asked of the file.
        epochs: passes over its documents.
        seq_length: S.
        seed: the run's.
        split: the text of the three shares.
    """
    return _md5(
        "GPT Dataset\n\n"
        f"Data prefix {prefix}\n"
        f"Dataset name {split_name}\n"
        f"Number of samples {request}\n"
        f"Number of epochs {epochs}\n"
        f"Sequence length {seq_length}\n"
        f"Random seed {seed}\n"
        f"Split {split}\n"
    )


def corpus_name(corpus: str, size: int) -> str:
    """Name of a corpus' index; runs with other files or splits share it."""
    return _md5(f"{corpus}\n {size}")


def corpus_description(prefixes: Sequence[str], size: int, seq_length: int, seed: int) -> str:
    """What the name of the blend takes from a corpus."""
    files = "".join(f"{prefix}," for prefix in prefixes)
    return f"CorpusDataset:{files}-{size}-{seq_length}{seed}"


def blend_name(descriptions: Sequence[str], weights: FloatArray, size: int) -> str:
    """Name of the index of the blended corpora; `weights` are normalised."""
    corpora = "".join(f"{description}\n\n" for description in descriptions)
    return _md5(f"Blendable dataset\n\nDatasets:\n{corpora}Weights: {weights}\nSize: {size}\n")


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
