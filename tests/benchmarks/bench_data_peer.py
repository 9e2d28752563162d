#!/usr/bin/env python3
"""Seconds that a peer takes; a contender of bench_data.py. It imports nothing of ours.

    bench_data_peer.py megatron-core CORE PREFIXES SAMPLES SEQ_LENGTH CACHE
    bench_data_peer.py datatrove FOLDER TOKENIZER OUTPUT

CORE is where `pip install --no-deps --target CORE megatron-core` put it (its package has the name
of ours); PREFIXES is a file with one prefix per line, FOLDER one of .jsonl files.
"""

import logging
import sys
import time
from pathlib import Path


class NoTokenizer:
    """What the index needs of one: nothing."""

    eod, pad, vocab_size = 0, 0, 60_000
    unique_identifiers = {"name": "none"}  # noqa: RUF012


def datatrove(folder: str, tokenizer: str, output: str) -> float:
    """Seconds to tokenise the files of a folder with 2 processes, one task per file."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    steps = [
        JsonlReader(folder),
        MegatronDocumentTokenizer(output, tokenizer_name_or_path=tokenizer, batch_size=1000),
    ]
    run = LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=f"{output}/logs")
    start = time.perf_counter()
    run.run()
    return time.perf_counter() - start


def megatron_core(
    core: str, list_of_prefixes: str, samples: str, seq_length: str, cache: str
) -> float:
    """Seconds from a list to the first sample."""
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
    return time.perf_counter() - start


if __name__ == "__main__":
    peers = {"megatron-core": megatron_core, "datatrove": datatrove}
    print(peers[sys.argv[1]](*sys.argv[2:]))
