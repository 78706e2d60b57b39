"""Data in other formats, converted once into the cache: Minari datasets, and files in D4RL's layout.

    --dataset minari:mujoco/hopper/medium-v0
    --dataset hopper_medium-v2.hdf5             or an .npz with an array `timeouts` or `next_observations`

| here                        | Minari                           | D4RL's layout                        |
|-----------------------------|----------------------------------|--------------------------------------|
| `masks` = 0                 | `terminations`                   | `terminals`                          |
| end of a trajectory         | end of an episode                | `terminals` or `timeouts`            |
| the state after its end     | the last observation             | `next_observations`, where there are |

A trajectory that was cut, and whose format does not keep the state after its last action, loses that last transition.
One that ended needs no such state: with a mask of 0 nothing looks at it.
"""

import contextlib
import functools
import hashlib
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from jaxtyping import Bool, Float

from common.data.names import DEFAULT_ENV, data_dir, validation_path
from common.data.opening import HDF5, unreadable, unused
from common.data.spaces import action_range, flat
from common.environments import is_registered, make_as_it_is
from common.errors import UserError
from common.files import atomic, locked, read_json, record_sha256, sha256, write_json
from common.progress import progress

MINARI = "minari:"
VALIDATION = 20  # each twentieth trajectory is kept for the comparison with Monte-Carlo returns
VERSION = 6  # of what is made of a source
ALIASES = dict.fromkeys(("truncations", "truncation", "truncated", "timeout"), "timeouts")  # Gymnasium's names
ALIASES |= dict.fromkeys(("terminations", "termination", "terminated"), "terminals")
ALIASES |= dict.fromkeys(("next_obs", "next_observation"), "next_observations")
SIGNS = {"timeouts", "next_observations", *ALIASES}  # arrays that OGBench's layout does not have


class Trajectory(NamedTuple):
    """`n` steps, and n + 1 observations where the state after the last step is known, else n."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: Float[np.ndarray, " n"]
    ended: Bool[np.ndarray, " n"]  # nothing follows this step


class Source(NamedTuple):
    """Trajectories of another format."""

    name: str
    sha256: str
    env: str  # Gymnasium's id, "" where nobody says
    low: np.ndarray  # of actions
    high: np.ndarray
    number: int
    trajectories: Iterator[Trajectory]
    says: tuple[str, ...] = ()
    rewarded: bool = True  # False: the data have no rewards, for behaviour cloning alone
    clips: bool = True  # False: the range of the actions is of no environment, and no action is beyond it
    reference: tuple[float, float] | None = None  # returns of a random and of an expert policy
    settings: Mapping[str, Any] = {}  # of `gymnasium.make`, where they are not those of the id


def is_minari(dataset: Path | None) -> bool:
    return dataset is not None and dataset.as_posix().startswith(MINARI)


def environment_of(env: str, dataset: Path | None) -> str:
    """What `--env` names; where it is left out, the environment that a Minari dataset was made in.

    Raises:
        UserError: the dataset does not say it, or cannot be opened.
    """
    if env != DEFAULT_ENV or not is_minari(dataset):
        return env
    name = dataset.as_posix().removeprefix(MINARI)
    made_in = minari_env(name)
    if not made_in:
        raise UserError(f"{dataset} does not say in which environment it was made: name it, or the run, with --env.")
    return made_in


@functools.cache
def minari_env(name: str) -> str:
    spec = evaluated_in(load_minari(name))
    if spec is not None and wrappers_of(spec):
        raise UserError(
            f"{MINARI}{name} was made in {spec.id} within {wrappers_of(spec)}: register an environment that includes "
            f"it, and name that with --env module:Id-v0. With another --env, evaluation is without the wrapper."
        )
    return "" if spec is None else spec.id


def is_foreign(dataset: Path) -> bool:
    """Whether `--dataset` names a Minari dataset or a file in D4RL's layout."""
    if is_minari(dataset) or dataset.suffix.lower() in HDF5:
        return True
    with contextlib.suppress(Exception), zipfile.ZipFile(dataset) as archive:  # damage is reported elsewhere
        return any(name.removesuffix(".npy") in SIGNS for name in archive.namelist())
    return False


