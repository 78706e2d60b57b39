"""Roll-outs: every episode once, the same from any number of processes, and equal to a loop written by hand."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from common import environments
from common import episodes as roll_outs
from common.environments import seeded_reset
from common.episodes import EpisodeRunner, Episodes
from common.errors import UserError
from tests import processes
from tests.helpers import mostly_slow

GYM_IDS = ("cube-single-singletask-task2-v0", "cube-single-singletask-task4-v0")
HORIZON = 5
NUM_EPISODES = 3


def positions(info: dict) -> float:
    """A number that all of the arm's and the cube's movements go into."""
    return float(info["proprio/effector_pos"].sum() + info["privileged/block_0_pos"].sum())


def scripted_act(observations: np.ndarray, episodes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Chunks that depend on all three inputs: half a table of random numbers, half the observation."""
    table = np.random.default_rng(0).uniform(-1, 1, (NUM_EPISODES + 1, 200 // HORIZON + 1, HORIZON, 5))
    noise = table[np.minimum(episodes, NUM_EPISODES), steps // HORIZON]
    return (0.5 * noise + 0.5 * np.clip(observations[..., None, :5], -1, 1)).astype(np.float32)


def seed_of(seed: int, episode: int) -> int:
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


@pytest.fixture(scope="module")
def make_episodes() -> Iterator[Callable[[int], Episodes]]:
    """`make_episodes(workers)`, built once for each number of workers."""
    built: list[Episodes] = []

    @functools.cache
    def make(workers: int) -> Episodes:
        settings = dict(num_episodes=NUM_EPISODES, horizon=HORIZON, seed=7, probe=positions)
        built.append(Episodes(GYM_IDS, workers=workers, **settings))
        return built[-1]

    yield make
    for episodes in built:
        episodes.close()


@pytest.fixture(scope="module")
def rows(make_episodes) -> list[dict]:
    return make_episodes(2).run(scripted_act)


def test_one_row_per_replica_and_episode(rows: list[dict]):
    """Two processes with two environments each per replica, so that the fourth has no episode to run."""
    assert [(row["replica"], row["episode"]) for row in rows] == [(r, e) for r in range(2) for e in range(NUM_EPISODES)]
    assert all(row.keys() == {"replica", "episode", "success", "length", "total", "probe"} for row in rows)


def test_an_episode_that_is_never_solved_takes_all_its_time(rows: list[dict]):
    """cube-single ends after 200 steps, with reward -1 in each."""
    for row in rows:
        assert (row["success"], row["length"], row["total"]) == (0.0, 200, -200.0)
    assert len({row["probe"] for row in rows}) == len(rows)


def test_a_second_run_gives_the_same_rows(make_episodes, rows: list[dict]):
    """The environments have been moved about since the first run."""
    assert make_episodes(2).run(scripted_act) == rows


@pytest.mark.slow
def test_number_of_processes_changes_nothing(make_episodes, rows: list[dict]):
    assert make_episodes(1).run(scripted_act) == rows


def test_episodes_equal_a_loop_by_hand(rows: list[dict]):
    """Chunks of five are executed open loop: `act` sees only every fifth observation."""
    for replica, episode in ((0, 2), (1, 0)):
        env = environments.make_env(GYM_IDS[replica])
        observation, step, total, done = seeded_reset(env, seed_of(7, episode)), 0, 0.0, False
        while not done:
            if step % HORIZON == 0:
                seen = np.asarray(observation, np.float32)
                chunk = scripted_act(seen[None, None], np.array([[episode]]), np.array([[step]]))[0, 0]
            observation, _, terminated, truncated, info = env.step(chunk[step % HORIZON])
            step, total, done = step + 1, total + positions(info), terminated or truncated
        env.close()
        assert rows[replica * NUM_EPISODES + episode]["probe"] == total


def test_noise_in_the_actions():
    """Executed is the clipped sum; the noise is N(0, 0.5^2), depends on the reset's seed alone, and the first
    observation does not. Fails if the noise is drawn once, if it is not clipped, or if it comes from the environment's
    own generator."""
    executed = []

    class Recorder(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (1,))
        action_space = gymnasium.spaces.Box(-1, 1, (5,))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

        def step(self, action):
            executed.append(action)
            return self.np_random.uniform(-1, 1, 1).astype(np.float32), 0.0, False, False, {}

    env, plain = environments.ActionNoise(Recorder(), 0.5), Recorder()
    action = np.array([0.0, 0.25, -0.25, 0.9, -1.0], np.float32)
    observations = [env.reset(seed=3)[0], *(env.step(action)[0] for _ in range(2_000))]
    without = [plain.reset(seed=3)[0], *(plain.step(action)[0] for _ in range(2_000))]
    np.testing.assert_array_equal(observations, without)
    first, executed[:] = np.array(executed[:2_000]), []
    assert first.shape == (2_000, 5) and np.abs(first).max() == 1.0 and first.dtype == np.float32
    np.testing.assert_allclose(first[:, 0].mean(), 0.0, atol=4 * 0.5 / np.sqrt(2_000))
    np.testing.assert_allclose(first[:, 0].std(), 0.5 * 0.9594, atol=0.03)  # of N(0, 1) clipped to [-2, 2]: 0.9594
    env.reset(seed=3)
    env.step(action)
    np.testing.assert_array_equal(executed[0], first[0])
    env.reset(seed=4)
    env.step(action)
    assert not np.array_equal(executed[1], first[0])


@pytest.mark.slow
def test_noise_is_asked_for(make_episodes, rows: list[dict]):
    settings = dict(num_episodes=NUM_EPISODES, horizon=HORIZON, seed=7, probe=positions, workers=1)
    with Episodes(GYM_IDS, **settings, action_noise=0.3) as episodes:
        noisy = episodes.run(scripted_act)
    assert all(a["probe"] != b["probe"] and a["episode"] == b["episode"] for a, b in zip(noisy, rows, strict=True))


@pytest.mark.parametrize(
    "gym_id", ["cube-single-singletask-task2-v0", "scene-singletask-v0", "pointmaze-medium-singletask-v0"]
)
def test_seeded_reset_determines_the_roll_out(gym_id: str):
    """OGBench takes random steps in `reset` with an action space it never seeds. Fails if they leave a trace in the
    simulator: the start of its contact solver is part of the state that the next step depends on."""
    env = environments.make_env(gym_id)
    actions = np.random.default_rng(0).uniform(-1, 1, (40, *env.action_space.shape)).astype(np.float32)

    def roll_out(seed: int) -> tuple[np.ndarray, np.ndarray]:
        first = seeded_reset(env, seed)
        model, kind = env.unwrapped.model, mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, env.unwrapped.data, state, kind)
        return state, np.stack([first, *(env.step(action)[0] for action in actions)])

    (state, first), (_, other), (state_again, again) = roll_out(1), roll_out(2), roll_out(1)
    env.close()
    np.testing.assert_array_equal(state, state_again)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], other[0])


