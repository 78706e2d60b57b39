"""Stage 3 of EVOR: the policy, extracted at inference time. Nothing is trained here.

    python evor_infer.py --env cube-double-play --num-actions 1 4 16 64

Given the base policy (stage 1) and the reward-to-go law (stage 2), in an observation x:

    a^(1..N_pi) ~ pi_base(. | x)                                    candidates
    r^(i,1..N)  ~ R_theta(. | x, a^(i))                             draws of the reward-to-go
    Q*(x, a^(i)) = T log( (1/N) sum_j exp(r^(i,j) / T) )            log-mean-exp, T = tau_R sigma_R
    a ~ softmax_i( Q*(x, a^(i)) / (tau_Q sigma_Q) )                 tau_Q = 0: the best candidate

| symbol | here                 | symbol  | here                 |
|--------|----------------------|---------|----------------------|
| N_pi   | `num_actions`        | tau_R   | `return_temperature` |
| N      | `num_returns`        | tau_Q   | `action_temperature` |

sigma_R is the standard deviation of the data's returns, over all its states, and sigma_Q that of Q* among the
candidates of this observation. So temperatures are relative, and one number means the same in every environment. With
`--absolute` both sigma are 1, as in the paper: temperatures are in the environment's units. `num_actions = 1` is the
base policy.

Lists on the command line are a sweep: every combination is evaluated on the same episodes, without retraining.
Reads `runs/ENV/{bc,value}/model.eqx`; writes `runs/ENV/infer/{config.json, episodes.csv,
summary.csv, sweep.png}`.

Differences from the paper: (1) log-*mean*-exp instead of log-sum-exp: the same softmax at equal N, and comparable
across N. (2) All candidates share their return noise z_0, stratified normal quantiles by default: independent draws
would rank candidates by luck. Source: EVOR, arXiv 2510.08218, stage 3 and equation 22. *Ours*, since the paper does
not disclose them: N, both temperatures, flow steps.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from gymnasium import Env
from jaxtyping import Array, ArrayLike, Float, Int, Key, PRNGKeyArray

from common import checkpoint, figures, film
from common.args import Count, at_least, check, each, not_negative
from common.envs import check_env, default_run_dir, parse_env, run_name
from common.errors import UserError, run_cli
from common.evaluation import Episodes, episode_seed
from common.flow import Ode, Solver
from common.metrics import git_revision, hold_directory, package_versions, read_csv, sha256, write_csv, write_json
from common.networks import Critic, FlowPolicy, make_critic, make_policy, stratified_normal
from common.returns import ReturnAxis, make_axis
from common.statistics import success_interval
from common.training import Standardizer, hardware, in_blocks, over_replicas

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(num_actions=(1, 4), num_returns=(4,), eval_episodes=4),
    "preview": dict(num_actions=(1, 4, 16, 32), num_returns=(8,)),
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Stage 3: evaluate the extracted policy; lists are a sweep."""

    # --- experiment ---
    env: str = "cube-double-play"
    """OGBench dataset: a short name or a full id."""
    tasks: tuple[int, ...] = ()
    """Tasks to evaluate; all that stage 2 trained by default."""
    seeds: Annotated[int | None, at_least(1)] = None
    """Number of seeds to evaluate; all that stage 2 trained by default."""
    first_seed: int = 0
    """The first of them, with --seeds."""
    run_dir: Path | None = None
    """The run directory of stage 2; runs/ENV (runs/ENV-quick) by default."""
    policy_run_dir: Path | None = None
    """The run directory of stage 1; that of stage 2 by default."""
    quick: bool = False
    """Preset: a handful of episodes."""
    preview: bool = False
    """Preset: a short sweep over the number of actions."""

    # --- extraction ---
    num_actions: Annotated[tuple[int, ...], each(at_least(1))] = (32,)
    """N_pi: candidates from the base policy (32: the paper's)."""
    num_returns: Annotated[tuple[int, ...], each(at_least(1))] = (16,)
    """N: draws of the reward-to-go per candidate (ours)."""
    return_temperature: Annotated[tuple[float, ...], each(not_negative)] = (0.3,)
    """tau_R, in standard deviations of the data's returns (ours); inf scores by the mean, 0 by the largest draw."""
    action_temperature: Annotated[tuple[float, ...], each(not_negative)] = (1.0,)
    """tau_Q, in standard deviations of Q* among the candidates (ours); 0 takes the best candidate, inf any."""
    absolute: bool = False
    """Temperatures in the environment's units, as in the paper."""
    flow_steps: Count = 5
    """Steps of both flows (ours)."""
    solver: Solver = "midpoint"
    """Their solver; midpoint takes two evaluations a step, euler one."""
    independent_noise: bool = False
    """Draw the return noise at random, still shared by all candidates, instead of normal quantiles."""

    # --- evaluation ---
    eval_episodes: Count = 50
    """Episodes per task and seed (OGBench: 50)."""
    eval_seed: int = 0
    """Seed of the initial states."""
    action_noise: Annotated[tuple[float, ...], each(not_negative)] = (0.0,)
    """Standard deviation of Gaussian noise in the executed actions, which are in [-1, 1]: stochastic transitions."""
    workers: Annotated[int | None, at_least(1)] = None
    """Processes that step environments; all cores by default."""
    video: Path | None = None
    """Also film an episode of the first task and seed, from the first initial state of the evaluation, with the last
    settings of the sweep: a .gif, or .mp4 with ffmpeg."""
    out: str = "infer"
    """Folder of the run directory to write to; another name keeps an earlier sweep."""