def converted(dataset: Path, env: str) -> Path:
    """The `.npz` of a foreign dataset in OGBench's layout; made where it does not stand yet. Says what is in it.

    Args:
        env: Gymnasium's id of the environment, whose action space says how actions are scaled where the data do not;
            they are in [-1, 1] where neither does.

    Raises:
        UserError: the data are not there, of another layout, or need a package that is missing.
    """
    name = dataset.as_posix().removeprefix(MINARI)
    with open_minari(name) if is_minari(dataset) else open_d4rl(dataset, env) as source:
        scale = np.stack([source.low, source.high]).astype(np.float64)
        made_of = f"{VERSION} {source.sha256} {scale.tolist()}".encode()
        stem = f"{source.name.replace('/', '-')}-{hashlib.sha256(made_of).hexdigest()[:12]}"
        path = data_dir() / "converted" / f"{stem}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            about = read_json(path.with_suffix(".json"))
            if about is None or not all((path.parent / file).is_file() for file in about["files"]):
                about = _convert(source, path)
    for line in about["says"]:
        print(line, flush=True)
    if not is_minari(dataset) and validation_path(dataset).is_file():
        print(f"  {validation_path(dataset)} is not used: validation data are taken from {dataset}")
    return path


# --- Minari ------------------------------------------------------------------------------------------------------


def load_minari(name: str) -> Any:
    """Minari's object of a dataset, found locally or downloaded.

    Raises:
        UserError: it is neither here nor there.
    """
    try:
        import minari
        from minari.storage.datasets_root_dir import get_dataset_path
    except Exception as error:  # a package that does not fit to another one raises any kind
        raise UserError(
            f"--dataset {MINARI}{name} needs Minari ({error}): pip install --upgrade 'minari[hdf5]'."
        ) from None
    if not re.search(r"-v\d+$", name):
        raise UserError(f"--dataset {MINARI}{name} has no version: write {MINARI}NAME-vN, such as {MINARI}{name}-v0.")
    try:
        return minari.load_dataset(name, download=True)
    except PermissionError as error:
        raise unreadable(f"--dataset {MINARI}{name}", error, "") from None
    except Exception as error:  # of the network, the host, the name or the files
        folder = get_dataset_path(name)
        if folder.exists():
            allowed = os.access(folder, os.R_OK | os.X_OK)  # Minari looks for one elsewhere that it may not open
            remedy = "delete it, and it will be downloaded anew" if allowed else "change its permissions"
            raise unreadable(str(folder), error, remedy) from None
        raise UserError(
            f"--dataset {MINARI}{name} is not in Minari's folder and cannot be downloaded ({str(error) or repr(error)})"
            f": `minari list local` and `minari list remote` show what there is."
        ) from None


@contextlib.contextmanager
def open_minari(name: str) -> Iterator[Source]:
    """A Minari dataset.

    Raises:
        UserError: as `load_minari`, or its observations or actions are none that a network takes.
    """
    dataset = load_minari(name)
    low, high = action_range(dataset.action_space, name)
    files = sorted(path for path in Path(dataset.storage.data_path).rglob("*") if path.is_file())
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode()).hexdigest()

    def trajectories() -> Iterator[Trajectory]:
        for episode in dataset.iterate_episodes():
            yield Trajectory(
                flat(dataset.observation_space, episode.observations, name, batched=True),
                np.reshape(episode.actions, (len(episode.rewards), -1)),
                np.asarray(episode.rewards),
                np.asarray(episode.terminations, bool),
            )

    spec = evaluated_in(dataset)
    env, settings = ("", {}) if spec is None else (spec.id, settings_of(spec))
    says = (f"  {env} is made with {settings}",) if settings else ()
    if spec is not None and wrappers_of(spec):
        says = (*says, f"  WARNING: made in {env} within {wrappers_of(spec)}, which is not there in the evaluation")
    scores = tuple(dataset.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    reference = None if None in scores else (float(scores[0]), float(scores[1]))
    if reference is not None and not (np.isfinite(reference).all() and reference[0] != reference[1]):
        says, reference = (*says, f"  the reference scores {reference} are none: no normalised score"), None
    yield Source(
        name, digest, env, low, high, int(dataset.total_episodes), trajectories(), says, reference=reference,
        settings=settings,
    )  # fmt: skip


def evaluated_in(dataset: Any) -> gymnasium.envs.registration.EnvSpec | None:
    """The environment that a Minari dataset names for evaluation, or else the one that it was made in."""
    text = dataset.storage.metadata.get("eval_env_spec")
    return gymnasium.envs.registration.EnvSpec.from_json(text) if text else dataset.env_spec


def wrappers_of(spec: gymnasium.envs.registration.EnvSpec) -> str:
    """Those that change what an agent sees or does; a time limit is among the settings."""
    harmless = ("RecordEpisodeStatistics", "RecordVideo", "TimeLimit", "OrderEnforcing", "PassiveEnvChecker")
    return ", ".join(wrapper.name for wrapper in spec.additional_wrappers if wrapper.name not in harmless)


def settings_of(spec: gymnasium.envs.registration.EnvSpec) -> dict[str, Any]:
    """What `gymnasium.make` has to be told beyond the id, for an environment that differs from the registered one."""
    registered = gymnasium.registry.get(spec.id)
    settings = dict(spec.kwargs) | {"max_episode_steps": spec.max_episode_steps}
    known = {} if registered is None else registered.kwargs | {"max_episode_steps": registered.max_episode_steps}
    return {name: value for name, value in settings.items() if name not in known or known[name] != value}


# --- D4RL --------------------------------------------------------------------------------------------------------

NDIM = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1, "timeouts": 1, "next_observations": 2}
NDIM |= {"masks": 1}
FLAGS = ("terminals", "timeouts", "masks")
NEEDED = ("observations", "actions", "terminals")


