"""The baselines: their updates against loops in NumPy, and the laws and values they learn against known ones."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evor_bc
import evor_infer
from baselines import critics
from benchmarks import probes
from common.cli import parse_args
from common.errors import UserError
from common.flow import Ode
from common.networks import DirectCritic
from common.returns import affine_axis
from tests.helpers import mostly_slow, tiny_dataset

ATOMS = np.linspace(-2.0, 2.0, 9)
UNIT = affine_axis(0.0, 1.0, low=-1.0, high=1.0)  # the environment's units


def loop_projection(values, weights, atoms):
    """C51's projection as its paper writes it: neighbours below and above, one value at a time."""
    result, step = np.zeros(len(atoms)), atoms[1] - atoms[0]
    for value, weight in zip(values, weights, strict=True):
        place = (min(max(value, atoms[0]), atoms[-1]) - atoms[0]) / step
        lower, upper = int(np.floor(place)), int(np.ceil(place))
        if lower == upper:
            result[lower] += weight
        else:
            result[lower] += weight * (upper - place)
            result[upper] += weight * (place - lower)
    return result


@pytest.mark.parametrize(
    "values", [[-2.0, 2.0], [-9.0, 9.0], [0.1, -1.9], [0.5, 0.5], [1.99, -1.99], [-0.25, 0.0], [1.5, 7.0]]
)
def test_projection_is_c51s(values: list[float]):
    """At atoms, between them, at and beyond both ends of the support."""
    weights = np.array([0.3, 0.7])
    found = critics.project(jnp.array(values), jnp.array(weights), jnp.array(ATOMS))
    np.testing.assert_allclose(found, loop_projection(values, weights, ATOMS), atol=1e-6)
    np.testing.assert_allclose(found.sum(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found @ ATOMS, weights @ np.clip(values, -2, 2), atol=1e-6)  # keeps the mean


def test_quantile_huber_is_qrs():
    rng = np.random.default_rng(0)
    quantiles, values = rng.normal(size=5) * 2, np.append(rng.normal(size=7) * 2, 0.0)
    quantiles[2] = values[3]  # an error of zero
    total = 0.0
    for i, q in enumerate(quantiles):
        tau, part = (i + 0.5) / 5, 0.0
        for y in values:
            u = y - q
            huber = u * u / 2 if abs(u) < 0.7 else 0.7 * (abs(u) - 0.35)
            part += abs(tau - (u < 0)) * huber / 0.7
        total += part / len(values)
    found = critics.quantile_huber(jnp.array(quantiles, jnp.float32), jnp.array(values, jnp.float32), 0.7)
    np.testing.assert_allclose(found, total, rtol=1e-5)


def test_quantile_huber_is_least_at_the_quantiles():
    """Of a law with atoms at 0 and 10, with probability 0.4 and 0.6: two of the five levels are below 0.4."""
    values = jnp.array([0.0] * 4 + [10.0] * 6)
    best = critics.quantile_huber(jnp.array([0.0, 0.0, 10, 10, 10]), values, 0.01)
    for other in ([0.0, 10, 10, 10, 10], [0.0, 0, 0, 10, 10], [0.0, 0, 10, 10, 11], [5.0, 5, 5, 5, 5]):
        assert critics.quantile_huber(jnp.array(other), values, 0.01) > best


def critic_of(kind: str, seed: int = 0) -> DirectCritic:
    outputs = {"scalar": 2, "c51": 9, "qr": 4}[kind]
    critic = DirectCritic(3, 2, kind=kind, outputs=outputs, width=8, depth=2, key=jax.random.key(seed))
    critic = eqx.tree_at(lambda c: c.mlps, critic, jax.tree.map(lambda x: 3.0 * x + 0.01, critic.mlps))
    return critics.with_atoms(critic, jnp.float32(-2.0), jnp.float32(2.0))


def test_one_possible_return_is_the_first_atom():
    """Fails if the atoms coincide: the projection would divide zero by zero."""
    critic = critics.with_atoms(critic_of("c51"), jnp.float32(3.0), jnp.float32(3.0))
    projected = critics.project(jnp.full(9, 3.0), jnp.full(9, 1 / 9), critic.atoms)
    np.testing.assert_allclose(projected, [1.0, *[0.0] * 8], atol=1e-6)


@pytest.mark.parametrize("kind", ["scalar", "c51", "qr"])
@pytest.mark.parametrize("bootstrap", [0.0, 0.9, 0.99**5])
@pytest.mark.parametrize("reward", [-0.5, 0.0, 3.0])
def test_td_loss_is_the_formula(kind: str, bootstrap: float, reward: float):
    """One transition, in NumPy; with g = 0 the next state says nothing. Bootstrapped values are clipped to [-1, 1]."""
    online, target = critic_of(kind), critic_of(kind, 1)
    rng = np.random.default_rng(0)
    x, a, next_x, next_a = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in (3, 2, 3, 2))
    arguments = (online, target, x, a, jnp.float32(reward), jnp.float32(bootstrap))
    limits = dict(margin=0.0, threshold=0.3)
    loss, mean = critics.td_loss_one(*arguments, next_x, next_a, UNIT, **limits)

    out, following = np.asarray(online(x, a), float), np.asarray(target(next_x, next_a), float)
    if kind == "scalar":
        values, weights = np.array([following.mean()]), np.ones(1)
    elif kind == "c51":
        values = np.asarray(target.atoms, float)
        weights = np.exp(following) / np.exp(following).sum()
    else:
        values, weights = following, np.full(len(following), 1 / len(following))
    values = reward + bootstrap * np.clip(values, -1, 1)
    if kind == "scalar":
        assert len(out) == 2 and abs(out[0] - out[1]) > 1e-3
        expected = ((out[0] - values[0]) ** 2 + (out[1] - values[0]) ** 2) / 2
    elif kind == "c51":
        expected = -loop_projection(values, weights, ATOMS) @ (out - np.log(np.exp(out).sum()))
    else:
        expected = float(critics.quantile_huber(jnp.asarray(out), jnp.asarray(values), 0.3))
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    np.testing.assert_allclose(mean, weights @ values, rtol=2e-5, atol=1e-6)
    elsewhere, _ = critics.td_loss_one(*arguments, next_x + 1, next_a - 1, UNIT, **limits)
    beyond = kind == "c51" and reward == 3.0  # all of the target is beyond the atoms, wherever it comes from
    assert np.isclose(elsewhere, loss, rtol=1e-5) == (bootstrap == 0.0 or beyond)