class AgentParams(NamedTuple):
    """All arrays of an agent; with replicas, each leaf has a leading axis."""

    policy: FlowPolicy
    critic: Critic
    standardizer: Standardizer
    axis: ReturnAxis


class Extraction(eqx.Module):
    """How an action is extracted. Temperatures are traced by `jit`: sweeping them compiles nothing anew. The numbers of
    draws and steps set array shapes and are static."""

    num_actions: int = eqx.field(static=True, default=32)
    num_returns: int = eqx.field(static=True, default=16)
    return_temperature: float = 0.3
    action_temperature: float = 1.0
    flow_steps: int = eqx.field(static=True, default=5)
    solver: Solver = eqx.field(static=True, default="midpoint")
    independent_noise: bool = eqx.field(static=True, default=False)
    absolute: bool = eqx.field(static=True, default=False)

    @property
    def ode(self) -> Ode:
        return Ode(self.flow_steps, self.solver)


# --- Maths -------------------------------------------------------------------------------------------------------


def log_mean_exp(
    returns: Float[Array, "*batch num"],
    temperature: Float[ArrayLike, ""],
    weights: Float[Array, "*batch num"] | None = None,
) -> Float[Array, "*batch"]:
    """`tau log( (1/N) sum_j exp(r_j / tau) )` over the last axis; tau = inf is the mean, tau = 0 the maximum.

    With `weights`, the probabilities of the returns: `tau log( sum_j w_j exp(r_j / tau) )`, the same of a law that is
    known. (At tau = 0 the largest value then counts, however improbable.)

    Written as `max + tau log1p(mean(expm1((r - max) / tau)))`, which neither overflows at a small tau nor loses its
    digits at a large one. Increasing in every return, decreasing in tau, between mean and maximum.
    """
    largest = jnp.max(returns, axis=-1)
    limit = (temperature == 0) | jnp.isinf(temperature)
    finite = jnp.where(limit, 1.0, temperature)

    def mean(x):
        return jnp.mean(x, axis=-1) if weights is None else jnp.sum(weights * x, axis=-1)

    excess = mean(jnp.expm1((returns - largest[..., None]) / finite))
    soft = largest + finite * jnp.log1p(excess)
    return jnp.where(limit, jnp.where(temperature == 0, largest, mean(returns)), soft)


def return_noise(settings: Extraction, *, key: PRNGKeyArray) -> Float[Array, " num_returns"]:
    """The `z_0` of the return draws: one set for all candidates."""
    if settings.independent_noise:
        return jax.random.normal(key, (settings.num_returns,))
    return stratified_normal(settings.num_returns)


def return_temperature(axis: ReturnAxis, settings: Extraction) -> Float[Array, "*replicas"]:
    """tau_R in the environment's units."""
    return settings.return_temperature * (jnp.ones_like(axis.spread) if settings.absolute else axis.spread)


def score_one(
    critic: Critic,
    axis: ReturnAxis,
    observation: Float[Array, " observation"],
    action: Float[Array, " action"],
    noise: Float[Array, " num_returns"],
    *,
    temperature: Float[ArrayLike, ""],
    ode: Ode,
) -> Float[Array, ""]:
    """`Q*(x, a)` from the returns that the flow makes of `noise`; it and `temperature` in the environment's units.
    Exact for critics that say the law at once."""
    returns, weights = critic.law(observation, action, noise, ode)
    return log_mean_exp(axis.to_environment(returns), temperature, weights)


