"""Stage 1: the flow-matching loss against its definition, and toy data that it has to imitate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evor_bc
from common.args import learning_rate
from common.flow import Ode
from common.networks import FlowPolicy, Sizes, VelocityPolicy
from common.problem import Dataset, Replica, action_chunks, sample_batch
from common.replicas import stack_replicas

ARGS = evor_bc.Args(
    steps=1500, steps_per_call=1500, width=32, depth=2, batch_size=128, learning_rate=3e-3, schedule="cosine"
)


def toy_data(actions):
    """Two-row trajectories with a constant observation, one action each; neither tasks nor a bank."""
    number, width = actions.shape
    rows, nothing = jnp.repeat(actions, 2, axis=0), jnp.zeros((0, number))
    bank = jnp.zeros((0, number, 0, width), jnp.float16)
    starts = jnp.arange(0, 2 * number, 2)
    return Dataset(jnp.zeros((2 * number, 1)), rows, starts, nothing, nothing, bank, jnp.asarray(number))


def test_loss_of_one_example_matches_its_definition():
    """A swapped sign, a swapped path or the noise as target changes these numbers."""
    policy = FlowPolicy(2, 3, width=8, depth=1, key=jax.random.key(0))
    x, a_1, a_0, t = jnp.ones(2), jnp.array([0.5, -0.5, 1.0]), jnp.array([1.0, 0.0, -2.0]), jnp.array(0.25)
    a_t = np.array([0.75 * 1.0 + 0.25 * 0.5, 0.25 * -0.5, 0.75 * -2.0 + 0.25 * 1.0], np.float32)
    velocity = np.asarray(policy.velocity(policy.features(x), jnp.asarray(a_t), t))
    expected = np.mean((velocity - np.array([-0.5, -0.5, 3.0])) ** 2)
    np.testing.assert_allclose(evor_bc.bc_loss_one(policy, x, a_1, a_0, t), expected, rtol=1e-5)


def test_batch_loss_is_the_mean_over_fresh_noise_and_uniform_time():
    """With a zero network the expected loss is E(a_1 - a_0)^2 = 0.3^2 + 1, whatever t."""
    policy = jax.tree.map(jnp.zeros_like, FlowPolicy(1, 1, width=4, depth=1, key=jax.random.key(0)))
    loss = evor_bc.bc_loss(policy, jnp.zeros((200_000, 1)), jnp.full((200_000, 1), 0.3), key=jax.random.key(1))
    assert abs(float(loss) - 1.09) < 0.02


def train(dataset, args=ARGS, seeds=(0,)):
    sizes = Sizes(observation=1, action=dataset.actions.shape[1], horizon=args.horizon)
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    state = stack_replicas(lambda key: evor_bc.init_state(args, sizes, key=key), keys)
    zeros = jnp.zeros(len(seeds), jnp.int32)
    for _ in range(args.steps // args.steps_per_call):
        state, metrics = evor_bc.train_chunk(args, state, dataset, Replica(zeros, zeros, None, keys))
    return state, metrics


def test_two_modes_are_imitated_with_their_weights():
    """Fails if the policy averages the modes (mean 0.3), finds one of them, or gets the weights wrong by 5%."""
    actions = jnp.where(jnp.arange(400) < 260, 0.6, -0.6)[:, None] * jnp.ones((1, 2))
    state, _ = train(toy_data(actions))
    policy = jax.tree.map(lambda x: x[0], state.policy)
    drawn = policy.sample(jnp.zeros(1), jax.random.normal(jax.random.key(5), (4000, 2)), Ode(20))
    upper = drawn[:, 0] > 0
    assert abs(float(upper.mean()) - 0.65) < 0.05
    assert float(jnp.mean(jnp.abs(jnp.abs(drawn) - 0.6))) < 0.08
    assert float(jnp.mean(jnp.sign(drawn[:, 0]) == jnp.sign(drawn[:, 1]))) > 0.97


def test_gradient_is_not_zero_anywhere():
    policy = FlowPolicy(2, 2, width=8, depth=2, key=jax.random.key(0))
    x, a = jax.random.normal(jax.random.key(1), (2, 16, 2))
    gradient = jax.grad(evor_bc.bc_loss)(policy, x, a, key=jax.random.key(2))
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))


def test_action_chunks_are_consecutive_rows():
    actions = jnp.arange(10.0)[:, None] + jnp.array([[0.0, 100.0]])
    chunk = action_chunks(actions, jnp.array([3, 5]), 3)
    np.testing.assert_array_equal(chunk, [[3, 103, 4, 104, 5, 105], [5, 105, 6, 106, 7, 107]])


def test_a_batch_is_of_whole_transitions_that_count():
    """Rows are known by their number: fails if a column is that of another transition, if the next state is not
    `horizon` rows on, or if a transition that fills up the file is drawn."""
    rows, starts = jnp.arange(20.0), jnp.array([0, 4, 9, 0, 0])
    rewards = jnp.stack([10.0 + starts, 20.0 + starts])
    dataset = Dataset(
        rows[:, None], rows[:, None], starts, rewards, -rewards, jnp.zeros((0, 5, 0, 2), jnp.float16), jnp.array(3)
    )
    batch = sample_batch(dataset, 300, 2, key=jax.random.key(0))
    assert np.bincount(batch.index).min() > 70 and batch.index.max() == 2
    start = starts[batch.index]
    np.testing.assert_array_equal(batch.observations[:, 0], start)
    np.testing.assert_array_equal(batch.actions, jnp.stack([start, start + 1], axis=1))
    np.testing.assert_array_equal(batch.next_observations[:, 0], start + 2)
    np.testing.assert_array_equal(dataset.rewards[1, batch.index], 20 + start)


def test_replicas_are_independent_and_equal_to_single_runs():
    """Two seeds trained together are the two trained alone, up to float order; and they differ from each other."""
    dataset = toy_data(jnp.linspace(-1, 1, 50)[:, None])
    args = evor_bc.Args(steps=20, steps_per_call=20, width=32, depth=2, batch_size=16)
    both, _ = train(dataset, args, seeds=(3, 7))
    alone, _ = train(dataset, args, seeds=(7,))
    for a, b in zip(jax.tree.leaves(both.policy), jax.tree.leaves(alone.policy), strict=True):
        np.testing.assert_allclose(a[1], b[0], rtol=1e-4, atol=1e-6)
    assert not np.allclose(both.policy.mlp.hidden[0].weight[0], both.policy.mlp.hidden[0].weight[1])


def test_chunk_length_changes_no_number():
    """Batches depend on the step alone: one call of 20 steps, or four of 5."""
    dataset = toy_data(jnp.linspace(-1, 1, 50)[:, None])
    whole, _ = train(dataset, evor_bc.Args(steps=20, steps_per_call=20, width=32, depth=2, batch_size=16))
    parts, _ = train(dataset, evor_bc.Args(steps=20, steps_per_call=5, width=32, depth=2, batch_size=16))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_compile_per_run():
    dataset = toy_data(jnp.linspace(-1, 1, 50)[:, None])
    args = evor_bc.Args(steps=30, steps_per_call=10, width=32, depth=2, batch_size=8)
    before = evor_bc.train_chunk._cache_size()
    train(dataset, args)
    assert evor_bc.train_chunk._cache_size() == before + 1


@pytest.mark.parametrize("schedule, last", [("constant", 0.1), ("cosine", 0.0)])
def test_learning_rate_schedules(schedule, last):
    rate = learning_rate(0.1, schedule, 100)
    at = rate if callable(rate) else lambda step: rate
    assert float(at(0)) == pytest.approx(0.1)
    assert float(at(100)) == pytest.approx(last, abs=1e-8)
    if schedule == "cosine":
        assert float(at(50)) == pytest.approx(0.05)


class OwnPolicy(VelocityPolicy):
    """`v(a_t, t | x) = x`, for tests."""

    def features(self, observation):
        return observation

    def velocity(self, features, action, t):
        return features


def test_a_policy_of_ones_own_is_trained_and_sampled():
    """As docs/extending.md says: it has `features` and `velocity`, and nothing of `FlowPolicy`."""
    x, a_1, a_0 = jnp.array([0.5, -0.25]), jnp.array([0.2, 0.1]), jnp.array([-0.1, 0.6])
    loss = evor_bc.bc_loss_one(OwnPolicy(), x, a_1, a_0, jnp.array(0.3))
    np.testing.assert_allclose(loss, ((0.5 - 0.3) ** 2 + (-0.25 + 0.5) ** 2) / 2, rtol=1e-6)
    drawn = OwnPolicy().sample(x, jnp.array([[0.1, 0.0], [0.9, -0.9]]), Ode())
    np.testing.assert_allclose(drawn, [[0.6, -0.25], [1.0, -1.0]], rtol=1e-6)
