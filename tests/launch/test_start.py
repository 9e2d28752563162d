"""What train_alcf.sh calls: refusals, dry runs, the run's folder, and the training's status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.config.schema import read_run
from megatron.launch import start
from megatron.launch.provenance import commit, recorded_environment
from megatron.launch.starts import accept
from tests.launch.places import pbs_job, slurm_job

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder on a host that no table knows, without accelerators."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    monkeypatch.setattr("megatron.launch.site.count_accelerators", lambda environ: 0)
    monkeypatch.setattr(start, "PROGRAM", tmp_path / "nothing-is-to-start.py")
    return tmp_path


ACCEPT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from megatron.launch.starts import accept
assert sys.argv[1] == "--config"
config = Path(sys.argv[2])
accept(config, config.parents[1])
"""


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Another training program in the place of pretrain_gpt_alcf.py: rank 0 accepts its start."""
    path = folder / "program.py"
    only_first = ACCEPT.replace("\n", "\n    ")
    begin = f"import os\nif os.environ['RANK'] == '0':{only_first}\n"
    path.write_text(begin + text, encoding="utf-8")
    monkeypatch.setattr(start, "PROGRAM", path)


@pytest.mark.parametrize(
    ("environ", "status", "word"),
    [
        ({"TP": "3", "HEADS": "8"}, 2, "TP=3"),
        ({"OPT": "nosuch"}, 2, "OPT=nosuch"),
        ({"DATA_FILE_LIST": "missing.txt"}, 3, "DATA_FILE_LIST=missing.txt"),
        ({"HOSTFILE": "missing"}, 2, "HOSTFILE=missing"),
        ({"PMI_RANK": "1", "PMI_LOCAL_RANK": "1", "PMI_SIZE": "2"}, 2, "started by PMI"),
        ({"LAUNCH_WITH": "local", "NHOSTS": "2", "TP": "2"}, 2, "NHOSTS=2"),
        ({"MASTER_PORT": "70000", "LAUNCH_WITH": "torchrun"}, 2, "MASTER_PORT=70000"),
    ],
)
@pytest.mark.parametrize("check", [["--check"], []])
def test_wrong_settings_start_nothing(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    status: int,
    word: str,
    check: list[str],
) -> None:
    assert start.main(check, environ) == status
    out, err = capsys.readouterr()
    assert word in err
    assert "Traceback" not in err
    assert out == ""
    assert list(here.iterdir()) == []


def test_check_starts_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start.main(["--check"], {}) == 0
    assert capsys.readouterr() == ("", "")
    assert list(here.iterdir()) == []


def test_dry_run_shows_the_launch_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"DRY_RUN": "1", "TP": "2"}
    assert start.main(["--check"], environ) == start.NOTHING_TO_START
    shown = capsys.readouterr().out
    assert "-m megatron.launch -n 2 -- " in shown
    assert "--config runs/debug-seq128-builtin/starts/0001.pending.json" in shown
    assert start.main([], environ) == 0
    assert capsys.readouterr().out == shown
    assert list(here.iterdir()) == []


def test_dry_run_of_a_job_elsewhere_warns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"DRY_RUN": "1", "NHOSTS": "8", "NGPU_PER_HOST": "12", "TP": "2"}
    assert start.main(["--check"], environ) == start.NOTHING_TO_START
    shown = capsys.readouterr().out
    assert "mpiexec --envall --np=96 --ppn=12" in shown
    assert "WARNING: a real run would stop here with status 2: NHOSTS=8" in shown


def test_dry_run_in_a_job_on_aurora(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hosts = ("x4217c2s6b0n0", "x4218c2s6b0n0")
    monkeypatch.setattr("socket.gethostname", lambda: hosts[0])
    assert start.main(["--check"], pbs_job(here, *hosts) | {"DRY_RUN": "1"}) == 100
    shown = capsys.readouterr().out
    assert f"mpiexec --envall --line-buffer --np=24 --ppn=12 --hostfile={here}/nodefile" in shown
    assert "ALCF/data-lists/aurora/dolma.txt" in shown
    assert "AuroraGPT-7B" in shown


def test_fewer_ranks_than_devices_use_fewer_hosts(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = slurm_job("nid[1-2]") | {
        "NERSC_HOST": "perlmutter",
        "DRY_RUN": "1",
        "WORLD_SIZE": "2",
    }
    assert start.main(["--check"], environ) == 100
    assert "--nodes=1 --ntasks=2 --ntasks-per-node=2 --gpus-per-node=2" in capsys.readouterr().out


def test_login_nodes_are_for_dry_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "polaris-login-04")
    settings = {"MODEL_ARCH": "debug", "DATA_FILE_LIST": "builtin"}
    assert start.main(["--check"], settings) == 2
    assert "qsub" in capsys.readouterr().err
    assert start.main(["--check"], settings | {"LAUNCH_WITH": "local"}) == 0
    assert start.main(["--check"], settings | {"DRY_RUN": "1"}) == 100


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_options(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert start.main(["--check", "--num-layers", flag], {}) == 100
    assert "--tensor-model-parallel-size" in capsys.readouterr().out


TRAINING = """
import json, os, sys, time
from pathlib import Path
config = json.loads(Path(sys.argv[2]).read_text())["config"]
while not Path(sys.argv[2]).with_name("0001.json").exists():
    time.sleep(0.02)