def standardise(scores: Float[Array, " num_actions"]) -> Float[Array, " num_actions"]:
    """Scores in units of their own standard deviation, or of what single precision rounds off where that is more."""
    info = jnp.finfo(scores.dtype)
    rounding = jnp.maximum(info.eps * jnp.max(jnp.abs(scores)), info.tiny)
    return (scores - jnp.mean(scores)) / jnp.maximum(jnp.std(scores), rounding)


def select(
    scores: Float[Array, " num_actions"], temperature: Float[ArrayLike, ""], *, key: PRNGKeyArray
) -> Int[Array, ""]:
    """An index with probability `softmax(scores / temperature)`; temperature 0: the largest score, inf: uniform."""
    drawn = jax.random.categorical(key, scores / jnp.where(temperature == 0, 1.0, temperature))
    return jnp.where(temperature == 0, jnp.argmax(scores), drawn)


def act_one(
    agent: AgentParams, observation: Float[Array, " observation"], settings: Extraction, *, key: PRNGKeyArray
) -> Float[Array, " action"]:
    """The extracted action (chunk) in one observation, the equations at the top of this file."""
    candidate_key, noise_key, select_key = jax.random.split(key, 3)
    observation = agent.standardizer(observation)
    noise = jax.random.normal(candidate_key, (settings.num_actions, agent.policy.action_dim))
    candidates = agent.policy.sample(observation, noise, settings.ode)
    if settings.num_actions == 1:
        return candidates[0]
    score = functools.partial(score_one, temperature=return_temperature(agent.axis, settings), ode=settings.ode)
    returns_noise = return_noise(settings, key=noise_key)
    scores = jax.vmap(score, (None, None, None, 0, None))(
        agent.critic, agent.axis, observation, candidates, returns_noise
    )
    scores = scores if settings.absolute else standardise(scores)
    return candidates[select(scores, settings.action_temperature, key=select_key)]


@jax.jit
def act_replicas(
    agents: AgentParams,
    observations: Float[Array, "replicas n observation"],
    episodes: Int[Array, "replicas n"],
    steps: Int[Array, "replicas n"],
    settings: Extraction,
    *,
    keys: Key[Array, " replicas"],
) -> Float[Array, "replicas n action"]:
    """Actions of all replicas in all their environments. An action's randomness depends on the replica's key, the
    episode and the step alone, so results do not depend on how episodes are spread over environments."""

    def per_replica(agent, observations, episodes, steps, key):
        def one(observation, episode, step):
            return act_one(agent, observation, settings, key=jax.random.fold_in(jax.random.fold_in(key, episode), step))

        return in_blocks(one, observations, episodes, steps, rows=settings.num_actions * settings.num_returns)

    return over_replicas(per_replica, agents, observations, episodes, steps, keys)


# --- Loading -----------------------------------------------------------------------------------------------------


def load_policy(run_dir: Path) -> tuple[dict[str, Any], tuple[FlowPolicy, Standardizer]]:
    """Header and (policy, standardizer) of stage 1; the policy's leaves have a leading axis of seeds."""

    def build(header):
        keys = jax.random.split(jax.random.key(0), len(header["seeds"]))
        standardizer = Standardizer(jnp.zeros(header["observation_dim"]), jnp.ones(header["observation_dim"]))
        return jax.vmap(lambda key: make_policy(header, key=key))(keys), standardizer

    return checkpoint.load(run_dir / "bc" / "model.eqx", build, stage="bc", remedy="train it with evor_bc.py first.")


def load_critic(run_dir: Path) -> tuple[dict[str, Any], tuple]:
    """Header and (critic, return axis) of stage 2; the leaves have a leading axis of (task, seed) replicas. Where a
    policy was trained with the critic, as QC does it, (critic, return axis, policy, standardizer)."""

    def build(header):
        keys = jax.random.split(jax.random.key(0), len(header["replicas"]))
        axis = make_axis(np.zeros(1), np.zeros(2), kind=header["return_axis"])
        models = jax.vmap(lambda key: (make_critic(header, key=key), axis))(keys)
        if header.get("own_policy"):
            policy = jax.vmap(lambda key: make_policy(header, key=key))(keys)
            models += policy, Standardizer(jnp.zeros(header["observation_dim"]), jnp.ones(header["observation_dim"]))
        return models

    remedy = "train it with evor_value.py first."
    return checkpoint.load(run_dir / "value" / "model.eqx", build, stage="value", remedy=remedy)


