"""Stage 2 of EVOR: the reward-to-go law of the base policy, by flow-based temporal differences. The main job.

    python evor_value.py --env cube-double-play

`s_theta(z_t, t | x, a)` is a velocity field on the line. It moves noise z_0 ~ N(0, 1) to draws of z = h(Z), where Z is
the reward-to-go of the action chunk a,

    Z(x, a) = r + g Z(x', a'),   a' ~ pi_base(. | x'),

r its discounted reward and g = discount^horizon * mask. The return axis h is an increasing map that is made from the
data's returns, so that they spread over the scale of the noise wherever they lie (`common/returns.py`). On this axis
the Bellman equation is z = f(z') in law, with f(z') = h(r + g h^-1(z')).

The field is regressed on a TD target that is made with a target network s_bar (its flow: psi_bar). With t ~ U[0, 1],
L(theta) = E( s_theta(z_t, t | x, a) - target )^2 where

    --td-target          path point z_t                               target
    paper                z_0 + t u                                    f(0) + g s_bar(z_t, t | x', a')
    shared-noise         (1-t) z_0 + t y,  y = f(psi_bar_1(z_0))      y - z_0
    independent-noise    (1-t) z_0 + t y,  y = f(psi_bar_1(z_0'))     y - z_0
    velocity             f(Z'_t) + (1-t) (z_0 - f(z_0))               g s_bar(Z'_t, t | x', a') + f(z_0) - z_0
                         where Z'_t = psi_bar_t(z_0)

z_0' is fresh noise. The two targets in the middle hold for any h. The others need an affine one: f(z') = f(0) + g z'.

Regressing on dZ_t/dt along any random path gives a flow from law(Z_0) to law(Z_1). The last three do that, so that one
sweep is the distributional Bellman operator and the fixed point is the law of h(Z). `paper`, the formula as published,
does not: its only fixed point is the constant field h(Q(x, a)), the law N(h(Q), 1). Its mean is right, its shape is
that of the noise. `benchmarks/return_law.py` measures both.

The policy is frozen: it is never trained on the value. So next actions are drawn once, ahead of training, K for each
transition (the next-action bank). `--next-action base` takes one of them: the law is that of pi_base. `dataset` takes
the action that was taken. `softmax` picks among the K as stage 3 does, chosen by the online network and valued by the
target network: the law of an extracted policy with N_pi = K and tau_Q = `--backup-temperature`.

Reads `runs/ENV/bc/model.eqx` (trained first if missing); writes `runs/ENV/value/{config.json, metrics.csv, model.eqx,
train_state.eqx, train_state.previous.eqx, evaluation.csv, calibration.csv, *.png}`.

Differences from the paper: (1) the default target is consistent, see above; (2) the bank; (3) the paper does not say
which z_1 makes the `paper` target's z_t: we use z_1 = z_0 + u, u uniform on the places of the possible returns up to
five standard deviations of the data's, which covers the paths of its fixed point and is independent of r and a'; (4)
bootstrapped returns are clipped to the possible ones, widened by `--clip-margin`.
Source: EVOR, arXiv 2510.08218, stage 2. *Ours*, not disclosed there: discount, tau, batch size, LayerNorm, flow steps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Float16, Int, Key, PRNGKeyArray

import evor_bc
import evor_infer
from common import checkpoint, data, figures, sources
from common.args import Count, TrainArgs, check, multiple_of, not_negative, within
from common.bank import make_bank
from common.envs import NUM_TASKS, default_run_dir, parse_env, run_name, validation_path
from common.errors import UserError, run_cli
from common.evaluation import Episodes
from common.flow import Ode, Solver, integrate
from common.metrics import CALIBRATED, sha256, write_csv
from common.networks import CRITIC_FIELDS, Critic, FlowCritic, FlowPolicy, make_critic, stratified_normal
from common.returns import WIDTH, AxisKind, ReturnAxis, make_axis
from common.rotation import Rotation, pad
from common.statistics import calibration
from common.training import (
    STATES,
    Run,
    Standardizer,
    chunked,
    copy_to_devices,
    first_host_first,
    in_blocks,
    join_hosts,
    learning_rate,
    spread,
    stack_replicas,
    state_to_resume,
)

Target = Literal["paper", "shared-noise", "independent-noise", "velocity"]
SAMPLING_TARGETS = ("shared-noise", "independent-noise")  # that bootstrap a sample: right on any return axis
FARTHEST = 5 * WIDTH  # place on the axis that the `paper` target's paths go to: five standard deviations of the returns

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(
        steps=2_000, width=128, batch_size=128, episodes=30, chunk=500, num_next_actions=2, eval_episodes=10,
        num_actions=8, num_returns=4,
    ),
    "preview": dict(
        steps=20_000, schedule="cosine", learning_rate=1e-3, tau=0.02, critic="trunk", num_actions=16, num_returns=8,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args(TrainArgs):
    """Stage 2, the main job: train the reward model (and the base policy if there is none), then evaluate."""

    # --- experiment ---
    tasks: tuple[int, ...] = ()
    """OGBench's single tasks; the environment's default task by default."""
    policy_run_dir: Path | None = None
    """The run directory with the base policy; --run-dir by default."""
    policy_seed: Annotated[int | None, not_negative] = None
    """The base policy that all seeds share, by its seed; each seed's own by default."""
    reward: Literal["default", "sparse"] = "default"
    """OGBench's reward, or -1 until the task is solved (QC's variant)."""

    # --- reward model ---
    td_target: Target = "shared-noise"
    """The regression target; see the table at the top of the file."""
    next_action: Literal["base", "dataset", "softmax"] = "base"
    """Whose reward-to-go: the base policy's, the data's, or the extracted policy's."""
    num_next_actions: Count = 4
    """K: banked next actions per transition."""
    redraw_bank: Annotated[int, not_negative, multiple_of("chunk")] = 0
    """Gradient steps after which the bank is drawn anew; 0 keeps the first."""
    backup_temperature: Annotated[float, not_negative] = 0.0
    """tau_Q of the softmax backup, in standard deviations of Q* among the K; 0 takes the best of K."""
    backup_returns: Count = 4
    """Return draws per banked action in the softmax backup."""
    critic: Literal["mlp", "trunk"] = "mlp"
    """The paper's MLP, or features of (x, a) with a small flow head."""
    head_width: Count = 64
    """Units per hidden layer of the trunk critic's head."""
    head_depth: Count = 3
    """Hidden layers of the trunk critic's head."""
    discount: Annotated[float, within(0, 1, brackets="[)")] = 0.99
    """Discount per environment step (ours)."""
    return_axis: AxisKind | None = None
    """The axis that the law is learned on: the data's quantiles, an affine one of their standard deviation, or the one
    of the possible returns (ours); quantiles by default, std for targets that need an affine axis."""
    clip_margin: float = 0.1
    """How far beyond the possible returns bootstrapped ones may go, as a fraction of the return range (ours)."""
    flow_steps: Count = 5
    """Steps of all flows: the target's, whose error the bootstrap multiplies by 1 / (1 - discount^horizon), the next
    actions', and at evaluation (ours)."""
    solver: Solver = "midpoint"
    """Their solver: midpoint takes two evaluations a step, euler one (ours)."""
    tau: Annotated[float, within(0, 1, brackets="(]")] = 0.005
    """Polyak rate of the target network (ours)."""

    # --- evaluation ---
    eval_every: Annotated[int, not_negative, multiple_of("chunk")] = 100_000
    """Gradient steps between evaluations; one always ends the run, 0 leaves out the others."""
    eval_episodes: Annotated[int, not_negative] = 50
    """Episodes per task and seed (OGBench: 50); 0 skips evaluation."""
    num_actions: Count = 32
    """N_pi at evaluation (32: the paper's)."""
    num_returns: Count = 16
    """N at evaluation (ours)."""
    return_temperature: Annotated[float, not_negative] = 0.3
    """tau_R, in the softmax backup and at evaluation, in standard deviations of the data's returns (ours)."""
    action_temperature: Annotated[float, not_negative] = 1.0
    """tau_Q at evaluation, in standard deviations of Q* among the candidates (ours); 0 takes the best candidate."""

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
        if self.return_axis == "quantiles" and self.td_target not in SAMPLING_TARGETS:
            yield f"--td-target {self.td_target} needs an affine axis: leave out --return-axis quantiles."

    @property
    def ode(self) -> Ode:
        return Ode(self.flow_steps, self.solver)

    @property
    def axis_kind(self) -> AxisKind:
        return self.return_axis or ("quantiles" if self.td_target in SAMPLING_TARGETS else "std")

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
        return names if self.next_action == "softmax" else (*names, "return_temperature")

    @property
    def own_policy(self) -> bool:
        """Whether a policy is trained with the reward model, in the place of stage 1's; some baselines do."""
        return False


