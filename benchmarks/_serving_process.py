"""Servers as processes, what they use, and a client that does as little as a client can.

A server runs in a session of its own, out of reach of Ctrl-C. What it started is found by parent and by session, since
some servers put their workers into further sessions; all of it is killed at the end, after an error as well.
"""

import ctypes
import http.client
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

START_S = 120
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
Process = subprocess.Popen[str]
_libc = ctypes.CDLL(None, use_errno=True)


class StartError(Exception):
    """A server that ended instead of answering; the text is the end of its log."""


def tree(root: int) -> list[int]:
    """``root`` and everything that it started and that still runs."""
    parents: dict[int, tuple[int, int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            _, parent, _, session, *_ = status.read_text().rpartition(")")[2].split()
            parents[int(status.parent.name)] = int(parent), int(session)
    # By session as well: a process whose parent has ended belongs to somebody else.
    found = [root, *(pid for pid, (_, session) in parents.items() if session == root and pid != root)]
    for above in found:
        found += [pid for pid, (parent, _) in parents.items() if parent == above and pid not in found]
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of processes since their start: the sum behind /proc/PID/stat, not rounded to ticks."""
    total = 0.0
    for pid in pids:
        clock = ctypes.c_int()
        if _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise ProcessLookupError(f"process {pid} of a server has ended")
        total += time.clock_gettime(clock.value)
    return total


def forget_peak(pids: Sequence[int]) -> None:
    """Let VmHWM begin at what is in memory now."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_mb(pids: Sequence[int]) -> float:
    """Sum of VmHWM; pages that processes share count in each."""
    found = (re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in pids)
    return sum(int(match[1]) for match in found if match) / 1000


@dataclass
class Reply:
    """``body`` points into the buffer of the connection: it holds until the next request."""

    status: int
    headers: dict[str, str]
    body: memoryview


@dataclass
class Connection:
    """One keep-alive connection that reads into one buffer."""

    port: int
    _buffer: bytearray = field(default_factory=lambda: bytearray(1 << 16))
    _socket: socket.socket | None = None

    def ask(self, request: bytes) -> Reply:
        """Send a whole request, read a whole reply."""
        if self._socket is None:
            self._socket = socket.create_connection(("127.0.0.1", self.port), timeout=120)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(request)
        filled, end = 0, -1
        while end < 0:
            filled += self._receive(filled)
            end = self._buffer.find(b"\r\n\r\n", 0, filled)
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        start, stop = end + 4, end + 4 + int(headers["content-length"])
        if stop > len(self._buffer):
            self._buffer = self._buffer + bytes(stop - len(self._buffer))  # an older reply may hold the old one
        while filled < stop:
            filled += self._receive(filled)
        return Reply(int(first.split()[1]), headers, memoryview(self._buffer)[start:stop])

    def _receive(self, at: int) -> int:
        assert self._socket is not None
        count = self._socket.recv_into(memoryview(self._buffer)[at:])
        if not count:
            raise ConnectionError("the server closed the connection")
        return count

    def close(self) -> None:
        """Close."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def post(path: str, body: bytes, content_type: str, headers: Mapping[str, str] | None = None) -> bytes:
    """A request as it travels."""
    named = {"Host": "127.0.0.1", "Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
    return "\r\n".join(lines).encode() + body


def free_ports(count: int) -> list[int]:
    """Ports that are free now, for servers that cannot take port 0."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@dataclass(frozen=True)
class Launch:
    """How a server is started: ``ready`` is a path to ask, ``port`` is None if the log names it."""

    command: Sequence[str]
    env: Mapping[str, str]
    ready: str
    port: int | None = None


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path, *, piped: bool = False) -> Iterator[Process]:
    """A process with one thread per operation; it and all that it started are gone at the end."""
    pipe = subprocess.PIPE if piped else None
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CALIB_")}
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe or stream,
            stderr=stream,
            text=True,
            start_new_session=True,
            preexec_fn=partial(_libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL),  # should we be killed ourselves
            cwd=log.parent,
            env={**inherited, **ONE_THREAD, "TMPDIR": str(log.parent), **env},
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: Process) -> None:
    """Halt everything before killing it, so that nobody is left to start a worker that is not on the list."""
    ended = {process.pid} if process.poll() is not None else set()
    halted: set[int] = set()
    while found := {*tree(process.pid)} - halted - ended:
        _signal(found, signal.SIGSTOP)
        halted |= found
    _signal(halted, signal.SIGKILL)
    process.wait()


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def wait_until_ready(process: Process, launch: Launch, log: Path) -> int:
    """The port, once the server is ready. Where the launch names none, the log is read for the address.

    Raises:
        StartError: the server ended, or did not become ready in time.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        announced = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text()) if launch.port is None else None
        known = int(announced[1]) if announced else launch.port
        if known is not None and _answers(known, launch.ready):
            return known
        time.sleep(0.1)
    end = log.read_text().strip().splitlines()[-5:]
    raise StartError(" | ".join(end) or "no answer and no word in the log")


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
