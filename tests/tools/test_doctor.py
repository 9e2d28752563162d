"""tools/doctor.py: each thing that can be wrong is found and has a fix, in faked places."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron.launch import checkup
from megatron.launch.checkup import CHECKS, FAIL, OK, WARN, Place, look
from tests.launch.places import pbs_job
from tools import doctor

ROOT = Path(__file__).resolve().parents[2]
LAPTOP = {"PATH": "/usr/bin:/bin", "HOME": "/nowhere", "WANDB_MODE": "disabled"}
VERSIONS = dict.fromkeys((*checkup.NEEDED, "wandb", "mpi4py"), "1.0")
ANSWER: dict[str, Any] = {
    "versions": VERSIONS | {"torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
    "built": "CUDA None, ROCm None, XPU None",
    "cuda": 0, "xpu": 0, "nccl": False, "xccl": False, "gloo": True,
}  # fmt: skip
H200 = ANSWER | {"cuda": 4, "name": "NVIDIA H200", "nccl": True}


@pytest.fixture(autouse=True)
def no_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No interpreter is started and no name server is asked: a job's hosts have addresses."""
    monkeypatch.setattr(checkup, "_interpreter", lambda folder, limit_s: (sys.executable, ANSWER))
    monkeypatch.setattr(checkup, "unreachable", lambda host, port, limit_s: "")


def at(folder: Path, environ: dict[str, str], hostname: str = "laptop", **answer: Any) -> Place:
    """A place in an empty folder, whose interpreter answers as ANSWER does but for some values."""
    found = look({**LAPTOP, "RUN_DIR": str(folder / "run")} | environ, folder, hostname)
    return dataclasses.replace(found, answer=ANSWER | answer)


def verdicts(place: Place, name: str) -> list[str]:
    return [found.verdict for found in CHECKS[name](place)]


def only(place: Place, name: str, verdict: str) -> str:
    """Text and fix of the one finding of a verdict that a check makes."""
    (found,) = [found for found in CHECKS[name](place) if found.verdict == verdict]
    assert verdict != FAIL or found.fix
    return f"{found.text} -> {found.fix}"


def test_a_laptop_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([], {}, at(tmp_path, {})) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "13 checks: 0 FAIL, 13 ok"
    assert [line.split()[1].rstrip(":") for line in lines[:-1]] == list(CHECKS)


def test_json_has_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = at(tmp_path, {}, versions=ANSWER["versions"] | {"deepspeed": "0.18.0"})
    assert doctor.main(["--json"], {}, place) == 1
    rows = json.loads(capsys.readouterr().out)
    (bad,) = [row for row in rows if row["verdict"] == FAIL]
    assert bad["check"] == "versions" and "pip install 'deepspeed~=0.19.8.0'" in bad["fix"]


def test_versions(tmp_path: Path) -> None:
    old = at(tmp_path, {}, versions=ANSWER["versions"] | {"torch": "2.5.1"})
    assert "torch 2.5.1 is too old (2.11 to 2.15 are tested" in only(old, "versions", FAIL)
    newer = at(tmp_path, {}, versions=ANSWER["versions"] | {"deepspeed": "0.20.0"})
    assert "newer" in only(newer, "versions", WARN)
    lacking = at(tmp_path, {}, versions=ANSWER["versions"] | {"safetensors": None})
    assert "-m pip install safetensors" in only(lacking, "versions", WARN)
    slow = dataclasses.replace(at(tmp_path, {}), answer={})
    assert "did not import torch in 20 s" in only(slow, "versions", WARN)


def test_no_environment_yet(tmp_path: Path) -> None:
    bare = dataclasses.replace(at(tmp_path, {}), python=None, answer={"versions": {}})
    assert "train_alcf.sh makes .venv" in only(bare, "python", WARN)
    assert verdicts(bare, "versions") == verdicts(bare, "backend") == []
    assert verdicts(bare, "accelerators") == [OK]


