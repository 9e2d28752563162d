"""2,419 sparse files in 14 corpora, a trillion tokens, and what one rank needs to start on them.

python3 -m tests.data.large_list LIST          prints seconds and growth of memory as JSON
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from pathlib import Path

from tests.data.pairs import mix_weights

TOKENS = 10**12
DOCUMENT = 1 << 20  # tokens; real lists have more and shorter documents, read no further at start


def write_large_list(folder: Path, tokens: int = TOKENS) -> Path:
    """A list like the 14-corpus mix; `.bin` files are holes: they take no disk."""
    lines = []
    for corpus, weights in mix_weights().items():
        for number, weight in enumerate(weights):
            prefix = folder / corpus / f"part{number}"
            prefix.parent.mkdir(parents=True, exist_ok=True)
            _write_sparse(prefix, max(int(tokens * weight / _TOTAL), 1 << 14))
            lines.append(f"{weight:.8f} {prefix} {corpus}\n")
    path = folder / "list.txt"
    path.write_text("".join(lines))
    return path


_TOTAL = sum(w for weights in mix_weights().values() for w in weights)


def _write_sparse(prefix: Path, tokens: int) -> None:
    full, rest = divmod(tokens, DOCUMENT)
    lengths = [DOCUMENT] * full + [rest] * (rest > 0)
    count = len(lengths)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, count, count + 1))
        file.write(struct.pack(f"<{count}i", *lengths))
        file.write(struct.pack(f"<{count}q", *(2 * DOCUMENT * i for i in range(count))))
        file.write(struct.pack(f"<{count + 1}q", *range(count + 1)))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)


def start(path: str) -> dict[str, float]:
    """Everything a rank does of data before step 1, alone in its world, and one sample."""
    import torch.distributed as dist

    from megatron.checkpoint.state import RunState
    from megatron.config.resolve import Site, resolve
    from megatron.parallel.control import ALONE
    from megatron.training.run_data import build_data, train_data

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    environ = {
        "DATA_FILE_LIST": path, "TOKENIZER_TYPE": "NullTokenizer", "VOCAB_SIZE": "60000",
        "SEQ": "8192", "TRAIN_ITERS": "100", "MODEL_ARCH": "debug", "DRY_RUN": "1",
    }  # fmt: skip
    run = resolve(environ, [], Site()).run
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, worked = time.perf_counter(), time.process_time()
    data = build_data(run, ALONE)
    train = train_data(run, data, RunState())
    train.sample(0)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    for k in range(1, 2000):
        train.sample(k * 50_000)  # all over the trillion
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "growth_mb": growth / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "tokens": sum(header.tokens for header in data.headers.values()),
    }


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1])))
