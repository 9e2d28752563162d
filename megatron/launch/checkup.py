"""What may be wrong with this host, job and environment: a function per thing, for tools/doctor.py.

Nothing here starts a rank or imports torch: an interpreter that has it is asked. Every question to
another program or host has a time limit.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import resolve, survey_of
from megatron.config.schema import RunConfig
from megatron.config.text_settings import of_run
from megatron.data import data_list
from megatron.data.own_text import prepared_text
from megatron.data.vocabulary_size import cached_snapshots
from megatron.launch import versions
from megatron.launch.accelerators import promise
from megatron.launch.launch_plan import LOCAL, usual_launcher
from megatron.launch.ranks import find_ranks
from megatron.launch.site import Location, find_location, site

OK, WARN, FAIL = "ok", "warn", "FAIL"
NEEDED = ("numpy", "safetensors", "sentencepiece", "transformers", "filelock")
GIB = 2**30
SKEW_S = 5.0
"""Seconds between the host's clock and its file system's from which claims may be misjudged."""

QUESTION = """
import importlib.metadata as metadata, json, sys
def version(name):
    try: return metadata.version(name)
    except metadata.PackageNotFoundError: return None
found = {"versions": {name: version(name) for name in sys.argv[1:]}}
if found["versions"]["torch"]:
    import torch
    from torch import distributed as dist
    found |= {"cuda": torch.cuda.device_count(), "xpu": torch.xpu.device_count(),
              "built": "CUDA {}, ROCm {}, XPU {}".format(
                  torch.version.cuda, torch.version.hip, torch.version.xpu),
              "nccl": dist.is_nccl_available(), "xccl": dist.is_xccl_available(),
              "gloo": dist.is_gloo_available()}
    for kind in ("cuda", "xpu"):
        if found[kind]: found["name"] = getattr(torch, kind).get_device_name(0)
print(json.dumps(found))
"""


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        verdict: ok, warn or FAIL.
        text: what was found.
        fix: what to do; empty where all is well.
    """

    verdict: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Place:
    """What the checks look at.

    Attributes:
        environ: the environment's variables.
        location: machine, job and devices; None where the job cannot be read.
        run: the configuration that a start would use; None where it would be refused.
        problem: why, in that case.
        python: the interpreter a start would use; None: there is none yet.
        answer: of `QUESTION` from it; empty: it did not answer.
        folder: the project's.
        limit_s: seconds that a question to another program or host may take.
    """

    environ: Mapping[str, str]
    location: Location | None
    run: RunConfig | None
    problem: str
    python: str | None
    answer: dict[str, Any]
    folder: Path
    limit_s: float


def look(environ: Mapping[str, str], folder: Path, hostname: str = "", limit_s: float = 5) -> Place:
    """Finds out where this is; asks the interpreter that has torch.

    Args:
        environ: the environment's variables.
        folder: of the project.
        hostname: this host's name, if not the operating system's.
        limit_s: seconds that each question may take.
    """
    location, run, problem = None, None, ""
    try:
        location = find_location(environ, hostname=hostname or None)
        settings = {**environ, "DRY_RUN": "1"}
        run = resolve(settings, [], site(settings, [], location)).run
    except (ConfigError, DataError) as error:
        problem = str(error)
    python, answer = _interpreter(folder, limit_s)
    return Place(environ, location, run, problem, python, answer, folder, limit_s)


