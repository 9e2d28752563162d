"""Which attention kernel a run's shapes get: asked or measured once, logged, refused if hopeless.

torch chooses by shapes, type and device, and falls back without a word to plain matrix products
("math"), whose scores are S x S for every head: quadratic memory, and several times the time. On
CUDA it has several fused kernels, whose times differ by shape: the fastest is measured and taken.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend

from megatron.config.errors import ConfigError
from megatron.config.schema import RunConfig
from megatron.model.attention import causal_attention
from megatron.model.document_mask import KERNELS
from megatron.training.log import ALIKE

log = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG = 2048
"""Positions from which plain matrix products are warned about."""
RIVALS = {"cuda": ("flash", "cudnn", "efficient")}
"""Device -> its fused kernels, where it has more than one."""
BETTER = 0.95
"""Share of the time of torch's own choice that another kernel must not exceed: near ties keep it,
so that a start does not compute other last bits than the start before.
"""
TOLERANCE = 0.02  # of a rival's output and gradients; rounding to bf16 gives 0.004
MEASURED = 8192
ROUNDS = 5


@dataclass(frozen=True)
class Question:
    """What torch's choice depends on.

    Attributes:
        heads, kv_heads: of one rank, inside the attention.
        seq_length: S, all positions.
        width: of a head.
        dtype: bf16, fp16 or fp32.
        device: of the rank.
        batch: samples.
    """

    heads: int
    kv_heads: int
    seq_length: int
    width: int
    dtype: str
    device: torch.device
    batch: int = 1

    @property
    def scores(self) -> int:
        """Bytes of the scores of one layer and one sample, as plain matrix products keep them."""
        return self.heads * self.seq_length**2 * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return (
            f"{self.heads} query and {self.kv_heads} key/value heads of {self.width}, "
            f"SEQ={self.seq_length}, {self.dtype}, {self.device.type}"
        )


@dataclass(frozen=True)
class AttentionChoice:
    """How a run's attention is computed.

    Attributes:
        kernels: in the order in which they are tried; none: torch chooses.
        expand_kv: keys and values are copied for each query head, as only then a kernel fits.
    """

    kernels: tuple[SDPBackend, ...] = ()
    expand_kv: bool = False


TORCHS = AttentionChoice()
"""torch chooses by itself."""
Choose = Callable[[Question], str]
Measure = Callable[[Question, str], float | None]


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
        batch=run.train.micro_batch_size,
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


def milliseconds(question: Question, kernel: str) -> float | None:
    """Time of a forward and a backward of at most MEASURED positions on the device.

    None where the kernel does not take the heads, or does not compute what torch's choice does.
    """
    length = min(question.seq_length, MEASURED)
    batch = min(question.batch, max(1, MEASURED // length))
    generator = torch.Generator(question.device).manual_seed(0)

    def drawn(heads: int) -> torch.Tensor:
        shape = (batch, length, heads, question.width)
        x = torch.randn(
            shape, generator=generator, device=question.device, dtype=DTYPES[question.dtype]
        )
        return x.transpose(1, 2).requires_grad_()

    inputs = [drawn(n) for n in (question.heads, question.kv_heads, question.kv_heads)]
    torchs = _computed(inputs, ())
    try:
        found = _computed(inputs, (backend(kernel),))  # the first time is not a usual one
    except RuntimeError:  # "No available kernel"
        return None
    if any(_distance(x, y) > TOLERANCE for x, y in zip(found, torchs, strict=True)):
        log.warning(f"attention: torch's {kernel} kernel is wrong for {question}; it is not taken")
        return None
    times = []
    for _ in range(ROUNDS):
        _synchronize(question.device)
        begin = time.perf_counter()
        _computed(inputs, (backend(kernel),))
        _synchronize(question.device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _computed(
    inputs: Sequence[torch.Tensor], kernels: tuple[SDPBackend, ...]
) -> list[torch.Tensor]:
    """The output (B, N, S, D), and the gradients of the inputs for its own as the output's."""
    q, k, v = inputs
    y = causal_attention(q, k, v, kernels)
    return [y.detach(), *torch.autograd.grad(y, inputs, y.detach())]


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Of the norms, relative; inf where one is not finite."""
    distance = float((x.float() - y.float()).norm() / y.float().norm())
    return distance if math.isfinite(distance) else math.inf


def backend(kernel: str) -> SDPBackend:
    """A kernel's name as torch has it."""
    named: SDPBackend = SDPBackend.__members__[
        kernel.upper() if kernel == "math" else f"{kernel.upper()}_ATTENTION"
    ]
    return named


def chosen(
    run: RunConfig,
    device: torch.device,
    ask: Choose = torchs_choice,
    measure: Measure = milliseconds,
) -> AttentionChoice:
    """How attention is computed: keys and values are copied where only then a kernel fits.

    Args:
        run: the configuration.
        device: of the rank.
        ask: question -> name of the kernel.
        measure: question, kernel -> milliseconds, None where it does not fit.

    Raises:
        ConfigError: one sample's scores of one layer are larger than the device's memory.
    """
    question = question_of(run, device)
    if run.data.reset_attention_mask:
        kernel = "FlexAttention" if device.type in KERNELS else "torch's, with a dense mask"
        log.info(f"attention: within documents, {kernel} ({question})")
        return TORCHS
    if run.train.no_flash_attention:
        _require_room(question, "NO_FLASH_ATTN=1 asks for plain matrix products; unset it")
        log.info(f"attention: plain matrix products, as NO_FLASH_ATTN asks ({question})")
        return AttentionChoice((SDPBackend.MATH,))
    own = ask(question)
    if own != "math":
        return _fastest(question, own, measure)
    if question.heads != question.kv_heads:
        expanded = ask(replace(question, kv_heads=question.heads))
        if expanded != "math":
            log.info(
                f"attention: torch's {expanded} kernel, keys and values copied for each query head:"
                f" it has none for grouped heads here ({question})"
            )
            return AttentionChoice(expand_kv=True)
    _warn_or_refuse(question, ask)
    return TORCHS


def _fastest(question: Question, own: str, measure: Measure) -> AttentionChoice:
    """torch's own choice, or a rival that is clearly faster; then the others, for other shapes."""
    rivals = [kernel for kernel in RIVALS.get(question.device.type, ()) if kernel != own]
    measured = {kernel: measure(question, kernel) for kernel in (own, *rivals) if rivals}
    times = {kernel: taken for kernel, taken in measured.items() if taken is not None}
    best = min(times, key=lambda kernel: times[kernel], default=own)
    if best != own and own in times and times[best] > BETTER * times[own]:
        best = own
    said = ", ".join(f"{kernel} {taken:.2f}" for kernel, taken in times.items())
    shown = f"; ms per layer, forward and backward: {said}" if len(times) > 1 else ""
    log.info(f"attention: torch's {best} kernel ({question}{shown})")
    if best == own:
        return TORCHS
    order = dict.fromkeys((best, own, *rivals, "math"))
    return AttentionChoice(tuple(backend(kernel) for kernel in order))


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
