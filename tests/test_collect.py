"""Collected data: OGBench's layout and loop, the same from any number of processes."""

import contextlib
import json
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from common import collect, envs
from common.errors import UserError, parse_args
from tests.helpers import contents

ROWS = 40


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
    for path, episodes in ((collected, 2), (envs.validation_path(collected), 1)):
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


def test_number_of_processes_changes_nothing(collected: Path, tmp_path: Path):
    collect.collect("cube-double-play-v0", tmp_path / "cube-double.npz", episodes=2, rows=ROWS, workers=1)
    one, two = contents(tmp_path), contents(collected.parent)
    assert one.keys() == two.keys() == {"cube-double.npz", "cube-double-val.npz", "cube-double.json"}
    for name in one:
        if name.endswith(".npz"):
            first, second = load(tmp_path / name), load(collected.parent / name)
            assert all(first[key].tobytes() == second[key].tobytes() for key in collect.KEYS), name


def test_episodes_differ_by_seed_and_number(collected: Path):
    """Validation continues the count of episodes, so that none of its episodes is a training episode."""
    first, second = np.split(load(collected)["observations"], 2)
    third = load(envs.validation_path(collected))["observations"]
    other = collect.collect_episode(("cube-double", 1, 0, 0.1, 0.5, ROWS))["observations"]
    same = collect.collect_episode(("cube-double", 0, 0, 0.1, 0.5, ROWS))["observations"]
    np.testing.assert_array_equal(same, first)
    found = [first, second, third, other]
    assert all(not np.array_equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_an_episode_is_ogbenchs_loop():
    """OGBench's collection loop, written out: random targets, the plan oracle, a new plan when one is done."""
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

    rows, plans = 250, 0  # a plan takes about a hundred steps
    env = gymnasium.make("cube-double-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=rows)
    oracle = CubePlanOracle(env=env, noise=0.2, noise_smoothing=0.7)
    env_seed, oracle_seed = np.random.SeedSequence([3, 11]).generate_state(2)
    np.random.seed(oracle_seed)
    observation, info = env.reset(seed=int(env_seed))
    p_stack = np.random.uniform(0.0, 0.25)
    oracle.reset(observation, info)
    expected = {key: [] for key in collect.KEYS}
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

    found = collect.collect_episode(("cube-double", 3, 11, 0.2, 0.7, rows))
    for key in collect.KEYS:
        np.testing.assert_array_equal(found[key], np.array(expected[key]).astype(found[key].dtype), err_msg=key)


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
        "episodes": 2,
        "validation_episodes": 1,
        "rows_per_episode": ROWS,
        "seed": 0,
        "noise": 0.1,
        "noise_smoothing": 0.5,
    }


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("cube-single-play-v0", True),
        ("cube-octuple-play", True),
        ("cube-double-noisy-v0", False),
        ("visual-cube-single-play-v0", False),
        ("scene-play-v0", False),
        ("pointmaze-medium-navigate-v0", False),
    ],
)
def test_is_collectable(dataset: str, expected: bool):
    assert collect.is_collectable(dataset) is expected


def test_what_has_no_scripted_behaviour_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match=r"'scene-play-v0' cannot be collected.*cube-double.*--dataset"):
        collect.collect("scene-play-v0", tmp_path / "data.npz", episodes=1)
    with pytest.raises(UserError, match="episodes must be at least 1, not 0"):
        collect.collect("cube-single-play-v0", tmp_path / "data.npz", episodes=0)
    assert contents(tmp_path) == {}


@contextlib.contextmanager
def inline_pool(workers: int):
    """`multiprocessing.Pool` without processes."""
    yield types.SimpleNamespace(imap=map)


@pytest.mark.parametrize("failing", ["rollout", "validation file", "training file"])
def test_a_failure_leaves_no_training_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    """Where the training file stands, everything stands: fails if it is written early, or under its final name."""
    path = tmp_path / "data.npz"
    written = []

    def episode(job):
        if failing == "rollout" and job[2] == 1:
            raise RuntimeError("no rollout")
        return {key: np.zeros(3, bool if key == "terminals" else np.float32) for key in collect.KEYS}

    def savez(file, **arrays):
        file.write(b"half")
        if failing == ("training file" if written else "validation file"):
            raise OSError("disk full")
        written.append(file)

    monkeypatch.setattr(collect.multiprocessing, "get_context", lambda _: types.SimpleNamespace(Pool=inline_pool))
    monkeypatch.setattr(collect, "collect_episode", episode)
    monkeypatch.setattr(collect.np, "savez_compressed", savez)
    with pytest.raises((RuntimeError, OSError), match=r"no rollout|disk full"):
        collect.collect("cube-single-play-v0", path, episodes=2)
    complete = {
        "rollout": set(),
        "validation file": {"data.json"},
        "training file": {"data.json", "data-val.npz"},
    }
    assert set(contents(tmp_path)) == complete[failing]


def test_command_line_writes_into_ogbenchs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(collect, "collect", lambda *args, **kwargs: calls.append((args, kwargs)))
    collect.main(parse_args(collect.Args, {}, ["--env", "cube-single-play", "--episodes", "3", "--seed", "5"]))
    path = tmp_path / ".ogbench/data/collected/cube-single-play-v0-ep3-seed5.npz"
    settings = dict(episodes=3, seed=5, noise=0.1, noise_smoothing=0.5, workers=None)
    assert calls == [(("cube-single-play-v0", path), settings)]
    assert str(path) in capsys.readouterr().out
