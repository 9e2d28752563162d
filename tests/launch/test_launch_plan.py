"""The launch command of every machine, word by word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.launch import launch_plan
from megatron.launch.launch_plan import (
    LaunchPlan,
    LaunchRequest,
    make_plan,
    require_launcher,
    require_startable,
)
from megatron.launch.machines import AURORA_CORES
from megatron.launch.site import find_location
from tests.launch.places import at, pbs_job, slurm_job

PROGRAM = ("/env/bin/python3", "pretrain_gpt_alcf.py", "--config", "run.json")
TEXT = " ".join(PROGRAM)


def _plan(hostname: str, environ: dict[str, str], request: LaunchRequest) -> LaunchPlan:
    return make_plan(request, PROGRAM, environ, at(hostname, environ))


def test_aurora(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "x4217c2s6b0n0", "x4218c2s6b0n0")
    plan = _plan("x4217c2s6b0n0", environ, LaunchRequest(24, 2, 12, folder=tmp_path))
    assert plan.text == (
        f"mpiexec --envall --line-buffer --np=24 --ppn=12 --hostfile={tmp_path}/nodefile "
        f"--cpu-bind={AURORA_CORES} {TEXT}"
    )
    assert AURORA_CORES == (
        "list:1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100"
    )
    assert plan.environ["MASTER_ADDR"] == "x4217c2s6b0n0.hsn.cm.aurora.alcf.anl.gov"
    assert plan.environ["CCL_PROCESS_LAUNCHER"] == "pmix"
    assert plan.environ["MEGATRON_WORLD_SIZE"] == "24"
    assert plan.hostfile is None


@pytest.mark.parametrize("origin", [{}, {"PBS_O_HOST": "sirius-login-01"}])
def test_polaris_and_sirius(tmp_path: Path, origin: dict[str, str]) -> None:
    environ = pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0") | origin
    plan = _plan("x3001c0s1b0n0", environ, LaunchRequest(8, 2, 4, folder=tmp_path))
    assert plan.text == (
        f"mpiexec --envall --line-buffer --np=8 --ppn=4 --hostfile={tmp_path}/nodefile "
        f"--cpu-bind=depth --depth=8 {TEXT}"
    )
    name = "sirius" if origin else "polaris"
    assert plan.environ["MASTER_ADDR"] == f"x3001c0s1b0n0.hsn.cm.{name}.alcf.anl.gov"
    assert "CCL_PROCESS_LAUNCHER" not in plan.environ


def test_sophia(tmp_path: Path) -> None:
    """Open MPI gets names of variables, never values: a process list is public."""
    environ = pbs_job(tmp_path, "sophia-gpu-01", "sophia-gpu-02")
    environ |= {"PATH": "/bin", "LD_LIBRARY_PATH": "/lib", "WANDB_API_KEY": "secret", "HOME": "/h"}
    plan = _plan("sophia-gpu-01", environ, LaunchRequest(16, 2, 8, folder=tmp_path))
    exported = (
        "LD_LIBRARY_PATH MASTER_ADDR MASTER_PORT MEGATRON_HEARTBEAT MEGATRON_WORLD_SIZE PATH "
        "PYTHONUNBUFFERED PYTORCH_ALLOC_CONF TORCH_FR_BUFFER_SIZE WANDB_API_KEY"
    )
    names = " ".join(f"-x {name}" for name in exported.split())
    assert plan.text == f"mpirun -n 16 -N 8 --hostfile {tmp_path}/hostfile {names} {TEXT}"
    assert plan.hostfile == (
        tmp_path / "hostfile",
        "sophia-gpu-01 slots=8\nsophia-gpu-02 slots=8\n",
    )
    assert "secret" not in plan.text


def test_perlmutter() -> None:
    environ = slurm_job("nid[001234-001235]") | {"NERSC_HOST": "perlmutter"}
    plan = _plan("nid001234", environ, LaunchRequest(8, 2, 4))
    assert plan.text == (
        "srun --export=ALL --kill-on-bad-exit=1 --distribution=block --nodes=2 --ntasks=8 "
        f"--ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=32 --cpu-bind=cores {TEXT}"
    )
    assert plan.environ["MASTER_ADDR"] == "nid001234"


def test_frontier() -> None:
    plan = _plan("frontier00001", slurm_job("frontier[00001-00002]"), LaunchRequest(16, 2, 8))
    assert plan.text == (
        "srun --export=ALL --kill-on-bad-exit=1 --distribution=block --nodes=2 --ntasks=16 "
        "--ntasks-per-node=8 "
        f"--gpus-per-task=1 --gpu-bind=closest --network=disable_rdzv_get --cpus-per-task=7 {TEXT}"
    )
    assert plan.environ["NCCL_SOCKET_IFNAME"] == "hsn0,hsn1,hsn2,hsn3"


def test_generic_slurm_with_and_without_accelerators() -> None:
    environ = slurm_job("node[1-2]") | {"SLURM_GPUS_ON_NODE": "2"}
    plan = _plan("node1", environ, LaunchRequest(4, 2, 2))
    assert "--gpus-per-node=2 --cpu-bind=cores" in plan.text
    plan = _plan(
        "node1", slurm_job("node[1-2]") | {"CUDA_VISIBLE_DEVICES": ""}, LaunchRequest(4, 2, 2)
    )
    assert "--gpus" not in plan.text


def test_generic_pbs(tmp_path: Path) -> None:
    plan = _plan("node1", pbs_job(tmp_path, "node1", "node2"), LaunchRequest(4, 2, 2))
    assert plan.text == (f"mpiexec --envall --np=4 --ppn=2 --hostfile={tmp_path}/nodefile {TEXT}")


def test_laptop_starts_its_ranks_itself() -> None:
    plan = _plan("laptop", {"HOME": "/h"}, LaunchRequest(4, 1, 4))
    assert plan.launcher == "local"
    assert plan.text == f"python3 -m megatron.launch -n 4 -- {TEXT}"
    assert plan.added == {}


def test_torchrun_on_one_host_and_on_two(tmp_path: Path) -> None:
    plan = _plan("laptop", {"MASTER_PORT": "2345"}, LaunchRequest(2, 1, 2, launcher="torchrun"))
    assert plan.text == (
        "/env/bin/python3 -m torch.distributed.run --nnodes=1 --nproc-per-node=2 "
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
        "--master-addr=127.0.0.1 --master-port=2345 pretrain_gpt_alcf.py --config run.json"
    )
    environ = pbs_job(tmp_path, "node1", "node2") | {"MASTER_PORT": "2345"}
    plan = _plan("node1", environ, LaunchRequest(4, 2, 2, launcher="torchrun"))
    assert plan.text == (
        f"mpiexec --envall --np=2 --ppn=1 --hostfile={tmp_path}/nodefile "
        "/env/bin/python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=2 "
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
        "--rdzv-backend=c10d --rdzv-endpoint=node1:2345 pretrain_gpt_alcf.py --config run.json"
    )


def test_deepspeed(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "node1", "node2") | {"MASTER_PORT": "2345"}
    plan = _plan("node1", environ, LaunchRequest(4, 2, 2, launcher="deepspeed", folder=tmp_path))
    assert plan.text == (
        "/env/bin/python3 -m deepspeed.launcher.runner --master_addr=node1 "
        f"--master_port=2345 --no_local_rank --hostfile={tmp_path}/hostfile --launcher=MPICH "
        "pretrain_gpt_alcf.py --config run.json"
    )
    assert plan.hostfile == (tmp_path / "hostfile", "node1 slots=2\nnode2 slots=2\n")
    one = _plan("laptop", {}, LaunchRequest(2, 1, 2, launcher="deepspeed", folder=tmp_path))
    assert "--num_gpus=2 " in one.text and "hostfile" not in one.text


@pytest.mark.parametrize(
    ("launcher", "dialect", "words"),
    [
        ("mpiexec", "Hydra", "mpiexec --envall --np=4 --ppn=2 --hostfile=F -bind-to core P"),
        ("mpirun", "Hydra", "mpirun --envall --np=4 --ppn=2 --hostfile=F -bind-to core P"),
        ("MPICH", "Hydra", "mpiexec --envall --np=4 --ppn=2 --hostfile=F -bind-to core P"),
        (
            "mpiexec",
            "PALS",
            "mpiexec --envall --line-buffer --np=4 --ppn=2 --hostfile=F --cpu-bind=core P",
        ),
        (
            "mpiexec",
            "Intel MPI",
            "mpiexec -genvall -genv I_MPI_JOB_RESPECT_PROCESS_PLACEMENT 0 -n 4 -ppn 2 -f F "
            "-genv I_MPI_PIN_DOMAIN core P",
        ),
        ("mpiexec", "Open MPI", "mpiexec -n 4 -N 2 --hostfile F --bind-to core X P"),
        ("mpirun", None, "mpirun -n 4 -N 2 --hostfile F --bind-to core X P"),
    ],
)
def test_words_of_each_mpi(tmp_path: Path, launcher: str, dialect: str | None, words: str) -> None:
    environ = pbs_job(tmp_path, "node1", "node2")
    request = LaunchRequest(4, 2, 2, launcher=launcher, cpu_bind="core", folder=tmp_path)
    plan = make_plan(request, PROGRAM, environ, at("node1", environ), ask=lambda name: dialect)
    text = re.sub(r"(-x \w+ ?)+", "X ", plan.text).replace(TEXT, "P")
    assert re.sub(rf"{tmp_path}/\w+", "F", text) == words
    assert (plan.hostfile is not None) == (dialect in (None, "Open MPI"))


def test_a_binding_of_the_machines_own_mpi_is_not_given_to_another(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "x4217c2s6b0n0", "x4218c2s6b0n0")
    where = at("x4217c2s6b0n0", environ)
    request = LaunchRequest(24, 2, 12, folder=tmp_path)
    plan = make_plan(request, PROGRAM, environ, where, ask=lambda name: "Hydra")
    assert plan.text.startswith("mpiexec --envall --np=24 --ppn=12 --hostfile=")
    assert "-bind" not in plan.text


def test_open_mpi_on_this_host_is_told_its_slots(tmp_path: Path) -> None:
    """Else it counts cores."""
    plan = _plan("laptop", {}, LaunchRequest(8, 1, 8, launcher="mpirun", folder=tmp_path))
    assert plan.hostfile == (tmp_path / "hostfile", "localhost slots=8\n")
    environ = {"GLOO_SOCKET_IFNAME": "eth0", "ROCR_VISIBLE_DEVICES": "0", "UCX_TLS": "tcp"}
    plan = _plan("laptop", environ, LaunchRequest(8, 1, 8, launcher="mpirun", folder=tmp_path))
    assert all(f"-x {name}" in plan.text for name in environ)
    assert "-x DS_ACCELERATOR" in plan.text


def test_srun_in_a_step_shares_its_cores(tmp_path: Path) -> None:
    environ = slurm_job("nid[1-2]") | {"CUDA_VISIBLE_DEVICES": ""}
    assert "--overlap" not in _plan("nid1", environ, LaunchRequest(4, 2, 2)).text
    shell = environ | {"SLURM_STEP_ID": "4294967290"}
    assert "--overlap" not in _plan("nid1", shell, LaunchRequest(4, 2, 2)).text
    step = environ | {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    assert "--overlap" in _plan("nid1", step, LaunchRequest(4, 2, 2)).text


def test_a_share_of_a_host_that_is_too_small_is_refused() -> None:
    environ = slurm_job("node[1-2]") | {"SLURM_JOB_CPUS_PER_NODE": "1(x2)"}
    with pytest.raises(ConfigError, match=r"2 x 1 = 2. Submit it with --exclusive"):
        require_startable(_plan("node1", environ, LaunchRequest(4, 2, 2)))
    environ["SLURM_JOB_CPUS_PER_NODE"] = "2(x2)"
    require_startable(_plan("node1", environ, LaunchRequest(4, 2, 2)))
    frontier = slurm_job("frontier1") | {"SLURM_JOB_CPUS_PER_NODE": "16"}
    with pytest.raises(ConfigError, match="8 x 7 = 56"):
        require_startable(_plan("frontier1", frontier, LaunchRequest(8, 1, 8)))


def test_fewer_hosts_than_the_job_has_get_a_file_of_their_own(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0", "x3003c0s1b0n0")
    plan = _plan("x3001c0s1b0n0", environ, LaunchRequest(8, 2, 4, folder=tmp_path))
    assert plan.hostfile == (tmp_path / "hostfile", "x3001c0s1b0n0\nx3002c0s1b0n0\n")
    assert f"--hostfile={tmp_path}/hostfile" in plan.text


def test_the_users_choices_win(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "x3001c0s1b0n0") | {
        "FI_CXI_DEFAULT_CQ_SIZE": "1",
        "FI_MR_CACHE_MONITOR": "",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "7777",
    }
    request = LaunchRequest(4, 1, 4, cpu_bind="list:0:8:16:24", folder=tmp_path)
    plan = _plan("x3001c0s1b0n0", environ, request)
    assert "--cpu-bind=list:0:8:16:24 /env" in plan.text
    assert plan.environ["FI_CXI_DEFAULT_CQ_SIZE"] == "1"
    assert "FI_MR_CACHE_MONITOR" not in plan.environ
    assert plan.added == {"FI_CXI_DISABLE_HOST_REGISTER": "1"}
    assert (plan.environ["MASTER_ADDR"], plan.environ["MASTER_PORT"]) == ("head", "7777")


def test_numbers_of_an_earlier_launch_do_not_reach_the_ranks(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "n1") | {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4"}
    plan = _plan("n1", environ, LaunchRequest(2, 1, 2))
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(plan.environ)


def test_what_cannot_be_started_can_be_planned() -> None:
    """A dry run on a laptop may plan a job of eight hosts; only a real start is refused."""
    plan = _plan("laptop", {}, LaunchRequest(96, 8, 12))
    assert plan.text.startswith("mpiexec --envall --np=96 --ppn=12")
    with pytest.raises(ConfigError, match="NHOSTS=8, but this host is 1"):
        require_startable(plan)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=9 .*NHOSTS=1 x NGPU_PER_HOST=4 = 4"):
        require_startable(_plan("laptop", {}, LaunchRequest(9, 1, 4)))
    with pytest.raises(ConfigError, match=r"LAUNCH_WITH=local .*NHOSTS=2"):
        require_startable(_plan("laptop", {}, LaunchRequest(2, 2, 1, launcher="local")))


def test_a_launcher_that_is_not_on_the_ranks_path_is_named(tmp_path: Path) -> None:
    plan = _plan("laptop", {}, LaunchRequest(2, 1, 2, launcher="mpirun"))
    with pytest.raises(ConfigError, match="LAUNCH_WITH=mpirun: mpirun is not on PATH"):
        require_launcher(plan, {"PATH": str(tmp_path)})
    require_launcher(_plan("laptop", {}, LaunchRequest(2, 1, 2)), {"PATH": str(tmp_path)})
    (tmp_path / "mpirun").touch(mode=0o755)
    require_launcher(plan, {"PATH": str(tmp_path)})


def test_a_host_is_left_out(tmp_path: Path) -> None:
    """Another of the job takes its place, in a host file of the run's own, at another port."""
    environ = pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0", "x3003c0s1b0n0")
    plan = _plan("x3001c0s1b0n0", environ, LaunchRequest(8, 2, 4, folder=tmp_path))
    assert plan.hosts == ("x3001c0s1b0n0", "x3002c0s1b0n0")
    other = plan.anew(2, ["x3001c0s1b0n0"])
    assert other.hosts == ("x3002c0s1b0n0", "x3003c0s1b0n0")
    assert other.hostfile == (tmp_path / "hostfile", "x3002c0s1b0n0\nx3003c0s1b0n0\n")
    assert other.environ["MASTER_ADDR"].startswith("x3002c0s1b0n0")
    assert other.environ["MASTER_PORT"] != plan.environ["MASTER_PORT"]
    assert plan.anew(1, []) == plan
    assert other.problem is None
    none_left = plan.anew(2, ["x3001c0s1b0n0", "x3002c0s1b0n0"]).problem
    assert none_left is not None and "NHOSTS=2" in none_left