def load_agents(
    run_dir: Path,
    *,
    tasks: Sequence[int] = (),
    seeds: Sequence[int] = (),
    policy_run_dir: Path | None = None,
) -> tuple[dict[str, Any], list[tuple[int, int]], AgentParams]:
    """Header of stage 2, the chosen (task, seed) pairs, and their agents stacked along a leading axis.

    Raises:
        UserError: a stage is missing, was trained on something else, or has not the tasks or seeds asked for, or all of
            them diverged.
    """
    header, (critics, axes, *own_policy) = load_critic(run_dir)
    replicas = [tuple(r) for r in header["replicas"]]
    for name, wanted, index in (("task", tasks, 0), ("seed", seeds, 1)):
        missing = set(wanted) - {r[index] for r in replicas}
        if missing:
            have = sorted({r[index] for r in replicas})
            raise UserError(
                f"{run_dir / 'value'} has no {name} {sorted(missing)[0]}: it has {have}; train it with evor_value.py."
            )
    chosen = [i for i, (t, s) in enumerate(replicas) if (not tasks or t in tasks) and (not seeds or s in seeds)]
    diverged = {tuple(r) for r in header.get("diverged", ())}
    lost = [replicas[i] for i in chosen if replicas[i] in diverged]
    if lost:
        report = f"{run_dir / 'value'}: (task, seed) {', '.join(map(str, lost))} diverged in training"
        if len(lost) == len(chosen):
            raise UserError(f"{report}: train it again with a smaller --learning-rate, or choose another.")
        print(f"warning: {report}: left out.", file=sys.stderr)
    chosen = [i for i in chosen if replicas[i] not in lost]
    replicas = [replicas[i] for i in chosen]

    if own_policy:
        if policy_run_dir is not None:
            raise UserError(f"{run_dir / 'value'} has a policy of its own: leave out --policy-run-dir.")
        (policies, standardizer), policy_index = own_policy, chosen
    else:
        if policy_run_dir is None:
            policy_run_dir = run_dir
            if not (run_dir / "bc" / "model.eqx").is_file():  # a file may name any path: the user decides
                raise UserError(
                    f"there is no base policy in {run_dir / 'bc'}: pass --policy-run-dir, where the one that "
                    f"{run_dir / 'value'} was trained with stands (it says: in {header.get('policy_run_dir')!r})."
                )
        policy_path = policy_run_dir / "bc" / "model.eqx"
        policy_header, (policies, standardizer) = load_policy(policy_run_dir)
        for name in ("env", "horizon", "observation_dim", "action_dim"):
            checkpoint.require(policy_header, policy_path, **{name: header[name]})
        if sha256(policy_path) != header["policy_sha256"]:
            raise UserError(
                f"{run_dir / 'value'} was trained with another base policy than {policy_path}: pass that one's run "
                f"directory with --policy-run-dir, or train evor_value.py again."
            )
        shared = header["args"].get("policy_seed")
        wanted = [seed if shared is None else shared for _, seed in replicas]
        unknown = [seed for seed in wanted if seed not in policy_header["seeds"]]
        if unknown:
            raise UserError(f"{policy_path} has no seed {unknown[0]}: pass the run directory of one that has.")
        policy_index = [policy_header["seeds"].index(seed) for seed in wanted]

    def take(models, index):
        return jax.tree.map(lambda x: jnp.asarray(x)[np.array(index)], models)

    agents = AgentParams(
        policy=take(policies, policy_index),
        critic=take(critics, chosen),
        standardizer=jax.tree.map(lambda x: jnp.stack([x] * len(chosen)), standardizer),
        axis=take(axes, chosen),
    )
    return header, replicas, agents


# --- Python API --------------------------------------------------------------------------------------------------


@jax.jit
def _act(agent, observations, settings, *, key):
    keys = jax.random.split(key, len(observations))

    def one(x, k):
        return act_one(agent, x, settings, key=k)

    return in_blocks(one, observations, keys, rows=settings.num_actions * settings.num_returns)