@pytest.mark.parametrize("kind", ["scalar", "c51", "qr"])
def test_no_gradient_reaches_the_target_or_the_atoms(kind: str):
    online, target = critic_of(kind), critic_of(kind, 1)
    x, a = jnp.ones(3), jnp.ones(2)

    def loss(online, target):
        transition = (x, a, jnp.float32(0.3), jnp.float32(0.9), -x, -a)
        return critics.td_loss_one(online, target, *transition, UNIT, margin=4.0, threshold=0.3)[0]

    of_online, of_target = jax.grad(loss, argnums=(0, 1))(online, target)
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_target)) and not of_online.atoms.any()
    assert any(leaf.any() for leaf in jax.tree.leaves(of_online.mlps))


# --- What they learn ---------------------------------------------------------------------------------------------

TRAINING = critics.Args(
    width=64, depth=2, steps=1_500, steps_per_call=1_500, batch_size=128, learning_rate=1e-3, schedule="cosine",
    tau=0.02,
)  # fmt: skip


@pytest.mark.parametrize("probe", [probes.CHAIN, probes.STOCHASTIC_POLICY, probes.MASKS], ids=lambda p: p.name)
def test_the_scalar_critic_learns_the_expected_return(probe: probes.Probe):
    """Fails without the mask, with the wrong next action, or with returns in the wrong units: the values differ by 0.2
    or more between those and the truth, which is met to 0.03."""
    critic, scale = probes.train(probe, TRAINING, learner=critics)
    for query, (values, weights) in probe.laws.items():
        found = probes.sample_returns(critic, scale, probe, query, num=1)[0, 0]
        np.testing.assert_allclose(found, np.dot(values, weights), atol=0.03, err_msg=str(query))


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        pytest.param(dict(critic="c51", atoms=401), 0.06, marks=pytest.mark.slow),
        (dict(critic="qr", huber=0.001), 0.04),
    ],
)
@pytest.mark.parametrize(
    "probe", mostly_slow([probes.CHAIN, probes.STOCHASTIC_REWARD], but=[probes.CHAIN]), ids=lambda p: p.name
)
def test_c51_and_qr_learn_the_law(probe: probes.Probe, changes: dict, bound: float):
    """Wasserstein-1 distance to the exact law; a point mass at the mean is off by more than 0.3. 51 atoms on the twenty
    units of possible returns, or a Huber loss that is wide beside the returns, would smear the law by 0.1 or more."""
    critic, scale = probes.train(probe, dataclasses.replace(TRAINING, **changes), learner=critics)
    assert probes.w1(critic, scale, probe).max() < bound


