"""Stage 3 of EVOR: the policy, extracted at inference time. Nothing is trained here.

    python evor_infer.py --env cube-double-play --num-actions 1 4 16 64

Given the base policy (stage 1) and the reward-to-go law (stage 2), in an observation x:

    a^(i) = psi_1(lambda e_i | x),  e_i ~ N(0, I),  i = 1..N_pi     candidates, by the flow psi of stage 1
    Z^(i,j) = h^-1(psi_1(z_j | x, a^(i))),  j = 1..N                its returns, by the flow psi of stage 2
    Q*(x, a^(i)) = T log( (1/N) sum_j exp(Z^(i,j) / T) )            log-mean-exp, T = tau_R sigma
    a ~ softmax_i( Q*(x, a^(i)) / (tau_Q sigma) )                   tau_Q = 0: the best candidate

| symbol | here                 | symbol  | here                 |
|--------|----------------------|---------|----------------------|
| N_pi   | `num_actions`        | tau_R   | `return_temperature` |
| N      | `num_returns`        | tau_Q   | `action_temperature` |
| lambda | `noise_scale`        |         |                      |

z_j are N quantiles of N(0, 1), the same for all candidates; with `--independent-noise` they are draws. h is the return
axis of stage 2. sigma is the standard deviation of the data's returns, over all its states, so temperatures do not
depend on the units of the rewards. With `--absolute` sigma is 1, as in the paper: temperatures are in the environment's
units.
With lambda = 1 candidates are draws of the base policy, and `num_actions = 1` is that policy. A smaller lambda keeps to
what it does most, and leaves out its rare actions, whose value is a guess.

Lists on the command line are a sweep: every combination is evaluated on the same episodes, without retraining. A
setting of the extraction that is not given is the one that stage 2 was trained with.
Reads `runs/ENV/value/model.eqx`; writes `runs/ENV/infer/{config.json, episodes.csv, summary.csv, sweep.png}`.

Source: EVOR, arXiv 2510.08218, stage 3 and equation 22, with log-*mean*-exp in the place of log-sum-exp and one set of
return noise for all candidates. lambda is that of low-temperature sampling (Decision Diffuser, arXiv 2211.15657).
*Ours*, not disclosed there: N, both temperatures, flow steps.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PRNGKeyArray

from common import checkpoint, film
from common.args import (
    Count,
    Draws,
    NoiseScale,
    Paths,
    Seed,
    at_least,
    check,
    each,
    not_endless,
    not_negative,
    not_too_many,
)
from common.cli import run_cli
from common.data.names import default_run_dir, run_name
from common.environments import evaluation_id, settings_of
from common.episodes import Episodes
from common.errors import UserError
from common.evaluation import play, reference_of
from common.flow import Ode, Solver
from common.networks import (
    Critic,
    CriticSpec,
    Depth,
    PolicySpec,
    Standardizer,
    VelocityPolicy,
    Width,
    make_critic,
    make_policy,
    stratified_normal,
)
from common.publish import HUB, from_hub
from common.replicas import check_devices, in_blocks, over_replicas
from common.returns import ReturnAxis, blank_axis
from common.sweep import Sweep, sweep_folder

PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(num_actions=(1, 4), num_returns=(4,), eval_episodes=4),
    "preview": dict(num_actions=(1, 4, 16, 32), num_returns=(8,)),
}


NEEDS_BOTH = "needs the temperatures, too: those of stage 2 are in standard deviations of the data's returns."


class Extraction(eqx.Module):
    """How an action is extracted. Temperatures and the scale are traced by `jit`: sweeping them compiles nothing anew.
    The numbers of draws and steps set array shapes and are static."""

    num_actions: Draws = eqx.field(static=True, default=32)
    num_returns: Draws = eqx.field(static=True, default=16)
    return_temperature: Annotated[float, not_negative] = 0.3
    action_temperature: Annotated[float, not_negative] = 0.003
    noise_scale: NoiseScale = 1.0
    flow_steps: Draws = eqx.field(static=True, default=5)
    solver: Solver = eqx.field(static=True, default="midpoint")
    independent_noise: bool = eqx.field(static=True, default=False)
    absolute: bool = eqx.field(static=True, default=False)

    @property
    def ode(self) -> Ode:
        return Ode(self.flow_steps, self.solver)

    def unit(self, axis: ReturnAxis) -> Float[Array, "*replicas"]:
        """sigma, the unit of both temperatures, in the environment's units."""
        return jnp.ones_like(axis.spread) if self.absolute else axis.spread


