"""Collects OGBench's data with OGBench's own scripted behaviours, on all cores.

    python -m common.data.collect --env cube-double-play

| data | environments | behaviour |
|---|---|---|
| `play` | cube, scene, puzzle | *plan oracle*: follows an interpolated plan with temporally smoothed noise |
| `noisy` | cube, scene, puzzle | *Markov oracle*: reacts to the state, with Gaussian noise and random actions |
| `navigate` | pointmaze | goes from one random goal to the next along shortest paths, with Gaussian noise |
| `stitch` | pointmaze | goes to a goal four cells away and stays there |

Manipulation: pick a random object and target, let its oracle do it, repeat until the episode is over. Numbers (noise,
lengths, probabilities) are those with which OGBench's published data was made. The ant and the humanoid were driven by
trained experts, which OGBench's package does not bring, so their data cannot be made here.

The files have OGBench's arrays and dtypes: `observations, actions, terminals, qpos, qvel` (and `button_states`), one
`.npz` for training and one, a tenth as long, for validation. Actions are those that were executed (clipped to [-1, 1]);
the last row of an episode has `terminals` true and no next state.

Collected data is not OGBench's published file: it stands in a folder of its own with a `.json` that says where it came
from, and every result made with it says so. An episode depends on (seed, its number) alone, so the result does not
depend on the number of processes; blocks of episodes are kept until the end, so a killed collection goes on.

Source: Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", arXiv 2410.20092, appendix on data collection.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import shutil
import signal
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np

from common.args import Paths, Seed, at_least, check, not_negative, within
from common.cli import run_cli
from common.data.names import collected_path, import_ogbench, parse_env, validation_path
from common.errors import UserError
from common.files import atomic, locked, plain, read_json, record_sha256, write_json
from common.machine import num_cores
from common.progress import progress
from common.provenance import package_versions

Episode = dict[str, np.ndarray]
"""Arrays of one row per step, under OGBench's names."""

DTYPES = {"terminals": np.bool_, "button_states": np.int64}  # all else is float32
BLOCK_ROWS = 20_000  # about; what a killed process loses at most


class Recipe(NamedTuple):
    """How a dataset is made."""

    env: str
    """Gymnasium's name without its version, such as `cube-double`."""
    kind: str
    """`play`, `noisy`, `navigate` or `stitch`."""
    episodes: int
    """Training episodes of OGBench's file."""
    rows: int
    """Rows per episode, one more than transitions."""
    noise: float
    """Of the plan (play), of the actions, as standard deviation (navigate, stitch) or its largest value (noisy)."""
    noise_smoothing: float = 0.5
    """Width of the Gaussian that smooths the plan's noise over time, in control steps (play)."""
    min_norm: float = 0.4
    """Smallest norm of the Markov oracle's actions (noisy)."""
    random_actions: float = 0.0
    """Probability of a random action (noisy)."""
    stacking: tuple[float, float] = (0.5, 0.5)
    """Range of the probability that a cube is put on another one; one draw per episode."""


STACKING = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
MANY_EPISODES = {
    "cube-triple": 3000, "cube-quadruple": 5000, "cube-octuple": 5000, "puzzle-4x5": 3000, "puzzle-4x6": 5000,
}  # fmt: skip


def recipe_of(dataset_name: str) -> Recipe | None:
    """How OGBench made `dataset_name`, such as `cube-double-play-v0`; None if no script can make it."""
    env, _, kind = dataset_name.removesuffix("-v0").rpartition("-")
    family = env.split("-")[0]
    if family in ("cube", "scene", "puzzle") and kind in ("play", "noisy"):
        return Recipe(
            env,
            kind,
            episodes=MANY_EPISODES.get(env, 1000),
            rows=1001,
            noise=0.1,
            random_actions=0.0 if kind == "play" else 0.2 if family == "puzzle" else 0.1,
            stacking=STACKING.get(env, (0.5, 0.5)),
        )
    if family == "pointmaze" and kind == "navigate":
        long = env == "pointmaze-giant"
        return Recipe(env, kind, episodes=500 if long else 1000, rows=2001 if long else 1001, noise=0.5)
    if family == "pointmaze" and kind == "stitch":
        return Recipe(env, kind, episodes=5000, rows=201, noise=0.5)
    return None


