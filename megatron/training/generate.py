"""Continues a prompt: by the model in its layout, or by a whole one in a single process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.control import Control

if TYPE_CHECKING:
    from megatron.engine import Engine
    from megatron.training.saved_model import WholeModel


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens; 0: all.
        top_p: and among the fewest likeliest whose chances add up to this.
        seed: of the draws.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 1.0
    seed: int = 0

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """An id, from logits (V,) on the host."""
        if self.temperature == 0:
            return int(logits.argmax())
        values, ids = logits.topk(min(self.top_k or logits.numel(), logits.numel()))
        chances = torch.softmax(values / self.temperature, dim=0)
        before = chances.cumsum(0) - chances  # of the likelier ones; none for the likeliest
        chances = chances.masked_fill(before >= self.top_p, 0.0)
        return int(ids[torch.multinomial(chances, 1, generator=generator)])


def continued(
    model: WholeModel,
    prompt: list[int],
    new_tokens: int,
    sampling: Sampling,
    *,
    stop_at: int | None = None,
    slides: Callable[[int], None] = lambda kept: None,
) -> Iterator[int]:
    """The tokens that a model adds to a prompt, one by one.

    A text that reaches the model's length goes on from its last half.

    Args:
        model: with caches or without.
        prompt: at least one token, at most the model's length.
        new_tokens: at most.
        sampling: how they are drawn.
        stop_at: an id that ends the text.
        slides: told the first time that the text is cut, how many tokens are kept.
    """
    length = model.shape.seq_length
    generator = torch.Generator().manual_seed(sampling.seed)
    window, fresh, cut = list(prompt), list(prompt), False
    for number in range(new_tokens):
        if number == 0 or len(window) > length:
            if number:
                window = fresh = window[-(length // 2 or 1) :]
                if not cut:
                    slides(len(window))
                cut = True
            for cache in model.caches:
                cache.begin(min(length, len(window) + new_tokens - number))
        token = sampling.draw(model.next_logits(fresh if model.caches else window), generator)
        if token == stop_at:
            return
        yield token
        window, fresh = [*window, token], [token]


def generate(
    engine: Engine,
    prompt: list[int],
    new_tokens: int,
    *,
    vocab_size: int,
    context: int,
    control: Control,
    sampling: Sampling = Sampling(),
    stop_at: int | None = None,
    limit_s: float = math.inf,
    tick: Callable[[], None] = lambda: None,
) -> list[int]:
    """Samples tokens one by one; a collective over all ranks.

    Rank 0 draws each token and sends it to all, so that every replica takes the same passes: under
    ZeRO-3 one that ended a text earlier would leave the others waiting for its weights.

    Args:
        engine: the trained model.
        prompt: token ids, at least one, equal on all ranks.
        new_tokens: tokens to add at most.
        vocab_size: ids below this can be drawn.
        context: tokens the model sees, at most its sequence length.
        control: messages between all ranks.
        sampling: how tokens are drawn.
        stop_at: an id that ends the text, such as the end of a document.
        limit_s: seconds after which no further token is drawn.
        tick: called after each token.

    Returns:
        The new ids.

    Raises:
        RuntimeError: a rank could not compute or draw a token; raised on all.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens = list(prompt)
    end_of_text, deadline = vocab_size, time.monotonic() + limit_s
    for _ in range(new_tokens):
        # The whole window is recomputed; its length is fixed so that compiled blocks see one
        # shape. Causal attention hides the padding on the right.
        window = tokens[-context:]
        padded = torch.zeros(1, context, dtype=torch.long)
        padded[0, : len(window)] = torch.tensor(window)
        drawn, error = -1, None
        try:
            logits = _last_logits(engine, padded, len(window) - 1, vocab_size)
            if control.rank == 0:
                drawn = sampling.draw(logits, generator)
                if drawn == stop_at or time.monotonic() > deadline:
                    drawn = end_of_text
        except Exception as caught:  # the other ranks wait for this one's message
            error = caught
        failed, token = control.maximum([int(error is not None), drawn])
        tick()
        if failed:
            raise RuntimeError(f"a rank could not compute a token: {error}") from error
        if token == end_of_text:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def _last_logits(engine: Engine, tokens: Tensor, position: int, vocab_size: int) -> Tensor:
    """Logits (vocab_size,) at `position`, on the host of every rank, fp32."""
    tp, pp = engine.groups.tp, engine.groups.pp
    local = engine.logits(tokens)  # (1, S, V/tp) on one stage
    if local is not None:
        row = local[0, position].float().contiguous()
        parts = [torch.empty_like(row) for _ in range(tp.size)]
        if tp.group is None:
            parts = [row]
        else:
            dist.all_gather(parts, row, group=tp.group)
        full = torch.cat(parts)[:vocab_size].contiguous()
    else:
        full = torch.empty(vocab_size, device=engine.device)
    if pp.group is not None:
        dist.broadcast(full, src=pp.ranks[engine.last_stage], group=pp.group)
    return full.cpu()
