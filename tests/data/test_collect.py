"""Collected data: OGBench's layout and loop, the same from any number of processes."""

import concurrent.futures
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from common.cli import parse_args
from common.data import collect, names
from common.errors import UserError
from tests import processes
from tests.helpers import contents, mostly_slow

ROWS = 40
KEYS = ("observations", "actions", "terminals", "qpos", "qvel")


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training episodes and one of validation, by two processes."""
    path = tmp_path_factory.mktemp("collected") / "data" / "cube-double.npz"
    collect.collect("cube-double-play-v0", path, episodes=2, rows=ROWS, workers=2)
    return path


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_keys_types_and_shapes_are_ogbenchs(collected: Path):
    """cube-double has 37 observed numbers and 5 actions; 14 joints and 2 cubes of 7 (6) make 28 qpos (26 qvel)."""
    columns = dict(observations=(37,), actions=(5,), terminals=(), qpos=(28,), qvel=(26,))
    for path, episodes in ((collected, 2), (names.validation_path(collected), 1)):
        arrays = load(path)
        assert {key: array.shape for key, array in arrays.items()} == {
            key: (episodes * ROWS, *shape) for key, shape in columns.items()
        }
        assert {key: array.dtype for key, array in arrays.items()} == {
            key: np.dtype(bool if key == "terminals" else np.float32) for key in columns
        }
        assert np.flatnonzero(arrays["terminals"]).tolist() == [ROWS * (i + 1) - 1 for i in range(episodes)]


def test_actions_stay_in_range_and_reach_its_end(collected: Path):
    actions = load(collected)["actions"]
    assert np.abs(actions).max() == 1.0 and np.abs(actions).min() < 0.5


def test_rows_follow_one_another(collected: Path):
    """Joint angles of the observation are those of qpos, and jump only between episodes."""
    arrays = load(collected)
    np.testing.assert_allclose(arrays["observations"][:, :6], arrays["qpos"][:, :6], atol=1e-6)
    jumps = np.abs(np.diff(arrays["qpos"][:, :3], axis=0)).max(axis=1)
    assert np.argmax(jumps) == ROWS - 1
    assert 1e-4 < np.median(jumps) < 0.1


def assert_same_datasets(one: Path, two: Path) -> None:
    for first, second in ((one, two), (names.validation_path(one), names.validation_path(two))):
        arrays, others = load(first), load(second)
        assert arrays.keys() == others.keys()
        assert all(arrays[key].tobytes() == others[key].tobytes() for key in arrays)


def test_number_of_processes_changes_nothing(collected: Path, tmp_path: Path):
    collect.collect("cube-double-play-v0", tmp_path / "cube-double.npz", episodes=2, rows=ROWS, workers=1)
    files = {"cube-double.npz", "cube-double-val.npz", "cube-double.json"}
    files |= {f"{name}.sha256" for name in files if name.endswith(".npz")} | {".cube-double.npz.lock"}
    assert contents(tmp_path).keys() == contents(collected.parent).keys() == files
    assert_same_datasets(tmp_path / "cube-double.npz", collected)


@pytest.mark.parametrize(
    ("dataset", "number", "rows"),
    [("scene-noisy", 1, 110), ("puzzle-3x3-noisy", 2, 60), ("pointmaze-teleport-navigate", 2, 200)],
)
def test_an_episode_does_not_depend_on_those_before_it(dataset: str, number: int, rows: int):
    """Also where environments keep something from one episode to the next: the scene remembers its last targets, and
    the noisy oracles see them for one step (here at step 99, when the cube's turn ends and a button's begins)."""
    recipe = collect.recipe_of(f"{dataset}-v0")._replace(rows=rows)
    env, _ = collect._environment(recipe)
    found = []
    for before in (0, 1):
        if dataset.startswith("scene"):
            env.unwrapped._target_button, env.unwrapped._target_button_states = before, np.array([before, before])
        else:
            collect.collect_episode(recipe, 0, 3 + before)
        found.append(collect.collect_episode(recipe, 0, number))
    collect._environment.cache_clear()
    found.append(collect.collect_episode(recipe, 0, number))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for key in other:
            np.testing.assert_array_equal(found[0][key], other[key], err_msg=key)


def test_episodes_differ_by_seed_and_number(collected: Path):
    """Validation continues the count of episodes, so that none of its episodes is a training episode."""
    first, second = np.split(load(collected)["observations"], 2)
    third = load(names.validation_path(collected))["observations"]
    recipe = collect.recipe_of("cube-double-play-v0")._replace(rows=ROWS)
    other = collect.collect_episode(recipe, 1, 0)["observations"]
    same = collect.collect_episode(recipe, 0, 0)["observations"]
    np.testing.assert_array_equal(same, first)
    found = [first, second, third, other]
    assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])


def make(name: str, rows: int, **options):
    return gymnasium.make(f"{name}-v0", terminate_at_goal=False, max_episode_steps=rows, **options)


def assert_episode(found: dict[str, np.ndarray], expected: dict[str, list]) -> None:
    assert found.keys() == expected.keys()
    for key in found:
        np.testing.assert_array_equal(found[key], np.array(expected[key]).astype(found[key].dtype), err_msg=key)


def test_a_play_episode_is_ogbenchs_loop():
    """OGBench's collection loop, written out: random targets, the plan oracle, a new plan when one is done."""
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    rows, plans = 250, 0  # a plan takes about a hundred steps
    env = make("cube-double", rows, mode="data_collection")
    oracle = CubePlanOracle(env=env, noise=0.2, noise_smoothing=0.7)
    env_seed, oracle_seed = np.random.SeedSequence([3, 11]).generate_state(2)
    np.random.seed(oracle_seed)
    observation, info = env.reset(seed=int(env_seed))
    p_stack = np.random.uniform(0.0, 0.25)
    oracle.reset(observation, info)
    expected = {key: [] for key in KEYS}
    for step in range(rows):
        action = np.clip(oracle.select_action(observation, info), -1, 1)
        expected["observations"].append(observation)
        expected["actions"].append(action)
        observation, _, _, _, info = env.step(action)
        expected["terminals"].append(step == rows - 1)
        expected["qpos"].append(info["prev_qpos"])
        expected["qvel"].append(info["prev_qvel"])
        if oracle.done:
            target_observation, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle.reset(target_observation, target_info)
            plans += 1
    env.close()
    assert plans >= 1
    recipe = collect.recipe_of("cube-double-play-v0")._replace(rows=rows, noise=0.2, noise_smoothing=0.7)
    assert_episode(collect.collect_episode(recipe, 3, 11), expected)