@jax.jit
def _sample_actions(agent, observations, settings, *, key):
    noise = jax.random.normal(key, (len(observations), settings.num_actions, agent.policy.action_dim))

    def one(x, z):
        return agent.policy.sample(agent.standardizer(x), z, settings.ode)

    return in_blocks(one, observations, noise, rows=settings.num_actions)


@jax.jit
def _sample_returns(agent, observations, actions, settings, *, key):
    noise = return_noise(settings, key=key)

    def one(x, a):
        return agent.axis.to_environment(agent.critic.sample(agent.standardizer(x), a, noise, settings.ode))

    return in_blocks(one, observations, actions, rows=settings.num_returns)


@jax.jit
def _q_value(agent, observations, actions, settings, *, key):
    noise = return_noise(settings, key=key)
    temperature = return_temperature(agent.axis, settings)

    def one(x, a):
        x = agent.standardizer(x)
        return score_one(agent.critic, agent.axis, x, a, noise, temperature=temperature, ode=settings.ode)

    return in_blocks(one, observations, actions, rows=settings.num_returns)


@dataclasses.dataclass(frozen=True)
class Agent:
    """A trained agent. Inputs are batched; everything is jitted once per shape; returns are in environment units."""

    params: AgentParams
    horizon: int = 1

    def _check(self, observations: Any, actions: Any = None) -> Any:
        """Actions as one vector per chunk.

        Raises:
            ValueError: shapes that would broadcast into nonsense, such as a single observation without a batch axis.
        """
        policy = self.params.policy
        if np.ndim(observations) != 2 or np.shape(observations)[1] != policy.observation_dim:
            raise ValueError(f"observations must be (batch, {policy.observation_dim}), not {np.shape(observations)}.")
        if actions is None:
            return None
        if len(actions) != len(observations) or np.size(actions) != len(observations) * policy.action_dim:
            raise ValueError(
                f"actions must be ({len(observations)}, {policy.action_dim}), or the same with an axis for the steps "
                f"of a chunk, not {np.shape(actions)}."
            )
        return jnp.reshape(jnp.asarray(actions), (len(observations), policy.action_dim))

    def act(
        self, observations: Float[Array | np.ndarray, "..."], *, key: PRNGKeyArray, **settings
    ) -> Float[Array, "batch horizon action"]:
        """Extracted action chunks. Settings: the fields of `Extraction`."""
        self._check(observations)
        actions = _act(self.params, observations, Extraction(**settings), key=key)
        return actions.reshape(len(actions), self.horizon, -1)

    def sample_actions(
        self,
        observations: Float[Array | np.ndarray, "..."],
        num_actions: int,
        *,
        flow_steps: int = 5,
        solver: Solver = "midpoint",
        key: PRNGKeyArray,
    ) -> Float[Array, "batch num_actions chunk"]:
        """Candidates of the base policy, in [-1, 1]; a chunk of h actions is one vector."""
        self._check(observations)
        settings = Extraction(num_actions=num_actions, flow_steps=flow_steps, solver=solver)
        return _sample_actions(self.params, observations, settings, key=key)

    def sample_returns(
        self,
        observations: Float[Array | np.ndarray, "..."],
        actions: Float[Array | np.ndarray, "batch *chunk"],
        num_returns: int,
        *,
        independent_noise: bool = False,
        flow_steps: int = 5,
        solver: Solver = "midpoint",
        key: PRNGKeyArray,
    ) -> Float[Array, "batch num_returns"]:
        """Draws of the reward-to-go; by default those of the normal quantiles, in rising order of the noise."""
        actions = self._check(observations, actions)
        settings = Extraction(
            num_returns=num_returns, flow_steps=flow_steps, solver=solver, independent_noise=independent_noise
        )
        return _sample_returns(self.params, observations, actions, settings, key=key)

    def q_value(
        self,
        observations: Float[Array | np.ndarray, "..."],
        actions: Float[Array | np.ndarray, "batch *chunk"],
        *,
        num_returns: int = 16,
        return_temperature: float = 0.3,
        key: PRNGKeyArray,
        **settings,
    ) -> Float[Array, " batch"]:
        """`Q*(x, a)`, the log-mean-exp of the returns, in the environment's units. The temperature is relative to the
        data's returns, or with `absolute=True` in the environment's units too."""
        actions = self._check(observations, actions)
        extraction = Extraction(num_returns=num_returns, return_temperature=return_temperature, **settings)
        return _q_value(self.params, observations, actions, extraction, key=key)


