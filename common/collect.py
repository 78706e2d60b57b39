"""Collects OGBench's `*-play` manipulation data with OGBench's own scripted oracles, on all cores.

    python -m common.collect --env cube-double-play --episodes 1000

OGBench made its cube datasets with a non-Markovian *plan oracle*: pick a random cube, pick a random target (with some
probability on top of another cube), follow an interpolated plan with temporally smoothed noise, repeat until the
episode of 1,001 steps is over. This file does the same with the oracles of the installed `ogbench` package and writes
the same arrays and dtypes: `observations, actions, terminals, qpos, qvel`, one `.npz` for training and one, a tenth as
long, for validation. Actions are those that were executed (clipped to [-1, 1]); the last row of an episode has
`terminals` true and no next state.

Collected data is not OGBench's published file: it stands in a folder of its own with a `.json` that says where it came
from, and every result made with it says so. An episode depends on (seed, its number) alone, so the result does not
depend on the number of processes.

Source: Park et al., "OGBench: Benchmarking Offline Goal-Conditioned RL", arXiv 2410.20092, appendix on data collection.
"""

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.envs import collected_path, import_ogbench, num_cores, parse_env
from common.errors import UserError, run_cli
from common.metrics import atomic, package_versions, write_json

# Probability range of stacking a cube on another one; one draw per episode.
STACKING = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0.0, 0.35),
}
ROWS_PER_EPISODE = 1001
KEYS = ("observations", "actions", "terminals", "qpos", "qvel")


@dataclasses.dataclass(frozen=True)
class Args:
    """Collect OGBench play data with OGBench's scripted oracles."""

    env: str = "cube-double-play"
    """Dataset to collect: cube-{single,double,triple,quadruple,octuple}-play."""
    episodes: int = 1000
    """Training episodes of 1,001 rows; a tenth as many more go to the validation file."""
    seed: int = 0
    """Seed of all episodes."""
    noise: float = 0.1
    """Noise level of the oracle's plan."""
    noise_smoothing: float = 0.5
    """Width of the Gaussian that smooths that noise over time, in control steps."""
    workers: int | None = None
    """Processes; all cores by default."""
    out: Path | None = None
    """Training file to write; OGBench's cache, under `collected/`, by default."""


def is_collectable(dataset_name: str) -> bool:
    """Whether `dataset_name`, such as `cube-double-play-v0`, is play data of a cube environment."""
    name, _, kind = dataset_name.removesuffix("-v0").rpartition("-")
    return name in STACKING and kind == "play"


_WORKER = {}  # One environment and one oracle per process: building them costs seconds, resetting them milliseconds.


def collect_episode(job: tuple[str, int, int, float, float, int]) -> dict[str, np.ndarray]:
    """One episode, as arrays of `rows` rows; `job` is (environment, seed, episode, noise, noise_smoothing, rows)."""
    env_name, seed, episode, noise, noise_smoothing, rows = job
    if _WORKER.get("key") != (env_name, noise, noise_smoothing, rows):
        import_ogbench()
        import gymnasium
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

        env = gymnasium.make(f"{env_name}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=rows)
        oracle = CubePlanOracle(env=env, noise=noise, noise_smoothing=noise_smoothing)
        _WORKER.update(key=(env_name, noise, noise_smoothing, rows), env=env, oracle=oracle)
    env, oracle = _WORKER["env"], _WORKER["oracle"]

    # The environment draws from its own generator, the oracles draw from NumPy's global one: seed both per episode.
    env_seed, oracle_seed = np.random.SeedSequence([seed, episode]).generate_state(2)
    np.random.seed(oracle_seed)
    observation, info = env.reset(seed=int(env_seed))
    p_stack = np.random.uniform(*STACKING[env_name])
    oracle.reset(observation, info)

    episode_rows = {key: [] for key in KEYS}
    done = False
    while not done:
        action = np.clip(np.asarray(oracle.select_action(observation, info)), -1, 1)
        next_observation, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            oracle.reset(*env.unwrapped.set_new_target(p_stack=p_stack))
        values = (observation, action, done, info["prev_qpos"], info["prev_qvel"])
        for key, value in zip(KEYS, values, strict=True):
            episode_rows[key].append(value)
        observation = next_observation
    return {key: np.array(value, bool if key == "terminals" else np.float32) for key, value in episode_rows.items()}


def collect(
    dataset_name: str,
    train_path: Path,
    *,
    episodes: int,
    seed: int = 0,
    noise: float = 0.1,
    noise_smoothing: float = 0.5,
    workers: int | None = None,
    rows: int = ROWS_PER_EPISODE,
) -> None:
    """Collects `episodes` training and `max(1, episodes // 10)` validation episodes and writes both files.

    The validation file has `-val` before its ending. Each file is written under a temporary name and renamed, with the
    training file last: where it stands, its validation file and its description stand too.

    Raises:
        UserError: the dataset has no scripted behaviour here, or `episodes` is not positive.
    """
    if not is_collectable(dataset_name):
        raise UserError(
            f"{dataset_name!r} cannot be collected: only the play data of the cube environments "
            f"({', '.join(sorted(STACKING))}) has a scripted behaviour here. Pass a file with --dataset."
        )
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, not {episodes}.")
    env_name = dataset_name.removesuffix("-v0").rpartition("-")[0]
    num_val = max(1, episodes // 10)
    jobs = [(env_name, seed, i, noise, noise_smoothing, rows) for i in range(episodes + num_val)]
    workers = min(workers or num_cores(), len(jobs))
    train_path.parent.mkdir(parents=True, exist_ok=True)

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.imap(collect_episode, jobs)
        results = list(tqdm(results, total=len(jobs), desc=f"collecting {dataset_name}", unit="episode"))

    description = {
        "dataset": dataset_name,
        "source": "collected",
        "episodes": episodes,
        "validation_episodes": num_val,
        "rows_per_episode": rows,
        "seed": seed,
        "noise": noise,
        "noise_smoothing": noise_smoothing,
        "versions": package_versions(),
    }
    write_json(train_path.with_suffix(".json"), description)
    paths = train_path.with_name(f"{train_path.stem}-val.npz"), train_path
    for path, part in zip(paths, (results[episodes:], results[:episodes]), strict=True):
        with atomic(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{key: np.concatenate([e[key] for e in part]) for key in KEYS})


def main(args: Args) -> None:
    dataset_name = parse_env(args.env).dataset
    if args.out is None and (args.noise, args.noise_smoothing) != (Args.noise, Args.noise_smoothing):
        raise UserError("data with another noise than OGBench's must not stand under its name: pass --out FILE.")
    train_path = args.out or collected_path(dataset_name, args.episodes, args.seed)
    collect(
        dataset_name,
        train_path,
        episodes=args.episodes,
        seed=args.seed,
        noise=args.noise,
        noise_smoothing=args.noise_smoothing,
        workers=args.workers,
    )
    print(f"wrote {train_path} and its validation file")


if __name__ == "__main__":
    run_cli(main, Args)
