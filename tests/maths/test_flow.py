"""The ODE solver against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from common.flow import SOLVERS, Ode, integrate
from common.networks import stratified_normal
from common.returns import affine_axis
from evor_infer import log_mean_exp, select
from evor_value import Noise as TdNoise
from evor_value import td_target


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


@pytest.mark.parametrize(
    ("z_0", "dtype"),
    [
        (jnp.array([1, 2]), jnp.float32),
        (np.array([1, 2]), jnp.float32),
        (np.array([1.0, 2.0]), jnp.float32),
        (jnp.array([1, 2], jnp.bfloat16), jnp.bfloat16),
        (jnp.array([1, 2], jnp.float16), jnp.float16),
    ],
)
def test_any_type_of_start(z_0, dtype):
    """Half of a field of ones moves by a half, whatever the type; fails if whole numbers swallow it, or if NumPy's
    double precision brings a warning."""
    out = integrate(lambda z, t: jnp.ones_like(z), z_0, Ode(4), end_time=0.5)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out.astype(jnp.float32), [1.5, 2.5])


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), (3, 2, 1)])
def test_an_end_time_that_would_broadcast_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="end_time must have the first axes of z_0"):
        integrate(lambda z, t: z, jnp.ones((3, 2)), Ode(4), end_time=jnp.ones(shape))


def test_strict_promotion_of_types_and_ranks():
    """What is copied into a code base with JAX's strictest settings works there."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        noise = stratified_normal(5)
        out = integrate(lambda z, t: z, noise, Ode(4), end_time=0.5)
        score = log_mean_exp(out, 0.3) + log_mean_exp(out, jnp.float32(0.3), jnp.full(5, 0.2))
        choice = select(jnp.stack([score, 2 * score]), jnp.float32(0.1), key=jax.random.key(0))
        law = TdNoise(noise, noise, jnp.linspace(0, 0.9, 5), noise)
        for kind in ("shared-noise", "independent-noise", "velocity", "paper"):
            axis = affine_axis(-1.0, 2.0, low=-10.0, high=0.0)
            z_t, target = td_target(
                kind, noise, jnp.full(5, 0.9), law, lambda z, t: z, lambda z, t: z, axis, margin=0.1
            )
            assert z_t.shape == target.shape == (5,)
    np.testing.assert_allclose(noise, scipy.stats.norm.ppf((np.arange(5) + 0.5) / 5), rtol=1e-5)
    assert choice.shape == ()