SWEPT = ("num_actions", "num_returns", "return_temperature", "action_temperature", "noise_scale")


class Settings(TypedDict, total=False):
    """The fields of `Extraction`, as keyword arguments."""

    num_actions: int
    num_returns: int
    return_temperature: float
    action_temperature: float
    noise_scale: float
    flow_steps: int
    solver: Solver
    independent_noise: bool
    absolute: bool


@dataclasses.dataclass(frozen=True)
class Args(Paths):
    """Stage 3: evaluate the extracted policy; lists are a sweep. A setting of the extraction that is None is the
    one that stage 2 was trained with."""

    # --- experiment ---
    env: str = "cube-double-play"
    """The --env of stage 2: OGBench's name, an environment of Gymnasium, or a name of your own."""
    tasks: tuple[int, ...] = ()
    """Tasks to evaluate; all that stage 2 trained by default."""
    seeds: Annotated[int | None, at_least(1)] = None
    """Number of seeds to evaluate; all that stage 2 trained by default."""
    first_seed: Seed = 0
    """The first of them, with --seeds."""
    run_dir: Path | None = None
    """The run directory of stage 2; runs/ENV (runs/ENV-quick) by default."""
    quick: bool = False
    """Preset: a handful of episodes."""
    preview: bool = False
    """Preset: a short sweep over the number of actions."""

    # --- extraction ---
    num_actions: Annotated[tuple[int, ...] | None, each(at_least(1)), each(not_too_many)] = None
    """N_pi: candidates from the base policy (32: the paper's)."""
    num_returns: Annotated[tuple[int, ...] | None, each(at_least(1)), each(not_too_many)] = None
    """N: draws of the reward-to-go per candidate (ours)."""
    return_temperature: Annotated[tuple[float, ...] | None, each(not_negative)] = None
    """tau_R, in standard deviations of the data's returns (ours); inf scores by the mean, 0 by the largest draw."""
    action_temperature: Annotated[tuple[float, ...] | None, each(not_negative)] = None
    """tau_Q, in standard deviations of the data's returns (ours); 0 takes the best candidate, inf any."""
    noise_scale: Annotated[tuple[float, ...] | None, each(not_endless)] = None
    """lambda: standard deviation of the noise that candidates start from."""
    absolute: bool = Extraction.absolute
    """Temperatures in the environment's units, as in the paper; needs both of them."""
    flow_steps: Annotated[int | None, at_least(1), not_too_many] = None
    """Steps of both flows (ours)."""
    solver: Solver | None = None
    """Their solver; midpoint takes two evaluations a step, euler one."""
    independent_noise: bool = Extraction.independent_noise
    """Draw the return noise at random, still shared by all candidates, instead of normal quantiles."""

    # --- evaluation ---
    eval_episodes: Count = 50
    """Episodes per task and seed (OGBench: 50)."""
    eval_seed: Seed = 0
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

    def conflicts(self) -> Iterator[str]:
        if self.absolute and None in (self.return_temperature, self.action_temperature):
            yield f"--absolute {NEEDS_BOTH}"

    @property
    def directory(self) -> Path:
        """The run directory of stage 2."""
        return self.run_dir or default_run_dir(self.name, quick=self.quick)

    @property
    def name(self) -> str:
        """Name of the run."""
        return run_name(self.env, Path(self.env))  # stage 2 may have had a --dataset, and --env any name


# --- Maths -------------------------------------------------------------------------------------------------------


