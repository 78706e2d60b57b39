"""What code and which machine numbers come from."""

import collections
import contextlib
import functools
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from common.machine import num_cores

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "diffrax", "ogbench", "gymnasium", "mujoco", "numpy", "scipy")
VERSIONS = ("python", "jax", "mujoco")  # that stand in a row of results; a run's config.json holds all


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str:
    """The commit of this code, with `-dirty` where files differ from it; `unknown` outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def hardware() -> str:
    """What this host computes on, such as `2 cores of Intel Xeon Processor @ 2.60GHz, 1 NVIDIA H100`."""
    import jax  # which processes that only collect do without

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = model[1] if model else processor
    kinds = collections.Counter(device.device_kind for device in jax.local_devices() if device.platform != "cpu")
    return ", ".join([f"{num_cores()} cores of {processor}", *(f"{number} {kind}" for kind, number in kinds.items())])


def provenance() -> dict[str, str]:
    """What code and machine a row of numbers comes from: `git_revision`, `hardware` and the main versions."""
    versions = package_versions()
    about = dict(git_revision=git_revision(), hardware=hardware())
    return about | {f"version_{name}": versions[name] for name in VERSIONS if name in versions}
