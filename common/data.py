"""Data: what a file has to contain, and how its rows become transitions, rewards and returns.

    python -m common.data --list                   # all environments of OGBench
    python -m common.data --env cube-double-play   # what a dataset contains, as numbers and as a figure

Layout of a file (OGBench's): `observations (rows, d)`, `actions (rows, a)`, `terminals (rows,)`, trajectories one after
the other. `terminals` marks the last row of a trajectory, which has no next state and is no transition; it never stops
a bootstrap. `masks` does: 0 where the task is solved, so that the reward-to-go of the solved state is its reward alone.
A file may bring its own `rewards` and `masks`; otherwise OGBench's `relabel_dataset` computes both from `qpos`.

A transition of horizon `h` starts at row `i` and ends at row `i + h` of the same trajectory.
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from common.envs import ENVIRONMENTS, free_memory, import_ogbench, parse_env, trim_memory
from common.errors import UserError, run_cli

# --- Trajectories ------------------------------------------------------------------------------------------------


class Trajectories(NamedTuple):
    """Rows of a file. `rewards` and `masks` have one line per task; they are None for behaviour cloning."""

    observations: Float[np.ndarray, "rows observation"]
    actions: Float[np.ndarray, "rows action"]
    terminals: Bool[np.ndarray, " rows"]
    rewards: Float[np.ndarray, "tasks rows"] | None = None
    masks: Float[np.ndarray, "tasks rows"] | None = None


NDIM = {"observations": 2, "actions": 2, "terminals": 1, "rewards": 1, "masks": 1, "qpos": 2, "button_states": 2}
"""The arrays that are read, and their dimensions; only the first three have to be there, whatever else is skipped."""


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
                if key not in NDIM or info.filename == key:
                    continue
                with archive.open(info) as file:
                    version = np.lib.format.read_magic(file)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else _read_header_2_0
                    shape, _, dtype = read(file)
                headers[key] = shape, dtype
                size = math.prod(shape) * dtype.itemsize
                if size > info.file_size:
                    raise ValueError(f"its header promises {size:,} bytes, and there are {info.file_size:,}")
                total += size
    except Exception as error:  # a damaged archive raises a dozen types, from zlib's to zipfile's
        raise UserError(
            f"{key} in {path} cannot be read ({error}): make the .npz file with numpy.savez, without objects."
        ) from None
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


def _read_header_2_0(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    return np.lib.format.read_array_header_2_0(file)


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
    try:
        arrays, key = {}, "file"
        with np.load(path, allow_pickle=False) as file:
            for key in (key for key in NDIM if key in file.files and key not in skip):
                arrays[key] = file[key]
    except Exception as error:
        raise UserError(
            f"{key} in {path} cannot be read ({error}): the file is damaged, make or fetch it anew."
        ) from None
    for key, array in arrays.items():
        row = first_row(array, _not_finite) if array.dtype.kind == "f" else None
        if row is not None:
            raise UserError(f"{key} in {path} is not finite at row {row}: remove or repair that row.")
    terminals = arrays["terminals"]
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
    row = first_row(arrays["actions"], lambda part: (part < -1.001) | (part > 1.001))
    if row is not None:
        raise UserError(f"actions in {path} leave [-1, 1] at row {row}: scale them to that range.")
    if "masks" in arrays and first_row(arrays["masks"], lambda part: (part != 0) & (part != 1)) is not None:
        raise UserError(f"masks in {path} must be 0 (the bootstrap stops) or 1 everywhere.")
    return arrays


def _not_finite(part: np.ndarray) -> np.ndarray:
    """NaN, infinite, or beyond single precision."""
    return ~(np.abs(part.astype(np.float64)) <= LARGEST)


def first_row(array: np.ndarray, bad: Callable[[np.ndarray], np.ndarray], *, part: int = 65_536) -> int | None:
    """The first row with a bad element, None if there is none; part by part, to need little memory."""
    for start in range(0, len(array), part):
        found = bad(array[start : start + part])
        if found.any():
            return start + int(np.argwhere(found)[0][0])
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


def last_rows(terminals: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """For each row the last row of its trajectory."""
    ends = np.flatnonzero(terminals)
    return ends[np.searchsorted(ends, np.arange(len(terminals)))]


def transition_starts(
    terminals: Bool[np.ndarray, " rows"], horizon: int, *, extra: int = 0, where: str = "the data"
) -> Int[np.ndarray, " n"]:
    """Rows `i` whose trajectory also has row `i + horizon + extra`: the starts of all transitions of a horizon.

    Raises:
        UserError: no trajectory of `where` is that long.
    """
    rows = np.arange(len(terminals))
    starts = rows[rows + horizon + extra <= last_rows(terminals)].astype(np.int32)
    if len(starts) == 0:
        raise UserError(
            f"no trajectory in {where} is longer than {horizon + extra} rows: use a shorter --horizon or longer data."
        )
    return starts


def chunk_rewards(
    rewards: Float[np.ndarray, "tasks rows"],
    masks: Float[np.ndarray, "tasks rows"],
    starts: Int[np.ndarray, " n"],
    *,
    horizon: int,
    discount: float,
) -> tuple[Float[np.ndarray, "tasks n"], Float[np.ndarray, "tasks n"]]:
    """Reward and bootstrap factor of each transition: `Z(x, a) = reward + bootstrap * Z(x', a')`.

    `reward_i = sum_{k<h} discount^k (prod_{j<k} masks_{i+j}) rewards_{i+k}`,
    `bootstrap_i = discount^h prod_{k<h} masks_{i+k}`.
    With horizon 1: the row's reward, and discount * mask. A chunk in which the task is solved stops there, as the
    environment does; QC (arXiv 2507.07969) counts the later rewards of such a chunk.
    """
    reward = np.zeros((len(rewards), len(starts)), np.float32)
    bootstrap = np.ones_like(reward)
    for k in range(horizon):
        reward += bootstrap * rewards[:, starts + k]
        bootstrap *= np.float32(discount) * masks[:, starts + k]
    return reward, bootstrap


def monte_carlo_returns(
    rewards: Float[np.ndarray, " rows"],
    masks: Float[np.ndarray, " rows"],
    terminals: Bool[np.ndarray, " rows"],
    *,
    discount: float,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Discounted reward-to-go of each row as far as its trajectory goes, and the weight of what is missing.

    `G_i = rewards_i + discount * masks_i * G_{i+1}` up to the last transition. An episode that was cut by its time
    limit has no complete return: what it lacks is `tail_i * Z(last state)`, `tail_i = prod discount * masks`. A return
    is complete where `tail_i = 0` (the task was solved on the way) and complete up to a tolerance where it is small.
    """
    ends = np.flatnonzero(terminals)
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns, tails = np.zeros(len(rewards)), np.ones(len(rewards))
    for back in range(1, int((ends - starts).max(initial=0)) + 1):
        rows = ends[ends - starts >= back] - back
        factor = discount * masks[rows]
        returns[rows] = rewards[rows] + factor * returns[rows + 1]
        tails[rows] = factor * tails[rows + 1]
    return returns, tails