def _interpreter(folder: Path, limit_s: float) -> tuple[str | None, dict[str, Any]]:
    """The first interpreter with torch and DeepSpeed, and its answer; else another's answer."""
    own = folder / ".venv/bin/python"
    nearest: tuple[str | None, dict[str, Any]] = (None, {})
    for python in [sys.executable, *([str(own)] if own.exists() else [])]:
        try:
            done = subprocess.run(
                [python, "-c", QUESTION, *versions.TESTED, *NEEDED, "wandb", "mpi4py"],
                capture_output=True, text=True, timeout=4 * limit_s, check=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return python, {}
        except (OSError, subprocess.CalledProcessError):
            continue
        answer = json.loads(done.stdout.splitlines()[-1])
        if all(answer["versions"][name] for name in versions.TESTED):
            return python, answer
        nearest = (None, answer)
    return nearest


# --- The environment ------------------------------------------------------------------------------


def check_python(place: Place) -> Iterator[Finding]:
    yield Finding(OK, f"{sys.version.split()[0]} at {sys.executable}")
    if place.python is None:
        yield Finding(
            WARN,
            "no interpreter here has torch and DeepSpeed: train_alcf.sh makes .venv",
            "activate an environment that has them (a machine's module), or let it",
        )
    elif place.python != sys.executable:
        yield Finding(OK, f"torch and DeepSpeed are in {place.python}")


def check_versions(place: Place) -> Iterator[Finding]:
    if place.python is None:
        return
    if not place.answer:
        yield Finding(
            WARN,
            f"{place.python} did not import torch in {4 * place.limit_s:.0f} s",
            "a slow file system: copy the environment to a local one",
        )
        return
    found = place.answer["versions"]
    known = {name: found[name] for name in versions.TESTED}
    errors, warnings = versions.compare(known)
    yield from (Finding(FAIL, *error.split(": ", 1)) for error in errors)
    yield from (Finding(WARN, *warning.split(": ", 1)) for warning in warnings)
    if not errors and not warnings:
        yield Finding(OK, ", ".join(f"{name} {version}" for name, version in known.items()))
    missing = [name for name in NEEDED if not found[name]]
    if missing:
        yield Finding(
            WARN,
            f"missing: {', '.join(missing)}",
            f"{place.python} -m pip install {' '.join(missing)}",
        )


def check_accelerators(place: Place) -> Iterator[Finding]:
    hostname = place.location.hostname if place.location else ""
    promised = promise(place.environ, hostname)
    wanted = place.run.launch.device if place.run else "auto"
    if wanted == "cpu":
        yield Finding(OK, "DEVICE=cpu: none is used")
    elif not place.answer.get("built"):
        yield Finding(
            OK if not promised else WARN, f"{promised or 'none promised'}; no torch to ask"
        )
    elif seen := place.answer["cuda"] or place.answer["xpu"]:
        yield Finding(
            OK, f"torch sees {seen}: {place.answer['name']} ({promised or 'none promised'})"
        )
        ranks = place.run.launch.devices_per_host if place.run else seen
        if 1 < seen < ranks:
            yield Finding(
                WARN, f"NGPU_PER_HOST is {ranks}, so ranks share devices", f"NGPU_PER_HOST={seen}"
            )
    elif promised or wanted != "auto":
        yield Finding(
            FAIL,
            f"{promised or f'DEVICE={wanted}'}, but torch sees none (built for "
            f"{place.answer['built']})",
            "use the machine's own Python (its module), on a compute node; DEVICE=cpu: without",
        )
    else:
        yield Finding(OK, "none: ranks compute on the CPU")


def check_backend(place: Place) -> Iterator[Finding]:
    if not place.answer.get("built"):
        return
    wanted = "nccl" if place.answer["cuda"] else "xccl" if place.answer["xpu"] else "gloo"
    if place.answer[wanted]:
        yield Finding(OK, wanted)
    else:
        yield Finding(FAIL, f"torch has no {wanted}", "use a torch that is built with it")
    if place.environ.get("CCL_KVS_MODE") == "mpi" and not place.answer["versions"]["mpi4py"]:
        yield Finding(FAIL, "CCL_KVS_MODE=mpi needs mpi4py", "install mpi4py, or CCL_KVS_MODE=")


# --- The job --------------------------------------------------------------------------------------


def check_job(place: Place) -> Iterator[Finding]:
    if place.location is None:
        yield Finding(FAIL, place.problem, "mend HOSTFILE or the scheduler's variables")
        return
    machine, job = place.location.machine, place.location.job
    hosts = f"{len(job.hosts)} hosts by {job.source}"
    if machine.is_hpc and job.scheduler == "none":
        submit = "qsub" if machine.scheduler == "pbs" else "sbatch"
        yield Finding(
            WARN, f"{machine.name}, and no job", f"{submit} train_alcf.sh, or an interactive job"
        )
    else:
        yield Finding(OK, f"machine {machine.name}, job {job.id or 'none'}, {hosts}")
    ends = sorted({job.hosts[0], job.hosts[-1]}) if len(job.hosts) > 1 else []
    unknown = [host for host in ends if unreachable(host, None, place.limit_s / 2)]
    if unknown:
        yield Finding(FAIL, f"no address: {', '.join(unknown)}", f"correct {job.source}")


def unreachable(host: str, port: int | None, limit_s: float) -> str:
    """Why a host has no address, or its port cannot be connected to; empty where it can.

    A name server that does not answer would hold this process for longer than its limit.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            if port is None:
                socket.getaddrinfo(host, None)
            else:
                socket.create_connection((host, port), timeout=limit_s).close()
        except OSError as error:
            answer.append(str(error))
        else:
            answer.append("")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    return answer[0] if answer else f"no answer in {limit_s:.0f} s"


def check_ranks(place: Place) -> Iterator[Finding]:
    try:
        ranks = find_ranks(place.environ)
    except ConfigError as error:
        yield Finding(FAIL, str(error), "unset the variables of an earlier launch")
        return
    if ranks.family == "none":
        yield Finding(OK, "no launcher has numbered this process")
    else:
        yield Finding(
            WARN,
            f"this is rank {ranks.rank} of {ranks.world_size} ({ranks.family}): "
            f"train_alcf.sh starts the ranks itself",
            "unset these variables, or start pretrain_gpt_alcf.py on the ranks",
        )


def check_launcher(place: Place) -> Iterator[Finding]:
    if place.location is None:
        return
    hosts = place.run.launch.num_hosts if place.run else len(place.location.job.hosts)
    chosen = place.run.launch.launch_with if place.run else None
    name = chosen or usual_launcher(place.location.machine, place.location.job, hosts)
    if name in (LOCAL, "torchrun", "deepspeed"):
        yield Finding(
            OK, "our own, on this host" if name == LOCAL else f"{name} of the environment"
        )
        return
    path = shutil.which(name, path=place.environ.get("PATH", ""))
    if path is None:
        yield Finding(
            FAIL, f"{name} is not on PATH", "load the MPI or Slurm module, or LAUNCH_WITH"
        )
        return
    yield Finding(OK, f"{path}: {_first_line([path, '--version'], place.limit_s)}")


def _first_line(command: list[str], limit_s: float) -> str:
    """What a program says of itself."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "no answer"
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    return lines[0] if lines else "no answer"


# --- What a run reads and writes ------------------------------------------------------------------


def check_settings(place: Place) -> Iterator[Finding]:
    if place.run is None:
        yield Finding(FAIL, place.problem, "change or unset it; DRY_RUN=1 shows what is resolved")
        return
    run = place.run
    yield Finding(OK, f"{run.label}, {run.parallel.world_size} ranks, {run.train.dtype}")


def check_disk(place: Place) -> Iterator[Finding]:
    folder = place.run.run_folder if place.run else place.folder / "runs"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            skew = abs(os.stat(file.name).st_mtime - time.time())
    except OSError as error:
        yield Finding(FAIL, f"{existing} cannot be written ({error.strerror})", "set RUN_DIR")
        return
    free = shutil.disk_usage(existing).free / GIB
    # Weights and two Adam states in 4 bytes, with the step before still there.
    need = 24 * place.run.parameters / GIB if place.run else 1.0
    if free < need:
        yield Finding(
            WARN,
            f"{existing}: {free:.1f} GiB free; two checkpoints take {need:.1f}",
            "set RUN_DIR or CKPT_DIR to a larger file system, or KEEP_LAST=1",
        )
    else:
        yield Finding(OK, f"{existing}: {free:.1f} GiB free")
    if skew > SKEW_S:
        yield Finding(
            WARN,
            f"the clock and the file system's differ by {skew:.0f} s",
            "have the clock set (NTP): owners of run folders are told by the time",
        )


def check_data(place: Place) -> Iterator[Finding]:
    if place.run is None:
        return
    name, survey = place.run.data.data_file_list, survey_of(place.run)
    if survey.problems:
        more = f" (and {len(survey.problems) - 1} more)" if len(survey.problems) > 1 else ""
        yield Finding(FAIL, f"{survey.problems[0]}{more}", "set DATA_FILE_LIST, or builtin")
    elif own := of_run(place.run):
        yield Finding(OK, prepared_text(own))
    else:
        built_in = name == data_list.BUILTIN
        yield Finding(OK, name if built_in else f"{name}: {len(survey.corpora)} corpora")


def check_tokenizer(place: Place) -> Iterator[Finding]:
    if place.run is None:
        return
    kind, model = place.run.data.tokenizer_type, place.run.data.tokenizer_model
    if kind != "HFTokenizer" or model is None:
        yield Finding(OK, f"{kind} {model or ''}".strip())
    elif Path(model).expanduser().exists() or cached_snapshots(model, place.environ):
        yield Finding(OK, f"{model} is on this host")
    else:
        offline = place.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        yield Finding(
            FAIL if offline else WARN,
            f"{model} is not in the Hugging Face cache" + (", and HF_HUB_OFFLINE is set" * offline),
            f"where the network is: hf download {model} --include '*token*' (a gated one: hf auth "
            f"login); or TOKENIZER_MODEL=<folder>",
        )


# --- Beyond this host -----------------------------------------------------------------------------


def check_wandb(place: Place) -> Iterator[Finding]:
    environ = place.environ
    mode = place.run.log.wandb_mode if place.run else environ.get("WANDB_MODE")
    disabled = place.run.log.wandb_disabled if place.run else False
    netrc = Path(environ.get("NETRC") or Path(environ.get("HOME", "~")).expanduser() / ".netrc")
    try:
        logged_in = "api.wandb.ai" in netrc.read_text(encoding="utf-8", errors="replace")
    except OSError:
        logged_in = False
    if disabled or mode in ("disabled", "offline"):
        yield Finding(OK, f"off: {'WANDB_DISABLED' if disabled else f'WANDB_MODE={mode}'}")
    elif environ.get("WANDB_API_KEY") or logged_in:
        yield Finding(OK, "a key is there")
    else:
        yield Finding(OK, "no key: runs are logged to files only (wandb login, or WANDB_API_KEY)")


def check_network(place: Place) -> Iterator[Finding]:
    environ = place.environ
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") or ""
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    host, port = (parts.hostname, parts.port or 3128) if proxy else ("huggingface.co", 443)
    named = f"proxy {host}:{port}" if proxy else f"{host}:{port}, no proxy set"
    problem = unreachable(str(host), port, place.limit_s / 2)
    if problem:
        yield Finding(
            WARN,
            f"{named}: {problem}",
            "set http_proxy and https_proxy (ALCF: http://proxy.alcf.anl.gov:3128), or prepare "
            "what a run downloads: tokenizer, data, .venv",
        )
    else:
        yield Finding(OK, named)


CHECKS: dict[str, Callable[[Place], Iterator[Finding]]] = {
    "python": check_python,
    "versions": check_versions,
    "accelerators": check_accelerators,
    "backend": check_backend,
    "job": check_job,
    "ranks": check_ranks,
    "launcher": check_launcher,
    "settings": check_settings,
    "disk": check_disk,
    "data": check_data,
    "tokenizer": check_tokenizer,
    "wandb": check_wandb,
    "network": check_network,
}
"""Name of a line -> what makes it; none depends on another."""
