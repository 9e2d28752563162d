"""Rank 0 draws for all ranks, and a failure on one of them is raised on all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron.parallel.control import ALONE, make_control
from megatron.parallel.groups import SERIAL
from megatron.training.generate import Sampling, generate
from tests.spawn import run

V, GREEDY = 8, Sampling(temperature=0)


class Replica:
    """An engine that finds token `number + rank` likeliest in call `number`."""

    def __init__(self, rank: int, fails_at: int | None = None) -> None:
        self.groups = SimpleNamespace(tp=SERIAL, pp=SERIAL)
        self.device, self.last_stage = torch.device("cpu"), 0
        self.calls, self._rank, self._fails_at = 0, rank, fails_at
        self.seen: list[list[int]] = []

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.calls == self._fails_at:
            raise RuntimeError("out of memory")
        self.seen.append(tokens[0].tolist())
        logits = torch.zeros(1, tokens.shape[1], V)
        logits[..., (self.calls + self._rank) % V] = 1.0
        self.calls += 1
        return logits


def drawn(stop_at: int | None) -> tuple[list[int], int]:
    """Tokens and number of passes of this rank."""
    engine = Replica(dist.get_rank())
    control = make_control()
    tokens = generate(
        engine, [5], 6, vocab_size=V, context=4, control=control, sampling=GREEDY, stop_at=stop_at
    )
    return tokens, engine.calls


def test_replicas_that_differ_take_rank_0s_tokens_and_as_many_passes() -> None:
    assert run(drawn, 2, None) == [([0, 1, 2, 3, 4, 5], 6)] * 2
    # Rank 1's own logits would draw 3 one pass earlier.
    assert run(drawn, 2, 3) == [([0, 1, 2], 4)] * 2


def failed(rank_that_fails: int) -> tuple[str, int]:
    rank = dist.get_rank()
    engine = Replica(rank, fails_at=2 if rank == rank_that_fails else None)
    control = make_control()
    try:
        generate(engine, [5], 6, vocab_size=V, context=4, control=control, sampling=GREEDY)
    except RuntimeError as error:
        return str(error), engine.calls
    return "", engine.calls


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_ends_the_text_on_all(rank: int) -> None:
    results = run(failed, 2, rank)
    assert all("could not compute a token" in message for message, _ in results)
    assert "out of memory" in results[rank][0]
    assert [calls for _, calls in results] == [2 if number == rank else 3 for number in (0, 1)]


def test_the_window_is_padded_on_the_right_and_slides() -> None:
    engine = Replica(0)
    generate(engine, [7, 6], 4, vocab_size=V, context=4, control=ALONE, sampling=GREEDY)
    assert engine.seen == [[7, 6, 0, 0], [7, 6, 0, 0], [7, 6, 0, 1], [6, 0, 1, 2]]


def test_no_token_is_drawn_after_the_limit() -> None:
    engine = Replica(0)
    sizes = {"vocab_size": V, "context": 4}
    assert generate(engine, [7], 4, control=ALONE, limit_s=-1.0, **sizes) == []
    assert engine.calls == 1
