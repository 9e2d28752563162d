"""Continues a prompt with the model in its layout; every rank takes part and gets the text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine import Engine
from megatron.parallel.control import Control


def generate(
    engine: Engine,
    prompt: list[int],
    new_tokens: int,
    *,
    vocab_size: int,
    context: int,
    control: Control,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
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
        temperature: 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens.
        seed: of the draws.
        stop_at: an id that ends the text, such as the end of a document.
        limit_s: seconds after which no further token is drawn.
        tick: called after each token.

    Returns:
        The new ids.

    Raises:
        RuntimeError: a rank could not compute or draw a token; raised on all.
    """
    generator = torch.Generator().manual_seed(seed)
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
                drawn = _draw(logits, temperature, top_k, generator)
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


def _draw(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k, logits.numel()))
    chances = torch.softmax(values / temperature, dim=0)
    return int(ids[torch.multinomial(chances, 1, generator=generator)])
