"""Checkpoints: one line of JSON, then the arrays as Equinox writes them. No pickle.

The header says everything needed to rebuild the model (stage, environment, dimensions, arguments, data, versions), so
`evor_infer` needs neither of the training scripts to load what they trained.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

from common.errors import UserError
from common.metrics import atomic, plain


def save(path: Path, header: dict[str, Any], tree: Any) -> None:
    """Writes header and leaves atomically: `path` is always a complete checkpoint."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write((json.dumps(plain(header)) + "\n").encode())
        eqx.tree_serialise_leaves(file, jax.device_get(tree))
        file.flush()
        os.fsync(file.fileno())


def read_header(path: Path, *, stage: str, remedy: str) -> dict[str, Any]:
    """The JSON header of a checkpoint of `stage`.

    Raises:
        UserError: there is no such file (the message ends with `remedy`), it is no checkpoint, or of another stage.
    """
    if not path.is_file():
        raise UserError(f"there is no {stage} checkpoint at {path}: {remedy}")
    with open(path, "rb") as file:
        line = file.readline(1 << 20)
    try:
        header = json.loads(line)
        found = header["stage"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a checkpoint of this project: delete it and train again.") from None
    if found != stage:
        raise UserError(f"{path} is a checkpoint of stage {found!r}, not {stage!r}: pass the other run directory.")
    return header


def load(path: Path, build: Callable[[dict[str, Any]], Any], *, stage: str, remedy: str) -> tuple[dict[str, Any], Any]:
    """Header and tree of a checkpoint; `build(header)` makes the tree whose leaves are to be filled in.

    Raises:
        UserError: as `read_header`, or the arrays do not fit the header.
    """
    header = read_header(path, stage=stage, remedy=remedy)
    try:
        template = eqx.filter_eval_shape(build, header)
        with open(path, "rb") as file:
            file.readline()
            return header, eqx.tree_deserialise_leaves(file, template)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version ({error}): delete it and train again.") from None


def require(header: dict[str, Any], path: Path, **expected: Any) -> None:
    """Checks header entries.

    Raises:
        UserError: an entry differs from what this run expects.
    """
    for name, value in expected.items():
        if header.get(name) != plain(value):
            raise UserError(
                f"{path} was made with {name} {header.get(name)!r}, this run has {plain(value)!r}: "
                f"pass the same {name}, or another --run-dir."
            )