def test_a_noisy_scene_episode_is_ogbenchs_loop():
    """Four kinds of objects, each with its Markov oracle, one noise level per episode, and some random actions."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

    rows, handled = 400, []
    env = make("scene", rows, mode="data_collection")
    oracles = dict(
        cube=CubeMarkovOracle(env=env, min_norm=0.4, max_step=100),
        button=ButtonMarkovOracle(env=env, min_norm=0.4),
        drawer=DrawerMarkovOracle(env=env, min_norm=0.4),
        window=WindowMarkovOracle(env=env, min_norm=0.4),
    )
    env_seed, oracle_seed = np.random.SeedSequence([0, 1]).generate_state(2)
    np.random.seed(oracle_seed)
    scene = env.unwrapped  # was reset without a seed when it was made, and remembers the targets of that
    scene._target_button, scene._target_drawer_pos, scene._target_window_pos = 0, 0.0, 0.0
    scene._target_button_states[:] = 0
    scene.model.site("drawer_handle_center_target").pos[1] = 0.0
    scene.model.site("window_handle_center_target").pos[0] = 0.0
    observation, info = env.reset(seed=int(env_seed))
    p_stack = np.random.uniform(0.5, 0.5)
    xi = np.random.uniform(0, 0.1)
    handled.append(info["privileged/target_task"])
    oracle = oracles[handled[-1]]
    oracle.reset(observation, info)
    expected = {key: [] for key in (*KEYS, "button_states")}
    for step in range(rows):
        if np.random.rand() < 0.1:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = oracle.select_action(observation, info)
            action = np.array(action) + np.random.normal(0, [xi, xi, xi, 3 * xi, 10 * xi])
        action = np.clip(action, -1, 1)
        expected["observations"].append(observation)
        expected["actions"].append(action)
        observation, _, _, _, info = env.step(action)
        expected["terminals"].append(step == rows - 1)
        for key in ("qpos", "qvel", "button_states"):
            expected[key].append(info[f"prev_{key}"])
        if oracle.done:
            target_observation, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            handled.append(target_info["privileged/target_task"])
            oracle = oracles[handled[-1]]
            oracle.reset(target_observation, target_info)
    env.close()
    assert len(set(handled)) >= 2
    found = collect.collect_episode(collect.recipe_of("scene-noisy-v0")._replace(rows=rows), 0, 1)
    assert found["button_states"].dtype == np.int64 and found["button_states"].shape == (rows, 2)
    assert_episode(found, expected)


@pytest.mark.parametrize("kind", ["navigate", "stitch"])
def test_a_pointmaze_episode_is_ogbenchs_loop(kind: str):
    """Towards the next cell of the shortest path to the goal; a new goal when one is reached, but not to stitch."""
    rows = 400
    env = make("pointmaze-medium", rows)
    maze = env.unwrapped
    cells = [(i, j) for i in range(8) for j in range(8) if maze.maze_map[i, j] == 0]
    middle_of_a_corridor = [  # by hand, from the map of pointmaze-medium
        (i, j)
        for i, j in cells
        if (maze.maze_map[i - 1, j], maze.maze_map[i + 1, j], maze.maze_map[i, j - 1], maze.maze_map[i, j + 1])
        in ((0, 0, 1, 1), (1, 1, 0, 0))
    ]
    goals = [cell for cell in cells if cell not in middle_of_a_corridor]
    env_seed, global_seed = np.random.SeedSequence([5, 0]).generate_state(2)
    np.random.seed(global_seed)
    start = cells[np.random.randint(len(cells))]
    if kind == "stitch":
        _, steps = maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(start))
        near = [cell for cell in cells if steps[cell] == 4]
        goal = near[np.random.randint(len(near))]
        assert all(abs(i - start[0]) + abs(j - start[1]) <= 4 for i, j in near)
    else:
        goal = goals[np.random.randint(len(goals))]
    observation, _ = env.reset(seed=int(env_seed), options=dict(task_info=dict(init_ij=start, goal_ij=goal)))
    noise = np.random.normal(0, 0.5, (rows, 2))
    expected, reached = {key: [] for key in KEYS}, 0
    for step in range(rows):
        subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
        direction = (subgoal - maze.get_xy()) / (np.linalg.norm(subgoal - maze.get_xy()) + 1e-6)
        action = np.clip(direction + noise[step], -1, 1)
        expected["observations"].append(observation)
        expected["actions"].append(action)
        observation, _, _, _, info = env.step(action)
        expected["terminals"].append(step == rows - 1)
        expected["qpos"].append(info["prev_qpos"])
        expected["qvel"].append(info["prev_qvel"])
        if info["success"]:
            reached += 1
            if kind == "navigate":
                goal = goals[np.random.randint(len(goals))]
                maze.set_goal(goal_xy=maze.add_noise(maze.ij_to_xy(goal)))
    env.close()
    assert reached >= 1
    found = collect.collect_episode(collect.recipe_of(f"pointmaze-medium-{kind}-v0")._replace(rows=rows), 5, 0)
    for key in found:
        np.testing.assert_allclose(found[key], np.array(expected[key]), atol=1e-5, err_msg=key)


def test_corners_are_all_but_the_middles_of_straight_corridors():
    """A ring of eight cells: four corners, and the middles of its four sides, of which one has a dead end."""
    maze = np.array(
        [
            [1, 1, 1, 1, 1, 1],
            [1, 0, 0, 0, 1, 1],
            [1, 0, 1, 0, 0, 1],
            [1, 0, 0, 0, 1, 1],
            [1, 1, 1, 1, 1, 1],
        ]
    )
    assert collect.free_cells(maze) == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (2, 4), (3, 1), (3, 2), (3, 3)]
    assert collect.corners(maze) == [(1, 1), (1, 3), (2, 3), (2, 4), (3, 1), (3, 3)]


def test_scene_episodes_in_which_the_cube_leaves_are_made_again(monkeypatch: pytest.MonkeyPatch):
    """The cube may lie beyond -0.3 m only in the open drawer, which is 6 to 8 cm high; beyond 0.29 m nowhere."""
    qpos = np.zeros((5, 25))
    assert collect.is_healthy(qpos)
    for y, z, healthy in ((0.28, 0.0, True), (0.29, 0.07, False), (-0.3, 0.07, True), (-0.3, 0.05, False),
                          (-0.35, 0.09, False), (-0.29, 0.5, True)):  # fmt: skip
        qpos[3, 15:17] = y, z
        assert collect.is_healthy(qpos) == healthy

    verdicts = iter([False, False, True])
    monkeypatch.setattr(collect, "is_healthy", lambda qpos: next(verdicts))
    recipe = collect.recipe_of("scene-play-v0")._replace(rows=ROWS)
    third = collect.collect_episode(recipe, 0, 0)["observations"]
    monkeypatch.setattr(collect, "is_healthy", lambda qpos: True)
    first = collect.collect_episode(recipe, 0, 0)["observations"]
    assert len(third) == len(first) == ROWS and not np.array_equal(first, third)
    assert next(verdicts, None) is None


@pytest.mark.parametrize("compact", [True, False])
def test_ogbench_reads_the_file(collected: Path, compact: bool):
    from ogbench.utils import load_dataset

    arrays, theirs = load(collected), load_dataset(str(collected), compact_dataset=compact, add_info=True)
    if compact:
        np.testing.assert_array_equal(theirs["observations"], arrays["observations"])
        np.testing.assert_array_equal(theirs["valids"], 1.0 - arrays["terminals"])
    else:
        kept = np.flatnonzero(~arrays["terminals"])
        assert len(kept) == 2 * (ROWS - 1)
        np.testing.assert_array_equal(theirs["observations"], arrays["observations"][kept])
        np.testing.assert_array_equal(theirs["next_observations"], arrays["observations"][kept + 1])
        np.testing.assert_array_equal(theirs["actions"], arrays["actions"][kept])
        np.testing.assert_array_equal(theirs["qpos"], arrays["qpos"][kept])


def test_the_description_says_where_the_data_comes_from(collected: Path):
    description = json.loads(collected.with_suffix(".json").read_text())
    assert description.pop("versions").keys() >= {"python", "ogbench", "mujoco", "numpy"}
    assert description == {
        "dataset": "cube-double-play-v0",
        "source": "collected",
        "env": "cube-double",
        "kind": "play",
        "episodes": 2,
        "validation_episodes": 1,
        "rows": ROWS,
        "seed": 0,
        "noise": 0.1,
        "noise_smoothing": 0.5,
        "min_norm": 0.4,
        "random_actions": 0.0,
        "stacking": [0.0, 0.25],
    }


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cube-single-play-v0", dict(episodes=1000, rows=1001, noise=0.1, random_actions=0.0, stacking=(0.0, 0.0))),
        ("cube-triple-noisy-v0", dict(episodes=3000, rows=1001, noise=0.1, random_actions=0.1, stacking=(0.05, 0.35))),
        ("scene-play-v0", dict(episodes=1000, rows=1001, noise=0.1, random_actions=0.0)),
        ("puzzle-4x6-noisy-v0", dict(episodes=5000, rows=1001, random_actions=0.2, min_norm=0.4)),
        ("pointmaze-large-navigate-v0", dict(episodes=1000, rows=1001, noise=0.5)),
        ("pointmaze-giant-navigate-v0", dict(episodes=500, rows=2001, noise=0.5)),
        ("pointmaze-medium-stitch-v0", dict(episodes=5000, rows=201, noise=0.5)),
        ("pointmaze-medium-explore-v0", None),
        ("visual-cube-single-play-v0", None),
        ("antmaze-large-navigate-v0", None),
        ("scene-navigate-v0", None),
    ],
)
def test_recipes_are_those_of_ogbenchs_files(dataset: str, expected: dict | None):
    """The numbers with which OGBench's repository says its published files were made."""
    recipe = collect.recipe_of(dataset)
    assert collect.is_collectable(dataset) is (expected is not None)
    assert expected is None or expected.items() <= recipe._asdict().items()