def is_collectable(dataset_name: str) -> bool:
    """Whether a script can make `dataset_name`, such as `cube-double-play-v0`."""
    return recipe_of(dataset_name) is not None


def why_not_collectable(dataset_name: str) -> str:
    """Half a sentence for the user of a dataset that no script can make."""
    if dataset_name.startswith(("ant", "humanoid")):
        return "its ant or humanoid was driven by trained experts, so no script can collect it"
    return f"no scripted behaviour makes {dataset_name.removesuffix('-v0').rpartition('-')[2]!r} data of it"


@dataclasses.dataclass(frozen=True)
class Args(Paths):
    """Collect OGBench data with OGBench's scripted behaviours."""

    env: str = "cube-double-play"
    """Dataset to collect: {cube-*,scene,puzzle-*}-{play,noisy}, pointmaze-*-{navigate,stitch}."""
    episodes: int | None = None
    """Training episodes, OGBench's number by default; a tenth as many more go to the validation file."""
    seed: Seed = 0
    """Seed of all episodes."""
    noise: Annotated[float | None, not_negative] = None
    """Another noise level than OGBench's; needs --out."""
    noise_smoothing: Annotated[float | None, not_negative] = None
    """Another smoothing of the plan's noise than OGBench's; needs --out."""
    min_norm: Annotated[float | None, not_negative] = None
    """Another smallest norm of the Markov oracle's actions than OGBench's; needs --out."""
    random_actions: Annotated[float | None, within(0, 1, brackets="[]")] = None
    """Another probability of random actions than OGBench's; needs --out."""
    workers: Annotated[int | None, at_least(1)] = None
    """Processes; all cores by default."""
    out: Path | None = None
    """Training file to write; OGBench's cache, under `collected/`, by default."""


# --- One episode -------------------------------------------------------------------------------------------------


def collect_episode(recipe: Recipe, seed: int, number: int) -> Episode:
    """Episode `number` of the dataset; it depends on nothing else."""
    env, behave = _environment(recipe)
    # The environment draws from its own generator, the behaviours draw from NumPy's global one: seed both.
    env_seed, global_seed = np.random.SeedSequence([seed, number]).generate_state(2)
    np.random.seed(global_seed)
    columns = behave(recipe, env, int(env_seed))
    return {key: np.array(column, DTYPES.get(key, np.float32)) for key, column in columns.items()}


@functools.lru_cache(maxsize=1)  # building an environment takes seconds, resetting it milliseconds
def _environment(recipe: Recipe) -> tuple[Any, Callable[[Recipe, Any, int], dict[str, list]]]:
    import_ogbench()
    import gymnasium

    options: dict[str, Any] = dict(terminate_at_goal=False, max_episode_steps=recipe.rows)
    if recipe.env.startswith("pointmaze"):
        return gymnasium.make(f"{recipe.env}-v0", **options), navigate
    env = gymnasium.make(f"{recipe.env}-v0", mode="data_collection", **options)
    return env, functools.partial(manipulate, oracles=_oracles(recipe, env))


def _oracles(recipe: Recipe, env: Any) -> dict[str, Any]:
    """OGBench's scripted behaviour for each kind of object."""
    from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    family = recipe.env.split("-")[0]
    closed = {"gripper_always_closed": True} if family == "puzzle" else {}
    if recipe.kind == "play":
        settings: dict[str, Any] = dict(env=env, noise=recipe.noise, noise_smoothing=recipe.noise_smoothing)
        makers = {
            "cube": lambda: cube_plan.CubePlanOracle(**settings),
            "button": lambda: button_plan.ButtonPlanOracle(**settings, **closed),
            "drawer": lambda: drawer_plan.DrawerPlanOracle(**settings),
            "window": lambda: window_plan.WindowPlanOracle(**settings),
        }
    else:
        settings = dict(env=env, min_norm=recipe.min_norm)
        patience = {"max_step": 100} if family == "scene" else {}
        makers = {
            "cube": lambda: cube_markov.CubeMarkovOracle(**settings, **patience),
            "button": lambda: button_markov.ButtonMarkovOracle(**settings, **closed),
            "drawer": lambda: drawer_markov.DrawerMarkovOracle(**settings),
            "window": lambda: window_markov.WindowMarkovOracle(**settings),
        }
    objects = {"cube": ["cube"], "puzzle": ["button"], "scene": list(makers)}[family]
    return {name: makers[name]() for name in objects}


