#!/usr/bin/env python3
"""Build the cached sample order of a DATA_ORDER=megatron run ahead of it.

    [VAR=value ...] python3 tools/prepare_cache.py [--workers N] [--verify] [--flag value ...]

Takes the variables and flags of the training command: give the same ones, and NHOSTS or WORLD_SIZE
where the job will have more ranks than this machine.
Exit status: 0 done, 2 a setting is wrong, 3 the data is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, not installed

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import resolve
from megatron.config.schema import RunConfig
from megatron.data.data_list import BUILTIN, DataSource, parse_data_list
from megatron.data.megatron_order.build_once import CHECKED_AT_START
from megatron.data.megatron_order.datasets import build_megatron_datasets
from megatron.data.megatron_order.requests import NAMES
from megatron.data.megatron_order.settings import OrderSettings
from megatron.data.prepare.builtin import builtin_corpus
from megatron.launch.site import find_location, site
from megatron.launch.text_preparation import require_text
from megatron.training.data_order import cache_folder, order_settings


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Resolve the run, build its order with several processes; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prepare_cache.py",
        description="Build the cached sample order of a DATA_ORDER=megatron run ahead of it.",
        epilog="Further flags, and variables, are those of the training command.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)),
        help="processes that build; default: the cores of this machine (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true",
        help="read every cached file whole and rebuild damaged ones",
    )  # fmt: skip
    options, flags = parser.parse_known_args(argv)
    try:
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers}: must be 1 or more")
        run = resolve(environ, flags, site(environ, flags, find_location(environ, flags))).run
        if run.data.order != "megatron":
            raise ConfigError(
                f"DATA_ORDER={run.data.order} needs no cache; set DATA_ORDER=megatron"
            )
        settings, folder = order_settings(run, _entries(run)), cache_folder(run)
        prepare(settings, folder, options.workers, options.verify)
    except (ConfigError, DataError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _entries(run: RunConfig) -> tuple[DataSource, ...]:
    if run.data.data_file_list == BUILTIN:
        data = run.data
        return builtin_corpus(data.tokenizer_type, data.tokenizer_model, _log).entries
    require_text(run, os.environ, Path(__file__).resolve().parents[1])
    return parse_data_list(run.data.data_file_list)


def prepare(settings: OrderSettings, folder: Path, workers: int, verify: bool) -> None:
    """Build what is missing with `workers` processes, then print what a run will find.

    Raises:
        DataError: the order needs more of a file than it has.
        ConfigError: the cache cannot be written, or a worker died.
    """
    started = time.monotonic()
    check_up_to = sys.maxsize if verify else CHECKED_AT_START
    if workers > 1:
        # All get the whole task: they divide it as the ranks of a run do.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            tasks = [pool.submit(_build, settings, folder, check_up_to) for _ in range(workers)]
            try:
                for task in tasks:
                    task.result()
            except BrokenProcessPool as error:
                raise ConfigError(
                    f"a worker was killed, perhaps out of memory: use fewer --workers; what the "
                    f"others built stays in {folder}"
                ) from error
    splits = build_megatron_datasets(settings, folder, _log, check_up_to=check_up_to)
    for name, dataset in zip(NAMES, (splits.train, splits.valid, splits.test), strict=True):
        if dataset is not None:
            print(f"{name:5} {len(dataset):>15,} samples of {len(dataset.corpora)} corpora")
    print(f"{folder}: complete after {time.monotonic() - started:.1f} s")


def _build(settings: OrderSettings, folder: Path, check_up_to: int) -> None:
    build_megatron_datasets(settings, folder, _log, check_up_to=check_up_to)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