def test_all_start_from_the_law_of_a_flow():
    """N(0, 1), on the return axis: its mean and its quantiles, up to the small outputs of an untrained network."""
    noise = jnp.array([-1.0, 0.0, 1.0])
    for kind, outputs in (("scalar", 1), ("c51", 801), ("qr", 400)):
        critic = DirectCritic(3, 2, kind=kind, outputs=outputs, width=16, depth=2, key=jax.random.key(0))
        critic = critics.with_atoms(critic, jnp.float32(-5.0), jnp.float32(5.0))
        draws = critic.sample(jnp.ones(3), jnp.ones(2), noise, Ode())
        np.testing.assert_allclose(draws, 0.0 * noise if kind == "scalar" else noise, atol=0.05)


# --- The script --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "next_action"),
    [("scalar", "base"), ("scalar", "softmax"), ("c51", "dataset"), ("c51", "softmax"), ("qr", "base")],
)
def test_training_ends_in_an_agent_of_evor_infer(tmp_path: Path, kind: str, next_action: str):
    """Also that the log-mean-exp is exact: no number of draws changes it."""
    common = dict(
        env="my-robot", dataset=tiny_dataset(tmp_path / "data.npz"), run_dir=tmp_path / "run", width=16, depth=2,
        batch_size=16, steps=20, steps_per_call=10, save_every=10,
    )  # fmt: skip
    evor_bc.main(evor_bc.Args(**common))
    critics.main(critics.Args(**common, critic=kind, next_action=next_action, num_next_actions=2, atoms=11))
    agent = evor_infer.load_agent(tmp_path / "run")
    assert isinstance(agent.critic, DirectCritic) and agent.critic.kind == kind
    observations, actions, key = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32), jax.random.key(0)
    assert agent.act(observations, key=key, num_actions=4).shape == (4, 1, 2)
    few, many = (agent.q_value(observations, actions, num_returns=n, key=key) for n in (1, 64))
    np.testing.assert_array_equal(few, many)
    draws = agent.sample_returns(observations, actions, 2_000, key=key)
    if kind == "scalar":
        np.testing.assert_allclose(draws, jnp.broadcast_to(few[:, None], draws.shape), rtol=1e-5)
    axis = agent.axis
    exact = agent.q_value(observations, actions, return_temperature=1.0, key=key)
    expected = evor_infer.log_mean_exp(draws, axis.spread)
    np.testing.assert_allclose(expected, exact, atol=0.1 * float(axis.spread))
    if kind == "c51":  # over the possible returns, and 0.1 of their range beyond
        low, high = (float(axis.to_environment(agent.critic.atoms[i])) for i in (0, -1))
        np.testing.assert_allclose([low, high], [-110.0, 10.0], rtol=1e-4, atol=1e-3)


def test_flags():
    args = parse_args(critics.Args, critics.PRESETS, ["--preview", "--critic", "c51"])
    assert (args.critic, args.outputs, args.method, args.steps) == ("c51", 51, "c51", 30_000)
    assert parse_args(critics.Args, critics.PRESETS, ["--critic", "qr", "--quantiles", "8"]).outputs == 8
    with pytest.raises(UserError, match="--atoms must be at least 2"):
        critics.main(critics.Args(critic="c51", atoms=1))
