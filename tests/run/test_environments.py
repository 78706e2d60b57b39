"""Environments of Gymnasium: units, limits, what they say of success, and what of them does not fit."""

import sys
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces

import evor_bc
import evor_infer
import evor_value
from common import environments
from common.episodes import Episodes
from common.errors import UserError
from common.evaluation import score, score_text, summarise
from common.files import read_csv
from experiments import returns
from experiments.rows import Place
from tests.helpers import tiny_dataset


class Line(gymnasium.Env):
    """Moves a point by its action, in [0, 4]; the observation is a dictionary in no order."""

    observation_space = spaces.Dict(where=spaces.Box(-np.inf, np.inf, (1, 2)), age=spaces.Box(0, np.inf, (1,)))
    action_space = spaces.Box(0.0, 4.0, (1,))

    def observe(self) -> dict[str, np.ndarray]:
        return dict(where=np.array([[self.x, -self.x]], np.float32), age=np.array([self.age], np.float32))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        self.x, self.age = 0.0, 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self.x, self.age = self.x + float(action[0]), self.age + 1
        return self.observe(), self.x, False, False, {}


gymnasium.register("Line-v0", Line)


def Discrete() -> gymnasium.Env:
    return gymnasium.make("CartPole-v1").unwrapped


gymnasium.register("Discrete-v0", Discrete)


def test_actions_are_in_units_and_observations_vectors():
    """-1, 0 and 1 are 0, 2 and 4; keys in alphabetical order; cut after 10,000 steps where nobody says when."""
    env = environments.make_env("Line-v0")
    assert env.action_space == spaces.Box(-1.0, 1.0, (1,)) and env.observation_space.shape == (3,)
    assert env.reset(seed=0)[0].tolist() == [0.0, 0.0, 0.0]
    seen = [env.step(np.array([a], np.float32))[0].tolist() for a in (-1, 0, 1)]
    assert seen == [[1.0, 0.0, 0.0], [2.0, 2.0, -2.0], [3.0, 6.0, -6.0]]
    truncated = [env.step(np.zeros(1, np.float32))[3] for _ in range(9_997)]
    assert truncated[-1] and not any(truncated[:-1])


def test_noise_is_in_units_too():
    env = environments.make_env("Line-v0", 100.0)
    env.reset(seed=0)
    moved = {env.step(np.zeros(1, np.float32))[1] for _ in range(2)}
    assert moved <= {0.0, 4.0, 8.0}, "noise of 100 ends at one of the two ends"


def test_discrete_actions_are_refused():
    with pytest.raises(UserError, match=r"Discrete-v0 has actions of the kind Discrete: only continuous ones"):
        environments.make_env("Discrete-v0")


