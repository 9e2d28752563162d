"""How often a file's documents repeat, and whether the last pass is shuffled apart."""

from __future__ import annotations

from typing import NamedTuple

from megatron.config.errors import DataError

SEPARATE_BELOW = 0.80  # of an epoch's samples: a last epoch used less than this is shuffled apart


class Epochs(NamedTuple):
    """Passes over a file's documents.

    Attributes:
        passes: how many.
        separate_last: the last pass is shuffled apart from those before it.
        samples: of all passes.
        joint_samples: samples shuffled together; the rest are shuffled apart.
    """

    passes: int
    separate_last: bool
    samples: int
    joint_samples: int


NO_EPOCHS = Epochs(0, False, 0, 0)  # of a file without tokens, of which none are requested


def plan_epochs(
    tokens: int, seq_length: int, wanted: int, where: str, exact: int | None = None
) -> Epochs:
    """The fewest passes that give the samples wanted, or exactly `exact`.

    Args:
        tokens: of one pass.
        seq_length: S; neighbouring samples share one token.
        wanted: samples requested of the file.
        where: file and split, for messages.
        exact: passes that the user demands.

    Raises:
        DataError: there are no tokens, or `exact` passes are too few, or more than needed.
    """
    if tokens == 0:
        if wanted == 0:
            return NO_EPOCHS
        raise DataError(
            f"{where} holds documents but no tokens, and {wanted} samples are requested of it; "
            "remove the line from DATA_FILE_LIST or change the shares of the splits"
        )
    needed = -(-(wanted * seq_length + 1) // tokens)
    count = needed if exact is None else exact
    samples = _samples(count, tokens, seq_length)
    before = 0 if count == 1 else _samples(count - 1, tokens, seq_length)
    if samples < wanted or wanted < before:
        raise DataError(
            f"TRAIN_DATA_EXACT_NUM_EPOCHS={exact}: {where} needs {needed} epochs of {tokens} "
            f"tokens for {wanted} samples of {seq_length} tokens; unset it, or give a TRAIN_ITERS "
            "that needs as many in every file"
        )
    separate = count > 1 and wanted - before < int(SEPARATE_BELOW * _samples(1, tokens, seq_length))
    return Epochs(count, separate, samples, before if separate else samples)


def _samples(epochs: int, tokens: int, seq_length: int) -> int:
    return (epochs * tokens - 1) // seq_length
