"""Both kinds of sequence parallelism compute what one rank computes, and keep less."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.layout import Layout
from megatron.model.block import Block
from megatron.model.stack import Stack
from megatron.parallel.groups import SERIAL, make_groups
from megatron.parallel.partial_gradients import reduce_partial_gradients
from megatron.parallel.ulysses import own_positions
from tests.model.tiny import KINDS, Tiny, batch, build, layers, loss_and_gradients, tiny
from tests.spawn import RankError, run

TOLERANCE = 1e-5


def on_ranks(config: Tiny, layout: Layout) -> tuple[float, dict[str, Tensor]]:
    """Loss of this rank's positions, and the gradients of the whole matrices from them."""
    groups = make_groups(layout)
    model = build(config, groups.tp, sp=groups.sp)
    tokens, labels = (own_positions(x, groups.sp) for x in batch(config))
    loss = model(tokens, labels)
    loss.backward()
    reduce_partial_gradients(model.parameters(), groups.tp)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if groups.tp.size > 1 and getattr(parameter, "tensor_model_parallel", False):
            parts = [torch.empty_like(gradient) for _ in range(groups.tp.size)]
            dist.all_gather(parts, gradient, group=groups.tp.group)
            gradient = torch.cat(parts, parameter.partition_dim)
        gradients[name] = gradient
    return loss.item(), gradients


@pytest.mark.parametrize(
    ("kind", "layout", "megatron"),
    [
        *((kind, Layout(sp=2), False) for kind in KINDS),
        ("gqa2", Layout(sp=4), False),
        ("smollm3", Layout(sp=4), False),
        ("gqa2", Layout(tp=2, sp=2), False),
        *((kind, Layout(tp=2), True) for kind in KINDS if tiny(kind).num_key_value_heads > 1),
        ("plain", Layout(tp=4), True),
        ("nope", Layout(tp=2, sp=2), True),
    ],
    ids=str,
)  # fmt: skip
def test_loss_and_gradients_are_those_of_one_rank(
    kind: str, layout: Layout, megatron: bool
) -> None:
    want_loss, want = loss_and_gradients(tiny(kind), build(tiny(kind)))
    results = run(on_ranks, layout.world, tiny(kind, sequence_parallel=megatron), layout)
    # A rank's share is the gradient of its own positions' mean: the mean over the ranks of a
    # sequence is that of the whole. Each tensor-parallel rank must have all of its share itself.
    losses = [loss for loss, _ in results[:: layout.tp]]
    assert abs(sum(losses) / layout.sp - want_loss) <= TOLERANCE
    for tp_rank in range(layout.tp):
        pieces = [gradients for _, gradients in results[tp_rank :: layout.tp]]
        for name, want_gradient in want.items():
            mean = torch.stack([piece[name] for piece in pieces]).mean(0)
            mean = mean[: len(want_gradient)]  # the vocabulary's padding grows with TP
            assert float((mean - want_gradient).abs().max()) <= TOLERANCE, name


def collectives(config: Tiny, layout: Layout) -> tuple[dict[str, int], dict[str, int]]:
    """Collectives of one block's forward and of its backward."""
    groups = make_groups(layout)
    block = layers(config, groups.tp, groups.sp)[1].build()
    counts: dict[str, int] = {}

    def counted(name: str) -> None:
        original = getattr(dist, name)

        def call(*args: object, **kwargs: object) -> object:
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        setattr(dist, name, call)

    names = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single")
    for name in names:
        counted(name)
    y = block(torch.randn(2, 8, config.hidden_size, requires_grad=True))
    forward = dict(counts)
    y.sum().backward()
    return forward, {name: n - forward.get(name, 0) for name, n in counts.items()}


def test_a_blocks_collectives_with_megatrons() -> None:
    """The positions are gathered once for q, k and v, once for gate and up, and again each."""
    config = tiny("gqa2", num_layers=1, sequence_parallel=True)
    forward = {"all_gather_into_tensor": 2, "reduce_scatter_tensor": 2}
    backward = {"all_gather_into_tensor": 4, "reduce_scatter_tensor": 2}
    assert run(collectives, 2, config, Layout(tp=2)) == [(forward, backward)] * 2


def test_a_blocks_collectives_with_ulysses() -> None:
    expected = ({"all_to_all_single": 2}, {"all_to_all_single": 2})
    assert run(collectives, 2, tiny("gqa2", num_layers=1), Layout(sp=2)) == [expected] * 2


def kept_bytes(config: Tiny, length: int) -> int:
    """Bytes that a block keeps for its backward, parameters left out."""
    tp = make_groups(Layout(tp=dist.get_world_size())).tp
    block = layers(config, tp)[1].build()
    parameters = {p.data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1, length, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_the_residual_stream_and_the_inputs_of_matrices_are_kept_in_shares(recompute: str) -> None:
    length, config = 256, tiny(num_layers=1, recompute=recompute)
    cut = tiny(num_layers=1, recompute=recompute, sequence_parallel=True)
    (copies, _), (shares, _) = (
        run(kept_bytes, 2, config, length),
        run(kept_bytes, 2, cut, length // 2),
    )
    # Two norms' inputs and the inputs of q, k, v and of gate, up: half of each is gone.
    hidden_bytes = length * config.hidden_size * 4
    assert copies - shares >= 4 * hidden_bytes // 2


def test_full_recomputation_keeps_a_share_of_the_blocks_input() -> None:
    config = tiny(num_layers=1, recompute="full", sequence_parallel=True)
    assert run(kept_bytes, 2, config, 128) == [128 * 32 * 4] * 2


def refused() -> None:
    groups = make_groups(Layout(sp=3))
    layers(tiny(), SERIAL, groups.sp)[1].build()


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RankError, match=r"HEADS=4 is not a multiple of TP x SP = 1 x 3"):
        run(refused, 3)


COMPILING = {"TORCHDYNAMO_DISABLE": "0"}  # which `run` sets to 1


def compiled_and_eager(layout: Layout, megatron: bool) -> float:
    """Largest difference of loss and gradients with compiled blocks."""
    groups = make_groups(layout)
    config = tiny("nope", sequence_parallel=megatron)
    models = [build(config, groups.tp, sp=groups.sp) for _ in range(2)]
    for module in models[1].children():
        if isinstance(module, Block):
            module.compile(backend="aot_eager", fullgraph=True)
    tokens, labels = (own_positions(x, groups.sp) for x in batch(config))

    def gradients(model: Stack) -> list[Tensor]:
        loss = model(tokens, labels)
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    want, got = (gradients(model) for model in models)
    return max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize(
    ("layout", "megatron"),
    [
        (Layout(sp=2), False),
        pytest.param(Layout(tp=2), False, marks=pytest.mark.long),
        (Layout(tp=2), True),
    ],
)
def test_blocks_compile_as_one_graph(layout: Layout, megatron: bool) -> None:
    assert max(run(compiled_and_eager, 2, layout, megatron, environ=COMPILING)) < 5e-6
