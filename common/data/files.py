"""Data files: what they have to contain, how they are read, and OGBench's rewards.

Layout of a file (OGBench's): `observations (rows, d)`, `actions (rows, a)`, `terminals (rows,)`, trajectories one after
the other. `terminals` marks the last row of a trajectory, which has no next state and is no transition; it never stops
a bootstrap. `masks` does: 0 where the task is solved, so that the reward-to-go of the solved state is its reward alone.
A file may bring its own `rewards` and `masks`; otherwise OGBench's `relabel_dataset` computes both from `qpos`.
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from common.data.foreign import SIGNS
from common.data.names import import_ogbench, parse_env
from common.data.opening import read_header, unreadable
from common.errors import UserError
from common.machine import free_memory, trim_memory


class Trajectories(NamedTuple):
    """Rows of a file. `rewards` and `masks` have one line per task; they are None for behaviour cloning."""

    observations: Float[np.ndarray, "rows observation"]
    actions: Float[np.ndarray, "rows action"]
    terminals: Bool[np.ndarray, " rows"]
    rewards: Float[np.ndarray, "tasks rows"] | None = None
    masks: Float[np.ndarray, "tasks rows"] | None = None


NDIM = {"observations": 2, "actions": 2, "terminals": 1, "rewards": 1, "masks": 1, "qpos": 2, "button_states": 2}
"""The arrays that are read, and their dimensions; only the first three have to be there, whatever else is skipped."""


KNOWN = {*NDIM, "qvel"}  # OGBench's
LARGEST = float(np.finfo(np.float32).max)


def read_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of the arrays in an `.npz` file, without reading them.

    Raises:
        UserError: no `.npz` file, an array of objects, or more than fits into memory.
    """
    key, headers, total = "the archive", {}, 0
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                key = info.filename.removesuffix(".npy")
                if key in SIGNS:
                    raise UserError(
                        f"{path} has an array {key}, which is D4RL's layout: pass it to --dataset alone, not in a "
                        f"folder or as validation data."
                    )
                if key not in NDIM or info.filename == key:
                    continue
                with archive.open(info) as file:
                    shape, dtype = read_header(file)
                headers[key] = shape, dtype
                size = math.prod(shape) * dtype.itemsize
                if size > info.file_size:
                    raise ValueError(f"its header promises {size:,} bytes, and there are {info.file_size:,}")
                total += size
    except UserError:
        raise
    except Exception as error:  # a damaged archive raises a dozen types, from zlib's to zipfile's
        remedy = "make the .npz file with numpy.savez, without objects"
        raise unreadable(f"{key} in {path}", error, remedy) from None
    for key, (_, dtype) in headers.items():
        if dtype.hasobject:
            raise UserError(f"{key} in {path} is an array of objects, which is never unpickled: save it as numbers.")
    free = free_memory()
    if free is not None and total > free:
        raise UserError(
            f"{path} takes {total / 2**30:.3g} GiB once unpacked, and {free / 2**30:.3g} GiB of memory are free: "
            f"split it into several files and pass their folder."
        )
    return headers


def check_headers(path: Path, *, skip: Collection[str] = (), like: "Trajectories | None" = None) -> int:
    """Checks which arrays a file has and their shapes, without reading them; returns the number of rows.

    Args:
        skip: optional arrays that are not needed.
        like: another file of the same dataset, whose dimensions it has to have.

    Raises:
        UserError: an array is missing, or of a wrong kind or shape.
    """
    headers = read_headers(path)
    for key in ("observations", "actions", "terminals"):
        if key not in headers:
            raise UserError(f"{path} has no array {key!r}: it needs observations, actions and terminals.")
    for key in (key for key in NDIM if key in headers and key not in skip):
        shape, dtype = headers[key]
        if len(shape) != NDIM[key] or dtype.kind not in "biuf" or 0 in shape[1:]:
            raise UserError(f"{key} in {path} must be a {NDIM[key]}-D array of numbers, not {dtype} {shape}.")
        if shape[0] != headers["observations"][0][0]:
            raise UserError(
                f"{key} in {path} has {shape[0]} rows, observations has {headers['observations'][0][0]}: "
                f"they must be equal."
            )
    for key in ("observations", "actions") if like is not None else ():
        widths = headers[key][0][1], getattr(like, key).shape[1]
        if widths[0] != widths[1]:
            raise UserError(
                f"{key} in {path} have {widths[0]} columns, those of the folder's first file {widths[1]}: "
                f"keep different datasets in different folders."
            )
    return headers["observations"][0][0]


