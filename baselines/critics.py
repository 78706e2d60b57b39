"""EVOR without flow TD: stage 2 with a critic that says the reward-to-go at once, by one MLP on (x, a).

    python -m baselines.critics --env cube-double-play --critic scalar

The TD problem of `evor_value.py`, with its data, base policy, next-action bank, backups, checkpoints and evaluation:
Z(x, a) = r + g Z(x', a'), g = discount^horizon * mask, a' by `--next-action`. Only the critic and its loss differ:

    --critic   outputs                          target, made with the target network    loss
    scalar     Q_k(x, a), k = 1..ensemble       y = r + g mean_k Q_bar_k(x', a')        mean_k (Q_k - y)^2
    c51        probabilities p of fixed atoms   r + g atoms, projected on the atoms     - sum_i target_i log p_i
    qr         quantiles q_i at (i + 1/2) / n   y_j = r + g q_bar_j(x', a')             quantile Huber, below

C51's projection shares the mass of each shifted atom, clipped to the support, between its two neighbours. QR's loss is
`sum_i mean_j |tau_i - [y_j < q_i]| H(y_j - q_i) / k`, with Huber's H(u) = u^2 / 2 where |u| < k and k (|u| - k/2)
elsewhere, k small: a large one learns expectiles. All work on the return axis of `evor_value.py`: C51's atoms are
evenly spaced there, QR's quantiles and Huber's threshold are measured there, bootstrapped values are clipped as there.
A mean does not commute with a map that is not affine, so `scalar` needs an affine axis. Quantiles do, and C51 projects
in the environment's units. With one of the banked next actions per update, `scalar` is expected SARSA in the mean.

Reads and writes what `evor_value.py` does; `evor_infer.py` loads the result. There the log-mean-exp is exact: the value
of `scalar`, a weighted sum over atoms or quantiles of the others, without sampling.

Sources: C51, Bellemare et al., arXiv 1707.06887; QR, Dabney et al., arXiv 1710.10044.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

import evor_bc
import evor_value
from common.args import Count, at_least, positive
from common.cli import run_cli
from common.evaluation import Evaluation
from common.flow import Ode
from common.networks import DirectCritic, Sizes
from common.problem import Dataset, Replica, ValueProblem, sample_batch
from common.replicas import chunked
from common.returns import AxisKind, ReturnAxis
from common.run import Run
from evor_infer import Agent
from evor_value import TrainState, make_optimizer, next_actions
from recipes import recipe_of

PRESETS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in preset.items() if key != "critic"}
    for name, preset in evor_value.PRESETS.items()
}


@dataclasses.dataclass(frozen=True)
class Args(evor_value.Args):
    """Stage 2 with a scalar critic, C51 or QR in the place of the flow. Flags of the flow alone have no effect."""

    critic: Literal["scalar", "c51", "qr"] = "scalar"  # type: ignore[assignment]
    """The critic; see the table at the top of the file."""
    ensemble: Count = 1
    """Scalar critics, whose mean is the value; QC has 2."""
    atoms: Annotated[int, at_least(2)] = 51
    """Atoms of C51, evenly over the possible returns and --clip-margin on the return axis."""
    quantiles: Count = 32
    """Quantiles of QR."""
    huber: Annotated[float, positive] = 0.02
    """Threshold of QR's Huber loss, on the return axis (ours)."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.critic == "scalar" and self.axis_kind == "quantiles":
            yield "--critic scalar needs an affine axis: leave out --return-axis quantiles."

    @property
    def method(self) -> str:
        return self.critic

    @property
    def axis_kind(self) -> AxisKind:
        return self.return_axis or ("std" if self.critic == "scalar" else "quantiles")

    @property
    def outputs(self) -> int:
        return {"scalar": self.ensemble, "c51": self.atoms, "qr": self.quantiles}[self.critic]


# --- Maths -------------------------------------------------------------------------------------------------------


def project(
    values: Float[Array, " n"], weights: Float[Array, " n"], atoms: Float[Array, " atoms"]
) -> Float[Array, " atoms"]:
    """The law `sum_j weights_j delta(values_j)` on the atoms, in rising order: each value, clipped to their range,
    shares its weight between its two neighbours in proportion to how near they are. Keeps the mean of values within the
    range."""
    passed = jnp.clip((values[:, None] - atoms[None, :-1]) / jnp.diff(atoms)[None, :], 0.0, 1.0)  # share of each gap
    ends = jnp.ones((len(values), 1))
    return weights @ (jnp.concatenate([ends, passed], axis=1) - jnp.concatenate([passed, 0.0 * ends], axis=1))