def load_agent(
    run_dir: str | Path, *, task: int | None = None, seed: int | None = None, policy_run_dir: str | Path | None = None
) -> Agent:
    """The agent of a run directory, for one task and seed (by default the first that was trained).

        agent = load_agent("runs/cube-double-play", task=2, seed=0)
        actions = agent.act(observations, key=jax.random.key(0))

    Raises:
        UserError: a stage is missing, or the task or seed was not trained.
    """
    header, _, agents = load_agents(
        Path(run_dir),
        tasks=() if task is None else (task,),
        seeds=() if seed is None else (seed,),
        policy_run_dir=None if policy_run_dir is None else Path(policy_run_dir),
    )
    return Agent(jax.tree.map(lambda x: x[0], agents), horizon=header["horizon"])


# --- Evaluation --------------------------------------------------------------------------------------------------


def evaluate(
    agents: AgentParams,
    episodes: Episodes,
    settings: Extraction,
    *,
    replicas: Sequence[tuple[int, int]],
    horizon: int,
    seed: int,
    desc: str = "evaluating",
) -> list[dict[str, Any]]:
    """Runs all episodes of all replicas; one row per episode, with task, seed and settings."""
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(seed), s))(np.array([s for _, s in replicas]))

    def act(observations, counts, steps):
        inputs = (jnp.asarray(x) for x in (observations, counts, steps))
        chunks = act_replicas(agents, *inputs, settings, keys=keys)
        return chunks.reshape(*chunks.shape[:2], horizon, -1)

    rows = []
    units = np.asarray(return_temperature(agents.axis, settings))
    for row in episodes.run(act, desc=desc):
        index = row.pop("replica")
        task, replica_seed = replicas[index]
        rows.append(
            dict(
                task=task,
                seed=replica_seed,
                **dataclasses.asdict(settings),
                return_temperature_units=float(units[index]),
                **row,
            )
        )
    return rows


