"""Stage 2 of EVOR, and the main job: the law of the reward-to-go, by flow-based temporal differences.

    python evor_value.py --env cube-double-play

`s_theta(z_t, t | x, a)` is a velocity field on the line. It moves noise z_0 ~ N(0, 1) to draws of z = h(Z). Z is the
reward-to-go of the action chunk a, `Z(x, a) = r + g Z(x', a')` in law with a' ~ pi_base(. | x'), where r is the
chunk's discounted reward and g = discount^horizon, or 0 if the task was solved, or lost for good, in it. h is the
return axis, an increasing map made from the data's returns (`common/returns.py`). On it the Bellman equation is
z = f(z') in law with f(z') = h(r + g h^-1(z')).

The field is regressed on a TD target that is made with a target network s_bar. With t ~ U[0, 1),
L(theta) = E( s_theta(z_t, t | x, a) - target )^2 where

    --td-target          path point z_t                               target
    paper                z_0 + t u                                    f(0) + g s_bar(z_t, t | x', a')
    shared-noise         (1-t) z_0 + t y,  y = f(psi_bar_1(z_0))      y - z_0
    independent-noise    (1-t) z_0 + t y,  y = f(psi_bar_1(z_0'))     y - z_0
    velocity             f(z'_t) + (1-t) (z_0 - f(z_0))               g s_bar(z'_t, t | x', a') + f(z_0) - z_0
                         where z'_t = psi_bar_t(z_0)

psi_bar_t(z_0) is where the flow of s_bar(., . | x', a') has moved z_0 at time t. z_0' is fresh noise. In `paper` the
path goes from z_0 to z_0 + u; u is uniform over the possible returns on the axis, cut at `FARTHEST`. The last three
regress on the velocity of a random path from N(0, 1) to the bootstrapped return, so their fixed point is the law of
h(Z). That of `paper` is N(h(Q), 1), where Q is the mean of Z: docs/td-targets.md has both arguments. `paper` and
`velocity` need an affine h, for which f(z') = f(0) + g z'. What is bootstrapped is clipped to the possible returns,
widened by `--clip-margin`; the table leaves out the clip.

The policy is frozen, so next actions are drawn once, K for each transition (the bank). `--next-action base` takes one
of them: the law is that of pi_base with its noise scaled by lambda (`--noise-scale`). `dataset` takes the action that
was taken. `softmax` picks among the K by the score of `evor_infer.py`, with `--return-temperature` and the `--backup-*`
settings; at its default `--backup-temperature`, 0, it takes the best. The trained network chooses, the target network
gives the value, and the law is that of a policy extracted from K.

Reads a dataset and the base policy (trained first where it is missing); writes `runs/ENV/value/{config.json,
metrics.csv, model.eqx, train_state.eqx, ...}`, with rows and figures of its evaluations.

Source: EVOR, arXiv 2510.08218, stage 2. *Ours*, not disclosed there: discount, Polyak rate, batch size, LayerNorm, flow
steps. docs/differences.md lists what differs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

import evor_bc
import evor_infer
from common.args import (
    Count,
    Depth,
    Draws,
    NoiseScale,
    TrainArgs,
    Width,
    at_least,
    learning_rate,
    multiple_of,
    not_negative,
    unread,
    within,
)
from common.cli import parse_args, run_cli
from common.data.names import NUM_TASKS
from common.evaluation import Evaluation
from common.flow import Ode, Solver, integrate
from common.networks import Critic, CriticSpec, Sizes, VelocityCritic, make_critic, stratified_normal
from common.plan import print_plan
from common.problem import BasePolicy, Batch, Dataset, Replica, ValueProblem, action_chunks, sample_batch
from common.replicas import chunked, in_blocks
from common.returns import STD_ON_AXIS, AxisKind, ReturnAxis
from common.run import Run
from evor_infer import Agent, Extraction
from recipes import recipe_of

Target = Literal["paper", "shared-noise", "independent-noise", "velocity"]
SAMPLING_TARGETS = ("shared-noise", "independent-noise")  # bootstrap a sample: right on any return axis
FARTHEST = 5 * STD_ON_AXIS  # largest |u| of the `paper` target

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        steps=2_000, width=128, batch_size=128, episodes=30, steps_per_call=500, num_next_actions=2, eval_episodes=10,
        num_actions=8, num_returns=4,
    ),
    "preview": dict(
        steps=30_000, width=128, head_width=64, schedule="cosine", learning_rate=1e-3, tau=0.1, num_actions=16,
        num_returns=8,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args(TrainArgs):
    """Stage 2, the main job: train the reward model (and the base policy if there is none), then evaluate."""

    # --- experiment ---
    tasks: tuple[int, ...] = unread(())
    """OGBench's single tasks; the environment's default task by default."""
    policy_run_dir: Path | None = unread(None)
    """The run directory with the base policy; --run-dir by default."""
    policy_steps: Annotated[int | None, at_least(1)] = unread(None)
    """Gradient steps of the base policy where there is none; those of evor_bc.py, or of its preset, by default."""
    policy_seed: Annotated[int | None, within(0, 2**31, brackets="[)")] = unread(None)
    """The base policy that all seeds share, by its seed; each seed's own by default."""
    reward: Literal["default", "sparse"] = unread("default")
    """OGBench's reward, or -1 until the task is solved (QC's variant)."""

    # --- reward model ---
    td_target: Target = "shared-noise"
    """The regression target; see the table at the top of the file."""
    next_action: Literal["base", "dataset", "softmax"] = "base"
    """Whose reward-to-go: the base policy's, the data's, or the extracted policy's."""
    num_next_actions: Count = 4
    """K: banked next actions per transition."""
    noise_scale: NoiseScale = unread(1.0)
    """lambda: standard deviation of the noise that actions of the base policy start from, in the bank and at
    evaluation. At 1 they are draws of the learned policy; a smaller one keeps to what it does most often."""
    redraw_bank: Annotated[int, not_negative, multiple_of("steps_per_call")] = unread(0)
    """Gradient steps after which the bank is drawn anew; 0 keeps the first."""
    backup_temperature: Annotated[float, not_negative] = 0.0
    """tau_Q of the softmax backup, in standard deviations of the data's returns; 0 takes the best of K."""
    backup_returns: Count = 4
    """Return draws per banked action in the softmax backup."""
    backup_steps: Count = 1
    """Euler steps of these draws. One gives `z_0 + s(z_0, 0 | x, a)`: the mean, on the return axis, of the returns
    whose paths start at z_0. With `--td-target independent-noise` that is the mean of all, and the draws are alike."""
    critic: Literal["mlp", "trunk"] = "trunk"
    """Features of (x, a) with a small flow head, or the paper's MLP, which takes longer."""
    head_width: Width = 128
    """Units per hidden layer of the trunk critic's head."""
    head_depth: Depth = 3
    """Hidden layers of the trunk critic's head."""
    discount: Annotated[float, within(0, 1, brackets="[)")] = unread(0.99)
    """Discount per environment step (ours)."""
    return_axis: AxisKind | None = unread(None)
    """The axis that the law is learned on (ours): made from the quantiles of the data's returns, or affine, from their
    standard deviation or from the possible returns. By default quantiles; std for targets that need an affine axis."""
    clip_margin: Annotated[float, not_negative] = 0.1
    """How far beyond the possible returns bootstrapped ones may go, as a fraction of the return range (ours)."""
    flow_steps: Draws = Extraction.flow_steps
    """Steps of the flows of policy and critic, in the target, in the bank and at evaluation (ours). The bootstrap
    multiplies the error of the target's flow by 1 / (1 - discount^horizon). The softmax backup chooses with
    `--backup-steps`."""
    solver: Solver = Extraction.solver
    """Solver of both flows: midpoint takes two evaluations a step, euler one (ours)."""
    tau: Annotated[float, within(0, 1, brackets="(]")] = 0.005
    """Polyak rate of the target network (ours)."""

    # --- evaluation ---
    eval_every: Annotated[int, not_negative, multiple_of("steps_per_call")] = unread(100_000)
    """Gradient steps between evaluations; 0: only at the end, which is always evaluated."""
    eval_episodes: Annotated[int, not_negative] = unread(50)
    """Episodes per task and seed (OGBench: 50); 0 skips evaluation."""
    num_actions: Draws = unread(Extraction.num_actions)
    """N_pi at evaluation (32: the paper's)."""
    num_returns: Draws = unread(Extraction.num_returns)
    """N at evaluation (ours)."""
    return_temperature: Annotated[float, not_negative] = Extraction.return_temperature
    """tau_R, in the softmax backup and at evaluation, in standard deviations of the data's returns (ours)."""
    action_temperature: Annotated[float, not_negative] = unread(Extraction.action_temperature)
    """tau_Q at evaluation, in standard deviations of the data's returns (ours); 0 takes the best candidate."""

    def conflicts(self) -> Iterator[str]:
        yield from super().conflicts()
        if self.redraw_bank and self.next_action == "dataset":
            yield "--redraw-bank: --next-action dataset uses no bank: leave one of them out."
        if len(set(self.tasks)) != len(self.tasks):
            yield "--tasks needs each task once."
        if not set(self.tasks) <= set(range(1, NUM_TASKS + 1)):
            yield f"--tasks {list(self.tasks)}: a task does not exist, OGBench has tasks 1 to {NUM_TASKS}."
        if self.critic == "trunk" and self.depth < 2:
            yield f"--critic trunk needs --depth 2 or more, not {self.depth}: its last layer is the head."
        if 1 - np.float32(self.discount) < 1e-5:
            yield f"--discount {self.discount}: single precision hardly tells it from 1: use 0.99999 or less."
        if self.return_axis == "quantiles" and self.td_target not in SAMPLING_TARGETS:
            yield f"--td-target {self.td_target} needs an affine axis: leave out --return-axis quantiles."

    @property
    def ode(self) -> Ode:
        return Ode(self.flow_steps, self.solver)

    @property
    def axis_kind(self) -> AxisKind:
        return self.return_axis or ("quantiles" if self.td_target in SAMPLING_TARGETS else "std")

    @property
    def num_replicas(self) -> int:
        return max(len(self.tasks), 1) * self.seeds

    @property
    def policy_seeds(self) -> tuple[int, ...]:
        """Seeds of the base policies that are used."""
        return self.all_seeds if self.policy_seed is None else (self.policy_seed,)

    @property
    def method(self) -> str:
        return self.td_target

    @property
    def evaluation_only(self) -> tuple[str, ...]:
        """Settings that training does not depend on: `--resume` may change them, and then evaluates anew."""
        names = ("eval_episodes", "num_actions", "num_returns", "action_temperature")
        if self.next_action != "softmax":
            names += ("return_temperature",)
        return (*names, "noise_scale") if self.next_action == "dataset" else names

    @property
    def extraction(self) -> Extraction:
        """How actions are extracted at evaluation."""
        names = (field.name for field in dataclasses.fields(Extraction))
        return Extraction(**{name: getattr(self, name) for name in names if hasattr(self, name)})

    @property
    def base_policy_alone(self) -> Extraction:
        return dataclasses.replace(self.extraction, num_actions=1, noise_scale=1.0)


