"""A run's steps looked up afterwards: which samples a step had, and where each came from.

Reads the run's folder alone (run.json, metrics.jsonl, the manifests of its checkpoints); needs no
process group and no model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from megatron.checkpoint import store
from megatron.checkpoint.state import DataStage
from megatron.config.errors import ConfigError, DataError
from megatron.config.schema import RUN_FILE, RunConfig, read_run
from megatron.data.data_list import BUILTIN, ListStage, parse_data_stages
from megatron.data.data_record import stateless_order
from megatron.data.dataset import LaterDataset, StagedDataset
from megatron.data.indexed import IndexedDataset
from megatron.data.indexed_header import read_header
from megatron.data.megatron_order.order import MegatronDataset
from megatron.data.prepare.builtin import builtin_corpus
from megatron.data.prepare.documents import document_range, samples_with
from megatron.data.prepare.tokenizer import Tokenizer, build_tokenizer
from megatron.data.splits import Origin
from megatron.training.data_order import cache_folder, recorded_order
from megatron.training.metrics_file import read
from megatron.training.run_data import run_record
from megatron.training.suspects import ExplainedSample, explained


class RunHistory:
    """The steps of a run, as recorded in its folder."""

    def __init__(self, folder: Path) -> None:
        """Reads the folder of a run.

        Raises:
            ConfigError: it is not a run's folder.
        """
        if not (folder / RUN_FILE).is_file():
            raise ConfigError(
                f"--run {folder}: it holds no {RUN_FILE}; give a run's folder, e.g. runs/NAME"
            )
        self.folder = folder
        self.run: RunConfig = read_run(folder / RUN_FILE)
        checkpoints = store.committed(self.run.checkpoint_folder)  # the newest first
        self._states = [one.state() for one in checkpoints]
        self._stages = self._data_stages()
        self._orders: dict[int, StagedDataset | MegatronDataset] = {}  # by first sample

    def samples(self, step: int) -> range:
        """Samples of a step, taken, skipped or to come.

        Raises:
            DataError: the batch size changed around the step and no record shows where.
        """
        if step < 1:
            raise ConfigError(f"--step {step}: steps count from 1")
        after = bisect_left(self._borders, (step, 0))
        first, start, size, rest = self._stretch(after)
        if rest:
            raise DataError(
                f"between steps {first} and {self._borders[after][0]} the batch size changed, and "
                "metrics.jsonl does not show where; set LOG_INTERVAL=1 in later runs"
            )
        start += (step - 1 - first) * size
        return range(start, start + size)

    def step_status(self, step: int) -> str:
        """`taken`, `skipped` (not trained on) or `to come`."""
        if step > self._points[-1][0]:
            return "to come"
        ranges = [*self.run.skip_ranges]
        for state in self._states[:1]:
            ranges += state.skip_ranges
        return "skipped" if any(a <= step <= b for a, b in ranges) else "taken"

    def step_of(self, sample: int) -> int:
        """The step that a sample belongs to."""
        after = bisect_left([samples for _, samples in self._borders], sample + 1)
        first, start, size, _ = self._stretch(after)
        return first + 1 + (sample - start) // size

    def explain(self, sample: int) -> ExplainedSample:
        """Where a sample comes from, and its tokens."""
        order, _ = self._order_of(sample)
        if isinstance(order, MegatronDataset):
            return explained(LaterDataset(self._stage_of(sample).samples, order), sample)
        return explained(order, sample)

    def find_document(self, prefix: str, document: int) -> Iterator[tuple[int, int, int]]:
        """(step, sample, epoch) of each time a document is read until TRAIN_ITERS, in order.

        Raises:
            ConfigError: no list of the run has the file.
            DataError: the file has no such document.
        """
        path = str(Path(prefix.partition(".bin")[0]).absolute())
        lists = [part for stage in self._stages for part in stage.record["stages"]]
        known = {row[1] for part in lists for row in part["files"]}
        if path not in known:
            raise ConfigError(
                f"--find-document {prefix}: no list of the run has {path}; it has, e.g., "
                + ", ".join(sorted(known)[:3])
            )
        total = self.samples(self.run.train.train_iters).stop
        stops = [min(stage.samples, total) for stage in self._stages[1:]] + [total]
        found: list[tuple[int, int]] = []
        for stage, stop in zip(self._stages, stops, strict=True):
            if stop <= stage.samples:
                continue
            order, sequence = self._order_of(stage.samples)
            if isinstance(order, MegatronDataset):
                samples = [stage.samples + own for own in order.uses(path, document)]
                found += [(k, self.explain(k).epoch) for k in samples if k < stop]
            else:
                found += _stateless_uses(order, path, document, sequence, stop)
        for sample, epoch in sorted(found):
            yield self.step_of(sample), sample, epoch

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer."""
        data = self.run.data
        if data.data_file_list == BUILTIN:
            return builtin_corpus(data.tokenizer_type, data.tokenizer_model).tokenizer
        return build_tokenizer(data.tokenizer_type, data.tokenizer_model, self.run.model.vocab_size)

    @cached_property
    def _points(self) -> list[tuple[int, int]]:
        """(step, samples consumed after it) where that is known, the start first."""
        points = {0: 0}
        metrics = self.folder / "metrics.jsonl"
        for record in read(metrics) if metrics.is_file() else []:
            if "consumed_samples" in record:
                points[record["iteration"]] = record["consumed_samples"]
        points |= {state.iteration: state.consumed_samples for state in self._states}
        return sorted(points.items())

    @cached_property
    def _borders(self) -> list[tuple[int, int]]:
        """The points, and those where a growing batch changes its size between or after them."""
        found, sizes = dict(self._points), self.run.batch_sizes
        for (step, samples), until in zip(self._points, [*self._points[1:], None], strict=True):
            offset = samples - sizes.consumed(step)
            if until is not None and until[1] != offset + sizes.consumed(until[0]):
                continue  # these steps had other sizes than run.json says
            changes = [n for n, _, _ in sizes.stretches() if n > step]
            inside = [n for n in changes if until is None or n < until[0]]
            found |= {n: offset + sizes.consumed(n) for n in inside}
        return sorted(found.items())

    def _stretch(self, after: int) -> tuple[int, int, int, int]:
        """The steps before border `after`, or after the last: equal in size but for a remainder.

        Returns:
            (steps, samples) consumed before them, samples per step, samples left over.
        """
        steps, samples = self._borders[after - 1]
        if after == len(self._borders):
            return steps, samples, self.run.train.global_batch_size, 0
        until_step, until_samples = self._borders[after]
        return steps, samples, *divmod(until_samples - samples, until_step - steps)

    def _order_of(self, sample: int) -> tuple[StagedDataset | MegatronDataset, int]:
        """The order that a sample is of, and its sequence length."""
        stage = self._stage_of(sample)
        if stage.samples not in self._orders:
            self._orders[stage.samples] = self._build(stage)
        return self._orders[stage.samples], stage.record["seq_length"]

    def _stage_of(self, sample: int) -> DataStage:
        return [stage for stage in self._stages if stage.samples <= sample][-1]

    def _build(self, stage: DataStage) -> StagedDataset | MegatronDataset:
        if stage.record["order"] == "stateless":
            return stateless_order(stage.record, Origin(stage.samples, stage.tokens, stage.drawn))
        return recorded_order(stage.record, cache_folder(self.run))

    def _data_stages(self) -> tuple[DataStage, ...]:
        """The data that the run was trained on; without a checkpoint, that of its settings."""
        known = next((state.data for state in self._states if state.data), None)
        if known is not None:
            return known
        lists = self._lists()
        prefixes = {source.prefix for part in lists for source in part.sources}
        headers = {prefix: read_header(prefix) for prefix in prefixes}
        record = run_record(self.run, lists, headers, tokenizer="")
        return (DataStage(0, 0, 0, record, {}),)

    def _lists(self) -> tuple[ListStage, ...]:
        data = self.run.data
        if data.data_file_list != BUILTIN:
            return parse_data_stages(data.data_file_list)
        corpus = builtin_corpus(data.tokenizer_type, data.tokenizer_model)
        return (ListStage(0, BUILTIN, corpus.entries),)


def _stateless_uses(
    order: StagedDataset, prefix: str, document: int, sequence: int, end: int
) -> Iterator[tuple[int, int]]:
    """Sample of the run, and epoch, of each sample before `end` with tokens of a document."""
    firsts = [first for first, _ in order.parts]
    for (first, dataset), stop in zip(order.parts, [*firsts[1:], end], strict=True):
        files = {file.prefix for corpus in dataset.corpora for file in corpus.files}
        if prefix in files and min(stop, end) > first:
            tokens = document_range(IndexedDataset(prefix, check=False), document)
            for position, epoch in samples_with(
                dataset, prefix, tokens, sequence, min(stop, end) - first
            ):
                yield first + position, epoch
