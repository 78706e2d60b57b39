"""EVOR on one page: three stages on a problem whose return laws are known.

    python -m examples.one_page          # under a minute on a CPU; draws one_page.png

Two steps. In state 0 every action leads to state 1 and pays nothing. In state 1 the action is a bet: a > 0 pays -1 or
+2 with equal probability, a < 0 pays nothing; then the episode ends. The data choose both bets equally often. So with
discount 0.9

    Z(1, a > 0) is -1 or 2        Z(1, a < 0) is 0        Z(0, a) = 0.9 Z(1, a') is 0, 0, -0.9 or 1.8

The three stages learn from 4,000 episodes, with the functions of the scripts and of `common/`.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import evor_bc
import evor_value
from common.networks import Sizes, Standardizer
from common.problem import Dataset, Replica
from common.replicas import stack_replicas
from common.returns import make_axis
from evor_infer import Agent

DISCOUNT, EPISODES, K = 0.9, 4_000, 4
SIZES = Sizes(observation=2, action=1, horizon=1)
BC = evor_bc.Args(width=64, depth=2, steps=1_000, steps_per_call=1_000, learning_rate=3e-3, schedule="cosine")
VALUE = evor_value.Args(
    critic="trunk", width=64, depth=3, steps=4_000, steps_per_call=1_000, learning_rate=3e-3, schedule="cosine",
    tau=0.02, num_next_actions=K, discount=DISCOUNT,
)  # fmt: skip
LAWS = {"Z(1, 0.5)": (1, 0.5, [-1.0, 2.0]), "Z(1, -0.5)": (1, -0.5, [0.0]), "Z(0, 0)": (0, 0.0, [-0.9, 0, 0, 1.8])}


def make_data(rng: np.random.Generator) -> tuple[Dataset, np.ndarray]:
    """Episodes of three rows: state 0, state 1, and the end, which is no state to learn in. And their returns."""
    bets = rng.choice([-0.5, 0.5], EPISODES) + 0.1 * rng.standard_normal(EPISODES)
    prizes = np.where(bets > 0, rng.choice([-1.0, 2.0], EPISODES), 0.0)
    observations = np.tile(np.eye(3, 2), (EPISODES, 1))
    actions = np.stack([rng.uniform(-1, 1, EPISODES), bets, np.zeros(EPISODES)], axis=1)
    starts = np.flatnonzero(np.arange(3 * EPISODES) % 3 < 2)
    rewards = np.stack([np.zeros(EPISODES), prizes], axis=1)
    masks = np.stack([np.ones(EPISODES), np.zeros(EPISODES)], axis=1)
    dataset = Dataset(
        observations=jnp.asarray(observations, jnp.float32),
        actions=jnp.asarray(actions.reshape(-1, 1), jnp.float32),
        starts=jnp.asarray(starts),
        rewards=jnp.asarray(rewards.reshape(1, -1), jnp.float32),
        bootstraps=jnp.asarray(DISCOUNT * masks.reshape(1, -1), jnp.float32),
        bank=jnp.zeros((1, len(starts), K, 1), jnp.float16),
        count=jnp.asarray(len(starts)),
    )
    return dataset, np.concatenate([DISCOUNT * prizes, prizes])


def train(script, args, dataset: Dataset, replica: Replica):
    """The loop of a script's `main` without its directory: `args.steps` steps of one replica."""
    replicas = jax.tree.map(lambda x: x[None], replica)
    state = stack_replicas(lambda key: script.init_state(args, SIZES, key=key), replicas.key)
    for _ in range(0, args.steps, args.steps_per_call):
        state, metrics = script.train_chunk(args, state, dataset, replicas)
    print(f"{script.__name__}: loss {float(metrics['loss'][0]):.3f}")
    return jax.tree.map(lambda x: x[0], state)


def learn() -> Agent:
    """The three stages' work: a base policy, its next actions, the law of its reward-to-go."""
    dataset, returns = make_data(np.random.default_rng(0))
    axis = make_axis(returns, np.array([-1.0, 2.0]), kind="quantiles")
    replica = Replica(jnp.array(0), jnp.array(0), axis, jax.random.key(0))
    policy = train(evor_bc, BC, dataset, replica).policy
    noise = jax.random.normal(jax.random.key(1), (len(dataset.starts), K, 1))
    next_observations = dataset.observations[dataset.starts + 1]
    bank = jax.jit(jax.vmap(lambda x, z: policy.sample(x, z, VALUE.ode)))(next_observations, noise)
    critic = train(evor_value, VALUE, dataset._replace(bank=bank[None].astype(jnp.float16)), replica).critic
    return Agent(policy, critic, Standardizer(jnp.zeros(2), jnp.ones(2)), axis)


def draw(agent: Agent, path: str | Path) -> dict[str, float]:
    """Learned laws on the true ones, and the actions in state 1 before and after extraction. Returns the distances."""
    figure = Figure(figsize=(12, 2.8), layout="tight")
    panels, distances = figure.subplots(1, 4), {}
    for panel, (name, (state, action, atoms)) in zip(panels, LAWS.items(), strict=False):
        observation = jnp.eye(2)[state][None]
        draws = np.asarray(agent.sample_returns(observation, jnp.array([[action]]), 400, key=jax.random.key(0)))[0]
        distances[name] = float(np.abs(np.sort(draws) - np.repeat(np.sort(atoms), 400 // len(atoms))).mean())
        panel.hist(draws, 60, range=(-1.5, 2.5), label="learned")
        for atom in atoms:
            panel.axvline(atom, color="C1", ls="--")
        panel.set(title=f"{name}, W1 {distances[name]:.3f}", xlabel="reward-to-go")
    observations = jnp.tile(jnp.eye(2)[1], (1_000, 1))
    for num_actions, label in ((1, "base policy"), (16, "extracted, N_pi = 16")):
        actions = agent.act(observations, num_actions=num_actions, action_temperature=0.2, key=jax.random.key(2))
        panels[3].hist(np.asarray(actions).ravel(), 60, range=(-1, 1), alpha=0.6, label=label)
        distances[label] = float(np.mean(np.asarray(actions) > 0))
    panels[3].set(title="actions in state 1", xlabel="bet")
    panels[3].legend()
    figure.savefig(path, dpi=100)
    return distances


if __name__ == "__main__":
    for name, number in draw(learn(), "one_page.png").items():
        print(f"{name}: {number:.3f}")
