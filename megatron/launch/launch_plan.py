"""How a program is started on a machine: launcher, command, variables. Starts nothing."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from megatron.config.errors import ConfigError
from megatron.display.marked_line import LIVE
from megatron.launch import command, hostlist, ranks
from megatron.launch.accelerators import RANK_ENVIRONMENT, vendor
from megatron.launch.dialect import Ask
from megatron.launch.heartbeat import HEARTBEAT
from megatron.launch.machines import Machine
from megatron.launch.site import Job, Location

LOCAL = "local"

# Rank numbers of an earlier launch would be mistaken for this one's.
STALE = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", ranks.EXPECTED, HEARTBEAT,
)  # fmt: skip

# Prefixes of the variables that Open MPI passes to other hosts.
EXPORTED = (
    "PATH", "LD_LIBRARY_PATH", "PYTHON", "VIRTUAL_ENV", "CONDA_", "MASTER_", ranks.EXPECTED,
    HEARTBEAT, LIVE, "OMP_", "CUDA_", "NCCL_", "RCCL_", "GLOO_", "FI_", "UCX_", "CCL_", "I_MPI_",
    "MPICH_", "ZE_", "ZES_", "SYCL_", "ONEAPI_", "ROCR_", "HIP_", "HSA_", "MIOPEN_", "KMP_", "MKL_",
    "DS_", "TORCH", "PYTORCH", "TRITON_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "WANDB_", "XDG_",
    "TMPDIR", "LD_PRELOAD", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip

# What the user decides about torch's memory. The last registers it with NCCL, which segments that
# grow exclude.
ALLOCATOR = {
    "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK",
}  # fmt: skip
HEAP = "glibc.malloc." + ":glibc.malloc.".join(
    ("hugetlb=1", "mmap_threshold=1073741824", "trim_threshold=4294967296", "top_pad=67108864")
)
"""Memory of freed tensors is kept for the next ones, in large pages. Else each large tensor is
mapped anew and every page of it faults: a fifth of a bf16 step."""
ON_CPU = {
    "DS_ACCELERATOR": "cpu",  # DeepSpeed would warn that it found none
    "GLIBC_TUNABLES": HEAP,
}
"""What ranks on CPUs get, unless the user has set it."""


@dataclass(frozen=True)
class LaunchRequest:
    """What the user requests.

    Attributes:
        world_size: total number of ranks.
        num_hosts: hosts to use, the first ones of the job.
        ranks_per_host: ranks on a full host.
        launcher: a name of command.LAUNCHERS or ALIASES or "local"; None: the machine's.
        cpu_bind: None: the machine's.
        folder: where a host file is written if one is needed.
        device: of the ranks: auto, cpu, cuda or xpu.
    """

    world_size: int
    num_hosts: int
    ranks_per_host: int
    launcher: str | None = None
    cpu_bind: str | None = None
    folder: Path = Path(".")
    device: str = "auto"


@dataclass(frozen=True)
class LaunchPlan:
    """A launch, ready to be executed or printed.

    Attributes:
        launcher: a name of command.LAUNCHERS or "local".
        command: what is executed: launcher, its options, the program; if local, the program.
        ranks: total number of ranks.
        environ: variables of the process that is executed.
        added: those of them that the machine's entry sets.
        hostfile: a file to write first, with its text; None: none.
        problem: why it cannot start here, though it can be printed; None: it can.
        dialect: of mpiexec or mpirun, which may be what starts torchrun; None: none of them.
        hosts: that the ranks run on, in the order of their ranks; empty if local.
        ranks_per_host: ranks on a full host.
        anew: makes the plan of another start, given the number of the start and hosts to leave out;
            `problem` says so where too few are left.
    """

    launcher: str
    command: tuple[str, ...]
    ranks: int
    environ: Mapping[str, str]
    added: Mapping[str, str]
    hostfile: tuple[Path, str] | None
    problem: str | None
    dialect: str | None
    hosts: tuple[str, ...]
    ranks_per_host: int
    anew: Callable[[int, Sequence[str]], LaunchPlan] = field(compare=False, repr=False)

    @property
    def text(self) -> str:
        """The command as a user would type it."""
        if self.launcher != LOCAL:
            return shlex.join(self.command)
        return shlex.join(
            ["python3", "-m", "megatron.launch", "-n", str(self.ranks), "--", *self.command]
        )


def make_plan(
    request: LaunchRequest,
    program: Sequence[str],
    environ: Mapping[str, str],
    location: Location,
    number: int = 1,
    left_out: Sequence[str] = (),
    ask: Ask = lambda name: None,
) -> LaunchPlan:
    """The start of `program` on this machine.

    Args:
        request: what the user requests.
        program: command of one rank.
        environ: the environment's variables; what is set in them is not overwritten.
        location: machine and job.
        number: of the start: a second one meets at another port.
        left_out: hosts of the job that are not used.
        ask: which MPI's a command is; None: the machine's.

    Raises:
        ConfigError: for a MASTER_PORT that is no port.
    """
    machine, job = location.machine, location.job
    usable = tuple(host for host in job.hosts if host not in left_out)
    anew = partial(make_plan, request, program, environ, location, ask=ask)
    launcher = request.launcher or usual_launcher(machine, job, request.num_hosts)
    launcher = command.ALIASES.get(launcher, launcher)
    hosts = usable[: request.num_hosts]
    outer = machine.launcher if machine.launcher in command.LAUNCHERS else "mpiexec"
    starter = launcher
    if request.num_hosts > 1:
        starter = {"torchrun": outer, "deepspeed": "mpirun"}.get(launcher, launcher)
    dialect = _dialect(machine, launcher, starter, ask)
    problem = _problem(request, replace(job, hosts=usable), launcher)
    if problem is None and starter == "srun":
        cores = machine.cores_per_rank if launcher == "srun" else 1
        problem = _too_few_cores(request, job, environ, cores)
    child, added = _environment(machine, environ, launcher, location.devices_per_host)
    child |= RANK_ENVIRONMENT[request.device]
    child[ranks.EXPECTED] = str(request.world_size)
    planned = partial(
        LaunchPlan,
        launcher=launcher,
        ranks=request.world_size,
        environ=child,
        added=added,
        problem=problem,
        dialect=dialect,
        ranks_per_host=request.ranks_per_host,
        anew=anew,
    )
    if launcher == LOCAL:
        return planned(command=tuple(program), hostfile=None, hosts=())
    child[HEARTBEAT] = ""  # the launcher's address follows; Open MPI needs the name now
    key = f"{job.id} {request.folder}" + (f" {number}" if number > 1 else "")
    master = ranks.meeting_point(environ, hosts, machine.domain, key)
    child |= {"MASTER_ADDR": master[0], "MASTER_PORT": str(master[1])}
    slots = launcher == "deepspeed" or dialect == command.OPEN_MPI
    path, written = _hostfile(job, hosts, launcher, request, slots=slots)
    own = launcher == machine.launcher and dialect in (None, machine.dialect)
    launch = command.Launch(
        world_size=request.world_size,
        num_hosts=request.num_hosts,
        ranks_per_host=request.ranks_per_host,
        hostfile=path,
        devices_per_host=min(location.devices_per_host, request.ranks_per_host),
        cpu_bind=request.cpu_bind or (machine.cpu_bind if own else None),
        cores_per_rank=machine.cores_per_rank,
        srun_options=machine.srun_options,
        dialect=dialect or machine.dialect,
        in_step=ranks.in_step(environ),
        exported=tuple(sorted(name for name in child if name.startswith(EXPORTED))),
        master=master,
        outer=outer,
        left_out=tuple(left_out),
        python=program[0] if Path(program[0]).name.startswith("python") else sys.executable,
    )
    words = command.LAUNCHERS[launcher](launch, program)
    return planned(command=tuple(words), hostfile=written, hosts=hosts)


def _dialect(machine: Machine, launcher: str, starter: str, ask: Ask) -> str | None:
    """Which MPI starts the ranks: what is installed, the machine's, or the usual one of a name.

    Args:
        starter: what `launcher` starts the ranks or torchrun with; itself, if it does so.
    """
    if starter not in ("mpiexec", "mpirun"):
        return None
    usual = command.OPEN_MPI if launcher == "mpirun" else command.HYDRA
    return ask(starter) or (machine.dialect if starter == machine.launcher else usual)


def usual_launcher(machine: Machine, job: Job, num_hosts: int) -> str:
    """The machine's launcher in a job or over several hosts; else our own."""
    if num_hosts > 1 or job.scheduler != "none":
        return machine.launcher if machine.launcher != LOCAL else "mpiexec"
    return LOCAL


