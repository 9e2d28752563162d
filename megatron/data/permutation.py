"""Keyed pseudo-random permutations of [0, n) in O(1): no shuffle index is built, stored or locked.

A Feistel network permutes the smallest power of two that holds n; a value that lands at n or beyond
is permuted again until it lands inside (cycle walking), so the map stays one-to-one on [0, n).
"""

from __future__ import annotations

import hashlib
import struct

Keys = tuple[int, ...]

# Luby and Rackoff need 4 rounds of a good round function; small halves want more to look uniform.
NUM_ROUNDS = 8
_MASK64 = (1 << 64) - 1
# Odd 64-bit multipliers of MurmurHash3's finaliser: every input bit reaches the top bits.
_MULTIPLY_1 = 0xFF51AFD7ED558CCD
_MULTIPLY_2 = 0xC4CEB9FE1A85EC53


def round_keys(seed: int, identity: str, epoch: int) -> Keys:
    """Keys of the permutation of one epoch of one file.

    Args:
        seed: the run's seed.
        identity: names the file; not its folder, so that moved data keeps its order.
        epoch: 0-based pass over the file.

    Returns:
        `NUM_ROUNDS` integers of 64 bits.
    """
    text = f"{seed}\n{epoch}\n{identity}".encode()
    digest = hashlib.blake2b(text, digest_size=8 * NUM_ROUNDS).digest()
    return struct.unpack(f"<{NUM_ROUNDS}Q", digest)


class Permutation:
    """One pseudo-random permutation of [0, n), evaluated value by value."""

    def __init__(self, n: int, keys: Keys) -> None:
        """Permutation of [0, n) under `keys` (from `round_keys`)."""
        assert 0 < n < 1 << 62, f"a permutation of [0, {n}) does not exist"
        assert len(keys) == NUM_ROUNDS
        self.n = n
        self._keys = keys
        bits = max(2, (n - 1).bit_length())  # both halves need a bit
        self._left_bits = bits // 2
        self._right_bits = bits - self._left_bits

    def __call__(self, i: int) -> int:
        """Image of `i`; both in [0, n)."""
        assert 0 <= i < self.n, f"{i} is not in [0, {self.n})"
        value = self._rounds(i)
        while value >= self.n:
            value = self._rounds(value)
        return value

    def inverse(self, image: int) -> int:
        """The `i` whose image is `image`; both in [0, n)."""
        assert 0 <= image < self.n, f"{image} is not in [0, {self.n})"
        value = self._rounds_back(image)
        while value >= self.n:
            value = self._rounds_back(value)
        return value

    def _rounds(self, value: int) -> int:
        left, right = value >> self._right_bits, value & ((1 << self._right_bits) - 1)
        left_shift, right_shift = 64 - self._left_bits, 64 - self._right_bits
        for number in range(0, NUM_ROUNDS, 2):
            left ^= _mix(right, self._keys[number]) >> left_shift
            right ^= _mix(left, self._keys[number + 1]) >> right_shift
        return left << self._right_bits | right

    def _rounds_back(self, value: int) -> int:
        left, right = value >> self._right_bits, value & ((1 << self._right_bits) - 1)
        left_shift, right_shift = 64 - self._left_bits, 64 - self._right_bits
        for number in reversed(range(0, NUM_ROUNDS, 2)):
            right ^= _mix(left, self._keys[number + 1]) >> right_shift
            left ^= _mix(right, self._keys[number]) >> left_shift
        return left << self._right_bits | right


def _mix(value: int, key: int) -> int:
    """64 bits that depend on every bit of `value` and `key`."""
    value = (value ^ key) * _MULTIPLY_1 & _MASK64
    return (value ^ value >> 32) * _MULTIPLY_2 & _MASK64