def log_mean_exp(
    returns: Float[Array, "*batch num"],
    temperature: Float[ArrayLike, ""],
    weights: Float[Array, "*batch num"] | None = None,
) -> Float[Array, "*batch"]:
    """`T log( (1/N) sum_j exp(Z_j / T) )` over the last axis; T = inf is the mean, T = 0 the maximum.

    With `weights`, the probabilities of the returns: `T log( sum_j w_j exp(Z_j / T) )`, the same of a law that is
    known. (At T = 0 that is the largest value, even if its probability is tiny.)

    Written as `max + T log1p(mean(expm1((Z - max) / T)))`, which neither overflows at a small T nor loses its
    digits at a large one. Increasing in every return, decreasing in T, between mean and maximum.
    """
    if jnp.ndim(temperature):
        raise ValueError(f"the temperature must be a number, not of the shape {jnp.shape(temperature)}.")
    if weights is not None and weights.shape != returns.shape:
        raise ValueError(f"weights must have the shape of the returns, {returns.shape}, not {weights.shape}.")
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
    Exact for critics whose law is a list of returns and probabilities, such as C51."""
    returns, weights = critic.law(observation, action, noise, ode)
    return log_mean_exp(axis.to_environment(returns), temperature, weights)


def select(
    scores: Float[Array, " num_actions"], temperature: Float[ArrayLike, ""], *, key: PRNGKeyArray
) -> Int[Array, ""]:
    """An index with probability `softmax(scores / temperature)`; temperature 0: the largest score, inf: uniform."""
    if scores.ndim != 1 or jnp.ndim(temperature):
        shapes = scores.shape, jnp.shape(temperature)
        raise ValueError(f"scores must be those of one observation's actions and the temperature one, not {shapes}.")
    above = scores - jnp.max(scores)  # keeps the digits of scores that are all far from zero
    drawn = jax.random.categorical(key, above / jnp.where(temperature == 0, 1.0, temperature))
    return jnp.where(temperature == 0, jnp.argmax(scores), drawn)


def act_one(
    agent: "Agent", observation: Float[Array, " observation"], settings: Extraction, *, key: PRNGKeyArray
) -> Float[Array, " action"]:
    """The extracted action (chunk) in one observation, the equations at the top of this file."""
    candidate_key, noise_key, select_key = jax.random.split(key, 3)
    observation = agent.standardizer(observation)
    noise = jax.random.normal(candidate_key, (settings.num_actions, agent.policy.spec.action))
    candidates = agent.policy.sample(observation, settings.noise_scale * noise, settings.ode)
    if settings.num_actions == 1:
        return candidates[0]
    unit = settings.unit(agent.axis)
    score = functools.partial(score_one, temperature=settings.return_temperature * unit, ode=settings.ode)
    returns_noise = return_noise(settings, key=noise_key)
    scores = jax.vmap(score, (None, None, None, 0, None))(
        agent.critic, agent.axis, observation, candidates, returns_noise
    )
    return candidates[select(scores, settings.action_temperature * unit, key=select_key)]


# --- Agent -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AgentSpec:
    """What determines the shapes of an agent."""

    policy: PolicySpec
    critic: CriticSpec
    horizon: Depth
    knots: Width  # of the return axis

    def conflicts(self) -> Iterator[str]:
        of_policy, of_critic = ((part.observation, part.action) for part in (self.policy, self.critic))
        if of_policy != of_critic or self.policy.action % self.horizon:
            yield "the parts of this agent do not fit each other."


class Agent(eqx.Module):
    """A trained agent. Its methods are batched and jitted once per shape.

    Observations are (batch, observation). Actions are (batch, chunk) or (batch, horizon, action); a chunk of h actions
    is one vector. Both are arrays or lists. Returns are in the environment's units. `settings` are fields of
    `Extraction`, such as `num_returns=16` or `solver="euler"`; those not given are the agent's own, what stage 2 was
    trained with.

    The methods raise `UserError` for settings that the command line refuses, `ValueError` for other shapes.

    Many agents are one `Agent` whose leaves have a leading axis of replicas, as in a checkpoint; `decide` takes those.
    """

    policy: VelocityPolicy
    critic: Critic
    standardizer: Standardizer
    axis: ReturnAxis
    horizon: int = eqx.field(static=True, default=1)
    settings: Extraction = eqx.field(static=True, default=Extraction())

    def spec(self) -> AgentSpec:
        return AgentSpec(self.policy.spec, self.critic.spec, self.horizon, self.axis.returns.shape[-1])

    @property
    def chunk(self) -> tuple[int, int]:
        """Its actions, and their size."""
        return self.horizon, self.policy.spec.action // self.horizon

    def act(
        self, observations: Any, *, key: PRNGKeyArray, **settings: Unpack[Settings]
    ) -> Float[Array, "batch horizon action"]:
        """Extracted action chunks, in [-1, 1]."""
        observations = self._batch(observations)
        extraction = self._extraction(settings, "return_temperature", "action_temperature")
        actions = _act(self, observations, extraction, key=key)
        return actions.reshape(len(actions), *self.chunk)

    def sample_actions(
        self, observations: Any, num_actions: int, *, key: PRNGKeyArray, **settings: Unpack[Settings]
    ) -> Float[Array, "batch num_actions chunk"]:
        """Candidates of the base policy, in [-1, 1]."""
        observations = self._batch(observations)
        return _sample_actions(self, observations, self._extraction(settings, num_actions=num_actions), key=key)

    def sample_returns(
        self, observations: Any, actions: Any, num_returns: int, *, key: PRNGKeyArray, **settings: Unpack[Settings]
    ) -> Float[Array, "batch num_returns"]:
        """Draws of the reward-to-go. By default their noise is the quantiles of N(0, 1), in increasing order."""
        observations = self._batch(observations)
        actions = self._chunks(observations, actions)
        extraction = self._extraction(settings, num_returns=num_returns)
        return _sample_returns(self, observations, actions, extraction, key=key)

    def q_value(
        self, observations: Any, actions: Any, *, key: PRNGKeyArray, **settings: Unpack[Settings]
    ) -> Float[Array, " batch"]:
        """`Q*(x, a)`, the log-mean-exp of the returns."""
        observations = self._batch(observations)
        actions = self._chunks(observations, actions)
        return _q_value(self, observations, actions, self._extraction(settings, "return_temperature"), key=key)

    def decide(
        self,
        observations: Float[Array, "replicas n observation"],
        episodes: Int[Array, "replicas n"],
        steps: Int[Array, "replicas n"],
        settings: Extraction,
        *,
        keys: Key[Array, " replicas"],
    ) -> Float[Array, "replicas n horizon action"]:
        """Actions of all replicas in all their environments. An action's randomness depends on the replica's key, the
        episode and the step alone, so results do not depend on how episodes are spread over environments."""
        chunks = _decide(self, observations, episodes, steps, settings, keys=keys)
        return chunks.reshape(*chunks.shape[:2], *self.chunk)

    def _extraction(self, settings: Settings, *temperatures: str, **given: int) -> Extraction:
        """
        Args:
            temperatures: those that the caller uses.

        Raises:
            UserError: a setting that the command line refuses.
        """

        def number(x):
            on_host = isinstance(x, np.generic) or (isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
            return x.item() if on_host else x

        if settings.get("absolute") and not set(temperatures) <= settings.keys():
            raise UserError(f"absolute=True {NEEDS_BOTH}")
        numbers = {name: number(x) for name, x in (*settings.items(), *given.items())}
        extraction = dataclasses.replace(self.settings, **numbers)
        check(extraction)
        return extraction

    def _batch(self, observations: Any) -> Float[Array, "batch observation"]:
        """
        Raises:
            ValueError: another shape, such as a single observation without a batch axis.
        """
        observations, size = jnp.asarray(observations), self.policy.spec.observation
        if observations.shape == (0,):  # an empty list
            observations = observations.reshape(0, size)
        if observations.ndim != 2 or observations.shape[1] != size:
            raise ValueError(f"observations must be (batch, {size}), not {observations.shape}.")
        return observations

    def _chunks(self, observations: Float[Array, "batch observation"], actions: Any) -> Float[Array, "batch chunk"]:
        """The chunks that were given as `(batch, chunk)` or as `(batch, horizon, action)`, each as one vector.

        Raises:
            ValueError: another shape.
        """
        actions, shape = jnp.asarray(actions), (len(observations), self.policy.spec.action)
        if actions.shape == shape[:1] == (0,):  # an empty list
            actions = actions.reshape(shape)
        steps = (shape[0], *self.chunk)
        if actions.shape not in (shape, steps):
            raise ValueError(f"actions must be {shape} or {steps}, not {actions.shape}.")
        return actions.reshape(shape)


@jax.jit
def _act(agent, observations, settings, *, key):
    keys = jax.random.split(key, len(observations))

    def one(x, k):
        return act_one(agent, x, settings, key=k)

    return in_blocks(one, observations, keys, rows=settings.num_actions * settings.num_returns)


def _act_at(agent, settings, key, observation, episode, step):
    return act_one(agent, observation, settings, key=jax.random.fold_in(jax.random.fold_in(key, episode), step))


@jax.jit
def _decide(agents, observations, episodes, steps, settings, *, keys):
    def of_replica(agent, observations, episodes, steps, key):
        act = functools.partial(_act_at, agent, settings, key)
        return in_blocks(act, observations, episodes, steps, rows=settings.num_actions * settings.num_returns)

    return over_replicas(of_replica, agents, observations, episodes, steps, keys)


@jax.jit
def _sample_actions(agent, observations, settings, *, key):
    noise = jax.random.normal(key, (len(observations), settings.num_actions, agent.policy.spec.action))

    def one(x, z):
        return agent.policy.sample(agent.standardizer(x), settings.noise_scale * z, settings.ode)

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
    temperature = settings.return_temperature * settings.unit(agent.axis)

    def one(x, a):
        x = agent.standardizer(x)
        return score_one(agent.critic, agent.axis, x, a, noise, temperature=temperature, ode=settings.ode)

    return in_blocks(one, observations, actions, rows=settings.num_returns)


def init_agent(spec: AgentSpec, *, key: PRNGKeyArray) -> Agent:
    """An agent of these shapes that has learned nothing."""
    policy, critic = make_policy(spec.policy, key=key), make_critic(spec.critic, key=key)
    zeros = jnp.zeros(spec.policy.observation)
    return Agent(policy, critic, Standardizer(zeros, zeros), blank_axis(spec.knots), spec.horizon)


def load_agents(
    run_dir: Path, *, tasks: Sequence[int] = (), seeds: Sequence[int] = ()
) -> tuple[dict[str, Any], list[tuple[int, int]], Agent]:
    """Header of stage 2, the chosen (task, seed) pairs, and their agents stacked along a leading axis.

    Raises:
        UserError: stage 2 is missing, or has not the tasks or seeds asked for.
    """
    check_devices()
    path = run_dir / "value" / "model.eqx"
    defaults = dataclasses.asdict(Extraction())

    def build(header):
        spec = checkpoint.read_spec(AgentSpec, header["model"])
        keys = jax.random.split(jax.random.key(0), len(header["replicas"]))
        agents = eqx.filter_eval_shape(jax.vmap(lambda key: init_agent(spec, key=key)), keys)
        # Temperatures of revisions that know no lambda have other units. `type(x)` makes the header's "inf" a number.
        args = header["args"] if "noise_scale" in header["args"] else {}
        given = {name: type(x)(args[name]) for name, x in defaults.items() if name in args}
        return dataclasses.replace(agents, settings=checkpoint.read_spec(Extraction, given))

    header, agents = checkpoint.load(path, build, stage="value", remedy="train it with evor_value.py first.")
    chosen = checkpoint.choose(header, path, tasks=tasks, seeds=seeds)
    pairs = [tuple(header["replicas"][i]) for i in chosen]
    # An explicit transfer, so that it also works under JAX_TRANSFER_GUARD=disallow.
    return header, pairs, jax.tree.map(lambda x: jax.device_put(jax.device_get(x)[np.array(chosen)]), agents)


def load_agent(run_dir: str | Path, *, task: int | None = None, seed: int | None = None) -> Agent:
    """The agent of a run directory, or of `hf://USER/NAME` on the Hugging Face hub, for one task and seed (by default
    the first that was trained).

        agent = load_agent("runs/cube-double-play", task=2, seed=0)
        actions = agent.act(observations, key=jax.random.key(0))

    Raises:
        UserError: stage 2 is missing, or the task or seed was not trained.
    """
    run_dir = from_hub(str(run_dir)) if str(run_dir).startswith(HUB) else Path(run_dir).expanduser()
    tasks, seeds = (() if number is None else (number,) for number in (task, seed))
    _, _, agents = load_agents(run_dir, tasks=tasks, seeds=seeds)
    return jax.tree.map(lambda x: jax.device_put(jax.device_get(x)[0]), agents)


# --- Sweeps ------------------------------------------------------------------------------------------------------


def open_run(args: Args) -> tuple[dict[str, Any], list[tuple[int, int]], list[str], Agent]:
    """Header, (task, seed) pairs, environments and agents of the run to evaluate.

    Raises:
        UserError: there is no such run, or no environment to evaluate it in, or no place for the sweep.
    """
    sweep_folder(args)  # before anything is loaded
    run_dir = args.directory
    if not (run_dir / "value" / "model.eqx").is_file():
        run_name(args.env)  # says what is wrong with a name that means nothing
    seeds = () if args.seeds is None else range(args.first_seed, args.first_seed + args.seeds)
    header, pairs, agents = load_agents(run_dir, tasks=args.tasks, seeds=seeds)
    checkpoint.require(header, run_dir / "value" / "model.eqx", env=args.name)
    gym_ids = [evaluation_id(args.env, task) for task, _ in pairs]
    if None in gym_ids:
        raise UserError(
            f"{run_dir} was trained on rewards of its own, and {args.env} is no environment of Gymnasium: act with its "
            f"agent from Python, load_agent({str(run_dir)!r})."
        )
    return header, pairs, gym_ids, agents


def combinations(args: Args, trained: Extraction) -> list[Extraction]:
    """All combinations of the lists; a setting without one is that of `trained`."""
    lists = {name: getattr(args, name) or (getattr(trained, name),) for name in SWEPT}
    rest = dict(independent_noise=args.independent_noise, absolute=args.absolute)
    rest |= {name: getattr(args, name) or getattr(trained, name) for name in ("flow_steps", "solver")}
    points = (dict(zip(lists, point, strict=True)) for point in itertools.product(*lists.values()))
    return list(dict.fromkeys(Extraction(**point, **rest) for point in points))


def main(args: Args) -> list[dict[str, Any]]:
    """Evaluates every combination of the lists; returns the summary rows."""
    check(args)
    if args.video is not None:
        film.prepare(args.video)  # now, rather than after the sweep
    header, pairs, gym_ids, agents = open_run(args)
    played = dict(pairs=pairs, seed=args.eval_seed, reference=reference_of(header["data"], gym_ids[0]))
    sweep = Sweep(args, header, settings=[field.name for field in dataclasses.fields(Extraction)])
    settings = settings_of(header["data"], gym_ids[0])
    filmed = film.open_env(gym_ids[0], args.action_noise[-1], **settings) if args.video is not None else None
    in_common = dict(num_episodes=args.eval_episodes, horizon=agents.horizon, seed=args.eval_seed, settings=settings)
    for noise in dict.fromkeys(args.action_noise):
        with Episodes(gym_ids, **in_common, action_noise=noise, workers=args.workers) as episodes:
            for extraction in combinations(args, agents.settings):
                sweep.add(play(agents, episodes, extraction, **played, action_noise=noise))
    summary = sweep.finish()
    if filmed is not None:
        of_task = f", task {pairs[0][0]}" if pairs[0][0] else ""
        title = f"{header['env']}{of_task}, best of {extraction.num_actions}"
        film.film_episode(first_of(agents), extraction, filmed, args.video, seed=args.eval_seed, title=title)
    return summary


def first_of(agents: Agent) -> Agent:
    return jax.tree.map(lambda x: x[0], agents)


if __name__ == "__main__":
    run_cli(main, Args, PRESETS)
