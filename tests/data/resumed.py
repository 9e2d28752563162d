"""A whole run that notes which samples it reads, or why it was refused: for the resume tests."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from megatron.config.errors import DataError
from megatron.data.dataset import Sample, StagedDataset
from tests.e2e.recorded import train_recorded

Place = tuple[str, int, int]  # file name, epoch, sample of the file


def train_noting(variables: Mapping[str, str]) -> dict[int, Place] | str:
    """Sample number -> its place, of all training samples this rank read; else the refusal."""
    read: dict[int, Place] = {}
    sample = StagedDataset.sample

    def noted(self: StagedDataset, k: int) -> Sample:
        found = sample(self, k)
        if threading.current_thread().name != "data-loader":
            return found  # the start of the text that is sampled at the end of a run
        assert k not in read, f"sample {k} is read twice"
        read[k] = (found.file.rpartition("/")[2], found.epoch, found.index)
        return found

    StagedDataset.sample = noted
    try:
        train_recorded(variables)
    except DataError as error:
        return str(error)
    finally:
        StagedDataset.sample = sample
    return read