def rows_with_complete_returns(
    terminals: Bool[np.ndarray, " rows"], *, discount: float, horizon: int, tolerance: float = 0.01, most: int = 2_000
) -> Int[np.ndarray, " chosen"]:
    """Rows, `most` of them at random, whose Monte-Carlo return can lack no more than `tolerance` of the return range.

    They are chosen by their place in the episode alone: `log(tolerance) / log(discount)` steps or more come after them.
    Choosing the rows whose returns happen to be complete would choose the successful ones.
    """
    steps = int(np.ceil(np.log(tolerance) / np.log(discount))) if discount > 0 else 1
    left = last_rows(terminals) - np.arange(len(terminals))
    candidates = np.flatnonzero(left >= max(steps, horizon))
    return np.sort(np.random.default_rng(0).choice(candidates, min(most, len(candidates)), replace=False))


def return_bounds(rewards: Float[np.ndarray, "tasks rows"], discount: float) -> Float[np.ndarray, "tasks 2"]:
    """Lowest and highest discounted return that rewards within the data's range can give, for episodes of any length.

    A sum of one to infinitely many terms: a positive lowest reward is bounded by a single one, and so on.
    """
    low, high = rewards.min(axis=1), rewards.max(axis=1)
    horizon = 1.0 / (1.0 - discount)
    return np.stack([np.minimum(low, low * horizon), np.maximum(high, high * horizon)], axis=1)