class ValueData(NamedTuple):
    """The dataset as it lies on the device. A transition i starts at row `starts[i]` and ends `horizon` rows later."""

    observations: Float[Array, "rows observation"]  # standardised
    actions: Float[Array, "rows action"]
    starts: Int[Array, " n"]
    rewards: Float[Array, "tasks n"]  # environment units
    bootstraps: Float[Array, "tasks n"]  # discount^horizon * masks
    bank: Float16[Array, "policies n K chunk"]  # next actions of each base policy; K = 0 for the data's own
    count: Int[Array, ""]  # how many of the n transitions count; see `evor_bc.BCData`


class Replica(NamedTuple):
    """What distinguishes one replica from another; with replicas, each leaf has a leading axis."""

    task: Int[Array, ""]  # index into rewards and bootstraps
    policy: Int[Array, ""]  # index into the base policies and the bank
    axis: ReturnAxis
    key: PRNGKeyArray


class TrainState(NamedTuple):
    """Arrays only; with replicas, each leaf has a leading axis."""

    critic: Critic
    target: Critic
    opt_state: optax.OptState
    step: Int[Array, ""]


class Noise(NamedTuple):
    """What a TD target draws at random."""

    z_0: Float[Array, " batch"]  # N(0, 1): start of the path
    z_next: Float[Array, " batch"]  # N(0, 1): start of the bootstrap where it is not shared
    t: Float[Array, " batch"]  # U[0, 1)
    u: Float[Array, " batch"]  # uniform: where the `paper` target's path goes


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
    margin: float = 0.0,
) -> tuple[Float[Array, " batch"], Float[Array, " batch"]]:
    """Path point `z_t` and regression target, the table at the top of the file; both on the return axis.

    Args:
        reward, bootstrap: `r` and `g = discount^horizon * mask` of `R = r + g R'`, in the environment's units.
        next_velocity: `(z, t) -> s_bar(z, t | x', a')`, of the target network.
        next_flow: `(z_0, t) -> psi_bar_t(z_0 | x', a')`, of the target network.
        axis: the map h. With `paper` and `velocity` it has to be affine.
        margin: how far beyond the possible returns bootstrapped ones may go, as a fraction of their range. A velocity
            on the way from z_0 to a return in [low, high] is clipped to [low - z_0, high - z_0].

    No gradient flows into either result.
    """
    r, g, z_0, t = reward, bootstrap, noise.z_0, noise.t
    low, high = axis.bounds(margin)
    if kind in SAMPLING_TARGETS:
        next_z = next_flow(z_0 if kind == "shared-noise" else noise.z_next, 1.0)
        y = axis.to_model(r + g * jnp.clip(axis.to_environment(next_z), low, high))
        z_t, target = (1.0 - t) * z_0 + t * y, y - z_0
    else:
        # With an affine h, f(z) = f(0) + g z: from here on r is f(0).
        r = axis.to_model(r + g * axis.to_environment(jnp.zeros_like(r)))
        low, high = axis.to_model(low), axis.to_model(high)
        if kind == "paper":
            z_t = z_0 + t * noise.u
            target = r + g * jnp.clip(next_velocity(z_t, t), low, high)
        elif kind == "velocity":
            next_z_t = jnp.clip(next_flow(z_0, t), (1.0 - t) * z_0 + t * low, (1.0 - t) * z_0 + t * high)
            z_t = t * r + g * next_z_t + (1.0 - t) * (1.0 - g) * z_0
            target = r + g * jnp.clip(next_velocity(next_z_t, t), low - z_0, high - z_0) - (1.0 - g) * z_0
        else:
            raise ValueError(f"unknown TD target {kind!r}.")
    return jax.lax.stop_gradient(z_t), jax.lax.stop_gradient(target)


