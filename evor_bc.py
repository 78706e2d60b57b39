"""Stage 1 of EVOR: the base policy, by flow-matching behaviour cloning.

    python evor_bc.py --env cube-double-play

The base policy `pi_base(a | x)` imitates the data. It is a velocity field `v_phi(a_t, t | x)` that moves Gaussian noise
to actions, trained on straight paths between the two:

    a_0 ~ N(0, I),   a_1 = a (data),   t ~ U[0, 1),   a_t = (1 - t) a_0 + t a_1
    L(phi) = E || v_phi(a_t, t | x) - (a_1 - a_0) ||^2 / d,   d coordinates
    sampling: a_0 ~ N(0, I), integrate da/dt = v_phi(a, t | x) from t = 0 to 1, clip to [-1, 1]

With `--horizon H` an action is a chunk of the next H actions, executed open loop (Q-chunking, arXiv 2507.07969).
No reward is used. The policy is never trained on the value: stages 2 and 3 keep it as it is.

| symbol | here           | symbol | here              |
|--------|----------------|--------|-------------------|
| x      | observation    | v_phi  | `policy.velocity` |
| a_1    | action (chunk) | a_0, t | noise, t          |

Reads a dataset; writes `runs/ENV/bc/{config.json, metrics.csv, model.eqx, train_state.eqx,
train_state.previous.eqx}`.
Source: EVOR, arXiv 2510.08218, stage 1; flow matching, arXiv 2210.02747. *Ours*, because the paper does not disclose
it: batch size, flow steps, standardised observations.
"""

import dataclasses
import gc
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from common import checkpoint
from common.args import TrainArgs, learning_rate
from common.cli import run_cli
from common.errors import UserError
from common.files import sha256
from common.networks import PolicySpec, Sizes, Standardizer, VelocityPolicy, make_policy
from common.problem import BasePolicy, Dataset, Problem, Replica, sample_batch
from common.replicas import chunked
from common.run import STATE_FILES, Run, differences
from recipes import recipe_of

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(steps=2_000, width=128, batch_size=128, episodes=30, steps_per_call=500),
    "preview": dict(steps=100_000, width=256, schedule="cosine", learning_rate=1e-3),
}


@dataclasses.dataclass(frozen=True)
class Args(TrainArgs):
    """Stage 1: train the base policy by flow-matching behaviour cloning. Its arguments are those of every training."""


class TrainState(NamedTuple):
    """Arrays only; with replicas, each leaf has a leading axis."""

    policy: VelocityPolicy
    opt_state: optax.OptState
    step: Int[Array, ""]


class TrainedPolicy(NamedTuple):
    """What `model.eqx` keeps: the policies of all seeds (leading axis), and what scales their inputs."""

    policy: VelocityPolicy
    standardizer: Standardizer

    def spec(self) -> PolicySpec:
        return self.policy.spec


# --- Maths -------------------------------------------------------------------------------------------------------


def bc_loss_one(
    policy: VelocityPolicy,
    observation: Float[Array, " observation"],
    a_1: Float[Array, " action"],
    a_0: Float[Array, " action"],
    t: Float[Array, ""],
) -> Float[Array, ""]:
    """Flow-matching loss of one example: mean over coordinates of `(v(a_t, t | x) - (a_1 - a_0))^2`."""
    if a_0.shape != a_1.shape or a_1.ndim != 1 or t.shape != ():
        raise ValueError(f"a_0 and a_1 must be vectors and t a number, not {a_0.shape}, {a_1.shape}, {t.shape}.")
    a_t = (1.0 - t) * a_0 + t * a_1
    velocity = policy.velocity(policy.features(observation), a_t, t)
    return jnp.mean((velocity - (a_1 - a_0)) ** 2)