@contextlib.contextmanager
def open_d4rl(path: Path, env: str) -> Iterator[Source]:
    """A file of rows that say what state followed (`next_observations`), or where they were cut (`timeouts`).

    Raises:
        UserError: it cannot be read, has other arrays, or its rows contradict each other.
    """
    arrays = read_d4rl(path)
    terminals, rewarded = arrays["terminals"].astype(bool), "rewards" in arrays
    rewards = arrays["rewards"] if rewarded else np.zeros(len(terminals), np.float32)
    ended = arrays["masks"] == 0 if "masks" in arrays else terminals  # with masks, terminals are ends of any kind
    timeouts = arrays.get("timeouts", np.zeros(len(terminals))).astype(bool)
    ends = terminals | timeouts
    ends[-1] = True
    observations, after = arrays["observations"], arrays.get("next_observations")
    unknown, says = np.full(len(ends), after is None), []  # where the state after a row is
    if after is not None:
        after = np.where(ended[:, None] & np.isnan(after), observations, after)  # nothing looks at it
        ends, unknown, says = compare_with_next_rows(observations, after, ends, ended)
    if not ends[:-1].any() or (after is None and not timeouts.any()):
        says.append(
            "  WARNING: nothing says where trajectories were cut (no true timeouts before the last row, no "
            "next_observations other than the next row): they are taken to go on until terminals"
        )
    says += unused(path, {*NDIM, *ALIASES})
    low, high = _range_of_env(env, arrays["actions"].shape[1])
    last = np.flatnonzero(ends)
    first = np.concatenate([[0], last[:-1] + 1])

    def trajectories() -> Iterator[Trajectory]:
        for start, end in zip(first, last, strict=True):
            rows = slice(start, end + 1)
            states = observations[rows]
            if not unknown[end]:
                states = np.concatenate([states, after[end : end + 1]])
            yield Trajectory(states, arrays["actions"][rows], rewards[rows], ended[rows])

    yield Source(
        path.stem, sha256(path), "", low, high, len(last), trajectories(), tuple(says), rewarded,
        clips=is_registered(env),
    )  # fmt: skip


def compare_with_next_rows(
    observations: Float[np.ndarray, "rows observation"],
    after: Float[np.ndarray, "rows observation"],
    ends: Bool[np.ndarray, " rows"],
    ended: Bool[np.ndarray, " rows"],
) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"], list[str]]:
    """What `after`, the states that followed, say: all ends of trajectories, where `after` is not to be believed, and
    what to print of both. Rows shifted by one, as by `np.roll`, know the state after no row that was cut."""
    differs = np.append(differ(after[:-1], observations[1:]), False)
    torn, cut, says = differs & ~ends, ends & ~ended, []
    if torn.any():
        says.append(f"  {torn.sum():,} trajectories end where the next row is another state than next_observations")
    unknown = cut & ~differs  # with the last row, whose next one is not known
    shifted, number = unknown[:-1].sum(), cut[:-1].sum()
    if 2 * shifted <= number:
        return ends | torn, np.zeros_like(ends), says
    says.append(
        f"  WARNING: next_observations of {shifted:,} of the {number:,} rows that were cut before the last one are the "
        f"next row, which begins another trajectory: they count as missing"
    )
    return ends | torn, unknown, says


