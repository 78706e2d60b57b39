"""Does the base policy do what the data does? Lifting cubes: share of steps and of episodes, beside the data's.

    python -m benchmarks.base_policy --env cube-single-play
    python -m benchmarks.base_policy --env cube-double-play --run-dirs runs/policy-cosine/* runs/policy-constant/*

Success after value learning is bounded by what the base policy can do at all, so look here first. Rolls the base policy
out (`num_actions = 1`) and counts the steps at which some cube is more than 3 cm above where it would lie. Measures how
well it aims: the horizontal distance to the nearest cube when the open gripper first comes down. And whether it looks
at the cubes: how much of the variance of the data's horizontal actions its mean action explains (R^2) in validation
states on the way to a pick, as they are and with the cubes' coordinates shuffled among states. A policy that explains
as much with shuffled cubes is a copycat: it reads off the arm's velocity where the demonstrator was going, and goes
nowhere of its own (de Haan et al., "Causal Confusion in Imitation Learning", arXiv 1905.11979).
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evor_bc
from common.cli import run_cli
from common.data import download, files
from common.data.names import default_run_dir, parse_env, validation_path
from common.environments import make_env, seeded_reset
from common.episodes import Episodes
from common.errors import UserError
from common.files import sha256, write_csv
from common.flow import Ode
from common.provenance import provenance

LIFTED = 0.05  # metres; a cube's centre lies at 0.02 on the table
CUBES = 19  # the observation's first coordinate of a cube; the arm and its gripper come before
APPROACH = (12, 30)  # steps before a cube is lifted: from high above to just above it


@dataclasses.dataclass(frozen=True)
class Args:
    """Roll out the base policy of a cube environment and count lifted cubes."""

    env: str = "cube-double-play"
    """A cube dataset."""
    task: int | None = None
    """Task whose initial states are used; the default task by default."""
    run_dirs: tuple[Path, ...] = ()
    """Run directories of stage 1; runs/ENV by default."""
    num_episodes: int = 20
    """Episodes."""
    episodes: int | None = None
    """Collected episodes of the dataset to compare with."""
    flow_steps: int = 5
    """Midpoint steps of the policy."""
    out: Path | None = None
    """CSV file to write, a row per policy; none by default."""


def cube_lifted(info: dict[str, Any]) -> float:
    """1 if some cube is lifted in an environment step's `info`."""
    heights = [v[2] for k, v in info.items() if k.startswith("privileged/block_") and k.endswith("_pos")]
    return float(max(heights) > LIFTED)


def first_pick_error(act_one, gym_id: str, *, seed: int, steps: int = 100) -> float:
    """Metres between effector and nearest cube, horizontally, when the open gripper first comes below 5 cm; NaN if it
    does not within `steps` steps. `act_one(observation, episode, step)` returns a chunk `(horizon, action)`."""
    env = make_env(gym_id)
    observation, step = seeded_reset(env, seed), 0
    while step < steps:
        for action in np.asarray(act_one(jnp.asarray(observation, jnp.float32), seed, step)):
            observation, _, terminated, truncated, info = env.step(action)
            step += 1
            effector = info["proprio/effector_pos"]
            if effector[2] < 0.05 and info["proprio/gripper_opening"][0] < 0.15:
                cubes = np.array(
                    [v for k, v in info.items() if k.startswith("privileged/block_") and k.endswith("_pos")]
                )
                return float(np.linalg.norm((cubes - effector)[:, :2], axis=1).min())
            if terminated or truncated:
                return float("nan")
    return float("nan")


def lifted_rows(qpos: np.ndarray) -> np.ndarray:
    """Whether some cube is lifted in each row of a dataset: cube i's height is `qpos[14 + 7 i + 2]`."""
    return (qpos[:, 16::7] > LIFTED).any(axis=1)


def approach_rows(qpos: np.ndarray, terminals: np.ndarray, horizon: int) -> np.ndarray:
    """Rows with all cubes down of which one is lifted within the steps of `APPROACH`, and not before."""
    lifted, count = lifted_rows(qpos), len(terminals)
    episode = np.cumsum(np.r_[0, terminals[:-1]])
    last = np.minimum(np.arange(count) + APPROACH[1] + horizon, count - 1)
    lifts = np.r_[0, np.cumsum(lifted)]
    before, soon = (lifts[np.minimum(np.arange(count) + steps, count)] - lifts[:-1] for steps in APPROACH)
    return np.flatnonzero((episode == episode[last]) & (before == 0) & (soon > 0))


