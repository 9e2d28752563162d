from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron.model.registry import ARCHITECTURES, architecture_of
from megatron.model.stack import Stack
from megatron.parallel.partial_gradients import reduce_partial_gradients
from tests.model.tiny import KINDS, Tiny, batch, build, layers, loss_and_gradients, tiny
from tests.parallel.axis import whole_world
from tests.spawn import RankError, run

TOLERANCE = 1e-5


def on_ranks(
    config: Tiny,
) -> tuple[float, dict[str, Tensor], dict[str, tuple[int | None, Tensor]]]:
    tp = whole_world()
    model = build(config, tp)
    loss, gradients = loss_and_gradients(config, model)
    reduce_partial_gradients(model.parameters(), tp)
    cut = {
        name: (getattr(p, "partition_dim", None), p.detach())
        for name, p in model.named_parameters()
    }
    return loss, gradients, cut


@pytest.mark.parametrize(
    ("ranks", "kind"),
    [(2, kind) for kind, changes in KINDS.items() if changes.get("num_key_value_heads", 4) % 2 == 0]
    + [(4, "plain"), (4, "llama3-scaling")],
)
def test_tensor_parallel_weights_loss_and_gradients_are_those_of_one_rank(
    ranks: int, kind: str
) -> None:
    config = tiny(kind)
    model = build(config)
    want_loss, want = loss_and_gradients(config, model)
    results = run(on_ranks, ranks, config)
    weights = dict(model.named_parameters())
    for name, want_gradient in want.items():
        dim = results[0][2][name][0]
        gradients = [gradients[name] for _, gradients, _ in results]
        pieces = [parameters[name][1] for _, _, parameters in results]
        rows = config.vocab_size if weights[name].is_vocabulary else None
        if dim is None:
            assert all(torch.equal(piece, weights[name]) for piece in pieces)
        else:
            # The padding of the vocabulary grows with the ranks.
            assert torch.equal(torch.cat(pieces, dim)[:rows], weights[name][:rows])
            gradients = [torch.cat(gradients, dim)[:rows]]
            want_gradient = want_gradient[:rows]
        for gradient in gradients:
            assert float((gradient - want_gradient).abs().max()) <= TOLERANCE, name
    for loss, _, _ in results:
        assert abs(loss - want_loss) <= TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_names_are_those_of_the_list_of_layers(tied: bool) -> None:
    model = Stack(layers(tiny(num_layers=1, tie_embeddings=tied)))
    block = [
        "1.input_norm.weight", *(f"1.attention.{letter}.weight" for letter in "qkvo"),
        "1.post_attention_norm.weight", "1.mlp.gate.weight", "1.mlp.up.weight", "1.mlp.down.weight",
    ]  # fmt: skip
    ends = (
        ["tied_modules.embedding.weight", "2.weight"]
        if tied
        else ["0.weight", "2.weight", "3.weight"]
    )
    assert sorted(dict(model.named_parameters())) == sorted([*block, *ends])
    built = layers(tiny(num_layers=1, tie_embeddings=tied))
    assert {layer.name for layer in built} == {name.rsplit(".weight")[0] for name in ends} | {"1"}
    assert [layer.module.__name__ for layer in built] == [
        "Embedding", "Block", "RMSNorm", "Embedding" if tied else "Head",
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_says_how_it_is_cut(tied: bool) -> None:
    config = tiny("gqa2", tie_embeddings=tied)
    for name, parameter in Stack(layers(config)).named_parameters():
        norm = "norm" in name or name == f"{config.num_layers + 1}.weight"
        assert parameter.full_shape == tuple(parameter.shape)
        assert getattr(parameter, "tensor_model_parallel", False) is not norm, name
        if not norm:
            assert parameter.partition_dim == (
                1 if name.endswith(("o.weight", "down.weight")) else 0
            ), name


def test_initial_standard_deviations() -> None:
    config = tiny(
        hidden_size=128,
        ffn_hidden_size=256,
        vocab_size=2000,
        init_method_std=None,
    )
    std = math.sqrt(2 / (5 * 128))
    for name, parameter in Stack(layers(config)).named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        residual = name.endswith(("attention.o.weight", "mlp.down.weight"))
        expected = std / math.sqrt(2 * config.num_layers) if residual else std
        rows = parameter[:2000] if parameter.shape[0] == 2048 else parameter
        assert math.isclose(float(rows.detach().std()), expected, rel_tol=0.03), name


@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_neither_loss_nor_gradients(tied: bool) -> None:
    base = tiny(tie_embeddings=tied)
    with patch.object(Tiny, "padded_vocab_size", lambda self, tp: self.vocab_size):
        want_loss, want = loss_and_gradients(base, build(base))
    padded = tiny(tie_embeddings=tied)
    loss, gradients = loss_and_gradients(padded, build(padded))
    assert abs(loss - want_loss) <= 1e-6
    for name, gradient in gradients.items():
        assert torch.count_nonzero(gradient[want[name].shape[0] :]) == 0
        torch.testing.assert_close(gradient[: want[name].shape[0]], want[name], rtol=0, atol=1e-6)


def model_of_bad_data(where: str) -> None:
    config, tp = tiny(), whole_world()
    tokens, labels = (x.clone() for x in batch(config))
    (tokens if where == "token" else labels)[1, 3] = config.vocab_size
    build(config, tp)(tokens, labels)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("where", ["token", "label"])
def test_an_id_outside_the_vocabulary_stops_the_run(where: str, ranks: int) -> None:
    with pytest.raises(RankError, match=rf"{where} id 61 is outside the vocabulary \[0, 61\)"):
        run(model_of_bad_data, ranks, where)


def collectives(kind: str, recompute: str) -> tuple[int, int]:
    """All-reduces of one block's forward and of its backward."""
    config, tp = tiny(kind, num_layers=1, recompute=recompute), whole_world()
    block = layers(config, tp)[1].build()
    x = torch.randn(2, 8, config.hidden_size, requires_grad=True)
    counts = [0]
    original = torch.distributed.all_reduce

    def counted(*args: object, **kwargs: object) -> object:
        counts[0] += 1
        return original(*args, **kwargs)

    torch.distributed.all_reduce = counted
    y = block(x)
    forward = counts[0]
    y.sum().backward()
    return forward, counts[0] - forward


@pytest.mark.parametrize(
    ("recompute", "expected"), [("none", (2, 2)), ("selective", (2, 2)), ("full", (2, 3))]
)
def test_a_block_has_two_all_reduces_each_way(recompute: str, expected: tuple[int, int]) -> None:
    """Full repeats the attention's; no kind repeats the one at the end of what it repeats."""
    assert run(collectives, 2, "gqa2", recompute) == [expected, expected]


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RankError, match="NUM_KV_HEAD=1 is not a multiple of TP=2"):
        run(on_ranks, 2, tiny("mqa"))


def test_an_unknown_kind_of_recomputation_is_refused() -> None:
    with pytest.raises(ValueError, match="recompute='some' is not one of none, selective, full"):
        layers(tiny(recompute="some"))


def test_the_registry() -> None:
    for name in ARCHITECTURES:
        assert len(layers(tiny(architecture=name))) == 4 + 3
    assert architecture_of("SmolLM3ForCausalLM") == "llama"
    with pytest.raises(
        ValueError, match=r"MptForCausalLM is not supported; GPT2LMHeadModel, .* are"
    ):
        architecture_of("MptForCausalLM")


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_is_that_of_the_modules(kind: str) -> None:
    config = tiny(kind)
    count = ARCHITECTURES[config.architecture].parameters(config)
    assert count == sum(parameter.numel() for parameter in build(config).parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_name_in_hugging_face(kind: str) -> None:
    config = tiny(kind)
    names = ARCHITECTURES[config.architecture].hugging_face_names(config)
    assert set(names) == set(dict(build(config).named_parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_matrix_is_marked_as_one(kind: str) -> None:
    config = tiny(kind)
    for name, parameter in build(config).named_parameters():
        assert parameter.is_vocabulary is (parameter.shape[0] == 128 and parameter.dim() == 2), name