def differ(
    a: Float[np.ndarray, "rows observation"], b: Float[np.ndarray, "rows observation"]
) -> Bool[np.ndarray, " rows"]:
    """Which rows differ by more than the coarser type rounds, and by more than 1e-5 of a column's deviation."""
    kind = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    rounding = 4 * np.finfo(kind).eps if kind.kind == "f" else 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    tolerance = np.maximum(rounding * np.abs(a), 1e-5 * np.nan_to_num(np.nanstd(a, axis=0) if len(a) else 0.0))
    return (~(np.abs(a - b) <= tolerance) & ~(np.isnan(a) & np.isnan(b))).any(axis=1)


def read_d4rl(path: Path) -> dict[str, np.ndarray]:
    """The arrays of D4RL's layout, checked.

    Raises:
        UserError: the file is missing, cannot be read, or has other arrays or shapes.
    """
    if not path.is_file():
        raise UserError(f"there is no dataset file at {path}: check the path given to --dataset.")
    arrays, groups = _read(path)
    if groups:
        raise UserError(f"{groups[0]} in {path} is a group of arrays: D4RL's layout has one array of vectors there.")
    for key in [key for key in arrays if key in ALIASES]:
        name, array = ALIASES[key], arrays.pop(key)
        if not np.array_equal(arrays.setdefault(name, array), array):
            raise UserError(f"{path} has {key} and another array for {name}, which differs: keep the right one.")
    missing = [key for key in NEEDED if key not in arrays]
    if missing:
        raise UserError(f"{path} has no array {missing[0]!r}: D4RL's layout needs {', '.join(NEEDED)}.")
    for key, array in arrays.items():
        if NDIM[key] == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = arrays[key] = array[:, 0]
        rows = arrays["observations"].shape[:1]
        if array.ndim != NDIM[key] or array.dtype.kind not in "biuf" or array.shape[:1] != rows:
            raise UserError(
                f"{key} in {path} must be a {NDIM[key]}-D array of numbers with {rows[0] if rows else 'some'} rows, "
                f"as observations has, not {array.dtype} {array.shape}."
            )
        if key in FLAGS and not np.isin(array, (0, 1)).all():
            raise UserError(f"{key} in {path} must be 0 or 1 everywhere.")
    if len(arrays["terminals"]) == 0:
        raise UserError(f"{path} has no rows.")
    columns = [arrays[key].shape[1] for key in ("observations", "next_observations") if key in arrays]
    if len(set(columns)) > 1:
        raise UserError(f"observations and next_observations in {path} have {columns} columns: make them equal.")
    return arrays


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of a file, and which of those that are needed are groups of arrays."""
    if path.suffix.lower() in HDF5:
        try:
            import h5py
        except Exception as error:  # a package that does not fit to another one raises any kind
            raise UserError(f"{path} needs h5py ({error}): pip install --upgrade h5py.") from None
    try:
        if path.suffix.lower() in HDF5:
            with h5py.File(path) as file:
                groups = [key for key in NDIM if isinstance(file.get(key), h5py.Group)]
                keys = [key for key in (*NDIM, *ALIASES) if key in file and key not in groups]
                return {key: np.asarray(file[key]) for key in keys}, groups
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in (*NDIM, *ALIASES) if key in file.files}, []
    except Exception as error:  # a damaged file raises a dozen types
        raise unreadable(str(path), error, "make or fetch it anew") from None


def _range_of_env(env: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the actions of a Gymnasium environment; [-1, 1] if there is none of this name."""
    if not is_registered(env):
        return -np.ones(size, np.float32), np.ones(size, np.float32)
    made = make_as_it_is(env)
    low, high = action_range(made.action_space, env)
    made.close()
    if len(low) != size:
        raise UserError(f"--env {env} has {len(low)} actions, and the data {size}: name the data's environment.")
    return low, high


# --- Conversion --------------------------------------------------------------------------------------------------


def in_our_layout(trajectory: Trajectory) -> dict[str, np.ndarray] | None:
    """Rows of a trajectory, the last one a state alone; None if no transition is left."""
    observations, actions, rewards, ended = trajectory
    steps = len(rewards)
    if len(observations) == steps and steps:
        if ended[-1]:
            observations = np.concatenate([observations, observations[-1:]])  # nothing looks at it
        else:
            steps -= 1
    if steps < 1:
        return None

    def rows(values: np.ndarray) -> np.ndarray:  # the last one is not used: it is like the one before
        return np.concatenate([values[:steps], values[steps - 1 : steps]])

    return dict(
        observations=observations[: steps + 1],
        actions=rows(actions),
        rewards=rows(rewards),
        masks=1.0 - np.append(ended[:steps], False).astype(np.float32),
        terminals=np.arange(steps + 1) == steps,
    )


