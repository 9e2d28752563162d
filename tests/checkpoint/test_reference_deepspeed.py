"""Files that DeepSpeed itself writes, of a module with the reference's names; and its converter's.

The weights are known, the rate is 0, and the gradients are known: so are the moments.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron.model.registry import ARCHITECTURES
from tests.checkpoint.reference_checkpoint import (
    Tensors,
    Written,
    client_state,
    fused,
    known,
    nested,
)
from tests.checkpoint.test_reference import imported
from tests.spawn import run
from tools import convert_hf

BETAS = (0.9, 0.95)
FORMS: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "bf16-optimizer": {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
    "fp32": {"stage": 1, "bf16": False},
}


class Leaf(nn.Module):
    """A weight, used in a forward of its own, as ZeRO-3 needs."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient.to(self.weight.dtype)).sum()


class Model(nn.Module):
    """Weights under given names, and a loss whose gradients are given."""

    def __init__(self, weights: Tensors, gradients: Tensors) -> None:
        super().__init__()
        self.gradients = gradients
        for name, value in weights.items():
            *path, leaf, _ = name.split(".")
            place: nn.Module = self
            for part in path:
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(leaf, Leaf(value))

    def forward(self) -> torch.Tensor:
        terms = [
            self.get_submodule(name.removesuffix(".weight"))(gradient)
            for name, gradient in self.gradients.items()
        ]
        return torch.stack(terms).sum()


def save(folder: str, form: dict[str, Any], as_reference: bool = True) -> None:
    """One step on each rank, and DeepSpeed's own checkpoint of it.

    Its converter of 0.19.8 fails at the reference's nested names: there the names stay flat.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    values = known()
    weights, gradients = (fused(values[state], 256, 1)[0] for state in ("fp32", "exp_avg"))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": form.get("bf16", True)},
        "zero_optimization": {"stage": form["stage"]},
        **({"data_types": form["data_types"]} if "data_types" in form else {}),
    }
    model = Model(weights, gradients)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed}, {"params": others}], lr=0.0, betas=BETAS)
    deepspeed.init_distributed("gloo")
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    engine.backward(engine())
    engine.step()
    if as_reference and form["stage"] < 3:  # as its save_checkpoint does
        plain = engine.module.state_dict
        engine.module.state_dict = lambda *args, **kwargs: nested(plain(*args, **kwargs))
    written = Written(dp=2, zero=form["stage"], step=1)
    state = client_state(written)
    state["universal_checkpoint_info"] |= {
        "vocabulary_parameter_patterns": [
            "language_model.embedding.word_embeddings.weight",
            "language_model.output_layer.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": [
            r"language_model.encoder.layers.\d+.mlp.dense_h_to_4h.weight"
        ],
    }
    del state["zero_stage"], state["global_steps"]
    engine.save_checkpoint(folder, tag=written.tag, client_state=state)


def require_known(folder: Path, rounded: bool, tmp_path: Path) -> None:
    checkpoint = imported(folder, tmp_path / f"run-{folder.name}")
    assert checkpoint.iteration == 1
    shape = convert_hf.ModelShape(**checkpoint.manifest["model"], seq_length=32)
    values, reader = known(), checkpoint.reader()
    for ours, theirs in ARCHITECTURES["llama"].hugging_face_names(shape).items():
        weight, gradient = values["fp32"][theirs], values["exp_avg"][theirs]
        if rounded:
            weight, gradient = weight.bfloat16().float(), gradient.bfloat16().float()
        expected = {
            "weight": weight,
            "exp_avg": (1 - BETAS[0]) * gradient,
            "exp_avg_sq": (1 - BETAS[1]) * gradient.square(),
        }
        for state, value in expected.items():
            found = reader.whole(ours, state)[: len(value)]
            torch.testing.assert_close(found, value, rtol=1e-5, atol=0, msg=f"{ours} {state}")
        assert reader.scalars(ours) == {"step": 1.0}


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_deepspeed_writes_what_is_read(form: str, tmp_path: Path) -> None:
    run(save, 2, str(tmp_path / "reference"), FORMS[form])
    require_known(tmp_path / "reference", FORMS[form].get("bf16", True), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("form", ["zero2", "bf16-optimizer"])
def test_its_converter_to_universal(form: str, tmp_path: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    run(save, 2, str(tmp_path / "reference"), FORMS[form], False)
    out = tmp_path / "universal" / "global_step1_universal"
    ds_to_universal.main(
        Namespace(
            input_folder=str(tmp_path / "reference" / "global_step1"), output_folder=str(out),
            num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=False,
            inject_missing_state=False,
        )
    )  # fmt: skip
    require_known(out, True, tmp_path)
