from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.tiny import KINDS, batch, build, layers, loss_and_gradients, tiny


class Counted(TorchDispatchMode):
    """Counts matrix products and attention kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "addmm")
        self.attentions += name.startswith("_scaled_dot_product") and not name.endswith("backward")
        return func(*args, **(kwargs or {}))


def counts(recompute: str) -> tuple[int, int, int, int]:
    """Matrix products and attention kernels of a block's forward, then of its backward."""
    block = layers(tiny(num_layers=1, recompute=recompute))[1].build()
    x = torch.randn(2, 8, 32, requires_grad=True)
    with Counted() as forward:
        y = block(x)
    with Counted() as backward:
        y.sum().backward()
    return forward.products, forward.attentions, backward.products, backward.attentions


TOKENS = 2 * 256
HIDDEN_BYTES, FFN_BYTES = TOKENS * 32 * 4, TOKENS * 44 * 4


def kept_bytes(recompute: str, part: str = "") -> int:
    """Bytes kept for the backward of a block or a part of it, parameters left out."""
    block = layers(tiny(num_layers=1, recompute=recompute))[1].build()
    module = block.get_submodule(part)
    parameters = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 256, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("recompute", "every"), [("selective", 0), ("full", 0), ("none", 1), ("none", 2), ("none", 3)]
)
def test_every_kind_has_identical_gradients(kind: str, recompute: str, every: int) -> None:
    want_loss, want = loss_and_gradients(tiny(kind), build(tiny(kind)))
    config = tiny(kind, recompute=recompute)
    loss, gradients = loss_and_gradients(config, build(config, recompute_num_layers=every))
    assert loss == want_loss
    for name, gradient in gradients.items():
        assert torch.equal(gradient, want[name]), name


def test_selective_repeats_the_attention_and_no_matrix_product() -> None:
    forward_products, attentions, backward_products, repeated = counts("none")
    assert (forward_products, attentions, backward_products, repeated) == (7, 1, 14, 0)
    assert counts("selective") == (7, 1, 14, 1)


def test_full_repeats_all_but_the_last_matrix_product() -> None:
    assert counts("full") == (7, 1, 14 + 6, 1)


def test_each_kind_keeps_less() -> None:
    none, selective, full = (kept_bytes(kind) for kind in ("none", "selective", "full"))
    assert full < selective < none
    assert full == HIDDEN_BYTES  # the block's input


def test_selective_keeps_only_inputs_and_outputs_of_column_products() -> None:
    assert kept_bytes("selective", "mlp") == HIDDEN_BYTES + 2 * FFN_BYTES  # x, gate, up
    assert kept_bytes("selective", "attention") == 4 * HIDDEN_BYTES  # x, q, k, v


@pytest.mark.parametrize(("every", "runs"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_a_stack_keeps_one_input_a_run_of_layers(every: int, runs: int) -> None:
    model = build(tiny(), recompute_num_layers=every)
    assert (
        len(model._calls) == runs + 2
    )  # embedding and final norm are not recomputed; the head is apart


def test_nothing_is_kept_without_gradients() -> None:
    config = tiny(recompute="full")
    with torch.no_grad():
        assert not build(config)(batch(config)[0]).requires_grad
