"""QC: its update against NumPy, who chooses and who values, the policy trained beside it, and the run directory."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import evor_bc
import evor_infer
from baselines import critics, qc
from benchmarks import probes
from common.cli import parse_args
from common.data import transitions
from common.data.files import Trajectories
from common.errors import UserError
from common.flow import Ode
from common.networks import DirectCritic, Sizes
from common.problem import Dataset, Replica, action_chunks
from common.returns import affine_axis
from tests.helpers import arrays, mostly_slow, tiny_dataset
from tests.run.test_training import Interrupted, files, interrupt_at

ARGS = qc.Args(
    horizon=3, width=16, depth=2, batch_size=32, num_next_actions=5, steps_per_call=1, steps=1, flow_steps=4,
    solver="euler", discount=0.9,
    learning_rate=1e-2, tau=0.1,
)  # fmt: skip
SIZES = Sizes(observation=3, action=2, horizon=3)
SCALE = affine_axis(1.0, 5.0, low=-10.0, high=10.0)
STEP = jax.jit(qc.train_step, static_argnums=0)
VALUES = jax.jit(lambda critic, x, a: critic(x, a))
VELOCITY = jax.jit(lambda policy, x, a, t: policy.velocity(policy.features(x), a, t))
REPLICA = Replica(jnp.array(0), jnp.array(0), SCALE, jax.random.key(3))


def small_data(tmp_path: Path) -> tuple[Trajectories, Dataset]:
    """Four episodes of 30 rows; every tenth row solves the task, so that many chunks have a mask of 0 inside."""
    path = tiny_dataset(tmp_path / "data.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    trajectories = Trajectories(
        arrays["observations"], arrays["actions"], arrays["terminals"], arrays["rewards"][None], arrays["masks"][None]
    )
    starts = transitions.transition_starts(trajectories.terminals, 3)
    rewards, bootstraps = transitions.chunk_rewards(
        trajectories.rewards, trajectories.masks, starts, horizon=3, discount=ARGS.discount
    )
    bank = np.zeros((1, len(starts), 0, 6), np.float16)
    rows = (trajectories.observations, trajectories.actions, starts, rewards, bootstraps, bank, len(starts))
    return trajectories, Dataset(*(jnp.asarray(a) for a in rows))


def bold(critic: DirectCritic) -> DirectCritic:
    """The same critic with the outputs of a trained one, so that its values differ among actions."""
    return eqx.tree_at(lambda c: [m.output.weight for m in c.mlps], critic, replace_fn=lambda w: 100.0 * w)


def start(seed: int = 0) -> qc.TrainState:
    """A state in which online and target network differ."""
    state = qc.init_state(ARGS, SIZES, key=jax.random.key(seed))
    other = qc.init_state(ARGS, SIZES, key=jax.random.key(seed + 1))
    return state._replace(critic=bold(state.critic), target=bold(other.critic))


@pytest.mark.parametrize("scale", mostly_slow([1.0, 0.5], but=[0.5]))
def test_the_update_is_the_formula(tmp_path: Path, scale: float):
    """One step against a loop over the batch in NumPy: chunk rewards, masks, N draws of the policy by Euler steps, the
    best by the online critic, its value by the target critic, both losses."""
    trajectories, dataset = small_data(tmp_path)
    state = start()
    after, metrics = STEP(dataclasses.replace(ARGS, noise_scale=scale), state, dataset, REPLICA)

    batch_key, policy_key, action_key = jax.random.split(jax.random.fold_in(REPLICA.key, 0), 3)
    picked = np.asarray(dataset.starts)[jax.random.randint(batch_key, (32,), 0, len(dataset.starts))]
    noise = scale * np.asarray(jax.random.normal(action_key, (32, 5, 6)))
    policy, online, target = state.policy, state.critic, state.target
    losses, targets, values_of_targets, masked = [], [], [], 0
    for i, row in enumerate(picked):
        assert not trajectories.terminals[row : row + 3].any()  # a chunk never crosses the end of an episode
        reward, factor = 0.0, 1.0
        for k in range(3):
            reward += factor * trajectories.rewards[0, row + k]
            factor *= 0.9 * trajectories.masks[0, row + k]
        masked += factor == 0.0
        x, a = trajectories.observations[row], trajectories.actions[row : row + 3].reshape(-1)
        next_x = jnp.asarray(trajectories.observations[row + 3])
        values = []
        for z in noise[i]:
            for s in range(4):
                z = z + 0.25 * np.asarray(VELOCITY(policy, next_x, jnp.asarray(z), jnp.float32(s / 4)))
            z = np.clip(z, -1.0, 1.0)
            values.append((float(np.mean(VALUES(online, next_x, jnp.asarray(z)))), z))
        best = max(values, key=lambda pair: pair[0])[1]
        following = float(np.clip(np.mean(VALUES(target, next_x, jnp.asarray(best))), (-12 - 1) / 5, (12 - 1) / 5))
        y = (reward - (1 - factor)) / 5 + factor * following  # return = 1 + 5 z
        losses.append(np.mean((np.asarray(VALUES(online, jnp.asarray(x), jnp.asarray(a))) - y) ** 2))
        targets.append(1 + 5 * y)
        values_of_targets.append(y)
    assert 3 < masked < 29
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(metrics["target_return"], np.mean(targets), rtol=1e-4)

    # The step: Adam's, along the gradient of both losses.
    x, a = dataset.observations[picked], action_chunks(dataset.actions, jnp.asarray(picked), 3)
    y = jnp.asarray(values_of_targets, jnp.float32)

    def loss(networks):
        critic, policy = networks
        errors = jax.vmap(critic)(x, a) - y[:, None]
        return jnp.mean(errors**2) + evor_bc.bc_loss(policy, x, a, key=policy_key)

    optimizer, networks = optax.adam(ARGS.learning_rate), (online, policy)
    updates, _ = optimizer.update(jax.grad(loss)(networks), optimizer.init(networks))
    expected = optax.apply_updates(networks, updates)
    np.testing.assert_allclose(metrics["bc_loss"], evor_bc.bc_loss(policy, x, a, key=policy_key), rtol=1e-5)
    # Adam's first step is the sign of the gradient, which is rounding where the gradient is zero.
    found = jax.tree.leaves((after.critic, after.policy))
    near = [np.abs(e - f) < 1e-4 for e, f in zip(jax.tree.leaves(expected), found, strict=True)]
    assert sum(n.sum() for n in near) > 0.99 * sum(n.size for n in near)
    for new, old, mean in zip(*map(jax.tree.leaves, (after.critic, target, after.target)), strict=True):
        np.testing.assert_allclose(mean, 0.1 * new + 0.9 * old, rtol=1e-5, atol=1e-6)


def test_the_policy_learns_by_cloning_alone(tmp_path: Path):
    """Another critic, other returns: the same step of the policy."""
    _, dataset = small_data(tmp_path)
    state = start()
    one, _ = STEP(ARGS, state, dataset, REPLICA)
    other = state._replace(critic=start(7).critic, target=start(8).target)
    two, _ = STEP(ARGS, other, dataset._replace(rewards=dataset.rewards + 3), REPLICA)
    for a, b in zip(jax.tree.leaves(one.policy), jax.tree.leaves(two.policy), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one.critic.mlps), jax.tree.leaves(two.critic.mlps), strict=True):
        assert not np.array_equal(a, b)


def test_the_best_is_that_of_the_mean_of_the_critics():
    state = start()
    candidates = jax.random.uniform(jax.random.key(5), (64, 6), minval=-1.0, maxval=1.0)
    x = jnp.ones(3)
    values = jax.vmap(lambda a: jnp.mean(state.critic(x, a)))(candidates)
    best = qc.best_of(state.critic, x, candidates)
    np.testing.assert_array_equal(best, candidates[np.argmax(np.asarray(values))])
    assert not np.array_equal(best, qc.best_of(state.target, x, candidates))
    # The mean of both, not one of them or the smaller.
    each = np.asarray(jax.vmap(lambda a: state.critic(x, a))(candidates))
    assert len({int(np.argmax(v)) for v in (each.mean(1), each[:, 0], each[:, 1], each.min(1))}) > 1


@pytest.mark.slow
def test_joint_training_learns_the_greedy_value():
    """In state 1 an action pays what it is, -1 or 1 with equal frequency; state 0 leads there: the policy that is
    extracted earns 0.9 from state 0, the data's policy 0. Fails with a backup that does not maximise, and with a policy
    that does not learn: N(0, 1) has its best of 8 near 1 too, so its draws are looked at (42% of it is beyond 0.8)."""
    probe = probes.STOCHASTIC_POLICY
    args = qc.Args(
        width=64, depth=2, steps=1_500, steps_per_call=1_500, batch_size=128, learning_rate=1e-3, schedule="cosine",
        tau=0.02, num_next_actions=8,
    )  # fmt: skip
    state, scale = probes.train_state(probe, args, learner=qc)
    for query, expected in (((0, 0.0), 0.9), ((1, 1.0), 1.0), ((1, -1.0), -1.0)):
        found = probes.sample_returns(state.critic, scale, probe, query, num=1)[0, 0]
        np.testing.assert_allclose(found, expected, atol=0.06, err_msg=str(query))
    policy = jax.tree.map(lambda x: x[0], state.policy)
    draws = policy.sample(jnp.array([0.0, 1.0]), jax.random.normal(jax.random.key(0), (500, 1)), Ode())
    assert np.mean(np.abs(draws) > 0.8) > 0.6 and 0.35 < np.mean(draws > 0) < 0.65


# --- The script --------------------------------------------------------------------------------------------------


def settings(tmp_path: Path) -> dict:
    return dict(
        env="my-robot", dataset=tiny_dataset(tmp_path / "data.npz"), width=16, depth=2, batch_size=16, steps=20,
        steps_per_call=10, save_every=10, seeds=2, horizon=2,
    )  # fmt: skip


@pytest.mark.slow
def test_frozen_is_a_scalar_ensemble_with_the_greedy_backup(tmp_path: Path):
    """`baselines.critics` with the flags that the top of qc.py names: the same parameters, bit for bit."""
    common = settings(tmp_path)
    evor_bc.main(evor_bc.Args(**common, run_dir=tmp_path / "bc"))
    common |= dict(policy_run_dir=tmp_path / "bc", num_next_actions=3)
    qc.main(qc.Args(**common, run_dir=tmp_path / "qc", policy="frozen"))
    critics.main(critics.Args(**common, run_dir=tmp_path / "critics", ensemble=2, next_action="softmax"))
    ours, theirs = (tmp_path / name / "value" for name in ("qc", "critics"))
    assert (ours / "metrics.csv").read_bytes() == (theirs / "metrics.csv").read_bytes()
    model = [arrays(path / "model.eqx") for path in (ours, theirs)]
    assert model[0] == model[1]
    agent = evor_infer.load_agent(tmp_path / "qc", seed=1)
    assert agent.critic.kind == "scalar"


@pytest.mark.slow
def test_joint_needs_no_stage_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The policy of each replica lies beside its critic; a resumed run ends where the whole one does."""
    common = settings(tmp_path) | dict(num_next_actions=3)
    qc.main(qc.Args(**common, run_dir=tmp_path / "run"))
    assert not (tmp_path / "run" / "bc").exists()
    agents = [evor_infer.load_agent(tmp_path / "run", seed=seed) for seed in (0, 1)]
    x, key = np.ones((4, 3), np.float32), jax.random.key(0)
    drawn = [agent.act(x, key=key, num_actions=4) for agent in agents]
    assert drawn[0].shape == (4, 2, 2) and np.abs(drawn[0] - drawn[1]).max() > 0.1
    mean = np.load(tmp_path / "data.npz")["observations"].mean(axis=0)
    np.testing.assert_allclose(agents[1].standardizer.mean, mean, atol=1e-5)

    parts = dict(common, run_dir=tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, 20)
        qc.main(qc.Args(**parts))
    qc.main(qc.Args(**parts, resume=True))
    whole, resumed = files(tmp_path / "run", "value"), files(tmp_path / "parts", "value")
    assert whole["metrics.csv"] == resumed["metrics.csv"]
    assert whole["model.eqx"] == resumed["model.eqx"]


def test_flags():
    args = parse_args(qc.Args, qc.PRESETS, ["--preview"])
    assert (args.policy, args.ensemble, args.outputs, args.num_next_actions) == ("frozen", 2, 2, 32)
    assert parse_args(qc.Args, qc.PRESETS, []).policy == "joint"
    for changes, sentence in (
        (dict(critic="qr"), "--critic qr: QC's is scalar"),
        (dict(next_action="base"), "--policy joint backs up the best of N"),
        (dict(backup_temperature=0.1), "--policy joint backs up the best of N"),
        (dict(policy_seed=0), "--policy joint: leave out --policy-run-dir"),
        (dict(num_actions=0), "--num-actions must be at least 1"),
        (dict(ensemble=0), "--ensemble must be at least 1"),
    ):
        with pytest.raises(UserError, match=sentence):
            qc.main(qc.Args(**changes))
