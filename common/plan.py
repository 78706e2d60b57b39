"""How long a training will take on this machine: floating-point operations, counted, over the rate of its products."""

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from common.environments import episode_steps
from common.flops import critic_macs, policy_macs, step_flops
from common.machine import num_cores
from common.networks import CriticSpec, PolicySpec, Sizes, make_critic, make_policy

SHARE = 0.6  # of the rate of a matrix product, that a gradient step reaches on a CPU (results/speed)
STEPS_PER_SECOND = 600  # of a simulated manipulation on one core (results/speed); mazes are faster


class Stage(NamedTuple):
    """A part of a training."""

    what: str
    seconds: float


@functools.cache
def product_rate(width: int, devices: tuple[jax.Device, ...]) -> float:
    """FLOPs per second of one of `devices`, while each does a chain of matrix products of the networks' shape: the best
    of three. It is measured once in a process."""
    length = max(1, min(50 * 512**2 // width**2, 5_000))
    chain = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=length)[0])
    arrays = [jax.device_put((jnp.ones((256, width)), jnp.eye(width)), device) for device in devices]
    taken = []
    for _ in range(4):  # the first one compiles it
        began = time.perf_counter()
        jax.block_until_ready([chain(x, w) for x, w in arrays])
        taken.append(time.perf_counter() - began)
    return 2.0 * length * 256 * width**2 / min(taken)


def training_seconds(flops: float, width: int, replicas: int) -> float:
    """Of replicas of `flops` each, which share the devices."""
    devices = tuple(jax.local_devices()[:replicas])
    return math.ceil(replicas / len(devices)) * flops / (SHARE * product_rate(width, devices))


def policy_stage(args: Any, sizes: Sizes) -> Stage:
    """Stage 1 with its `Args`."""
    spec = PolicySpec(sizes.observation, sizes.chunk, args.width, args.depth)
    macs, first = policy_macs(eqx.filter_eval_shape(make_policy, spec, key=jax.random.key(0)))
    flops = 2.0 * args.batch_size * (3 * macs - first) * args.steps
    return Stage(f"base policy, {args.steps:,} steps", training_seconds(flops, args.width, args.seeds))


def value_stages(args: Any, sizes: Sizes) -> list[Stage]:
    """Stage 2 with its `Args`, and its last evaluation, in which an episode may take all the time it has."""
    replicas, heads = args.num_replicas, (args.head_width, args.head_depth)
    spec = CriticSpec(sizes.observation, sizes.chunk, args.critic, args.width, args.depth, *heads)
    critic = eqx.filter_eval_shape(make_critic, spec, key=jax.random.key(0))
    of_policy = PolicySpec(sizes.observation, sizes.chunk, args.width, args.depth)
    policy = eqx.filter_eval_shape(make_policy, of_policy, key=jax.random.key(0))
    training = training_seconds(step_flops(args, critic) * args.steps, args.width, replicas)
    features, velocity, _ = critic_macs(critic)
    draw, solve = policy_macs(policy)[0], args.ode.evaluations
    decision = 2.0 * args.num_actions * (solve * draw + features + args.num_returns * solve * velocity)
    simulated = 2.0 * args.eval_episodes * replicas * episode_steps(args.environment)  # of the base policy alone, too
    acting = decision * simulated / sizes.horizon / (SHARE * product_rate(args.width, (jax.local_devices()[0],)))
    evaluation = acting + simulated / (STEPS_PER_SECOND * num_cores())
    models = "1 reward model" if replicas == 1 else f"{replicas} reward models"
    return [
        Stage(f"{models}, {args.steps:,} steps", training),
        Stage("evaluation, at most", evaluation),
    ]


def print_plan(
    args: Any,
    preview: Any,
    sizes: Sizes,
    *,
    policy_args: Callable[[Any], Any],
    is_trained: Callable[[Path], bool],
) -> None:
    """Says what is trained and evaluated and how many minutes it takes, and what `--preview` would where that is more
    than an hour.

    Args:
        args, preview: the `Args` of stage 2 and the same with `--preview`.
        policy_args: the `Args` of stage 1 for those of stage 2.
        is_trained: whether a base policy stands at a path.
    """

    def stages(of: Any, horizon: int) -> list[Stage]:
        of_sizes = sizes._replace(horizon=horizon)
        path = (of.policy_run_dir or of.directory) / "bc" / "model.eqx"
        first = [] if is_trained(path) else [policy_stage(policy_args(of), of_sizes)]
        return [*first, *value_stages(of, of_sizes)]

    here = stages(args, args.horizon)
    print(
        f"plan, without compiling: {describe(here)}, on {num_cores()} core{'s' if num_cores() > 1 else ''}", flush=True
    )
    if seconds(here) > 3_600 and not args.preview:
        print(f"  with --preview: {describe(stages(preview, preview.horizon))}")


def seconds(stages: Sequence[Stage]) -> float:
    return sum(stage.seconds for stage in stages)


def describe(stages: Sequence[Stage]) -> str:
    """`base policy, 100,000 steps: 20 min; ...; 45 min in all`."""
    parts = [f"{stage.what}: {_time(stage.seconds)}" for stage in stages]
    return "; ".join([*parts, f"{_time(seconds(stages))} in all"])


def _time(seconds: float) -> str:
    if seconds < 60:
        return "below 1 min"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"
