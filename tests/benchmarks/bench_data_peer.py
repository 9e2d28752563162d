#!/usr/bin/env python3
"""Seconds that megatron-core takes to build the index of a list; a contender of bench_data.py.

    python3 tests/benchmarks/bench_data_peer.py CORE PREFIXES SAMPLES SEQ_LENGTH CACHE

CORE is where `pip install --no-deps --target CORE megatron-core` put it: its package has the name
of ours, so this file imports nothing of ours. PREFIXES is a file with a prefix a line.
"""

import logging
import sys
import time
from pathlib import Path


class NoTokenizer:
    """What the index needs of one: nothing."""

    eod, pad, vocab_size = 0, 0, 60_000
    unique_identifiers = {"name": "none"}  # noqa: RUF012


def main(core: str, list_of_prefixes: str, samples: str, seq_length: str, cache: str) -> None:
    """Prints the seconds from a list to the first sample."""
    sys.path[0] = core
    import torch.distributed as dist
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    logging.disable(logging.WARNING)
    prefixes = Path(list_of_prefixes).read_text().split()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    start = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=int(seq_length),
        blend=(prefixes, [1.0] * len(prefixes)),
        split="990,10,0",
        path_to_cache=cache,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=NoTokenizer(),
        num_dataset_builder_threads=2,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [int(samples), 0, 0], lambda: True, config)
    train, _, _ = builder.build()
    train[0]
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