def test_what_an_agent_is_evaluated_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert environments.evaluation_id("cube-single-play", 3) == "cube-single-singletask-task3-v0"
    assert environments.evaluation_id("Pendulum-v1", 0) == "Pendulum-v1"
    assert environments.evaluation_id("my-robot", 0) is None
    assert environments.evaluation_id("cube-single-play", 0) is None
    (tmp_path / "robots_of_mine.py").write_text(
        "import gymnasium\ngymnasium.register('Mine-v0', 'gymnasium.envs.classic_control:PendulumEnv')\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert environments.evaluation_id("robots_of_mine:Mine-v0", 0) == "robots_of_mine:Mine-v0"
    environments.check_sizes("robots_of_mine:Mine-v0", {}, 3, 1)
    assert environments.episode_steps("robots_of_mine:Mine-v0") == environments.LONGEST
    with Episodes(("robots_of_mine:Mine-v0",), num_episodes=1, workers=1) as episodes:
        assert episodes.num_slots == 1
    with pytest.raises(UserError, match=r"--env Pendulum: Gymnasium has Pendulum-v1\."):
        environments.evaluation_id("Pendulum", 0)
    with pytest.raises(UserError, match=r"Gymnasium has Mine-v0\."):
        environments.evaluation_id("robots_of_mine:Mine", 0)
    with pytest.raises(UserError, match=r"no_such_module cannot be imported .*No module named"):
        environments.evaluation_id("no_such_module:Mine-v0", 0)


def test_a_program_that_is_no_file_is_told_so_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its worker processes could not import it, hours later."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
    data = tiny_dataset(tmp_path / "data.npz", action_dim=1)
    args = evor_value.Args(env="Pendulum-v1", dataset=data, run_dir=tmp_path / "run", eval_episodes=1)
    with pytest.raises(UserError, match="read from stdin"):
        evor_value.main(args)
    assert not (tmp_path / "run" / "bc").exists()


BROKEN = {
    "Reset": dict(reset=RuntimeError("no robot")),
    "Step": dict(step=RuntimeError("no robot")),
    "Nan": dict(observation=np.array([np.nan], np.float32)),
    "Wide": dict(observation=np.zeros((1, 1), np.float32)),
    "Long": dict(observation=np.zeros(2, np.float32)),
    "Reward": dict(reward=np.array([1.0, 2.0])),
    "NanReward": dict(reward=np.nan),
    "Word": dict(info=dict(success="yes")),
    "None": dict(info=dict(success=np.zeros(0))),
    "Parts": dict(info=dict(success={"a": True})),
}


class Broken(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1.0, 1.0, (1,)), spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, fault: dict[str, Any]):
        self.fault = fault
        self.observation = fault.get("observation", np.zeros(1, np.float32))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if "reset" in self.fault:
            raise self.fault["reset"]
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict]:
        if "step" in self.fault:
            raise self.fault["step"]
        return self.observation, self.fault.get("reward", 0.0), False, False, self.fault.get("info", {})


for _name, _fault in (BROKEN | {"Whole": {}}).items():
    gymnasium.register(f"{_name}-v0", Broken, kwargs=dict(fault=_fault), disable_env_checker=True)


@pytest.mark.parametrize("name", BROKEN)
def test_an_environment_that_does_not_run_is_found_out_at_the_start(name: str):
    environments.check_sizes("Whole-v0", {}, 1, 1)
    with pytest.raises(UserError, match=rf"{name}-v0 does not run .*--eval-episodes 0"):
        environments.check_sizes(f"{name}-v0", {}, 1, 1)


def test_a_constructor_that_fails_is_a_sentence():
    with pytest.raises(UserError, match=r"Pendulum-v1 cannot be made .*unexpected keyword argument 'colour'"):
        environments.make_env("Pendulum-v1", colour="red")


def test_actions_of_a_wrapper_count(capsys: pytest.CaptureFixture):
    """Of an environment that is discrete, or in other units, below a wrapper that its registration includes."""
    box = spaces.Box(0.0, 4.0, (1,))
    within = dict(
        Chosen=lambda: gymnasium.wrappers.TransformAction(Discrete(), lambda a: int(a[0] > 2), box),
        Scaled=lambda: gymnasium.wrappers.RescaleAction(Broken({}), np.float32(0), np.float32(4)),
    )
    for name, make in within.items():
        gymnasium.register(f"{name}-v0", make, disable_env_checker=True)
        environments.check_sizes(f"{name}-v0", {}, 1 if name == "Scaled" else 4, 1)
        assert f"actions in [-1, 1] are executed as [0.0] to [4.0] in {name}-v0" in capsys.readouterr().out


def test_an_environment_of_other_sizes_than_the_data():
    with pytest.raises(
        UserError, match=r"Pendulum-v1 has 3 numbers in an observation and 1 in an action, and the data 4"
    ):
        environments.check_sizes("Pendulum-v1", {}, 4, 1)


