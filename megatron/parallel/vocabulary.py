"""The one check that every token id is inside the vocabulary.

Cut over ranks, an id that no rank owns gives a zero embedding and a zero logit instead of an error:
the same bad data that stops a serial run would train silently. So the check is explicit, and the
same at every size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_token_ids(ids: Tensor, vocab_size: int, what: str) -> None:
    """Stops the run where an id is outside [0, vocab_size).

    On the CPU it raises here. On an accelerator the check is queued with the kernels, so that the
    step never waits for it; it then fails as a device-side assertion.

    Args:
        ids: integers, any shape.
        vocab_size: the vocabulary without padding.
        what: "token" or "label", for the message.

    Raises:
        ValueError: an id is outside (CPU).
    """
    if ids.is_meta or ids.numel() == 0:
        return
    if ids.device.type != "cpu":
        message = f"{what} id outside the vocabulary [0, {vocab_size})"
        torch._assert_async(((ids >= 0) & (ids < vocab_size)).all(), message)
        return
    lowest, highest = (int(value) for value in torch.aminmax(ids))
    if lowest < 0 or highest >= vocab_size:
        worst = lowest if lowest < 0 else highest
        raise ValueError(
            f"{what} id {worst} is outside the vocabulary [0, {vocab_size}): "
            "the data was made with another tokenizer than TOKENIZER_MODEL, or VOCAB_SIZE is wrong"
        )
