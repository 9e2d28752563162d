"""Which attention kernel torch takes for a run's shapes: asked once, logged, refused if hopeless.

torch chooses by shapes, type and device, and falls back without a word to plain matrix products
("math"), whose scores are S x S for every head: quadratic memory, and several times the time.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.model.document_mask import KERNELS
from megatron.training.log import ALIKE

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG = 2048
"""Positions from which plain matrix products are warned about."""


@dataclass(frozen=True)
class Question:
    """What torch's choice depends on.

    Attributes:
        heads, kv_heads: of one rank, inside the attention.
        seq_length: S, all positions.
        width: of a head.
        dtype: bf16, fp16 or fp32.
        device: of the rank.
    """

    heads: int
    kv_heads: int
    seq_length: int
    width: int
    dtype: str
    device: torch.device

    @property
    def scores(self) -> int:
        """Bytes of the scores of one layer and one sample, as plain matrix products keep them."""
        return self.heads * self.seq_length**2 * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return (
            f"{self.heads} query and {self.kv_heads} key/value heads of {self.width}, "
            f"SEQ={self.seq_length}, {self.dtype}, {self.device.type}"
        )


Choose = Callable[[Question], str]


def question_of(run: RunConfig, device: torch.device) -> Question:
    """The shapes of a run inside the attention, where a Ulysses rank has all positions."""
    tp, sp = run.parallel.tensor_parallel, run.parallel.sequence_parallel
    kv_heads = run.model.num_key_value_heads // tp
    return Question(
        heads=run.model.num_attention_heads // (tp * sp),
        kv_heads=math.lcm(kv_heads, sp) // sp,
        seq_length=run.model.seq_length,
        width=run.model.head_width,
        dtype=run.train.dtype,
        device=device,
    )


def torchs_choice(question: Question) -> str:
    """torch's answer for a training step: flash, efficient, cudnn, overrideable (XPU's) or math."""

    def made(heads: int) -> torch.Tensor:
        shape = (1, question.seq_length, heads, question.width)
        tensor = torch.empty(
            shape, dtype=DTYPES[question.dtype], device=question.device, requires_grad=True
        )
        return tensor.transpose(1, 2)

    q, k, v = made(question.heads), made(question.kv_heads), made(question.kv_heads)
    grouped = question.heads != question.kv_heads
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, enable_gqa=grouped)
    return str(SDPBackend(choice).name).removesuffix("_ATTENTION").lower()


def expands_kv(run: RunConfig, device: torch.device, ask: Choose = torchs_choice) -> bool:
    """Whether keys and values are to be copied for each query head: where only then a kernel fits.

    Args:
        run: the configuration.
        device: of the rank.
        ask: question -> name of the kernel.

    Raises:
        ConfigError: one sample's scores of one layer are larger than the device's memory.
    """
    question = question_of(run, device)
    if run.data.reset_attention_mask:
        kernel = "FlexAttention" if device.type in KERNELS else "torch's, with a dense mask"
        log.info(f"attention: within documents, {kernel} ({question})")
        return False
    if run.train.no_flash_attention:
        _require_room(question, "NO_FLASH_ATTN=1 asks for plain matrix products; unset it")
        log.info(f"attention: plain matrix products, as NO_FLASH_ATTN asks ({question})")
        return False
    chosen = ask(question)
    if chosen != "math":
        log.info(f"attention: torch's {chosen} kernel ({question})")
        return False
    if question.heads != question.kv_heads:
        expanded = ask(replace(question, kv_heads=question.heads))
        if expanded != "math":
            log.info(
                f"attention: torch's {expanded} kernel, keys and values copied for each query head:"
                f" it has none for grouped heads here ({question})"
            )
            return True
    _warn_or_refuse(question, ask)
    return False


def _warn_or_refuse(question: Question, ask: Choose) -> None:
    """Names what would bring a fused kernel, asked and not guessed."""
    better = [
        name
        for name in ("bf16", "fp16")
        if name != question.dtype
        and ask(replace(question, dtype=name, kv_heads=question.heads)) != "math"
    ]
    advice = (
        f"DTYPE={better[0]} has a fused kernel"
        if better
        else "no type has a fused kernel for these heads on this torch: use another torch, "
        "other HEADS, or a shorter SEQ"
    )
    _require_room(question, advice)
    if question.seq_length >= LONG:
        log.warning(
            f"attention: plain matrix products ({question}): {question.scores / 2**30:.1f} GiB of "
            f"scores per layer and sample; {advice}",
            extra=ALIKE,
        )
    else:
        log.info(f"attention: plain matrix products ({question}); {advice}")


def _require_room(question: Question, advice: str) -> None:
    memory = _memory(question.device)
    if question.scores > memory:
        raise ConfigError(
            f"attention would be plain matrix products, whose scores are {question.heads} heads x "
            f"SEQ={question.seq_length} x {question.seq_length} x "
            f"{DTYPES[question.dtype].itemsize} bytes = {question.scores / 2**30:.1f} GiB for one "
            f"layer of one sample, and the device has {memory / 2**30:.1f} GiB: {advice}"
        )


def _memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(getattr(torch, device.type).get_device_properties(device).total_memory)
