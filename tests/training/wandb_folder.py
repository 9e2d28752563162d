"""Reads an offline Weights & Biases run: LevelDB log blocks of protobuf records."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
FILE_HEADER = 7  # ":W&B", magic, version
CHUNK_HEADER = 7  # checksum (4), length (2), type (1)
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def history(path: Path) -> dict[int, dict[str, Any]]:
    """W&B's own step -> the row that was logged, without its `_` columns."""
    rows = {}
    for record in _records(path):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or item.nested_key[0]: item.value_json for item in record.history.item
            }
            named = {key: json.loads(value) for key, value in items.items()}
            assert named["_step"] not in rows
            rows[named["_step"]] = {k: v for k, v in named.items() if not k.startswith("_")}
    return rows


def summary(path: Path) -> dict[str, Any]:
    """What the run's script put into the summary."""
    found = [r.summary for r in _records(path) if r.WhichOneof("record_type") == "summary"]
    updates = [item for one in found for item in one.update if item.key]
    return {item.key: json.loads(item.value_json) for item in updates}


def run(path: Path) -> Any:
    """The run's own record: run_id, project, display_name, config."""
    return next(r.run for r in _records(path) if r.WhichOneof("record_type") == "run")


def config(path: Path) -> dict[str, Any]:
    """The run's configuration."""
    return {item.key: json.loads(item.value_json) for item in run(path).config.update}


def metrics(path: Path) -> dict[str, str]:
    """Glob of a metric -> its x axis."""
    found = [r.metric for r in _records(path) if r.WhichOneof("record_type") == "metric"]
    return {metric.glob_name: metric.step_metric for metric in found}


def _records(path: Path) -> Iterator[Any]:
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        yield record


def _payloads(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, parts = FILE_HEADER, b""
    while position < len(data):
        if BLOCK - position % BLOCK < CHUNK_HEADER:  # a header never crosses a block's end
            position += BLOCK - position % BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + CHUNK_HEADER
        chunk = data[start : start + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
        position = start + length
