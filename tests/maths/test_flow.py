"""The ODE solver against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.flow import SOLVERS, Ode, integrate


def test_equals_a_hand_written_euler_loop():
    def velocity(z, t):
        return jnp.sin(3 * z) + t

    z = z_0 = jnp.linspace(-2.0, 2.0, 7)
    for i in range(8):
        z = z + velocity(z, jnp.float32(i / 8)) / 8
    np.testing.assert_allclose(integrate(velocity, z_0, Ode(8, "euler")), z, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_is_exact_for_a_constant_field(num_steps):
    z_0 = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    out = integrate(lambda z, t: jnp.full_like(z, 2.5), z_0, Ode(num_steps))
    np.testing.assert_allclose(out, z_0 + 2.5, rtol=1e-6)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2)])
def test_solvers_have_their_order(solver, order):
    """dz/dt = -z ends at exp(-1); halving the step divides the error by 2^order."""
    jax.config.update("jax_enable_x64", True)  # the context manager has moved between versions
    try:
        ends = [integrate(lambda z, t: -z, jnp.ones(()), Ode(n, solver)) for n in (16, 32)]
        errors = np.abs(np.array(ends) - np.exp(-1))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_evaluations_are_counted_and_before_the_end(solver, num_steps):
    """What a solve costs is what it says, counted while it runs; and no evaluation is at t = 1, which training never
    shows (Heun's method would look there)."""
    times = []

    def velocity(z, t):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return -z

    ode = Ode(num_steps, solver)
    jax.block_until_ready(integrate(velocity, jnp.ones(3), ode))
    jax.effects_barrier()
    assert len(times) == ode.evaluations
    assert 0.0 <= min(times) and max(times) <= 1.0 - 0.5 / num_steps + 1e-6


def test_transports_noise_to_a_known_normal_law():
    """The closed-form field from N(0, 1) to N(mu, sigma^2): z_1 = mu + sigma z_0 for every start."""
    mu, sigma = 1.5, 0.4

    def velocity(z, t):
        variance = (1 - t) ** 2 + (sigma * t) ** 2
        return mu + (sigma**2 * t - (1 - t)) / variance * (z - t * mu)

    z_0 = jnp.linspace(-2, 2, 9)
    np.testing.assert_allclose(integrate(velocity, z_0, Ode(400)), mu + sigma * z_0, atol=5e-3)


def test_each_element_stops_at_its_own_end_time():
    """dz/dt = 2t gives z_0 + end^2; the field must also see the time of its own element."""
    ends = jnp.array([0.0, 0.25, 1.0])
    out = integrate(lambda z, t: 2 * t, jnp.ones(3), Ode(1000), end_time=ends)
    np.testing.assert_allclose(out, 1 + ends**2, atol=2e-3)
    vectors = integrate(lambda z, t: jnp.ones_like(z), jnp.zeros((3, 2)), Ode(2), end_time=ends)
    np.testing.assert_allclose(vectors, jnp.stack([ends, ends], axis=1), atol=1e-6)


def test_end_time_zero_returns_the_start_and_one_is_the_default():
    z_0 = jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(integrate(lambda z, t: z, z_0, Ode(4), end_time=0.0), z_0)
    np.testing.assert_array_equal(
        integrate(lambda z, t: z, z_0, Ode(4)), integrate(lambda z, t: z, z_0, Ode(4), end_time=1.0)
    )


def test_vmap_and_jit_change_nothing():
    z_0 = jax.random.normal(jax.random.key(0), (5, 3))
    solve = lambda z: integrate(lambda z, t: -z * t, z, Ode(6))  # noqa: E731
    np.testing.assert_allclose(jax.jit(jax.vmap(solve))(z_0), solve(z_0), rtol=1e-6)
