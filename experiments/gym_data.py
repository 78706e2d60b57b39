"""Makes Minari datasets outside of OGBench, for results/beyond-ogbench.

    python -m experiments.gym_data --env Pendulum-v1        # a noisy controller
    python -m experiments.gym_data --env Hopper-v5          # the replay buffer of a SAC (pip install sbx-rl)

Both need `pip install "minari[hdf5,create]"`. The dataset is `evor/ENV-v0` in Minari's folder.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np

from common.args import Paths, Seed, at_least, check
from common.cli import run_cli
from common.data.foreign import VALIDATION
from common.errors import UserError
from common.files import write_json
from common.progress import progress


@dataclasses.dataclass(frozen=True)
class Args(Paths):
    """Make a Minari dataset of an environment of Gymnasium."""

    env: str = "Pendulum-v1"
    """Pendulum-v1, or one of Gymnasium's that SAC learns."""
    episodes: Annotated[int, at_least(VALIDATION)] = 500
    """Episodes of the controller."""
    steps: Annotated[int, at_least(1_000)] = 300_000
    """Environment steps of SAC, all of which are the dataset."""
    seed: Seed = 0
    """Seed of everything."""
    out: Path = Path("runs/tables/beyond-ogbench/data.json")
    """What was made: its name, its episodes and their returns."""


def pendulum_torque(observation: np.ndarray) -> float:
    """Pumps energy until the pole is nearly upright, and holds it there."""
    cosine, sine, speed = observation
    angle = np.arctan2(sine, cosine)
    if abs(angle) < 0.5:
        return -12.0 * angle - 3.0 * speed
    energy = speed**2 / 6.0 + 5.0 * (cosine - 1.0)
    return -2.0 * np.sign(energy) * np.sign(speed if abs(speed) > 0.05 else 1.0)


def controller(env: gymnasium.Env, args: Args) -> Iterator[tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]]:
    """A controller for each episode: `(1 - eps) u + 2 eps n`, eps uniform in [0, 1] and n correlated noise."""
    rng = np.random.default_rng(args.seed)
    for _ in range(args.episodes):
        eps, noise = rng.uniform(), [0.0]

        def act(observation: np.ndarray, eps: float = eps, noise: list[float] = noise) -> np.ndarray:
            noise[0] = 0.8 * noise[0] + rng.normal()
            torque = (1.0 - eps) * pendulum_torque(observation) + 2.0 * eps * noise[0]
            return np.clip(torque, env.action_space.low, env.action_space.high).astype(np.float32)

        yield act


def collect_controller(env: gymnasium.Env, args: Args) -> list[float]:
    """Runs the controller; returns the episodes' returns."""
    returns = []
    bar = progress(iterable=controller(env, args), total=args.episodes, desc=args.env, unit="episode")
    for episode, act in enumerate(bar):
        observation, _ = env.reset(seed=args.seed * 1_000_000 + episode)
        total, done = 0.0, False
        while not done:
            observation, reward, terminated, truncated, _ = env.step(act(observation))
            total, done = total + float(reward), terminated or truncated
        returns.append(total)
    return returns


def collect_sac(env: gymnasium.Env, args: Args) -> list[float]:
    """Trains a SAC in `env`, which records every step; returns the episodes' returns.

    Raises:
        UserError: sbx-rl is missing.
    """
    try:
        import sbx
    except ImportError as error:
        raise UserError(f"--env {args.env} needs sbx-rl ({error}): pip install sbx-rl.") from None
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(env)
    sbx.SAC("MlpPolicy", env, seed=args.seed, verbose=0).learn(args.steps, progress_bar=False)
    return env.get_episode_rewards()


def main(args: Args) -> dict[str, Any]:
    """Makes the dataset; returns what is written to `--out`.

    Raises:
        UserError: a package is missing, or the dataset stands already.
    """
    check(args)
    try:
        import minari
    except ImportError as error:
        raise UserError(f"Minari is missing ({error}): pip install 'minari[hdf5,create]'.") from None
    name = f"evor/{args.env.rpartition('-')[0].lower()}-v{args.seed}"
    if name in minari.list_local_datasets():
        raise UserError(f"the dataset {name} stands already: delete it with `minari delete {name}`.")
    env = minari.DataCollector(gymnasium.make(args.env), record_infos=False)
    made_by = collect_controller if args.env == "Pendulum-v1" else collect_sac
    returns = made_by(env, args)
    env.create_dataset(
        name, algorithm_name=made_by.__name__, author="EVOR in JAX", author_email="none", code_permalink="none",
        eval_env=args.env,
    )  # fmt: skip
    quantiles = np.quantile(returns, [0.0, 0.1, 0.5, 0.9, 1.0]).tolist()
    made = dict(dataset=name, env=args.env, episodes=len(returns), mean_return=float(np.mean(returns)))
    made |= dict(return_quantiles=quantiles, seed=args.seed)
    write_json(args.out, made)
    print(f"minari:{name}: {len(returns):,} episodes, mean return {np.mean(returns):.1f}")
    return made


if __name__ == "__main__":
    run_cli(main, Args)
