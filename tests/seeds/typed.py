"""Types a command in a shell on a machine that is not here, and resolves what it would start.

bash expands the command; a stand-in for train_alcf.sh, and for `launch`, notes the variables and
words that it was given.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.config.errors import ConfigError, DataError
from megatron.config.resolve import Resolved, resolve
from megatron.launch import shell
from megatron.launch.site import Location, site
from tests.launch.places import at, pbs_job

ROOT = Path(__file__).resolve().parents[2]

# First host of a job by machine; a laptop has none.
MACHINES: Mapping[str, str] = {
    "laptop": "laptop",
    "aurora": "x4310c7s4b0n0",
    "polaris": "x3006c0s1b0n0",
    "sunspot": "x1921c1s0b0n0",
}

STAND_IN = """
env -0 >"$NOTES/environ"
for word in "$@"; do printf '%s\\0' "$word"; done >"$NOTES/words"
"""


@dataclass(frozen=True)
class Call:
    """A command as it reached train_alcf.sh or `launch`.

    Attributes:
        location: where it was typed.
        environ: variables that it was given.
        words: its flags, or behind `launch` the command.
    """

    location: Location
    environ: Mapping[str, str]
    words: tuple[str, ...]

    def resolved(self, *flags: str) -> Resolved:
        """As train_alcf.sh would resolve it in a dry run, with further flags.

        Raises:
            ConfigError, DataError: as it would.
        """
        environ, words = {**self.environ, "DRY_RUN": "1"}, (*self.words, *flags)
        return resolve(environ, words, site(environ, words, self.location))

    def launch_line(self) -> str:
        """The words that `launch` would execute."""
        prefix = shell.launch_words(self.environ, self.location)
        return f"{prefix} {shlex.join(self.words)}"


def place(machine: str, hosts: int, folder: Path) -> tuple[Location, dict[str, str]]:
    """A machine with a job on so many hosts, and the job's variables."""
    first = MACHINES[machine]
    if machine == "laptop":
        return at(first, {}), {}
    names = [first, *(first[:-1] + str(number) for number in range(1, hosts))]
    job = pbs_job(folder, *names)
    return at(first, job), job


def typed(command: str, machine: str, hosts: int, folder: Path) -> Call:
    """Type a command after `source ALCF/helpers.sh` in a job.

    Args:
        command: one line or several, for bash.
        machine: a key of MACHINES.
        hosts: of the job.
        folder: an empty one, for notes.
    """
    location, job = place(machine, hosts, folder)
    for name in ("train_alcf.sh", "train_aGPT_7B.sh"):
        (folder / name).write_text(STAND_IN, encoding="utf-8")
    exports = shell.settings(job, location)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    script = f"""
        source {shlex.quote(str(ROOT / "ALCF/helpers.sh"))} --functions-only
        hostname() {{ echo {location.hostname}; }}
        launch() {{ bash train_alcf.sh "$@"; }}
        {"; ".join(lines)}
        cd "$NOTES"
        {command}
    """
    base = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "NOTES": str(folder), **job}
    subprocess.run(["bash", "-c", script], env=base, check=True, timeout=30)
    noted = (folder / "environ").read_text(encoding="utf-8").split("\0")
    environ = dict(item.split("=", 1) for item in noted if "=" in item)
    words = (folder / "words").read_text(encoding="utf-8").split("\0")[:-1]
    return Call(location, environ, tuple(words))


def result(call: Call) -> str:
    """What a dry run comes to, in a line: the figures of its box, or the error."""
    try:
        run = call.resolved().run
    except (ConfigError, DataError) as error:
        return f"status {error.exit_status}: {str(error).splitlines()[0]}"
    layout, train = run.layout, run.train
    ranks = f"TP {layout.tp}, PP {layout.pp}, DP {layout.dp}"
    batch = f"GBS {train.global_batch_size}, SEQ {run.model.seq_length}"
    return f"{run.label}, {run.parameters:,} parameters, {ranks}, {batch}"