def reward_range(
    files: Sequence[Path], rewards: Float[np.ndarray, "tasks rows"], *, env: str, own: bool, reward: str
) -> Float[np.ndarray, "tasks 2"]:
    """Lowest and highest reward per task over all files of a dataset; `rewards` are those of the first one's
    transitions."""
    found = np.stack([rewards.min(axis=1), rewards.max(axis=1)], axis=1)
    if len(files) == 1:
        return found
    if own and reward == "default":
        parts = [read_arrays(file, skip=("qpos", "button_states"))["rewards"] for file in files[1:]]
        return np.array([[min(p.min() for p in [found[0], *parts]), max(p.max() for p in [found[0], *parts])]])
    lowest = -1.0 if reward == "sparse" or own else ENVIRONMENTS[parse_env(env).prefix].lowest_reward
    return np.stack([np.minimum(found[:, 0], lowest), np.maximum(found[:, 1], 0.0)], axis=1)


def return_sample(trajectories: Trajectories, *, discount: float, most: int = 50_000) -> Float[np.ndarray, "tasks m"]:
    """Returns of `most` of the data's transitions, drawn at random, for each task: how they are distributed.

    What an episode lacks that was cut short, by its time limit say, is filled with a return of another transition:
    `G_i = partial_i + tail_i G_j`, j at random, repeated until nothing is lacking (see `monte_carlo_returns`).
    """
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(~trajectories.terminals)
    rows = np.sort(rng.choice(rows, min(most, len(rows)), replace=False))
    found = []
    for rewards, masks in zip(trajectories.rewards, trajectories.masks, strict=True):
        partial, tail = monte_carlo_returns(rewards, masks, trajectories.terminals, discount=discount)
        partial, tail = partial[rows], tail[rows]
        mean = partial.mean() / (1.0 - tail.mean())  # of the complete returns
        while tail.mean() > 1e-3:  # each round squares what is lacking
            j = rng.permutation(len(rows))
            partial, tail = partial + tail * partial[j], tail * tail[j]
        found.append(partial + tail * mean)
    return np.stack(found)


# --- What a file contains ----------------------------------------------------------------------------------------


def print_summary(
    trajectories: Trajectories, info: dict[str, Any], *, tasks: Sequence[int], discount: float, files: int = 1
) -> None:
    """Prints transitions, episodes, and per task return bounds and success; warns where a task is never solved."""
    terminals = trajectories.terminals
    episodes, transitions = int(terminals.sum()), int((~terminals).sum())
    print(f"data: {info['name']} (source: {info['source']}, sha256 {info['sha256'][:12]})")
    if files > 1:
        print(f"  {files} files that take turns; the numbers below, and all scales, are those of the first")
    print(
        f"  {transitions:,} transitions in {episodes:,} episodes, "
        f"observations {trajectories.observations.shape[1]}-D, actions {trajectories.actions.shape[1]}-D"
    )
    if trajectories.rewards is None:
        return
    episode_of = np.searchsorted(np.flatnonzero(terminals), np.arange(len(terminals)))
    bounds = return_bounds(trajectories.rewards[:, ~terminals], discount)
    for i, task in enumerate(tasks):
        solved = (trajectories.masks[i] == 0) & ~terminals
        ever = len(np.unique(episode_of[solved]))
        label = f"task {task}" if task else "own rewards"
        print(
            f"  {label}: returns within [{bounds[i, 0]:.4g}, {bounds[i, 1]:.4g}] at discount {discount}; "
            f"solved in {solved[~terminals].mean():.2%} of the transitions, in {ever:,} of {episodes:,} episodes"
        )
        last = (trajectories.masks[i] == 0) & terminals
        if ever == 0 and last.any():
            print(
                f"  WARNING: {label} is solved in last rows alone ({last.sum():,}). A last row is no transition: its "
                f"reward and mask are not used. Append the final observation as one more row."
            )
        elif ever == 0 and (task or np.ptp(trajectories.rewards[i, ~terminals]) == 0):
            print(f"  WARNING: {label} is never solved in this data: its rewards cannot tell actions apart.")


if __name__ == "__main__":
    from common import report  # which stands on this module

    run_cli(report.main, report.Args)