def explained_variance(
    sample, arrays: dict[str, np.ndarray], horizon: int, *, states: int = 2000
) -> tuple[float, float]:
    """R^2 of the policy's mean horizontal action on the way to a pick: as it is, and with shuffled cubes.
    `sample(observations, noise)` maps (n, d) and (n, m, a) to (n, m, a)."""
    rng = np.random.default_rng(0)
    rows = approach_rows(arrays["qpos"], arrays["terminals"], horizon)
    rows = rng.choice(rows, min(states, len(rows)), replace=False)
    observations, actions = arrays["observations"][rows], arrays["actions"][rows, :2]
    shuffled = np.concatenate([observations[:, :CUBES], rng.permutation(observations)[:, CUBES:]], axis=1)
    noise = jax.random.normal(jax.random.key(0), (len(rows), 16, arrays["actions"].shape[1] * horizon))
    explained = [np.asarray(sample(jnp.asarray(x), noise))[..., :2].mean(axis=1) for x in (observations, shuffled)]
    return tuple(float(1 - np.mean((actions - mean) ** 2) / np.mean(np.var(actions, axis=0))) for mean in explained)


def measure(args: Args, run_dir: Path, validation: dict[str, np.ndarray], *, data_sha256: str) -> dict[str, Any]:
    """One base policy: what it was trained with, and what it does.

    Raises:
        UserError: it was trained on other data.
    """
    header, (policies, standardizer) = evor_bc.load(run_dir / "bc" / "model.eqx")
    if header["data"]["sha256"] != data_sha256:
        raise UserError(f"{run_dir} was trained on other data than {args.env}'s here: they do not compare.")
    policy = jax.tree.map(lambda x: jnp.asarray(x)[0], policies)
    sample = jax.jit(
        lambda x, noise: policy.sample(standardizer(x), noise[None], Ode(args.flow_steps))[0],
    )

    def act_one(observation, episode, step):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), episode), step)
        return sample(observation, jax.random.normal(key, (policy.spec.action,)))

    act = jax.jit(jax.vmap(jax.vmap(act_one)))
    name, horizon = parse_env(args.env), header["horizon"]
    task = args.task or name.default_task
    with Episodes([name.gym_id(task)], num_episodes=args.num_episodes, horizon=horizon, probe=cube_lifted) as episodes:
        rows = episodes.run(lambda *x: np.asarray(act(*x)).reshape(1, x[0].shape[1], horizon, -1))
    chunk = jax.jit(lambda *x: act_one(*x).reshape(horizon, -1))
    errors = [first_pick_error(chunk, name.gym_id(task), seed=seed) for seed in range(args.num_episodes)]
    batch = jax.jit(jax.vmap(lambda x, noise: policy.sample(standardizer(x), noise, Ode(args.flow_steps))))
    r2, r2_shuffled = explained_variance(batch, validation, horizon)
    return dict(
        policy_sha256=sha256(run_dir / "bc" / "model.eqx"),
        task=task,
        horizon=horizon,
        bc_steps=header["step"],
        learning_rate=header["args"]["learning_rate"],
        schedule=header["args"]["schedule"],
        ignored_observations=" ".join(map(str, header["args"].get("ignore_observations", []))),
        flow_steps=args.flow_steps,
        episodes=len(rows),
        policy_steps_lifted=sum(r["probe"] for r in rows) / sum(r["length"] for r in rows),
        policy_episodes_lifted=float(np.mean([r["probe"] > 0 for r in rows])),
        first_pick_error_median_m=float(np.nanmedian(errors)),
        first_picks_within_2cm=float(np.nanmean(np.array(errors) < 0.02)),
        r2_of_mean_action=r2,
        r2_with_shuffled_cubes=r2_shuffled,
        policy_success=float(np.mean([r["success"] for r in rows])),
    )


def main(args: Args) -> list[dict[str, Any]]:
    """Prints and returns the shares, of each policy.

    Raises:
        UserError: the environment has no cubes, its data no validation file, or a policy was trained on other data.
    """
    name = parse_env(args.env)
    if not name.prefix.startswith("cube"):
        raise UserError(f"{args.env} has no cubes to lift: name a cube environment.")
    path, source = download.find_files(args.env, None, episodes=args.episodes)
    if not validation_path(path).is_file():
        raise UserError(f"there is no validation file {validation_path(path)}: collect or download the data anew.")
    validation, arrays = files.read_arrays(validation_path(path)), files.read_arrays(path)
    in_data = lifted_rows(arrays["qpos"])
    per_episode = np.array([part.any() for part in np.split(in_data, np.flatnonzero(arrays["terminals"])[:-1] + 1)])
    results = []
    data_sha256 = download.describe(path, source)["sha256"]
    for run_dir in args.run_dirs or (default_run_dir(name.short, quick=False),):
        results.append(
            dict(env=name.short, data_source=source, data_sha256=data_sha256)
            | measure(args, run_dir, validation, data_sha256=data_sha256)
            | dict(
                data_steps_lifted=float(in_data.mean()),
                data_episodes_lifted=float(per_episode.mean()),
                **provenance(),
            )
        )
        for key, value in results[-1].items():
            print(f"{key:<26} {value if not isinstance(value, float) else format(value, '.3f')}")
    if args.out:
        write_csv(args.out, list(results[0]), results)
    return results


if __name__ == "__main__":
    run_cli(main, Args)
