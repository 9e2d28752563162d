"""Continues a prompt with the model in its layout; every rank takes part and gets the text."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.engine import Engine


def generate(
    engine: Engine,
    prompt: list[int],
    new_tokens: int,
    *,
    vocab_size: int,
    context: int,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
    stop_at: int | None = None,
) -> list[int]:
    """Samples tokens one by one; a collective over all ranks.

    Args:
        engine: the trained model.
        prompt: token ids, at least one, equal on all ranks.
        new_tokens: tokens to add at most.
        vocab_size: ids below this can be drawn.
        context: tokens the model sees, its sequence length.
        temperature: 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens.
        seed: of the draws.
        stop_at: an id that ends the text, such as the end of a document.

    Returns:
        The new ids.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(new_tokens):
        # The whole window is recomputed; its length is fixed so that compiled blocks see one
        # shape. Causal attention hides the padding on the right.
        window = tokens[-context:]
        padded = torch.zeros(1, context, dtype=torch.long)
        padded[0, : len(window)] = torch.tensor(window)
        logits = _last_logits(engine, padded, len(window) - 1, vocab_size)
        token = _draw(logits, temperature, top_k, generator)
        if token == stop_at:
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