def value_loss_one(
    critic: FlowCritic,
    observation: Float[Array, " observation"],
    action: Float[Array, " action"],
    z_t: Float[Array, ""],
    t: Float[Array, ""],
    target: Float[Array, ""],
) -> Float[Array, ""]:
    """Flow-matching loss of one example: `(s_theta(z_t, t | x, a) - target)^2`."""
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
    """The softmax backup: stage 3's extraction over the K banked actions, by the online critic."""
    score = functools.partial(evor_infer.score_one, temperature=return_temperature * axis.spread, ode=ode)
    scores = jax.vmap(score, (None, None, None, 0, None))(critic, axis, observation, candidates, noise)
    return candidates[evor_infer.select(evor_infer.standardise(scores), action_temperature, key=key)]


# --- Training ----------------------------------------------------------------------------------------------------


def make_optimizer(args: Args) -> optax.GradientTransformation:
    return optax.adam(learning_rate(args.learning_rate, args.schedule, args.steps))


def draw_noise(batch_size: int, axis: ReturnAxis, *, key: PRNGKeyArray) -> Noise:
    """Fresh noise for one batch.

    The pairs (t, z_0) are a lattice with a random shift, z_0 taken through the inverse normal distribution. Each pair
    is distributed as if drawn alone, and together they lie evenly, so that the gradient is less noisy. (The additive
    recurrence with the powers of 1 / 1.3247, the root of x^3 = x + 1, and a Cranley-Patterson rotation.)
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
    dataset: ValueData,
    replica: Replica,
    index: Int[Array, " batch"],
    *,
    key: PRNGKeyArray,
) -> Float[Array, "batch action"]:
    """The `a'` of the transitions `index`, according to `args.next_action`."""
    ends = dataset.starts[index] + args.horizon
    if args.next_action == "dataset":
        return evor_bc.action_chunks(dataset.actions, ends, args.horizon)
    if args.next_action == "base":
        pick = jax.random.randint(key, index.shape, 0, args.num_next_actions)
        return dataset.bank[replica.policy, index, pick].astype(jnp.float32)
    choose = functools.partial(
        choose_next_action,
        return_temperature=args.return_temperature,
        action_temperature=args.backup_temperature,
        ode=args.ode,
    )
    candidates = dataset.bank[replica.policy, index].astype(jnp.float32)
    keys = jax.random.split(key, len(index))
    noise = stratified_normal(args.backup_returns)

    def one(observation, actions, key):
        return choose(critic, replica.axis, observation, actions, noise, key=key)

    rows = args.num_next_actions * args.backup_returns
    return jax.lax.stop_gradient(in_blocks(one, dataset.observations[ends], candidates, keys, rows=rows))


def train_step(
    args: Args, state: TrainState, dataset: ValueData, replica: Replica
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """One gradient step of one replica. Keys are derived from the step, so a resumed run draws the same batches."""
    batch_key, noise_key, action_key = jax.random.split(jax.random.fold_in(replica.key, state.step), 3)
    index = jax.random.randint(batch_key, (args.batch_size,), 0, dataset.count)
    starts = dataset.starts[index]
    observations, next_observations = dataset.observations[starts], dataset.observations[starts + args.horizon]
    actions = evor_bc.action_chunks(dataset.actions, starts, args.horizon)
    reward, bootstrap = dataset.rewards[replica.task, index], dataset.bootstraps[replica.task, index]

    # The bootstrap: everything below the next state comes from the target network.
    target_critic = state.target
    chosen = next_actions(args, state.critic, dataset, replica, index, key=action_key)
    next_features = jax.vmap(target_critic.features)(next_observations, chosen)

    def next_velocity(z, t):
        return jax.vmap(target_critic.velocity)(next_features, z, jnp.broadcast_to(t, z.shape))

    def next_flow(z_0, end_time):
        return integrate(next_velocity, z_0, args.ode, end_time=end_time)

    noise = draw_noise(args.batch_size, replica.axis, key=noise_key)
    # Most returns of a sparse task lie at the lowest bound. Clipping right there cuts the errors below it and keeps
    # those above, a bias that the bootstrap multiplies by 1 / (1 - discount): leave a margin.
    z_t, target = td_target(
        args.td_target, reward, bootstrap, noise, next_velocity, next_flow, replica.axis, margin=args.clip_margin
    )

    def loss_fn(critic):
        losses = jax.vmap(value_loss_one, (None, 0, 0, 0, 0, 0))(critic, observations, actions, z_t, noise.t, target)
        return jnp.mean(losses)

    loss, gradient = jax.value_and_grad(loss_fn)(state.critic)
    updates, opt_state = make_optimizer(args).update(gradient, state.opt_state)
    critic = optax.apply_updates(state.critic, updates)
    # Polyak average of the *updated* online parameters: the target lags by tau alone, not by one step more.
    target_critic = optax.incremental_update(critic, state.target, args.tau)
    # The end of a straight path from z_t along the target is a draw of the bootstrapped return.
    drawn = target if args.td_target == "paper" else z_t + (1.0 - noise.t) * target
    metrics = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(gradient),
        "target_return": jnp.mean(replica.axis.to_environment(drawn)),
    }
    return TrainState(critic, target_critic, opt_state, state.step + 1), metrics


train_chunk = chunked(train_step)


def init_state(args: Args, header: dict[str, Any], *, key: PRNGKeyArray) -> TrainState:
    """A fresh training state of one replica; the target network starts as a copy of the online one."""
    critic = make_critic(header, key=key)
    target = jax.tree.map(jnp.copy, critic)
    return TrainState(critic, target, make_optimizer(args).init(critic), jnp.zeros((), jnp.int32))


# --- Reports -----------------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """Predicted reward-to-go of one replica against Monte-Carlo returns of validation states."""

    replica: tuple[int, int]
    draws: Float[np.ndarray, "states draws"]
    returns: Float[np.ndarray, " states"]
    numbers: dict[str, float]


LEVELS = np.linspace(0.1, 0.9, 9)  # of the quantiles that returns are compared with


def calibrate(
    args: Args,
    agents: evor_infer.AgentParams,
    replicas: Sequence[tuple[int, int]],
    validation: data.Trajectories,
    tasks: Sequence[int],
) -> list[Calibration]:
    """Compares each replica's predictions with what was observed; nothing if no episode has a complete return.

    The returns are those of the policy that made the data, which `--next-action base` and `dataset` model; with
    `softmax` the predictions should be higher.
    """
    rows = data.rows_with_complete_returns(validation.terminals, discount=args.discount, horizon=args.horizon)
    if len(rows) == 0:
        return []
    observations = jnp.asarray(validation.observations[rows])
    actions = evor_bc.action_chunks(jnp.asarray(validation.actions), jnp.asarray(rows), args.horizon)
    found = []
    for i, (task, seed) in enumerate(replicas):
        agent = evor_infer.Agent(jax.tree.map(lambda x, i=i: x[i], agents), args.horizon)
        draws = agent.sample_returns(
            observations, actions, 64, flow_steps=args.flow_steps, solver=args.solver, key=jax.random.key(0)
        )
        rewards, masks = (labels[list(tasks).index(task)] for labels in (validation.rewards, validation.masks))
        returns, _ = data.monte_carlo_returns(rewards, masks, validation.terminals, discount=args.discount)
        numbers = calibration(np.asarray(draws), returns[rows], LEVELS)
        found.append(Calibration((task, seed), np.asarray(draws), returns[rows], numbers))
    return found


def report_calibration(found: Sequence[Calibration], directory: Path) -> None:
    """Prints, writes and draws it."""
    if not found:
        print("calibration skipped: no validation episode is long enough for a complete return.")
        return
    for (task, seed), _, returns, numbers in found:
        print(
            f"calibration, task {task}, seed {seed}: mean {numbers['mean_predicted']:.2f} predicted, "
            f"{numbers['mean_observed']:.2f} observed; correlation {numbers['correlation']:.2f}; "
            f"crps {numbers['crps']:.2f} ({len(returns)} validation states)"
        )
    rows = [
        dict(task=task, seed=seed, metric=metric, value=value)
        for (task, seed), _, _, numbers in found
        for metric, value in numbers.items()
    ]
    write_csv(directory / "calibration.csv", ("task", "seed", "metric", "value"), rows)
    panels = [(f"task {task}, seed {seed}", *rest) for (task, seed), *rest in found]
    figures.calibration(panels, LEVELS, directory / "calibration.png")


def last_screen(
    args: Args,
    name: str,
    info: dict[str, Any],
    episodes: list[dict[str, Any]],
    directory: Path,
    policy_run_dir: Path,
    diverged: Sequence[tuple[int, int]],
) -> None:
    """What was trained on what, how well it does, and where everything is."""
    summary = evor_infer.summarise(episodes, ("task", "num_actions"))
    by_seed = evor_infer.summarise(episodes, ("task", "num_actions", "seed"))
    line = "-" * 100
    print(f"\n{line}\n{args.method} on {name}: {info['name']} (source: {info['source']}, sha256 {info['sha256'][:12]})")
    print(
        f"reward model: next action {args.next_action}, critic {args.critic}, "
        f"horizon {args.horizon}, {args.steps:,} steps, seeds {list(args.all_seeds)}"
    )
    if args.quick:
        print("--quick is a smoke run: these numbers say that everything runs, not how good the method is.")
    if diverged:
        print(f"diverged and left out, (task, seed): {', '.join(map(str, diverged))}")
    if not summary:
        print("not evaluated.")
    for row in summary:
        what = "base policy alone" if row["num_actions"] == 1 else f"best of {row['num_actions']}"
        print(
            f"  task {row['task']}  {what:<20} success {row['success']:6.1%}  "
            f"95% interval over episodes [{row['low']:.1%}, {row['high']:.1%}]  ({row['episodes']} episodes)"
        )
        for seed in by_seed:
            if args.seeds > 1 and (seed["task"], seed["num_actions"]) == (row["task"], row["num_actions"]):
                print(f"      seed {seed['seed']}: {seed['success']:6.1%}")
    if not args.own_policy:
        print(f"base policy:  {policy_run_dir / 'bc' / 'model.eqx'}")
    print(f"reward model: {directory / 'model.eqx'}")
    if summary:
        where = f"--run-dir {directory.parent}"
        if not args.own_policy and policy_run_dir != directory.parent:
            where += f" --policy-run-dir {policy_run_dir}"
        print(f"a sweep:      python evor_infer.py --env {name} {where} --num-actions 1 4 16 64")
    for file in sorted(directory.glob("*.csv")) + sorted(directory.glob("*.png")):
        print(f"              {file}")
    print(line)


def choose_tasks(args: Args, path: Path, own_rewards: bool) -> tuple[int, ...]:
    """The tasks to train: those asked for, the environment's default, or 0 for a file's own rewards."""
    if own_rewards:
        if args.tasks:
            raise UserError(f"{path} brings its own rewards: leave out --tasks.")
        return (0,)
    if args.tasks:
        return args.tasks
    try:
        return (parse_env(args.env).default_task,)
    except UserError:
        raise UserError(
            f"{path} brings no rewards, and {args.env!r} is no OGBench environment to compute them with: "
            f"add an array rewards."
        ) from None


def bc_args(args: Args, policy_run_dir: Path) -> evor_bc.Args:
    """The arguments with which a missing base policy is trained: this command's preset, data, seeds and horizon."""
    preset = "quick" if args.quick else "preview" if args.preview else None
    changes = dict(evor_bc.PRESETS[preset], **{preset: True}) if preset else {}
    chunk = changes.get("chunk", evor_bc.Args.chunk)
    return evor_bc.Args(
        **changes
        | dict(
            env=args.env,
            seeds=len(args.policy_seeds),
            first_seed=args.policy_seeds[0],
            run_dir=policy_run_dir,
            dataset=args.dataset,
            episodes=args.episodes,
            file_steps=math.ceil(args.file_steps / chunk) * chunk,
            horizon=args.horizon,
            ignore_observations=args.ignore_observations,
            track=args.track,
            distributed=args.distributed,
        )
    )