@pytest.mark.parametrize(
    ("info", "success"),
    [
        (dict(success=True), 1.0),
        (dict(is_success=0.0), 0.0),
        (dict(distance=3.0), np.nan),
        (dict(success=None), np.nan),
        (dict(success=np.array([True, False])), 0.0),
    ],
)
def test_what_is_said_of_success(info: dict[str, Any], success: float):
    assert environments.reported_success(info) == pytest.approx(success, nan_ok=True)


def test_reference_scores_are_d4rls():
    assert environments.reference_scores("Hopper-v5") == (-20.272305, 3234.3)
    assert environments.reference_scores("gymnasium:HalfCheetah-v4") == (-280.178953, 12135.0)
    assert environments.reference_scores("Pendulum-v1") is None
    assert environments.reference_scores("mine:Ant-Custom-v0") is None


def test_without_success_returns_are_summarised():
    """Mean 3 of the returns 1 to 5; a bootstrap of five numbers stays within them. With success, success alone."""
    rows = [dict(task=0, success=np.nan, total=float(i), length=9, normalised=10.0 * i) for i in range(1, 6)]
    (row,) = summarise(rows, ("task",))
    assert row["return"] == 3.0 and row["normalised"] == 30.0 and row["episodes"] == 5
    assert 1.0 < row["low"] < 2.2 and 3.8 < row["high"] < 5.0 and "success" not in row
    assert score_text(row).startswith("return 3.0 [") and score_text(row).endswith("], normalised score 30.0")
    solved = score([dict(success=1.0, total=5.0), dict(success=0.0, total=1.0)])
    assert solved.keys() == {"success", "low", "high"} and score_text(solved) == "success 50% [9%, 91%]"


@pytest.mark.slow
def test_a_file_of_d4rl_is_trained_on_and_evaluated_in_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Torques of [-2, 2] in the file, episodes of 200 steps without a word of success: returns everywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    arrays = dict(observations=rng.normal(size=(40, 3)), actions=rng.uniform(-2, 2, (40, 1)), rewards=-rng.random(40))
    arrays |= dict(terminals=np.zeros(40), timeouts=np.arange(40) % 20 == 19)
    with h5py.File("rows.hdf5", "w") as file:
        for key, array in arrays.items():
            file[key] = array
    tiny = dict(env="Pendulum-v1", dataset=Path("rows.hdf5"), steps=2, steps_per_call=2, width=8, depth=2, batch_size=4)
    evor_bc.main(evor_bc.Args(**tiny))
    few = dict(num_next_actions=1, num_actions=2, num_returns=2, flow_steps=1, eval_episodes=2)
    (alone, best) = evor_value.main(evor_value.Args(**tiny, **few))
    assert (alone["num_actions"], best["num_actions"]) == (1, 2) and best["mean_length"] == 200
    assert -1_800 < best["low"] <= best["return"] <= best["high"] < 0 and "success" not in best
    said = capsys.readouterr().out
    assert "plan, without compiling: 1 reward model, 2 steps: below 1 min; evaluation, at most: " in said
    assert f"best of 2            {score_text(best, 1)} of 2 episodes" in said
    metrics = read_csv(Path("runs/Pendulum-v1/value/metrics.csv"))
    assert [float(row["value"]) for row in metrics if row["metric"] == "return"] == [best["return"]]
    (rows,) = returns.gather_all([Path("runs/Pendulum-v1")])
    assert rows.groupby("policy", sort=False).size().to_dict() == {
        "behaviour": 2, "base policy alone": 2, "`shared-noise`, best of 2": 2
    }  # fmt: skip
    behaviour = rows[rows["policy"] == "behaviour"]["total"].astype(float)  # each lost its last transition
    np.testing.assert_allclose(behaviour, arrays["rewards"].reshape(2, 20)[:, :-1].sum(axis=1), rtol=1e-5)
    table = returns.draw([rows], Place(tmp_path, "beyond-ogbench", tmp_path))
    assert f"| Pendulum-v1 | `shared-noise`, best of 2 | {best['return']:.0f} [" in table
    sweep = dict(num_actions=(1, 2), num_returns=(2,), flow_steps=1, eval_episodes=2, workers=1)
    again = evor_infer.main(evor_infer.Args(env="Pendulum-v1", **sweep))
    assert [row["return"] for row in again] == pytest.approx([alone["return"], best["return"]])
    assert f"{score_text(again[1])} of 2 episodes" in capsys.readouterr().out
    assert {path.name for path in Path("runs/Pendulum-v1").glob("*/*.png")} == {
        *("training.png", "evaluation.png", "sweep.png")
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of what a description could say
def test_a_minari_dataset_is_trained_on_and_evaluated_in_the_environment_that_it_describes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Without `--env`; episodes of 7 steps, as the dataset says, and not of 200, as Gymnasium does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env = minari.DataCollector(gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=7))
    for seed in range(4):
        env.reset(seed=seed)
        while not env.step(env.action_space.sample())[3]:
            pass
    env.create_dataset("toy/short-v0")
    env.close()
    tiny = dict(dataset=Path("minari:toy/short-v0"), steps=2, steps_per_call=2, width=8, depth=2, batch_size=4)
    evor_bc.main(evor_bc.Args(**tiny))
    few = dict(num_next_actions=1, num_actions=2, num_returns=2, flow_steps=1, eval_episodes=2)
    (_, best) = evor_value.main(evor_value.Args(**tiny, **few))
    assert best["mean_length"] == 7
    assert "Pendulum-v1 is made with {'g': 5.0, 'max_episode_steps': 7}" in capsys.readouterr().out
    sweep = dict(num_actions=(2,), num_returns=(2,), flow_steps=1, eval_episodes=2, workers=1)
    (again,) = evor_infer.main(evor_infer.Args(env="Pendulum-v1", **sweep))
    assert again["mean_length"] == 7 and again["return"] == pytest.approx(best["return"])