def read_arrays(path: Path, skip: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file that this project uses, checked.

    Args:
        skip: optional arrays that are not needed.

    Raises:
        UserError: not an `.npz` file, an array is missing, or of a wrong kind, shape or content.
    """
    check_headers(path, skip=skip)
    arrays = _load(path, [key for key in NDIM if key not in skip])
    for key, array in arrays.items():
        row = first_row(array, _not_finite) if array.dtype.kind == "f" else None
        if row is not None:
            raise UserError(f"{key} in {path} is not finite at row {row}: remove or repair that row.")
    terminals = arrays["terminals"]
    _check_terminals(terminals, path)
    for key in ("observations", "actions", "rewards"):
        if key in arrays:
            warn_of_rounding(arrays[key].reshape(len(terminals), -1), f"{key} in {path}")
    row = first_row(arrays["actions"], lambda part: (part < -1.001) | (part > 1.001))
    if row is not None:
        raise UserError(f"actions in {path} leave [-1, 1] at row {row}: scale them to that range.")
    ranges = arrays["actions"].max(axis=0).astype(np.float64) - arrays["actions"].min(axis=0)
    if len(narrow := np.flatnonzero(ranges < 0.02)):
        print(
            f"WARNING: actions in {path}: columns {narrow[:10].tolist()} vary by {ranges[narrow].max():.2g} or less: "
            f"scale them, so that they fill [-1, 1]; a constant one can be left out."
        )
    if "masks" in arrays and first_row(arrays["masks"], lambda part: (part != 0) & (part != 1)) is not None:
        raise UserError(f"masks in {path} must be 0 (the bootstrap stops) or 1 everywhere.")
    return arrays


def read_terminals(path: Path) -> Bool[np.ndarray, " rows"]:
    """Which rows of a file end a trajectory, without reading its other arrays.

    Raises:
        UserError: as `read_arrays`.
    """
    terminals = _load(path, ["terminals"])["terminals"]
    _check_terminals(terminals, path)
    return terminals.astype(bool)


def _load(path: Path, keys: Sequence[str]) -> dict[str, np.ndarray]:
    arrays, key = {}, "file"
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in (key for key in keys if key in file.files):
                arrays[key] = file[key]
    except Exception as error:
        raise unreadable(f"{key} in {path}", error, "make or fetch it anew") from None
    return arrays


def _check_terminals(terminals: np.ndarray, path: Path) -> None:
    if len(terminals) == 0 or not terminals[-1]:
        raise UserError(
            f"terminals in {path} must be true at the last row of each trajectory, so also at the last row."
        )
    row = first_row(terminals, lambda part: (part != 0) & (part != 1))
    if row is not None:
        raise UserError(f"terminals in {path} must be 0 or 1 everywhere, unlike at row {row}.")
    if terminals.all():
        raise UserError(
            f"terminals in {path} are true everywhere, so that there is no transition: they mark the last row of each "
            f"trajectory alone."
        )


def warn_of_rounding(columns: Shaped[np.ndarray, "rows columns"], what: str) -> None:
    """Says which columns single precision, in which everything is computed, rounds by more than a hundredth of their
    standard deviation: those that vary little around a large number."""
    if columns.dtype.itemsize < 4 or columns.dtype == np.float32:
        return  # which lose nothing
    error = np.abs(columns - columns.astype(np.float32)).max(axis=0)
    varies = columns.max(axis=0) > columns.min(axis=0)
    bad = np.flatnonzero(varies & (error > 0.01 * columns.std(axis=0, dtype=np.float64)))
    if len(bad):
        print(
            f"WARNING: {what}: single precision rounds columns {bad[:10].tolist()} by up to {error.max():.3g}, more "
            f"than a hundredth of what they vary by: subtract their mean, or scale them."
        )


def _not_finite(part: np.ndarray) -> np.ndarray:
    """NaN, infinite, or beyond single precision."""
    return ~(np.abs(part.astype(np.float64)) <= LARGEST)


def first_row(array: np.ndarray, bad: Callable[[np.ndarray], np.ndarray], *, part: int = 65_536) -> int | None:
    """The first row with a bad element, None if there is none; part by part, to need little memory."""
    for start in range(0, len(array), part):
        rows = bad(array[start : start + part])
        if rows.any():
            return start + int(np.argwhere(rows)[0][0])
    return None


def has_rewards(path: Path) -> bool:
    """Whether a file brings its own rewards; its content is checked where it is loaded."""
    return "rewards" in read_headers(path)


def load_trajectories(
    path: Path,
    *,
    env: str,
    tasks: Sequence[int] = (),
    reward: str = "default",
) -> Trajectories:
    """Reads a file; with `tasks`, also the rewards and masks of those tasks.

    Args:
        tasks: OGBench's single tasks, relabelled from `qpos`; `(0,)` stands for the file's own rewards and masks.
        reward: `default`, OGBench's; `sparse`, QC's variant of it: -1 until the task is solved, then 0.

    Raises:
        UserError: a malformed file, or one without what the rewards are to be computed from.
    """
    own = tuple(tasks) == (0,)
    with contextlib.ExitStack() as stack:
        # The environment first: compiling it takes memory that goes back before the arrays come.
        simulator = stack.enter_context(_simulator(path, env)) if tasks and not own else None
        arrays = read_arrays(path, skip=("qpos", "button_states") if simulator is None else ("rewards", "masks"))
        actions = arrays.pop("actions").astype(np.float32, copy=False)
        trajectories = Trajectories(
            observations=arrays.pop("observations").astype(np.float32, copy=False),
            actions=np.clip(actions, -1.0, 1.0, out=actions),
            terminals=arrays.pop("terminals").astype(bool),
        )
        if not tasks:
            return trajectories
        if simulator is not None:
            labels = [relabel(simulator, task, arrays, path) for task in tasks]
        elif "rewards" in arrays:
            labels = [(arrays["rewards"], arrays.get("masks", np.ones(len(arrays["rewards"]))))]
        else:
            raise UserError(f"{path} has no array 'rewards', unlike the training file: add it.")
    rewards = np.stack([r for r, _ in labels]).astype(np.float32, copy=False)
    masks = np.stack([m for _, m in labels]).astype(np.float32, copy=False)
    if reward == "sparse":
        rewards = -masks  # for OGBench's rewards the same as QC's -(rewards != 0)
    return trajectories._replace(rewards=rewards, masks=masks)


@contextlib.contextmanager
def _simulator(path: Path, env: str) -> Iterator[Any]:
    """OGBench's single-task environment, to compute rewards with."""
    import_ogbench()
    import gymnasium

    gym_id = parse_env(env).gym_id(1)
    if gym_id not in gymnasium.registry:
        raise UserError(f"{path} has no rewards, and {env!r} is no OGBench environment to compute them with.")
    made = gymnasium.make(gym_id)
    trim_memory()
    yield made
    made.close()


def relabel(
    env: Any, task: int, arrays: dict[str, np.ndarray], path: Path, *, block: int = 100_000
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Rewards and masks of every row for one of an environment's tasks, by OGBench's own `relabel_dataset`."""
    from ogbench.relabel_utils import relabel_dataset

    if "qpos" not in arrays:
        raise UserError(f"{path} has neither rewards nor qpos to compute OGBench's rewards from: add an array rewards.")
    env.unwrapped._reward_task_id = task  # what the environments of the five tasks differ by
    rewards, masks = np.empty((2, len(arrays["qpos"])), np.float32)
    try:
        for start in range(0, len(rewards), block):  # it needs several times the memory of what it is given
            rows = slice(start, start + block)
            labels = {key: arrays[key][rows] for key in ("qpos", "button_states") if key in arrays}
            relabel_dataset(env.spec.id, env, labels)
            rewards[rows], masks[rows] = labels["rewards"], labels["masks"]
        widths = arrays["qpos"].shape[1], env.unwrapped.model.nq
        if widths[0] != widths[1]:
            raise ValueError(f"qpos has {widths[0]} columns instead of {widths[1]}")
    except (IndexError, KeyError, ValueError) as error:
        name = env.spec.id.partition("-singletask")[0]
        raise UserError(
            f"{path} does not hold states of {name} ({error}): pass the data of that environment."
        ) from None
    return rewards, masks