def test_what_has_no_scripted_behaviour_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match=r"'antmaze-giant-stitch-v0' cannot be collected.*trained experts.*--dataset"):
        collect.collect("antmaze-giant-stitch-v0", tmp_path / "data.npz", episodes=1)
    with pytest.raises(UserError, match=r"'pointmaze-large-explore-v0' cannot be collected, .*'explore' data of it"):
        collect.collect("pointmaze-large-explore-v0", tmp_path / "data.npz", episodes=1)
    with pytest.raises(UserError, match="episodes must be at least 1, not 0"):
        collect.collect("cube-single-play-v0", tmp_path / "data.npz", episodes=0)
    assert contents(tmp_path) == {}


class InlineExecutor(concurrent.futures.Executor):
    """`ProcessPoolExecutor` without processes."""

    def __init__(self, workers: int, context: object, initializer: Callable):
        pass

    def submit(self, function: Callable, *args: object) -> concurrent.futures.Future:
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.mark.parametrize("failing", ["rollout", "validation file", "training file"])
def test_a_failure_leaves_no_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    """Where the training file stands, everything stands: fails if it is written early, or under its final name."""
    path = tmp_path / "data.npz"
    written = []

    def episode(recipe, seed, number):
        if failing == "rollout" and number == 1:
            raise RuntimeError("no rollout")
        return {key: np.zeros(3, bool if key == "terminals" else np.float32) for key in KEYS}

    def join(blocks, path, join=collect._join):
        join(blocks, path)
        if failing == ("training file" if written else "validation file"):
            raise OSError("disk full")
        written.append(path)

    monkeypatch.setattr(collect, "ProcessPoolExecutor", InlineExecutor)
    monkeypatch.setattr(collect, "collect_episode", episode)
    monkeypatch.setattr(collect, "_join", join)
    with pytest.raises((RuntimeError, UserError), match=r"no rollout|cannot be written \(disk full\)"):
        collect.collect("cube-single-play-v0", path, episodes=2)
    complete = {
        "rollout": set(),
        "validation file": {"data.json"},
        "training file": {"data.json", "data-val.npz", "data-val.npz.sha256"},
    }
    assert {name for name in contents(tmp_path) if not name.startswith(".")} == complete[failing]


