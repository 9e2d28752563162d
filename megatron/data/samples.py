"""The samples of one file in one split, in a shuffled order that is computed, not stored.

A file of T tokens has (T - 1) // S samples: sample j is tokens j*S .. (j+1)*S inclusive. A split is
a contiguous range of them. Draw k is pass k // n over the range of n samples, permuted anew on each
pass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megatron.data.file_pool import FilePool
from megatron.data.indexed import file_dtype
from megatron.data.indexed_header import IndexHeader
from megatron.data.permutation import Permutation, round_keys

Tokens = npt.NDArray[np.int64]


def num_samples(token_count: int, seq_length: int) -> int:
    """Samples of `seq_length` + 1 tokens in a file; neighbours share one token."""
    return max(token_count - 1, 0) // seq_length


def split_ranges(count: int, shares: tuple[float, float, float]) -> tuple[range, range, range]:
    """Cut [0, count) into contiguous train, validation and test ranges by `shares`."""
    total = sum(shares)
    assert total > 0 and min(shares) >= 0, shares
    first = round(count * (shares[0] / total))
    second = round(count * ((shares[0] + shares[1]) / total))
    return range(first), range(first, second), range(second, count)


class FileSamples:
    """The samples [first, first + n) of one file, drawn without end."""

    def __init__(
        self,
        prefix: str,
        header: IndexHeader,
        seq_length: int,
        share: range,
        seed: int,
        identity: str,
        pool: FilePool,
        drawn: int = 0,
    ) -> None:
        """Samples of a split's share of a file.

        Args:
            prefix: path of the pair without its suffix.
            header: of its `.idx`.
            seq_length: S.
            share: sample numbers of the file that belong to the split, not empty.
            seed: the run's.
            identity: names the file in the permutation's key.
            pool: opens the file.
            drawn: draws that earlier stages of the run took; draw 0 is the one after them.
        """
        assert len(share) > 0 and share.stop <= num_samples(header.tokens, seq_length)
        self.prefix = prefix
        self._header = header
        self._dtype = file_dtype(header.dtype)
        self._seq_length = seq_length
        self._share = share
        self._seed = seed
        self.identity = identity
        self.drawn = drawn
        self._pool = pool
        self._permutation: tuple[int, Permutation] | None = None

    def __len__(self) -> int:
        """Samples of one pass."""
        return len(self._share)

    def locate(self, draw: int) -> tuple[int, int]:
        """Epoch, and sample number within the file, of a draw >= 0."""
        epoch, place = divmod(self.drawn + draw, len(self._share))
        return epoch, self._share[self._order(epoch)(place)]

    def draw_of(self, epoch: int, index: int) -> int:
        """The draw that gives sample `index` in an epoch; negative: an earlier stage's."""
        place = self._order(epoch).inverse(index - self._share.start)
        return epoch * len(self._share) + place - self.drawn

    @property
    def share(self) -> range:
        """Sample numbers of the file that belong to the split."""
        return self._share

    def read(self, index: int) -> Tokens:
        """Tokens of a sample of the file, int64 of shape (S + 1,), a copy."""
        size = self._header.item_bytes
        start, count = index * self._seq_length, self._seq_length + 1
        data = self._pool.read(f"{self.prefix}.bin", start * size, count * size)
        return np.frombuffer(data, dtype=self._dtype).astype(np.int64)

    def _order(self, epoch: int) -> Permutation:
        """Order of the samples in one epoch."""
        cached = self._permutation  # read once: another thread may replace it
        if cached is None or cached[0] != epoch:
            keys = round_keys(self._seed, self.identity, epoch)
            cached = (epoch, Permutation(len(self._share), keys))
            self._permutation = cached
        return cached[1]