def load_base_policy(
    args: Args, policy_run_dir: Path, *, env: str, data_sha256: str, **dims: int
) -> tuple[FlowPolicy, Standardizer, str]:
    """The base policies of `args.policy_seeds` (leading axis), the standardizer, and the sha256 of their file.

    Where none stand in this run's own directory they are trained; a training that was interrupted is continued.

    Raises:
        UserError: what stands there was trained for something else, or not for these seeds.
    """
    path = policy_run_dir / "bc" / "model.eqx"
    missing = not path.is_file()
    if missing and args.policy_run_dir is not None:
        raise UserError(f"there is no base policy at {path}: train it with evor_bc.py, or leave out --policy-run-dir.")
    if not missing:
        header = checkpoint.read_header(path, stage="bc", remedy="")
        missing = header["step"] < header["args"]["steps"]
        if missing and args.policy_run_dir is not None:
            raise UserError(f"the base policy at {path} is not trained to its end: finish it with evor_bc.py --resume.")
    if missing:
        resume = any((path.parent / name).is_file() for name in STATES)
        print(f"{'unfinished' if resume else 'no'} base policy at {path}: training it first.", flush=True)
        evor_bc.main(dataclasses.replace(bc_args(args, policy_run_dir), resume=resume))
    header, (policies, standardizer) = evor_infer.load_policy(policy_run_dir)
    checkpoint.require(header, path, env=env, horizon=args.horizon, **dims)
    print(
        f"base policy: {path}, {header['step']:,} steps, {header['depth']} x {header['width']}, "
        f"trained on {header['data']['name']} (sha256 {header['data']['sha256'][:12]})"
    )
    if header["data"]["sha256"] != data_sha256 and args.policy_run_dir is None:
        raise UserError(
            f"the base policy at {path} was trained on other data, {header['data']['name']}: pass another --run-dir, "
            f"or --policy-run-dir {policy_run_dir} if that is meant."
        )
    ignored = header["args"].get("ignore_observations", [])
    if args.ignore_observations and sorted(args.ignore_observations) != sorted(ignored):
        raise UserError(
            f"--ignore-observations {list(args.ignore_observations)}: the base policy at {path} ignores {ignored}: "
            f"train it anew, or leave the flag out."
        )
    lost = {seed for _, seed in header.get("diverged", ())} & set(args.policy_seeds)
    if lost:
        raise UserError(f"the base policy of seed {min(lost)} at {path} diverged: use another, with --policy-seed.")
    unknown = set(args.policy_seeds) - set(header["seeds"])
    if unknown:
        raise UserError(
            f"{path} has no seed {min(unknown)}: train it with evor_bc.py --first-seed {args.policy_seeds[0]} --seeds "
            f"{len(args.policy_seeds)} --overwrite, or use its seeds, {header['seeds']}, or one with --policy-seed."
        )
    index = np.array([header["seeds"].index(seed) for seed in args.policy_seeds])
    return jax.tree.map(lambda x: jnp.asarray(x)[index], policies), standardizer, sha256(path)