@pytest.mark.slow
def test_a_killed_collection_goes_on(tmp_path: Path):
    """`kill -9` at random moments, then one that may finish: the same dataset as without, no block collected twice.

    Fails if a file stands under the dataset's name before all is done, or if blocks of another collection are used.
    """
    options = dict(episodes=30, rows=200)
    whole, path = tmp_path / "whole" / "maze.npz", tmp_path / "killed" / "maze.npz"
    collect.collect("pointmaze-medium-navigate-v0", whole, workers=1, **options)
    command = (
        "import sys; from pathlib import Path; from common.data import collect; collect.BLOCK_ROWS = 600\n"
        "if __name__ == '__main__':\n"
        "    print('ready', flush=True)\n"
        f"    collect.collect('pointmaze-medium-navigate-v0', Path(sys.argv[1]), workers=1, **{options})\n"
    )
    script = tmp_path / "script.py"
    script.write_text(command)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    folder, rng, seen = path.parent / ".maze.blocks", random.Random(0), []
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, script, path], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        done = len(list(folder.glob("[0-9]*-*.npz")))
        while process.poll() is None and len(list(folder.glob("[0-9]*-*.npz"))) <= done:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.wait()
        process.stdout.close()
        seen.append(len(list(folder.glob("[0-9]*-*.npz"))))
        assert not path.is_file() and not names.validation_path(path).is_file()
    assert seen == sorted(seen) and 6 <= seen[-1] < 11, seen
    damaged = next(folder.glob("[0-9]*-*.npz"))  # as after a power failure: its end is there, its middle is not
    damaged.write_bytes(damaged.read_bytes()[:500] + b"\0" * 500 + damaged.read_bytes()[1000:])
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("[0-9]*-*.npz")}
    shutil.copytree(folder, tmp_path / "copy")

    collected = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "BLOCK_ROWS", 600)
        patch.setattr(collect, "ProcessPoolExecutor", InlineExecutor)
        patch.setattr(
            collect, "_collect_block", lambda job, make=collect._collect_block: collected.append(job) or make(job)
        )
        collect.collect("pointmaze-medium-navigate-v0", path, workers=1, **options)
    assert len(collected) == 11 - len(before) + 1
    assert_same_datasets(path, whole)
    assert not folder.exists()

    # Blocks of a collection with another seed are no use.
    other = tmp_path / "other" / "maze.npz"
    shutil.copytree(tmp_path / "copy", other.parent / ".maze.blocks")
    collect.collect("pointmaze-medium-navigate-v0", other, workers=1, seed=1, **options)
    assert not np.array_equal(load(other)["actions"][:3], load(whole)["actions"][:3])


