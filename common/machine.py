"""This machine: its cores and its memory."""

import ctypes
import gc
from pathlib import Path

import psutil


def num_cores() -> int:
    """Cores this process may use, as the system, its affinity and the quota of its container allow."""
    from loky import cpu_count  # which takes a tenth of a second to import

    return cpu_count()


def free_memory() -> int:
    """Bytes of memory that this process may still take, also in a container."""
    free = [psutil.virtual_memory().available]
    try:
        cgroup = Path("/sys/fs/cgroup")
        limit, used = ((cgroup / name).read_text() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])  # is given back when it is needed
        free.append(int(limit) - int(used) + cached)
    except (OSError, KeyError, ValueError):  # another system, or no limit ("max")
        pass
    return min(free)


def trim_memory() -> None:
    """Gives unused memory back to the system (glibc only): compiling a MuJoCo model leaves a lot."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, TypeError, OSError):  # another system
        return
    trim(0)
