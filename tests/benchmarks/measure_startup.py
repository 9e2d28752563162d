#!/usr/bin/env python3
"""What one rank does to start in a world of any size: groups it makes, seconds it takes.

python3 tests/benchmarks/measure_startup.py           # the table, in markdown
python3 tests/benchmarks/measure_startup.py --worlds 96 3072 --layouts 2x8    # TP x PP

One process plays one rank with torch's fake process group: no collective waits, so what is
measured is the rank's own work, which on a real machine comes before any waiting for others. The
fake gather copies its input once for each rank of the group, on this rank; that is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORLDS = (96, 384, 1536, 3072, 12288)
LAYOUTS = ("1x1", "2x8", "1x16")

MODEL = {
    "NLAYERS": "16",
    "HIDDEN": "256",
    "HEADS": "8",
    "NUM_KV_HEAD": "2",
    "FFN_HIDDEN_SIZE": "704",
    "SEQ": "32",
    "VOCAB_SIZE": "4096",
    "TIE_EMBEDDINGS": "1",  # tied weights need groups of their own
    "TOKENIZER_TYPE": "NullTokenizer",
    "DRY_RUN": "1",  # no data is read
}


def main(argv: Sequence[str]) -> int:
    """Prints the table; with --rank the measurement of that rank, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", nargs="+", type=int, default=WORLDS, help="ranks in all")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, help="TP x PP, such as 2x8")
    parser.add_argument("--zero-stage", default="1", choices=["1", "2", "3"])
    parser.add_argument("--repeat", type=int, default=3, help="starts of which the quickest counts")
    parser.add_argument("--rank", type=int, help="measure this rank of the one world and layout")
    options = parser.parse_args(argv)
    if options.rank is not None:
        (world,), (layout,) = options.worlds, options.layouts
        # The first start in a process imports, whatever the world.
        starts = [
            measure(world, layout, options.rank, options.zero_stage)
            for _ in range(options.repeat + 1)
        ]
        print(json.dumps(min(starts[1:], key=lambda start: start["seconds"])))
        return 0
    print("| ranks | TP x PP | rank | groups made | their sizes | CPU seconds | in fake gathers |")
    print("|---|---|---|---|---|---|---|")
    for layout in options.layouts:
        for world in options.worlds:
            for rank in (0, world - 1):
                found = measured(world, layout, rank, options.zero_stage, options.repeat)
                sizes = found["groups"]
                print(
                    f"| {world:,} | {layout} | {rank:,} | {len(sizes)} |"
                    f" {', '.join(map(str, sizes))} | {found['seconds']:.2f} |"
                    f" {found['gathers']:.2f} |",
                    flush=True,
                )
    return 0


def measured(world: int, layout: str, rank: int, zero_stage: str, repeat: int) -> dict:
    """The quickest of `repeat` starts in a process of its own, as a rank is one."""
    command = [sys.executable, __file__, "--worlds", str(world), "--layouts", layout]
    result = subprocess.run(
        [*command, "--rank", str(rank), "--zero-stage", zero_stage, "--repeat", str(repeat)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"rank {rank} of {world}, {layout}:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def measure(world: int, layout: str, rank: int, zero_stage: str) -> dict:
    """Starts as `rank` of `world`, from joining the process group to a built engine.

    Returns:
        groups: sizes of the process groups made, each a collective of its members; seconds: of
        this process' CPU, without those of gathers; gathers: of these.
    """
    sys.path.insert(0, str(ROOT))
    # fake_pg registers the backend "fake".
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401

    from megatron.config.resolve import Site, resolve
    from megatron.engine import start_distributed
    from megatron.parallel.groups import make_groups
    from megatron.training.device import detect
    from pretrain_gpt_alcf import build_engine

    tp, pp = layout.split("x")
    variables = {"WORLD_SIZE": str(world), "TP": tp, "PP": pp, "ZERO_STAGE": zero_stage}
    run = resolve({**MODEL, **variables}, [], Site()).run
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=world)
    seen = watch_collectives()
    seen.groups.clear()
    seen.gather_s = 0.0
    start = time.process_time()
    start_distributed("gloo", rank, world, 0, "", 60)
    build_engine(run, make_groups(run.layout), detect(0, run.train.dtype))
    seconds = time.process_time() - start - seen.gather_s
    return {"groups": list(seen.groups), "seconds": seconds, "gathers": seen.gather_s}


@dataclass
class Seen:
    """Sizes of the process groups made, and seconds of CPU in gathers."""

    groups: list[int] = field(default_factory=list)
    gather_s: float = 0.0


@cache
def watch_collectives() -> Seen:
    """Watches them from now on; once a process, as DeepSpeed keeps the functions it finds."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    seen = Seen()
    make, gather = distributed_c10d._new_group_with_tag, dist.all_gather_into_tensor

    def noted(ranks: Sequence[int] | None = None, *args: object, **kwargs: object) -> object:
        seen.groups.append(dist.get_world_size() if ranks is None else len(ranks))
        return make(ranks, *args, **kwargs)

    def timed(*args: object, **kwargs: object) -> object:
        began = time.process_time()
        work = gather(*args, **kwargs)
        seen.gather_s += time.process_time() - began
        return work

    distributed_c10d._new_group_with_tag = noted
    dist.all_gather_into_tensor = timed
    return seen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
