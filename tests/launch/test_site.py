"""Jobs, from the scheduler's variables."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.config.errors import ConfigError
from megatron.launch.site import find_job
from tests.launch.places import pbs_job, slurm_job


def test_no_job_is_this_host() -> None:
    job = find_job({}, "laptop")
    assert (job.scheduler, job.id, job.hosts, job.hostfile) == ("none", "", ("laptop",), None)


def test_pbs_lists_hosts_once_for_each_chunk(tmp_path: Path) -> None:
    job = find_job(pbs_job(tmp_path, "x1.site.org", "x1.site.org", "x2.site.org"), "x1")
    assert (job.scheduler, job.id) == ("pbs", "123.server")
    assert job.hosts == ("x1.site.org", "x2.site.org")
    assert job.hostfile == str(tmp_path / "nodefile")


def test_pbs_without_node_file_variable_uses_the_servers(tmp_path: Path) -> None:
    (tmp_path / "123.server").write_text("x7\nx8\n", encoding="utf-8")
    job = find_job({"PBS_JOBID": "123.server"}, "x7", node_files=tmp_path)
    assert job.hosts == ("x7", "x8")


def test_slurm_prefers_the_jobs_list() -> None:
    environ = slurm_job("nid[001-002],nid007") | {"SLURM_NODELIST": "nid001"}
    assert find_job(environ, "nid001").hosts == ("nid001", "nid002", "nid007")
    assert find_job({"SLURM_JOB_ID": "7", "SLURM_NODELIST": "a,b"}, "a").hosts == ("a", "b")


def test_the_users_host_file_wins(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("y1\n", encoding="utf-8")
    job = find_job(pbs_job(tmp_path, "x1", "x2"), "x1", str(mine))
    assert (job.hosts, job.scheduler, job.source) == (("y1",), "pbs", "HOSTFILE")


def test_a_node_file_that_is_gone_is_named() -> None:
    with pytest.raises(ConfigError, match="PBS_NODEFILE"):
        find_job({"PBS_JOBID": "1", "PBS_NODEFILE": "/nowhere/nodefile"}, "x1")
