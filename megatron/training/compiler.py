"""Whether a run's blocks are compiled: COMPILE, and whether every host can compile."""

from __future__ import annotations

import importlib.util
import logging
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from typing import NamedTuple

import torch

from megatron.config.schema import RunConfig
from megatron.engine import Engine, warm_up
from megatron.model.document_mask import Documents
from megatron.parallel.control import Control
from megatron.training.log import ALIKE

log = logging.getLogger(__name__)

LIMIT_S = 60
SHOWN = 3  # reasons of this many hosts


class Toolchain(NamedTuple):
    """What torch.compile builds its kernels, or their launchers, with.

    Attributes:
        variable: that names the compiler.
        usual: compilers taken where it is unset, the first that is there.
        language: as the compiler's -x takes it.
        headers: that the generated code includes.
        flags: further ones.
        package: of Python, where one is needed.
    """

    variable: str
    usual: tuple[str, ...]
    language: str
    headers: tuple[str, ...]
    flags: tuple[str, ...] = ()
    package: str = ""


TOOLCHAINS = {
    "cpu": Toolchain("CXX", ("g++", "clang++"), "c++", ("Python.h", "omp.h"), ("-fopenmp",)),
    "cuda": Toolchain("CC", ("gcc", "clang"), "c", ("Python.h",), package="triton"),
    "xpu": Toolchain("CXX", ("g++", "icpx"), "c++", ("Python.h",), package="triton"),
}
"""Kind of device -> what is probed: torch/_inductor/cpp_builder.py, triton/runtime/build.py."""


def compiles(run: RunConfig, kind: str, environ: Mapping[str, str], control: Control) -> bool:
    """Whether this run compiles its blocks; where a host cannot, one line says so.

    The same on all ranks: a collective.

    Args:
        run: the configuration.
        kind: of this rank's device.
        environ: names the compilers.
        control: messages between all ranks.
    """
    wanted = run.train.compile
    # DeepSpeed's ZeRO-3 gathers weights in hooks between a block's layers, which no graph holds.
    if run.parallel.zero_stage == 3 or wanted == "0" or (wanted == "auto" and kind == "cpu"):
        return False
    found = control.gather(problem(kind, environ))
    reasons = None if found is None else sorted({reason for reason in found if reason})
    reasons = control.broadcast(reasons)
    if reasons:
        more = "; ..." if len(reasons) > SHOWN else ""
        shown = "; ".join(reasons[:SHOWN]) + more
        log.warning(f"COMPILE={wanted}: blocks run eager: {shown}", extra=ALIKE)
    return not reasons


def compile_now(run: RunConfig, engine: Engine, documents: Documents | None = None) -> None:
    """Compiles the engine's blocks, where they are to be, before the clock of the first step runs.

    A collective of all ranks. What follows documents is compiled as if each sample were one.
    """
    if documents is not None:
        shape = run.train.micro_batch_size, run.model.seq_length
        documents.show(torch.full(shape, -1 - documents.eod, device=engine.device))
    blocks, seconds = warm_up(engine.module)
    if blocks:
        log.info(f"compiled {blocks} blocks in {seconds:.1f} s, before the first step")


def problem(kind: str, environ: Mapping[str, str]) -> str:
    """Why this host cannot compile for a kind of device; empty where it can."""
    chain, host = TOOLCHAINS[kind], platform.node()
    if chain.package and importlib.util.find_spec(chain.package) is None:
        return f"{host} has no package {chain.package}"
    named = shlex.split(environ.get(chain.variable, ""))
    path = environ.get("PATH")
    command = named or [name for name in chain.usual if shutil.which(name, path=path)][:1]
    if not command:
        names = " or ".join(chain.usual)
        return f"{host} has no compiler ({names}; {chain.variable} names another)"
    source = "".join(f"#include <{header}>\n" for header in chain.headers)
    with tempfile.TemporaryDirectory() as folder:
        built = [*command, *chain.flags, "-x", chain.language, "-c", "-", "-o", f"{folder}/probe.o"]
        built.append(f"-I{sysconfig.get_paths()['include']}")
        try:
            done = subprocess.run(
                built, input=source, text=True, capture_output=True, timeout=LIMIT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{host}: {command[0]}: {error}"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it failed"]
        return f"{host}: {command[0]} compiles no extension of Python: {lines[0]}"
    return ""