SCRIPT = """
from pathlib import Path
from common.data import collect, names
from common.cli import run_cli

if __name__ == "__main__":
    run_cli(lambda _: collect.collect("pointmaze-medium-navigate-v0", Path("maze.npz"), workers=2), collect.Args)
"""


@pytest.mark.parametrize("number", mostly_slow([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], but=[signal.SIGTERM]))
def test_no_exit_leaves_processes_behind(tmp_path: Path, number: int):
    """Ctrl-C goes to all processes, as from a terminal; the others to the first one alone. Within seconds none is
    left, though the whole collection would take minutes."""
    with processes.start(SCRIPT, tmp_path) as process:
        workers = processes.wait_for_workers(process, 2)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        code = -number if number == signal.SIGKILL else 128 + number
        assert process.wait(20) == code
        assert processes.all_end(workers)
        said = processes.said(tmp_path)
        assert "Traceback" not in said and ("interrupted." in said) == (number == signal.SIGINT), said


def test_a_worker_that_dies_is_reported(tmp_path: Path):
    """Fails if the collection waits for it."""
    with processes.start(SCRIPT, tmp_path) as process:
        workers = processes.wait_for_workers(process, 2)
        workers[0].kill()
        assert process.wait(20) == 2
        assert processes.all_end(workers)
        assert processes.said(tmp_path).splitlines()[-1] == (
            "error: a collecting process died: if memory ran out, free some, or pass fewer --workers to "
            "common.data.collect; then run it again: the blocks that are done are kept."
        )


