"""The hosts themselves: apart from each other and the machine, and gone with their maker."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.hosts import lab
from tests.hosts.conftest import ROOT, require, require_namespaces, two_hosts

GONE_S = 10.0


def test_hosts_have_their_own_name_network_processes_and_tmp(hosts: lab.Lab) -> None:
    seen = "hostname; ls /sys/class/net | xargs; echo $$; touch /tmp/mine-$(hostname); ls /tmp"
    for host, other in (("n1", "n2"), ("n2", "n1")):
        said = hosts.run(host, "bash", "-c", seen).stdout.split("\n")
        assert said[:2] == [host, "eth0 lo"]
        assert int(said[2]) < 5000 and f"mine-{host}" in said and f"mine-{other}" not in said
        assert hosts.run(host, "ssh", other, "hostname").stdout == f"{other}\n"
        assert not Path(f"/tmp/mine-{host}").exists()


def test_power_and_cable(tmp_path: Path) -> None:
    require("sshd")
    with two_hosts(tmp_path) as made:
        lab.with_sshd(made)
        ask = ("ssh", "-o", "ConnectTimeout=1", "n2", "hostname")
        made.off("n2")
        assert made.run("n1", *ask).returncode == 255
        made.boot("n2")
        assert made.run("n2", "hostname").stdout == "n2\n"
        made.cut("n1")
        assert made.run("n1", *ask).returncode == 255


MAKER = """
import sys, time
from pathlib import Path
from tests.hosts import lab
with lab.lab(Path(sys.argv[1])) as made:
    made.start("n1", "sleep", "1000")
    print(*made.first.values(), flush=True)
    time.sleep(100)
"""


def test_all_hosts_end_with_a_maker_that_is_killed(tmp_path: Path) -> None:
    require_namespaces()
    words = [sys.executable, "-c", MAKER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        first = [Path("/proc") / word for word in maker.stdout.readline().split()]
        assert len(first) == 3 and all(path.exists() for path in first)
        maker.kill()
    until = time.monotonic() + GONE_S
    while any(path.exists() for path in first):
        assert time.monotonic() < until
        time.sleep(0.05)