def transitions(
    args: Args, trajectories: data.Trajectories, file: Path
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "tasks n"], Float[np.ndarray, "tasks n"]]:
    """Starts, rewards and bootstrap factors of a file's transitions."""
    extra = args.horizon - 1 if args.next_action == "dataset" else 0  # the next chunk has to be in the data too
    starts = data.transition_starts(trajectories.terminals, args.horizon, extra=extra, where=file.name)
    rewards, bootstraps = data.chunk_rewards(
        trajectories.rewards, trajectories.masks, starts, horizon=args.horizon, discount=args.discount
    )
    return starts, rewards, bootstraps


def make_replicas(
    args: Args,
    tasks: Sequence[int],
    bounds: Float[np.ndarray, "tasks 2"],
    returns: Float[np.ndarray, "tasks m"],
) -> tuple[list[tuple[int, int]], Replica, Key[Array, " replicas"]]:
    """The (task, seed) pairs, what distinguishes them, and the keys that initialise them."""
    pairs = [(task, seed) for task in tasks for seed in args.all_seeds]
    task = np.repeat(np.arange(len(tasks)), args.seeds)
    policy = np.tile(np.arange(args.seeds) if args.policy_seed is None else np.zeros(args.seeds, int), len(tasks))
    axes = [make_axis(*of_task, kind=args.axis_kind) for of_task in zip(returns, bounds, strict=True)]
    axis = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(axes[i] for i in task))
    # A replica's randomness depends on its task and seed, not on what is trained beside it.
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(s), t)) for t, s in pairs]
    init_keys, train_keys = jnp.stack([k[0] for k in keys]), jnp.stack([k[1] for k in keys])
    return pairs, Replica(jnp.asarray(task), jnp.asarray(policy), axis, train_keys), init_keys


