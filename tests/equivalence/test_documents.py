"""Documents kept apart are documents trained apart, in every layout.

The reference is transformers, given each document by itself: no mask, positions from 0, a plain sum
over the tokens that count, SGD and a clip that binds. A wrong mask, position, micro-batch of a
recomputed pass, or count in the mean moves the losses by 1e-3 and more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron.config.schema import RunConfig
from megatron.engine import Engine
from megatron.parallel.control import make_control
from megatron.training.resume import resume
from tests.checkpoint.hugging_face_models import hugging_face_model
from tests.equivalence import front
from tests.spawn import run
from tools import convert_hf

EOD = 199
STEPS = 3
APART = {"RESET_ATTENTION_MASK": "1", "RESET_POSITION_IDS": "1", "EOD_MASK_LOSS": "1"}
KINDS = {
    "llama": {"ROPE_THETA": "10000", "WEIGHT_DECAY": "0"},
    "smollm3": {
        "ROPE_THETA": "2000000",
        "TIE_EMBEDDINGS": "1",
        "NOPE_INTERVAL": "4",
        "WEIGHT_DECAY": "0",
    },
    "gpt2": {
        "ARCHITECTURE": "gpt2",
        "SEQ": "64",
        "NUM_KV_HEAD": "8",
        "TIE_EMBEDDINGS": "1",
        "WEIGHT_DECAY": "0",
    },
}


class Told(NamedTuple):
    """What a rank reports: the steps, then an evaluation, and the logits of a fixed input."""

    curve: front.Curve
    evaluated: float
    logits: Tensor | None


def samples(run_of: RunConfig, step: int) -> Tensor:
    """(GBS, S + 1) tokens whose documents are of any length, more of them in earlier samples."""
    tokens = front.samples(run_of, step)
    generator = torch.Generator().manual_seed(step)
    shares = torch.linspace(0.5, 0.02, len(tokens)).unsqueeze(1)
    tokens[torch.rand(tokens.shape, generator=generator) < shares] = EOD
    return tokens


def micro_batches(run_of: RunConfig, engine: Engine, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a step; every stage has it."""
    size, dp = run_of.train.micro_batch_size, engine.groups.dp
    for number in range(run_of.train.gradient_accumulation_steps):
        start = (number * dp.size + dp.rank) * size
        part = samples(run_of, step)[start : start + size]
        yield part[:, :-1], part[:, 1:]


def train(variables: Mapping[str, str], first: int = 0, save: bool = False) -> Told:
    """Steps `first` to STEPS from the newest checkpoint of the run's folder."""
    run_of, control = front.run_config(variables), make_control()
    engine = front.build(run_of, eod=EOD)
    resume(run_of, engine, None, control)
    curve = []
    for step in range(first, STEPS if not save else 1):
        engine.set_learning_rate(run_of.optimizer.learning_rate)
        loss = float(engine.train_batch(micro_batches(run_of, engine, step)))
        curve.append((loss, float(engine.gradient_norm())))
    if save:
        front.save(run_of, engine, 1, control)
    evaluated = float(engine.eval_batch(micro_batches(run_of, engine, 50)))
    return Told(curve, evaluated, engine.logits(samples(run_of, 60)[:2, :-1]))


def documents(sample: Tensor, apart: bool) -> Iterator[Tensor]:
    """A sample's documents, each with the token after it as its last label."""
    cuts = [i + 1 for i, token in enumerate(sample[:-1].tolist()) if token == EOD and apart]
    edges = sorted({0, *cuts, len(sample) - 1})
    for first, last in pairwise(edges):
        yield sample[first : last + 1]


def batch_loss(model: Any, batch: Tensor, options: Mapping[str, str]) -> Tensor:
    """Mean loss over the tokens that count, each document by itself where they are apart."""
    total, count = torch.zeros(()), 0
    for sample in batch:
        for document in documents(sample, "RESET_ATTENTION_MASK" in options):
            tokens, labels = document[None, :-1], document[1:]
            positions = torch.arange(len(labels))
            if "RESET_POSITION_IDS" in options and "RESET_ATTENTION_MASK" not in options:
                parts = documents(sample, True)
                positions = torch.cat([torch.arange(len(part) - 1) for part in parts])
            logits = model(
                tokens, position_ids=positions[None], attention_mask=torch.ones_like(tokens)
            ).logits[0]
            losses = cross_entropy(logits, labels, reduction="none")
            kept = torch.ones_like(losses)
            if "EOD_MASK_LOSS" in options:
                kept = (tokens[0] != EOD).float()
            total, count = total + (losses * kept).sum(), count + int(kept.sum())
    return total / count


