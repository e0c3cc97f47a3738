"""Telling processes apart, also those of other machines, and whether one still runs."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """One process; no other on any machine is equal to it."""

    host: str
    machine: str  # tells two machines (or two containers) of one name apart
    pid: int
    started: str  # a number is used again, but not at the same time


def this_process() -> Process:
    """Describe the running process."""
    return _describe(os.getpid())


@functools.lru_cache(maxsize=1)  # a forked child has another number
def _describe(pid: int) -> Process:
    host = socket.gethostname()
    return Process(host=host, machine=_machine(host), pid=pid, started=_started(pid) or "")


def _machine(host: str) -> str:
    """Name this boot of this machine, and the container, as far as the system tells."""
    try:
        boot = (_PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
        return f"{host}/{boot}/{(_PROC / 'self' / 'ns' / 'pid').stat().st_ino}"
    except OSError:
        return host


def is_gone(process: Process) -> bool:
    """Tell whether a process surely runs no more; of another machine's nobody knows."""
    if process.machine != this_process().machine:
        return False
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    except OverflowError:
        return True
    except PermissionError:
        pass  # another user's
    started = _started(process.pid)
    return started is not None and started != process.started


def _started(pid: int) -> str | None:
    """Tell when a process began: None if the system does not say, "" if it has ended."""
    try:
        # The name, in brackets, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    except OSError:
        return None if (_PROC / "self" / "stat").exists() else _asked(pid)


def _asked(pid: int) -> str | None:
    """Ask `ps`, where there is no ``/proc``."""
    command = ["ps", "-o", "state=", "-o", "lstart=", "-p", str(pid)]
    # The time is written as language and time zone want it; every process must get the same text.
    same = {**os.environ, "LC_ALL": "C", "TZ": "UTC"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=same)
    except OSError:
        return None
    state, _, started = done.stdout.strip().partition(" ")
    return None if not started else "" if state.startswith("Z") else started.strip()