def require_startable(plan: LaunchPlan) -> None:
    """Raise ConfigError where the ranks do not fit the hosts."""
    if plan.problem:
        raise ConfigError(plan.problem)


def require_launcher(plan: LaunchPlan, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where the launcher is not installed.

    Args:
        plan: the start.
        environ: the variables with which it is started: their PATH counts.
    """
    path = environ.get("PATH", "")
    if plan.launcher != LOCAL and shutil.which(plan.command[0], path=path) is None:
        raise ConfigError(
            f"LAUNCH_WITH={plan.launcher}: {plan.command[0]} is not on PATH. "
            f"Load the machine's MPI or Slurm module, or on one host set LAUNCH_WITH=local"
        )


def _problem(request: LaunchRequest, job: Job, launcher: str) -> str | None:
    """Why the ranks do not fit the hosts, if so."""
    if launcher == LOCAL and request.num_hosts > 1:
        return (
            f"LAUNCH_WITH=local starts ranks on this host only, but NHOSTS={request.num_hosts}. "
            f"Set NHOSTS=1 or LAUNCH_WITH=mpiexec"
        )
    if request.num_hosts > len(job.hosts):
        return (
            f"NHOSTS={request.num_hosts}, but {job.source} is {len(job.hosts)}: start it in a job, "
            f"or name the hosts in a file with HOSTFILE"
        )
    places = request.num_hosts * request.ranks_per_host
    if request.world_size > places:
        return (
            f"WORLD_SIZE={request.world_size} is more than NHOSTS={request.num_hosts} x "
            f"NGPU_PER_HOST={request.ranks_per_host} = {places}. Set WORLD_SIZE={places} or less"
        )
    return None


def _too_few_cores(
    request: LaunchRequest, job: Job, environ: Mapping[str, str], cores_per_rank: int
) -> str | None:
    """Why the job's share of a host is too small for its ranks, if so; on shared hosts."""
    if job.scheduler != "slurm" or not environ.get("SLURM_JOB_CPUS_PER_NODE"):
        return None
    name = "SLURM_JOB_CPUS_PER_NODE"
    cores = min(hostlist.repeated(environ[name], name)[: request.num_hosts])
    per_host, each = request.ranks_per_host, max(1, cores_per_rank)
    if cores >= per_host * each:
        return None
    return (
        f"the job has {cores} cores of a host, but {per_host} ranks per host need {per_host} x "
        f"{each} = {per_host * each}. Submit it with --exclusive, or with "
        f"--ntasks-per-node={per_host} --cpus-per-task={each}"
    )


def _environment(
    machine: Machine, environ: Mapping[str, str], launcher: str, devices: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Variables for the ranks, and those that the machine adds; NAME= (empty) keeps one out."""
    wanted = dict(machine.environment)
    if launcher == "mpiexec":
        wanted |= machine.mpi_environment
        if find_spec("mpi4py") is not None:
            wanted |= machine.mpi4py_environment
    added = {name: value for name, value in wanted.items() if name not in environ}
    vetoed = {name for name in wanted if environ.get(name) == ""}
    child = {k: v for k, v in environ.items() if k not in STALE and k not in vetoed}
    if devices == 0:
        child = {**ON_CPU, **child}
    elif "TORCH_NCCL_TRACE_BUFFER_SIZE" not in child:  # the older name of the same
        child.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # a hang's report shows the collectives
    if devices and not ALLOCATOR & child.keys() and (machine.vendor or vendor()) == "nvidia":
        # Segments that grow do not fragment: else memory runs out earlier, and torch frees and
        # allocates again, for which a step waits.
        child["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return child | added | {"PYTHONUNBUFFERED": "1"}, added


def _hostfile(
    job: Job, hosts: Sequence[str], launcher: str, request: LaunchRequest, *, slots: bool
) -> tuple[str | None, tuple[Path, str] | None]:
    """Path of the host file for the launcher, and what to write there first, if anything.

    Args:
        slots: it is to hold the number of ranks of each host.
    """
    if launcher == "srun" or (launcher in ("torchrun", "deepspeed") and len(hosts) == 1):
        return None, None
    if job.hostfile and tuple(hosts) == job.hosts and not slots:
        return job.hostfile, None
    here = job.scheduler == "none" and not job.hostfile
    if here and not slots:
        return None, None
    per_host = 1 if launcher == "torchrun" else request.ranks_per_host
    count = f" slots={per_host}" if slots else ""
    path = request.folder / "hostfile"
    names = ["localhost"] if here else hosts
    return str(path), (path, "".join(f"{host}{count}\n" for host in names))
