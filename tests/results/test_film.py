"""The film of an episode, of an environment that needs no graphics library."""

from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from common import film
from common.errors import UserError
from common.networks import FlowCritic, FlowPolicy, Standardizer
from common.returns import affine_axis
from evor_infer import Agent, Extraction


class Counter(gymnasium.Env):
    """Ends, solved, after seven steps; its image is as bright as its step."""

    observation_space = gymnasium.spaces.Box(-10, 10, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    drawn: list[int]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.drawn = 0, []
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        observation = np.full(1, self.steps, np.float32)
        return observation, 0.0, self.steps == 7, False, {"success": 1.0}

    def render(self):
        self.drawn.append(self.steps)
        return np.full((8, 8, 3), 30 * self.steps, np.uint8)


def test_a_frame_for_every_second_step_and_one_decision_a_chunk(tmp_path: Path):
    env, asked = Counter(), []

    def decide(observation, step):
        asked.append((float(observation[0]), step))
        return np.zeros((3, 1)), np.linspace(-9, -1, 50), np.array([-5.0, -4.0])

    how = film.record(env, decide, tmp_path / "films" / "a.gif", seed=0, bounds=(-10.0, 0.0), title="a toy")
    assert how == "solved" and asked == [(0.0, 0), (3.0, 3), (6.0, 6)] and env.drawn == [0, 2, 4, 6, 7]
    with Image.open(tmp_path / "films" / "a.gif") as found:
        # Four, and the last one for a second; Pillow may join equal ones.
        assert 5 <= found.n_frames <= 19 and found.size == (512, 256)


@pytest.mark.slow
def test_an_agent_is_filmed_with_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Chunks of three actions: the film shows the law and eight other actions, in the environment's units, of the
    action that is executed; the environment is closed after it."""
    env, drawn, executed, closed = Counter(), [], [], []
    agent = Agent(
        # Scaled down: untrained, its actions would lie at their bounds.
        policy=jax.tree.map(lambda x: 0.3 * x, FlowPolicy(1, 3, width=8, depth=2, key=jax.random.key(0))),
        critic=FlowCritic(1, 3, width=8, depth=2, key=jax.random.key(1)),
        standardizer=Standardizer(jnp.zeros(1), jnp.ones(1)),
        axis=affine_axis(-5.0, 0.5, low=-10.0, high=0.0),
        horizon=3,
    )
    settings = Extraction(num_actions=4, num_returns=3, flow_steps=2)
    step = env.step
    env.step = lambda action: (executed.append(float(action[0])), step(action))[1]
    env.close = lambda: closed.append(env.steps)
    with pytest.MonkeyPatch.context() as patch:
        draw = film.draw
        patch.setattr(film, "draw", lambda *args, **named: (drawn.append((*args[2:], named)), draw(*args, **named)))
        film.film_episode(agent, settings, env, tmp_path / "a.gif", seed=3, title="a toy")
    assert (tmp_path / "a.gif").stat().st_size > 1_000 and closed == [7] and len(drawn) == 5
    assert capsys.readouterr().out == f"film: {tmp_path / 'a.gif'} (solved)\n"
    for frame, decided in ((0, 0), (2, 3), (3, 6)):
        key = jax.random.split(jax.random.fold_in(jax.random.key(3), decided))[0]
        x = jnp.full((1, 1), float(decided))
        chunk = agent.act(x, num_actions=4, num_returns=3, flow_steps=2, key=key)
        np.testing.assert_allclose(executed[decided : decided + 3], chunk[0, : 7 - decided, 0], rtol=1e-5)
        law, others, named = drawn[frame]
        np.testing.assert_allclose(law, agent.sample_returns(x, chunk, 200, flow_steps=2, key=key)[0], rtol=1e-5)
        assert others.shape == (8,) and len(np.unique(others)) == 8 and np.abs(others + 5.0).max() < 2.0
        assert named["bounds"] == (-10.0, 0.0)


@pytest.mark.slow
def test_a_film_shows_candidates_of_the_lambda_that_is_filmed(tmp_path: Path):
    """At lambda = 0 all candidates are one action. Fails if the agent's own lambda is taken, which is 1."""
    agent = Agent(
        policy=FlowPolicy(1, 3, width=8, depth=2, key=jax.random.key(0)),
        critic=FlowCritic(1, 3, width=8, depth=2, key=jax.random.key(1)),
        standardizer=Standardizer(jnp.zeros(1), jnp.ones(1)),
        axis=affine_axis(-5.0, 0.5, low=-10.0, high=0.0),
        horizon=3,
    )
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        draw = film.draw
        patch.setattr(film, "draw", lambda *args, **named: (drawn.append(args[3]), draw(*args, **named)))
        settings = Extraction(num_actions=2, num_returns=2, flow_steps=2, noise_scale=0.0)
        film.film_episode(agent, settings, Counter(), tmp_path / "a.gif", seed=3, title="a toy")
    assert max(np.ptp(others) for others in drawn) < 1e-6


def test_without_ffmpeg_a_gif_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(film.animation.FFMpegWriter, "isAvailable", lambda: False)
    with pytest.raises(UserError, match=r"a\.mp4 needs ffmpeg: install it, or ask for a \.gif"):
        film.record(Counter(), lambda *_: (), tmp_path / "a.mp4", seed=0, bounds=(-1.0, 0.0), title="")
    with pytest.raises(UserError, match=r"film: name a \.gif or an \.mp4"):
        film.make_writer(Path("film"))
    assert not list(tmp_path.iterdir())


def test_a_library_to_draw_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(film.sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(film.ctypes.util, "find_library", lambda name: "x" if name == "OSMesa" else None)
    film.choose_renderer()
    assert film.os.environ["MUJOCO_GL"] == "osmesa"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(film.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(UserError, match="nothing to draw with: install EGL or OSMesa"):
        film.choose_renderer()
