"""What code and which machine numbers come from."""

import collections
import contextlib
import functools
import platform
import re
from pathlib import Path

import jax

from common.envs import num_cores
from common.metrics import git_revision, package_versions

VERSIONS = ("python", "jax", "mujoco")  # that stand in a row of results; a run's config.json holds all


@functools.cache
def hardware() -> str:
    """What this host computes on, such as `2 cores of Intel Xeon Processor @ 2.60GHz, 1 NVIDIA H100`."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    kinds = collections.Counter(device.device_kind for device in jax.local_devices() if device.platform != "cpu")
    return ", ".join([f"{num_cores()} cores of {processor}", *(f"{number} {kind}" for kind, number in kinds.items())])


def provenance() -> dict[str, str]:
    """What code and machine a row of numbers comes from: `git_revision`, `hardware` and the main versions."""
    versions = package_versions()
    about = dict(git_revision=git_revision(), hardware=hardware())
    return about | {f"version_{name}": versions[name] for name in VERSIONS if name in versions}
