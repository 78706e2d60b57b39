"""What is copied is called with other shapes, where nobody checks annotations: what would broadcast is refused."""

import os
import subprocess
import sys
from pathlib import Path

import evor_bc

ONES = """
import jax
import jax.numpy as jnp
import numpy as np
from common.data.transitions import chunk_rewards, monte_carlo_returns
from common.flow import Ode, integrate
from common.networks import MLP, DirectCritic, FlowCritic, FlowPolicy, LayerNorm, Linear, Standardizer
from common.returns import affine_axis, make_axis
from evor_bc import bc_loss_one
from evor_infer import log_mean_exp, select
from evor_value import Noise, td_target, value_loss_one

key = jax.random.key(0)
policy = FlowPolicy(3, 2, width=8, depth=2, key=key)
flow = FlowCritic(3, 2, kind="mlp", width=8, depth=2, key=key)
trunk = FlowCritic(3, 2, kind="trunk", width=8, depth=2, head_width=4, key=key)
normed = MLP(3, 1, width=8, depth=2, layer_norm=True, key=key)
quantiles = DirectCritic(3, 2, kind="qr", outputs=4, width=8, depth=2, key=key)


def o(*shape):
    return jnp.ones(shape)


def moving(*shape):
    return integrate(lambda z, t: jnp.ones(shape), o(3, 2), Ode(4))


def solving(*ode):
    return integrate(lambda z, t: z, o(2), Ode(*ode))


def host(*shape):
    return np.ones(shape, np.float32)


def target(*shape):
    axis = affine_axis(0.0, 1.0, low=-1.0, high=1.0)
    noise = Noise(o(4), o(4), o(4), o(*shape))
    return td_target("shared-noise", o(4), o(4), noise, lambda z, t: z, lambda z, t: z, axis, margin=0.0)


ends = np.array([False, False, False, False, True])
"""
RIGHT = """
normed(o(3)), LayerNorm(4)(o(4)), Linear(3, 2, key=key)(o(3)), jax.vmap(normed)(o(4, 3))
moving(3, 2), solving(np.int64(2)), policy.features(o(3)), policy.velocity(o(8), o(2), o())
flow.features(o(3), o(2)), flow.velocity(o(8), o(), o()), trunk.velocity(o(4), o(), o()), quantiles(o(3), o(2))
log_mean_exp(o(3, 3), o()), log_mean_exp(o(3), 0.5), select(o(3), 0.5, key=key)
bc_loss_one(policy, o(3), o(2), o(2), o()), value_loss_one(flow, o(3), o(2), o(), o(), o()), target(4)
log_mean_exp(o(4, 5), 1.0, o(4, 5)), Standardizer(o(3), o(3))(o(3))
monte_carlo_returns(host(5), host(5), ends, discount=0.9)
chunk_rewards(host(2, 5), host(2, 5), np.arange(3), horizon=2, discount=0.9)
make_axis(host(5), host(2), kind="std")
"""
WRONG = """
normed(o(4, 3))
normed(o(2))
LayerNorm(4)(o(1))
LayerNorm(4)(o(2, 4))
Linear(3, 2, key=key)(o(4, 3))
moving()
moving(1)
moving(3, 1)
moving(2)
solving(0)
solving(-1)
solving(2, "rk4")
solving(2.0)
integrate(lambda z, t: z, o(2) + 1j, Ode(2))
policy.features(o(5, 3))
policy.features(o(2))
policy.velocity(o(5, 8), o(2), o())
policy.velocity(o(8), o(1), o(2))
policy.velocity(o(8), o(2), o(1))
flow.features(o(2), o(3))
flow.velocity(o(8), o(1), o())
trunk.features(o(4), o(1))
trunk.velocity(o(8), o(), o())
trunk.velocity(o(4), o(), o(1))
quantiles(o(2), o(3))
log_mean_exp(o(3, 3), o(3))
log_mean_exp(o(4, 5), 1.0, o(5))
Standardizer(o(3), o(3))(o(3, 1))
bc_loss_one(policy, o(3), o(2), o(), o())
bc_loss_one(policy, o(3), o(2), o(2), o(1))
value_loss_one(flow, o(3), o(2), o(), o(), o(4))
target(4, 1)
log_mean_exp(o(3, 3), o(3, 1))
select(o(3), o(3), key=key)
select(o(2, 3), 0.5, key=key)
bc_loss_one(policy, o(5, 3), o(2), o(2), o())
bc_loss_one(policy, o(3), o(1, 2), o(1, 2), o())
monte_carlo_returns(host(5), host(4), ends, discount=0.9)
monte_carlo_returns(host(4), host(4), ends, discount=0.9)
chunk_rewards(host(2, 5), host(1, 5), np.arange(3), horizon=2, discount=0.9)
make_axis(host(5), host(2), kind="foo")
"""
TRY = """
for line in {lines!r}.strip().splitlines():
    try:
        result = eval(line)
    except (ValueError, TypeError) as error:
        print("refused", line)
"""


def refused(lines: str) -> list[str]:
    command = [sys.executable, "-c", ONES + TRY.format(lines=lines)]
    env = {key: value for key, value in os.environ.items() if key != "JAX_NUMPY_RANK_PROMOTION"}
    done = subprocess.run(command, cwd=Path(evor_bc.__file__).parent, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("refused ") for line in done.stdout.splitlines()]


def test_other_shapes_are_refused_and_right_ones_are_not():
    """In a process of its own: neither the type checker of the tests nor JAX's rank promotion is there to help."""
    assert refused(RIGHT) == []
    assert refused(WRONG) == WRONG.strip().splitlines()
