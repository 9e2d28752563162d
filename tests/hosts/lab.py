"""Several hosts on one machine: namespaces joined by a bridge, with sshd and a real Slurm.

A host is a process with its own network, name, processes, /tmp, /run and /dev/shm; files elsewhere,
and the folders of `shared`, are the machine's. Each ends when the pipe to its first process closes:
with this process, however that ends. The machine itself is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HEAD = "head"
START_S = 20.0
NAMESPACES = ("--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")

# What a host does first, given its name, the lab's folder and the folders to share. /sys shows
# the network of the namespace that mounts it; slurmd looks for the control groups in it.
FIRST = r"""
set -e
hostname "$1"; lab=$2; shift 2
mount -t tmpfs tmpfs /mnt
i=0
for folder in "$@"; do i=$((i + 1)); mkdir /mnt/$i; mount --rbind "$folder" /mnt/$i; done
mkdir /mnt/cgroup; mount --rbind /sys/fs/cgroup /mnt/cgroup
mount -t sysfs sysfs /sys; mount --rbind /mnt/cgroup /sys/fs/cgroup
for folder in /tmp /run /dev/shm; do mount -t tmpfs tmpfs $folder; done
i=0
for folder in "$@"; do i=$((i + 1)); mkdir -p "$folder"; mount --rbind /mnt/$i "$folder"; done
umount -l /mnt
mount --bind "$lab/hosts" /etc/hosts
mount --bind "$lab/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
mkdir -p /run/sshd
echo up
while read -r line; do :; done
"""


@dataclass
class Lab:
    """Hosts n1 .. n<count> and `head`; make it with `lab`.

    Attributes:
        folder: of the lab's own files, the same on all hosts.
        environ: variables of what is run on a host.
        first: the first process of each host that is on, by its id outside.
    """

    folder: Path
    environ: dict[str, str]
    shared: tuple[str, ...]
    first: dict[str, int] = field(default_factory=dict)
    _anchors: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def command(self, host: str, words: Sequence[str], cwd: Path | None = None) -> list[str]:
        """The command that runs `words` on `host`, from outside."""
        enter = ["nsenter", "-t", str(self.first[host]), "-m", "-u", "-n", "-p"]
        return [*enter, f"--wd={cwd or Path.cwd()}", "--", *words]

    def start(
        self, host: str, *words: str, cwd: Path | None = None, **environ: str
    ) -> subprocess.Popen[str]:
        """Start a command on a host; its output is one pipe."""
        return subprocess.Popen(
            self.command(host, words, cwd),
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(
        self,
        host: str,
        *words: str,
        timeout: float = 60,
        cwd: Path | None = None,
        **environ: str,
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end; what is left of it after `timeout` seconds is killed."""
        with ended(self.start(host, *words, cwd=cwd, **environ)) as process:
            out, _ = process.communicate(timeout=timeout)
            return subprocess.CompletedProcess(words, process.returncode, out, "")

    def boot(self, host: str) -> None:
        """Switch a host on."""
        anchor = subprocess.Popen(
            ["unshare", *NAMESPACES, "bash", "-c", FIRST, "bash", host, self.folder, *self.shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests to handle
        )
        self._anchors[host] = anchor
        assert anchor.stdout is not None
        said = anchor.stdout.readline()
        if said != "up\n":
            raise OSError(f"{host} does not start: {said}{anchor.stdout.read()}")
        self.first[host] = _child(anchor.pid)
        if host == HEAD:
            self._network(HEAD, "ip link add br0 type bridge forward_delay 0")
            self._network(HEAD, "ip addr add 10.77.0.254/24 dev br0", "ip link set br0 up")
            return
        number, there = int(host[1:]), self.first[host]
        # A fixed address: the other hosts remember it over a restart.
        card = f"peer name eth0 address 02:00:00:00:00:{number:02x} netns {there}"
        self._network(HEAD, f"ip link add v{number} type veth {card}")
        self._network(HEAD, f"ip link set v{number} master br0 up")
        self._network(host, f"ip addr add 10.77.0.{number}/24 dev eth0", "ip link set eth0 up")
        self._network(host, "ip route add default via 10.77.0.254")

    def off(self, host: str) -> None:
        """Pull its power: nothing of it says goodbye."""
        if host != HEAD:
            self._network(HEAD, f"ip link del v{host[1:]}")
        os.kill(self.first.pop(host), signal.SIGKILL)
        self._anchors.pop(host).wait(START_S)

    def cut(self, host: str) -> None:
        """Pull its network cable: what runs on it runs on."""
        self._network(HEAD, f"ip link set v{host[1:]} down")

    def close(self) -> None:
        """Switch all hosts off."""
        for host in sorted(self._anchors, reverse=True):
            anchor = self._anchors.pop(host)
            anchor.kill()
            anchor.communicate()
        self.first.clear()

    def _network(self, host: str, *commands: str) -> None:
        """Commands in a host's network, with the process ids of the machine."""
        for text in commands:
            words = ["nsenter", "-t", str(self.first[host]), "-n", *shlex.split(text)]
            subprocess.run(words, check=True, timeout=START_S)


@contextlib.contextmanager
def lab(folder: Path, count: int = 2, shared: Sequence[Path] = ()) -> Iterator[Lab]:
    """`count` hosts and `head`, for as long as the block lasts.

    Args:
        folder: for the lab's own files.
        shared: folders below /tmp that all hosts see.
    """
    hosts = [(HEAD, "10.77.0.254"), *((f"n{i}", f"10.77.0.{i}") for i in range(1, count + 1))]
    names = "".join(f"{address} {name}\n" for name, address in hosts)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="ascii")
    lines = Path("/etc/nsswitch.conf").read_text(encoding="utf-8").splitlines()
    lines = ["hosts: files", *(line for line in lines if not line.startswith("hosts:"))]
    (folder / "nsswitch.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "bin").mkdir()
    inside = [str(path) for path in (folder, *shared) if path.is_relative_to("/tmp")]
    environ = clean_environment()
    environ["PATH"] = f"{folder / 'bin'}{os.pathsep}{environ['PATH']}"
    made = Lab(folder, environ, tuple(inside))
    try:
        for name, _ in hosts:
            made.boot(name)
        yield made
    finally:
        made.close()


def clean_environment() -> dict[str, str]:
    """The tests' variables, less those of a job or a launch they may run in."""
    dropped = ("SLURM", "PBS", "PMI", "OMPI_", "PALS", "HYDRA", "MASTER_", "MEGATRON_", "LAB")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    kept.pop("PYTHONPATH", None)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**kept, **root, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, killed at the end of the block with all of its own that still runs."""
    try:
        yield process
    finally:
        for pid in family(process.pid) if process.poll() is None else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def with_sshd(made: Lab) -> None:
    """An sshd on each host; `ssh n2` then works from all of them, with a key made here."""
    folder = made.folder / "ssh"
    folder.mkdir()
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(words, check=True, timeout=START_S)
    shutil.copy(folder / "user.pub", folder / "authorized")
    server = {
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "MaxStartups": 200,
    }
    client = {
        "IdentityFile": folder / "user",
        "StrictHostKeyChecking": "no",
        "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR",
        "BatchMode": "yes",
    }
    _write(folder / "sshd_config", *(f"{key} {value}" for key, value in server.items()))
    _write(folder / "config", "Host *", *(f"  {key} {value}" for key, value in client.items()))
    ssh = made.folder / "bin/ssh"
    script(ssh, f'exec /usr/bin/ssh -F {folder / "config"} "$@"')
    made.environ |= {"HYDRA_LAUNCHER_EXEC": str(ssh), "OMPI_MCA_plm_rsh_agent": str(ssh)}
    for host in made.first:
        _must(made.run(host, "/usr/sbin/sshd", "-f", str(folder / "sshd_config")))


def with_slurm(made: Lab, cpus: int = 2, more: Mapping[str, object] | None = None) -> None:
    """A Slurm: slurmctld on `head`, slurmd on each host.

    Args:
        cpus: cores of a host as Slurm sees them, however many there are.
        more: further lines of slurm.conf.
    """
    state = made.folder / "slurm"
    hosts = sorted(host for host in made.first if host != HEAD)
    for name in ("ctld", *hosts):
        (state / name).mkdir(parents=True)
    lines = {
        "ClusterName": "lab",
        "SlurmctldHost": HEAD,
        "SlurmUser": "root",
        "AuthType": "auth/none",  # else munge, with a daemon and a key on each host
        "CredType": "cred/none",
        "StateSaveLocation": state / "ctld",
        "SlurmdSpoolDir": state / "%n",
        "SlurmctldPidFile": state / "slurmctld.pid",
        "SlurmdPidFile": state / "%n.pid",
        "SlurmctldLogFile": state / "slurmctld.log",
        "SlurmdLogFile": state / "%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/affinity" if cpus <= (os.cpu_count() or 1) else "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "PropagateResourceLimits": "NONE",
        "SlurmdParameters": "config_overrides",
        "KillWait": 5,
        "SlurmdTimeout": 10,
        "MinJobAge": 600,
        "JobRequeue": 1,
        "SchedulerParameters": "sched_interval=1,sched_min_interval=100000,bf_interval=1,"
        "batch_sched_delay=0",
        **(more or {}),
    }
    nodes = f"n[1-{len(hosts)}] CPUs={cpus} CoresPerSocket={cpus} Sockets=1 RealMemory=4000"
    partition = "lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=EXCLUSIVE"
    settings = [f"{key}={value}" for key, value in lines.items()]
    _write(state / "slurm.conf", *settings, f"NodeName={nodes}", f"PartitionName={partition}")
    made.environ["SLURM_CONF"] = str(state / "slurm.conf")
    _must(made.run(HEAD, "slurmctld"))
    for host in hosts:
        _must(made.run(host, "slurmd", "-N", host))
    until = time.monotonic() + START_S
    while made.run(HEAD, "sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() != str(len(hosts)):
        if time.monotonic() > until:
            raise OSError(made.run(HEAD, "sinfo", "-N", "-l").stdout)
        time.sleep(0.05)


def end_jobs(made: Lab) -> None:
    """End what is left of all jobs, and wait until the hosts are free."""
    until = time.monotonic() + START_S
    while made.run(HEAD, "squeue", "-h").stdout.strip():
        if time.monotonic() > until:
            raise OSError(made.run(HEAD, "squeue").stdout)
        made.run(HEAD, "scancel", "--full", "--signal=KILL", "--user=root")
        made.run(HEAD, "scancel", "--user=root")
        time.sleep(0.1)


def script(path: Path, *lines: str) -> None:
    """Write a bash script that can be run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, "#!/bin/bash", *lines)
    path.chmod(0o755)


def _write(path: Path, *lines: str) -> None:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _must(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise OSError(f"{shlex.join(done.args)} ended with {done.returncode}: {done.stdout}")


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in text.split()]


def family(pid: int) -> list[int]:
    """A process, its children and theirs."""
    found = [pid]
    for one in found:  # grows
        found += _children(one)
    return found


def _child(pid: int) -> int:
    (child,) = _children(pid)
    return child