def test_the_files_are_those_of_numpys_savez(tmp_path: Path):
    """One array at a time goes into the archive; NumPy reads the same arrays as from its own."""
    rng, blocks = np.random.default_rng(0), []
    for i in range(3):
        blocks.append(tmp_path / f"{i}.npz")
        np.savez(blocks[-1], observations=rng.normal(size=(4, 2)).astype(np.float32), terminals=np.arange(4) == 3)
    collect._join(blocks, tmp_path / "all.npz")
    found, parts = load(tmp_path / "all.npz"), [load(block) for block in blocks]
    assert found.keys() == {"observations", "terminals"}
    for key in found:
        np.testing.assert_array_equal(found[key], np.concatenate([part[key] for part in parts]))
        assert found[key].dtype == parts[0][key].dtype


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1, not 0"),
        (["--seed", "-1"], r"--seed must be in \[0, 2147483648\), not -1"),
        (["--noise", "-1"], "--noise must not be negative"),
        (["--random-actions", "1.5"], r"--random-actions must be in \[0, 1\], not 1.5"),
        (["--out", "."], r"--out \. is a folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(flags: list[str], words: str):
    with pytest.raises(UserError, match=words):
        collect.main(parse_args(collect.Args, {}, flags))


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*: collect it elsewhere with --out FILE"):
        collect.collect("pointmaze-medium-stitch-v0", tmp_path / "file" / "maze.npz", episodes=1, rows=10, workers=1)


def test_a_second_collection_of_the_same_waits_and_finds_it_done(tmp_path: Path):
    path = tmp_path / "maze.npz"
    calls = [threading.Thread(target=collect.collect, args=("pointmaze-medium-stitch-v0", path),
                              kwargs=dict(episodes=2, rows=30, workers=1)) for _ in range(2)]  # fmt: skip
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    changed = path.stat().st_mtime_ns
    assert load(path)["actions"].shape == (60, 2)
    collect.collect("pointmaze-medium-stitch-v0", path, episodes=2, rows=30, workers=1)
    assert path.stat().st_mtime_ns == changed


def test_command_line_writes_into_ogbenchs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(collect, "collect", lambda *args, **kwargs: calls.append((args, kwargs)))
    collect.main(parse_args(collect.Args, {}, ["--env", "cube-single-play", "--episodes", "3", "--seed", "5"]))
    path = tmp_path / ".ogbench/data/collected/cube-single-play-v0-ep3-seed5.npz"
    assert calls == [(("cube-single-play-v0", path), dict(episodes=3, seed=5, workers=None))]
    assert str(path) in capsys.readouterr().out

    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UserError, match="stands already: delete it"):
        collect.main(parse_args(collect.Args, {}, ["--env", "cube-single-play", "--episodes", "3", "--seed", "5"]))
    with pytest.raises(UserError, match="must not stand under its name: pass --out"):
        collect.main(parse_args(collect.Args, {}, ["--env", "cube-single-noisy", "--min-norm", "0.2"]))
    flags = [
        "--env",
        "cube-single-noisy",
        "--min-norm",
        "0.2",
        "--random-actions",
        "0.5",
        "--out",
        str(tmp_path / "a.npz"),
    ]
    collect.main(parse_args(collect.Args, {}, flags))
    changes = dict(episodes=1000, seed=0, workers=None, min_norm=0.2, random_actions=0.5)
    assert calls[1:] == [(("cube-single-noisy-v0", tmp_path / "a.npz"), changes)]
