"""From a run's configuration to its data: lists, files checked by all ranks, and the sample order.

The result is kept as a record, which a resume compares with the checkpoint's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.checkpoint.state import DataStage, RunState
from megatron.config.errors import DataError
from megatron.config.schema import RunConfig, by_key
from megatron.data.data_list import (
    BUILTIN,
    ListStage,
    parse_data_list,
    parse_data_stages,
    require_plain,
)
from megatron.data.data_record import DataRecord, data_record, differences, drawn_before, shortened
from megatron.data.dataset import LaterDataset, SampleSource, Splits, StagedDataset
from megatron.data.indexed_header import IndexHeader
from megatron.data.prepare.builtin import builtin_corpus
from megatron.data.prepare.checks import Report, check_files
from megatron.data.prepare.tokenizer import Tokenizer, build_tokenizer
from megatron.data.splits import Origin, build_datasets, build_stages
from megatron.data.survey import survey_stages
from megatron.launch.heartbeat import Heartbeat
from megatron.parallel.control import Control
from megatron.plan.report import epochs_text
from megatron.training.corpus_loss import CorpusLosses
from megatron.training.data_order import megatron_splits, recorded_settings
from megatron.training.log import ALIKE
from megatron.training.rank_tokenizer import shared_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """What is trained on.

    Attributes:
        stages: the lists, and the token from which each is used.
        headers: of their files, by prefix.
        splits: train, validation and test data of a run from its start.
        tokenizer: that made them; only rank 0's turns ids into text.
        record: all that decides the samples, for checkpoints.
        corpus_losses: set with LOG_CORPUS_LOSS.
    """

    stages: tuple[ListStage, ...]
    headers: Mapping[str, IndexHeader]
    splits: Splits[SampleSource]
    tokenizer: Tokenizer
    record: DataRecord
    corpus_losses: CorpusLosses | None


def build_data(run: RunConfig, control: Control, heartbeat: Heartbeat | None = None) -> Data:
    """Opens and checks the data; a collective of all ranks, which divide the checks.

    Each file that is checked is a tick of the heartbeat.

    Raises:
        DataError: anything is wrong with it, with file and fix.
    """
    stages, tokenizer = _open(run, control)
    sources = [source for stage in stages for source in stage.sources]
    heartbeat = heartbeat or Heartbeat()
    headers = _checked(run, stages, tokenizer, control, heartbeat)
    splits = ORDERS[run.data.order](run, stages, headers)
    splits = _with_own_lists(run, splits, tokenizer, control, heartbeat)
    if splits.train is None:
        raise DataError("TRAIN_SPLIT=0 leaves nothing to train on")
    for warning in splits.warnings:
        log.info(warning)
    log.info(f"epochs of each corpus in this run:\n{_epochs(run, stages, headers)}")
    corpora = sorted({source.corpus for source in sources})
    return Data(
        stages,
        headers,
        splits,
        tokenizer,
        run_record(run, stages, headers, tokenizer.fingerprint()),
        CorpusLosses(corpora) if run.log.log_corpus_loss else None,
    )


def _stateless(
    run: RunConfig, stages: tuple[ListStage, ...], headers: Mapping[str, IndexHeader]
) -> Splits[SampleSource]:
    return build_stages(stages, run.model.seq_length, _shares(run), run.train.seed, headers=headers)


def _megatron(
    run: RunConfig, stages: tuple[ListStage, ...], headers: Mapping[str, IndexHeader]
) -> Splits[SampleSource]:
    del headers
    require_plain(stages)
    return megatron_splits(run, stages[0].sources, log.info)


Order = Callable[
    [RunConfig, tuple[ListStage, ...], Mapping[str, IndexHeader]], Splits[SampleSource]
]
ORDERS: dict[str, Order] = {"stateless": _stateless, "megatron": _megatron}
"""DATA_ORDER -> makes the data sets of a run from its lists and the headers of their files."""


def train_data(run: RunConfig, data: Data, state: RunState) -> SampleSource:
    """The training samples of a run at `state`, by their number in the run.

    Raises:
        DataError: the limits of epochs leave fewer samples than the run has steps.
    """
    origin = origin_of(state)
    train = data.splits.train
    assert train is not None
    if not isinstance(train, StagedDataset):
        return LaterDataset(origin.samples, train) if origin.samples else train
    if origin.samples:
        train = build_stages(
            data.stages, run.model.seq_length, _shares(run), run.train.seed, origin, data.headers
        ).train
        assert train is not None
    left = run.total_samples - run.batch_sizes.consumed(state.iteration)
    short = train.shortage(state.consumed_samples + max(left, 0))
    if short is not None:
        number, total, wanted = short
        raise DataError(
            f"{data.stages[number].path}: with its max_epochs the list gives {total:,} samples, "
            f"the run needs {wanted:,} of it; raise max_epochs, add data or lower TRAIN_ITERS"
        )
    return train


def run_record(
    run: RunConfig, stages: Sequence[ListStage], headers: Mapping[str, IndexHeader], tokenizer: str
) -> DataRecord:
    """All that decides the samples of a run from its start; `tokenizer` is a fingerprint."""
    return data_record(
        stages,
        headers,
        order=run.data.order,
        seed=run.train.seed,
        seq_length=run.model.seq_length,
        shares=_shares(run),
        tokenizer=tokenizer,
        # Megatron's order depends on how long the run was planned to be.
        settings=recorded_settings(run) if run.data.order == "megatron" else None,
    )


def origin_of(state: RunState) -> Origin:
    """Where the current data of a run began."""
    if not state.data:
        return Origin()
    stage = state.data[-1]
    return Origin(stage.samples, stage.tokens, stage.drawn)


def continue_data(state: RunState, record: DataRecord, allow_change: bool, where: str) -> RunState:
    """The state of a run that continues with the data of `record`.

    Args:
        state: from a checkpoint; its last stage holds the record of the data until then.
        record: of this start.
        allow_change: another record begins a stage at the state's sample.
        where: the checkpoint, for messages.

    Raises:
        DataError: the data is not what the checkpoint was trained on; shows what changed.
    """
    stage = DataStage(state.iteration, state.consumed_samples, state.consumed_tokens, record, {})
    if not state.data:  # a new run, or one imported at this step: its samples count as drawn
        return dataclasses.replace(state, data=(DataStage(0, 0, 0, record, {}),))
    last = state.data[-1]
    changes = differences(last.record, record)
    if not changes:  # folders may have changed: keep the current ones
        same = dataclasses.replace(last, record=record)
        return dataclasses.replace(state, data=(*state.data[:-1], same))
    if not allow_change:
        raise DataError(
            f"the data is not what {where} was trained on:\n{shortened(changes)}\n"
            "Set it back, start a new run with another RUN_NAME, or begin a new stage at sample "
            f"{state.consumed_samples:,} with --allow-data-change (ALLOW_DATA_CHANGE=1)"
        )
    origin = Origin(last.samples, last.tokens, last.drawn)
    drawn = drawn_before(last.record, origin, record, state.consumed_samples)
    log.warning(
        f"a new stage of data begins at step {state.iteration}, sample "
        f"{state.consumed_samples:,}:\n{shortened(changes)}\n  "
        + ("each file continues where it stopped" if drawn else "all files start over"),
        extra=ALIKE,
    )
    return dataclasses.replace(state, data=(*state.data, dataclasses.replace(stage, drawn=drawn)))


def _open(run: RunConfig, control: Control) -> tuple[tuple[ListStage, ...], Tokenizer]:
    """Lists and tokenizer; the built-in corpus is made by one rank."""
    data = run.data
    if data.data_file_list != BUILTIN:
        stages = parse_data_stages(data.data_file_list)
        named = data.tokenizer_type, data.tokenizer_model, run.model.vocab_size
        return stages, shared_tokenizer(lambda: build_tokenizer(*named), control)
    if control.rank == 0:
        builtin_corpus(data.tokenizer_type, data.tokenizer_model, log.info)
    control.barrier()
    corpus = builtin_corpus(data.tokenizer_type, data.tokenizer_model, log.debug)
    return (ListStage(0, BUILTIN, corpus.entries),), corpus.tokenizer


def _require_one_list(stages: tuple[ListStage, ...], control: Control) -> None:
    """Raises DataError on all ranks where one has read another list than rank 0."""
    lines = [
        (stage.path, f"stage {stage.start_tokens} weight {source.weight} {source.prefix} "
         f"{source.corpus} max_epochs {source.max_epochs}")
        for stage in stages for source in stage.sources
    ]  # fmt: skip
    digests = control.all_gather(hashlib.sha256(repr(lines).encode()).digest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    told = control.rank in (0, other)
    every = control.all_gather((socket.gethostname(), lines) if told else None)
    (host, own), (other_host, others) = every[0] or ("", []), every[other] or ("", [])
    nothing = ("", "nothing more")
    pairs = itertools.zip_longest(own, others, fillvalue=nothing)
    (path, line), (other_path, other_line) = next(pair for pair in pairs if pair[0] != pair[1])
    raise DataError(
        f"{path or other_path} is another list on other hosts:\n"
        f"  rank 0 on {host}: {line}\n  rank {other} on {other_host}: {other_line}\n"
        + (
            "The built-in corpus needs one folder on all hosts: set XDG_CACHE_HOME to it"
            if path == BUILTIN
            else "Put the list where all hosts see one file"
        )
    )


def _checked(
    run: RunConfig,
    stages: Iterable[ListStage],
    tokenizer: Tokenizer,
    control: Control,
    heartbeat: Heartbeat,
) -> Mapping[str, IndexHeader]:
    """Headers of all files; each is read and checked by one rank."""
    stages = tuple(stages)
    _require_one_list(stages, control)
    sources = [source for stage in stages for source in stage.sources]
    files = len({source.prefix for source in sources})
    heartbeat.enter("data", total=-(-files // control.size))
    own = check_files(
        sources,
        run.model.vocab_size,
        tokenizer,
        control.rank,
        control.size,
        ends=run.data.follows_documents,
        tick=heartbeat.tick,
    )
    whole = Report.joined(control.all_gather(own))
    whole.raise_problems()
    for warning in whole.warnings():
        log.warning(warning, extra=ALIKE)
    return whole.headers


def _with_own_lists(
    run: RunConfig,
    splits: Splits[SampleSource],
    tokenizer: Tokenizer,
    control: Control,
    heartbeat: Heartbeat,
) -> Splits[SampleSource]:
    """The splits, with validation and test data of VALID_DATA_FILE_LIST and TEST_DATA_FILE_LIST.

    Their order is the stateless one at every DATA_ORDER: it holds for any number of evaluations.
    """
    lists = {"valid": run.data.valid_data_file_list, "test": run.data.test_data_file_list}
    for split, path in lists.items():
        if path is None:
            continue
        name = by_key()[f"data.{split}_data_file_list"].name
        sources = parse_data_list(path, name)
        if limited := [source.corpus for source in sources if source.max_epochs is not None]:
            raise DataError(
                f"{name}={path}: max_epochs of {limited[0]}: every evaluation reads the same "
                "samples, so there is nothing to limit; remove the line"
            )
        headers = _checked(run, (ListStage(0, path, sources),), tokenizer, control, heartbeat)
        shares, seed = (0.0, 1.0, 0.0), run.train.seed
        built = build_datasets(sources, run.model.seq_length, shares, seed, headers=headers)
        if built.valid is None:
            raise DataError(f"{name}={path}: {'; '.join(built.warnings)}")
        own: dict[str, Any] = {split: built.valid}
        splits = dataclasses.replace(splits, **own)
    return splits


def _shares(run: RunConfig) -> tuple[float, float, float]:
    return run.data.train_split, run.data.valid_split, run.data.test_split


def _epochs(
    run: RunConfig, stages: tuple[ListStage, ...], headers: Mapping[str, IndexHeader]
) -> str:
    shares = _shares(run)
    tokens, share = run.total_samples * run.model.seq_length, shares[0] / sum(shares)
    survey = survey_stages(
        stages, tokens, share, run.model.seq_length, headers, order=run.data.order
    )
    return epochs_text(survey)
