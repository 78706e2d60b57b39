"""Environments: OGBench's, or any that Gymnasium knows, with vectors for observations and actions in [-1, 1]."""

import importlib
import re
from collections.abc import Mapping
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
from gymnasium.envs.registration import find_highest_version

from common.data.names import ENVIRONMENTS, check_env, import_ogbench, parse_env
from common.data.spaces import action_range, flat
from common.errors import UserError

LONGEST = 10_000  # steps of an episode where neither the environment nor its registration says when it is cut

# Undiscounted returns of a random and of an expert policy: D4RL's (arXiv 2004.07219, its file infos.py).
REFERENCE = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    "AdroitHandPen": (96.262799, 3076.8331017826877),
    "AdroitHandHammer": (-274.856578, 12794.134825156867),
    "AdroitHandRelocate": (-6.425911, 4233.877797728884),
    "AdroitHandDoor": (-56.512833, 2880.5693087298737),
}


class ActionNoise(gymnasium.ActionWrapper):
    """Executes `clip(a + scale * n)` with `n ~ N(0, I)` instead of `a`: makes transitions stochastic.

    The noise has a generator of its own, seeded at each reset: it does not change initial states, and all settings of a
    sweep meet the same noise at the same step of an episode.
    """

    def __init__(self, env: gymnasium.Env, scale: float):
        super().__init__(env)
        self.scale, self.rng = scale, np.random.default_rng(0)
        self.low, self.high = env.action_space.low, env.action_space.high  # OGBench makes a new space at each use

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        if seed is not None:
            self.rng = np.random.default_rng([seed, 1])
        return self.env.reset(seed=seed, options=options)

    def action(self, action: np.ndarray) -> np.ndarray:
        noisy = action + self.scale * self.rng.standard_normal(np.shape(action))
        return np.clip(noisy, self.low, self.high).astype(np.float32)


def make_env(gym_id: str, action_noise: float = 0.0, **settings: Any) -> gymnasium.Env:
    """An environment with vectors for observations and actions in [-1, 1], and with noise in its actions if asked for.

    Args:
        gym_id: `Id-v0`, or `module:Id-v0` where importing a module registers it.
        settings: of `gymnasium.make`.

    Raises:
        UserError: it cannot be made, or has other observations or actions than a network takes.
    """
    env = make_as_it_is(gym_id, **settings)
    if env.spec.max_episode_steps is None:
        env = gymnasium.wrappers.TimeLimit(env, LONGEST)
    low, high = action_range(env.action_space, gym_id)
    if (low != -1).any() or (high != 1).any():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    space = env.observation_space
    if not (isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1):

        def as_vector(observation: Any) -> np.ndarray:
            return flat(space, observation, gym_id, batched=False).astype(np.float32)

        vector = gymnasium.spaces.Box(-np.inf, np.inf, as_vector(space.sample()).shape)
        env = gymnasium.wrappers.TransformObservation(env, as_vector, vector)
    return ActionNoise(env, action_noise) if action_noise else env


def make_as_it_is(gym_id: str, **settings: Any) -> gymnasium.Env:
    """`gymnasium.make`, with OGBench's environments and without a display.

    Raises:
        UserError: it cannot be made.
    """
    import_ogbench()
    try:
        return gymnasium.make(gym_id, **settings)
    except Exception as error:  # whatever its constructor raises
        raise UserError(
            f"{gym_id} cannot be made ({error!r}): install what it needs, or name another environment with --env."
        ) from None


def is_registered(env: str) -> bool:
    """Whether Gymnasium knows `Id-v0`, or `module:Id-v0` once the module is imported.

    Raises:
        UserError: the module cannot be imported, or only the version is missing.
    """
    import_ogbench()
    module, _, gym_id = env.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
    except Exception as error:  # whatever it raises
        raise UserError(f"--env {env}: {module} cannot be imported ({error!r}): check its name.") from None
    if gym_id not in gymnasium.registry and (version := find_highest_version(None, gym_id)) is not None:
        raise UserError(f"--env {env}: Gymnasium has {gym_id}-v{version}. Add the version, or choose another name.")
    return gym_id in gymnasium.registry


def spec_of(env: str) -> gymnasium.envs.registration.EnvSpec:
    """What Gymnasium knows of `Id-v0` or `module:Id-v0`, which is registered."""
    return gymnasium.spec(env.rpartition(":")[2])


