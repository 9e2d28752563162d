"""Hugging Face's format: config.json, and weights as safetensors shards with an index, both ways.

Names and settings come from the architecture. Our matrices are theirs (q, k, v, gate and up are
separate), so a conversion is a rename that drops the vocabulary's padding. Memory holds one tensor
and one shard at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES, architecture_of
from megatron.parallel.piece import WEIGHT, Piece


def write_config(shape: ModelShape, folder: Path, dtype: str, eos_token_id: int | None) -> None:
    """Writes config.json."""
    config = ARCHITECTURES[shape.architecture].hugging_face_config(shape) | {
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def read_shape(folder: Path) -> ModelShape:
    """The shape of a Hugging Face model folder.

    Raises:
        ValueError: this framework does not train such a model.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    try:
        name = architecture_of((config.get("architectures") or ["?"])[0])
        return ModelShape(architecture=name, **ARCHITECTURES[name].shape_fields(config))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def export_weights(
    read: Callable[[str], Tensor],
    parameters: Collection[str],
    shape: ModelShape,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int = 5 << 30,
) -> list[Path]:
    """Writes safetensors shards and their index.

    Args:
        read: our parameter name -> the whole parameter.
        parameters: names of all of the model's, each of which must be exported.
        shape: of the model; rows of the vocabulary beyond `vocab_size` are left out.
        folder: where to; exists.
        dtype: of the values written.
        shard_bytes: a shard is closed before it grows beyond this.

    Returns:
        The files written.

    Raises:
        ValueError: a parameter has no name in Hugging Face's layout, or a name no parameter.
    """
    architecture = ARCHITECTURES[shape.architecture]
    names = architecture.hugging_face_names(shape)
    unmatched = sorted(set(names) ^ set(parameters))
    if unmatched:
        raise ValueError(
            f"ARCHITECTURE={shape.architecture} and the weights do not match: one lacks "
            f"{', '.join(unmatched)}"
        )
    shards: list[dict[str, Tensor]] = [{}]
    files: list[Path] = []
    index: dict[str, str] = {}
    size = total = 0

    def close() -> None:
        path = folder / f"model-{len(files) + 1:05d}.safetensors"
        save_file(shards[0], path, metadata={"format": "pt"})
        index.update(dict.fromkeys(shards[0], path.name))
        files.append(path)
        shards[0] = {}

    for ours, theirs in names.items():
        value = read(ours).to(dtype)
        if architecture.is_vocabulary(theirs):
            value = value[: shape.vocab_size]
        value = value.contiguous()
        if shards[0] and size + value.nbytes > shard_bytes:
            close()
            size = 0
        shards[0][theirs] = value
        size += value.nbytes
        total += value.nbytes
    close()
    if len(files) == 1:
        files[0] = files[0].rename(folder / "model.safetensors")
    else:
        about = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(about, indent=1))
    return files


def import_pieces(folder: Path, shape: ModelShape) -> Iterator[Piece]:
    """The weights of a Hugging Face folder as whole, unsharded pieces, one at a time.

    Raises:
        ValueError: a weight is missing, or has another shape than config.json gives.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file")
    where = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            where.update(dict.fromkeys(file.keys(), path))
    architecture = ARCHITECTURES[shape.architecture]
    for ours, theirs in architecture.hugging_face_names(shape).items():
        if theirs not in where:
            raise ValueError(f"{folder} has no weight {theirs}")
        with safe_open(where[theirs], framework="pt") as file:
            value = file.get_tensor(theirs).float()
        if architecture.is_vocabulary(theirs):
            if value.shape[0] != shape.vocab_size:
                raise ValueError(
                    f"{theirs} has {value.shape[0]} rows, config.json gives {shape.vocab_size}"
                )
            padding = shape.padded_vocab_size() - shape.vocab_size
            value = torch.cat([value, value.new_zeros(padding, value.shape[1])])
        yield Piece(ours, tuple(value.shape), None, 0, 1, 0, {WEIGHT: value.reshape(-1)})
