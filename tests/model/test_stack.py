from __future__ import annotations

import pytest
import torch

from megatron.model.block import Block
from megatron.model.stack import Stack
from tests.model.tiny import batch, build, layers, loss_and_gradients, tiny
from tests.parallel.axis import whole_world
from tests.spawn import run


def pipeline_names(tied: bool) -> tuple[list[str], float]:
    """Parameters' names, and the loss, of DeepSpeed's PipelineModule of the same layers."""
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    deepspeed.init_distributed("gloo")
    config = tiny(num_layers=2, tie_embeddings=tied)
    specs = [
        layer.build()
        if layer.tied_key is None
        else TiedLayerSpec(
            layer.tied_key,
            layer.module,
            config,
            config.context(),
            layer.name,
            forward_fn=layer.forward,
            tied_weight_attr=["weight"],
        )
        for layer in layers(config)
    ]
    model = PipelineModule(specs, num_stages=1, partition_method="uniform")
    tokens, _ = batch(config)
    loss = model(tokens).square().mean()
    return [name for name, _ in model.named_parameters()], loss.item()


@pytest.mark.parametrize("tied", [False, True])
def test_names_order_and_loss_are_those_of_deepspeeds_pipeline_module(tied: bool) -> None:
    pytest.importorskip("deepspeed")
    config = tiny(num_layers=2, tie_embeddings=tied)
    model = Stack(layers(config))
    tokens, _ = batch(config)
    loss = model(tokens).square().mean()
    ((names, their_loss),) = run(pipeline_names, 1, tied)
    assert [name for name, _ in model.named_parameters()] == names
    assert loss.item() == their_loss


def test_the_gradient_of_a_tied_matrix_is_that_of_embedding_plus_head() -> None:
    tied, untied = tiny("tied"), tiny("tied", tie_embeddings=False)
    model = build(tied)
    _, gradients = loss_and_gradients(tied, model)
    apart = build(untied)
    head = f"{untied.num_layers + 2}.weight"
    shared = model.tied_modules["embedding"].weight
    weights = {**model.state_dict(), "0.weight": shared, head: shared}
    del weights["tied_modules.embedding.weight"]
    apart.load_state_dict(weights)
    _, two = loss_and_gradients(untied, apart)
    torch.testing.assert_close(
        gradients["tied_modules.embedding.weight"], two["0.weight"] + two[head]
    )
    assert two["0.weight"].abs().max() > 1e-2 and two[head].abs().max() > 1e-2


COMPILING = {"TORCHDYNAMO_DISABLE": "0"}  # which `run` sets to 1


def compiled_and_eager(recompute: str) -> float:
    """Largest difference of loss and gradients with compiled blocks."""
    tp = whole_world()
    config = tiny("nope", recompute=recompute)
    model, compiled = build(config, tp), build(config, tp)
    for module in compiled.children():
        if isinstance(module, Block):
            module.compile(backend="aot_eager", fullgraph=True)
    want_loss, want = loss_and_gradients(config, model)
    loss, gradients = loss_and_gradients(config, compiled)
    return max(
        abs(loss - want_loss), *(float((gradients[name] - want[name]).abs().max()) for name in want)
    )


@pytest.mark.parametrize(
    ("ranks", "recompute"), [(1, "none"), (1, "selective"), (1, "full"), (2, "none")]
)
def test_blocks_compile_as_one_graph(ranks: int, recompute: str) -> None:
    assert max(run(compiled_and_eager, ranks, recompute, environ=COMPILING)) < 5e-6