def bc_loss(
    policy: VelocityPolicy,
    observations: Float[Array, "batch observation"],
    actions: Float[Array, "batch action"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """Mean of `bc_loss_one` over a batch, with fresh `a_0 ~ N(0, I)` and `t ~ U[0, 1)`."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, actions.shape)
    t = jax.random.uniform(time_key, actions.shape[:1])
    return jnp.mean(jax.vmap(bc_loss_one, (None, 0, 0, 0, 0))(policy, observations, actions, noise, t))


# --- Training ----------------------------------------------------------------------------------------------------


def make_optimizer(args: Args) -> optax.GradientTransformation:
    return optax.adam(learning_rate(args.learning_rate, args.schedule, args.steps))


def train_step(args: Args, state: TrainState, dataset: Dataset, replica: Replica) -> tuple[TrainState, dict]:
    """One gradient step of one replica. The key is derived from the step, so a resumed run draws the same batches."""
    batch_key, loss_key = jax.random.split(jax.random.fold_in(replica.key, state.step))
    batch = sample_batch(dataset, args.batch_size, args.horizon, key=batch_key)
    loss, gradient = jax.value_and_grad(bc_loss)(state.policy, batch.observations, batch.actions, key=loss_key)
    updates, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.policy)
    state = TrainState(optax.apply_updates(state.policy, updates), opt_state, state.step + 1)
    return state, {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}


train_chunk = chunked(train_step)


def init_state(args: Args, sizes: Sizes, *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica."""
    policy = make_policy(PolicySpec(sizes.observation, sizes.chunk, args.width, args.depth), key=key)
    return TrainState(policy, make_optimizer(args).init(policy), jnp.zeros((), jnp.int32))


def main(args: Args) -> dict[str, float]:
    """Trains the base policy of every seed; returns the last metrics."""
    with Run(args, stage="bc") as run:
        problem = Problem(args)

        def model(state: TrainState) -> TrainedPolicy:
            return TrainedPolicy(state.policy, problem.standardizer)

        state = run.start(problem, init_state, model=model)
        for step in run.steps():
            state, metrics = train_chunk(args, state, problem.data(step), problem.replicas)
            run.record(state, metrics)
    if jax.process_index() == 0:
        print(f"base policy: {run.model_path}")
    return run.means()


# --- The base policy of stage 2 ----------------------------------------------------------------------------------


def load(path: Path) -> tuple[dict[str, Any], TrainedPolicy]:
    """Header and policies of a `model.eqx`.

    Raises:
        UserError: there is none, or it is damaged.
    """

    def build(header):
        spec = checkpoint.read_spec(PolicySpec, header["model"])
        keys = jax.random.split(jax.random.key(0), len(header["seeds"]))
        standardizer = Standardizer(jnp.zeros(spec.observation), jnp.ones(spec.observation))
        return TrainedPolicy(jax.vmap(lambda key: make_policy(spec, key=key))(keys), standardizer)

    return checkpoint.load(path, build, stage="bc", remedy="train it with evor_bc.py first.")


def args_for(args: Any) -> Args:
    """The arguments with which a missing base policy is trained: the preset of stage 2, its `policy_seeds` and
    `policy_steps`, and what `shared` names."""
    preset = "quick" if args.quick else "preview" if args.preview else None
    changes = dict(PRESETS[preset], **{preset: True}) if preset else {}
    unit = changes.get("steps_per_call", Args.steps_per_call)
    shared = ("env", "dataset", "episodes", "horizon", "ignore_observations", "track", "distributed")
    changes |= {name: getattr(args, name) for name in shared}
    if args.policy_steps is not None:
        unit = math.gcd(args.policy_steps, unit)
        changes |= dict(steps=args.policy_steps, steps_per_call=unit)
    return Args(
        **changes,
        seeds=len(args.policy_seeds),
        first_seed=args.policy_seeds[0],
        run_dir=args.directory,
        file_steps=math.ceil(args.file_steps / unit) * unit,
    )


def is_trained(path: Path) -> bool:
    """Whether base policies that were trained to their end stand at `path`."""
    header = checkpoint.read_header(path, stage="bc", remedy="train it anew.") if path.is_file() else None
    return header is not None and header["step"] >= header["args"]["steps"]


def load_or_train(args: Any, *, sizes: Sizes, data_sha256: str) -> BasePolicy:
    """The base policies of `args.policy_seeds`, for stage 2.

    Where none stand in stage 2's own run directory they are trained; a training that was interrupted is continued.

    Raises:
        UserError: there are none and stage 2 has a `policy_run_dir`; or those that stand there are of another
            environment, horizon or seed, ignore other coordinates, or are not trained to their end.
    """
    path = (args.policy_run_dir or args.directory) / "bc" / "model.eqx"
    header = checkpoint.read_header(path, stage="bc", remedy="train it anew.") if path.is_file() else None
    done = is_trained(path)
    if not done and args.policy_run_dir is None:
        begun = header is not None or any((path.parent / name).is_file() for name in STATE_FILES)
        wanted = args_for(args)
        for difference in differences(header, wanted) if header else ():
            raise UserError(
                f"the base policy at {path} is not trained to its end, and has {difference}: "
                f"finish it with evor_bc.py --resume, or pass another --run-dir."
            )
        print(f"{'unfinished' if begun else 'no'} base policy at {path}: training it first.", flush=True)
        main(dataclasses.replace(wanted, resume=begun))
        gc.collect()  # stage 1's data, before stage 2's are loaded
    elif not path.is_file():
        raise UserError(f"there is no base policy at {path}: train it with evor_bc.py, or leave out --policy-run-dir.")
    elif not done:
        raise UserError(f"the base policy at {path} is not trained to its end: finish it with evor_bc.py --resume.")
    header, (policies, standardizer) = load(path)
    _check_fits(args, header, path, sizes, data_sha256)
    index = np.array(checkpoint.choose_seeds(header, path, args.policy_seeds))
    print(
        f"base policy: {path}, {header['step']:,} steps, {policies.spec.depth} x {policies.spec.width}, "
        f"trained on {header['data']['name']} (sha256 {header['data']['sha256'][:12]})"
    )
    return BasePolicy(jax.tree.map(lambda x: jnp.asarray(x)[index], policies), standardizer, path, sha256(path))


def _check_fits(args: Any, header: dict[str, Any], path: Path, sizes: Sizes, data_sha256: str) -> None:
    """Whether base policies fit what stage 2 is about to train.

    Raises:
        UserError: they do not.
    """
    spec = header["model"]
    expected = dict(env=args.name, horizon=sizes.horizon, observation=sizes.observation, action=sizes.chunk)
    checkpoint.require(header | dict(observation=spec["observation"], action=spec["action"]), path, **expected)
    if header["data"]["sha256"] != data_sha256 and args.policy_run_dir is None:
        raise UserError(
            f"the base policy at {path} was trained on other data, {header['data']['name']}: pass another --run-dir, "
            f"or --policy-run-dir {path.parent.parent} if that is meant."
        )
    ignored = header["args"].get("ignore_observations", [])
    if args.ignore_observations and sorted(args.ignore_observations) != sorted(ignored):
        raise UserError(
            f"--ignore-observations {list(args.ignore_observations)}: the base policy at {path} ignores {ignored}: "
            f"train it anew, or leave the flag out."
        )


if __name__ == "__main__":
    run_cli(main, Args, PRESETS, recipe_of=recipe_of)
