"""A run's data as plain values for its checkpoints (a record), and how two records differ.

A record holds all that decides which tokens sample k holds: a resume with the same record continues
exactly where the run stopped, with any batch size and layout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from megatron.data.data_list import DataSource, ListStage
from megatron.data.dataset import StagedDataset
from megatron.data.indexed import file_dtype
from megatron.data.indexed_header import IndexHeader
from megatron.data.splits import Origin, build_stages

DataRecord = dict[str, Any]
Row = list[Any]

SHOWN = 20
_COLUMNS = ("corpus", "prefix", "tokens", "dtype", "weight", "max_epochs")
_NAMES = {
    "order": "DATA_ORDER",
    "seed": "SEED",
    "seq_length": "SEQ",
    "shares": "TRAIN_SPLIT,VAL_SPLIT,TEST_SPLIT",
    "tokenizer": "tokenizer (fingerprint)",
}


def data_record(
    stages: Sequence[ListStage],
    headers: Mapping[str, IndexHeader],
    *,
    order: str,
    seed: int,
    seq_length: int,
    shares: tuple[float, float, float],
    tokenizer: str,
    settings: Mapping[str, Any] | None = None,
) -> DataRecord:
    """The record of a run.

    Args:
        stages: its lists.
        headers: of their files, by prefix.
        order: DATA_ORDER.
        seed: of the order.
        seq_length: S.
        shares: TRAIN_SPLIT, VAL_SPLIT, TEST_SPLIT.
        tokenizer: its fingerprint.
        settings: what else decides the order, by the name of its variable.
    """
    return {
        "order": order,
        "seed": seed,
        "seq_length": seq_length,
        "shares": list(shares),
        "tokenizer": tokenizer,
        "settings": dict(settings or {}),
        "columns": list(_COLUMNS),
        "stages": [
            {
                "start_tokens": stage.start_tokens,
                "list": stage.path,
                "files": [_row(source, headers[source.prefix]) for source in stage.sources],
            }
            for stage in stages
        ],
    }


def _row(source: DataSource, header: IndexHeader) -> Row:
    prefix = str(Path(source.prefix).absolute())
    return [source.corpus, prefix, header.tokens, header.dtype, source.weight, source.max_epochs]


def stages_of(record: DataRecord) -> tuple[tuple[ListStage, ...], dict[str, IndexHeader]]:
    """The lists of a record, and headers of their files with what reading samples needs."""
    stages, headers = [], {}
    for stage in record["stages"]:
        sources = []
        for line, (corpus, prefix, tokens, dtype, weight, limit) in enumerate(stage["files"], 1):
            sources.append(DataSource(weight, prefix, corpus, line, limit))
            headers[prefix] = IndexHeader(dtype, file_dtype(dtype).itemsize, 0, 0, tokens)
        stages.append(ListStage(stage["start_tokens"], stage["list"], tuple(sources)))
    return tuple(stages), headers


def stateless_order(record: DataRecord, origin: Origin) -> StagedDataset:
    """The order of a record; its files are needed only for reading samples."""
    stages, headers = stages_of(record)
    first, second, third = record["shares"]
    built = build_stages(
        stages, record["seq_length"], (first, second, third), record["seed"], origin, headers
    )
    assert built.train is not None
    return built.train


def drawn_before(
    record: DataRecord, origin: Origin, now: DataRecord, samples: int
) -> dict[str, int]:
    """Draws of each file that a new stage at sample `samples` must not take again.

    Empty where the samples change there (another length, seed, share or order): each file then
    starts over.
    """
    same = all(record[name] == now[name] for name in ("order", "seed", "seq_length", "shares"))
    if not same or record["order"] != "stateless":
        return {}
    return {**origin.drawn, **stateless_order(record, origin).drawn(samples)}


def differences(before: DataRecord, now: DataRecord) -> list[str]:
    """The differences of two records, one line each; empty where they agree.

    Folders do not matter, nor the name of a list: data may move.
    """
    lines = [
        f"{title}: {_text(before[name])} -> {_text(now[name])}"
        for name, title in _NAMES.items()
        if before[name] != now[name]
    ]
    for name in sorted({*before["settings"], *now["settings"]}):
        old, new = before["settings"].get(name), now["settings"].get(name)
        if old != new:
            lines.append(f"{name}: {_text(old)} -> {_text(new)}")
    old_stages, new_stages = before["stages"], now["stages"]
    if len(old_stages) != len(new_stages):
        lines.append(f"stages: {len(old_stages)} -> {len(new_stages)}")
    for number, (old, new) in enumerate(zip(old_stages, new_stages, strict=False)):
        where = f"stage {number}: " if max(len(old_stages), len(new_stages)) > 1 else ""
        if old["start_tokens"] != new["start_tokens"]:
            lines.append(f"{where}start: {old['start_tokens']:,} -> {new['start_tokens']:,} tokens")
        lines += [where + line for line in _file_differences(old["files"], new["files"])]
    return lines


def shortened(lines: Sequence[str]) -> str:
    """The first lines of a difference, and how many more there are."""
    more = len(lines) - SHOWN
    return "\n".join([*(f"  {line}" for line in lines[:SHOWN]),
                      *([f"  ... and {more} more"] if more > 0 else [])])  # fmt: skip


def _file_differences(before: Sequence[Row], now: Sequence[Row]) -> Iterator[str]:
    old, new = _by_name(before), _by_name(now)
    for name in [name for name in old if name not in new]:
        yield f"- file {name}: {old[name][2]:,} tokens, weight {old[name][4]:g}"
    for name in [name for name in new if name not in old]:
        yield f"+ file {name}: {new[name][2]:,} tokens, weight {new[name][4]:g}"
    limits = set()
    for name in [name for name in old if name in new]:
        for column in (2, 3, 4):
            if old[name][column] != new[name][column]:
                yield (
                    f"{_COLUMNS[column]} of {name}: {_text(old[name][column])} -> "
                    f"{_text(new[name][column])}"
                )
        if old[name][5] != new[name][5] and old[name][0] not in limits:
            limits.add(old[name][0])
            yield f"max_epochs of corpus {old[name][0]}: {old[name][5]} -> {new[name][5]}"
    if old.keys() == new.keys() and list(old) != list(new):
        yield "the lines are in another order"


def _by_name(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by corpus and file name, numbered where a list has one name several times."""
    seen: Counter[str] = Counter()
    result = {}
    for row in rows:
        name = f"{row[0]}/{PurePath(row[1]).name}"
        seen[name] += 1
        result[name if seen[name] == 1 else f"{name} ({seen[name]})"] = row
    return result


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, str) and len(value) == 64:
        return value[:12]  # a fingerprint
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)
