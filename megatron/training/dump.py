"""Logs the tokens of a step, so that two runs can be compared."""

from __future__ import annotations

import logging

import torch

from megatron.engine import MicroBatches
from megatron.training.corpus_loss import plain_labels

log = logging.getLogger(__name__)

_ROWS = 10


def dump_tokens(iteration: int, micro_batches: MicroBatches) -> None:
    """Logs the samples (B, S + 1) of each micro-batch of a step, as this rank reads them."""
    batches = list(micro_batches)
    for number, (tokens, labels) in enumerate(batches):
        samples = torch.cat([tokens, plain_labels(labels[:, -1:])], dim=1).cpu()
        log.info(
            f"iteration={iteration} [{number}/{len(batches)}]: {samples.shape}\n"
            f"tokens[:{_ROWS}]={samples[:_ROWS]}"
        )
