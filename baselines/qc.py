"""Q-chunking with a flow policy (QC): the best of N actions, in the backup and in the environment.

    python -m baselines.qc --env cube-double-play --horizon 5

The critic is the mean of two MLPs, Q = (Q_1 + Q_2) / 2, trained by its greedy backup: the online network chooses among
N draws of the flow policy, the target network says what the choice is worth,

    a'   = argmax_j Q(x', a'_j),   a'_j ~ pi(. | x'),  j = 1..N
    y    = r + g Q_bar(x', a')
    loss = mean_k (Q_k(x, a) - y)^2

where (x, a, r, g, x') is a chunk of `--horizon` actions executed open loop, r its discounted reward and g = discount^h
if the task was not solved in it, else 0. The agent does the same: N draws, the online critic's best. QC of the paper is
`--horizon 5`; with `--horizon 1` it is called BFN and has `--num-next-actions 4`.

    --policy joint    as published: the policy learns by flow matching in the same steps, on the same batch, and draws
                      N fresh next actions for each transition. Most of the FLOPs go there.
    --policy frozen   stage 1's policy, and its next-action bank: the value learning of QC alone (`--preview` does
                      this). What is left is a setting of `baselines.critics`, and that module trains it:
                      `--critic scalar --ensemble 2 --next-action softmax --num-next-actions 32`.

Reads and writes what `evor_value.py` does; `evor_infer.py` loads the result. With `joint` there is no stage 1: the
policy lies in `value/model.eqx` too.

Differences from the published code: (1) it draws chunks that cross the end of an episode, gives them no weight in the
TD loss (`valid`) and clones what lies before the end; we never draw them. (2) It counts rewards of a chunk after the
task was solved; we stop there. (3) As in stage 2, observations are standardised, returns scaled, critics start at the
data's mean with small outputs, bootstrapped values are clipped to the possible ones (`--clip-margin`), and the target
network follows the updated parameters.
Source: Q-chunking, Li, Zhou, Levine, arXiv 2507.07969.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

import evor_bc
import evor_value
import recipes
from baselines import critics
from common.args import Count, NoiseScale, at_least, not_negative, unread
from common.cli import run_cli
from common.evaluation import Evaluation
from common.networks import DirectCritic, PolicySpec, Sizes, VelocityPolicy, make_policy
from common.problem import Dataset, Replica, ValueProblem, sample_batch
from common.replicas import chunked, in_blocks
from common.run import Run
from evor_infer import Agent

PRESETS: dict[str, dict[str, Any]] = {
    name: {key: value for key, value in preset.items() if key != "num_actions"}
    for name, preset in critics.PRESETS.items()
}
PRESETS["quick"] |= dict(num_next_actions=4)
PRESETS["preview"] |= dict(policy="frozen")


@dataclasses.dataclass(frozen=True)
class Args(critics.Args):
    """QC in the place of stage 2. Flags of the flow, C51 and QR have no effect."""

    policy: Literal["joint", "frozen"] = "joint"
    """A policy trained with the critic, or stage 1's; see the top of the file."""
    num_next_actions: Count = 32
    """N: draws of the policy, of which the backup takes the best."""
    num_actions: Annotated[int | None, at_least(1)] = unread(None)  # type: ignore[assignment]
    """N at evaluation; --num-next-actions by default."""
    next_action: Literal["base", "dataset", "softmax"] = "softmax"
    """softmax is QC's: with --backup-temperature 0, the best of N. The others need --policy frozen."""
    action_temperature: Annotated[float, not_negative] = unread(0.0)
    """tau_Q at evaluation; 0 is QC's: the best of N."""
    noise_scale: NoiseScale = 1.0
    """Of the noise that the draws start from; 1 is QC's."""
    ensemble: Count = 2
    """Critics, whose mean is the value."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.critic != "scalar":
            yield f"--critic {self.critic}: QC's is scalar; the others are in baselines.critics."
        if self.policy == "joint" and (self.next_action != "softmax" or self.backup_temperature != 0):
            yield "--policy joint backs up the best of N: leave out --next-action and --backup-temperature."
        if self.policy == "joint" and (
            self.policy_run_dir is not None or self.policy_seed is not None or self.redraw_bank
        ):
            yield "--policy joint: leave out --policy-run-dir, --policy-seed and --redraw-bank; see --policy."

    @property
    def method(self) -> str:
        return f"QC, {self.policy} policy"


EXTRACTION = ("noise_scale", "num_actions", "action_temperature")  # of EVOR; QC has its own


def recipe_of(args: Any) -> dict[str, Any]:
    """An environment's recipe, without what it says about EVOR's extraction."""
    recipe = recipes.recipe_of(args)
    return {name: value for name, value in recipe.items() if name not in EXTRACTION}


class TrainState(NamedTuple):
    """Arrays only; with replicas, each leaf has a leading axis."""

    critic: DirectCritic
    target: DirectCritic
    policy: VelocityPolicy
    opt_state: optax.OptState
    step: Int[Array, ""]


# --- Maths -------------------------------------------------------------------------------------------------------


def best_of(
    critic: DirectCritic, observation: Float[Array, " observation"], candidates: Float[Array, "N action"]
) -> Float[Array, " action"]:
    """The candidate of the largest value, the mean of the critics."""
    values = jax.vmap(lambda action: jnp.mean(critic(observation, action)))(candidates)
    return candidates[jnp.argmax(values)]


# --- Training (with a policy of its own; `critics.py` trains with a frozen one) -----------------------------------


def train_step(
    args: Args, state: TrainState, dataset: Dataset, replica: Replica
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One gradient step of one replica. Keys are derived from the step, so a resumed run draws the same batches."""
    batch_key, policy_key, action_key = jax.random.split(jax.random.fold_in(replica.key, state.step), 3)
    batch = sample_batch(dataset, args.batch_size, args.horizon, key=batch_key)
    reward, bootstrap = (x[replica.task, batch.index] for x in (dataset.rewards, dataset.bootstraps))

    def next_action(observation, noise):
        candidates = state.policy.sample(observation, args.noise_scale * noise, args.ode)
        return best_of(state.critic, observation, candidates)

    noise = jax.random.normal(action_key, (args.batch_size, args.num_next_actions, state.policy.spec.action))
    chosen = jax.lax.stop_gradient(in_blocks(next_action, batch.next_observations, noise, rows=args.num_next_actions))

    def loss_fn(networks):
        critic, policy = networks
        td_loss = functools.partial(
            critics.td_loss_one, critic, state.target, margin=args.clip_margin, threshold=args.huber
        )
        in_batch = batch.observations, batch.actions, reward, bootstrap, batch.next_observations, chosen
        losses, targets = jax.vmap(td_loss, (0,) * 6 + (None,))(*in_batch, replica.axis)
        bc_loss = evor_bc.bc_loss(policy, batch.observations, batch.actions, key=policy_key)
        # The two share no parameters: one optimizer for their sum is two optimizers.
        return jnp.mean(losses) + bc_loss, (jnp.mean(losses), bc_loss, jnp.mean(targets))

    online = state.critic, state.policy
    gradient, (loss, bc_loss, target) = jax.grad(loss_fn, has_aux=True)(online)
    updates, opt_state = evor_value.make_optimizer(args).update(gradient, state.opt_state, online)
    critic, policy = optax.apply_updates(online, updates)
    # The average takes the parameters after this update, so the target network is not one step late.
    target_critic = optax.incremental_update(critic, state.target, args.tau)
    metrics = {
        "loss": loss,
        "bc_loss": bc_loss,
        "gradient_norm": optax.tree.norm(gradient[0]),  # the critic's
        "target_return": target,
    }
    return TrainState(critic, target_critic, policy, opt_state, state.step + 1), metrics


train_chunk = chunked(train_step)


def init_state(args: Args, sizes: Sizes, *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica; the target network starts as a copy of the online one."""
    critic_key, policy_key = jax.random.split(key)
    shape = dict(width=args.width, depth=args.depth)
    critic = DirectCritic(
        sizes.observation, sizes.chunk, kind=args.critic, outputs=args.outputs, **shape, key=critic_key
    )
    policy = make_policy(PolicySpec(sizes.observation, sizes.chunk, **shape), key=policy_key)
    target = jax.tree.map(jnp.copy, critic)
    opt_state = evor_value.make_optimizer(args).init((critic, policy))
    return TrainState(critic, target, policy, opt_state, jnp.zeros((), jnp.int32))


def main(args: Args) -> list[dict[str, Any]]:
    """Data, critics and policies, evaluation, report; returns the summary of the last evaluation."""
    args = dataclasses.replace(
        args, num_actions=args.num_next_actions if args.num_actions is None else args.num_actions
    )
    if args.policy == "frozen":
        return critics.main(args)
    with Run(args, stage="value") as run:
        problem = ValueProblem(args, load_policy=None)

        def agents(state: TrainState) -> Agent:
            parts = state.policy, state.critic, problem.standardizers, problem.axis
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
