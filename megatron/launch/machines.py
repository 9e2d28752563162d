"""The known machines as data: one entry of MACHINES each; the first match applies.

A new machine is one entry. Nothing in it is forced: a variable that the user sets wins over
`environment`; NGPU_PER_HOST, CPU_BIND and LAUNCH_WITH win over the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron.launch.command import HYDRA, OPEN_MPI, PALS

Defaults = Callable[[int], dict[str, str]]


def _no_defaults(num_hosts: int) -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Machine:
    """One kind of machine.

    Attributes:
        name: lower case; names the folder of its data lists.
        scheduler: pbs, slurm or none.
        launcher: mpiexec (PALS, MPICH), mpirun (Open MPI), srun or local.
        hosts: patterns that a whole host name matches, in lower case.
        site: variable -> value that identifies the machine where host names do not.
        dialect: which MPI's mpiexec or mpirun the machine has, a name of command.DIALECTS; what is
            installed is asked before a start.
        vendor: of the accelerators: nvidia, amd or intel; None where they are detected.
        devices_per_host: accelerators, and so ranks, per compute host; 0: detect them.
        device_gib: memory of an accelerator in GiB, the smaller where hosts differ; 0: detect it.
        cpu_bind: as mpiexec or srun spells it; None: the launcher's own.
        cores_per_rank: where cores are bound by depth (mpiexec) or by task (srun); 0: not given.
        srun_options: further options of srun.
        domain: appended to the short name of the first host to reach it over the fast network.
        directives: of every job script, beside those of its size and owner.
        environment: set unless the user has set it.
        mpi_environment: likewise, only where mpiexec starts the ranks.
        mpi4py_environment: likewise, and only where mpi4py is there: each rank then initialises MPI
            with it before torch.distributed.
        is_hpc: its runs are production runs by default.
        defaults: number of hosts -> variables that the machine prefers.
    """

    name: str
    scheduler: str
    launcher: str
    hosts: tuple[str, ...] = ()
    site: Mapping[str, str] = field(default_factory=dict)
    dialect: str = HYDRA
    vendor: str | None = None
    devices_per_host: int = 0
    device_gib: float = 0.0
    cpu_bind: str | None = None
    cores_per_rank: int = 0
    srun_options: tuple[str, ...] = ()
    domain: str = ""
    directives: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    mpi_environment: Mapping[str, str] = field(default_factory=dict)
    mpi4py_environment: Mapping[str, str] = field(default_factory=dict)
    is_hpc: bool = True
    defaults: Defaults = _no_defaults


def _aurora_defaults(num_hosts: int) -> dict[str, str]:
    """Fewer micro-batches per step on more hosts: the global batch stays near a usual size."""
    steps = ((256, 1), (128, 2), (33, 4), (16, 8), (0, 16))  # from this many hosts on
    accumulation = next(count for least, count in steps if num_hosts >= least)
    return {"DTYPE": "bf16", "TP": "1", "MICRO_BATCH": "1", "GRAD_ACC_STEPS": str(accumulation)}


def _polaris_defaults(num_hosts: int) -> dict[str, str]:
    """Larger micro-batches on more hosts, where ZeRO leaves more memory to each."""
    steps = ((8, 4), (3, 2), (0, 1))  # from this many hosts on
    micro = next(count for least, count in steps if num_hosts >= least)
    return {"DTYPE": "fp16", "TP": "1", "MICRO_BATCH": str(micro), "GRAD_ACC_STEPS": "8"}


def _always(**defaults: str) -> Defaults:
    """The same defaults for any number of hosts."""
    return lambda num_hosts: defaults


# Eight cores per tile; cores 0 and 52 are the operating system's. A binding by depth would put the
# sixth tile's cores on two sockets.
AURORA_CORES = "list:1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100"

AURORA_ENVIRONMENT = {
    "ZE_FLAT_DEVICE_HIERARCHY": "FLAT",  # twelve tiles, not six cards
    "FI_MR_CACHE_MONITOR": "userfaultfd",
    "FI_CXI_DEFAULT_CQ_SIZE": "1048576",
    "FI_CXI_RX_MATCH_MODE": "hybrid",
    "CCL_KVS_CONNECTION_TIMEOUT": "600",
    "CCL_OP_SYNC": "1",  # avoids hangs
    "PALS_PING_PERIOD": "240",
    "PALS_RPC_TIMEOUT": "240",
}

# oneCCL then asks the MPI launcher for its peers, so these need one.
AURORA_MPI_ENVIRONMENT = {"CCL_PROCESS_LAUNCHER": "pmix", "CCL_ATL_TRANSPORT": "mpi"}
# oneCCL's ranks meet over an MPI that is initialised already; for more than a thousand hosts.
AURORA_MPI4PY_ENVIRONMENT = {"CCL_KVS_MODE": "mpi"}

SLINGSHOT_NVIDIA_ENVIRONMENT = {
    "FI_CXI_DISABLE_HOST_REGISTER": "1",
    "FI_MR_CACHE_MONITOR": "userfaultfd",
    "FI_CXI_DEFAULT_CQ_SIZE": "131072",
}

FRONTIER_ENVIRONMENT = {
    "NCCL_SOCKET_IFNAME": "hsn0,hsn1,hsn2,hsn3",
    "NCCL_NET_GDR_LEVEL": "PHB",
    "NCCL_CROSS_NIC": "1",
    "FI_MR_CACHE_MONITOR": "kdreg2",
    "FI_CXI_DISABLE_HOST_REGISTER": "1",
    "FI_CXI_DEFAULT_CQ_SIZE": "131072",
    "FI_CXI_DEFAULT_TX_SIZE": "2048",
    "FI_CXI_RX_MATCH_MODE": "hybrid",
    "FI_CXI_RDZV_PROTO": "alt_read",  # goes with --network=disable_rdzv_get
    "MIOPEN_USER_DB_PATH": "/tmp/miopen",  # its database locks up on a shared file system
    "MIOPEN_CUSTOM_CACHE_DIR": "/tmp/miopen",
}

XNAME = r"c\d+s\d+b\d+n\d+"  # cabinet x1234, chassis, slot, board, node of an HPE Cray EX

AURORA = Machine(
    name="aurora",
    scheduler="pbs",
    launcher="mpiexec",
    hosts=(r"aurora.*", rf"x4\d{{3}}{XNAME}", r".*\.aurora\.alcf\.anl\.gov"),
    dialect=PALS,
    vendor="intel",
    devices_per_host=12,
    device_gib=64,  # a tile of a Max 1550
    cpu_bind=AURORA_CORES,
    domain=".hsn.cm.aurora.alcf.anl.gov",
    directives=("-l filesystems=home:flare",),
    environment=AURORA_ENVIRONMENT,
    mpi_environment=AURORA_MPI_ENVIRONMENT,
    mpi4py_environment=AURORA_MPI4PY_ENVIRONMENT,
    defaults=_aurora_defaults,
)
POLARIS = Machine(
    name="polaris",
    scheduler="pbs",
    launcher="mpiexec",
    hosts=(r"polaris.*", rf"x3\d{{3}}{XNAME}", r".*\.polaris\.alcf\.anl\.gov"),
    dialect=PALS,
    vendor="nvidia",
    devices_per_host=4,
    device_gib=40,  # A100
    cpu_bind="depth",
    cores_per_rank=8,
    domain=".hsn.cm.polaris.alcf.anl.gov",
    directives=("-l filesystems=home:eagle",),
    environment=SLINGSHOT_NVIDIA_ENVIRONMENT,
    defaults=_polaris_defaults,
)
SUNSPOT_HOSTS = (r"sunspot.*", r"uan-?\d+", rf"x1\d{{3}}{XNAME}", r".*\.sunspot\.alcf\.anl\.gov")

MACHINES: list[Machine] = [
    replace(
        POLARIS,
        name="sirius",
        hosts=(r"sirius.*", r".*\.sirius\.alcf\.anl\.gov"),
        site={"PBS_O_HOST": "sirius"},
        directives=("-l filesystems=home:tegu",),
        domain=".hsn.cm.sirius.alcf.anl.gov",
    ),
    AURORA,
    replace(
        AURORA,
        name="sunspot",
        hosts=SUNSPOT_HOSTS,
        domain=Machine.domain,
        directives=("-l filesystems=home:tegu",),
    ),
    POLARIS,
    Machine(
        name="sophia",
        scheduler="pbs",
        launcher="mpirun",
        hosts=(r"sophia.*",),
        dialect=OPEN_MPI,
        vendor="nvidia",
        devices_per_host=8,
        device_gib=40,  # A100; two hosts have 80
        domain=".lab.alcf.anl.gov",
        directives=("-l filesystems=home:eagle",),
        defaults=_always(DTYPE="bf16", TP="1", MICRO_BATCH="1", GRAD_ACC_STEPS="8"),
    ),
    Machine(
        name="perlmutter",
        scheduler="slurm",
        launcher="srun",
        hosts=(r"perlmutter.*", r".*\.perlmutter\.nersc\.gov"),
        site={"NERSC_HOST": "perlmutter"},
        vendor="nvidia",
        devices_per_host=4,
        device_gib=40,  # A100; some hosts have 80
        cpu_bind="cores",
        cores_per_rank=32,
        srun_options=("--gpus-per-node={devices}",),
        directives=("--constraint=gpu",),
        defaults=_always(DTYPE="bf16", TP="2", MICRO_BATCH="1", GRAD_ACC_STEPS="1"),
    ),
    Machine(
        name="frontier",
        scheduler="slurm",
        launcher="srun",
        hosts=(r"frontier.*", r".*\.frontier\.olcf\.ornl\.gov"),
        site={"LMOD_SYSTEM_NAME": "frontier"},
        vendor="amd",
        devices_per_host=8,
        device_gib=64,  # a GCD of an MI250X
        cores_per_rank=7,  # the first core of each L3 is the operating system's
        srun_options=("--gpus-per-task=1", "--gpu-bind=closest", "--network=disable_rdzv_get"),
        environment=FRONTIER_ENVIRONMENT,
    ),
]

# For unknown hosts, by scheduler.
GENERIC: dict[str, Machine] = {
    "pbs": Machine("pbs", "pbs", "mpiexec", is_hpc=False),
    "slurm": Machine("slurm", "slurm", "srun", cpu_bind="cores", is_hpc=False,
                     srun_options=("--gpus-per-node={devices}",)),
    "none": Machine("generic", "none", "local", is_hpc=False),
}  # fmt: skip


def find_machine(hostname: str, environ: Mapping[str, str], scheduler: str = "none") -> Machine:
    """The machine that this host belongs to.

    Args:
        hostname: as the operating system gives it, short or full.
        environ: the environment's variables, in which some sites name themselves.
        scheduler: of the job this runs in; chooses the entry for unknown hosts.
    """
    name = hostname.lower()
    for machine in MACHINES:
        named = any(
            environ.get(key, "").lower().startswith(value) for key, value in machine.site.items()
        )
        if named or any(re.fullmatch(pattern, name) for pattern in machine.hosts):
            return machine
    return GENERIC[scheduler]
