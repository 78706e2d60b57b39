"""Probe problems: small Markov chains whose reward-to-go laws are known exactly.

Each lists its possible transitions with probabilities and, for some state-action pairs, the atoms of the law of
`Z(x, a) = r + discount * mask * Z(x', a')`. `train` runs stage 2's own training code on them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import stats

import evor_value
from common.data import files, transitions
from common.flow import Ode
from common.networks import Critic, Sizes, stratified_normal
from common.problem import Dataset, Replica
from common.replicas import stack_replicas
from common.returns import ReturnAxis, make_axis

Atoms = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray]  # values, probabilities
DEFAULT_ODE = Ode()


@dataclasses.dataclass(frozen=True)
class Probe:
    """A finite chain. `transitions` has rows (probability, state, action, reward, mask, next state); `policy` gives the
    next actions and their probabilities in each state; `laws` maps (state, action) to the atoms of the reward-to-go."""

    name: str
    transitions: Sequence[tuple]
    laws: dict[tuple[int, float], Atoms]
    policy: dict[int, Atoms] = dataclasses.field(default_factory=dict)
    discount: float = 0.9

    @property
    def num_states(self) -> int:
        return 1 + max(max(t[1], t[5]) for t in self.transitions)

    @property
    def law_range(self) -> float:
        """From the lowest to the highest atom of all laws: what errors are shares of."""
        atoms = [value for values, _ in self.laws.values() for value in values]
        return max(atoms) - min(atoms)

    def law(self, query: tuple[int, float], *, noise_std: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Values and weights of a law; with `noise_std`, of the normal law around its mean, as quantiles."""
        values, weights = (np.asarray(part, float) for part in self.laws[query])
        if noise_std == 0.0:
            return values, weights
        quantiles = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
        return (values * weights).sum() + noise_std * quantiles, np.full(2000, 1 / 2000)


def half(value: float) -> Atoms:
    return (-value, value), (0.5, 0.5)


def point(value: float) -> Atoms:
    return (value,), (1.0,)


CHAIN = Probe(
    "five-state chain",
    [(1, k, 0.0, 0.0, 1.0, k + 1) for k in range(4)] + [(0.5, 4, 0.0, r, 0.0, 4) for r in (-1.0, 1.0)],
    {(k, 0.0): half(0.9 ** (4 - k)) for k in (0, 2, 4)},
)
DETERMINISTIC = Probe(
    "deterministic rewards",
    [(1, 0, 0.0, 0.5, 1.0, 1), (1, 1, 0.0, -1.0, 1.0, 2), (1, 2, 0.0, 1.0, 0.0, 2)],
    {(2, 0.0): point(1.0), (1, 0.0): point(-0.1), (0, 0.0): point(0.41)},
)
STOCHASTIC_REWARD = Probe(
    "stochastic reward, two steps",
    [(1, 0, 0.0, 0.5, 1.0, 1), (0.5, 1, 0.0, -1.0, 0.0, 1), (0.5, 1, 0.0, 1.0, 0.0, 1)],
    {(1, 0.0): half(1.0), (0, 0.0): ((-0.4, 1.4), (0.5, 0.5))},
)
MASKS = Probe(
    "masks stop the bootstrap",
    # State 0 pays 1 for ever (1 / (1 - 0.5) = 2); state 1 pays 1 and is solved, though data goes on from it.
    [(1, 0, 0.0, 1.0, 1.0, 0), (1, 1, 0.0, 1.0, 0.0, 0), (1, 2, 0.0, 0.0, 1.0, 1)],
    {(0, 0.0): point(2.0), (1, 0.0): point(1.0), (2, 0.0): point(0.5)},
    discount=0.5,
)
RANDOM_NEXT_STATE = Probe(
    "random next state",
    [(0.25, 0, 0.0, 0.0, 1.0, 1), (0.75, 0, 0.0, 0.0, 1.0, 2), (1, 1, 0.0, 1.0, 0.0, 1), (1, 2, 0.0, -1.0, 0.0, 2)],
    {(0, 0.0): ((0.9, -0.9), (0.25, 0.75)), (1, 0.0): point(1.0), (2, 0.0): point(-1.0)},
)
STOCHASTIC_POLICY = Probe(
    "action-dependent reward, stochastic policy",
    [(1, 0, 0.0, 0.0, 1.0, 1), (1, 1, -1.0, -1.0, 0.0, 1), (1, 1, 1.0, 1.0, 0.0, 1)],
    {(1, -1.0): point(-1.0), (1, 1.0): point(1.0), (0, 0.0): ((-0.9, 0.9), (0.25, 0.75))},
    policy={1: ((-1.0, 1.0), (0.25, 0.75))},
)