def film_episode(agent: Agent, settings: Extraction, env: Env, path: Path, *, seed: int, title: str) -> None:
    """Films an episode with the return law of each action that was chosen, and the means of eight others."""
    choice, ode = dataclasses.asdict(settings), dict(flow_steps=settings.flow_steps, solver=settings.solver)

    def decide(observation: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        act_key, others_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        x = jnp.asarray(observation, jnp.float32)[None]
        chunk = agent.act(x, key=act_key, **choice)
        draws = agent.sample_returns(x, chunk, 200, key=act_key, **ode)
        others = agent.sample_actions(x, 8, key=others_key, **ode)[0]
        means = agent.sample_returns(jnp.repeat(x, 8, axis=0), others, 16, key=act_key, **ode).mean(axis=1)
        return np.asarray(chunk[0]), np.asarray(draws[0]), np.asarray(means)

    bounds = float(agent.params.axis.low), float(agent.params.axis.high)
    success = film.record(env, decide, path, seed=episode_seed(seed, 0), bounds=bounds, title=title)
    print(f"film: {path} ({'solved' if success else 'not solved'})")


def read_episodes(path: Path, *, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of an `evaluation.csv` or `episodes.csv`, with numbers as numbers; `words` are more columns without any."""
    words = ("env", "data_source", "data_sha256", "solver", *words)
    whole = (
        "task",
        "seed",
        "step",
        "steps",
        "eval_seed",
        "num_actions",
        "num_returns",
        "flow_steps",
        "episode",
        "length",
    )
    kinds = dict.fromkeys(words, str) | dict.fromkeys(whole, int)
    kinds |= dict.fromkeys(("independent_noise", "absolute"), "True".__eq__)
    return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in read_csv(path)]


def summarise(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Success rate, its 95% Wilson interval, and mean length of the episodes of each group."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    out = []
    for values, members in groups.items():
        successes, number = sum(r["success"] for r in members), len(members)
        low, high = success_interval(successes, number)
        lengths = float(np.mean([r["length"] for r in members]))
        out.append(
            dict(zip(by, values, strict=True))
            | dict(success=successes / number, low=low, high=high, episodes=number, mean_length=lengths)
        )
    return out


def main(args: Args) -> list[dict[str, Any]]:
    """Evaluates every combination of the lists; returns the summary rows."""
    began = time.monotonic()
    check(args)
    if args.video is not None:
        film.choose_renderer()
        film.make_writer(args.video)  # now, rather than after the sweep
    run_dir = args.run_dir or default_run_dir(run_name(args.env, None), quick=args.quick)
    out = run_dir / args.out
    if out.resolve() in {(run_dir / folder).resolve() for folder in ("", "bc", "value")}:
        raise UserError(f"--out {args.out}: {out} is not for sweeps: name another folder.")
    seeds = () if args.seeds is None else range(args.first_seed, args.first_seed + args.seeds)
    header, replicas, agents = load_agents(run_dir, tasks=args.tasks, seeds=seeds, policy_run_dir=args.policy_run_dir)
    name = parse_env(args.env)
    checkpoint.require(header, run_dir / "value" / "model.eqx", env=name.short)
    check_env(name)
    if 0 in {task for task, _ in replicas}:
        raise UserError(f"{run_dir} was trained on rewards of its own: there is no environment to evaluate it in.")

    grid = itertools.product(args.num_actions, args.num_returns, args.return_temperature, args.action_temperature)
    ode = (args.flow_steps, args.solver)
    sweep = list(dict.fromkeys(Extraction(*point, *ode, args.independent_noise, args.absolute) for point in grid))
    gym_ids = [name.gym_id(task) for task, _ in replicas]
    filmed = film.open_env(gym_ids[0], args.action_noise[-1]) if args.video is not None else None
    _lock = hold_directory(out, "--out")  # until this function ends
    rows: list[dict[str, Any]] = []
    for noise in dict.fromkeys(args.action_noise):
        with Episodes(
            gym_ids,
            num_episodes=args.eval_episodes,
            horizon=header["horizon"],
            seed=args.eval_seed,
            action_noise=noise,
            workers=args.workers,
        ) as episodes:
            for settings in sweep:
                found = evaluate(
                    agents,
                    episodes,
                    settings,
                    replicas=replicas,
                    horizon=header["horizon"],
                    seed=args.eval_seed,
                    desc=f"N_pi={settings.num_actions} N={settings.num_returns} tau_R={settings.return_temperature:g} "
                    f"tau_Q={settings.action_temperature:g} noise={noise:g}",
                )
                rows += [dict(action_noise=noise) | row for row in found]
    common = dict(env=name.short, data_source=header["data"]["source"], data_sha256=header["data"]["sha256"])
    common |= dict(eval_seed=args.eval_seed)
    rows = [common | row for row in rows]
    by = ("env", "data_source", "action_noise", *(field.name for field in dataclasses.fields(Extraction)), "task")
    summary = summarise(rows, by)
    (out / "config.json").unlink(missing_ok=True)  # of the sweep before
    write_csv(out / "episodes.csv", list(rows[0]), rows)
    write_csv(out / "summary.csv", list(summary[0]), summary)
    # Last: where it stands, all that it describes does.
    write_json(
        out / "config.json",
        dict(
            stage="infer",
            env=name.short,
            args=args,
            data=header["data"],
            policy_sha256=header["policy_sha256"],
            critic_sha256=sha256(run_dir / "value" / "model.eqx"),
            versions=package_versions(),
            git_revision=git_revision(),
            hardware=hardware(),
            seconds=round(time.monotonic() - began, 1),
        ),
    )
    figures.sweep(summary, out / "sweep.png", title=f"{name.short} ({header['data']['source']} data)")
    for row in summary:
        print(
            f"task {row['task']}  N_pi {row['num_actions']:<3} N {row['num_returns']:<3} "
            f"tau_R {row['return_temperature']:<5g} tau_Q {row['action_temperature']:<5g} noise "
            f"{row['action_noise']:<5g} "
            f"success {row['success']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of {row['episodes']} episodes"
        )
    if filmed is not None:
        agent = Agent(jax.tree.map(lambda x: x[0], agents), horizon=header["horizon"])
        title = f"{name.short}, task {replicas[0][0]}, best of {settings.num_actions}"
        film_episode(agent, settings, filmed, args.video, seed=args.eval_seed, title=title)
        filmed.close()
    print(f"rows: {out / 'episodes.csv'}\nsummary: {out / 'summary.csv'}\nfigure: {out / 'sweep.png'}")
    return summary


if __name__ == "__main__":
    run_cli(main, Args, PRESETS)