def manipulate(recipe: Recipe, env: Any, seed: int, oracles: dict[str, Any]) -> dict[str, list]:
    """One random object after the other is brought to a random target, until the episode is over.

    In the scene, an episode in which the cube leaves the table but for the drawer is dropped and tried again.
    """
    if recipe.env == "scene":
        _forget_targets(env.unwrapped)
    observation, info = env.reset(seed=seed)
    while True:
        columns = _manipulate_once(recipe, env, observation, info, oracles)
        if recipe.env != "scene" or is_healthy(np.array(columns["qpos"])):
            return columns
        observation, info = env.reset()


def _forget_targets(scene: Any) -> None:
    """Puts a scene's targets back to where they were when it was built.

    A new target changes those of one kind of object only, and the first step after the change still sees the old ones
    (`info` is from before it): without this, an episode would depend on the one before it.
    """
    scene._target_button, scene._target_drawer_pos, scene._target_window_pos = 0, 0.0, 0.0
    scene._target_button_states = np.zeros_like(scene._target_button_states)
    scene.model.site("drawer_handle_center_target").pos[1] = 0.0
    scene.model.site("window_handle_center_target").pos[0] = 0.0


def _manipulate_once(recipe: Recipe, env: Any, observation: Any, info: dict, oracles: dict[str, Any]) -> dict:
    columns: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    if "prev_button_states" in info:
        columns["button_states"] = []
    p_stack = np.random.uniform(*recipe.stacking)
    scale = np.array([1, 1, 1, 3, 10]) * np.random.uniform(0, recipe.noise) if recipe.kind == "noisy" else None
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(observation, info)
    done = False
    while not done:
        if recipe.random_actions and np.random.rand() < recipe.random_actions:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = np.asarray(oracle.select_action(observation, info))
            if scale is not None:
                action = action + np.random.normal(0, scale)
        action = np.clip(action, -1, 1)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            target_observation, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_observation, target_info)
        columns["observations"].append(observation)
        columns["actions"].append(action)
        columns["terminals"].append(done)
        for key in ("qpos", "qvel", "button_states"):
            if key in columns:
                columns[key].append(info[f"prev_{key}"])
        observation = next_observation
    return columns