def _excess(trajectory: Trajectory, number: int, source: Source) -> Float[np.ndarray, " n"]:
    """How far the actions of each step are beyond their range, in shares of it; negative within.

    Raises:
        UserError: there are numbers that cannot be learned from.
    """
    for name in ("observations", "actions", "rewards"):
        if not (np.abs(getattr(trajectory, name).astype(np.float64)) <= np.finfo(np.float32).max).all():
            raise UserError(f"{name} of trajectory {number} of {source.name} are not finite: remove or repair it.")
    actions = trajectory.actions.astype(np.float64)
    beyond = np.maximum(source.low - actions, actions - source.high)
    return (beyond / (source.high - source.low)).max(axis=1)


def _say_clipped(source: Source, excess: Float[np.ndarray, " rows"]) -> list[str]:
    """What to print of actions that are beyond their range by `excess` of it.

    Raises:
        UserError: more do than an environment may have clipped.
    """
    outside = int((excess > 1e-3).sum())
    what = f"actions of {outside:,} of {len(excess):,} rows"
    where = f"leave {source.low.tolist()} to {source.high.tolist()} by up to {excess.max():.1%} of this range"
    if outside > len(excess) * (0.5 if source.clips else 0.0):
        raise UserError(
            f"{what} of {source.name} {where}: scale or clip them, or, if it is in D4RL's layout, name the environment "
            f"of the data with --env."
        )
    return [f"  WARNING: {what} {where}: they are clipped, as an environment does"] if outside else []


def _convert(source: Source, path: Path) -> dict[str, Any]:
    """Writes the validation file, the training file, and what there is to say, which it returns."""
    parts: dict[Path, list[dict[str, np.ndarray]]] = {validation_path(path): [], path: []}
    lost, short, ended, excess = 0, 0, 0, []
    bar = progress(
        iterable=source.trajectories, desc=f"converting {source.name}", unit="trajectory", total=source.number
    )
    for i, trajectory in enumerate(bar):
        excess.append(_excess(trajectory, i, source))
        rows = in_our_layout(trajectory)
        lost += len(trajectory.rewards) - (0 if rows is None else len(rows["rewards"]) - 1)
        short += rows is None
        if rows is not None:
            ended += bool(trajectory.ended[-1])
            parts[validation_path(path) if i % VALIDATION == VALIDATION - 1 else path].append(rows)
    if not parts[path]:
        raise UserError(f"{source.name} has no trajectory with a transition in it: check where its trajectories end.")
    number = len(parts[path]) + len(parts[validation_path(path)])
    says = [
        f"converted {source.name}: {number:,} trajectories, {ended:,} ended and {number - ended:,} cut; "
        f"{len(parts[validation_path(path)]):,} of them are for validation",
        *source.says,
        *_say_clipped(source, np.concatenate(excess)),
    ]
    if lost:
        says.append(f"  {lost:,} last transitions are left out: the data do not keep the state after them")
    if short:
        says.append(f"  {short:,} trajectories are left out: no transition is left of them")
    scaled = (source.low != -1).any() or (source.high != 1).any()
    if scaled:
        says.append(f"  actions within {source.low.tolist()} and {source.high.tolist()} are scaled to [-1, 1]")
    about = dict(name=source.name, sha256=source.sha256, reference=source.reference)
    about |= {"settings": {source.env: source.settings}} if source.settings else {}
    about |= dict(trajectories=number, says=says, files=[file.name for file, rows in parts.items() if rows])
    for file, rows in parts.items():
        if not rows:
            continue
        written = [key for key in rows[0] if source.rewarded or key not in ("rewards", "masks")]
        arrays = {key: np.concatenate([part[key] for part in rows]) for key in written}
        arrays["actions"] = np.clip(arrays["actions"], source.low, source.high)
        if scaled:
            unit = 2.0 * (arrays["actions"] - source.low) / (source.high - source.low) - 1.0
            arrays["actions"] = unit.astype(np.float32)
        with atomic(file) as temporary:
            with open(temporary, "wb") as opened:  # savez would add an ending to a name
                np.savez(opened, **arrays)
            record_sha256(temporary, file)
    write_json(path.with_suffix(".json"), about)
    return about
