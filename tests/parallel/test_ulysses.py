from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.parallel.groups import SERIAL
from megatron.parallel.ulysses import (
    all_positions,
    head_to_seq_all_to_all,
    own_positions,
    seq_to_head_all_to_all,
)
from tests.parallel.axis import whole_sequence
from tests.spawn import RankError, run

B, S, N, D = 2, 8, 8, 3


def whole(heads: int, salt: int) -> Tensor:
    """(B, S, heads, D), equal on all ranks."""
    return torch.randn(B, S, heads, D, generator=torch.Generator().manual_seed(salt))


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, S, N, D): mixes all positions, each query head with the key head that it reads."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bsnd,btnd->bnst", q, k)
    return torch.einsum("bnst,btnd->bsnd", scores, v)


def around_the_heads(kv_heads: int) -> dict[str, Tensor]:
    """Output and gradients of this rank's piece, and the shapes in between."""
    sp = whole_sequence()
    pieces = [own_positions(whole(heads, i), sp) for i, heads in enumerate((N, kv_heads, kv_heads))]
    q, k, v = (piece.clone().requires_grad_() for piece in pieces)
    inside = seq_to_head_all_to_all(q, k, v, sp)
    assert inside[0].shape == (B, S, N // sp.size, D)
    assert inside[1].shape == inside[2].shape
    assert inside[0].shape[2] % inside[1].shape[2] == 0
    y = head_to_seq_all_to_all(mixed(*inside), sp)
    y.backward(own_positions(whole(N, 9), sp))
    grads = {name: x.grad for name, x in zip("qkv", (q, k, v), strict=True)}
    return {"y": y.detach(), **grads, "inside": torch.tensor(inside[1].shape[2])}


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "inside"),
    [(2, 8, 4), (2, 2, 1), (4, 2, 1), (4, 1, 1), (2, 1, 1), (1, 2, 2)],
)
def test_output_and_gradients_are_those_of_the_whole_sequence(
    ranks: int, kv_heads: int, inside: int
) -> None:
    q, k, v = (whole(heads, i).requires_grad_() for i, heads in enumerate((N, kv_heads, kv_heads)))
    y = mixed(q, k, v)
    y.backward(whole(N, 9))
    want = {"y": y.detach(), "q": q.grad, "k": k.grad, "v": v.grad}
    results = run(around_the_heads, ranks, kv_heads)
    for name, expected in want.items():
        torch.testing.assert_close(torch.cat([result[name] for result in results], 1), expected)
    assert all(int(result["inside"]) == inside for result in results)


def odd_shares() -> int:
    """Six query heads of two key heads over three ranks: neither 2 nor 3 divides the other."""
    sp = whole_sequence()
    q, k, v = (torch.arange(h).view(1, 1, h, 1).expand(1, 1, h, 1) * 1.0 for h in (6, 2, 2))
    inside = seq_to_head_all_to_all(q, k, v, sp)
    group = inside[0].shape[2] // inside[1].shape[2]
    read = inside[1].repeat_interleave(group, dim=2)
    assert torch.equal(read, inside[0].div(3, rounding_mode="floor"))
    return inside[1].shape[2]


def test_key_heads_that_do_not_divide_evenly_go_where_they_are_read() -> None:
    assert run(odd_shares, 3) == [2, 2, 2]


def there_and_back() -> bool:
    sp = whole_sequence()
    tokens = torch.arange(2 * 12).view(2, 12)
    own = own_positions(tokens, sp)
    assert own[0, 0] == sp.rank * 12 // sp.size
    return torch.equal(all_positions(own, sp), tokens)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_pieces_make_up_the_sequence(ranks: int) -> None:
    assert all(run(there_and_back, ranks))


def test_alone_nothing_is_copied() -> None:
    q = torch.ones(1, 4, 2, 2)
    assert seq_to_head_all_to_all(q, q, q, SERIAL) == (q, q, q)
    assert head_to_seq_all_to_all(q, SERIAL) is q
    assert all_positions(q, SERIAL) is q


def unequal() -> None:
    own_positions(torch.zeros(1, 5), whole_sequence())


def test_unequal_pieces_are_refused() -> None:
    with pytest.raises(RankError, match="5 positions over 2 ranks"):
        run(unequal, 2)
