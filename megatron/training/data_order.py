"""From a run's configuration to its data sets in Megatron's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from megatron.config.data_list import DataSource
from megatron.config.schema import RunConfig
from megatron.data.megatron_order.build import MegatronSplits, build_megatron_datasets
from megatron.data.megatron_order.plan import OrderSettings


def megatron_splits(
    run: RunConfig, entries: Iterable[DataSource], log: Callable[[str], None]
) -> MegatronSplits:
    """Train, validation and test data of a run; every rank calls this and builds its part.

    Raises:
        DataError: the order asks of a file what it does not have.
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
        global_batch_size=run.train.global_batch_size,
        eval_interval=run.log.eval_interval,
        eval_iters=run.log.eval_iters,
        blend_in_corpus=data.blend_sample_in_corpus,
        shuffle_in_corpus=data.shuffle_sample_in_corpus,
        exact_epochs=data.train_data_exact_num_epochs,
    )


def cache_folder(run: RunConfig) -> Path:
    """Where the order is cached: shared by the runs of one folder unless the user says."""
    chosen = run.data.cache_path
    return Path(chosen) if chosen else run.run_folder.parent / "data-cache"
