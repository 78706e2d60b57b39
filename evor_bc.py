"""Stage 1 of EVOR: the base policy, by flow-matching behaviour cloning.

    python evor_bc.py --env cube-double-play

The base policy `pi_base(a | x)` imitates the data. It is a velocity field `v_phi(a_t, t | x)` that moves Gaussian noise
to actions, trained on straight paths between the two:

    a_0 ~ N(0, I),   a_1 = a (data),   t ~ U[0, 1],   a_t = (1 - t) a_0 + t a_1
    L(phi) = E || v_phi(a_t, t | x) - (a_1 - a_0) ||^2
    sampling: a_0 ~ N(0, I), integrate da/dt = v_phi(a, t | x) from t = 0 to 1, clip to [-1, 1]

With `--horizon h` an action is a chunk of the next h actions, executed open loop (Q-chunking, arXiv 2507.07969).
No reward is used. The policy is never trained on the value: stage 2 and 3 keep it as it is.

| symbol | here                | symbol | here          |
|--------|---------------------|--------|---------------|
| x      | observation         | v_phi  | policy        |
| a_1    | action (chunk)      | t      | t             |

Reads a dataset; writes `runs/ENV/bc/{config.json, metrics.csv, model.eqx, train_state.eqx,
train_state.previous.eqx}`.
Source: EVOR, arXiv 2510.08218, stage 1; flow matching, arXiv 2210.02747. *Ours*, because the paper does not disclose
it: batch size, flow steps, standardised observations.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from common import data, sources
from common.args import TrainArgs, check
from common.envs import default_run_dir, run_name
from common.errors import run_cli
from common.networks import FlowPolicy, make_policy
from common.rotation import Rotation, pad
from common.training import (
    Run,
    Standardizer,
    chunked,
    copy_to_devices,
    first_host_first,
    join_hosts,
    learning_rate,
    spread,
    stack_replicas,
)

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(steps=2_000, width=128, batch_size=128, episodes=30, chunk=500),
    "preview": dict(steps=100_000, schedule="cosine", learning_rate=1e-3),
}


@dataclasses.dataclass(frozen=True)
class Args(TrainArgs):
    """Stage 1: train the base policy by flow-matching behaviour cloning."""


class BCData(NamedTuple):
    """The dataset as it lies on the device; an argument of every jitted function, never a closure."""

    observations: Float[Array, "rows observation"]  # standardised
    actions: Float[Array, "rows action"]
    starts: Int[Array, " n"]  # rows at which a transition starts
    count: Int[Array, ""]  # how many of `starts` count; the others fill up a file that is shorter than the longest


class TrainState(NamedTuple):
    """Arrays only; with replicas, each leaf has a leading axis."""

    policy: FlowPolicy
    opt_state: optax.OptState
    step: Int[Array, ""]


# --- Maths -------------------------------------------------------------------------------------------------------


def bc_loss_one(
    policy: FlowPolicy,
    observation: Float[Array, " observation"],
    a_1: Float[Array, " action"],
    a_0: Float[Array, " action"],
    t: Float[Array, ""],
) -> Float[Array, ""]:
    """Flow-matching loss of one example: mean over coordinates of `(v(a_t, t | x) - (a_1 - a_0))^2`."""
    a_t = (1.0 - t) * a_0 + t * a_1
    velocity = policy.velocity(policy.features(observation), a_t, t)
    return jnp.mean((velocity - (a_1 - a_0)) ** 2)


def bc_loss(
    policy: FlowPolicy,
    observations: Float[Array, "batch observation"],
    actions: Float[Array, "batch action"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Mean of `bc_loss_one` over a batch, with fresh `a_0 ~ N(0, I)` and `t ~ U[0, 1]`."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, actions.shape)
    t = jax.random.uniform(time_key, actions.shape[:1])
    return jnp.mean(jax.vmap(bc_loss_one, (None, 0, 0, 0, 0))(policy, observations, actions, noise, t))


# --- Training ----------------------------------------------------------------------------------------------------


def make_optimizer(args: Args) -> optax.GradientTransformation:
    return optax.adam(learning_rate(args.learning_rate, args.schedule, args.steps))


def action_chunks(
    actions: Float[Array, "rows action"], starts: Int[Array, " batch"], horizon: int
) -> Float[Array, "batch chunk"]:
    """The `horizon` actions from each start on, as one vector: `[a_i, ..., a_{i+h-1}]`."""
    return jax.vmap(lambda start: actions[start + jnp.arange(horizon)].reshape(-1))(starts)


def train_step(args: Args, state: TrainState, dataset: BCData, key: PRNGKeyArray) -> tuple[TrainState, dict]:
    """One gradient step of one replica. The key is derived from the step, so a resumed run draws the same batches."""
    batch_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step))
    starts = dataset.starts[jax.random.randint(batch_key, (args.batch_size,), 0, dataset.count)]
    observations = dataset.observations[starts]
    actions = action_chunks(dataset.actions, starts, args.horizon)
    loss, gradient = jax.value_and_grad(bc_loss)(state.policy, observations, actions, key=loss_key)
    updates, opt_state = make_optimizer(args).update(gradient, state.opt_state)
    state = TrainState(optax.apply_updates(state.policy, updates), opt_state, state.step + 1)
    return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


train_chunk = chunked(train_step)


def init_state(args: Args, header: dict[str, Any], *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica."""
    policy = make_policy(header, key=key)
    return TrainState(policy, make_optimizer(args).init(policy), jnp.zeros((), jnp.int32))