# --- The runner, on an environment whose every number is known ---------------------------------------------------


class Counter(gymnasium.Env):
    """Observes its number of steps, pays the action, ends after 4, 7, 10, ... steps, in success every other time."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    resets = 0

    def reset(self, *, seed=None, options=None):
        self.steps, self.limit = 0, 4 + 3 * self.resets
        self.resets += 1
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        done = self.steps == self.limit
        info = {"success": float(done and self.resets % 2)}
        return np.full(1, self.steps, np.float32), float(action[0]), done, False, info


@pytest.fixture
def runner() -> EpisodeRunner:
    """Slots 1 and 3 of four, seven episodes, chunks of three: slot 1 runs episodes 1 and 5, slot 3 runs episode 3."""
    settings = dict(make=lambda gym_id: Counter(), probe=lambda info: 2.0)
    return EpisodeRunner(("a",), [1, 3], num_slots=4, num_episodes=7, horizon=3, seed=0, **settings)


def test_the_runner_drops_the_rest_of_a_chunk_and_begins_the_next_episode(runner: EpisodeRunner):
    chunk = np.array([[[[1.0], [0.1], [0.01]]] * 2])
    state, _ = runner.reset()
    seen = [state]
    while state["active"].any():
        state, *_ = runner.step(chunk)
        seen.append(state)
    assert [s["episode"].tolist() for s in seen] == [
        [[1, 3]],
        [[1, 3]],
        [[5, 7]],  # both ended at the first action of the second chunk; 7 does not exist
        [[5, 7]],
        [[5, 7]],
        [[9, 7]],
    ]
    assert [s["active"].tolist() for s in seen] == [[[1, 1]]] * 2 + [[[1, 0]]] * 3 + [[[0, 0]]]
    assert [s["step"].tolist()[0][0] for s in seen] == [0, 3, 0, 3, 6, 0]
    assert [s["observation"].tolist()[0][0] for s in seen][:5] == [[0.0], [3.0], [0.0], [3.0], [6.0]]
    by_episode = {row["episode"]: row for row in runner.results}
    assert sorted(by_episode) == [1, 3, 5]
    for episode, success, length, total in ((1, 1.0, 4, 2.11), (3, 1.0, 4, 2.11), (5, 0.0, 7, 3.22)):
        row = by_episode[episode]
        assert (row["success"], row["length"], row["probe"]) == (success, length, 2.0 * length)
        assert row["total"] == pytest.approx(total)


def test_the_runner_starts_over_at_each_reset(runner: EpisodeRunner):
    runner.reset()
    runner.step(np.zeros((1, 2, 3, 1)))
    state, _ = runner.reset()
    assert state["episode"].tolist() == [[1, 3]] and state["step"].tolist() == [[0, 0]]
    assert [row["length"] for row in runner.results] == [0, 0]


# --- How episodes are spread -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "episodes", "workers"),
    [(1, 50, 1), (1, 50, 8), (1, 3, 16), (5, 50, 2), (5, 50, 4), (4, 50, 16), (20, 50, 16), (100, 50, 4)],
)
def test_environments_are_few_and_slots_cover_all_episodes(
    monkeypatch: pytest.MonkeyPatch, replicas: int, episodes: int, workers: int
):
    """Each environment takes memory and time to build: at most 250 where so many fit into the memory, or one per
    replica if there are more replicas."""
    monkeypatch.setattr(roll_outs, "max_environments", lambda: 250)
    monkeypatch.setattr(gymnasium.vector, "AsyncVectorEnv", lambda fns, context: types.SimpleNamespace(fns=fns))
    fns = Episodes(["x"] * replicas, num_episodes=episodes, workers=workers).vector.fns
    slots = [slot for fn in fns for slot in fn.args[1]]
    assert slots == list(range(len(slots)))
    assert all(fn.keywords["num_slots"] == len(slots) for fn in fns)
    assert len({len(fn.args[1]) for fn in fns}) == 1  # equal shapes in all processes
    assert len(fns) <= min(workers, episodes)
    assert replicas * len(slots) <= max(250, replicas)


SCRIPT = """
import numpy as np
from common.cli import run_cli
from common.episodes import Episodes
from evor_infer import Args

