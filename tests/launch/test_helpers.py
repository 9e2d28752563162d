"""ALCF/helpers.sh in a user's shell, and the Python that it finds for a job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.launch.shell import settings
from tests.launch.places import at, pbs_job, slurm_job
from tests.launch.test_train_script import project, run, stand_ins

__all__ = ["project"]  # a fixture

ROOT = Path(__file__).resolve().parents[2]
SHELLS = [name for name in ("bash", "zsh") if shutil.which(name)]
MACHINE = {"PBS_O_HOST": "sirius"}  # a machine that is known by a variable, 4 devices a host


def shell(name: str, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A script in a user's shell."""
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return subprocess.run(
        [name, "-c", script],
        cwd=ROOT,
        env={"PATH": path, "HOME": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", SHELLS)
def test_a_sourced_shell_knows_its_job_and_keeps_its_options(name: str, tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "n1", "n2") | MACHINE | {"PBS_O_WORKDIR": str(tmp_path)}
    script = """
        before=$-; source ALCF/helpers.sh >/dev/null; source ALCF/helpers.sh >/dev/null
        [ "$before" = "$-" ] && echo "$NHOSTS $NGPUS $NGPU_PER_HOST $HOSTFILE $WORKING_DIR"
        ezpz_get_machine_name; echo "$DIST_LAUNCH"
        launch --dry-run python3 -m mine
    """
    found = shell(name, script, **job)
    nodes = job["PBS_NODEFILE"]
    first, machine, launcher, planned = found.stdout.splitlines()
    assert first == f"2 8 4 {nodes} {tmp_path}", found.stderr
    assert machine == "sirius"
    assert launcher.startswith("mpiexec ") and "8" in launcher and nodes in launcher
    assert planned == f"{launcher} python3 -m mine"


@pytest.mark.parametrize("name", SHELLS)
def test_a_sourced_shell_is_never_ended(name: str) -> None:
    """Neither by a host file that is missing nor under `set -eu`."""
    found = shell(
        name, "set -eu; source ALCF/helpers.sh; echo alive", PBS_JOBID="1", PBS_NODEFILE="missing"
    )
    assert found.stdout.splitlines()[-1] == "alive"
    assert "PBS_NODEFILE" in found.stderr and "the job's variables are not set" in found.stderr


@pytest.mark.parametrize("name", SHELLS)
@pytest.mark.parametrize("options", ["", "set -u;"])
def test_loading_modules_keeps_the_shells_options(name: str, options: str) -> None:
    script = f"""
        {options} source ALCF/helpers.sh --functions-only; before=$-
        module() {{ echo "module $* $UNSET_BY_THE_SITE"; }}; conda() {{ echo "conda $*"; }}
        load_modules; [ "$before" = "$-" ] && echo same
    """
    printed = shell(name, script, **MACHINE).stdout.split("\n")
    assert [line.strip() for line in printed[:-1]] == [
        "loading the modules of sirius", "module use /soft/modulefiles", "module load conda",
        "conda activate base", "same",
    ]  # fmt: skip


def test_launch_works_anywhere_on_a_laptop(tmp_path: Path) -> None:
    script = f"""
        source ALCF/helpers.sh >/dev/null; cd {tmp_path}
        launch -n 2 -- python3 -c 'import os; print(os.environ["RANK"])'
    """
    assert sorted(shell("bash", script).stdout.split()) == ["0", "1"]


def test_a_laptop_is_given_no_option_that_would_bind_it(tmp_path: Path) -> None:
    assert not {"HOSTFILE", "NGPU_PER_HOST", "WORLD_SIZE"} & settings({}, at("box", {})).keys()
    in_job = settings({}, at("x4310c7s4b0n0", pbs_job(tmp_path, "a", "b")))
    assert (in_job["NGPUS"], in_job["HOSTS"]) == ("24", "a b")
    slurm = slurm_job("nid[1-2]") | {"NERSC_HOST": "perlmutter"}
    assert settings(slurm, at("nid1", slurm))["DIST_LAUNCH"].startswith("srun ")


# ---- the Python of a job


def fake_python(folder: Path, *packages: str) -> Path:
    """A `python3` in `folder` that has stand-ins for packages, as a machine's module has."""
    folder.mkdir(parents=True)
    plain = Path(sys._base_executable)  # type: ignore[attr-defined]
    subprocess.run([plain, "-m", "venv", "--without-pip", folder / "base"], check=True)
    (site,) = (folder / "base" / "lib").glob("python3*/site-packages")
    for name in packages:
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("", encoding="utf-8")
    (folder / "python3").write_text(f'#!/bin/bash\nexec "{folder}/base/bin/python" "$@"\n')
    (folder / "python3").chmod(0o755)
    return folder


def find(project: Path, path: str, script: str, **environ: str) -> str:
    """What a script of helpers.sh's functions prints, in a copy of the project."""
    found = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source ALCF/helpers.sh --functions-only; {script}"],
        cwd=project,
        env={"PATH": path, "HOME": str(project), "PIP_NO_INDEX": "1", **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return found.stdout + found.stderr


def test_on_a_machine_without_torch_no_wheel_is_fetched(project: Path, tmp_path: Path) -> None:
    bare = fake_python(tmp_path / "bare")
    (bare / "hostname").write_text("#!/bin/bash\necho x4310c7s4b0n0\n")
    (bare / "hostname").chmod(0o755)
    printed = find(project, f"{bare}:/usr/bin:/bin", "find_python; setup_python requirements.txt")
    assert "no Python with torch on aurora" in printed
    assert not (project / ".venv").exists()


def test_what_a_module_has_is_kept(project: Path, tmp_path: Path) -> None:
    """`missing_only` leaves out what is there in any version, and torch always."""
    (project / "requirements.txt").write_text(
        "# pins\ntorch==2.13.0\npip==99.0\ndeepspeed==0.19.8\nno_such-thing==1\n", encoding="utf-8"
    )
    printed = find(
        project, f"{sys.prefix}/bin:/usr/bin:/bin", "find_python; missing_only requirements.txt"
    )
    assert printed.splitlines() == ["no_such-thing==1"]
    kept = (project / ".venv-requirements.kept").read_text(encoding="utf-8")
    assert "torch==" in kept and "deepspeed" not in kept


@pytest.mark.long
def test_an_environment_lies_on_top_of_the_machines_python(project: Path, tmp_path: Path) -> None:
    """Made with its packages in view, and made anew for another module."""
    # A Python whose own packages a virtual environment sees: the tests' base, with stand-ins.
    script = """
        machine_name() { echo polaris; }
        has_packages() { [[ "$*" != *deepspeed* || $1 == *"/.venv/"* ]]; }
        setup_python requirements.txt; echo "PYTHON=$PYTHON"
    """
    plain = Path(sys._base_executable)  # type: ignore[attr-defined]
    printed = find(project, f"{plain.parent}:/usr/bin:/bin", script)
    assert "making .venv on top of" in printed, printed
    assert f"PYTHON={project}/.venv/bin/python" in printed
    assert "include-system-site-packages = true" in (project / ".venv/pyvenv.cfg").read_text()
    assert "making" not in find(project, f"{plain.parent}:/usr/bin:/bin", script)
    made = project / ".venv/made-from"
    made.write_text(made.read_text().replace("on top of ", "on top of /another"), encoding="utf-8")
    assert "making .venv on top of" in find(project, f"{plain.parent}:/usr/bin:/bin", script)


def test_a_login_shell_still_knows_the_path_that_it_was_given(tmp_path: Path) -> None:
    """A job's script is a login shell: /etc/profile sets PATH anew."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "python3").write_text("#!/bin/bash\n")
    (mine / "python3").chmod(0o755)
    script = (
        f"PATH=/usr/bin:/bin; source {ROOT}/ALCF/helpers.sh --functions-only; python_candidates"
    )
    found = shell("bash", script, PATH=f"{mine}:/usr/bin:/bin")
    assert found.stdout.splitlines()[-1] == str(mine / "python3")


def test_a_signal_during_set_up_does_not_end_the_job(project: Path, tmp_path: Path) -> None:
    """Slurm sends SIGUSR1 to the script long before the ranks listen for it."""
    packages = stand_ins(tmp_path / "packages", "torch", "deepspeed")
    start = ["bash", str(project / "train_alcf.sh")]
    paths = f"{sys.prefix}/bin:/usr/bin:/bin"
    environ = {"PATH": paths, "HOME": str(tmp_path), "PYTHONPATH": packages}
    with subprocess.Popen(
        start, cwd=project, env=environ, stdout=subprocess.PIPE, text=True
    ) as job:
        time.sleep(0.15)
        for _ in range(3):
            job.send_signal(signal.SIGUSR1)
            time.sleep(0.02)
        printed, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "trained on 1" in printed


def test_the_old_name_of_the_script_is_the_script(project: Path) -> None:
    shutil.copy(ROOT / "train_aGPT_7B.sh", project)
    words = ["--train-range-to-skip", "10", "20", "25", "30"]
    found = run(
        project,
        *words,
        script=project / "train_aGPT_7B.sh",
        DRY_RUN="1",
        PBS_O_WORKDIR=str(project),
    )
    assert "10-20,25-30" in found.stdout and found.returncode == 0