def plain(folder: Path, run_of: RunConfig, options: Mapping[str, str]) -> Told:
    """The same steps with nothing but torch and transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=run_of.optimizer.learning_rate)
    curve = []
    for step in range(STEPS):
        loss = batch_loss(model, samples(run_of, step), options)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run_of.optimizer.clip_grad)
        curve.append((loss.item(), norm.item()))
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        evaluated = float(batch_loss(model, samples(run_of, 50), options))
        rows = [
            torch.cat([model(part[None, :-1]).logits[0] for part in documents(sample, True)])
            for sample in samples(run_of, 60)[:2]
        ]
    return Told(curve, evaluated, torch.stack(rows))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(kind, folder): a random model imported into a run's folder; made once."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            hugging_face_model(kind, made[kind] / "hf")
            arguments = ["import", str(made[kind] / "hf"), str(made[kind] / "run")]
            assert convert_hf.main(arguments) == 0
        return made[kind]

    return of


@pytest.fixture(scope="module")
def expected(imported: Any) -> Any:
    """What the reference tells of a kind and options; computed once."""
    known: dict[tuple[str, ...], Told] = {}

    def of(kind: str, options: Mapping[str, str]) -> Told:
        key = (kind, *options)
        if key not in known:
            run_of = front.run_config({**KINDS[kind], **options})
            known[key] = plain(imported(kind) / "hf", run_of, options)
        return known[key]

    return of


def check(
    imported: Any,
    expected: Any,
    layout: Mapping[str, str],
    options: Mapping[str, str] = APART,
    kind: str = "llama",
) -> None:
    """All ranks of a layout tell what the reference tells."""
    variables = {**KINDS[kind], **options, **layout, "RUN_DIR": str(imported(kind) / "run")}
    want = expected(kind, options)
    results = run(train, front.world(variables), variables)
    for told in results:
        for (loss, norm), (want_loss, want_norm) in zip(told.curve, want.curve, strict=True):
            assert loss == pytest.approx(want_loss, abs=1e-5)
            assert norm == pytest.approx(want_norm, abs=1e-5 * max(1, want_norm))
        assert told.evaluated == pytest.approx(want.evaluated, abs=1e-5)
    if options is APART:
        tp = int(layout.get("TP", "1"))
        parts = [told.logits for told in results if told.logits is not None][-tp:]
        logits = torch.cat(parts, dim=-1)[..., :200]
        torch.testing.assert_close(logits, want.logits, rtol=0, atol=2e-5)


QUICK: dict[str, dict[str, str]] = {
    "one process": {},
    "tp2-sequence": {"TP": "2", "SEQUENCE_PARALLEL": "1"},
    "pp2-recompute": {"PP": "2", "USE_ACTIVATION_CHECKPOINTING": "1"},
    "ulysses": {"SP": "2"},
    "dp2-zero3": {"WORLD_SIZE": "2", "ZERO_STAGE": "3"},
}
LONG: dict[str, dict[str, str]] = {
    "no-flash": {"NO_FLASH_ATTN": "1"},
    "tp2": {"TP": "2", "USE_ACTIVATION_CHECKPOINTING": "selective"},
    "pp4": {"PP": "4", "MICRO_BATCH": "1"},
    "pp2-selective": {"PP": "2", "USE_ACTIVATION_CHECKPOINTING": "selective", "MICRO_BATCH": "1"},
    "pp2-runs": {"PP": "2", "USE_ACTIVATION_CHECKPOINTING": "1", "CHECKPOINT_NUM_LAYERS": "2"},
    "dualpipev": {
        "PP": "2",
        "PIPELINE_SCHEDULE": "dualpipev",
        "USE_ACTIVATION_CHECKPOINTING": "1",
    },
    "dp2-zero1": {"WORLD_SIZE": "2"},
    "dp2-zero2": {"WORLD_SIZE": "2", "ZERO_STAGE": "2", "USE_ACTIVATION_CHECKPOINTING": "1"},
    "tp2-pp2": {"TP": "2", "PP": "2"},
    "pp2-dp2": {"PP": "2", "WORLD_SIZE": "4"},
    "ulysses-pp2": {"SP": "2", "PP": "2", "USE_ACTIVATION_CHECKPOINTING": "1"},
    "ulysses-tp2-zero3": {"SP": "2", "TP": "2", "SEQUENCE_PARALLEL": "1", "ZERO_STAGE": "3"},
    "ulysses-dp2": {"SP": "2", "WORLD_SIZE": "4", "ZERO_STAGE": "2"},
    "mics": {"WORLD_SIZE": "4", "ZERO_STAGE": "3", "MICS_SHARD_SIZE": "2", "MICRO_BATCH": "1"},
}


@pytest.mark.parametrize("layout", QUICK)
def test_layout(layout: str, imported: Any, expected: Any) -> None:
    check(imported, expected, QUICK[layout])


@pytest.mark.long
@pytest.mark.parametrize("layout", LONG)
def test_layout_long(layout: str, imported: Any, expected: Any) -> None:
    check(imported, expected, LONG[layout])


OPTIONS: dict[str, dict[str, str]] = {
    "mask": {"RESET_ATTENTION_MASK": "1"},
    "positions": {"RESET_POSITION_IDS": "1"},
    "loss": {"EOD_MASK_LOSS": "1"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_one_option(option: str, imported: Any, expected: Any) -> None:
    check(imported, expected, {}, OPTIONS[option])


@pytest.mark.long
@pytest.mark.parametrize("layout", ["ulysses", "pp2-recompute", "dp2-zero3"])
@pytest.mark.parametrize("option", OPTIONS)
def test_one_option_in_a_layout(option: str, layout: str, imported: Any, expected: Any) -> None:
    check(imported, expected, QUICK[layout], OPTIONS[option])


@pytest.mark.long
@pytest.mark.parametrize("layout", [{}, {"TP": "2", "PP": "2"}, {"SP": "2"}], ids=str)
@pytest.mark.parametrize("kind", ["smollm3", "gpt2"])
def test_other_positions(layout: dict[str, str], kind: str, imported: Any, expected: Any) -> None:
    check(imported, expected, layout, APART, kind)


@pytest.mark.long
def test_resume_in_another_layout(imported: Any, expected: Any, tmp_path: Path) -> None:
    source = str(imported("llama") / "run/checkpoints")
    variables = {**KINDS["llama"], **APART, "RUN_DIR": str(tmp_path)}
    run(partial(train, save=True), 1, {**variables, "LOAD": source})
    for layout in (QUICK["ulysses"], QUICK["pp2-recompute"]):
        for told in run(train, 2, {**variables, **layout}, 1):
            for got, want in zip(told.curve, expected("llama", APART).curve[1:], strict=True):
                assert got == pytest.approx(want, abs=1e-5)