if os.environ["RANK"] == "0":
    print("training", config["model"]["num_layers"], "layers on", os.environ["WORLD_SIZE"], "ranks")
    print("a warning", file=sys.stderr)
sys.exit(5 * (os.environ["RANK"] == "1"))
"""


def test_a_run_leaves_its_record_and_the_trainings_status(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program(here, monkeypatch, TRAINING)
    environ = {
        "PATH": "/usr/bin:/bin",
        "NLAYERS": "2",
        "WANDB_API_KEY": "secret-key",
        "HF_TOKEN": "secret-token",
        "OMP_NUM_THREADS": "1",
    }
    assert start.main(["--num-layers", "3", "--tp", "2", "--run-dir", "mine"], environ) == 5
    out, err = capfd.readouterr()
    assert "training 3 layers on 2 ranks" in out
    assert "rank 1 failed with status 5:" in err

    log = (here / "mine" / "output.log").read_text(encoding="utf-8")
    assert "training 3 layers on 2 ranks\n" in log
    assert "a warning\n" in log
    assert "launch command: " in log

    text = (here / "mine" / "run.json").read_text(encoding="utf-8")
    assert "secret" not in text + log
    written = json.loads(text)
    assert written["config"]["model"]["num_layers"] == 3
    assert "model.num_layers: --num-layers" in written["sources"]
    origin = written["provenance"]
    assert origin["command_line"] == ["--num-layers", "3", "--tp", "2", "--run-dir", "mine"]
    assert origin["environment"] == {"NLAYERS": "2", "OMP_NUM_THREADS": "1"}
    assert origin["hosts"] == ["laptop"]
    assert {"torch", "deepspeed", "python", "megatron"} <= set(origin["versions"])
    assert read_run(here / "mine" / "run.json").model.num_layers == 3

    deepspeed = json.loads((here / "mine" / "ds_config.json").read_text(encoding="utf-8"))
    assert deepspeed["train_micro_batch_size_per_gpu"] == 16
    assert {path.name for path in (here / "mine").iterdir()} == {
        "run.json",
        "ds_config.json",
        "output.log",
        "starts",
    }
    assert [path.name for path in (here / "mine" / "starts").iterdir()] == ["0001.json"]
    assert (here / "mine" / "starts" / "0001.json").read_text(encoding="utf-8") == text


def test_a_second_start_appends_to_the_log(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program(here, monkeypatch, "print('a run')\n")
    for _ in range(2):
        assert start.main(["--run-dir", "mine"], {"PATH": "/usr/bin:/bin"}) == 0
    assert (here / "mine" / "output.log").read_text(encoding="utf-8").count("a run\n") == 2


def test_what_a_machine_sets_is_said_and_reaches_the_ranks(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program(here, monkeypatch, "import os\nprint('size', os.environ['FI_CXI_DEFAULT_CQ_SIZE'])\n")
    monkeypatch.setattr("socket.gethostname", lambda: "polaris-login-04")
    environ = {
        "PATH": "/usr/bin:/bin",
        "LAUNCH_WITH": "local",
        "MODEL_ARCH": "debug",
        "DATA_FILE_LIST": "builtin",
        "WORLD_SIZE": "1",
        "FI_MR_CACHE_MONITOR": "mine",
    }
    assert start.main(["--run-dir", "mine"], environ) == 0
    out = capfd.readouterr().out
    said = next(line for line in out.splitlines() if line.startswith("set for polaris:"))
    assert "FI_CXI_DEFAULT_CQ_SIZE=131072" in said
    assert "FI_MR_CACHE_MONITOR" not in said
    assert "size 131072\n" in out


def test_a_launcher_that_is_missing_starts_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start.main([], {**pbs_job(here, "node1"), "PATH": str(here)}) == 2
    assert "mpiexec is not on PATH" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_ranks_of_another_launcher_make_the_same_run(here: Path) -> None:
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        for rank in range(2)
    ]
    argv, run = ("--tp", "2", "--run-dir", "mine"), here / "mine"
    with start.configuration(ranks[1], argv) as (follower, config):
        assert config is None
        assert not run.exists()
    with start.configuration(ranks[0], argv) as (leader, config):
        assert leader == follower
        assert leader.parallel.world_size == 2
        assert config == Path("mine/starts/0001.pending.json")
        with pytest.raises(ConfigError, match="in use"), start.configuration(ranks[0], argv):
            pass
        assert not (run / "run.json").exists()
        accept(config, leader.run_folder)
        assert leader == read_run(run / "run.json")
    assert {path.name for path in run.iterdir()} == {"run.json", "ds_config.json", "starts"}
    # A configuration given by hand is used as it is, by one owner.
    by_hand = ["--config", "mine/run.json"]
    with start.configuration(ranks[0], by_hand) as (again, config):
        assert again == leader
        accept(config, again.run_folder)
        with pytest.raises(ConfigError, match="in use"), start.configuration(ranks[0], by_hand):
            pass
        with start.configuration(ranks[1], by_hand) as (follower, _):
            assert follower == leader
    assert [path.name for path in (run / "starts").iterdir()] == ["0001.json"]
    with start.configuration(ranks[0], argv):  # refused later, or nothing to do
        pass
    assert [path.name for path in (run / "starts").iterdir()] == ["0001.json"]


def test_a_folder_that_cannot_be_written_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs").write_text("a file\n", encoding="utf-8")
    assert start.main([], {}) == 2
    assert "runs" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system without folders")
@pytest.mark.parametrize("name", ["RUN_DIR", "CKPT_DIR"])
def test_a_folder_is_tried_before_anything_is_made(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Permissions look right to the superuser; the file system still refuses."""
    assert start.main(["--check"], {name: "/proc/nowhere"}) == 2
    assert f"{name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"config": {}}', '{"config": {"model": {"colour": 1}}}']
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        read_run(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_run(tmp_path / "none.json")


def test_commit_without_git(tmp_path: Path) -> None:
    """A branch, a packed branch, a bare commit, a worktree, and no clone."""
    git = tmp_path / "clone" / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    assert commit(tmp_path / "clone") == "unknown"
    (git / "packed-refs").write_text(
        "# pack-refs\n" + "b" * 40 + " refs/heads/main\n", encoding="utf-8"
    )
    assert commit(tmp_path / "clone") == "b" * 40
    (git / "refs/heads/main").write_text("a" * 40 + "\n", encoding="utf-8")
    assert commit(tmp_path / "clone") == "a" * 40

    inside = git / "worktrees" / "tree"
    inside.mkdir(parents=True)
    (inside / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    (inside / "commondir").write_text("../..\n", encoding="utf-8")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ".git").write_text(f"gitdir: {inside}\n", encoding="utf-8")
    assert commit(tmp_path / "tree") == "a" * 40

    (git / "HEAD").write_text("c" * 40 + "\n", encoding="utf-8")
    assert commit(tmp_path / "clone") == "c" * 40
    assert commit(tmp_path) == "unknown"


def test_variables_are_recorded_by_name_alone() -> None:
    environ = {
        "TP": "2",
        "PBS_JOBID": "7",
        "AWS_SECRET_ACCESS_KEY": "x",
        "TP_TOKEN": "x",
        "PATH": "/",
    }
    assert recorded_environment(environ) == {"PBS_JOBID": "7", "TP": "2"}


def test_starting_imports_nothing_heavy() -> None:
    """A wrong setting fails on a login node, before there is an environment."""
    script = (
        "import sys, megatron.launch.start, megatron.launch.__main__\n"
        "print(*(name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules))"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []
