"""The next-action bank: actions of frozen policies, drawn once for many states and kept in a file."""

import functools
import itertools
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Float16, Int, PRNGKeyArray
from tqdm import tqdm

from common import checkpoint
from common.flow import Ode
from common.networks import VelocityPolicy
from common.progress import progress

CPU_ROWS, ROWS = 4096, 131_072  # actions per call: a CPU is faster where the activations stay in its cache


@functools.partial(jax.jit, static_argnames=("num_actions", "ode"))
def sample_actions(
    policy: VelocityPolicy,
    observations: Float[Array, "batch observation"],
    index: Int[Array, " batch"],
    num_actions: int,
    noise_scale: Float[ArrayLike, ""],
    ode: Ode,
    *,
    key: PRNGKeyArray,
) -> Float16[Array, "batch num_actions action"]:
    """Actions in each (standardised) observation; the noise depends on the key and the observation's `index` alone."""

    def one(observation, i):
        noise = jax.random.normal(jax.random.fold_in(key, i), (num_actions, policy.spec.action))
        return policy.sample(observation, noise_scale * noise, ode).astype(jnp.float16)

    return jax.vmap(one)(observations, index)


def make_bank(
    policies: VelocityPolicy,
    observations: Float[Array, "rows observation"],
    states: Int[np.ndarray, " n"],
    *,
    seeds: Sequence[int],
    num_actions: int,
    noise_scale: float,
    ode: Ode,
    draw: int = 0,
    path: Path | None = None,
    made_of: dict[str, Any],
) -> Float16[np.ndarray, "seeds n num_actions action"]:
    """`num_actions` draws of each seed's policy in the rows `states`, in half precision.

    The rounding, at most 5e-4 for actions in [-1, 1], is far below the error of the ODE solve. The bank is read from
    `path` if one stands there that was made of the same things (`made_of`: the policy, the data), else made and saved.

    Args:
        policies: one policy per seed, along a leading axis.
        observations: standardised, all rows of the dataset.
        noise_scale: standard deviation of the noise that the draws start from.
        draw: another number draws other actions.
        path: where the bank is kept; nowhere if None.
    """
    header = dict(
        stage="bank", seeds=seeds, num_actions=num_actions, noise_scale=noise_scale, ode=ode._asdict(), draw=draw,
        states=len(states), **made_of,
    )  # fmt: skip
    header, remedy = checkpoint.plain(header), "delete it."
    if path is not None and path.is_file() and checkpoint.read_header(path, stage="bank", remedy=remedy) == header:
        like = jax.ShapeDtypeStruct((len(seeds), len(states), num_actions, policies.spec.action), jnp.float16)
        found, bank = checkpoint.load(path, lambda _: like, stage="bank", remedy=remedy)
        if found == header:  # no other run has replaced it meanwhile
            return np.asarray(bank)
    drawn = dict(num_actions=num_actions, noise_scale=noise_scale, ode=ode, draw=draw)
    bank = draw_bank(policies, observations, states, seeds=seeds, **drawn)
    if path is not None and jax.process_index() == 0:
        checkpoint.save(path, header, bank)
    return bank


def draw_bank(
    policies: VelocityPolicy,
    observations: Float[Array, "rows observation"],
    states: Int[np.ndarray, " n"],
    *,
    seeds: Sequence[int],
    num_actions: int,
    noise_scale: float,
    ode: Ode,
    draw: int,
) -> Float16[np.ndarray, "seeds n num_actions action"]:
    """The bank, drawn in batches. Prints what it takes before it starts: memory, and the time, from a first batch."""
    bank = np.empty((len(seeds), len(states), num_actions, policies.spec.action), np.float16)
    rows = CPU_ROWS if jax.default_backend() == "cpu" else ROWS
    batch = min(max(1, rows // num_actions), len(states))

    def draw_batch(replica: int, first: int) -> np.ndarray:
        policy = jax.tree.map(lambda x: x[replica], policies)
        # The last batch is filled up, so that one shape is compiled.
        index = np.minimum(np.arange(first, first + batch), len(states) - 1)
        # A stream of its own: the seed's key and its first splits belong to training.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seeds[replica]), 2**31 - 1), draw)
        inputs = observations[states[index]], jnp.asarray(index)
        actions = sample_actions(policy, *inputs, num_actions, noise_scale, ode, key=key)
        return np.asarray(actions)[: len(states) - first]

    draw_batch(0, 0)  # compiles
    began = time.monotonic()
    draw_batch(0, 0)
    seconds = (time.monotonic() - began) * len(seeds) * math.ceil(len(states) / batch)
    tqdm.write(
        f"next-action bank: {num_actions} actions in each of {len(states):,} states, {len(seeds)} policies: "
        f"{bank.nbytes / 2**20:,.0f} MiB, about {seconds:,.0f} s"
    )
    beside = threading.current_thread() is not threading.main_thread()  # while another file is trained on: no bar
    total = len(seeds) * len(states)
    with progress(total=total, desc="next-action bank", unit="state", unit_scale=True, disable=beside) as bar:
        for replica, first in itertools.product(range(len(seeds)), range(0, len(states), batch)):
            drawn = draw_batch(replica, first)
            bank[replica, first : first + batch] = drawn
            bar.update(len(drawn))
    return bank