def test_an_environment_that_does_not_exist_is_found_out_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With own data: a name that looks like one of Gymnasium's is one, or a mistake; any other is only a name."""
    monkeypatch.chdir(tmp_path)
    tiny_dataset(tmp_path / "data.npz")
    tiny = dict(dataset=Path("data.npz"), steps=2, steps_per_call=2, width=8, depth=2, batch_size=4)
    for env in ("Pendulm-v1", "robot"):
        evor_bc.main(evor_bc.Args(env=env, **tiny))
    with pytest.raises(UserError, match=r"Gymnasium has no Pendulm-v1: .* or pass --eval-episodes 0"):
        evor_value.main(evor_value.Args(env="Pendulm-v1", **tiny))
    assert not (tmp_path / "runs/Pendulm-v1/value/model.eqx").exists()
    evor_value.main(evor_value.Args(env="robot", num_next_actions=1, **tiny))
    with pytest.raises(
        UserError, match=r"Pendulum-v1 has 3 numbers in an observation and 1 in an action, and the data"
    ):
        evor_value.main(evor_value.Args(env="Pendulum-v1", policy_run_dir=Path("runs/robot"), **tiny))


@pytest.mark.parametrize("gym_id", ["Hopper-v2", "ALE/Nothing-v5"])
def test_an_environment_that_cannot_be_made(gym_id: str):
    with pytest.raises(UserError, match=rf"{gym_id} cannot be made"):
        environments.make_env(gym_id)


def test_one_that_speaks_only_of_success_is_taken_at_its_word():
    """NaN is a failure where any episode succeeded, in other rows and other groups too."""
    rows = [dict(num_actions=1, success=np.nan, total=1.0, length=2)] * 2
    rows += [dict(num_actions=4, success=success, total=1.0, length=2) for success in (1.0, np.nan)]
    assert [row["success"] for row in summarise(rows, ("num_actions",))] == [0.0, 0.5]
    assert "return" in summarise(rows[:2], ("num_actions",))[0]