def test_the_whole_job_keeps_its_host_file_only_if_no_host_is_left_out(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0")
    plan = _plan("x3001c0s1b0n0", environ, LaunchRequest(4, 1, 4, folder=tmp_path))
    other = plan.anew(2, ["x3001c0s1b0n0"])
    assert other.hostfile == (tmp_path / "hostfile", "x3002c0s1b0n0\n")


def test_srun_is_told_which_hosts_to_leave_out(tmp_path: Path) -> None:
    environ = slurm_job("nid[1-3]") | {"NERSC_HOST": "perlmutter"}
    plan = _plan("nid1", environ, LaunchRequest(8, 2, 4, folder=tmp_path))
    assert "--exclude" not in plan.text
    assert "--exclude=nid2" in plan.anew(2, ["nid2"]).text


@pytest.mark.parametrize(
    ("own", "fr"), [({}, "2000"), ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "9"}, None)]
)
def test_the_flight_recorder_is_on_unless_it_is_set(
    tmp_path: Path, own: dict[str, str], fr: str | None
) -> None:
    environ = slurm_job("nid1") | {"NERSC_HOST": "perlmutter"} | own
    plan = _plan("nid1", environ, LaunchRequest(4, 1, 4, folder=tmp_path))
    assert plan.environ.get("TORCH_FR_BUFFER_SIZE") == fr