def test_promised_accelerators_that_are_not_seen(tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "x4217c2s6b0n0")
    aurora = at(tmp_path, job, "x4217c2s6b0n0")
    assert "a host of aurora has 12 accelerators, but torch sees none" in only(
        aurora, "accelerators", FAIL
    )
    assert verdicts(at(tmp_path, job | {"DEVICE": "cpu"}, "x4217c2s6b0n0"), "accelerators") == [OK]
    asked = at(tmp_path, {"DEVICE": "cuda"})
    assert "DEVICE=cuda, but torch sees none" in only(asked, "accelerators", FAIL)


def test_accelerators_and_their_backend(tmp_path: Path) -> None:
    polaris = pbs_job(tmp_path, "x3001c0s1b0n0")
    there = at(tmp_path, polaris, "x3001c0s1b0n0", **H200)
    assert "torch sees 4: NVIDIA H200" in only(there, "accelerators", OK)
    assert only(there, "backend", OK).startswith("nccl")
    fewer = at(tmp_path, polaris, "x3001c0s1b0n0", **H200 | {"cuda": 2})
    assert "NGPU_PER_HOST=2" in only(fewer, "accelerators", WARN)
    one = at(tmp_path, polaris, "x3001c0s1b0n0", **H200 | {"cuda": 1})  # as a launcher may show
    assert verdicts(one, "accelerators") == [OK]
    without = at(tmp_path, polaris, "x3001c0s1b0n0", **H200 | {"nccl": False})
    assert "torch has no nccl" in only(without, "backend", FAIL)
    no_mpi = ANSWER["versions"] | {"mpi4py": None}
    kvs = at(tmp_path, {"CCL_KVS_MODE": "mpi"}, versions=no_mpi)
    assert "needs mpi4py" in only(kvs, "backend", FAIL)


def test_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "qsub train_alcf.sh" in only(at(tmp_path, {}, "polaris-login-04"), "job", WARN)
    missing = at(tmp_path, {"HOSTFILE": str(tmp_path / "none")})
    assert "HOSTFILE" in only(missing, "job", FAIL)
    two = at(tmp_path, pbs_job(tmp_path, "x3001c0s1b0n0", "x3002c0s1b0n0"), "x3001c0s1b0n0")
    assert "2 hosts by PBS_NODEFILE" in only(two, "job", OK)
    monkeypatch.setattr(
        checkup, "unreachable", lambda host, port, limit_s: "unknown" * host.startswith("x3002")
    )
    assert "no address: x3002c0s1b0n0 -> correct PBS_NODEFILE" in only(two, "job", FAIL)


def test_ranks_of_a_launcher(tmp_path: Path) -> None:
    stale = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert "rank 1 of 2 (torchrun)" in only(at(tmp_path, stale), "ranks", WARN)
    broken = stale | {"RANK": "7"}
    assert "rank 7 of 2" in only(at(tmp_path, broken), "ranks", FAIL)


def test_the_launcher(tmp_path: Path) -> None:
    job = pbs_job(tmp_path, "x3001c0s1b0n0") | {"PATH": str(tmp_path / "bin")}
    assert "mpiexec is not on PATH" in only(at(tmp_path, job, "x3001c0s1b0n0"), "launcher", FAIL)
    (tmp_path / "bin").mkdir()
    mpiexec = tmp_path / "bin/mpiexec"
    mpiexec.write_text("#!/bin/sh\necho\necho HYDRA build details:\n")
    mpiexec.chmod(0o755)
    assert "HYDRA" in only(at(tmp_path, job, "x3001c0s1b0n0"), "launcher", OK)
    mpiexec.write_text("#!/bin/sh\nexec sleep 60\n")
    slow = dataclasses.replace(at(tmp_path, job, "x3001c0s1b0n0"), limit_s=0.2)
    assert "no answer" in only(slow, "launcher", OK)


def test_settings_that_would_be_refused(tmp_path: Path) -> None:
    wrong = at(tmp_path, {"HEADS": "5"})
    assert "HEADS" in only(wrong, "settings", FAIL)
    for name in CHECKS:  # what needs settings is silent, the rest goes on
        list(CHECKS[name](wrong))