def lottery(
    atoms: Sequence[float], *, discount: float, steps: int = 2, looped: bool = False, unit: float = 1.0
) -> Probe:
    """`steps` states without reward, then a lottery with the equally likely prizes `atoms`, times `unit`. It ends
    there, or with `looped` goes on from the first state again."""
    prizes, share = unit * np.array(atoms), 1 / len(atoms)
    rows = [(1, k, 0.0, 0.0, 1.0, k + 1) for k in range(steps)]
    rows += [(share, steps, 0.0, prize, float(looped), 0 if looped else steps) for prize in prizes]
    if looped:
        prizes = discounted_sums(prizes, discount ** (steps + 1))
    laws = {
        (k, 0.0): (discount ** (steps - k) * prizes, np.full(len(prizes), 1 / len(prizes))) for k in range(steps + 1)
    }
    name = f"lottery of {len(atoms)}, {'looped' if looped else 'ended'}, discount {discount:g}"
    return Probe(name + f", unit {unit:g}" * (unit != 1), rows, laws, discount=discount)


def discounted_sums(prizes: np.ndarray, factor: float, *, draws: int = 40_000, quantiles: int = 400) -> np.ndarray:
    """Quantiles of `X_0 + factor X_1 + factor^2 X_2 + ...`, each X_i one of the prizes: from as many draws."""
    rng, total = np.random.default_rng(0), np.zeros(draws)
    for _ in range(math.ceil(math.log(1e-4) / math.log(factor))):
        total = rng.permutation(np.resize(prizes, draws)) + factor * total
    return np.quantile(total, (np.arange(quantiles) + 0.5) / quantiles)


LOTTERIES = [
    lottery(atoms, discount=discount, looped=looped)
    for atoms in ((1.0, -3.0), (0.0, -1.0, -4.0))
    for discount in (0.9, 0.99)
    for looped in (False, True)
]
UNITS = [lottery((0.0, -1.0, -4.0), discount=0.99, unit=unit) for unit in (1e-3, 1e3)]
PROBES = (CHAIN, DETERMINISTIC, STOCHASTIC_REWARD, MASKS, RANDOM_NEXT_STATE, STOCHASTIC_POLICY, *LOTTERIES, *UNITS)


def make_data(
    probe: Probe, *, copies: int = 400, num_next_actions: int = 4, seed: int = 0
) -> tuple[Dataset, Float[np.ndarray, "tasks m"], Float[np.ndarray, "tasks 2"]]:
    """Transitions in their exact proportions, a sample of their returns, and the bounds of the possible ones.

    All come through the same code as real data: each transition is a trajectory of two rows, ended by `terminals`,
    which must not stop a bootstrap.
    """
    rng = np.random.default_rng(seed)
    rows = [t[1:] for t in probe.transitions for _ in range(round(copies * t[0]))]
    state, action, reward, mask, next_state = (np.array(column, float) for column in zip(*rows, strict=True))
    number = len(rows)

    def interleave(first, second):
        return np.stack([first, second], axis=1).reshape(2 * number, *first.shape[1:]).astype(np.float32)

    one_hot = np.eye(probe.num_states)
    trajectories = files.Trajectories(
        observations=interleave(one_hot[state.astype(int)], one_hot[next_state.astype(int)]),
        actions=interleave(action[:, None], np.zeros((number, 1))),
        terminals=np.tile([False, True], number),
        rewards=interleave(reward, np.zeros(number))[None],
        masks=interleave(mask, np.ones(number))[None],
    )
    starts = transitions.transition_starts(trajectories.terminals, 1)
    rewards, bootstraps = transitions.chunk_rewards(
        trajectories.rewards, trajectories.masks, starts, horizon=1, discount=probe.discount
    )
    bank = np.zeros((1, number, num_next_actions, 1), np.float16)
    for s, (values, weights) in probe.policy.items():
        chosen = next_state == s
        bank[0, chosen, :, 0] = rng.choice(values, p=weights, size=(chosen.sum(), num_next_actions))
    arrays = (trajectories.observations, trajectories.actions, starts, rewards, bootstraps, bank, len(starts))
    returns = transitions.return_sample(trajectories, discount=probe.discount)
    bounds = transitions.return_bounds(rewards, probe.discount)
    return Dataset(*(jnp.asarray(a) for a in arrays)), returns, bounds


