"""The table of machines, and the shell's short form of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron.config import schema
from megatron.launch.machines import MACHINES, find_machine
from megatron.launch.site import site
from tests.launch.places import at, pbs_job, slurm_job

ROOT = Path(__file__).resolve().parents[2]

HOSTS = [
    ("x4217c2s6b0n0", {}, "aurora"),
    ("X4217C2S6B0N0.hsn.cm.aurora.alcf.anl.gov", {}, "aurora"),
    ("aurora-uan-0009", {}, "aurora"),
    ("x1921c0s3b0n0", {}, "sunspot"),
    ("uan-0001", {}, "sunspot"),
    ("x3006c0s13b1n0", {}, "polaris"),
    ("polaris-login-04", {}, "polaris"),
    ("x3100c0s1b0n0", {"PBS_O_HOST": "sirius-login-01"}, "sirius"),
    ("sophia-gpu-07", {}, "sophia"),
    ("nid001234", {"NERSC_HOST": "perlmutter"}, "perlmutter"),
    ("login12.chn.perlmutter.nersc.gov", {}, "perlmutter"),
    ("frontier01234", {}, "frontier"),
    ("login08", {"LMOD_SYSTEM_NAME": "frontier"}, "frontier"),
]
UNKNOWN = ["login1", "login1.site.edu", "nid001234", "x4", "xps-laptop", "uanna", "x30-desk"]


@pytest.mark.parametrize(("hostname", "environ", "name"), HOSTS)
def test_machine_of_a_host(hostname: str, environ: dict[str, str], name: str) -> None:
    machine = find_machine(hostname, environ)
    assert machine.name == name
    assert machine.is_hpc


@pytest.mark.parametrize("hostname", UNKNOWN)
def test_an_unknown_host_is_no_machine_of_ours(hostname: str) -> None:
    assert find_machine(hostname, {}).name == "generic"
    assert find_machine(hostname, {}, "slurm").name == "slurm"
    assert find_machine(hostname, {}, "pbs").name == "pbs"
    assert not find_machine(hostname, {}, "slurm").is_hpc


def test_the_shell_names_machines_alike() -> None:
    """helpers.sh chooses modules before there is a Python, so it has a short form of the table."""
    for hostname, environ, name in [*HOSTS, *((host, {}, "") for host in UNKNOWN)]:
        script = f'source ALCF/helpers.sh --functions-only; machine_name "{hostname.lower()}"'
        found = subprocess.run(
            ["bash", "-c", script],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", **environ},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == name, hostname


@pytest.mark.parametrize(
    ("hosts", "steps"),
    [
        (1, 16),
        (15, 16),
        (16, 8),
        (32, 8),
        (33, 4),
        (127, 4),
        (128, 2),
        (255, 2),
        (256, 1),
        (9000, 1),
    ],
)
def test_aurora_accumulates_less_on_more_hosts(hosts: int, steps: int) -> None:
    defaults = find_machine("aurora-uan-0009", {}).defaults(hosts)
    assert defaults["GRAD_ACC_STEPS"] == str(steps)
    assert (defaults["DTYPE"], defaults["MICRO_BATCH"], defaults["TP"]) == ("bf16", "1", "1")


@pytest.mark.parametrize(("hosts", "micro"), [(1, 1), (2, 1), (3, 2), (7, 2), (8, 4), (500, 4)])
def test_polaris_has_larger_micro_batches_on_more_hosts(hosts: int, micro: int) -> None:
    defaults = find_machine("polaris-login-04", {}).defaults(hosts)
    assert defaults["MICRO_BATCH"] == str(micro)
    assert (defaults["DTYPE"], defaults["GRAD_ACC_STEPS"]) == ("fp16", "8")


def test_perlmutter_cuts_matrices_in_two() -> None:
    assert find_machine("nid1", {"NERSC_HOST": "perlmutter"}).defaults(1)["TP"] == "2"


def test_defaults_are_variables_that_exist() -> None:
    for machine in MACHINES:
        for name, text in machine.defaults(4).items():
            schema.by_variable()[name].parse(text, name)


def test_site_of_a_job(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, *(f"x4217c2s{slot}b0n0" for slot in range(3)))
    found = site(environ, (), at("x4217c2s0b0n0", environ))
    assert (found.machine, found.is_hpc, found.num_hosts, found.devices_per_host) == (
        "aurora",
        True,
        3,
        12,
    )
    assert found.defaults["GRAD_ACC_STEPS"] == "16"


def test_site_with_fewer_hosts_has_their_defaults(tmp_path: Path) -> None:
    environ = pbs_job(tmp_path, *(f"x30{number:02}c0s1b0n0" for number in range(10)))
    place = at("x3000c0s1b0n0", environ)
    assert site(environ, (), place).defaults["MICRO_BATCH"] == "4"
    assert site(environ | {"NHOSTS": "2"}, (), place).defaults["MICRO_BATCH"] == "1"
    assert site(environ | {"NHOSTS": "10"}, ("--nhosts", "3"), place).num_hosts == 3


def test_devices_of_slurm_and_of_hidden_ones() -> None:
    environ = slurm_job("n[1-2]") | {"SLURM_GPUS_ON_NODE": "6"}
    assert at("n1", environ).devices_per_host == 6
    environ = {"NERSC_HOST": "perlmutter", "CUDA_VISIBLE_DEVICES": "0,1"} | slurm_job("nid1")
    assert at("nid1", environ).devices_per_host == 2
