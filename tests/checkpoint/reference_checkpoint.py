"""Writes checkpoints in Megatron-DeepSpeed's format from known tensors, with loops of its own.

The layout of the files, of their keys and of the flat partitions is that of the reference's
`save_checkpoint` with DeepSpeed 0.19; `tests/checkpoint/test_reference_deepspeed.py` has DeepSpeed
itself write them.
"""

from __future__ import annotations

import argparse
import random
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

Tensors = dict[str, Tensor]
STATES = ("fp32", "exp_avg", "exp_avg_sq")
HIDDEN, HEADS, GROUPS, FFN, LAYERS, VOCAB, SEQ = 64, 8, 4, 96, 4, 200, 32


@dataclass(frozen=True)
class Written:
    """A run of the reference.

    Attributes:
        tp, pp, dp, zero: of its layout.
        tied: one matrix for embedding and head.
        dtype: of the model.
        step: at which it was saved.
        args: more of its arguments.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    tied: bool = False
    dtype: torch.dtype = torch.bfloat16
    step: int = 5
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return f"global_step{self.step}"

    @property
    def padded(self) -> int:
        return -(-VOCAB // (128 * self.tp)) * 128 * self.tp


def known(tied: bool = False) -> dict[str, Tensors]:
    """State -> Hugging Face name -> values; second moments are positive."""
    generator = torch.Generator().manual_seed(3)
    width, per_key = HIDDEN // HEADS, GROUPS * HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "input_layernorm": (HIDDEN,),
            "self_attn.q_proj": (HEADS * width, HIDDEN),
            "self_attn.k_proj": (per_key, HIDDEN),
            "self_attn.v_proj": (per_key, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "post_attention_layernorm": (HIDDEN,),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    shapes["model.norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)

    def draw(state: str, name: str) -> Tensor:
        values = torch.randn(shapes[name], generator=generator)
        if state == "exp_avg_sq":
            return values.square() * 1e-6
        if state == "exp_avg":
            return values * 1e-3
        return 1 + 0.1 * values if "norm" in name else 0.1 * values

    return {state: {name: draw(state, name) for name in shapes} for state in STATES}


def fused(values: Tensors, padded: int, sliced: int) -> list[Tensors]:
    """Reference's parameters (non-pipeline names) of each of `sliced` tensor-parallel ranks."""
    width, ratio = HIDDEN // HEADS, HEADS // GROUPS
    ranks: list[Tensors] = [OrderedDict() for _ in range(sliced)]

    def vocabulary(name: str, value: Tensor) -> None:
        rows = torch.full((padded, HIDDEN), 0.01)
        rows[:VOCAB] = value
        for rank, part in enumerate(rows.split(padded // sliced)):
            ranks[rank][name] = part.clone()

    def everywhere(name: str, value: Tensor) -> None:
        for own in ranks:
            own[name] = value.clone()

    vocabulary(
        "language_model.embedding.word_embeddings.weight", values["model.embed_tokens.weight"]
    )
    for layer in range(LAYERS):
        theirs, ours = f"language_model.encoder.layers.{layer}.", f"model.layers.{layer}."
        everywhere(theirs + "input_layernorm.weight", values[ours + "input_layernorm.weight"])
        q, k, v = (values[f"{ours}self_attn.{one}_proj.weight"] for one in "qkv")
        for rank, own in enumerate(ranks):
            rows = []
            for group in range(rank * GROUPS // sliced, (rank + 1) * GROUPS // sliced):
                for head in range(group * ratio, (group + 1) * ratio):
                    rows += list(q[head * width : (head + 1) * width])
                rows += list(k[group * width : (group + 1) * width])
                rows += list(v[group * width : (group + 1) * width])
            own[theirs + "self_attention.query_key_value.weight"] = torch.stack(rows)
        for theirs_name, ours_name in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
        ):
            value = values[f"{ours}{ours_name}.weight"]
            share = value.shape[1] // sliced
            for rank, own in enumerate(ranks):
                own[f"{theirs}{theirs_name}.weight"] = value[
                    :, rank * share : (rank + 1) * share
                ].clone()
        everywhere(
            theirs + "post_attention_layernorm.weight",
            values[ours + "post_attention_layernorm.weight"],
        )
        gate, up = values[ours + "mlp.gate_proj.weight"], values[ours + "mlp.up_proj.weight"]
        share = FFN // sliced
        for rank, own in enumerate(ranks):
            rows = [
                *gate[rank * share : (rank + 1) * share],
                *up[rank * share : (rank + 1) * share],
            ]
            own[theirs + "mlp.dense_h_to_4h.weight"] = torch.stack(rows)
    everywhere("language_model.encoder.final_layernorm.weight", values["model.norm.weight"])
    if "lm_head.weight" in values:
        vocabulary("language_model.output_layer.weight", values["lm_head.weight"])
    return ranks


def pipeline_name(name: str, tied: bool) -> str:
    """The name of a parameter in DeepSpeed's pipeline module: 0 is a cast, 1 the embedding."""
    *_, layer, rest = ["", *name.partition("encoder.layers.")[2].partition(".")[::2]]
    if "encoder.layers." in name:
        return f"{int(layer) + 2}.{rest}"
    if "word_embeddings" in name:
        return "tied_modules.embed.word_embeddings.weight" if tied else "1.word_embeddings.weight"
    return f"{LAYERS + 2}.weight" if "final" in name else f"{LAYERS + 3}.lm_head.weight"


def client_state(run: Written) -> dict[str, Any]:
    """What the reference adds to each model file."""
    args = argparse.Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS,
        num_key_value_heads=GROUPS, ffn_hidden_size=FFN, kv_channels=HIDDEN // HEADS,
        seq_length=SEQ, padded_vocab_size=run.padded, swiglu=True, normalization="rmsnorm",
        use_rotary_position_embeddings=True, add_bias_linear=False, apply_layernorm_1p=False,
        rotary_percent=1.0, rope_theta=10000, layernorm_epsilon=1e-5, num_experts=[1],
        untie_embeddings_and_output_weights=not run.tied, optimizer="adamw",
        tensor_model_parallel_size=run.tp, pipeline_model_parallel_size=run.pp,
        consumed_train_samples=run.step * 8, consumed_train_tokens=run.step * 8 * SEQ,
        params_dtype=run.dtype, iteration=run.step, zero_stage=run.zero,
    )  # fmt: skip
    vars(args).update(run.args)
    random_state = {
        "random_rng_state": random.Random(1).getstate(),
        "np_rng_state": np.random.RandomState(1).get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": run.step,
        "tokens": run.step * 8 * SEQ,
        "universal_checkpoint_info": {
            "universal_checkpoint_version": 0.2,
            "original_vocab_size": VOCAB,
            "padded_vocab_size": run.padded,
        },
        "rng_state": [random_state],
        "global_steps": run.step,
        "zero_stage": ZeroStageEnum(run.zero),
    }


def write(root: Path, run: Written, values: dict[str, Tensors]) -> Path:
    """The files of all ranks, and the trackers; returns the folder of the step."""
    folder = root / run.tag
    folder.mkdir(parents=True)
    (root / "latest").write_text(run.tag)
    (root / "latest_checkpointed_iteration.txt").write_text(str(run.step))
    by_rank = {state: fused(values[state], run.padded, run.tp) for state in STATES}
    for stage in range(run.pp):
        for rank in range(run.tp):
            own = {state: _of_stage(by_rank[state][rank], run, stage) for state in STATES}
            _write_rank(folder, run, stage * run.tp + rank, own)
    if run.pp > 1:
        _write_layers(folder, run, by_rank["fp32"])
    return folder


def _of_stage(own: Tensors, run: Written, stage: int) -> Tensors:
    """This stage's share, under the names it has there."""
    if run.pp == 1:
        return own
    each = LAYERS // run.pp
    result = OrderedDict()
    for name, value in own.items():
        new = pipeline_name(name, run.tied)
        layer = 0 if "word_embeddings" in new else int(new.partition(".")[0]) - 2
        stages = {min(layer // each, run.pp - 1)}
        if run.tied and "word_embeddings" in new:
            stages.add(run.pp - 1)
        if stage in stages:
            result[new] = value
    return result


def nested(own: Tensors) -> dict[str, Any]:
    """A model's parameters as the reference saves them."""
    embedding = own["language_model.embedding.word_embeddings.weight"]
    prefix = "language_model.encoder."
    encoder = OrderedDict(
        (name.removeprefix(prefix), value) for name, value in own.items() if name.startswith(prefix)
    )
    model: dict[str, Any] = {
        "embedding": {"word_embeddings": OrderedDict(weight=embedding)},
        "encoder": encoder,
    }
    head = own.get("language_model.output_layer.weight")
    if head is not None:
        model["output_layer"] = OrderedDict(weight=head)
    return {"language_model": model}


def _groups(own: Tensors) -> list[list[str]]:
    """With weight decay, and without: the optimizer's parameter groups."""
    return [[n for n, v in own.items() if v.dim() > 1], [n for n, v in own.items() if v.dim() == 1]]


def _write_rank(folder: Path, run: Written, mp: int, own: dict[str, Tensors]) -> None:
    groups = _groups(own["fp32"])
    shapes = [OrderedDict((n, own["fp32"][n].shape) for n in names) for names in groups]
    rounded = {name: value.to(run.dtype) for name, value in own["fp32"].items()}
    state: dict[str, Any] = {
        "module": nested(rounded) if run.pp == 1 and run.zero < 3 else None,
        "optimizer": None,
        "param_shapes": shapes,
        "buffer_names": [],
        "ds_version": "0.19.3",
        **client_state(run),
    }
    if run.zero < 3:
        torch.save(state, folder / f"mp_rank_{mp:02d}_model_states.pt")
    bf16 = "bf16_" if run.dtype == torch.bfloat16 else ""
    for dp in range(run.dp):
        if run.zero == 3:
            empty = {name: torch.zeros(0) for name in own["fp32"]}
            name = f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_model_states.pt"
            torch.save(state | {"module": empty}, folder / name)
        parts = (
            _stage3(own, groups, run.dp, dp) if run.zero == 3 else _flat(own, groups, run.dp, dp)
        )
        name = f"{bf16}zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": _optimizer(run, parts)}, folder / name)


@dataclass
class _Part:
    values: Tensors
    mapping: dict[str, fragment_address]


def _flat(own: dict[str, Tensors], groups: list[list[str]], dp: int, rank: int) -> list[_Part]:
    """A rank's share of each group's flat values, padded to a multiple of 2 x dp."""
    parts = []
    for names in groups:
        size = sum(own["fp32"][name].numel() for name in names)
        share = -(-size // (2 * dp)) * 2
        first, last = rank * share, (rank + 1) * share
        mapping, offset = OrderedDict(), 0
        for name in names:
            length = own["fp32"][name].numel()
            start, end = max(first, offset), min(last, offset + length)
            if start < end:
                mapping[name] = fragment_address(numel=end - start, start=start - first)
            offset += length
        values = {}
        for state in STATES:
            flat = torch.cat([own[state][name].flatten() for name in names])
            padded = torch.cat([flat, flat.new_zeros(share * dp - size)])
            values[state] = padded[first:last].clone()
        parts.append(_Part(values, mapping))
    return parts


def _stage3(own: dict[str, Tensors], groups: list[list[str]], dp: int, rank: int) -> list[_Part]:
    """Each parameter's share, padded, one after the other."""
    parts = []
    for names in groups:
        values = {}
        for state in STATES:
            shares = []
            for name in names:
                flat = own[state][name].flatten()
                each = -(-len(flat) // dp)
                padded = torch.cat([flat, flat.new_zeros(each * dp - len(flat))])
                shares.append(padded[rank * each : (rank + 1) * each])
            values[state] = torch.cat(shares)
        parts.append(_Part(values, {}))
    return parts


def _optimizer(run: Written, parts: list[_Part]) -> dict[str, Any]:
    """torch's AdamW around the partitions, as DeepSpeed saves it."""
    states = {
        number: {
            "step": torch.tensor(float(run.step)),
            "exp_avg": part.values["exp_avg"],
            "exp_avg_sq": part.values["exp_avg_sq"],
        }
        for number, part in enumerate(parts)
    }
    base = {"state": states, "param_groups": [{"lr": 1e-3, "params": [0]}, {"params": [1]}]}
    fp32 = [part.values["fp32"] for part in parts]
    if run.zero == 3:
        return {
            "zero_stage": ZeroStageEnum(3),
            "partition_count": run.dp,
            "optimizer_state_dict": base,
            "fp32_flat_groups": fp32,
        }
    return {
        "zero_stage": ZeroStageEnum(run.zero),
        "partition_count": [run.dp] * len(parts),
        "base_optimizer_state": base,
        "single_partition_of_fp32_groups": fp32,
        "group_paddings": [0] * len(parts),
        "param_slice_mappings": [part.mapping for part in parts],
    }


def _write_layers(folder: Path, run: Written, by_rank: list[Tensors]) -> None:
    """Each layer's weights, without its number; a tied embedding is written at both ends."""
    for rank, own in enumerate(by_rank):
        layers: dict[int, dict[str, Tensor]] = {}
        for name, value in own.items():
            number, _, inner = pipeline_name(name, False).partition(".")
            layers.setdefault(int(number), OrderedDict())[inner] = value.to(run.dtype)
        if run.tied:
            layers[LAYERS + 3] = layers[1]
        for number, values in layers.items():
            torch.save(values, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")


def write_universal(
    root: Path, run: Written, values: dict[str, Tensors], *, merged: bool = True
) -> Path:
    """What DeepSpeed's converter makes of a run: whole parameters, one folder each.

    Args:
        root: of the checkpoints.
        run: that was converted.
        values: as of `known`.
        merged: gate and up were told apart; else the ranks' slices are joined as they are.
    """
    folder = root / f"{run.tag}_universal"
    folder.mkdir(parents=True)
    (root / "latest_universal").write_text(folder.name)
    state = {"module": {}, "param_shapes": [], **client_state(run)}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    for kind in STATES:
        whole = fused(values[kind], VOCAB, 1)[0]
        sliced = fused(values[kind], run.padded, run.tp)
        for name, value in whole.items():
            about: dict[str, Any] = {"cat_dim": 0}
            if name.endswith("dense_h_to_4h.weight"):
                if merged:
                    about["param_n_sub_params"] = 2
                else:
                    value = torch.cat([own[name] for own in sliced])
            place = folder / "zero" / name
            place.mkdir(parents=True, exist_ok=True)
            torch.save(about | {"param": value}, place / f"{kind}.pt")
            torch.save(torch.tensor(float(run.step)), place / "step.pt")
    return folder
