"""From a list and the numbers of a run to its three data sets, through the cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron.data.dataset import Splits
from megatron.data.megatron_order.array_file import read_arrays
from megatron.data.megatron_order.build_once import CHECKED_AT_START, CacheFile, Log, build_missing
from megatron.data.megatron_order.order import CorpusOrder, MegatronDataset
from megatron.data.megatron_order.recipes import blend_recipe, corpus_recipe, file_recipe
from megatron.data.megatron_order.requests import NAMES
from megatron.data.megatron_order.settings import (
    CorpusPlan,
    FilePlan,
    OrderSettings,
    SplitPlan,
    plan_splits,
)
from megatron.data.samples import FilePool


def build_megatron_datasets(
    settings: OrderSettings,
    cache: Path,
    log: Log,
    pool: FilePool | None = None,
    check_up_to: int = CHECKED_AT_START,
) -> Splits[MegatronDataset]:
    """Data sets of a run, from the cache; what is missing is built first.

    Every rank calls this, and the ranks divide the building: on one machine, and over machines if
    the cache lies on a shared file system with locks. It returns when all files are complete.

    Args:
        settings: what decides the order.
        cache: folder of the cached arrays.
        log: called with lines about what is built and what was damaged.
        pool: of open token files.
        check_up_to: largest cached file in bytes that is read and checked whole at start.

    Raises:
        DataError: the order needs more of a file than it has.
        ConfigError: the cache cannot be written.
    """
    plans = plan_splits(settings)
    recipes = _Recipes(plans, settings, cache)
    blends = {name: blend_recipe(cache, plan) for name, plan in plans.items()}
    # Without blending a corpus does not need its files' indices: all is built at once.
    early = {} if settings.blend_in_corpus else recipes.corpora(plans)
    build_missing([*blends.values(), *early.values(), *recipes.files.values()], log, check_up_to)
    corpora = early or recipes.corpora(plans)
    build_missing(list(corpora.values()), log, check_up_to)
    pool = FilePool() if pool is None else pool
    datasets: dict[str, MegatronDataset | None] = dict.fromkeys(NAMES)
    for name, plan in plans.items():
        orders = []
        for corpus in plan.corpora:
            recipe = corpora.get(corpus)
            orders.append(
                CorpusOrder(
                    corpus.name,
                    corpus.files,
                    tuple(recipes.files.get(file) for file in corpus.files),
                    recipe.open(log).arrays if recipe else None,
                )
            )
        datasets[name] = MegatronDataset(plan, orders, blends[name].open(log).arrays, log, pool)
    train, valid, test = (datasets[name] for name in ("train", "valid", "test"))
    return Splits(train, valid, test, tuple(_warnings(settings, plans)))


class _Recipes:
    """The file indices of a run, and how many samples each has."""

    def __init__(
        self, plans: Mapping[str, SplitPlan], settings: OrderSettings, cache: Path
    ) -> None:
        self._settings = settings
        self._cache = cache
        self.files: dict[FilePlan, CacheFile] = {
            file: file_recipe(cache, file, settings)
            for plan in plans.values()
            for corpus in plan.corpora
            for file in corpus.files
            if _is_read(file, corpus, settings)
        }

    def corpora(self, plans: Mapping[str, SplitPlan]) -> dict[CorpusPlan, CacheFile]:
        """The order of each corpus that has samples; a blend needs its files' indices."""
        return {
            corpus: corpus_recipe(
                self._cache,
                corpus,
                [self._samples(file) if self._settings.blend_in_corpus else file.request
                 for file in corpus.files],
                self._settings,
            )
            for plan in plans.values()
            for corpus in plan.corpora
            if corpus.size
        }  # fmt: skip

    def _samples(self, file: FilePlan) -> int:
        recipe = self.files.get(file)
        return read_arrays(recipe.path, recipe.key, 0).facts["samples"] if recipe else 0


def _is_read(file: FilePlan, corpus: CorpusPlan, settings: OrderSettings) -> bool:
    """Whether a file gives samples; a blend may need one more of a file than was requested."""
    if not file.documents or not corpus.size:
        return False
    return file.request > 0 or settings.blend_in_corpus


def _warnings(settings: OrderSettings, plans: Mapping[str, SplitPlan]) -> list[str]:
    """Splits with a share that are not read."""
    return [
        f"no {name} samples are needed: EVAL_INTERVAL={settings.eval_interval}, "
        f"EVAL_ITERS={settings.eval_iters}"
        for name, share in zip(NAMES, settings.shares, strict=True)
        if share > 0 and name not in plans
    ]
