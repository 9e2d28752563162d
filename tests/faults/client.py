"""Stands in for the interpreter of a rank: the fork server's rank lives where this process is.

Signals that arrive here are sent on, the rank's end is this process's end, and the other way round.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT", "SIGABRT", "SIGCONT")


def main() -> int:
    """Returns the rank's status; ends by the signal that ended it."""
    came: list[int] = []
    pid = 0

    def pass_on(number: int, frame: object) -> None:
        if pid:
            os.kill(pid, number)
        else:
            came.append(number)

    for name in PASSED_ON:
        signal.signal(getattr(signal, name), pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as the program that it stands for
    server = socket.socket(socket.AF_UNIX)
    fds = [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)]
    fds.remove(server.fileno())
    server.connect(sys.argv[1])
    request = {"argv": sys.argv[2:], "environ": dict(os.environ), "cwd": os.getcwd(), "fds": fds}
    text = json.dumps(request).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    server.sendmsg([b"%8d" % len(text)], [rights])
    server.sendall(text)
    for fd in fds:
        os.close(fd)  # their ends are the rank's
    answer = b""
    while b"\n" not in answer:
        answer += _read(server)
    first, _, rest = answer.partition(b"\n")
    pid = int(first)
    for number in came:
        os.kill(pid, number)
    while part := server.recv(64):
        rest += part
    code = int(rest or b"-9")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    return code


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _read(server: socket.socket) -> bytes:
    part = server.recv(64)
    if not part:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


if __name__ == "__main__":
    # No clean-up of an interpreter that has closed its own files.
    os._exit(main())