def quantile_huber(
    quantiles: Float[Array, " n"], values: Float[Array, " m"], threshold: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """`sum_i mean_j |tau_i - [y_j < q_i]| H(y_j - q_i) / k`, `tau_i = (i + 1/2) / n`, H Huber's, k its threshold."""
    levels = (jnp.arange(len(quantiles)) + 0.5) / len(quantiles)
    error = values[None, :] - quantiles[:, None]
    size = jnp.abs(error)
    huber = jnp.where(size < threshold, 0.5 * error**2 / threshold, size - 0.5 * threshold)
    return jnp.sum(jnp.mean(jnp.abs(levels[:, None] - (error < 0)) * huber, axis=1))


def td_loss_one(
    critic: DirectCritic,
    target: DirectCritic,
    observation: Float[Array, " observation"],
    action: Float[Array, " action"],
    reward: Float[Array, ""],
    bootstrap: Float[Array, ""],
    next_observation: Float[Array, " observation"],
    next_action: Float[Array, " action"],
    axis: ReturnAxis,
    *,
    margin: float,
    threshold: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Loss of one transition, the table at the top of the file, and the mean of its target. `reward` and that mean are
    in the environment's units, all else on the return axis."""
    no_noise = jnp.zeros(1)
    next_values, weights = target.law(next_observation, next_action, no_noise, Ode())
    returns = reward + bootstrap * jnp.clip(axis.to_environment(next_values), *axis.bounds(margin))
    returns, weights = jax.lax.stop_gradient((returns, weights))
    out = critic(observation, action)
    if critic.kind == "scalar":
        loss = jnp.mean((out - axis.to_model(returns)) ** 2)  # returns has one element
    elif critic.kind == "c51":
        atoms = axis.to_environment(jax.lax.stop_gradient(critic.atoms))
        loss = -jnp.sum(project(returns, weights, atoms) * jax.nn.log_softmax(out))
    else:
        loss = quantile_huber(out, axis.to_model(returns), threshold)
    return loss, jnp.sum(weights * returns)


# --- Training ----------------------------------------------------------------------------------------------------


def with_atoms(critic: DirectCritic, low: Float[Array, ""], high: Float[Array, ""]) -> DirectCritic:
    """The critic with its atoms evenly over `[low, high]`."""
    if critic.kind != "c51":
        return critic
    high = jnp.where(high > low, high, low + 1.0)  # one possible return: its law is that of the first atom
    return eqx.tree_at(lambda c: c.atoms, critic, jnp.linspace(low, high, len(critic.atoms)))


def train_step(
    args: Args, state: TrainState, dataset: Dataset, replica: Replica
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One gradient step of one replica. Keys are derived from the step, so a resumed run draws the same batches."""
    batch_key, _, action_key = jax.random.split(jax.random.fold_in(replica.key, state.step), 3)
    batch = sample_batch(dataset, args.batch_size, args.horizon, key=batch_key)
    reward, bootstrap = (x[replica.task, batch.index] for x in (dataset.rewards, dataset.bootstraps))

    low, high = map(replica.axis.to_model, replica.axis.bounds(args.clip_margin))
    online, target_critic = with_atoms(state.critic, low, high), with_atoms(state.target, low, high)
    chosen = next_actions(args, online, dataset, replica, batch, key=action_key)

    def loss_fn(critic):
        one = functools.partial(td_loss_one, critic, target_critic, margin=args.clip_margin, threshold=args.huber)
        in_batch = batch.observations, batch.actions, reward, bootstrap, batch.next_observations, chosen
        losses, targets = jax.vmap(one, (0,) * 6 + (None,))(*in_batch, replica.axis)
        return jnp.mean(losses), jnp.mean(targets)

    (loss, target), gradient = jax.value_and_grad(loss_fn, has_aux=True)(online)
    updates, opt_state = make_optimizer(args).update(gradient, state.opt_state, online)
    critic = with_atoms(optax.apply_updates(online, updates), low, high)
    # The average takes the parameters after this update, so the target network is not one step late.
    target_critic = optax.incremental_update(critic, target_critic, args.tau)
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "target_return": target,
    }
    return TrainState(critic, target_critic, opt_state, state.step + 1), metrics


train_chunk = chunked(train_step)


def init_state(args: Args, sizes: Sizes, *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica; the target network starts as a copy of the online one."""
    shape = dict(kind=args.critic, outputs=args.outputs, width=args.width, depth=args.depth)
    critic = DirectCritic(sizes.observation, sizes.chunk, **shape, key=key)
    target = jax.tree.map(jnp.copy, critic)
    return TrainState(critic, target, make_optimizer(args).init(critic), jnp.zeros((), jnp.int32))


def main(args: Args) -> list[dict[str, Any]]:
    """Data, base policy, critics, evaluation, report; returns the summary of the last evaluation."""
    with Run(args, stage="value") as run:
        problem = ValueProblem(args, load_policy=evor_bc.load_or_train)

        def agents(state: TrainState) -> Agent:
            parts = problem.policies, state.critic, problem.standardizers, problem.axis
            return Agent(*parts, args.horizon, args.extraction)

        state = run.start(problem, init_state, model=agents)
        evaluation = Evaluation(args, problem, run)
        for step in run.steps():
            if evaluation.is_due(step):
                evaluation(agents(run.fetch(state)))
            state, metrics = train_chunk(args, state, problem.data(step), problem.replicas)
            run.record(state, metrics)
        return evaluation.final(agents(run.fetch(state)))


if __name__ == "__main__":
    run_cli(main, Args, PRESETS, recipe_of=recipe_of)
