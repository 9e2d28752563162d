"""Checkpoints of Megatron-DeepSpeed's Llama models: their shape, and their tensors by our names.

There q, k and v are one matrix, in groups of a key/value head: its queries, its key, its value.
Gate and up are one matrix too, gate first on each tensor-parallel rank. Optimizer states are laid
out as the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.reference_files import MOMENTS, WEIGHTS_ONLY, Read, Reference, Slices
from megatron.checkpoint.state import RunState
from megatron.checkpoint.torch_file import Inert
from megatron.config.shape import ModelShape
from megatron.model.registry import ARCHITECTURES
from megatron.parallel.piece import WEIGHT, Piece

ARCHITECTURE = "llama"
OPTIMIZERS = {"adam": "adam", "adamw": "adamw", "apex.adam": "adamw", "ds.adamw": "adamw"}
"""--optimizer there -> OPT here, where the states are Adam's two moments."""

Merge = Callable[[Sequence[Tensor], ModelShape], Sequence[Tensor]]
"""The slices of all tensor-parallel ranks -> the whole matrices they hold."""


def _first(slices: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    del shape
    return slices[:1]


def _rows(slices: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    del shape
    return [torch.cat(list(slices), dim=0)]


def _columns(slices: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    del shape
    return [torch.cat(list(slices), dim=1)]


def _gate_up(slices: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    del shape
    halves = [one.chunk(2, dim=0) for one in slices]
    return [torch.cat([half[number] for half in halves], dim=0) for number in (0, 1)]


def _query_key_value(slices: Sequence[Tensor], shape: ModelShape) -> Sequence[Tensor]:
    """(groups x (queries + 2) x head, hidden) -> q, k, v."""
    whole = torch.cat(list(slices), dim=0)
    groups, width = shape.num_key_value_heads, shape.head_width
    queries = shape.num_attention_heads // groups
    grouped = whole.view(groups, queries + 2, width, whole.shape[1])
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return [part.reshape(-1, whole.shape[1]) for part in parts]


_BLOCK: dict[str, tuple[Merge, tuple[str, ...]]] = {
    "input_layernorm.weight": (_first, ("input_layernorm.weight",)),
    "self_attention.query_key_value.weight": (
        _query_key_value,
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ),
    "self_attention.dense.weight": (_columns, ("self_attn.o_proj.weight",)),
    "post_attention_layernorm.weight": (_first, ("post_attention_layernorm.weight",)),
    "mlp.dense_h_to_4h.weight": (_gate_up, ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
    "mlp.dense_4h_to_h.weight": (_columns, ("mlp.down_proj.weight",)),
}
"""Name in a block -> how its slices become whole, and Hugging Face's names of these matrices."""

_EMBEDDING, _NORM = ("model.embed_tokens.weight",), ("model.norm.weight",)
_HEAD = ("lm_head.weight",)
_OUTER: dict[str, tuple[Merge, tuple[str, ...]]] = {
    "language_model.embedding.word_embeddings.weight": (_rows, _EMBEDDING),
    "language_model.encoder.final_layernorm.weight": (_first, _NORM),
    "language_model.output_layer.weight": (_rows, _HEAD),
    "tied_modules.embed.word_embeddings.weight": (_rows, _EMBEDDING),
}
_LAYERS: dict[str, tuple[Merge, tuple[str, ...]]] = {
    "word_embeddings.weight": (_rows, _EMBEDDING),
    "weight": (_first, _NORM),
    "lm_head.weight": (_rows, _HEAD),
}
"""Pipeline layers other than blocks."""

_IN_BLOCK = re.compile(r"language_model\.encoder\.layers\.(\d+)\.(.+)")
_IN_LAYER = re.compile(r"(\d+)\.(.+)")

_EXPECTED = {
    "swiglu": True,
    "normalization": "rmsnorm",
    "use_rotary_position_embeddings": True,
    "add_bias_linear": False,
    "apply_layernorm_1p": False,
    "rotary_percent": 1.0,
}
"""Arguments of the models that this framework trains; one that is not stored counts as this."""


def arguments(reference: Reference) -> dict[str, Any]:
    """The arguments that the run was started with.

    Raises:
        ValueError: the checkpoint has none.
    """
    args = reference.head.get("args")
    if not isinstance(args, Inert):
        raise ValueError(
            f"{reference.folder} holds no arguments (`args`), which give the number of heads: it "
            "was not written by Megatron-DeepSpeed's training"
        )
    return vars(args)


def shape_of(reference: Reference, vocab_size: int | None = None) -> ModelShape:
    """The shape of the model.

    Args:
        reference: the checkpoint.
        vocab_size: of the tokenizer; by default the one that the checkpoint names, or else all
            rows, the padding included.

    Raises:
        ValueError: this framework does not train such a model; all reasons are named.
    """
    args = arguments(reference)
    wrong = [
        f"{name}={args[name]!r} (here {wanted!r})"
        for name, wanted in _EXPECTED.items()
        if args.get(name, wanted) != wanted
    ]
    if args.get("num_experts", [1]) not in ([1], 1, None):
        wrong.append(f"num_experts={args['num_experts']} (here models are dense)")
    if wrong:
        raise ValueError(f"{reference.folder}: not a model of this framework: {'; '.join(wrong)}")
    given: dict[str, Any] = {
        "num_layers": args.get("num_layers"),
        "hidden_size": args.get("hidden_size"),
        "num_attention_heads": args.get("num_attention_heads"),
        "num_key_value_heads": args.get("num_key_value_heads") or args.get("num_attention_heads"),
        "ffn_hidden_size": args.get("ffn_hidden_size"),
        "seq_length": args.get("seq_length"),
        "vocab_size": vocab_size or _vocab_size(reference, args),
    }
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{reference.folder}: its arguments have no {', '.join(missing)}")
    return ModelShape(
        architecture=ARCHITECTURE,
        **given,
        head_dim=args.get("kv_channels"),
        tie_embeddings=not args.get("untie_embeddings_and_output_weights", False),
        rope_theta=float(args.get("rope_theta", 10000)),
        rms_norm_eps=args.get("layernorm_epsilon", 1e-5),
    )


def state_of(reference: Reference) -> RunState:
    """Steps done, and the samples and tokens of them."""
    args, head = arguments(reference), reference.head
    samples = int(args.get("consumed_train_samples") or 0)
    tokens = int(head.get("tokens") or samples * int(args.get("seq_length") or 0))
    return RunState(int(head.get("iteration") or 0), samples, tokens)


def optimizer_of(reference: Reference) -> str:
    """OPT of the states.

    Raises:
        ValueError: it has no counterpart here.
    """
    theirs = arguments(reference).get("optimizer", "adam")
    if theirs not in OPTIMIZERS:
        raise ValueError(
            f"{reference.folder}: the states of --optimizer {theirs} cannot be taken over; "
            f"{WEIGHTS_ONLY} imports the weights without them"
        )
    return OPTIMIZERS[theirs]


def pieces(reference: Reference, shape: ModelShape, warn: Callable[[str], None]) -> Iterator[Piece]:
    """All parameters, whole, with the optimizer's states where the reference has them.

    Args:
        reference: the checkpoint.
        shape: of its model.
        warn: told of replicas that differ.

    Raises:
        ValueError: a parameter is missing, unknown, not finite or of another shape; or the
            optimizer's weights are not those of the model.
    """
    ours = {
        theirs: name
        for name, theirs in ARCHITECTURES[ARCHITECTURE].hugging_face_names(shape).items()
    }
    found = _found(reference.weights, reference)
    model = _found(reference.model, reference) if reference.model else {}
    missing = sorted(set(ours) - {name for part in found.values() for name in part.names})
    if missing:
        raise ValueError(f"{reference.folder} holds nothing of {', '.join(missing[:8])}")
    states = (WEIGHT, *(MOMENTS if reference.step is not None else ()))
    scalars = {} if reference.step is None else {"step": reference.step}
    for key, part in found.items():
        values = {state: part.whole(state, shape, warn) for state in states}
        if key in model:
            _require_same(part, values[WEIGHT], model[key].whole(WEIGHT, shape, warn))
        for number, theirs in enumerate(part.names):
            own = {state: values[state][number] for state in states}
            yield _piece(part, ours[theirs], theirs, own, shape, scalars)


@dataclass(frozen=True)
class _Part:
    """A parameter there: one or several matrices here."""

    label: str
    merge: Merge
    names: tuple[str, ...]
    slices: Mapping[int, Read]
    ranks: int

    def whole(self, state: str, shape: ModelShape, warn: Callable[[str], None]) -> Sequence[Tensor]:
        """Its matrices, in fp32."""
        missing = sorted(set(range(self.ranks)) - set(self.slices))
        if missing:
            raise ValueError(
                f"{self.label}: the slice of tensor-parallel rank {missing[0]} is missing"
            )
        slices = [self.slices[rank](state) for rank in range(self.ranks)]
        if self.merge is _first and any(not torch.equal(slices[0], one) for one in slices[1:]):
            warn(f"{self.label}: {state} differs between tensor-parallel ranks; rank 0's is taken")
        try:
            return [value.float() for value in self.merge(slices, shape)]
        except RuntimeError as error:
            raise ValueError(f"{self.label}: its slices do not fit the model: {error}") from None


def _found(slices: Slices, reference: Reference) -> dict[tuple[str, ...], _Part]:
    """Hugging Face's names -> the parameter that holds these matrices, in the model's order."""
    first = min(
        (int(m[1]) for m in map(_IN_LAYER.fullmatch, slices) if m and m[2] in _BLOCK), default=0
    )
    found: dict[tuple[str, ...], _Part] = {}
    unknown = []
    for name, own in slices.items():
        merge, names = _meaning(name, first)
        if not names:
            unknown.append(name)
            continue
        ranks = reference.tensor_parallel
        if merge is _gate_up and reference.packed.get(name) is False:
            ranks = int(arguments(reference)["tensor_model_parallel_size"])
            own = {rank: partial(_nth, own[0], rank, ranks) for rank in range(ranks)}
        found.setdefault(names, _Part(f"{reference.folder}: {name}", merge, names, own, ranks))
    if unknown:
        raise ValueError(
            f"{reference.folder} holds parameters that ARCHITECTURE={ARCHITECTURE} does not have, "
            f"and that would be lost: {', '.join(sorted(unknown)[:8])}"
        )
    return found


def _meaning(name: str, first: int) -> tuple[Merge, tuple[str, ...]]:
    """How the slices of a parameter become whole, and Hugging Face's names; none: unknown.

    Args:
        name: in either style.
        first: number of the pipeline layer that is the first block.
    """
    if name in _OUTER:
        return _OUTER[name]
    block, layer = _IN_BLOCK.fullmatch(name), _IN_LAYER.fullmatch(name)
    found = block or layer
    if found and found[2] in _BLOCK:
        merge, inner = _BLOCK[found[2]]
        number = int(found[1]) - (0 if block else first)
        return merge, tuple(f"model.layers.{number}.{one}" for one in inner)
    return _LAYERS.get(layer[2], (_first, ())) if layer else (_first, ())


def _nth(read: Read, rank: int, ranks: int, state: str) -> Tensor:
    """A slice of a Universal gate and up that was joined slice by slice."""
    return read(state).chunk(ranks, dim=0)[rank]


def _require_same(part: _Part, fp32: Sequence[Tensor], model: Sequence[Tensor]) -> None:
    """The model's weights are the optimizer's, rounded: else the files are of two steps."""
    for own, copy in zip(fp32, model, strict=True):
        if own.shape != copy.shape or not torch.allclose(own, copy, rtol=2**-7, atol=1e-6):
            raise ValueError(
                f"{part.label}: the optimizer's fp32 weights are not the model's: files of two "
                f"steps are mixed; {WEIGHTS_ONLY} imports the model's"
            )


def _piece(
    part: _Part,
    name: str,
    theirs: str,
    values: Mapping[str, Tensor],
    shape: ModelShape,
    scalars: Mapping[str, float],
) -> Piece:
    """A matrix of ours: checked, and the vocabulary with our padding."""
    expected = _expected(theirs, shape)
    tensors = {}
    for state, stored in values.items():
        value = stored
        if ARCHITECTURES[ARCHITECTURE].is_vocabulary(theirs):
            if value.shape[0] < shape.vocab_size:
                raise ValueError(
                    f"{part.label} has {value.shape[0]} rows, fewer than the vocabulary's "
                    f"{shape.vocab_size}"
                )
            rows = value[: shape.vocab_size]
            value = torch.cat([rows, rows.new_zeros(expected[0] - len(rows), rows.shape[1])])
        if tuple(value.shape) != expected:
            raise ValueError(
                f"{part.label}: {theirs} is {tuple(value.shape)}, its arguments say {expected}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{part.label}: {state} is not finite")
        tensors[state] = value.reshape(-1)
    return Piece(name, expected, None, 0, 1, 0, tensors, scalars)


def _expected(theirs: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of a matrix, by its Hugging Face name."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    known = {
        "embed_tokens": (shape.padded_vocab_size(), hidden),
        "lm_head": (shape.padded_vocab_size(), hidden),
        "q_proj": (shape.query_size, hidden),
        "k_proj": (shape.key_value_size, hidden),
        "v_proj": (shape.key_value_size, hidden),
        "o_proj": (hidden, shape.query_size),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    return known.get(theirs.split(".")[-2], (hidden,))


def _vocab_size(reference: Reference, args: Mapping[str, Any]) -> int | None:
    """Tokens of the tokenizer, where the checkpoint names them; else all rows."""
    about = reference.head.get("universal_checkpoint_info")
    named = about.get("original_vocab_size") if isinstance(about, dict) else None
    return named or args.get("padded_vocab_size")
