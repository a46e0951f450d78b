"""What the operating system says: cores, CPU time, memory, and a description of the machine."""

import datetime
import os
import platform
import resource
import time
from importlib import metadata

__all__ = (
    "GENERATOR_CORE",
    "OTHER_CORES",
    "SERVER_CORE",
    "cpu_time",
    "describe",
    "memory",
    "raise_file_limit",
)

# The server has a core for itself; the generator and the database share the rest.
_CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE = {_CORES[-1]}
OTHER_CORES = set(_CORES[:-1]) or SERVER_CORE
GENERATOR_CORE = {min(OTHER_CORES)}

LIBRARIES = ("aiohttp", "aiopg", "psycopg2-binary", "msgspec", "uvloop", "PyJWT")


def cpu_time(pid: int) -> float:
    """Seconds of CPU a process has used, user and system, all threads.

    The same account as utime + stime in /proc/PID/stat, but in nanoseconds instead of ticks of 10 ms:
    the clock that clock_getcpuclockid(3) gives for a process.
    """
    return time.clock_gettime((~pid << 3) | 2)


def memory(pid: int) -> float:
    """KiB of memory that a process alone uses."""
    with open(f"/proc/{pid}/smaps_rollup") as lines:
        fields = (line.split() for line in lines)
        return float(sum(int(size) for name, size, *_ in fields if name.startswith("Private_")))


def raise_file_limit() -> int:
    """Allow as many open files as the system lets us, for this process and its children; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe(postgres: str) -> dict[str, object]:
    """What figures depend on; no names of hosts or users, no paths."""
    return {
        "cpu": _cpu_model(),
        "cores": len(_CORES),
        "system": platform.system(),
        "python": platform.python_version(),
        "postgresql": postgres,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "date": datetime.date.today().isoformat(),
    }


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
