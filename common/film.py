"""A film of one episode: what the environment shows, and beside it the return law of the action that was chosen."""

import ctypes.util
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import animation
from matplotlib.figure import Figure

from common.environments import episode_seed, make_env, reported_success, seeded_reset
from common.errors import UserError

SIZE = 320  # pixels, of the environment's image
FRAMES_PER_SECOND = 15


def choose_renderer() -> None:
    """Has MuJoCo draw without a display; call it before the simulator is imported.

    Raises:
        UserError: there is no library to draw with.
    """
    if "MUJOCO_GL" in os.environ or "mujoco" in sys.modules:
        return
    if sys.platform != "linux":
        os.environ["MUJOCO_GL"] = "glfw"
        return
    for library, name in (("EGL", "egl"), ("OSMesa", "osmesa")):
        if ctypes.util.find_library(library):
            os.environ["MUJOCO_GL"] = name
            return
    raise UserError("--video: MuJoCo has nothing to draw with: install EGL or OSMesa (Debian: libegl1 or libosmesa6).")


def prepare(path: Path) -> None:
    """Says at once where a film cannot be made; call it before the simulator is imported.

    Raises:
        UserError: there is no library to draw with, or nothing that writes `path`.
    """
    choose_renderer()
    make_writer(path)


def open_env(gym_id: str, action_noise: float = 0.0, **settings: Any) -> gymnasium.Env:
    """An environment that can draw itself, with noise in its actions if asked for, and `settings` of its own.

    Raises:
        UserError: it cannot.
    """
    try:
        try:
            env = make_env(gym_id, action_noise, render_mode="rgb_array", width=SIZE, height=SIZE, **settings)
        except UserError:  # not of MuJoCo: it has a size of its own
            env = make_env(gym_id, action_noise, render_mode="rgb_array", **settings)
        env.reset(seed=0)
        env.render()
    except Exception as error:  # a graphics library that fails raises any kind
        raise UserError(
            f"--video: {gym_id} cannot be drawn with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({error}): set MUJOCO_GL "
            f"to egl or osmesa, the one that works here."
        ) from None
    return env


def make_writer(path: Path) -> animation.AbstractMovieWriter:
    """What writes a `.gif`, or an `.mp4` where ffmpeg is installed.

    Raises:
        UserError: ffmpeg is missing, or `path` is something else.
    """
    if path.suffix == ".gif":
        return animation.PillowWriter(fps=FRAMES_PER_SECOND)
    if path.suffix != ".mp4":
        raise UserError(f"--video {path}: name a .gif or an .mp4.")
    if not animation.FFMpegWriter.isAvailable():
        raise UserError(f"--video {path} needs ffmpeg: install it, or ask for a .gif.")
    return animation.FFMpegWriter(fps=FRAMES_PER_SECOND)


def film_episode(agent: Any, settings: Any, env: gymnasium.Env, path: Path, *, seed: int, title: str) -> None:
    """Films an episode with the return law of each action that was chosen, and the means of eight others; closes `env`.

    Args:
        agent, settings: an `Agent` and the `Extraction` of its actions.
    """
    choice, ode = dataclasses.asdict(settings), dict(flow_steps=settings.flow_steps, solver=settings.solver)
    candidates = ode | dict(noise_scale=settings.noise_scale)

    def decide(observation: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        act_key, others_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        x = jnp.asarray(observation, jnp.float32)[None]
        chunk = agent.act(x, key=act_key, **choice)
        draws = agent.sample_returns(x, chunk, 200, key=act_key, **ode)
        others = agent.sample_actions(x, 8, key=others_key, **candidates)[0]
        means = agent.sample_returns(jnp.repeat(x, 8, axis=0), others, 16, key=act_key, **ode).mean(axis=1)
        return np.asarray(chunk[0]), np.asarray(draws[0]), np.asarray(means)

    bounds = float(agent.axis.low), float(agent.axis.high)
    how = record(env, decide, path, seed=episode_seed(seed, 0), bounds=bounds, title=title)
    env.close()
    print(f"film: {path} ({how})")


def record(
    env: gymnasium.Env,
    decide: Callable[[Float[np.ndarray, " observation"], int], tuple],
    path: Path,
    *,
    seed: int,
    bounds: tuple[float, float],
    title: str,
    every: int = 2,
) -> str:
    """Films the episode that `seed` determines; returns how it ended: `solved`, `not solved` or `return 930.2`.

    Args:
        decide: `(observation, step) -> (chunk, draws, others)`: actions (h, a), draws of their return law (n,),
            and the mean returns of other candidates (m,), in the environment's units.
        path: a `.gif` or an `.mp4`.
        bounds: lowest and highest return, the range of the axis.
        every: environment steps per frame.

    Raises:
        UserError: as `make_writer`.
    """
    writer = make_writer(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8.0, 4.0), layout="tight")
    observation, step, done, total, success = seeded_reset(env, seed), 0, False, 0.0, 0.0
    with writer.saving(figure, str(path), dpi=64):
        while not done:
            chunk, draws, others = decide(observation, step)
            for action in chunk:
                if step % every == 0:
                    draw(figure, env.render(), draws, others, bounds=bounds, title=f"{title}, step {step}")
                    writer.grab_frame()
                observation, reward, terminated, truncated, info = env.step(action)
                step, done, total = step + 1, terminated or truncated, total + float(reward)
                if done:
                    success = reported_success(info)
                    break
        how = f"return {total:.1f}" if np.isnan(success) else "solved" if success else "not solved"
        draw(figure, env.render(), draws, others, bounds=bounds, title=f"{title}, {how}")
        for _ in range(FRAMES_PER_SECOND):
            writer.grab_frame()
    return how


def draw(
    figure: Figure,
    image: UInt8[np.ndarray, "height width 3"],
    draws: Float[np.ndarray, " n"],
    others: Float[np.ndarray, " m"],
    *,
    bounds: tuple[float, float],
    title: str,
) -> None:
    """One frame: the image, and the law's histogram with its mean and those of the other candidates."""
    figure.clear()
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    left.axis("off")
    left.set_title(title, fontsize=9)
    bins = np.linspace(*bounds, 61)
    shares = np.histogram(np.clip(draws, *bounds), bins)[0] / len(draws)
    right.stairs(shares, bins, fill=True, alpha=0.5, label="return law of the chosen action")
    right.axvline(draws.mean(), color="C0", lw=2, label="its mean")
    right.plot(others, np.full(len(others), -0.03), "|", color="C1", ms=10, label="means of other candidates")
    right.set(xlim=bounds, ylim=(-0.06, 0.5), xlabel="discounted reward-to-go", ylabel="share of draws")
    right.legend(fontsize=7, loc="upper right")
