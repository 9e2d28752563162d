"""Lock files: one holder, freed with the holder's process, and no lock is no error."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.file_lock import locked

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from megatron.data.file_lock import locked
with locked(Path(sys.argv[1]), wait=True) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_lock_has_one_holder_and_is_freed_when_the_holder_is_killed(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "True\n"
        with locked(path, wait=False) as held:
            assert held is False
    finally:
        holder.kill()
        holder.wait()
    with locked(path, wait=True) as held:
        assert held is True
    with locked(path, wait=False) as held:  # it was freed at the end of the block
        assert held is True


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_such(tmp_path, monkeypatch, code):
    def refuse(*arguments):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):  # nor does the first leave a mark that the second would wait for
        with locked(tmp_path / "lock", wait=True) as held:
            assert held is None


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locked(tmp_path / "file" / "lock", wait=True):
        pass