def main(args):
    with Episodes(("pointmaze-medium-singletask-task1-v0",), num_episodes=400, workers=2) as episodes:
        episodes.run(lambda observations, *_: np.zeros((*observations.shape[:2], 1, 2), np.float32))

if __name__ == "__main__":
    run_cli(main, Args)
"""


@pytest.mark.parametrize("number", mostly_slow([signal.SIGINT, signal.SIGTERM, signal.SIGKILL], but=[signal.SIGTERM]))
def test_no_exit_leaves_processes_behind(tmp_path: Path, number: int):
    """Ctrl-C goes to all processes, as from a terminal; the others to the first one alone. Within seconds none is
    left, though the whole evaluation would take minutes."""
    with processes.start(SCRIPT, tmp_path) as process:
        workers = processes.wait_for_workers(process, 2)
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        assert process.wait(20) == (-number if number == signal.SIGKILL else 128 + number)
        assert processes.all_end(workers)
        assert "Traceback" not in processes.said(tmp_path) or number == signal.SIGKILL


@pytest.mark.slow
def test_a_program_that_evaluates_when_it_is_imported_is_told_so(tmp_path: Path):
    with processes.start(SCRIPT.replace('if __name__ == "__main__":\n    run_cli', "run_cli"), tmp_path) as process:
        assert process.wait(120) == 2
    assert "put what it does under `if __name__ == '__main__':`" in processes.said(tmp_path)


def test_a_program_that_is_no_file_is_told_so(tmp_path: Path):
    settings = dict(input=SCRIPT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(processes.ROOT)})
    done = subprocess.run([sys.executable, "-"], cwd=tmp_path, **settings)
    assert done.returncode == 2
    assert done.stderr == (
        "error: worker processes import this program, which was read from stdin: save it as a file.\n"
    )


OWN = """
import gymnasium
import numpy as np
from common.episodes import Episodes

