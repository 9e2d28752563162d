"""A tiny model trained in any layout through the engine: the subject of the equivalence tests.

Every layout sees the same samples and starts from the same weights, so losses and gradient norms
can be held against those of one process. SGD shows a wrong gradient scale that Adam would hide; the
clip binds at every step, so a wrong norm changes the losses too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.layout import Layout
from megatron.config.pipeline_stages import stage_bounds
from megatron.config.shape import ModelShape
from megatron.engine import Engine, EngineOptions, start_distributed
from megatron.model.layer import Layer, ModelContext
from megatron.model.registry import ARCHITECTURES
from megatron.parallel.cross_entropy import mean_vocab_parallel_cross_entropy
from megatron.parallel.groups import Groups, make_groups

GLOBAL_BATCH = 8
SEQ_LENGTH = 32
VOCAB_SIZE = 200  # not a multiple of 128: the padding is at work, and differs with TP
CLIP = 0.3
NOTHING_STAYS_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 keeps whole what is small or soon used again: in a tiny model, else, everything."""
LEARNING_RATE = {"fp32": 0.5, "fp16": 0.5, "bf16": 0.1}  # bf16's own rounding grows with the rate


@dataclass(frozen=True)
class Case:
    """A layout and what else may not change the losses.

    Attributes:
        tp, pp, dp, sp: sizes of the axes.
        sequence_parallel: Megatron's, inside the tensor-parallel group.
        kv_heads: key/value heads.
        zero_stage: as handed to DeepSpeed, 1 to 3.
        tied: tied embeddings.
        gas: micro-batches of a step; the global batch stays the same.
        dtype: fp32, bf16 or fp16.
        recompute: none, selective or full.
        steps: to take.
        optimizer: sgd or adamw.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sp: int = 1
    sequence_parallel: bool = False
    kv_heads: int = 4
    zero_stage: int = 1
    tied: bool = False
    gas: int = 1
    dtype: str = "fp32"
    recompute: str = "none"
    steps: int = 10
    optimizer: str = "sgd"

    @property
    def world(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp * self.sp

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        names = f"tp{self.tp}-pp{self.pp}-dp{self.dp}-z{self.zero_stage}-{tied}-gas{self.gas}"
        extra = [x for x in (self.dtype, self.recompute) if x not in ("fp32", "none")]
        extra += [f"sp{self.sp}"] * (self.sp > 1) + ["sequence"] * self.sequence_parallel
        extra += [f"kv{self.kv_heads}"] * (self.kv_heads != 4)
        return "-".join([names, *extra])


def reference(case: Case) -> Case:
    """The one-process case with the same result."""
    serial = {"tp": 1, "pp": 1, "dp": 1, "sp": 1, "sequence_parallel": False}
    return dataclasses.replace(case, **serial, zero_stage=1, gas=1, recompute="none")


def model_shape(case: Case) -> ModelShape:
    """Four blocks with grouped-query attention; kv heads fit TP 4."""
    return ModelShape(
        num_layers=4,
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=case.kv_heads,
        ffn_hidden_size=96,
        vocab_size=VOCAB_SIZE,
        tie_embeddings=case.tied,
        nope_interval=4,
        rope_theta=10000.0,
    )


def model_layers(case: Case, groups: Groups) -> list[Layer]:
    """The model on this rank."""
    context = ModelContext(
        groups.tp,
        groups.sp,
        recompute=case.recompute,
        sequence_parallel=case.sequence_parallel,
    )
    return ARCHITECTURES["llama"].layers(model_shape(case), context)


def mean_loss(groups: Groups) -> Callable[[Tensor, Tensor], Tensor]:
    """loss(logits, labels)."""
    return partial(mean_vocab_parallel_cross_entropy, tp=groups.tp, vocab_size=VOCAB_SIZE)


def micro_batches(case: Case, groups: Groups, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of a step's samples, which are the same in every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    samples = torch.randint(0, VOCAB_SIZE, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    micro = GLOBAL_BATCH // (case.gas * case.dp)
    for number in range(case.gas):
        start = number * micro * case.dp + groups.dp.rank * micro
        part = samples[start : start + micro]
        yield part[:, :-1], part[:, 1:]


def deepspeed_settings(case: Case) -> dict:
    """What megatron.config.deepspeed gives for such a run, spelled out for the few keys used."""
    settings = {
        "train_batch_size": GLOBAL_BATCH * case.sp,  # pieces of samples
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // (case.gas * case.dp),
        "gradient_accumulation_steps": case.gas,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": case.zero_stage},
    }
    if case.zero_stage == 3:
        settings["zero_optimization"] |= NOTHING_STAYS_WHOLE
    if case.sequence_parallel:
        settings["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if case.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        if case.zero_stage == 1:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if case.dtype == "fp16":
        settings["fp16"] = {"enabled": True, "initial_scale_power": 8}
    return settings


def make_optimizer(case: Case):
    """Weights by name -> optimizer."""

    def build(named):
        parameters = [parameter for _, parameter in named]
        if case.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=LEARNING_RATE[case.dtype])
        return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)

    return build


def build(case: Case) -> Engine:
    """The engine of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    start_distributed("gloo", rank, world, rank, "", 60)
    groups = make_groups(Layout(case.tp, case.pp, case.dp, case.sp))
    options = EngineOptions(
        deepspeed_config=deepspeed_settings(case),
        gradient_accumulation_steps=case.gas,
        stage_bounds=stage_bounds((4 // case.pp,) * case.pp),
        device=torch.device("cpu"),
    )
    return Engine(
        model_layers(case, groups),
        mean_loss(groups),
        make_optimizer(case),
        groups,
        options,
    )


def run_steps(engine: Engine, case: Case, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps first .. last - 1."""
    result = []
    for step in range(first, last):
        loss = engine.train_batch(micro_batches(case, engine.groups, step))
        result.append((float(loss), float(engine.gradient_norm())))
    return result


def train(case: Case) -> list[tuple[float, float]]:
    """All steps of a case from the start; what the tests run on every rank."""
    return run_steps(build(case), case, 0, case.steps)