def evaluation_id(env: str, task: int) -> str | None:
    """Gymnasium's id of the environment that an agent is evaluated in; None where there is none.

    Args:
        env: what `--env` names.
        task: a task of OGBench, or 0 for data that bring their own rewards: then `env` is an id, or only a name.

    Raises:
        UserError: OGBench has no such environment, or the module of a `module:Id-v0` cannot be imported.
    """
    if task > 0:
        check_env(parse_env(env))
        return parse_env(env).gym_id(task)
    return env if is_registered(env) else None


def episode_steps(env: str) -> int:
    """Steps after which an episode is cut; 0 for data that have no environment."""
    try:
        return ENVIRONMENTS[parse_env(env).prefix].episode_steps
    except (UserError, KeyError):
        return (spec_of(env).max_episode_steps or LONGEST) if is_registered(env) else 0


def settings_of(info: Mapping[str, Any], gym_id: str) -> dict[str, Any]:
    """What `make_env` is told beyond the id: a Minari dataset may bring settings of its environment.

    Args:
        info: what a checkpoint's header, or `common.data.download.describe`, says of the data.
    """
    return dict(info.get("settings", {}).get(gym_id.rpartition(":")[2], {}))


def check_sizes(gym_id: str, settings: Mapping[str, Any], observation: int, action: int) -> None:
    """Whether an environment works and fits the data, tried for one step; says how its actions are scaled.

    Raises:
        UserError: its observations or actions have other sizes, or what it does is not what Gymnasium asks for.
    """
    env = make_env(gym_id, **settings)
    sizes = env.observation_space.shape[0], env.action_space.shape[0]
    try:
        first = np.asarray(seeded_reset(env, 0))
        then, reward, _, _, info = env.step(np.zeros(sizes[1], np.float32))
        for values, shape in ((first, sizes[:1]), (np.asarray(then), sizes[:1]), (np.asarray(reward), ())):
            if values.shape != shape or not np.isfinite(values).all():
                raise ValueError(f"{values} is not finite, or not of the shape {shape}")
        reported_success(info)
    except Exception as error:  # whatever it raises
        raise UserError(
            f"{gym_id} does not run ({error!r}): mend it, or leave out its evaluation with --eval-episodes 0."
        ) from None
    finally:
        env.close()
    if isinstance(env, gymnasium.wrappers.TransformObservation):
        env = env.env
    if isinstance(env, gymnasium.wrappers.RescaleAction):
        space = env.env.action_space
        print(f"  actions in [-1, 1] are executed as {space.low.tolist()} to {space.high.tolist()} in {gym_id}")
    if sizes != (observation, action):
        raise UserError(
            f"{gym_id} has {sizes[0]} numbers in an observation and {sizes[1]} in an action, and the data "
            f"{observation} and {action}: pass the environment of the data with --env."
        )


def reference_scores(gym_id: str) -> tuple[float, float] | None:
    """Undiscounted returns of a random and of an expert policy, where D4RL has them."""
    return REFERENCE.get(re.sub(r"-v\d+$", "", gym_id.rpartition(":")[2]))


def episode_seed(seed: int, episode: int) -> int:
    """The seed that an episode of an evaluation starts from."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def seeded_reset(env: gymnasium.Env, seed: int) -> np.ndarray:
    """Resets `env` so that the whole episode depends on `seed` alone; returns the first observation.

    OGBench draws from three places: the environment's generator, NumPy's global one (mazes), and an unseeded action
    space that it makes anew at each use (manipulation: the two random steps before an episode stay in the solver's
    warm start).
    """
    np.random.seed(seed)
    space = env.unwrapped.action_space
    space.seed(seed)
    if isinstance(getattr(type(env.unwrapped), "action_space", None), property):
        with mock.patch.object(type(env.unwrapped), "action_space", space):
            return env.reset(seed=seed)[0]
    return env.reset(seed=seed)[0]


def reported_success(info: dict[str, Any]) -> float:
    """What a step's `info` says of success, of all its parts if there are several; NaN where it says nothing.

    Raises:
        ValueError: it says something that is no number.
    """
    said = info.get("success", info.get("is_success"))
    if said is not None and (np.size(said) == 0 or np.asarray(said).dtype.kind not in "biuf"):
        raise ValueError(f"info has the success {said!r}")
    return np.nan if said is None else float(np.min(said))