class Own(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), float(action.sum()), False, False, {}

if __name__ == "__main__":
    gymnasium.register("Own-v0", entry_point=ENTRY, max_episode_steps=5)
    with Episodes(("Own-v0",), num_episodes=3, workers=2) as episodes:
        rows = episodes.run(lambda observations, *_: np.ones((*observations.shape[:2], 1, 2), np.float32))
    assert [row["total"] for row in rows] == [10.0, 10.0, 10.0]
"""


@pytest.mark.parametrize("entry", ["Own", "'__main__:Own'", "lambda: Own()"])
def test_an_environment_that_only_the_program_registers(tmp_path: Path, entry: str):
    """Worker processes import the program, but do not run what stands under its `if __name__ == '__main__':`."""
    with processes.start(OWN.replace("ENTRY", entry), tmp_path) as process:
        assert process.wait(120) == 0, processes.said(tmp_path)


def test_the_simulator_starts_no_processes(tmp_path: Path):
    """Fails if one of its packages does, as glfw would, to try libraries: it prints a traceback if its parent ends."""
    (tmp_path / "script.py").write_text("""
import sys

started = []
events = {"subprocess.Popen", "os.posix_spawn", "os.system", "os.fork"}
sys.addaudithook(lambda event, args: started.append(args) if event in events else None)
from common.environments import make_env

make_env("pointmaze-medium-singletask-task1-v0")
make_env("cube-single-singletask-task1-v0")
assert "glfw" in sys.modules and not started, started
""")
    env = os.environ | {"PYTHONPATH": str(processes.ROOT), "MUJOCO_GL": "disable"}
    env.pop("PYGLFW_LIBRARY", None)
    subprocess.run([sys.executable, str(tmp_path / "script.py")], env=env, check=True)


def out_of_memory(info: dict) -> float:
    raise MemoryError("Unable to allocate 3 TiB")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium's report of the same
def test_an_error_in_a_worker_is_that_error():
    """And all processes end. Fails if closing them stumbles over the one that has nothing more to say."""
    settings = dict(num_episodes=2, workers=2, probe=out_of_memory)
    with (
        pytest.raises(MemoryError, match="Unable to allocate 3 TiB"),
        Episodes(("pointmaze-medium-singletask-task1-v0",), **settings) as episodes,
    ):
        episodes.run(lambda observations, *_: np.zeros((*observations.shape[:2], 1, 2), np.float32))
    assert not any(process.is_alive() for process in episodes.vector.processes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python 3.13 on a pipe that ends
def test_a_worker_that_dies_is_reported():
    """Fails if the evaluation waits for it, or goes on without its episodes."""
    with Episodes(("pointmaze-medium-singletask-task1-v0",), num_episodes=4, workers=2) as episodes:
        first, second = episodes.vector.processes

        def act(observations: np.ndarray, counts: np.ndarray, steps: np.ndarray) -> np.ndarray:
            if steps.max() == 3:
                first.kill()
                first.join()
            return np.zeros((*observations.shape[:2], 1, 2), np.float32)

        with pytest.raises(UserError, match=r"of the evaluation died \(SIGKILL\): .* --workers .* --resume\."):
            episodes.run(act)
    assert not second.is_alive()


def first_worker_dies(info: dict) -> float:
    if multiprocessing.current_process().name.endswith("-0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python 3.13 on a pipe that ends
def test_a_worker_that_dies_while_another_has_answered():
    """Fails if closing waits for the answers of a step: one of them never comes, and the others would be left."""
    settings = dict(num_episodes=2, workers=2, probe=first_worker_dies)
    with Episodes(("pointmaze-medium-singletask-task1-v0",), **settings) as episodes:
        with pytest.raises(UserError, match=r"of the evaluation died \(SIGKILL\)"):
            episodes.run(lambda observations, *_: np.zeros((*observations.shape[:2], 1, 2), np.float32))
        processes = episodes.vector.processes
        assert processes[0].name.endswith("-0") and episodes.vector.parent_pipes[1].poll(60.0)
    assert not any(process.is_alive() for process in processes)
