"""Runs of matrices to the ranks that own them, and back: one message each way for many matrices.

Over a data-parallel axis every rank holds a run of each matrix (or none), and one rank wants it
whole. A rank sends its runs once, however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.parallel.groups import Axis

Extent = tuple[int, int]  # first element in the flattened matrix, elements


class SpanExchange:
    """Where the runs of some matrices lie; made by a collective of the axis.

    Args:
        dp: the axis.
        owners: place on the axis of each matrix' owner.
        runs: this rank's of each matrix; (0, 0) where it has none.
        device: of what is sent.
    """

    def __init__(
        self, dp: Axis, owners: Sequence[int], runs: Sequence[Extent], device: torch.device
    ) -> None:
        self._dp = dp
        mine = torch.tensor(runs, device=device).view(-1, 2)
        tables = [torch.empty_like(mine) for _ in range(dp.size)]
        if dp.group is None:
            tables = [mine]
        else:
            dist.all_gather(tables, mine, group=dp.group)
        self._runs: list[list[Extent]] = [[(s, n) for s, n in table.tolist()] for table in tables]
        # Matrices by the place of their owner.
        self._given = [[m for m, o in enumerate(owners) if o == place] for place in range(dp.size)]
        self._owned = self._given[dp.rank]

    def to_owners(self, runs: Sequence[Tensor]) -> dict[int, Tensor]:
        """Brings the matrices together; a collective.

        Args:
            runs: (K, elements) of each matrix, K numbers for each element.

        Returns:
            (K, elements) of the whole of each matrix that this rank owns, by its number.
        """
        width, nothing = len(runs[0]), runs[0].new_empty(0)
        sent = [
            torch.cat([nothing, *(runs[m].reshape(-1) for m in numbers)]) for numbers in self._given
        ]
        lengths = [width * sum(rows[m][1] for m in self._owned) for rows in self._runs]
        received = self._exchange(sent, lengths)
        ends = {m: max(sum(rows[m]) for rows in self._runs) for m in self._owned}
        whole = {m: nothing.new_empty(width, end) for m, end in ends.items()}
        for rows, part in zip(self._runs, received, strict=True):
            sizes = [width * rows[m][1] for m in self._owned]
            for m, values in zip(self._owned, torch.split(part, sizes), strict=True):
                start, length = rows[m]
                whole[m][:, start : start + length] = values.view(width, length)
        return whole

    def from_owners(self, whole: Mapping[int, Tensor], like: Tensor) -> list[Tensor]:
        """Gives every rank its runs; a collective.

        Args:
            whole: (elements,) of each matrix that this rank owns.
            like: type and device of the values.

        Returns:
            This rank's run of each matrix.
        """
        nothing = like.new_empty(0)
        sent = [
            torch.cat([nothing, *(whole[m][rows[m][0] : sum(rows[m])] for m in self._owned)])
            for rows in self._runs
        ]
        own = self._runs[self._dp.rank]
        lengths = [sum(own[m][1] for m in numbers) for numbers in self._given]
        runs = [nothing] * len(own)
        for numbers, part in zip(self._given, self._exchange(sent, lengths), strict=True):
            parts = torch.split(part, [own[m][1] for m in numbers])
            for m, values in zip(numbers, parts, strict=True):
                runs[m] = values
        return runs

    def _exchange(self, sent: list[Tensor], lengths: list[int]) -> Sequence[Tensor]:
        """What each rank has sent here, `lengths` elements; all-to-all of what is sent to each."""
        if self._dp.group is None:
            return sent
        received = sent[0].new_empty(sum(lengths))
        dist.all_to_all_single(
            received,
            torch.cat(sent),
            output_split_sizes=lengths,
            input_split_sizes=[part.numel() for part in sent],
            group=self._dp.group,
        )
        return torch.split(received, lengths)