class TrainState(NamedTuple):
    """Arrays only. A run trains several replicas, one for each task and seed: each leaf then has a leading axis."""

    critic: Critic
    target: Critic
    opt_state: optax.OptState
    step: Int[Array, ""]


class Noise(NamedTuple):
    """What a TD target draws at random."""

    z_0: Float[Array, " batch"]  # N(0, 1): start of the path
    z_next: Float[Array, " batch"]  # N(0, 1): start of the bootstrap where it is not shared
    t: Float[Array, " batch"]  # U[0, 1)
    u: Float[Array, " batch"]  # uniform: how far the `paper` target's path goes


# --- Maths -------------------------------------------------------------------------------------------------------


def td_target(
    kind: Target,
    reward: Float[Array, " batch"],
    bootstrap: Float[Array, " batch"],
    noise: Noise,
    next_velocity: Callable[[Array, Array], Array],
    next_flow: Callable[[Array, Array | float], Array],
    axis: ReturnAxis,
    *,
    margin: float,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Path point `z_t` and regression target, the table at the top of the file; both on the return axis.

    Args:
        reward, bootstrap: `r` and `g = discount^horizon * mask` of `Z = r + g Z'`, in the environment's units.
        next_velocity: `(z, t) -> s_bar(z, t | x', a')`, of the target network.
        next_flow: `(z_0, t) -> psi_bar_t(z_0 | x', a')`, of the target network.
        axis: the map h. With `paper` and `velocity` it has to be affine.
        margin: how far beyond the possible returns bootstrapped ones may go, as a fraction of their range.
            `paper` clips the next velocity to [h(low), h(high)], `velocity` to [h(low) - z_0, h(high) - z_0], and z'_t
            to the paths that end there.

    No gradient flows into either result.
    """
    r, g, z_0, t = reward, bootstrap, noise.z_0, noise.t
    if any(x.shape != r.shape for x in (g, *noise)):
        raise ValueError(f"reward, bootstrap and noise must have one shape: {[x.shape for x in (r, g, *noise)]}.")
    low, high = axis.bounds(margin)
    if kind in SAMPLING_TARGETS:
        next_z = next_flow(z_0 if kind == "shared-noise" else noise.z_next, 1.0)
        y = axis.to_model(r + g * jnp.clip(axis.to_environment(next_z), low, high))
        z_t, target = (1.0 - t) * z_0 + t * y, y - z_0
    else:
        # With an affine h, f(z) = f(0) + g z, so f(z') + (1-t) (z_0 - f(z_0)) = t f(0) + g z' + (1-t) (1-g) z_0.
        f_0 = axis.to_model(r + g * axis.to_environment(jnp.zeros_like(r)))
        z_low, z_high = axis.to_model(low), axis.to_model(high)
        if kind == "paper":
            z_t = z_0 + t * noise.u
            target = f_0 + g * jnp.clip(next_velocity(z_t, t), z_low, z_high)
        elif kind == "velocity":
            next_z_t = jnp.clip(next_flow(z_0, t), (1.0 - t) * z_0 + t * z_low, (1.0 - t) * z_0 + t * z_high)
            z_t = t * f_0 + g * next_z_t + (1.0 - t) * (1.0 - g) * z_0
            target = f_0 + g * jnp.clip(next_velocity(next_z_t, t), z_low - z_0, z_high - z_0) - (1.0 - g) * z_0
        else:
            raise ValueError(f"unknown TD target {kind!r}.")
    return jax.lax.stop_gradient(z_t), jax.lax.stop_gradient(target)


def value_loss_one(
    critic: VelocityCritic,
    observation: Float[Array, " observation"],
    action: Float[Array, " action"],
    z_t: Float[Array, ""],
    t: Float[Array, ""],
    target: Float[Array, ""],
) -> Float[Array, ""]:
    """Flow-matching loss of one example: `(s_theta(z_t, t | x, a) - target)^2`."""
    if not z_t.shape == t.shape == target.shape == ():
        raise ValueError(f"z_t, t and target must be numbers, not {z_t.shape}, {t.shape}, {target.shape}.")
    return (critic.velocity(critic.features(observation, action), z_t, t) - target) ** 2


def choose_next_action(
    critic: Critic,
    axis: ReturnAxis,
    observation: Float[Array, " observation"],
    candidates: Float[Array, "K action"],
    noise: Float[Array, " num_returns"],
    *,
    return_temperature: Float[ArrayLike, ""],
    action_temperature: Float[ArrayLike, ""],
    ode: Ode,
    key: PRNGKeyArray,
) -> Float[Array, " action"]:
    """The softmax backup: stage 3's score and choice over the K banked actions, by the online critic."""
    score = functools.partial(evor_infer.score_one, temperature=return_temperature * axis.spread, ode=ode)
    scores = jax.vmap(score, (None, None, None, 0, None))(critic, axis, observation, candidates, noise)
    return candidates[evor_infer.select(scores, action_temperature * axis.spread, key=key)]


# --- Training ----------------------------------------------------------------------------------------------------


def make_optimizer(args: Args) -> optax.GradientTransformation:
    return optax.adam(learning_rate(args.learning_rate, args.schedule, args.steps))


def draw_noise(batch_size: int, axis: ReturnAxis, *, key: PRNGKeyArray) -> Noise:
    """Fresh noise for one batch.

    The pairs (t, z_0) are the R2 sequence (M. Roberts, 2018) with a random shift, z_0 taken through the inverse normal
    distribution. Each pair is distributed as if drawn alone, and together they lie evenly, so that the gradient is
    less noisy.
    """
    shift_key, next_key, place_key = jax.random.split(key, 3)
    lattice = np.outer([0.7548776662466927, 0.5698402909980532], np.arange(batch_size)) % 1.0
    t, start = (jnp.asarray(lattice, jnp.float32) + jax.random.uniform(shift_key, (2, 1))) % 1.0
    low, high = jnp.clip(axis.to_model(jnp.stack([axis.low, axis.high])), -FARTHEST, FARTHEST)
    return Noise(
        z_0=jax.scipy.special.ndtri(jnp.clip(start, 2**-24, 1 - 2**-24)),
        z_next=jax.random.normal(next_key, (batch_size,)),
        t=t,
        u=jax.random.uniform(place_key, (batch_size,), minval=low, maxval=high),
    )


def next_actions(
    args: Args,
    critic: Critic,
    dataset: Dataset,
    replica: Replica,
    batch: Batch,
    *,
    key: PRNGKeyArray,
) -> Float[Array, "batch action"]:
    """The `a'` of a batch, according to `args.next_action`."""
    if args.next_action == "dataset":
        return action_chunks(dataset.actions, dataset.starts[batch.index] + args.horizon, args.horizon)
    if args.next_action == "base":
        pick = jax.random.randint(key, batch.index.shape, 0, args.num_next_actions)
        return dataset.bank[replica.policy, batch.index, pick].astype(jnp.float32)
    choose = functools.partial(
        choose_next_action,
        return_temperature=args.return_temperature,
        action_temperature=args.backup_temperature,
        ode=Ode(args.backup_steps, "euler"),
    )
    candidates = dataset.bank[replica.policy, batch.index].astype(jnp.float32)
    keys = jax.random.split(key, len(candidates))
    noise = stratified_normal(args.backup_returns)

    def one(observation, actions, key):
        return choose(critic, replica.axis, observation, actions, noise, key=key)

    rows = args.num_next_actions * args.backup_returns
    return jax.lax.stop_gradient(in_blocks(one, batch.next_observations, candidates, keys, rows=rows))


def train_step(
    args: Args, state: TrainState, dataset: Dataset, replica: Replica
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One gradient step of one replica. Keys are derived from the step, so a resumed run draws the same batches."""
    batch_key, noise_key, action_key = jax.random.split(jax.random.fold_in(replica.key, state.step), 3)
    batch = sample_batch(dataset, args.batch_size, args.horizon, key=batch_key)
    reward, bootstrap = (x[replica.task, batch.index] for x in (dataset.rewards, dataset.bootstraps))

    # The bootstrap. The online critic may choose a' (`softmax`); the target network says what a' is worth.
    chosen = next_actions(args, state.critic, dataset, replica, batch, key=action_key)
    next_features = jax.vmap(state.target.features)(batch.next_observations, chosen)

    def next_velocity(z, t):
        return jax.vmap(state.target.velocity)(next_features, z, jnp.broadcast_to(t, z.shape))

    def next_flow(z_0, end_time):
        return integrate(next_velocity, z_0, args.ode, end_time=end_time)

    noise = draw_noise(args.batch_size, replica.axis, key=noise_key)
    # Most returns of a sparse task lie at the lowest bound. Clipping there would cut the errors below it and not those
    # above, and so raise the mean: hence the margin.
    z_t, target = td_target(
        args.td_target, reward, bootstrap, noise, next_velocity, next_flow, replica.axis, margin=args.clip_margin
    )

    def loss_fn(critic):
        losses = jax.vmap(value_loss_one, (None, 0, 0, 0, 0, 0))(
            critic, batch.observations, batch.actions, z_t, noise.t, target
        )
        return jnp.mean(losses)

    loss, gradient = jax.value_and_grad(loss_fn)(state.critic)
    updates, opt_state = make_optimizer(args).update(gradient, state.opt_state, state.critic)
    critic = optax.apply_updates(state.critic, updates)
    # The average takes the parameters after this update, so the target network is not one step late.
    target_critic = optax.incremental_update(critic, state.target, args.tau)
    # The end of a straight path from z_t is the bootstrapped return. The path of `velocity` is only nearly straight.
    drawn = target if args.td_target == "paper" else z_t + (1.0 - noise.t) * target
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "target_return": jnp.mean(replica.axis.to_environment(drawn)),
    }
    return TrainState(critic, target_critic, opt_state, state.step + 1), metrics


train_chunk = chunked(train_step)


def init_state(args: Args, sizes: Sizes, *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica; the target network starts as a copy of the online one."""
    heads = args.head_width, args.head_depth
    spec = CriticSpec(sizes.observation, sizes.chunk, args.critic, args.width, args.depth, *heads)
    critic = make_critic(spec, key=key)
    target = jax.tree.map(jnp.copy, critic)
    return TrainState(critic, target, make_optimizer(args).init(critic), jnp.zeros((), jnp.int32))


def load_policy(args: Args, *, sizes: Sizes, data_sha256: str) -> BasePolicy:
    """The base policies, trained where there are none. On a CPU it first prints the stages to come and their minutes,
    and where they are more than an hour those of `--preview`."""
    if jax.default_backend() == "cpu":
        preview = parse_args(Args, PRESETS, ["--env", args.env, "--preview"], recipe_of=recipe_of)
        kept = ("dataset", "tasks", "seeds", "policy_seed", "run_dir", "policy_run_dir", "eval_episodes")
        preview = dataclasses.replace(preview, **{name: getattr(args, name) for name in kept})
        print_plan(args, preview, sizes, policy_args=evor_bc.args_for, is_trained=evor_bc.is_trained)
    return evor_bc.load_or_train(args, sizes=sizes, data_sha256=data_sha256)


def main(args: Args) -> list[dict[str, Any]]:
    """Data, base policy, reward models, evaluation, report; returns the summary of the last evaluation."""
    with Run(args, stage="value") as run:
        problem = ValueProblem(args, load_policy=load_policy)

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
