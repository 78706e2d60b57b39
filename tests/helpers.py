"""Small datasets, changed checkpoints, and looks at directories, for several test files."""

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import checkpoint


def mostly_slow(values: Iterable[Any], *, but: Collection[Any]) -> list[Any]:
    """Parameters of a test, tuples where it has several; those that are not in `but` belong to the slow tier."""
    rows = ((value, value if isinstance(value, tuple) else (value,)) for value in values)
    return [value if value in but else pytest.param(*row, marks=pytest.mark.slow) for value, row in rows]


def tiny_dataset(
    path: Path,
    *,
    trajectories: int = 4,
    length: int = 30,
    observation_dim: int = 3,
    action_dim: int = 2,
    rewards: bool = True,
    seed: int = 0,
) -> Path:
    """Writes `trajectories` random trajectories of `length` rows each to `path`, and returns it.

    With `rewards`, the file has rewards of its own: -1 in each row, and 0 with mask 0 in every tenth row.
    """
    rng = np.random.default_rng(seed)
    rows = trajectories * length
    arrays = dict(
        observations=rng.normal(size=(rows, observation_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        terminals=np.arange(rows) % length == length - 1,
    )
    if rewards:
        solved = np.arange(rows) % 10 == 9
        arrays |= dict(rewards=(solved - 1.0).astype(np.float32), masks=(1.0 - solved).astype(np.float32))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def arrays(path: Path) -> bytes:
    """The arrays of a checkpoint: without its header, which names the run directory, and the SHA-256 of both."""
    return path.read_bytes()[: -checkpoint.TRAILER_BYTES].split(b"\n", 1)[1]


def sign(path: Path) -> None:
    """Makes the SHA-256 at the end of a checkpoint that of the rest, as somebody would who wants a bad one read."""
    content = path.read_bytes()
    if content[-checkpoint.TRAILER_BYTES :].startswith(checkpoint.TRAILER):
        content = content[: -checkpoint.TRAILER_BYTES]
    path.write_bytes(content + checkpoint.TRAILER + hashlib.sha256(content).hexdigest().encode())


def rewrite(path: Path, **changes: object) -> None:
    """Changes the header of a checkpoint, and nothing else."""
    header = json.loads(path.read_bytes().split(b"\n", 1)[0])
    path.write_bytes(json.dumps(header | changes).encode() + b"\n" + arrays(path))
    sign(path)


def contents(directory: Path) -> dict[str, bytes]:
    """Name and bytes of every file below `directory`."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
