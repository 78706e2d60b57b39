"""Networks against a NumPy reference, and the numerics of the FQL lineage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from common.flow import Ode
from common.networks import MLP, FlowCritic, FlowPolicy, LayerNorm, stratified_normal


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(mlp, x):
    x = np.asarray(x, np.float64)
    for i, layer in enumerate(mlp.hidden):
        x = gelu(x @ np.asarray(layer.weight, np.float64) + np.asarray(layer.bias))
        if mlp.norms:
            x = (x - x.mean()) / np.sqrt(x.var() + 1e-6) * np.asarray(mlp.norms[i].scale) + np.asarray(
                mlp.norms[i].bias
            )
    return x @ np.asarray(mlp.output.weight, np.float64) + np.asarray(mlp.output.bias)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_mlp_matches_numpy(layer_norm):
    """LayerNorm comes after the activation; before it, or without tanh in GELU, the numbers differ."""
    mlp = MLP(5, 3, width=16, depth=3, layer_norm=layer_norm, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5,))
    np.testing.assert_allclose(mlp(x), reference(mlp, x), rtol=2e-5, atol=1e-6)


def test_initialisation_is_glorot_uniform_with_zero_bias():
    mlp = MLP(300, 2, width=200, depth=2, layer_norm=True, key=jax.random.key(0))
    bound = np.sqrt(6 / (300 + 200))
    weight = np.asarray(mlp.hidden[0].weight)
    assert np.abs(weight).max() <= bound and np.abs(weight).max() > 0.99 * bound
    assert abs(weight.std() - bound / np.sqrt(3)) < 0.01 * bound
    assert all(not np.any(layer.bias) for layer in (*mlp.hidden, mlp.output))


def test_layer_norm_survives_a_constant_input():
    np.testing.assert_array_equal(LayerNorm(4)(jnp.full(4, 7.0)), jnp.zeros(4))


def test_policy_is_the_mlp_of_the_concatenation():
    policy = FlowPolicy(4, 2, width=8, depth=2, key=jax.random.key(0))
    x, a, t = jnp.arange(4.0), jnp.array([0.3, -0.2]), jnp.array(0.7)
    expected = reference(policy.mlp, np.concatenate([x, a, [t]]))
    np.testing.assert_allclose(policy.velocity(policy.features(x), a, t), expected, rtol=2e-5, atol=1e-6)


def test_mlp_critic_is_the_mlp_of_the_concatenation():
    critic = FlowCritic(4, 2, kind="mlp", width=8, depth=3, key=jax.random.key(0))
    x, a, z, t = jnp.arange(4.0), jnp.array([0.3, -0.2]), jnp.array(-1.1), jnp.array(0.7)
    expected = reference(critic.head, np.concatenate([x, a, [z, t]]))[0]
    np.testing.assert_allclose(critic.velocity(critic.features(x, a), z, t), expected, rtol=2e-5, atol=1e-6)


def test_trunk_critic_depends_on_everything():
    critic = FlowCritic(3, 2, kind="trunk", width=16, depth=3, key=jax.random.key(0))
    x, a = jnp.ones(3), jnp.ones(2)

    def velocity(x, a, z, t):
        return critic.velocity(critic.features(x, a), z, t)

    gradients = jax.grad(velocity, (0, 1, 2, 3))(x, a, jnp.array(0.5), jnp.array(0.5))
    assert all(np.all(np.abs(g) > 1e-6) for g in gradients)


def test_the_head_of_a_trunk_critic_hears_z_and_t_as_loudly_as_all_features():
    """At the start of training a change of z_t by one moves the units of the head's first layer by 1.5 in root mean
    square, whatever the width. With Glorot's weights it would be 0.05 here."""
    critic = FlowCritic(3, 2, kind="trunk", width=512, depth=3, head_width=256, head_depth=1, key=jax.random.key(0))
    weight = critic.head.hidden[0].weight
    assert weight.shape == (514, 256)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(weight[512:] ** 2, axis=1)), 1.5, rtol=0.15)
    assert jnp.abs(weight[:512]).max() < 0.1


def test_samples_of_a_policy_are_clipped_and_one_per_noise():
    policy = FlowPolicy(3, 2, width=8, depth=2, key=jax.random.key(0))
    noise = 10 * jax.random.normal(jax.random.key(1), (6, 2))
    actions = policy.sample(jnp.zeros(3), noise, Ode(4))
    assert actions.shape == (6, 2)
    assert np.abs(actions).max() == 1.0
    np.testing.assert_allclose(actions[2:3], policy.sample(jnp.zeros(3), noise[2:3], Ode(4)), rtol=1e-5)


def test_unknown_critic_is_refused():
    with pytest.raises(ValueError, match="mlp"):
        FlowCritic(3, 2, kind="tree", key=jax.random.key(0))


def test_stratified_normal_is_the_midpoint_quantiles():
    np.testing.assert_allclose(stratified_normal(4), stats.norm.ppf([0.125, 0.375, 0.625, 0.875]), rtol=1e-5)
    np.testing.assert_allclose(stratified_normal(1), [0.0], atol=1e-7)


def test_the_first_layer_of_a_policy_is_wide():
    """Standardised observations of any number give its units a variance of 3^2 + 1. Fails with Glorot's weights."""
    for size in (2, 40):
        policy = FlowPolicy(size, 3, width=512, key=jax.random.key(0))
        features = jax.vmap(policy.features)(jax.random.normal(jax.random.key(1), (500, size)))
        assert abs(float(jnp.var(features)) - 10.0) < 1.5
