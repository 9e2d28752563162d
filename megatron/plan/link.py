"""What a step's communication costs on a link: the formulas of docs/parallelism.md, in seconds.

Bytes and messages are those that one rank sends; messages that wait for one another each pay the
latency. Nothing here is measured: arithmetic, and what of it runs beside, are arguments.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.schema import RunConfig


class Link(NamedTuple):
    """Between two ranks.

    Attributes:
        bytes_per_s: each way.
        latency_s: of one message, one way.
    """

    bytes_per_s: float
    latency_s: float


class Traffic(NamedTuple):
    """What one rank sends.

    Attributes:
        size: bytes.
        messages: one after the other.
    """

    size: float
    messages: int

    def times(self, count: int) -> Traffic:
        """The same `count` times."""
        return Traffic(self.size * count, self.messages * count)

    def seconds(self, link: Link) -> float:
        """Of the traffic alone."""
        return self.size / link.bytes_per_s + self.messages * link.latency_s


def scatter(size: float, ranks: int) -> Traffic:
    """A reduce-scatter or all-gather of an array of `size` bytes over a ring."""
    return Traffic(size * (ranks - 1) / ranks, ranks - 1)


def all_reduce(size: float, ranks: int) -> Traffic:
    """The two after each other."""
    return scatter(size, ranks).times(2)


def step_seconds(alone_s: float, traffic: Traffic, link: Link, hidden_s: float = 0.0) -> float:
    """A step on a link.

    Args:
        alone_s: of the same step where communication costs nothing.
        traffic: of one rank.
        link: the slowest that it takes.
        hidden_s: arithmetic that runs beside the traffic.
    """
    return alone_s + max(0.0, traffic.seconds(link) - hidden_s)


def tensor_parallel(run: RunConfig) -> Traffic:
    """Of a step: each all-reduce waits for the arithmetic before it."""
    count = run.train.gradient_accumulation_steps * (4 * run.model.num_layers + 2)
    return all_reduce(_hidden_state(run), run.parallel.tensor_parallel).times(count)


def pipeline(run: RunConfig) -> Traffic:
    """Of a step, on the path of one stage: a hidden state out and a gradient in, or the reverse.

    Sends and receives of a stage follow one another.
    """
    state = _hidden_state(run) / run.parallel.tensor_parallel
    return Traffic(state, 1).times(2 * run.train.gradient_accumulation_steps)


def gradients(run: RunConfig) -> Traffic:
    """Of a step with ZeRO 0, 1 or 2: reduce-scatters, after every micro-batch with ZeRO 2."""
    reduced = 2 if run.train.grad_reduce_in_bf16 or run.train.dtype == "fp16" else 4
    times = run.train.gradient_accumulation_steps if run.parallel.zero_stage == 2 else 1
    return scatter(_parameters(run) * reduced, run.zero_ranks).times(times)


def weights(run: RunConfig) -> Traffic:
    """Of a step with ZeRO 0, 1 or 2: one all-gather."""
    return scatter(_parameters(run) * _width(run), run.zero_ranks)


def _parameters(run: RunConfig) -> int:
    """Of a rank before ZeRO."""
    return run.parameters // (run.parallel.tensor_parallel * run.parallel.pipeline_parallel)


def _hidden_state(run: RunConfig) -> float:
    """Bytes of one micro-batch's hidden state: x of docs/parallelism.md."""
    positions = run.model.seq_length / run.parallel.sequence_parallel
    return run.train.micro_batch_size * positions * run.model.hidden_size * _width(run)


def _width(run: RunConfig) -> int:
    """Bytes of an activation or a weight."""
    return 4 if run.train.dtype == "fp32" else 2
