"""Starts four training ranks as a user would by hand, for each launcher's variables alone.

    by_hand.py FOLDER      one run per family in FOLDER/<family>; prints each one's statuses as JSON

Ranks are forked from this process, which has imported torch and DeepSpeed once for all of them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import pretrain_gpt_alcf
from megatron.launch.ranks import free_port

RANKS = 4
LIMIT_S = 90.0


def families(rank: int, folder: Path) -> dict[str, dict[str, str]]:
    """What each launcher tells a rank on a single host; the job where the launcher counts none."""
    one, all_ranks, host = str(rank), str(RANKS), socket.gethostname()
    job = {"PBS_JOBID": "7.server", "PBS_NODEFILE": str(folder / "nodes")}
    torchrun = {"RANK": one, "LOCAL_RANK": one, "WORLD_SIZE": all_ranks}
    return {
        "torchrun": {**torchrun, "LOCAL_WORLD_SIZE": all_ranks},
        "pals": {
            **job,
            "PALS_RANKID": one,
            "PALS_LOCAL_RANKID": one,
            "PALS_LOCAL_SIZE": all_ranks,
            "PALS_APID": "9c2f",
        },
        "pmix": {**job, "PMIX_RANK": one, "PMIX_LOCAL_RANK": one, "PMIX_NAMESPACE": "prterun-1"},
        "pmi": {
            "PMI_RANK": one,
            "PMI_LOCAL_RANK": one,
            "PMI_SIZE": all_ranks,
            "PMI_LOCAL_SIZE": all_ranks,
        },
        "hydra": {
            "PMI_RANK": one,
            "MPI_LOCALRANKID": one,
            "PMI_SIZE": all_ranks,
            "MPI_LOCALNRANKS": all_ranks,
        },
        "open-mpi": {
            "OMPI_COMM_WORLD_RANK": one,
            "OMPI_COMM_WORLD_LOCAL_RANK": one,
            "OMPI_COMM_WORLD_SIZE": all_ranks,
            "OMPI_COMM_WORLD_LOCAL_SIZE": all_ranks,
        },
        "slurm": {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": host,
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": one,
            "SLURM_LOCALID": one,
            "SLURM_NTASKS": all_ranks,
            "SLURM_STEP_TASKS_PER_NODE": all_ranks,
        },
        # The layout of the hosts that torchrun starts on: see test_same_losses.py.
        "pipeline": {**torchrun, "LOCAL_WORLD_SIZE": all_ranks, "PP": "2"},
    }


def start(environ: Mapping[str, str], output: Path) -> int:
    """Fork one rank; returns its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(environ)
        status = pretrain_gpt_alcf.main([])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(processes: list[int]) -> list[int]:
    """Their statuses; what is left after LIMIT_S is killed."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + LIMIT_S
    while len(statuses) < len(processes):
        for process in processes:
            if process in statuses:
                continue
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(process, 9)
        time.sleep(0.01)
    return [statuses[process] for process in processes]


def main(folder: Path) -> None:
    base = dict(os.environ)
    (folder / "nodes").write_text(f"{socket.gethostname()}\n", encoding="ascii")
    for name in families(0, folder):
        run = folder / name
        run.mkdir()
        began, port = time.monotonic(), str(free_port())
        common = {**base, "RUN_DIR": str(run / "run"), "MASTER_PORT": port}
        processes = [
            start({**common, **families(rank, folder)[name]}, folder / f"{name}.txt")
            for rank in range(RANKS)
        ]
        said = {"name": name, "statuses": wait(processes), "seconds": time.monotonic() - began}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
