"""Hugging Face's format: config.json, and weights as safetensors shards with an index, both ways.

Names and settings come from the architecture. Our matrices are theirs (q, k, v, gate and up are
separate), so a conversion is a rename that drops the vocabulary's padding; where an architecture
says so, several of ours are stacked in one of theirs, or theirs is transposed. Memory holds one
tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES, architecture_of
from megatron.parallel.piece import WEIGHT, Piece

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types that weights are read and written in, and safetensors' names of them."""


def write_config(
    shape: ModelShape,
    folder: Path,
    dtype: str,
    eos_token_id: int | None,
    imported: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json.

    Args:
        shape: of the model.
        folder: where to; exists.
        dtype: of the weights, as torch names it.
        eos_token_id: ends a document; None where that is not known.
        imported: the config.json of the model that training began with. It stays as it was but
            for the type of the weights, and the length where the model was trained on a longer one.
    """
    if imported is None:
        config = ARCHITECTURES[shape.architecture].hugging_face_config(shape) | {
            "torch_dtype": dtype,
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "pad_token_id": None,
        }
    else:
        key = "dtype" if "dtype" in imported else "torch_dtype"
        entry = ARCHITECTURES[shape.architecture].length_entry
        length = max(imported.get(entry) or 0, shape.seq_length)
        config = {**imported, key: dtype, entry: length}
        config.pop("auto_map", None)  # names files of code, which are not kept
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Raises:
        OSError: there is none.
        ValueError: it is not JSON, or no object.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no object")
    return config


def read_shape(folder: Path) -> ModelShape:
    """The shape of a Hugging Face model folder.

    Raises:
        OSError: config.json is missing.
        ValueError: this framework does not train such a model; all reasons are named.
    """
    config = read_config(folder)
    try:
        name = architecture_of((config.get("architectures") or ["?"])[0])
        return ModelShape(architecture=name, **ARCHITECTURES[name].shape_fields(config))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None


def export_weights(
    read: Callable[[str], Tensor],
    shapes: Mapping[str, Sequence[int]],
    shape: ModelShape,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Writes safetensors shards and their index, one tensor at a time.

    Args:
        read: our parameter name -> the whole parameter.
        shapes: all of the model's parameters, each of which must be exported, and their shapes.
        shape: of the model; rows of the vocabulary beyond `vocab_size` are left out.
        folder: where to; exists.
        dtype: of the values written, one of `CODES`.
        shard_bytes: a shard is closed before it grows beyond this.

    Returns:
        The files written.

    Raises:
        ValueError: a parameter has no name in Hugging Face's layout, or a name no parameter; a
            weight is not finite, or not in `dtype`.
        OSError: a file cannot be written.
    """
    architecture = ARCHITECTURES[shape.architecture]
    names = architecture.hugging_face_names(shape)
    _require_equal(names, shapes, shape.architecture)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = total = 0
    parts = _parts(names)
    for theirs, stacked in parts.items():
        rows, rest = sum(shapes[ours][0] for ours in stacked), shapes[stacked[0]][1:]
        if architecture.is_vocabulary(theirs):
            rows = min(rows, shape.vocab_size)
        length = rows * math.prod(rest) * dtype.itemsize
        if shards[-1] and size + length > shard_bytes:
            shards.append({})
            size = 0
        transposed = architecture.is_transposed(theirs)
        shards[-1][theirs] = (*rest, rows) if transposed else (rows, *rest)
        size += length
        total += length

    def value(theirs: str, wanted: tuple[int, ...]) -> Tensor:
        whole = torch.cat([read(ours) for ours in parts[theirs]])
        whole = whole.t() if architecture.is_transposed(theirs) else whole[: wanted[0]]
        converted = whole.to(dtype)
        if not torch.isfinite(converted).all():
            state = f"overflows {dtype}" if torch.isfinite(whole).all() else "is not finite"
            listed = ", ".join(parts[theirs])
            raise ValueError(f"the weight {listed} {state}: nothing is exported")
        return converted

    count, files, index = len(shards), [], {}
    for number, entries in enumerate(shards, 1):
        name = (
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        files.append(folder / name)
        _write_shard(files[-1], entries, dtype, value)
        index.update(dict.fromkeys(entries, name))
    if count > 1:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(about, indent=1))
    return files


def open_weights(folder: Path, shape: ModelShape) -> Callable[[str], Tensor]:
    """Reads the weights of a Hugging Face folder: our name -> the whole parameter, in fp32.

    The vocabulary has our padding. A weight is read, and checked, each time it is asked for.

    Raises:
        ValueError: a weight is missing or unknown; when it is read: not finite, or of another
            shape or type than config.json gives.
    """
    architecture = ARCHITECTURES[shape.architecture]
    names = architecture.hugging_face_names(shape)
    parts = _parts(names)
    where = _whole_model(_weight_files(folder), architecture.hugging_face_prefix, parts)
    missing = sorted(set(names.values()) - set(where))
    if missing:
        raise ValueError(f"{folder} has no weight {_listed(missing)}")
    unknown = sorted(
        name
        for name in set(where) - set(names.values())
        if not architecture.is_left_over(name) and not _is_copy(name, where, shape)
    )
    if unknown:
        raise ValueError(
            f"{folder} holds weights that ARCHITECTURE={shape.architecture} does not have, and "
            f"that would be lost: {_listed(unknown)}"
        )

    def read(ours: str) -> Tensor:
        theirs = names[ours]
        path, stored_as = where[theirs]
        stored = _read(path, stored_as)
        if stored.dtype not in CODES:
            raise ValueError(f"{path}: {theirs} is {stored.dtype}, not a plain weight")
        if not torch.isfinite(stored).all():
            raise ValueError(f"{path}: {theirs} is not finite")
        value = stored.float()
        if architecture.is_transposed(theirs):
            value = value.t()
        stacked = parts[theirs]
        if len(stacked) > 1:  # all of one size
            value = value.chunk(len(stacked))[stacked.index(ours)]
        if not architecture.is_vocabulary(theirs):
            return value
        if value.shape[0] != shape.vocab_size:
            raise ValueError(
                f"{theirs} has {value.shape[0]} rows, config.json gives {shape.vocab_size}"
            )
        padding = shape.padded_vocab_size() - shape.vocab_size
        return torch.cat([value, value.new_zeros(padding, value.shape[1])])

    return read


def import_pieces(folder: Path, shape: ModelShape) -> Iterator[Piece]:
    """The weights of a Hugging Face folder as whole, unsharded pieces, one at a time.

    Raises:
        ValueError: as of `open_weights`.
    """
    read = open_weights(folder, shape)
    for ours in ARCHITECTURES[shape.architecture].hugging_face_names(shape):
        value = read(ours)
        yield Piece(ours, tuple(value.shape), None, 0, 1, 0, {WEIGHT: value.reshape(-1)})


def _require_equal(
    names: Mapping[str, str], shapes: Mapping[str, Sequence[int]], architecture: str
) -> None:
    nameless, absent = sorted(set(shapes) - set(names)), sorted(set(names) - set(shapes))
    problems = []
    if nameless:
        problems.append(f"{len(nameless)} have no Hugging Face name: {_listed(nameless)}")
    if absent:
        problems.append(f"the checkpoint has no {_listed(absent)}")
    if problems:
        raise ValueError(
            f"ARCHITECTURE={architecture} and the parameters of the checkpoint do not match, so "
            f"nothing is exported: {'; '.join(problems)}"
        )


def _write_shard(
    path: Path,
    entries: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    value: Callable[[str, tuple[int, ...]], Tensor],
) -> None:
    """A safetensors file: 8 bytes with the header's length, the header in JSON, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in entries.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in entries.items():
            data = value(name, shape).contiguous()
            assert tuple(data.shape) == shape, f"{name}: {tuple(data.shape)} {shape}"
            file.write(data.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _parts(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Their name -> ours that are stacked in it, in order."""
    parts: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        parts.setdefault(theirs, []).append(ours)
    return parts


InFile = tuple[Path, str]  # a file, and the name of a tensor in it


def _whole_model(
    files: Mapping[str, Path], prefix: str, known: Collection[str]
) -> dict[str, InFile]:
    """Name in a whole model -> its place; a bare model's files lack the prefix."""
    bare = not any(name in known for name in files)
    return {prefix * bare + name: (path, name) for name, path in files.items()}


def _weight_files(folder: Path) -> dict[str, Path]:
    """Name -> file of each weight, as the index says; without one, all that the files hold."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [folder / name for name in names]
    else:
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file")
    where = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                where.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    return where


def _is_copy(name: str, where: Mapping[str, InFile], shape: ModelShape) -> bool:
    """Whether a weight is the head of a model with tied embeddings, equal to the embedding."""
    embedding, head = ARCHITECTURES[shape.architecture].vocabulary_names
    if not shape.tie_embeddings or name != head:
        return False
    return torch.equal(_read(*where[name]), _read(*where[embedding]))


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        value: Tensor = file.get_tensor(name)
    return value


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
