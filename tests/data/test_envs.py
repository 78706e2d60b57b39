"""What a process may take of the machine, also in a container."""

import io
import os
import types

import pytest
from loky.backend import context

from common import machine


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("250000 100000", 3), ("50000 100000", 1), ("max 100000", 8), ("1600000 100000", 8)],
)
def test_a_containers_quota_bounds_the_cores(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch):
    """`docker run --cpus=2.5` on a machine of 8 cores, `--cpus=0.5`, no quota, a quota beyond the machine."""
    exists = os.path.exists
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(os.path, "exists", lambda path: str(path) == "/sys/fs/cgroup/cpu.max" or exists(path))
    monkeypatch.setattr(context, "open", lambda path: io.StringIO(quota), raising=False)
    monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
    assert machine.num_cores() == cores


def test_affinity_bounds_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5}, raising=False)
    assert machine.num_cores() <= 2


def test_free_memory_is_what_the_system_has_left(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1_000))
    assert machine.free_memory() == 1_000
