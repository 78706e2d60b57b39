"""The return axis: an invertible map that no unit changes, and the sample of returns that it is made from."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import probes
from common.data import files, transitions
from common.returns import AxisKind, ReturnAxis, affine_axis, make_axis
from tests.maths.test_value import TRAIN

KINDS = get_args(AxisKind)
# Returns of a sparse task: nearly all close to the lowest one, a few far above.
SPARSE = -100.0 + 100.0 * 0.97 ** np.random.default_rng(0).uniform(0, 400, 20_000)
BOUNDS = np.array([-100.0, 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_axis_is_increasing_and_invertible_far_beyond_the_data(kind: AxisKind):
    """Also where an iterated backup goes: at returns that no episode of the data has, up to the bounds and beyond."""
    axis = make_axis(SPARSE[SPARSE < -50], BOUNDS, kind=kind)
    returns = jnp.linspace(-130.0, 30.0, 2_001)
    z = axis.to_model(returns)
    assert np.all(np.diff(z) > 0)
    np.testing.assert_allclose(axis.to_environment(z), returns, atol=2e-3)
    if kind == "quantiles":  # the possible returns stay within reach of a network
        assert np.abs(axis.to_model(jnp.asarray(BOUNDS))).max() < 15.0


@pytest.mark.parametrize("kind", ["quantiles", "std"])
def test_the_datas_returns_are_spread_over_the_scale_of_the_noise(kind: AxisKind):
    """Wherever they lie in the possible ones: the worst case would give them a standard deviation of 0.02."""
    sample = np.random.default_rng(0).normal(-3.0, 0.5, 5_000)
    axis = make_axis(sample, np.array([-100.0, 0.0]), kind=kind)
    z = axis.to_model(jnp.asarray(sample, jnp.float32))
    assert float(z.mean()) == pytest.approx(0.0, abs=0.1) and 1.0 < float(z.std()) < 2.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_units_and_offsets_change_no_place(kind: AxisKind, unit: float):
    axis = make_axis(SPARSE, BOUNDS, kind=kind)
    other = make_axis(unit * (SPARSE + 7), unit * (BOUNDS + 7), kind=kind)
    returns = jnp.linspace(-110.0, 10.0, 50)
    np.testing.assert_allclose(other.to_model(unit * (returns + 7)), axis.to_model(returns), atol=1e-3)


def test_an_affine_axis_keeps_the_bellman_equation():
    """z = h(r + g h^-1(0)) + g z' must be R = r + g R': what `velocity` and `paper` stand on."""
    axis = affine_axis(-150.0, 50.0, low=-200.0, high=0.0)
    np.testing.assert_allclose(axis.to_model(jnp.array([-200.0, -150.0, 0.0])), [-1.0, 0.0, 3.0])
    reward, bootstrap, following = jnp.array([-2.0, 0.0]), jnp.array([0.99, 0.0]), jnp.array([-30.0, -77.0])
    z = axis.to_model(reward + bootstrap * axis.to_environment(jnp.zeros(2))) + bootstrap * axis.to_model(following)
    np.testing.assert_allclose(axis.to_environment(z), reward + bootstrap * following, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 3.0, -1e6])
def test_one_possible_return_is_a_law_too(kind: AxisKind, value: float):
    axis = make_axis(np.full(10, value), np.full(2, value), kind=kind)
    assert float(axis.to_environment(jnp.zeros(()))) == pytest.approx(value, rel=1e-6)
    assert np.all(np.diff(axis.to_model(value + (1 + abs(value)) * jnp.linspace(-1.0, 1.0, 9))) > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_data_that_never_succeed_leave_success_within_reach(kind: AxisKind):
    """All returns are the lowest one, the highest possible one is 100 above: with the spread that single precision
    alone asks for it would lie at 142 and, on the affine axis, at 20,000."""
    axis = make_axis(np.full(1_000, -100.0), BOUNDS, kind=kind)
    places = axis.to_model(jnp.array([-100.0, -99.0, 0.0]))
    assert np.all(np.diff(places) > 0) and np.abs(places).max() < (2_001 if kind == "std" else 50)


def test_rare_successes_have_their_place():
    """One row in 200 leads to success. Its return is told apart at least as well as on the axis of the bounds."""
    rare = np.concatenate([np.full(19_900, -100.0), -100.0 + 100.0 * 0.99 ** np.arange(100)])
    axis, coarse = (make_axis(rare, BOUNDS, kind=kind) for kind in ("quantiles", "bounds"))
    returns = jnp.linspace(-63.0, 0.0, 64)
    assert np.all(np.diff(axis.to_model(returns)) > np.diff(coarse.to_model(returns)))


def test_single_precision_tells_the_knots_apart():
    """Returns of 10,000 that differ by 0.1, a unit of the last place being 0.001."""
    axis = make_axis(np.random.default_rng(0).normal(1e4, 0.1, 5_000), np.array([0.0, 2e4]), kind="quantiles")
    assert np.all(np.diff(axis.returns) > 0) and np.all(np.isfinite(axis.to_model(axis.returns)))


def trajectories(rewards: list, masks: list, terminals: list) -> files.Trajectories:
    rows = len(rewards)
    return files.Trajectories(
        np.zeros((rows, 1), np.float32), np.zeros((rows, 1), np.float32), np.array(terminals, bool),
        np.array([rewards], np.float32), np.array([masks], np.float32),
    )  # fmt: skip


def test_returns_of_episodes_that_ended_are_those_of_the_data():
    """Two episodes of two transitions, solved at the second one."""
    episodes = trajectories([-1, 5, 9, -2, 7, 9], [1, 0, 1, 1, 0, 1], [0, 0, 1, 0, 0, 1])
    np.testing.assert_allclose(transitions.return_sample(episodes, discount=0.5), [[1.5, 5.0, 1.5, 7.0]])


@pytest.mark.parametrize("discount", [0.9, 0.99, 0.9999])
def test_what_a_cut_episode_lacks_is_filled_with_other_returns(discount: float):
    """A coin is tossed for ever, and the data has single tosses: returns have mean 0 and variance 1 / (1 - g^2). Left
    as they are, they would be -1 or 1; filled with their mean, they would have variance 1 too."""
    tosses = 20_000
    rewards = np.stack([np.tile([-1.0, 1.0], tosses // 2), np.zeros(tosses)], axis=1).ravel()
    sample = transitions.return_sample(
        trajectories(list(rewards), [1] * (2 * tosses), [0, 1] * tosses), discount=discount
    )[0]
    assert sample.mean() == pytest.approx(0.0, abs=0.05 * (1 - discount**2) ** -0.5)
    assert sample.std() == pytest.approx((1 - discount**2) ** -0.5, rel=0.05)


def test_rewards_in_another_unit_give_the_same_law_in_that_unit():
    """Times 1,024, which rounds nothing: the same numbers bit for bit. An absolute number in stage 2 would show."""
    args = TRAIN.__class__(steps=40, steps_per_call=40, width=16, depth=2, batch_size=32, flow_steps=2)
    found = []
    for unit in (1.0, 1024.0):
        probe = probes.lottery((0.0, -1.0, -4.0), discount=0.9, unit=unit)
        critic, axis = probes.train(probe, args, copies=40)
        found.append(probes.sample_returns(critic, axis, probe, (0, 0.0)) / unit)
    np.testing.assert_array_equal(*found)


def test_the_axis_goes_through_jit_and_vmap_as_an_argument():
    axes = jax.tree.map(lambda *x: jnp.stack(x), *(make_axis(SPARSE, BOUNDS, kind="quantiles") for _ in range(2)))
    assert isinstance(axes, ReturnAxis)
    z = jax.jit(jax.vmap(ReturnAxis.to_model))(axes, jnp.array([-99.0, -99.0]))
    assert float(z[0]) == float(z[1])