@pytest.mark.parametrize(
    ("site", "own", "expected"),
    [
        ("NERSC_HOST=perlmutter", "", "expandable_segments:True"),
        ("NERSC_HOST=perlmutter", "PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:64", None),
        ("NERSC_HOST=perlmutter", "PYTORCH_ALLOC_CONF=backend:cudaMallocAsync", "backend:cud"),
        ("NERSC_HOST=perlmutter", "TORCH_NCCL_USE_TENSOR_REGISTER_ALLOCATOR_HOOK=1", None),
        ("LMOD_SYSTEM_NAME=frontier", "", None),
        ("PBS_O_HOST=aurora", "", None),
    ],
)
def test_memory_grows_in_segments_on_nvidia_unless_the_user_decides(
    tmp_path: Path, site: str, own: str, expected: str | None
) -> None:
    environ = dict([site.split("=")]) | dict([own.split("=")] if own else []) | slurm_job("nid1")
    found = _plan("nid1", environ, LaunchRequest(4, 1, 4, folder=tmp_path)).environ
    value = found.get("PYTORCH_ALLOC_CONF")
    assert value == expected or (expected and str(value).startswith(expected))


# --- What the ranks get of devices and of MPI -----------------------------------------------------


def test_device_cpu_hides_every_accelerator(tmp_path: Path) -> None:
    """From torch and from DeepSpeed, of each vendor, whatever the user's shell has."""
    environ = pbs_job(tmp_path, "x3001c0s1b0n0") | {"DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "0,1"}
    location = at("x3001c0s1b0n0", environ)
    assert location.devices_per_host == 0
    request = LaunchRequest(2, 1, 2, device="cpu", folder=tmp_path)
    child = make_plan(request, PROGRAM, environ, location).environ
    assert child["DS_ACCELERATOR"] == "cpu"
    assert child["CUDA_VISIBLE_DEVICES"] == child["HIP_VISIBLE_DEVICES"] == "-1"
    assert child["ONEAPI_DEVICE_SELECTOR"] == "*:cpu"
    assert find_location(environ, ("--device", "auto"), "x3001c0s1b0n0").devices_per_host == 2


def test_a_chosen_accelerator_is_deepspeeds_too() -> None:
    location = at("laptop", {"CUDA_VISIBLE_DEVICES": ""})
    for device in ("cuda", "xpu"):
        child = make_plan(LaunchRequest(1, 1, 1, device=device), PROGRAM, {}, location).environ
        assert child["DS_ACCELERATOR"] == device


@pytest.mark.parametrize("mpi4py", [True, False])
def test_mpi_is_asked_for_only_where_it_is_imported(
    tmp_path: Path, mpi4py: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = object() if mpi4py else None
    monkeypatch.setattr(launch_plan, "find_spec", lambda name: spec)
    environ = pbs_job(tmp_path, "x4217c2s6b0n0")
    plan = _plan("x4217c2s6b0n0", environ, LaunchRequest(12, 1, 12, folder=tmp_path))
    assert (plan.environ.get("CCL_KVS_MODE") == "mpi") is mpi4py
    assert ("CCL_KVS_MODE" in plan.added) is mpi4py