def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(checkup.shutil, "disk_usage", lambda path: Usage(free=2**20))
        assert "0.0 GiB free; two checkpoints take" in only(at(tmp_path, {}), "disk", WARN)
        patched.setattr(checkup.shutil, "disk_usage", lambda path: Usage(free=2**50))
        patched.setattr(checkup.time, "time", lambda: 4e9)
        assert "the clock and the file system's differ" in only(at(tmp_path, {}), "disk", WARN)


def test_a_disk_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    place = at(tmp_path, {})
    monkeypatch.setattr(checkup.tempfile, "NamedTemporaryFile", refused)
    assert "cannot be written (Permission denied) -> set RUN_DIR" in only(place, "disk", FAIL)


@dataclasses.dataclass
class Usage:
    free: int


def test_data_and_tokenizer(tmp_path: Path) -> None:
    lists = {"DATA_FILE_LIST": str(tmp_path / "none.txt"), "VOCAB_SIZE": "256"}
    assert "none.txt" in only(at(tmp_path, lists), "data", FAIL)
    gemma = lists | {"TOKENIZER_TYPE": "HFTokenizer", "TOKENIZER_MODEL": "google/gemma-7b"}
    gemma["HOME"] = str(tmp_path)
    assert "hf download google/gemma-7b" in only(at(tmp_path, gemma), "tokenizer", WARN)
    offline = gemma | {"HF_HUB_OFFLINE": "1"}
    assert "HF_HUB_OFFLINE is set" in only(at(tmp_path, offline), "tokenizer", FAIL)
    cached = tmp_path / ".cache/huggingface/hub/models--google--gemma-7b/snapshots/abc"
    cached.mkdir(parents=True)
    assert "is on this host" in only(at(tmp_path, offline), "tokenizer", OK)


def test_wandb(tmp_path: Path) -> None:
    home = {"WANDB_MODE": "online", "HOME": str(tmp_path)}
    assert "no key" in only(at(tmp_path, home), "wandb", OK)
    assert "a key" in only(at(tmp_path, home | {"WANDB_API_KEY": "secret"}), "wandb", OK)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert "a key" in only(at(tmp_path, home), "wandb", OK)
    assert "WANDB_DISABLED" in only(at(tmp_path, home | {"WANDB_DISABLED": "1"}), "wandb", OK)


def test_no_secret_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = "http://user:hunter2@proxy.example:3128"
    environ = {"WANDB_API_KEY": "hunter2", "HF_TOKEN": "hunter2", "https_proxy": proxy}
    doctor.main([], {}, at(tmp_path, environ))
    printed = capsys.readouterr().out
    assert "proxy proxy.example:3128" in printed and "hunter2" not in printed


def test_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "unreachable", lambda host, port, limit_s: "refused")
    assert "huggingface.co:443, no proxy set: refused" in only(at(tmp_path, {}), "network", WARN)


def test_a_host_is_reached_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert checkup.unreachable("127.0.0.1", port, 2) != ""  # nothing listens yet
        listener.listen()
        assert checkup.unreachable("127.0.0.1", port, 2) == ""
    monkeypatch.setattr(checkup.socket, "getaddrinfo", lambda *names: time.sleep(9))
    assert checkup.unreachable("nowhere", None, 0.1) == "no answer in 0 s"


def test_it_runs_before_there_is_an_environment() -> None:
    """An interpreter without any package, as the one that train_alcf.sh begins with."""
    ended = subprocess.run(
        [str(Path(sys.executable).resolve()), "-I", "-S", "tools/doctor.py", "--json"],
        cwd=ROOT,
        env=LAPTOP | {"https_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode in (0, 1), ended.stderr
    rows = json.loads(ended.stdout)
    assert {row["check"] for row in rows} >= CHECKS.keys() - {"versions", "backend"}
    assert all(row["fix"] for row in rows if row["verdict"] == FAIL)
