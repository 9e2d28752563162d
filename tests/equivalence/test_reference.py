"""A Megatron-DeepSpeed checkpoint goes on here: logits and steps against transformers and torch.

The plain model and the plain optimizer are made of the tensors that the checkpoint was made of.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint import reference_checkpoint as reference
from tests.checkpoint.reference_checkpoint import Tensors, Written, known, write, write_universal
from tests.equivalence import front
from tests.spawn import run
from tools import convert_hf

CASES = {
    "zero1-tp2-to-one": (Written(tp=2, dp=2), {}),
    "pp2-tp2-to-zero3": (Written(tp=2, pp=2, dp=2), {"WORLD_SIZE": "2", "ZERO_STAGE": "3"}),
    "tp4-to-pp2": (Written(tp=4, dp=2, zero=2), {"PP": "2"}),
    "universal-to-tp2": (None, {"TP": "2"}),
    "zero3-to-tp2": (Written(zero=3, dp=3), {"TP": "2"}),
    "tied-to-tp2-pp2": (Written(tied=True, tp=2), {"TP": "2", "PP": "2", "TIE_EMBEDDINGS": "1"}),
}
QUICK = "zero1-tp2-to-one"
SETTINGS = {
    "OPT": "adamw", "LR": "0.001", "WEIGHT_DECAY": "0.1", "ROPE_THETA": "10000",
    "NLAYERS": str(reference.LAYERS),
}  # fmt: skip


def go_on(variables: dict[str, str]) -> tuple[int, torch.Tensor | None, front.Curve]:
    """The step resumed from, the logits before any training, and five steps."""
    config, control = front.run_config(variables), front.make_control()
    engine = front.build(config)
    state = front.resume(config, engine, None, control)
    logits = engine.logits(front.probe(config))
    return state.iteration, logits, front.steps(config, engine, 5, 10)


@pytest.mark.parametrize(
    "case",
    [QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in CASES if name != QUICK)],
)
def test_it_goes_on_as_a_plain_loop(case: str, tmp_path: Path) -> None:
    written, layout = CASES[case]
    values = known(tied=written.tied if written else False)
    if written:
        write(tmp_path / "reference", written, values)
    else:
        write_universal(tmp_path / "reference", Written(tp=2), values)
    assert convert_hf.main(["import", str(tmp_path / "reference"), str(tmp_path / "run")]) == 0
    variables = {**SETTINGS, **layout, "RUN_DIR": str(tmp_path / "run")}
    config = front.run_config(variables)
    results = run(go_on, front.world(variables), variables)
    model = plain_model(values)
    with torch.no_grad():
        expected = model(front.probe(config)).logits
    parts = [logits for _, logits, _ in results if logits is not None]
    ours = torch.cat(parts[: config.parallel.tensor_parallel], dim=-1)[..., : reference.VOCAB]
    assert (ours - expected).abs().max() <= 1e-5
    step, _, curve = results[0]
    plain = plain_steps(model, values, config)
    assert step == 5 and len(curve) == len(plain) == 5
    for ours_of, expected_of in zip(curve, plain, strict=True):
        assert ours_of == pytest.approx(expected_of, abs=1e-5)
    assert all(one[0] != other[0] for one, other in pairwise(plain))


def plain_model(values: dict[str, Tensors]) -> LlamaForCausalLM:
    """transformers' model of the known weights."""
    config = LlamaConfig(
        vocab_size=reference.VOCAB, hidden_size=reference.HIDDEN,
        intermediate_size=reference.FFN, num_hidden_layers=reference.LAYERS,
        num_attention_heads=reference.HEADS, num_key_value_heads=reference.GROUPS,
        rms_norm_eps=1e-5, tie_word_embeddings="lm_head.weight" not in values["fp32"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(values["fp32"], strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


def plain_steps(
    model: LlamaForCausalLM, values: dict[str, Tensors], config: front.RunConfig
) -> front.Curve:
    """Steps 6 to 10 with torch's AdamW, which has the known moments."""
    settings = config.optimizer
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
    )
    for name, parameter in named.items():
        moments = {key: values[key][name].clone() for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(5.0), **moments}
    curve = []
    for step in range(5, 10):
        batch = front.samples(config, step)
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        curve.append((loss.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    return curve