def main(args: Args) -> dict[str, float]:
    """Trains the base policy of every seed; returns the last metrics."""
    args = dataclasses.replace(args, save_every=min(args.save_every, args.steps))
    check(args)
    if args.distributed:
        join_hosts()
    name = run_name(args.env, args.dataset)
    path, source = first_host_first(lambda: sources.find_files(args.env, args.dataset, episodes=args.episodes))
    info = sources.describe(path, source)
    files = sources.data_files(path)
    trajectories = data.load_trajectories(files[0], env=args.env)
    data.print_summary(trajectories, info, tasks=(), discount=0.0, files=len(files))

    dims = trajectories.observations.shape[1]
    standardizer = Standardizer.of(trajectories.observations, ignore=args.ignore_observations)
    longest = max(data.check_headers(file, like=trajectories) for file in files)

    def load(file: Path) -> BCData:
        """What training needs of one file, on the devices."""
        found = trajectories if file == files[0] else data.load_trajectories(file, env=args.env)
        starts = data.transition_starts(found.terminals, args.horizon, where=file.name)
        arrays = standardizer.rows(found.observations), found.actions, starts
        dataset = BCData(*(jnp.asarray(pad(array, longest)) for array in arrays), jnp.asarray(len(starts)))
        return copy_to_devices(dataset, args.seeds)

    rotation = Rotation(files, load, every=args.file_steps, steps=args.steps)
    data.transition_starts(trajectories.terminals, args.horizon, where=files[0].name)  # before an old run is deleted
    header = dict(
        stage="bc",
        env=name,
        observation_dim=dims,
        action_dim=trajectories.actions.shape[1],
        horizon=args.horizon,
        width=args.width,
        depth=args.depth,
        seeds=args.all_seeds,
        data=info,
        args=args,
    )
    run = Run(
        (args.run_dir or default_run_dir(name, quick=args.quick)) / "bc",
        header,
        replicas=[("", s) for s in args.all_seeds],
        args=args,
    )

    replica_keys = jax.vmap(jax.random.key)(np.asarray(args.all_seeds))
    keys = jax.vmap(lambda key: jax.random.split(key))(replica_keys)
    init_keys, train_keys = keys[:, 0], keys[:, 1]
    state = stack_replicas(lambda key: init_state(args, header, key=key), init_keys)
    state = run.restore(state)
    rotation.at(int(np.max(state.step)))  # loads before the progress bar of training starts
    state, train_keys = spread((state, train_keys), args.seeds)
    metrics = run.train(
        state,
        lambda state, step: train_chunk(args, state, rotation.at(step), train_keys),
        model=lambda state: (state.policy, standardizer),
    )
    print(f"base policy: {run.directory / 'model.eqx'}")
    return metrics


if __name__ == "__main__":
    run_cli(main, Args, PRESETS)
