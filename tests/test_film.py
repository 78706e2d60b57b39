"""The film of an episode, of an environment that needs no graphics library."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from PIL import Image

from common import film
from common.errors import UserError


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

    success = film.record(env, decide, tmp_path / "films" / "a.gif", seed=0, bounds=(-10.0, 0.0), title="a toy")
    assert success == 1.0 and asked == [(0.0, 0), (3.0, 3), (6.0, 6)] and env.drawn == [0, 2, 4, 6, 7]
    with Image.open(tmp_path / "films" / "a.gif") as found:
        # Four, and the last one for a second; Pillow may join equal ones.
        assert 5 <= found.n_frames <= 19 and found.size == (512, 256)


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