def train_state(
    probe: Probe,
    args: evor_value.Args,
    *,
    seeds: Sequence[int] = (0,),
    copies: int = 400,
    learner: ModuleType = evor_value,
    after_chunk: Callable[[int, Any, ReturnAxis], None] = lambda step, state, axis: None,
) -> tuple[Any, ReturnAxis]:
    """Training state and return axis of a probe after `args.steps` steps of stage 2, or of the `init_state` and
    `train_chunk` of a baseline; both have a leading axis of seeds."""
    dataset, returns, bounds = make_data(probe, copies=copies, num_next_actions=args.num_next_actions)
    args = dataclasses.replace(args, discount=probe.discount)
    sizes = Sizes(observation=probe.num_states, action=1, horizon=1)
    keys = jax.vmap(jax.random.key)(np.asarray(seeds))
    axis = make_axis(returns[0], bounds[0], kind=args.axis_kind)
    axis = jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), axis)
    zeros = jnp.zeros(len(seeds), jnp.int32)
    replicas = Replica(task=zeros, policy=zeros, axis=axis, key=keys)
    state = stack_replicas(lambda key: learner.init_state(args, sizes, key=key), keys)
    for step in range(args.steps_per_call, args.steps + 1, args.steps_per_call):
        state, _ = learner.train_chunk(args, state, dataset, replicas)
        after_chunk(step, state, axis)
    return state, axis


def train(probe: Probe, args: evor_value.Args, **settings: Any) -> tuple[Critic, ReturnAxis]:
    """Critics of `train_state`, and return axes."""
    state, axis = train_state(probe, args, **settings)
    return state.critic, axis


def sample_returns(
    critic: Critic, axis: ReturnAxis, probe: Probe, query: tuple[int, float], *, num: int = 512, ode: Ode = DEFAULT_ODE
) -> np.ndarray:
    """Returns of one state-action pair in the probe's units, one row per seed, from normal quantiles."""
    observation = jnp.eye(probe.num_states)[query[0]]
    return np.asarray(_sample(critic, axis, observation, jnp.array([query[1]]), stratified_normal(num), ode))


@functools.partial(jax.jit, static_argnames="ode")  # compiled once for all queries
def _sample(
    critic: Critic, axis: ReturnAxis, observation: Array, action: Array, noise: Array, ode: Ode
) -> Float[Array, "seeds num"]:
    def one(critic, axis):
        return axis.to_environment(critic.sample(observation, action, noise, ode))

    return jax.vmap(one)(critic, axis)


def w1(critic: Critic, axis: ReturnAxis, probe: Probe, *, ode: Ode = DEFAULT_ODE, noise_std: float = 0.0) -> np.ndarray:
    """Wasserstein-1 distance to the exact law, in the probe's units, averaged over its queries; one number per seed.

    With `noise_std`, distance to the normal law around the exact mean instead: what `paper` converges to.
    """
    distances = []
    for query in probe.laws:
        values, weights = probe.law(query, noise_std=noise_std)
        draws = sample_returns(critic, axis, probe, query, ode=ode)
        distances.append([stats.wasserstein_distance(d, values, v_weights=weights) for d in draws])
    return np.mean(distances, axis=0)
