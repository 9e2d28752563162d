"""What a run will read of a data-file list: tokens, share and epochs of each corpus, and problems.

Reads only headers and counts tokens, not samples: no torch, one second for thousands of files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megatron.config.errors import DataError
from megatron.data.data_list import BUILTIN, DataSource, ListStage, parse_data_stages, require_plain
from megatron.data.indexed_header import IndexHeader, read_header

SHOWN_PROBLEMS = 10
_INFINITE = float("inf")


class CorpusSurvey(NamedTuple):
    """What a run reads of one corpus.

    Attributes:
        files: different files of it, over all stages.
        share: of the run's samples.
        tokens: of its files.
        epochs: passes over the training share of its tokens.
        max_epochs: the limit that the last stage sets; None without.
    """

    name: str
    files: int
    share: float
    tokens: int
    epochs: float
    max_epochs: float | None = None


class DataSurvey(NamedTuple):
    """The corpora of a list, and one line for each thing that is wrong with it.

    Attributes:
        stages: first token and list of each stage that the run reaches.
    """

    corpora: tuple[CorpusSurvey, ...]
    problems: tuple[str, ...]
    stages: tuple[tuple[int, str], ...] = ()

    def require(self) -> None:
        """Raise DataError where anything is wrong."""
        if self.problems:
            more = len(self.problems) - SHOWN_PROBLEMS
            lines = [*self.problems[:SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
            raise DataError("\n".join(lines))


def survey_data(
    data_file_list: str,
    train_tokens: int,
    train_share: float,
    seq_length: int,
    name: str = "DATA_FILE_LIST",
    order: str = "stateless",
) -> DataSurvey:
    """Check every file of a list and count its tokens, without reading them.

    Args:
        data_file_list: path of the list, or `builtin` (nothing to check: it is made at first use).
        train_tokens: tokens of the run.
        train_share: share of each file used for training, 0 .. 1.
        seq_length: tokens of a sample; it takes one more to predict the last.
        name: the variable or flag that named the list.
        order: DATA_ORDER, which decides what a list may hold.
    """
    if data_file_list == BUILTIN:
        return DataSurvey((), ())
    try:
        stages = parse_data_stages(data_file_list, name)
        if order == "megatron":
            require_plain(stages)
    except DataError as error:
        return DataSurvey((), (str(error),))
    return survey_stages(stages, train_tokens, train_share, seq_length, order=order)


def survey_stages(
    stages: Sequence[ListStage],
    train_tokens: int,
    train_share: float,
    seq_length: int,
    known: Mapping[str, IndexHeader] | None = None,
    order: str = "stateless",
) -> DataSurvey:
    """As `survey_data`, for lists that have been read; `known` are headers by prefix."""
    # Megatron's order joins the epochs of a file, so a sample may be longer than the file.
    least = 0 if order == "megatron" else seq_length + 1
    tokens, problems = _tokens_of_files(stages, least, known or {})
    seen: dict[_File, float] = {}
    for stage, stop in zip(stages, [*(s.start_tokens for s in stages[1:]), None], strict=True):
        end = train_tokens if stop is None else min(stop, train_tokens)
        if end <= stage.start_tokens:
            continue
        missing = _read_stage(stage, end - stage.start_tokens, tokens, train_share, seen)
        if missing >= seq_length and not problems:
            problems.append(
                f"{stage.path}: with its max_epochs the list gives "
                f"{end - stage.start_tokens - missing:,.0f} of the {end - stage.start_tokens:,} "
                "tokens needed of it; raise max_epochs, add data or lower TRAIN_ITERS"
            )
    corpora = _corpora(stages, tokens, train_share, seen, train_tokens)
    used = tuple((s.start_tokens, s.path) for s in stages if s.start_tokens < train_tokens)
    return DataSurvey(corpora, tuple(problems), used)


_File = tuple[str, str]  # corpus and prefix


def _tokens_of_files(
    stages: Sequence[ListStage], least: int, known: Mapping[str, IndexHeader]
) -> tuple[dict[str, int], list[str]]:
    """Tokens by prefix, 0 where a file cannot be read, and what is wrong with the lines.

    A file that is read needs `least` tokens.
    """
    tokens: dict[str, int] = {}
    problems: list[str] = []
    for stage in stages:
        for source in stage.sources:
            try:
                if source.prefix not in tokens:
                    tokens[source.prefix] = 0
                    header = known.get(source.prefix) or read_header(source.prefix)
                    tokens[source.prefix] = header.tokens
                _require_sample(source, tokens[source.prefix], least)
            except DataError as error:
                problems.append(f"{stage.path}:{source.line}: {error}")
    return tokens, problems


def _read_stage(
    stage: ListStage,
    wanted: float,
    tokens: dict[str, int],
    train_share: float,
    seen: dict[_File, float],
) -> float:
    """Add what a stage reads of each file to `seen`; returns the tokens that it lacks."""
    corpora: dict[str, list[DataSource]] = {}
    for source in stage.sources:
        corpora.setdefault(source.corpus, []).append(source)
    limits: dict[str, list[float]] = {}
    for corpus, sources in corpora.items():
        limits[corpus] = [
            _INFINITE
            if source.max_epochs is None
            else max(
                source.max_epochs * tokens[source.prefix] * train_share
                - seen.get((corpus, source.prefix), 0.0),
                0.0,
            )
            for source in sources
        ]
    weights = [sum(source.weight for source in sources) for sources in corpora.values()]
    shares = fill(weights, [sum(limits[corpus]) for corpus in corpora], wanted)
    for (corpus, sources), share in zip(corpora.items(), shares, strict=True):
        amounts = fill([source.weight for source in sources], limits[corpus], share)
        for source, amount in zip(sources, amounts, strict=True):
            key = (corpus, source.prefix)
            seen[key] = seen.get(key, 0.0) + amount
    return wanted - sum(shares)


def fill(weights: Sequence[float], limits: Sequence[float], amount: float) -> list[float]:
    """Parts of `amount` in proportion to `weights`, none above its limit.

    The excess of a limited part goes to the others, in proportion. The parts add up to `amount` or,
    where all are limited, to the sum of the limits.
    """
    parts = list(limits)
    left, weight = amount, sum(weights)
    reached_at = [
        limit / share if share else _INFINITE for limit, share in zip(limits, weights, strict=True)
    ]
    for place in sorted(range(len(weights)), key=reached_at.__getitem__):
        parts[place] = min(limits[place], left * weights[place] / weight) if weight > 0 else 0.0
        left -= parts[place]
        weight -= weights[place]
    return parts


def _corpora(
    stages: Sequence[ListStage],
    tokens: dict[str, int],
    train_share: float,
    seen: dict[_File, float],
    train_tokens: int,
) -> tuple[CorpusSurvey, ...]:
    files: dict[str, dict[str, None]] = {}
    limits: dict[str, float | None] = {}
    for stage in stages:
        for source in stage.sources:
            files.setdefault(source.corpus, {})[source.prefix] = None
            limits[source.corpus] = source.max_epochs
    corpora = []
    for name in sorted(files):
        total = sum(tokens[prefix] for prefix in files[name])
        read = sum(seen.get((name, prefix), 0.0) for prefix in files[name])
        epochs = read / (total * train_share) if total else 0.0
        share = read / train_tokens if train_tokens else 0.0
        corpora.append(CorpusSurvey(name, len(files[name]), share, total, epochs, limits[name]))
    return tuple(corpora)


def _require_sample(source: DataSource, count: int, least: int) -> None:
    """Refuse a file that is read but shorter than a sample; 0 tokens: refused before."""
    if source.weight and 0 < count < least:
        raise DataError(
            f"{source.prefix}.bin holds {count} tokens, one sample of SEQ={least - 1} needs "
            f"{least - 1} + 1; lower SEQ or remove the line"
        )


def corpora_table(corpora: Sequence[CorpusSurvey]) -> list[tuple[str, ...]]:
    """A table of the corpora as rows of text, the header first."""
    rows: list[tuple[str, ...]] = [("corpus", "files", "tokens", "share", "epochs", "max_epochs")]
    rows += [
        (c.name, str(c.files), f"{c.tokens:,}", f"{c.share:.4f}", f"{c.epochs:.4f}",
         "-" if c.max_epochs is None else f"{c.max_epochs:g}")
        for c in corpora
    ]  # fmt: skip
    return rows
