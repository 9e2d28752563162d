"""One folder, one owner: an exclusive claim in a file of the folder, without locks of the system.

Every step is a link, a rename or an unlink, which NFS and Lustre do atomically. A dead owner's
claim is taken over; of many that see it dead exactly one succeeds (`_claim_once` has the reason).
"""

from __future__ import annotations

import errno
import getpass
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron.config.errors import ConfigError

CLAIM_FILE = "claim.json"
REFRESH_S = 10.0  # an owner renews the time of its claim this often
WATCH_S = 15.0  # another host's claim is watched for this long at least: one renewal is life
STALE_S = 60.0  # and is dead without a renewal for this long
LOOK_S = 0.5
HIDDEN = "hidden"  # a process of another user, where /proc does not show these

Say = Callable[[str], None]

# Where a file system has no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def claimed(folder: Path, command: str, job: str, say: Say) -> Iterator[None]:
    """Own `folder` meanwhile; it is made, and removed at the end if it was and stayed empty.

    Args:
        folder: on any file system that the hosts share.
        command: what a refused start is told of this one; without secrets.
        job: the scheduler's id; empty without one.
        say: takes a line for the user; also called from another thread.

    Raises:
        ConfigError: another process owns it, or it cannot be written.
    """
    about = json.dumps(_about(command, job), indent=2).encode() + b"\n"
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    try:
        _take(folder, about, say)
    except OSError as error:
        _remove_empty(made)
        raise ConfigError(
            f"{folder} cannot be written: {error}. Set RUN_DIR or CKPT_DIR to a folder that can be"
        ) from None
    except ConfigError:
        _remove_empty(made)
        raise
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(folder, about, say, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join(LOOK_S)  # a file system that hangs must not keep us
        with suppress(OSError):
            if _read(folder / CLAIM_FILE) == about:
                (folder / CLAIM_FILE).unlink()
        _remove_empty(made)


def _about(command: str, job: str) -> dict[str, Any]:
    """Who we are: what a refused start is told, and what shows later whether we live."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        user = str(os.getuid())
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": job,
        "user": user,
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "system": _system(),
        "process_started": _process_started(os.getpid()),
        "id": uuid.uuid4().hex,
    }


def _take(folder: Path, about: bytes, say: Say) -> None:
    """Claim `folder` with the content `about`; ConfigError where a living owner has it."""
    own = folder / f"{CLAIM_FILE}.new-{_identity(about)}"
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another start removed the folder that it had made
                _write(own, about)
                if _claim_once(folder, own, about, say):
                    return
    finally:
        own.unlink(missing_ok=True)


def _claim_once(folder: Path, own: Path, about: bytes, say: Say) -> bool:
    """One attempt; False where others changed the claim meanwhile.

    A dead claim D is followed by the file `.after-<D>`, which one process alone can create, and no
    other claim has that name: the owner is the last of this chain. The winner then replaces the
    first, `claim.json`, by its own. One that comes late, and creates `.after-<D>` when D is no
    longer in the chain, sees so when it looks again.

    Args:
        own: a file of ours with the content `about`.
    """
    root = folder / CLAIM_FILE
    last, content = _last(folder)
    if content is None:
        return _create(own, root, about)
    if content == about:  # an earlier attempt succeeded, and a network file system lost the answer
        if last != root:
            os.replace(own, root)
        _sweep(folder, about)
        return True
    holder = _holder(content)
    if not _is_dead(last, content, holder, own, say):
        raise ConfigError(_refusal(folder, holder))
    after = _after(folder, content)
    if not _create(own, after, about):
        return False
    if _last(folder)[0] != after:
        after.unlink(missing_ok=True)
        return False
    os.replace(own, root)
    _sweep(folder, about)
    say(f"{folder}: took over the claim of {_name(holder)}, which is dead")
    return True


def _last(folder: Path) -> tuple[Path, bytes | None]:
    """The last claim of the chain, with its content; None where there is none."""
    path, content = folder / CLAIM_FILE, _read(folder / CLAIM_FILE)
    while content is not None:
        after = _after(folder, content)
        follower = _read(after)
        if follower is None:
            break
        path, content = after, follower
    return path, content


def _after(folder: Path, content: bytes) -> Path:
    """The claim that follows the one with this content."""
    return folder / f"{CLAIM_FILE}.after-{_identity(content)}"


def _identity(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _create(own: Path, target: Path, about: bytes) -> bool:
    """Make `target` with our content; False where it exists. No reader sees a part of it."""
    try:
        os.link(own, target)
    except FileExistsError:
        # NFS repeats a request whose answer was lost: the link may be our own.
        return target.exists() and own.samefile(target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with suppress(FileExistsError):
            _write(target, about)
            return True
        return False
    return True


def _write(path: Path, content: bytes) -> None:
    """A new file; one of this name with this content may be there from an earlier attempt."""
    if _read(path) == content:
        return
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> bytes | None:
    """The file's content; None where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _sweep(folder: Path, about: bytes) -> None:
    """Remove what dead starts left: the chain before us, and old files of those that took part."""
    with suppress(OSError):
        for path in folder.glob(f"{CLAIM_FILE}.after-*"):
            if path != _after(folder, about):
                path.unlink(missing_ok=True)
        now = (folder / CLAIM_FILE).stat().st_mtime
        for path in folder.glob(f"{CLAIM_FILE}.new-*"):
            if now - path.stat().st_mtime > STALE_S:
                path.unlink(missing_ok=True)


def _holder(content: bytes) -> dict[str, Any]:
    """What a claim says; empty where it cannot be read."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else {}


def _is_dead(path: Path, content: bytes, holder: dict[str, Any], own: Path, say: Say) -> bool:
    """Whether the owner of the claim at `path` is gone."""
    here, then = (socket.gethostname(), _system()), (holder.get("host"), holder.get("system"))
    if holder.get("process_started") and all(here) and here == then:
        return _process_started(holder["pid"]) not in (holder["process_started"], HIDDEN)
    return _is_silent(path, content, holder, own, say)


def _is_silent(path: Path, content: bytes, holder: dict[str, Any], own: Path, say: Say) -> bool:
    """Whether a claim of another host is no longer renewed.

    Its age is taken by the clock of the file system, from a file of ours touched now. A clock that
    is wrong all the same does no harm: nobody is dead who renews while we watch.
    """
    began, seen = time.monotonic(), _modified(path)
    if seen is None:
        return True
    os.utime(own)
    age = (_modified(own) or seen) - seen
    say(f"{path.parent} is claimed by {_name(holder)}: waiting for a sign of life")
    while True:
        watched = time.monotonic() - began
        if watched >= WATCH_S and max(age, 0) + watched > STALE_S:
            return True
        time.sleep(LOOK_S)
        if _read(path) != content:
            return True  # released or taken over: the attempt that follows fails, and looks again
        if _modified(path) != seen:
            return False


def _modified(path: Path) -> float | None:
    """Time of the last change; opening asks the server of a network file system, not a cache."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _renew(folder: Path, about: bytes, say: Say, ended: threading.Event) -> None:
    """Renew the claim's time until the end; a claim that is no longer ours is said once."""
    while not ended.wait(REFRESH_S):
        try:
            with (folder / CLAIM_FILE).open("rb") as file:
                content = file.read()
                if content == about:
                    os.utime(file.fileno() if os.utime in os.supports_fd else file.name)
                    continue
        except FileNotFoundError:
            content = b""
        except OSError:
            continue  # a file system in trouble: the next time
        if not ended.is_set():
            say(f"warning: {folder} is no longer claimed by this run: {_what_happened(content)}")
        return


def _what_happened(content: bytes) -> str:
    if not content:
        return f"{CLAIM_FILE} or the folder was removed; a second start would not be refused"
    return f"it is now of {_name(_holder(content))}; two runs write into it, stop one of them"


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    job = holder.get("job")
    stop = f"end job {job}" if job else f"on {holder.get('host')} type: kill {holder.get('pid')}"
    return (
        f"{folder} is in use by {_name(holder)}: {holder.get('command')}\n"
        f"Wait for its end, or stop it ({stop}), or set another RUN_NAME (CKPT_DIR, if given). "
        f"If it is surely gone, remove {folder / CLAIM_FILE}"
    )


def _name(holder: dict[str, Any]) -> str:
    """The owner in words."""
    if not holder:
        return "an unknown process (its claim cannot be read)"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return (
        f"process {holder.get('pid')} on {holder.get('host')}{job}, user {holder.get('user')}, "
        f"since {holder.get('since')}"
    )


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _system() -> str:
    """This system's start, and its process numbers where containers have their own.

    Processes that share it can see whether one of them lives. Empty where that cannot be known.
    """
    if not sys.platform.startswith("linux"):
        return sys.platform  # and the same host name
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(pid: int) -> str:
    """When a process began, in a form to compare only; empty where none of this number lives."""
    if sys.platform.startswith("linux"):
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return _hidden(pid)
        state, *rest = text.rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]  # fields 3 and 22, proc(5)
    found = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _hidden(pid: int) -> str:
    """For a /proc without other users' processes: whether there is one, not since when."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return HIDDEN
    except (OSError, OverflowError):
        pass
    return ""