def main(args: Args, *, baseline: ModuleType | None = None) -> list[dict[str, Any]]:
    """Data, base policy, reward models, evaluation, report; returns the summary of the last evaluation.

    Args:
        baseline: brings its own `init_state` and `train_chunk`, the way in which a reward model starts and learns.
            With `args.own_policy`, its state has a `policy`, and stage 1 is not needed.
    """
    init, train = (baseline.init_state, baseline.train_chunk) if baseline else (init_state, train_chunk)
    args = dataclasses.replace(args, save_every=min(args.save_every, args.steps))
    check(args)
    if args.distributed:
        join_hosts()
    name = run_name(args.env, args.dataset)
    run_dir = args.run_dir or default_run_dir(name, quick=args.quick)
    policy_run_dir = args.policy_run_dir or run_dir
    if args.resume:
        found = any((run_dir / "value" / name).is_file() for name in STATES)
        if found:
            state_to_resume(run_dir / "value", "value")  # complete, or it is said before the data are loaded

    # Data.
    path, source = first_host_first(lambda: sources.find_files(args.env, args.dataset, episodes=args.episodes))
    info = sources.describe(path, source)
    files = sources.data_files(path)
    own_rewards = args.dataset is not None and data.has_rewards(files[0])
    tasks = choose_tasks(args, files[0], own_rewards)
    load_file = functools.partial(data.load_trajectories, env=args.env, tasks=tasks, reward=args.reward)
    trajectories = load_file(files[0])
    held_out = validation_path(files[0])
    validation = load_file(held_out) if held_out.is_file() else None
    data.print_summary(trajectories, info, tasks=tasks, discount=args.discount, files=len(files))
    longest = max(data.check_headers(file, like=trajectories) for file in files)
    starts, _, _ = transitions(args, trajectories, files[0])
    in_transitions = trajectories.rewards[:, ~trajectories.terminals]
    span = data.reward_range(files, in_transitions, env=args.env, own=own_rewards, reward=args.reward)
    if len(files) > 1 and args.redraw_bank:
        raise UserError("--redraw-bank: each file of a folder has one bank: leave it out.")

    # Base policy and its next actions.
    dims = dict(observation_dim=trajectories.observations.shape[1], action_dim=trajectories.actions.shape[1])
    if args.own_policy:
        standardizer = Standardizer.of(trajectories.observations, ignore=args.ignore_observations)
        policies, policy_sha256 = None, ""
    else:
        policies, standardizer, policy_sha256 = load_base_policy(
            args, policy_run_dir, env=name, data_sha256=info["sha256"], **dims
        )
    header = dict(
        stage="value",
        env=name,
        **dims,
        horizon=args.horizon,
        critic=args.critic,
        **{field: getattr(args, field) for field in CRITIC_FIELDS},
        outputs=getattr(args, "outputs", 1),  # of a baseline's network
        return_axis=args.axis_kind,
        replicas=[(task, seed) for task in tasks for seed in args.all_seeds],
        data=info,
        policy_run_dir=policy_run_dir.resolve(),
        policy_sha256=policy_sha256,
        own_policy=args.own_policy,
        args=args,
    )
    run = Run(run_dir / "value", header, replicas=header["replicas"], args=args)
    bounds = data.return_bounds(span, args.discount)
    returns = data.return_sample(trajectories, discount=args.discount)
    pairs, replicas, init_keys = make_replicas(args, tasks, bounds, returns)

    def draw_bank(
        observations: Float[np.ndarray, "rows d"], starts: Int[np.ndarray, " n"], file: Path, draw: int = 0
    ) -> Float16[np.ndarray, "policies longest K chunk"]:
        """The next-action bank of a file; the first draw is kept beside the base policy."""
        many = len(files) > 1
        seeds = "-".join(map(str, args.policy_seeds))
        name = f"bank-{args.num_next_actions}-seeds-{seeds}" + f"-{file.stem}" * many
        if args.next_action == "dataset" or args.own_policy:
            return np.zeros((len(args.policy_seeds), longest, 0, dims["action_dim"] * args.horizon), np.float16)
        bank = make_bank(
            policies,
            jnp.asarray(observations),
            starts + args.horizon,
            seeds=args.policy_seeds,
            num_actions=args.num_next_actions,
            ode=args.ode,
            draw=draw,
            path=None if draw else policy_run_dir / "bc" / f"{name}.eqx",
            made_of=dict(
                policy_sha256=policy_sha256, data_sha256=sources.fingerprint(file) if many else info["sha256"]
            ),
        )
        return pad(bank, longest, axis=1)

    def load(file: Path) -> ValueData:
        """What training needs of one file, on the devices."""
        found = trajectories if file == files[0] else load_file(file)
        starts, rewards, bootstraps = transitions(args, found, file)
        observations = standardizer.rows(found.observations)
        dataset = ValueData(
            observations=pad(observations, longest),
            actions=pad(found.actions, longest),
            starts=pad(starts, longest),
            rewards=pad(rewards, longest, axis=1),
            bootstraps=pad(bootstraps, longest, axis=1),
            bank=draw_bank(observations, starts, file),
            count=np.asarray(len(starts)),
        )
        return copy_to_devices(jax.tree.map(jnp.asarray, dataset), len(pairs))

    # Training.
    state = run.restore(stack_replicas(lambda key: init(args, header, key=key), init_keys))
    rotation = Rotation(files, load, every=args.file_steps, steps=args.steps)
    rotation.at(int(np.max(state.step)))  # loads before the progress bar of training starts
    state, spread_replicas = spread((state, replicas), len(pairs))
    redrawn: tuple[int, Any] = (0, None)

    def next_chunk(state: Any, step: int) -> tuple[Any, dict]:
        """`train_chunk`, with another file or a new bank where one is due; which one depends on the step alone."""
        nonlocal redrawn
        dataset = rotation.at(step)
        draw = step // args.redraw_bank if args.redraw_bank else 0
        if draw != redrawn[0]:
            redrawn = draw, None  # frees the memory of the last one, but for the first draw
            bank = jnp.asarray(draw_bank(standardizer.rows(trajectories.observations), starts, files[0], draw))
            redrawn = draw, copy_to_devices(bank, len(pairs))
        if draw:
            dataset = dataset._replace(bank=redrawn[1])
        return train(args, state, dataset, spread_replicas)

    def agents(state: Any) -> evor_infer.AgentParams:
        """Agents of the replicas that have not diverged."""
        standardizers = jax.tree.map(lambda x: jnp.stack([x] * len(pairs)), standardizer)
        policy = state.policy if args.own_policy else jax.tree.map(lambda x: x[replicas.policy], policies)
        critic, policy = jax.tree.map(jnp.asarray, (state.critic, policy))
        found = evor_infer.AgentParams(policy, critic, standardizers, replicas.axis)
        return jax.tree.map(lambda x: x[run.good()], found) if run.diverged else found

    def good_pairs() -> list[tuple[int, int]]:
        return [pairs[i] for i in run.good()]

    def model(state: Any) -> tuple:
        """What stage 3 loads."""
        return (state.critic, replicas.axis, *((state.policy, standardizer) if args.own_policy else ()))

    settings = evor_infer.Extraction(
        args.num_actions,
        args.num_returns,
        args.return_temperature,
        args.action_temperature,
        args.flow_steps,
        args.solver,
    )
    evaluation_path = run.directory / "evaluation.csv"
    rows: list[dict[str, Any]] = []
    if run.resume_path is not None and evaluation_path.is_file():
        # One at the step that the run goes on from is done anew; earlier ones with other settings would mix with it.
        done, own = int(np.max(state.step)), dataclasses.asdict(settings)
        rows = [row for row in evor_infer.read_episodes(evaluation_path) if row["step"] < done]
        rows = [row for row in rows if all(row[name] == value for name, value in own.items())]

    def check_calibration(step: int, state: Any) -> list[Calibration]:
        found = calibrate(args, agents(state), good_pairs(), validation, tasks)
        if found:
            run.metrics.log(step, good_pairs(), {name: [one.numbers[name] for one in found] for name in CALIBRATED})
        return found

    def evaluate(step: int, state: Any) -> list[dict[str, Any]]:
        """Evaluates the extracted policy and, at the end, the base policy alone on the same episodes."""
        with_base = step == args.steps and args.num_actions > 1
        sweep = [dataclasses.replace(settings, num_actions=1)] * with_base + [settings]
        gym_ids = [parse_env(args.env).gym_id(task) for task, _ in good_pairs()]
        found = []
        with Episodes(gym_ids, num_episodes=args.eval_episodes, horizon=args.horizon) as episodes:
            for extraction in sweep:
                found += evor_infer.evaluate(
                    agents(state), episodes, extraction, replicas=good_pairs(), horizon=args.horizon, seed=0
                )
        rows.extend(dict(env=name, data_source=source, step=step) | row for row in found)
        write_csv(evaluation_path, list(rows[0]), rows)
        extracted = [row for row in found if row["num_actions"] == args.num_actions]
        success = [row["success"] for row in evor_infer.summarise(extracted, ("task", "seed"))]
        run.metrics.log(step, good_pairs(), {"success": success})
        return found

    evaluated = args.eval_episodes > 0 and not own_rewards

    def assess(step: int, state: Any) -> None:
        if validation is not None:
            check_calibration(step, state)
        if evaluated:
            evaluate(step, state)

    assessed = evaluated or validation is not None
    run.train(state, next_chunk, model=model, evaluate=assess if assessed else None, evaluate_every=args.eval_every)

    # Report.
    if jax.process_index() > 0:
        return []
    if validation is not None:
        report_calibration(check_calibration(args.steps, run.state), run.directory)
    found: list[dict[str, Any]] = evaluate(args.steps, run.state) if evaluated else []
    figures.training(run.directory / "metrics.csv", run.directory / "training.png", title=f"{name}: {args.method}")
    summary = evor_infer.summarise(found, ("task", "num_actions"))
    if evaluated:
        figures.success(summary, run.directory / "evaluation.png", title=f"{args.method}, {name} ({source} data)")
    elif own_rewards:
        print("evaluation skipped: the dataset brings its own rewards, so there is no environment to evaluate in.")
    last_screen(args, name, info, found, run.directory, policy_run_dir, run.diverged)
    return summary


if __name__ == "__main__":
    run_cli(main, Args, PRESETS)
