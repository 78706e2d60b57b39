"""Checkpoints: one line of JSON, then the arrays as `.npy`, then their SHA-256. No pickle.

The header says everything needed to rebuild the model (stage, environment, dimensions, arguments, data, versions), so
`evor_infer` needs neither of the training scripts to load what they trained. A file may come from a stranger: nothing
in it is run, its header's sizes are checked before a model is built from them, and its arrays' before memory is taken.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, get_type_hints

import equinox as eqx
import jax
import numpy as np

from common.args import check
from common.data.names import NUM_TASKS
from common.errors import UserError
from common.files import atomic, plain

MOST_HEADER = 1 << 20  # bytes
KINDS = dict(env=str, step=int, args=dict, data=dict, model=dict)
# What later stages read of the header of a model.
_MODEL = ("env", "horizon", "step", "args", "data", "seeds", "model")
REQUIRED = {"bc": _MODEL, "value": (*_MODEL, "replicas", "policy_sha256")}
TRAILER = b"\nsha256 "
TRAILER_BYTES = len(TRAILER) + 64


Spec = TypeVar("Spec")


class _Hashing:
    """A file that adds up what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: Any) -> int:
        self.digest.update(content)
        return self.file.write(content)


def save(path: Path, header: dict[str, Any], tree: Any, *, previous: Path | None = None) -> None:
    """Writes header and leaves atomically: `path` is always a complete checkpoint, or for an instant, where `previous`
    is given, missing: then the one that stood there lies under that name."""
    with atomic(path) as temporary:
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            hashing.write((json.dumps(plain(header)) + "\n").encode())
            try:
                eqx.tree_serialise_leaves(hashing, jax.device_get(tree))
            except RuntimeError as error:  # Equinox says which leaf it was; what it was lies below
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__cause__
                raise cause or error from None
            file.write(TRAILER + hashing.digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            os.replace(path, previous)


def read_header(path: Path, *, stage: str, remedy: str) -> dict[str, Any]:
    """The JSON header of a checkpoint of `stage`.

    Raises:
        UserError: there is no such file (the message ends with `remedy`), it is no checkpoint, of another stage, or for
            a model of a size that nobody means.
    """
    if not path.is_file():
        raise UserError(f"there is no {stage} checkpoint at {path}: {remedy}")
    with open(path, "rb") as file:
        return _read_header(file, path, stage)


def _read_header(file: BinaryIO, path: Path, stage: str) -> dict[str, Any]:
    line = file.readline(MOST_HEADER)
    try:
        header = json.loads(line)
        actual = header["stage"]
    except (ValueError, KeyError, TypeError, RecursionError):
        if line.startswith(b'{"stage"'):
            raise unusable(path, "its header is no JSON") from None
        raise UserError(
            f"{path} is not a checkpoint of this project: move it away, or pass another --run-dir."
        ) from None
    if actual != stage:
        raise UserError(f"{path} is a checkpoint of stage {actual!r}, not {stage!r}: pass the other run directory.")
    for field in REQUIRED.get(stage, ()):
        if field not in header:
            raise UserError(f"{path} has no {field}, as those of an older revision: use that one, or train again.")
    for field, value in header.items():
        if not _makes_sense(field, value, stage):
            raise unusable(path, f"{field} is {value!r:.300}")
    return header


def unusable(path: Path, what: Any) -> UserError:
    """The sentence for a checkpoint with `what` in it: whether it is damaged says its SHA-256 alone."""
    try:
        verify(path)
    except ValueError as error:
        return UserError(f"{path} is damaged, {error}: move it away and train again.")
    except OSError as error:
        return UserError(f"{path} cannot be read ({error}).")
    return UserError(
        f"{path} is whole, and not of this revision of the project ({what}): use the one that wrote it, or train again "
        f"with another --run-dir."
    )


def _is_seed(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**32


def _makes_sense(field: str, value: Any, stage: str) -> bool:
    if field == "horizon":
        return type(value) is int and 1 <= value <= 1_000
    if field == "seeds":
        return isinstance(value, list) and len(value) > 0 and all(map(_is_seed, value))
    if field in ("replicas", "diverged"):  # [task, seed]; what diverges in stage 1 has no task: ["", seed]
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            return False
        tasks = (*range(NUM_TASKS + 1), *([""] if field == "diverged" else []))
        return all(type(task) in (int, str) and task in tasks and _is_seed(seed) for task, seed in value) and (
            field == "diverged" or len(value) > 0
        )
    if field == "args" and stage in REQUIRED:
        ignored = value.get("ignore_observations", []) if isinstance(value, dict) else None
        return isinstance(ignored, list) and all(type(i) is int for i in ignored) and type(value.get("steps")) is int
    if field == "data" and stage in REQUIRED:
        names = ("name", "source", "sha256")
        settings = value.get("settings", {}) if isinstance(value, dict) else None
        return (
            isinstance(settings, dict)
            and all(isinstance(value.get(key), str) for key in names)
            and (all(isinstance(of_env, dict) for of_env in settings.values()))
        )
    return isinstance(value, KINDS.get(field, object))


def load(path: Path, build: Callable[[dict[str, Any]], Any], *, stage: str, remedy: str) -> tuple[dict[str, Any], Any]:
    """Header and tree of a checkpoint; `build(header)` makes the tree whose leaves are to be filled in.

    Raises:
        UserError: as `read_header`, or a byte changed since it was written, or the arrays do not fit the header.
    """
    if not path.is_file():
        raise UserError(f"there is no {stage} checkpoint at {path}: {remedy}")
    try:
        with open(path, "rb") as file:  # once: a training beside this may put another file in its place
            header = _read_header(file, path, stage)
            first = file.tell()
            _verify(file)
            file.seek(first)
            template = eqx.filter_eval_shape(build, header)
            tree = jax.tree.map(functools.partial(_read_leaf, file), template)
            if file.tell() != os.fstat(file.fileno()).st_size - TRAILER_BYTES:
                raise ValueError("it has more arrays than its header says")
        return header, tree
    except UserError:
        raise
    except (OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        raise UserError(f"{path} cannot be read ({str(error) or 'not enough memory'}).") from None
    except Exception as error:  # arrays and sizes that make no sense raise a dozen types
        raise unusable(path, error) from None


def read_spec(cls: type[Spec], content: Any) -> Spec:
    """The frozen dataclass `cls`, whose fields are sizes or such dataclasses again, from a header's dictionary.

    Raises:
        ValueError: a field is missing, unknown, or of a size that nobody means.
    """
    try:
        hints = get_type_hints(cls)
        fields = {
            name: read_spec(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in content.items()
        }
        if None in fields.values():  # which fulfils all constraints
            raise TypeError
        spec = cls(**fields)
        check(spec)
        return spec
    except (UserError, TypeError, KeyError, AttributeError):
        raise ValueError(f"model is {content!r:.50}") from None


def newest(path: Path, previous: Path, *, stage: str, remedy: str) -> Path:
    """`path`, or, where that is missing or damaged, `previous`, which is reported.

    Raises:
        UserError: neither is a complete checkpoint of `stage`.
    """
    try:
        read_header(path, stage=stage, remedy=remedy)
        verify(path)
        return path
    except (UserError, ValueError) as error:
        try:
            header = read_header(previous, stage=stage, remedy=remedy)
            verify(previous)
        except (UserError, ValueError, OSError):
            if isinstance(error, UserError):
                raise error from None
            raise UserError(f"{path} is damaged ({error}): {remedy}") from None
        print(
            f"warning: {path} is missing or damaged: going on from the one before it, step {header.get('step')}.",
            file=sys.stderr,
        )
        return previous


def complete(path: Path) -> bool:
    """Whether `path` is there, and as it was written."""
    try:
        verify(path)
    except (ValueError, OSError):
        return False
    return True


def verify(path: Path) -> None:
    """Compares a file with the SHA-256 at its end.

    Raises:
        ValueError: they differ.
    """
    with open(path, "rb") as file:
        _verify(file)


def _verify(file: BinaryIO) -> None:
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - TRAILER_BYTES
    file.seek(0)
    while left > 0:
        content = file.read(min(left, 1 << 20))
        digest.update(content)
        left -= len(content) or left
    trailer = file.read()
    if left < 0 or not trailer.startswith(TRAILER):
        raise ValueError("it was cut, or written by an older version of this project")
    if trailer != TRAILER + digest.hexdigest().encode():
        raise ValueError("it was changed after it was written")


def _read_leaf(file: BinaryIO, like: Any) -> Any:
    """An array as `np.load` reads it, if it has the shape and type of `like` and the file has as many bytes. The file
    may have been written with jax_enable_x64 and be read without it, or the other way round."""
    if not isinstance(like, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        return eqx.default_deserialise_filter_spec(file, like)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    other = np.dtype(f"{dtype.kind}{({4: 8, 8: 4}).get(dtype.itemsize, dtype.itemsize)}")
    if shape != like.shape or like.dtype not in (dtype, other):
        raise ValueError(f"an array is {dtype}{list(shape)} and should be {like.dtype}{list(like.shape)}")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError("an array is cut")
    array = np.fromfile(file, dtype, count).reshape(shape, order="F" if fortran else "C")
    return array if isinstance(like, np.ndarray) else jax.device_put(array)


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


def choose(
    header: dict[str, Any], path: Path, *, tasks: Collection[int] = (), seeds: Collection[int] = ()
) -> list[int]:
    """Which replicas of a stage 2 have these tasks and seeds, all of them by default. Those that diverged are left out,
    with a warning.

    Raises:
        UserError: a task or seed is missing, or all of them diverged.
    """
    pairs = [tuple(pair) for pair in header["replicas"]]
    for name, wanted, index in (("task", tasks, 0), ("seed", seeds, 1)):
        have = {pair[index] for pair in pairs}
        if missing := set(wanted) - have:
            raise UserError(
                f"{path.parent} has no {name} {min(missing)}: it has {sorted(have)}; train it with evor_value.py."
            )
    chosen = [i for i, (t, s) in enumerate(pairs) if (not tasks or t in tasks) and (not seeds or s in seeds)]
    diverged = {tuple(pair) for pair in header.get("diverged", ())}
    lost = [i for i in chosen if pairs[i] in diverged]
    if lost:
        report = f"{path.parent}: (task, seed) {', '.join(str(pairs[i]) for i in lost)} diverged in training"
        if len(lost) == len(chosen):
            raise UserError(f"{report}: train it again with a smaller --learning-rate, or choose another.")
        print(f"warning: {report}: left out.", file=sys.stderr)
    return [i for i in chosen if i not in lost]


def choose_seeds(header: dict[str, Any], path: Path, seeds: Sequence[int]) -> list[int]:
    """Where the base policies of these seeds are among those of a stage 1.

    Raises:
        UserError: one is missing, or diverged.
    """
    unknown = set(seeds) - set(header["seeds"])
    if unknown:
        raise UserError(
            f"{path} has no seed {min(unknown)}: train it with evor_bc.py --first-seed {seeds[0]} --seeds {len(seeds)} "
            f"--overwrite, or use its seeds, {header['seeds']}, or one with --policy-seed."
        )
    lost = {seed for _, seed in header.get("diverged", ())} & set(seeds)
    if lost:
        raise UserError(f"the base policy of seed {min(lost)} at {path} diverged: use another, with --policy-seed.")
    return [header["seeds"].index(seed) for seed in seeds]
