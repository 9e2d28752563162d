"""From a run's configuration to its data sets in Megatron's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megatron.config.errors import DataError
from megatron.config.schema import RunConfig
from megatron.data.data_list import DataSource
from megatron.data.data_record import DataRecord, stages_of
from megatron.data.dataset import Splits
from megatron.data.indexed_header import read_header
from megatron.data.megatron_order.datasets import build_megatron_datasets
from megatron.data.megatron_order.order import MegatronDataset
from megatron.data.megatron_order.settings import OrderSettings

_WANTED = "TRAIN_ITERS x GLOBAL_BATCH"
_BLEND = "BLEND_SAMPLE_IN_CORPUS"
_SHUFFLE = "SHUFFLE_SAMPLE_IN_CORPUS"
_EPOCHS = "TRAIN_DATA_EXACT_NUM_EPOCHS"


def megatron_splits(
    run: RunConfig, entries: Iterable[DataSource], log: Callable[[str], None]
) -> Splits[MegatronDataset]:
    """Train, validation and test data of a run; every rank calls this and builds its part.

    Raises:
        DataError: the order needs more of a file than it has.
        ConfigError: the cache cannot be written.
    """
    return build_megatron_datasets(order_settings(run, entries), cache_folder(run), log)


def order_settings(run: RunConfig, entries: Iterable[DataSource]) -> OrderSettings:
    """What decides the order of a run."""
    data = run.data
    return OrderSettings(
        entries=tuple(entries),
        seq_length=run.model.seq_length,
        shares=(data.train_split, data.valid_split, data.test_split),
        seed=run.train.seed,
        train_iters=run.train.train_iters,
        train_samples=_wanted(run),
        global_batch_size=run.train.global_batch_size,
        eval_interval=run.log.eval_interval,
        eval_iters=run.log.eval_iters,
        blend_in_corpus=data.blend_sample_in_corpus,
        shuffle_in_corpus=data.shuffle_sample_in_corpus,
        exact_epochs=data.train_data_exact_num_epochs,
    )


def cache_folder(run: RunConfig) -> Path:
    """Where the order is cached: shared by the runs of one folder unless DATA_CACHE_PATH is set."""
    chosen = run.data.cache_path
    return Path(chosen) if chosen else run.run_folder.parent / "data-cache"


def recorded_settings(run: RunConfig) -> dict[str, Any]:
    """What decides the training samples besides the list, for the record of a run."""
    data = run.data
    return {
        _WANTED: _wanted(run),
        _BLEND: data.blend_sample_in_corpus,
        _SHUFFLE: data.shuffle_sample_in_corpus,
        _EPOCHS: data.train_data_exact_num_epochs,
    }


def _wanted(run: RunConfig) -> int:
    """Training samples that the order is made for: TRAIN_SAMPLES, used up or not."""
    return run.train.train_samples or run.total_samples


def recorded_order(record: DataRecord, cache: Path) -> MegatronDataset:
    """The training order of a record, independent of the current list and settings.

    Raises:
        DataError: a file has gone or has changed its length.
        ConfigError: the cache cannot be written.
    """
    stages, recorded = stages_of(record)
    for prefix, header in recorded.items():
        tokens = read_header(prefix, allow_empty=True).tokens
        if tokens != header.tokens:
            raise DataError(
                f"{prefix}.bin has {tokens:,} tokens, the run read one of {header.tokens:,}: its "
                "order cannot be rebuilt; restore the file"
            )
    first, second, third = record["shares"]
    settings = OrderSettings(
        entries=stages[0].sources,
        seq_length=record["seq_length"],
        shares=(first, second, third),
        seed=record["seed"],
        train_iters=record["settings"][_WANTED],  # the number of samples alone decides
        global_batch_size=1,
        eval_interval=0,
        eval_iters=0,
        blend_in_corpus=record["settings"][_BLEND],
        shuffle_in_corpus=record["settings"][_SHUFFLE],
        exact_epochs=record["settings"][_EPOCHS],
    )
    train = build_megatron_datasets(settings, cache, lambda line: None).train
    assert train is not None
    return train
