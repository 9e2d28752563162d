"""What the tests of Megatron's order share: data sets, and settings from plain values."""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from megatron.data.data_list import DataSource
from megatron.data.dataset import Splits
from megatron.data.megatron_order.build_once import CHECKED_AT_START
from megatron.data.megatron_order.datasets import build_megatron_datasets
from megatron.data.megatron_order.order import MegatronDataset
from megatron.data.megatron_order.settings import OrderSettings
from tests.data.golden_order import datasets
from tests.data.pairs import idx_bytes


def recorded_data() -> Path:
    """Folder of the recorded orders' data sets, written once a process."""
    return Path(_recorded_folder().name)


@cache
def _recorded_folder() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="recorded-order-")  # removed at exit
    datasets.write_all(Path(folder.name))
    return folder


def settings(lines, **changes) -> OrderSettings:
    """Settings of a small run over (weight, prefix, corpus) lines."""
    values = {
        "seq_length": 16, "shares": (90.0, 8.0, 2.0), "seed": 1234, "train_iters": 40,
        "global_batch_size": 8, "eval_interval": 20, "eval_iters": 2,
    }  # fmt: skip
    entries = tuple(DataSource(*line, number) for number, line in enumerate(lines, start=1))
    return OrderSettings(entries=entries, **{**values, **changes})


def build(
    cache_folder, lines, log=lambda line: None, check_up_to=CHECKED_AT_START, **changes
) -> Splits[MegatronDataset]:
    """The three data sets of a small run."""
    run = settings(lines, **changes)
    return build_megatron_datasets(run, cache_folder, log, check_up_to=check_up_to)


def write_pair(prefix: Path, lengths: list[int]) -> str:
    """A uint16 pair of documents of these lengths; tokens count up."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens = np.arange(sum(lengths)) % 65000
    Path(f"{prefix}.bin").write_bytes(tokens.astype("<u2").tobytes())
    Path(f"{prefix}.idx").write_bytes(idx_bytes(lengths))
    return str(prefix)