def is_healthy(qpos: np.ndarray) -> bool:
    """OGBench's check of a scene episode: the cube never leaves the table to the side, unless into the drawer.

    Args:
        qpos: (rows, 14 + 7 + ...), of which columns 14 to 16 are the cube's position in metres.
    """
    y, z = qpos[:, 15], qpos[:, 16]
    return not bool(((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any())


def navigate(recipe: Recipe, env: Any, seed: int) -> dict[str, list]:
    """Along shortest paths to a random goal; in `navigate` data to the next one when it is reached.

    The action is the unit vector to the next cell of the path plus Gaussian noise, clipped.
    """
    maze = env.unwrapped
    cells, goals = free_cells(maze.maze_map), corners(maze.maze_map)
    start = cells[np.random.randint(len(cells))]
    if recipe.kind == "stitch":
        _, distances = maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(start))
        near = [cell for cell in cells if distances[cell] == 4]
        goal = near[np.random.randint(len(near))] if near else start
    else:
        goal = goals[np.random.randint(len(goals))]
    observation, _ = env.reset(seed=seed, options=dict(task_info=dict(init_ij=start, goal_ij=goal)))

    columns: dict[str, list] = {key: [] for key in ("observations", "actions", "terminals", "qpos", "qvel")}
    append = [columns[key].append for key in columns]
    # The path depends on the cells alone.
    next_xy = functools.cache(lambda *cells: maze.get_oracle_subgoal(*map(maze.ij_to_xy, cells))[0].tolist())
    noise = np.random.normal(0, recipe.noise, (recipe.rows, 2)).tolist()
    goal_cell = maze.xy_to_ij(maze.cur_goal_xy)
    done, step = False, 0
    while not done:
        x, y = maze.get_xy().tolist()  # `observation` is from before a teleport
        target_x, target_y = next_xy(maze.xy_to_ij((x, y)), goal_cell)
        dx, dy = target_x - x, target_y - y
        norm = math.hypot(dx, dy) + 1e-6
        noisy = dx / norm + noise[step][0], dy / norm + noise[step][1]
        action = np.array([min(max(a, -1.0), 1.0) for a in noisy])  # np.clip takes as long as half an environment step
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"] and recipe.kind == "navigate":
            goal = goals[np.random.randint(len(goals))]
            maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
            goal_cell = maze.xy_to_ij(maze.cur_goal_xy)
        for add, value in zip(append, (observation, action, done, info["prev_qpos"], info["prev_qvel"]), strict=True):
            add(value)
        observation, step = next_observation, step + 1
    return columns


def free_cells(maze: np.ndarray) -> list[tuple[int, int]]:
    """Cells of a maze, (row, column), that are no wall."""
    return [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]


def corners(maze: np.ndarray) -> list[tuple[int, int]]:
    """Free cells that are not the middle of a straight corridor: corners, crossings, dead ends."""

    def straight(i: int, j: int) -> bool:
        vertical, horizontal = (maze[i - 1, j], maze[i + 1, j]), (maze[i, j - 1], maze[i, j + 1])
        return (vertical, horizontal) in (((0, 0), (1, 1)), ((1, 1), (0, 0)))

    return [cell for cell in free_cells(maze) if not straight(*cell)]


# --- All episodes ------------------------------------------------------------------------------------------------


def _collect_block(job: tuple[Recipe, int, range, Path]) -> int:
    """Collects some episodes into one file; returns how many."""
    recipe, seed, numbers, path = job
    episodes = [collect_episode(recipe, seed, number) for number in numbers]
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{key: np.concatenate([e[key] for e in episodes]) for key in episodes[0]})
    return len(numbers)


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, also where that was killed; on Ctrl-C, too."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _is_intact(block: Path) -> bool:
    """Whether a block is there and can be read."""
    try:
        with zipfile.ZipFile(block) as archive:
            return archive.testzip() is None
    except Exception:  # a damaged archive raises a dozen types
        return False


def _join(blocks: list[Path], path: Path) -> None:
    """Writes what `numpy.savez_compressed` would of all blocks one after the other, holding one array at a time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with np.load(blocks[0]) as first:
            keys = first.files
        for key in keys:
            parts = []
            for block in blocks:
                with np.load(block) as file:
                    parts.append(file[key])
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.concatenate(parts), allow_pickle=False)


def collect(
    dataset_name: str,
    train_path: Path,
    *,
    episodes: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    **changes: Any,
) -> None:
    """Collects `episodes` training and `max(1, episodes // 10)` validation episodes and writes both files.

    The validation file has `-val` before its ending. Each file is written under a temporary name and renamed, with the
    training file last: where it stands, its validation file and its description stand too.

    Args:
        changes: fields of `Recipe` that differ from OGBench's.

    Raises:
        UserError: the dataset has no scripted behaviour here, or `episodes` is not positive.
    """
    recipe = recipe_of(dataset_name)
    if recipe is None:
        raise UserError(
            f"{dataset_name!r} cannot be collected, {why_not_collectable(dataset_name)}: collect play or noisy data of "
            f"cube, scene and puzzle, or navigate or stitch data of pointmaze, or pass a file with --dataset."
        )
    recipe = recipe._replace(**changes)
    episodes = recipe.episodes if episodes is None else episodes
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    recipe = recipe._replace(episodes=episodes)
    try:
        train_path.parent.mkdir(parents=True, exist_ok=True)
        with locked(train_path.with_name(f".{train_path.name}.lock")):
            if not train_path.is_file():  # else another process has collected it meanwhile
                _collect(dataset_name, recipe, train_path, seed, workers or num_cores())
    except OSError as error:
        raise UserError(f"{train_path} cannot be written ({error}): collect it elsewhere with --out FILE.") from None


def _collect_blocks(jobs: list[tuple[Recipe, int, range, Path]], workers: int, collected: Callable[[int], Any]) -> None:
    """Collects blocks in several processes; calls `collected` with the number of episodes of each."""
    spawn, others = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    with ProcessPoolExecutor(workers, spawn, _end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(_collect_block, job) for job in jobs]):
                collected(done.result())
        except BrokenProcessPool:  # which has ended the other processes
            raise UserError(
                "a collecting process died: if memory ran out, free some, or pass fewer --workers to "
                "common.data.collect; then run it again: the blocks that are done are kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()).difference(others):
                process.terminate()  # else the pool waits for the blocks that they are collecting
            raise


def _collect(dataset_name: str, recipe: Recipe, train_path: Path, seed: int, workers: int) -> None:
    validation = max(1, recipe.episodes // 10)
    description = {
        "dataset": dataset_name,
        "source": "collected",
        **recipe._asdict(),
        "validation_episodes": validation,
        "seed": seed,
        "versions": package_versions(),
    }

    # Blocks of an earlier, killed collection are used again, if it was the same one.
    folder = train_path.with_name(f".{train_path.stem}.blocks")
    if read_json(folder / "description.json") != plain(description):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "description.json", description)
    size = max(1, BLOCK_ROWS // recipe.rows)
    parts = {
        validation_path(train_path): range(recipe.episodes, recipe.episodes + validation),
        train_path: range(recipe.episodes),
    }
    blocks = {path: [numbers[i : i + size] for i in range(0, len(numbers), size)] for path, numbers in parts.items()}
    files = {path: [folder / f"{b.start}-{b.stop}.npz" for b in some] for path, some in blocks.items()}
    jobs = [
        (recipe, seed, numbers, file)
        for path in reversed(list(blocks))
        for numbers, file in zip(blocks[path], files[path], strict=True)
        if not _is_intact(file)
    ]
    left = sum(len(numbers) for _, _, numbers, _ in jobs)
    total = recipe.episodes + validation
    with progress(desc=f"collecting {dataset_name}", unit="episode", total=total, initial=total - left) as bar:
        if jobs:
            _collect_blocks(jobs, min(workers, len(jobs)), bar.update)

    write_json(train_path.with_suffix(".json"), description)
    for path, some in files.items():
        with atomic(path) as temporary:
            _join(some, temporary)
            record_sha256(temporary, path)
    shutil.rmtree(folder)


def main(args: Args) -> None:
    check(args)
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder: name a file in it.")
    dataset_name = parse_env(args.env).dataset
    fields = ("noise", "noise_smoothing", "min_norm", "random_actions")
    changes = {field: getattr(args, field) for field in fields if getattr(args, field) is not None}
    if args.out is None and changes:
        raise UserError("data made in another way than OGBench's must not stand under its name: pass --out FILE.")
    recipe = recipe_of(dataset_name)
    episodes = args.episodes if args.episodes is not None or recipe is None else recipe.episodes
    train_path = args.out or collected_path(dataset_name, episodes or 0, args.seed)
    if train_path.is_file():
        raise UserError(f"{train_path} stands already: delete it to collect it again, or pass --out FILE.")
    collect(dataset_name, train_path, episodes=episodes, seed=args.seed, workers=args.workers, **changes)
    print(f"wrote {train_path} and its validation file")


if __name__ == "__main__":
    run_cli(main, Args)
