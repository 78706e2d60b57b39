"""How fast every stage is, as ratios to what this machine can do.

    python -m benchmarks.speed

One command, one table: `runs/tables/speed/speed.csv` (one row per case, with machine and versions), `speed.md` and
`speed.png` beside it. Timings drift on shared machines, so cases of a group are timed in turn, round after round, with
the machine's own matrix product and a BC step among them; every ratio is the median over rounds of ratios within one
round. Data and parameters are random: no time depends on their values.

Counted FLOPs are those of the matrix products alone, forward and backward, and `peak share` relates them to the rate
of a chain of products of the networks' shape, (256, 512) x (512, 512).
"""

import dataclasses
import functools
import itertools
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import evor_bc
import evor_infer
import evor_value
from baselines import critics, qc
from common import figures
from common.cli import run_cli
from common.data import collect
from common.environments import make_env, seeded_reset
from common.episodes import Episodes
from common.errors import UserError
from common.evaluation import play
from common.files import write_csv
from common.flops import critic_macs, policy_macs, step_flops
from common.machine import num_cores
from common.networks import FlowCritic, FlowPolicy, Sizes, Standardizer
from common.problem import Dataset, Replica
from common.provenance import git_revision, package_versions
from common.replicas import copy_to_devices, spread, stack_replicas, use_cores
from common.returns import affine_axis, make_axis

OBSERVATION, ACTION = 37, 5  # cube-double
GYM_ID = "cube-double-singletask-task2-v0"
FIELDS = ("group", "case", "ms", "gflop", "peak_share", "to_bc", "to_first", "compile_s", "value", "unit")


@dataclasses.dataclass(frozen=True)
class Args:
    """Time every stage against this machine's own limit."""

    groups: tuple[str, ...] = (
        "stages",
        "baselines",
        "profile",
        "replicas",
        "data",
        "inference",
        "solvers",
        "run",
        "evaluation",
        "collection",
        "memory",
    )
    """What to measure."""
    rounds: int = 5
    """Rounds over the cases of a group."""
    quick: bool = False
    """Preset: a smoke run, with small networks and little data; its numbers mean nothing."""
    width: int = 512
    """Units per hidden layer."""
    rows: int = 1_000_000
    """Transitions of the dataset."""
    steps: int = 40
    """Gradient steps per timed call."""
    replicas: tuple[int, ...] = (1, 2, 5, 10, 25)
    """Numbers of replicas."""
    out: Path = Path("runs/tables/speed")
    """Folder for speed.csv, speed.md and speed.png."""


PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(rounds=1, width=32, rows=2_000, steps=2, replicas=(1, 2), out=Path("runs/speed-quick")),
}


class Case(NamedTuple):
    """Something to time: `run` blocks until `units` units of work are done."""

    name: str
    run: Callable[[], Any]
    units: int = 1
    flops: float = 0.0  # of the matrix products of one unit
    compile_s: float = 0.0


# --- Timing ------------------------------------------------------------------------------------------------------


def time_in_turn(cases: list[Case], rounds: int) -> np.ndarray:
    """Seconds per unit, (rounds, cases); every case has run once before."""
    for case in cases:
        case.run()
    seconds = np.zeros((rounds, len(cases)))
    for i, (j, case) in itertools.product(range(rounds), enumerate(cases)):
        began = time.perf_counter()
        case.run()
        seconds[i, j] = (time.perf_counter() - began) / case.units
    return seconds


def measure(group: str, cases: list[Case], args: Args) -> list[dict[str, Any]]:
    """Rows of a group. The matrix product and a BC step are timed among its cases; `to_first` is the ratio to the
    group's own first case."""
    reference = [product_case(args), bc_case("BC", args)]
    seconds = time_in_turn(reference + cases, args.rounds)
    product, bc = seconds[:, 0], seconds[:, 1]
    rows = []
    for j, case in enumerate(reference + cases):
        share = reference[0].flops and case.flops / reference[0].flops * product / seconds[:, j]
        row = dict.fromkeys(FIELDS, "") | dict(group=group, case=case.name)
        row |= dict(ms=1e3 * np.median(seconds[:, j]), gflop=case.flops / 1e9, peak_share=np.median(share))
        row |= dict(to_bc=np.median(seconds[:, j] / bc), compile_s=case.compile_s)
        if j >= 2:
            row |= dict(to_first=np.median(seconds[:, j] / seconds[:, 2]))
        rows.append(row)
        text = f"{group:<11} {case.name:<44} {row['ms']:9.2f} ms  {row['to_bc']:7.2f} x BC"
        print(text + (f"  {row['peak_share']:4.0%} of the product's rate" if case.flops else ""), flush=True)
    return rows


def number(group: str, case: str, value: float | int, unit: str) -> dict[str, Any]:
    """A row that is no timing."""
    print(f"{group:<11} {case:<44} {value:9.2f} {unit}", flush=True)
    return dict.fromkeys(FIELDS, "") | dict(group=group, case=case, value=value, unit=unit)


def compiled(function: Callable, *arguments: Any, **keywords: Any) -> tuple[Callable, float]:
    """A jitted function compiled for these arguments, and the seconds that took."""
    lowered = function.lower(*arguments, **keywords)
    began = time.perf_counter()
    return lowered.compile(), time.perf_counter() - began


# --- Cases -------------------------------------------------------------------------------------------------------


def product_case(args: Args) -> Case:
    """A chain of matrix products of the networks' shape."""
    length, x, w = 100, jnp.ones((256, args.width)), jnp.eye(args.width)
    chain = jax.jit(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=length)[0])
    flops = 2.0 * 256 * args.width**2
    return Case(
        "matrix product (256, width) x (width, width)", lambda: jax.block_until_ready(chain(x, w)), length, flops
    )


def bc_case(name: str, args: Args, *, replicas: int = 1, rows: int | None = None) -> Case:
    """`evor_bc.train_chunk`; FLOPs: forward, and backward but for the inputs of the first layer."""
    rows, steps = rows or args.rows, args.steps
    settings = evor_bc.Args(width=args.width, steps_per_call=steps)
    keys = jax.random.split(jax.random.key(0), replicas)
    state = stack_replicas(lambda key: evor_bc.init_state(settings, Sizes(OBSERVATION, ACTION, 1), key=key), keys)
    macs, first = policy_macs(jax.tree.map(lambda x: x[0], state.policy))
    flops = 2.0 * settings.batch_size * (3 * macs - first) * replicas
    state, replica_of = spread((state, bc_replicas(keys)), replicas)
    dataset = copy_to_devices(bc_data(rows), replicas)
    step, compile_s = compiled(evor_bc.train_chunk, settings, state, dataset, replica_of)
    return Case(name, stateful(lambda s: step(s, dataset, replica_of), state), steps, flops, compile_s)


def value_case(
    name: str,
    args: Args,
    *,
    tasks: int = 1,
    seeds: int = 1,
    rows: int | None = None,
    learner: ModuleType = evor_value,
    settings_of: ModuleType | None = None,
    **changes: Any,
) -> Case:
    """`train_chunk` of stage 2 or of a baseline, with tasks x seeds replicas. `settings_of` has the `Args`, where these
    are not the learner's own."""
    replicas, rows = tasks * seeds, rows or args.rows
    steps = args.steps
    settings = (settings_of or learner).Args(width=args.width, steps_per_call=steps, **changes)
    sizes = Sizes(OBSERVATION, ACTION, settings.horizon)
    keys = jax.random.split(jax.random.key(0), replicas)
    state = stack_replicas(lambda key: learner.init_state(settings, sizes, key=key), keys)
    num_next_actions = 0 if hasattr(state, "policy") else settings.num_next_actions
    shape = dict(num_next_actions=num_next_actions, horizon=settings.horizon)
    dataset = value_data(rows, tasks=tasks, seeds=seeds, **shape)
    sample = np.random.default_rng(0).gamma(2.0, 5.0, 1_000) - 100.0
    axis = make_axis(sample, np.array([-100.0, 0.0]), kind=settings.axis_kind)
    axis = jax.tree.map(lambda x: jnp.stack([x] * replicas), axis)
    task, seed = np.divmod(np.arange(replicas), seeds)
    chosen = Replica(jnp.asarray(task), jnp.asarray(seed), axis, keys)
    critic, policy = jax.tree.map(lambda x: x[0], (state.critic, getattr(state, "policy", None)))
    flops = step_flops(settings, critic, policy) * replicas
    (state, chosen), dataset = spread((state, chosen), replicas), copy_to_devices(dataset, replicas)
    step, compile_s = compiled(learner.train_chunk, settings, state, dataset, chosen)
    return Case(name, stateful(lambda s: step(s, dataset, chosen), state), steps, flops, compile_s)


def stateful(step: Callable, state: Any) -> Callable[[], None]:
    """A call that goes on from the last one's state, whose buffers it takes over."""

    def run() -> None:
        nonlocal state
        state, metrics = step(state)
        jax.block_until_ready(metrics)

    return run


@functools.cache
def random_rows(rows: int, horizon: int = 1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Observations, actions, and the rows at which a transition starts."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((rows + horizon, OBSERVATION), np.float32)
    actions = rng.uniform(-1, 1, (rows + horizon, ACTION)).astype(np.float32)
    return jnp.asarray(observations), jnp.asarray(actions), jnp.arange(rows)


def bc_data(rows: int) -> Dataset:
    """Data without rewards, as stage 1 has it."""
    nothing, no_bank = jnp.zeros((0, rows)), jnp.zeros((0, rows, 0, ACTION), jnp.float16)
    return Dataset(*random_rows(rows), nothing, nothing, no_bank, jnp.asarray(rows))


def bc_replicas(keys: jax.Array) -> Replica:
    zeros = jnp.zeros(len(keys), jnp.int32)
    return Replica(zeros, zeros, None, keys)


@functools.cache
def value_data(rows: int, *, tasks: int, seeds: int, num_next_actions: int, horizon: int = 1) -> Dataset:
    bank = np.empty((seeds, rows, num_next_actions, ACTION * horizon), np.float16)
    for i in range(seeds):  # one at a time: a temporary of the whole would be the peak of the memory
        bank[i] = np.random.default_rng(i).random(bank.shape[1:], np.float32)
    shape = (tasks, rows)
    arrays = (-jnp.ones(shape), jnp.full(shape, 0.99), jnp.asarray(bank))
    return Dataset(*random_rows(rows, horizon), *arrays, jnp.asarray(rows))


def agent(args: Args, critic: str) -> evor_infer.Agent:
    """An untrained agent."""
    policy = FlowPolicy(OBSERVATION, ACTION, width=args.width, key=jax.random.key(0))
    network = FlowCritic(OBSERVATION, ACTION, kind=critic, width=args.width, head_width=64, key=jax.random.key(1))
    standardizer = Standardizer(jnp.zeros(OBSERVATION), jnp.ones(OBSERVATION))
    axis = affine_axis(-90.0, 25.0, low=-100.0, high=0.0)
    return evor_infer.Agent(policy, network, standardizer, axis)


def act_case(name: str, params: evor_infer.Agent, batch: int, settings: evor_infer.Extraction) -> Case:
    """One decision in each of `batch` observations. `features` of the policy is computed once per observation, of the
    critic once per candidate; velocities once per evaluation of the field."""
    observations = random_rows(batch)[0][:batch]
    key = jax.random.key(0)
    act, compile_s = compiled(evor_infer._act, params, observations, settings, key=key)
    evaluations = settings.ode.evaluations
    whole, _ = policy_macs(params.policy)
    shared = OBSERVATION * params.policy.mlp.hidden[0].weight.shape[1]
    features, velocity, _ = critic_macs(params.critic)
    macs = shared + settings.num_actions * evaluations * (whole - shared)
    if settings.num_actions > 1:
        macs += settings.num_actions * (features + settings.num_returns * evaluations * velocity)
    run = lambda: jax.block_until_ready(act(params, observations, settings, key=key))  # noqa: E731
    return Case(name, run, 1, 2.0 * batch * macs, compile_s)


def draw_case(name: str, params: evor_infer.Agent, batch: int, settings: evor_infer.Extraction) -> Case:
    """Only the candidates of `act_case`."""
    observations = random_rows(batch)[0][:batch]
    key = jax.random.key(0)
    draw, compile_s = compiled(evor_infer._sample_actions, params, observations, settings, key=key)
    whole, _ = policy_macs(params.policy)
    shared = OBSERVATION * params.policy.mlp.hidden[0].weight.shape[1]
    evaluations = settings.ode.evaluations
    flops = 2.0 * batch * (shared + settings.num_actions * evaluations * (whole - shared))
    return Case(name, lambda: jax.block_until_ready(draw(params, observations, settings, key=key)), 1, flops, compile_s)


# --- Groups ------------------------------------------------------------------------------------------------------


def stages(args: Args) -> list[dict[str, Any]]:
    """A gradient step of each stage: every target, critic and backup."""
    cases = [value_case(f"value {target}, {critic}", args, td_target=target, critic=critic)
             for critic in ("mlp", "trunk")
             for target in ("paper", "shared-noise", "independent-noise", "velocity")]  # fmt: skip
    cases += [value_case("value shared-noise, mlp, 3 flow steps", args, flow_steps=3, critic="mlp")]
    cases += [value_case("value shared-noise, trunk, 3 flow steps", args, flow_steps=3, critic="trunk")]
    cases += [
        value_case(f"value shared-noise, {critic}, {backup} backup", args, critic=critic, next_action=backup)
        for critic in ("mlp", "trunk")
        for backup in ("dataset", "softmax")
    ]
    return measure("stages", cases, args)


def baselines(args: Args) -> list[dict[str, Any]]:
    """A gradient step of each line of results/baselines, under that line's name, and of QC as published."""
    cases = []

    def add(method: str, horizon: int = 5, n: int = 0, **changes: Any) -> None:
        backup = dict(next_action="softmax", num_next_actions=n) if n else {}
        name = f"{method}, {f'best of {n}' if n else 'base'}, horizon {horizon}"
        rows = min(args.rows, 100_000)  # a bank of 32 chunks for each of 1M rows is large
        cases.append(value_case(name, args, rows=rows, horizon=horizon, **backup, **changes))

    for n in (0, 4):
        for target in ("paper", "shared-noise"):
            add(f"{target}, trunk", n=n, td_target=target, critic="trunk")
        for kind in ("scalar", "c51", "qr"):
            add(kind, n=n, learner=critics, critic=kind)
    for n in (2, 8):
        add("shared-noise, trunk", n=n, critic="trunk")
        add("scalar", n=n, learner=critics, critic="scalar")
    for horizon, n in ((1, 4), (1, 32), (5, 32)):
        add("QC, frozen policy", horizon, n, learner=critics, settings_of=qc, policy="frozen")
        add("QC, joint policy", horizon, n, learner=qc, policy="joint")
    return measure("baselines", cases, args)


def products(weights: list[Array]) -> list[Array]:
    """Of a BC step: forward, then for each layer the products for its weights and for its inputs, and nothing else."""
    wide = jnp.ones((evor_bc.Args.batch_size, OBSERVATION + ACTION + 1))
    inputs = [wide]
    for w in weights:
        inputs.append(inputs[-1] @ w)
    back, out = inputs.pop(), []
    for w, x in zip(reversed(weights), reversed(inputs), strict=True):
        out.append(w - 1e-9 * (x.T @ back))
        back = back @ w.T if x is not wide else back
    return out[::-1]


def activations(depth: int, x: Array) -> Array:
    """Forward and backward, one after the other."""
    for _ in range(depth):
        x, back = jax.vjp(jax.nn.gelu, x)
        x = x + 1e-9 * back(x)[0]
    return x


def profile(args: Args) -> list[dict[str, Any]]:
    """Where the time of a BC step goes: its products alone, its gradient, the activations, the optimiser; and replicas
    as one batched product instead of one after the other."""
    settings = evor_bc.Args(width=args.width, steps_per_call=args.steps)
    state = evor_bc.init_state(settings, Sizes(OBSERVATION, ACTION, 1), key=jax.random.key(0))
    observations, actions, _ = (array[: settings.batch_size] for array in random_rows(args.rows))
    macs, first = policy_macs(state.policy)
    flops = 2.0 * settings.batch_size * (3 * macs - first)
    layers = [layer.weight for layer in (*state.policy.mlp.hidden, state.policy.mlp.output)]

    def descend(policy):
        gradient = jax.grad(evor_bc.bc_loss)(policy, observations, actions, key=jax.random.key(0))
        return jax.tree.map(lambda p, g: p - 1e-9 * g, policy, gradient)

    def adam(carry):
        policy, opt_state = carry
        updates, opt_state = evor_bc.make_optimizer(settings).update(policy, opt_state)
        return optax.apply_updates(policy, updates), opt_state

    def repeated(name, function, start, flops=0.0):
        loop = jax.jit(lambda x: jax.lax.scan(lambda x, _: (function(x), None), x, length=args.steps)[0])
        return Case(name, lambda: jax.block_until_ready(loop(start)), args.steps, flops)

    hidden = jax.random.normal(jax.random.key(0), (settings.batch_size, args.width))
    cases = [
        repeated("products of a BC step alone", products, layers, flops),
        repeated("gradient of a BC step", descend, state.policy, flops),
        repeated("Adam alone", adam, (state.policy, state.opt_state)),
        repeated("GELU of all layers, forward and backward", functools.partial(activations, settings.depth), hidden),
        bc_case("BC, 5 replicas as trained", args, replicas=5),
    ]
    keys = jax.random.split(jax.random.key(0), 5)
    many = stack_replicas(lambda key: evor_bc.init_state(settings, Sizes(OBSERVATION, ACTION, 1), key=key), keys)
    dataset, replicas_of_keys = bc_data(args.rows), bc_replicas(keys)
    step = jax.vmap(lambda state, replica: evor_bc.train_step(settings, state, dataset, replica)[0])
    batched = repeated(
        "BC, 5 replicas as batched products", lambda state: step(state, replicas_of_keys), many, 5 * flops
    )
    return measure("profile", [*cases, batched], args)


def replicas(args: Args) -> list[dict[str, Any]]:
    """Milliseconds per step of all replicas together; tasks x seeds as square as they divide."""
    cases = []
    for count in args.replicas:
        seeds = max(n for n in range(1, int(count**0.5) + 1) if count % n == 0)
        shape = dict(tasks=count // seeds, seeds=seeds)
        cases.append(
            value_case(f"value paper, trunk, {count} replicas", args, td_target="paper", critic="trunk", **shape)
        )
    rows = measure("replicas", cases, args)
    return rows + measure("BC replicas", [bc_case(f"BC, {n} replicas", args, replicas=n) for n in args.replicas], args)


def data(args: Args) -> list[dict[str, Any]]:
    """Growth with the dataset."""
    sizes = [n for n in (10_000, 100_000, 1_000_000) if n <= args.rows] or [args.rows]
    cases = [
        value_case(f"value paper, trunk, {n} rows", args, rows=n, td_target="paper", critic="trunk") for n in sizes
    ]
    return measure("data", cases, args)


def inference(args: Args) -> list[dict[str, Any]]:
    """One decision: N_pi x N, beside drawing the candidates alone."""
    rows = []
    for batch, critic in itertools.product((1, 16), ("mlp", "trunk")):
        params = agent(args, critic)
        most = evor_infer.Extraction(num_actions=32, num_returns=32)
        cases = [draw_case("draw 32 candidates", params, batch, most)]
        grid = [(1, 1)] + [(a, r) for a in (8, 32, 64) for r in (1, 8, 32)]
        cases += [
            act_case(f"act, N_pi {a}, N {r}", params, batch, dataclasses.replace(most, num_actions=a, num_returns=r))
            for a, r in (grid if batch == 1 or critic == "trunk" else [(32, 32)])
        ]
        rows += measure(f"inference, {critic}, batch {batch}", cases, args)
    return rows


def solvers(args: Args) -> list[dict[str, Any]]:
    """One decision with each solver at equal cost."""
    params = agent(args, "trunk")
    choices = (("euler", 10), ("midpoint", 5))
    cases = [
        act_case(
            f"act, N_pi 32, N 16, {steps} steps of {solver}", params, 16,
            evor_infer.Extraction(num_actions=32, num_returns=16, flow_steps=steps, solver=solver),
        )
        for solver, steps in choices
    ]  # fmt: skip
    return measure("solvers", cases, args)


def run(args: Args) -> list[dict[str, Any]]:
    """Compilations of a whole run of stages 1 and 2 with two replicas, four calls and two checkpoints each."""
    before = evor_bc.train_chunk._cache_size(), evor_value.train_chunk._cache_size()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.npz"
        rng = np.random.default_rng(0)
        count = 400
        np.savez(
            path,
            observations=rng.normal(size=(count, 3)).astype(np.float32),
            actions=rng.uniform(-1, 1, (count, 2)).astype(np.float32),
            terminals=np.arange(count) % 40 == 39,
            rewards=-np.ones(count, np.float32),
        )
        settings = dict(dataset=path, env="tiny", run_dir=Path(folder) / "run", seeds=2, width=32, depth=2)
        settings |= dict(batch_size=32, steps=200, steps_per_call=50, save_every=100)
        evor_bc.main(evor_bc.Args(**settings))
        evor_value.main(evor_value.Args(**settings))
    return [
        number("run", "compilations of BC training", evor_bc.train_chunk._cache_size() - before[0], ""),
        number("run", "compilations of value training", evor_value.train_chunk._cache_size() - before[1], ""),
    ]


def step_alone(job: tuple[int, int]) -> tuple[int, float]:
    """Steps one environment with random actions; returns steps and seconds, without building it."""
    seed, steps = job
    env = make_env(GYM_ID)
    seeded_reset(env, seed)
    actions = np.random.default_rng(seed).uniform(-1, 1, (steps, ACTION)).astype(np.float32)
    began = time.perf_counter()
    for action in actions:
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            seeded_reset(env, seed)
    return steps, time.perf_counter() - began


def evaluation(args: Args) -> list[dict[str, Any]]:
    """Environment steps per second of an evaluation, beside as many processes that only step."""
    cores, steps = num_cores(), 100 if args.quick else 2_000
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        bare = sum(n / seconds for n, seconds in pool.map(step_alone, [(i, steps) for i in range(cores)], chunksize=1))
    rows = [number("evaluation", f"bare stepping, {cores} processes", bare, "steps/s")]
    agents = jax.tree.map(lambda x: jnp.stack([x]), agent(args, "trunk"))
    count = cores if args.quick else 4 * cores
    for horizon in (1, 5):
        policy = FlowPolicy(OBSERVATION, ACTION * horizon, width=args.width, key=jax.random.key(0))
        sizes = dict(kind="trunk", width=args.width, head_width=64)
        critic = FlowCritic(OBSERVATION, ACTION * horizon, **sizes, key=jax.random.key(1))
        networks = jax.tree.map(lambda x: jnp.stack([x]), dict(policy=policy, critic=critic))
        chunked = dataclasses.replace(agents, **networks, horizon=horizon)
        with Episodes([GYM_ID], num_episodes=count, horizon=horizon) as episodes:
            for num_actions in (1, 8, 32):
                settings = evor_infer.Extraction(num_actions=num_actions, num_returns=16)
                seconds = []
                for _ in range(2):  # the first one builds environments and compiles
                    began = time.perf_counter()
                    rows = play(chunked, episodes, settings, pairs=[(2, 0)], seed=0)
                    seconds.append(time.perf_counter() - began)
                rate = sum(row["length"] for row in rows) / seconds[-1]
                name = f"N_pi {num_actions}, N 16, horizon {horizon}"
                rows.append(number("evaluation", name, rate, "steps/s"))
                rows.append(number("evaluation", f"{name}: of bare stepping", 100 * rate / bare, "%"))
                rows.append(number("evaluation", f"{name}: policy's share of time", 100 * episodes.policy_share, "%"))
    return rows


def collection(args: Args) -> list[dict[str, Any]]:
    """Collected steps per second of one process, and the share of that time which the environment takes by itself.

    The share, not a ratio to random actions: how long MuJoCo takes depends on what touches what.
    """
    rows = []
    for env_name in ("cube-double-play", "scene-noisy", "puzzle-3x3-play", "pointmaze-large-navigate"):
        recipe = collect.recipe_of(f"{env_name}-v0")
        recipe = recipe._replace(rows=50) if args.quick else recipe
        collect.collect_episode(recipe, 0, 0)  # builds the environment
        env, _ = collect._environment(recipe)
        stepping, step = 0.0, env.step

        def timed(action, step=step):
            nonlocal stepping
            began = time.perf_counter()
            result = step(action)
            stepping += time.perf_counter() - began
            return result

        env.step = timed
        began = time.perf_counter()
        episodes = [collect.collect_episode(recipe, 0, number) for number in range(args.rounds)]
        seconds = time.perf_counter() - began
        count = sum(len(episode["actions"]) for episode in episodes)
        rows.append(number("collection", f"{env_name}, one process", count / seconds, "steps/s"))
        rows.append(number("collection", f"{env_name}: environment's share", 100 * stepping / seconds, "%"))
    return rows


def memory(args: Args) -> list[dict[str, Any]]:
    """Peak host memory of a process that holds the dataset and trains 25 replicas on it."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return [number("memory", name, value, "GiB") for name, value in pool.apply(train_25, (args,)).items()]


def train_25(args: Args) -> dict[str, float]:
    """Peak resident GiB: before, and after value training of 5 tasks x 5 seeds."""
    before = peak_gib()
    value_case("", args, tasks=5, seeds=5, critic="trunk").run()
    peaks = {"imports": before, f"25 replicas, {args.rows:,} rows": peak_gib()}
    device = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        peaks["25 replicas, on the device"] = device["peak_bytes_in_use"] / 2**30
    return peaks


def peak_gib() -> float:
    """Peak resident memory of this process. (`getrusage` would count what its parent held when it was spawned.)"""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# --- Report ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    device = jax.devices()[0]
    return dict(
        cpu=model,
        cores=num_cores(),
        device=f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        git_revision=git_revision(),
        **package_versions(),
    )


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The rows as Markdown, one table per kind."""
    lines = [f"{about['cpu']}, {about['cores']} cores; device: {about['device']}; jax {about['jax']}.", ""]
    lines += ["| group | case | ms | GFLOP | of the product's rate | x BC | x first of group | compile s |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        if row["ms"] != "":
            share = f"{row['peak_share']:.0%}" if row["gflop"] else ""
            first = "" if row["to_first"] == "" else f"{row['to_first']:.2f}"
            lines.append(
                f"| {row['group']} | {row['case']} | {row['ms']:.2f} | {row['gflop']:.3f} | {share} "
                f"| {row['to_bc']:.2f} | {first} | {row['compile_s']:.1f} |"
            )
    lines += ["", "| group | case | value | unit |", "|---|---|---|---|"]
    lines += [f"| {r['group']} | {r['case']} | {r['value']:.2f} | {r['unit']} |" for r in rows if r["ms"] == ""]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Growth with replicas, with N and with the dataset."""

    def points(group: str, pattern: Callable[[str], float | None]) -> tuple[list[float], list[float]]:
        pairs = [(pattern(r["case"]), r["ms"]) for r in rows if r["group"] == group]
        pairs = sorted((x, y) for x, y in pairs if x is not None)
        return [x for x, _ in pairs], [y for _, y in pairs]

    def after(word: str, start: str) -> Callable[[str], float | None]:
        return lambda case: float(case.split(word)[1].split()[0]) if word in case and case.startswith(start) else None

    figure, axes = figures.subplots(1, 3, width=12.0, height=3.5)
    for group, start, word in (("replicas", "value", "trunk, "), ("BC replicas", "BC", "BC, ")):
        axes[0][0].plot(*points(group, after(word, start)), marker="o", label=start)
    axes[0][0].set(xlabel="replicas", ylabel="ms per step of all replicas")
    for critic in ("mlp", "trunk"):
        group = f"inference, {critic}, batch 1"
        axes[0][1].plot(*points(group, after(" N ", "act, N_pi 32")), marker="o", label=critic)
    axes[0][1].set(xlabel="N, returns per candidate", ylabel="ms per decision, N_pi = 32", xscale="log")
    axes[0][2].plot(*points("data", after("trunk, ", "value")), marker="o", label="value, paper, trunk")
    axes[0][2].set(xlabel="transitions in the dataset", ylabel="ms per step", xscale="log")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.legend(fontsize=8)
    figures.save(figure, path)


GROUPS = dict(
    stages=stages, baselines=baselines, profile=profile, replicas=replicas, data=data, inference=inference,
    solvers=solvers, run=run, evaluation=evaluation, collection=collection, memory=memory,
)  # fmt: skip


def main(args: Args) -> list[dict[str, Any]]:
    """Measures and writes the table; returns its rows."""
    unknown = set(args.groups) - set(GROUPS)
    if unknown or not args.groups:
        raise UserError(f"--groups {' '.join(sorted(unknown))}: choose among {', '.join(GROUPS)}.")
    if set(args.groups) != set(GROUPS) and args.out == Args.out:
        raise UserError("a part of the groups would replace the whole table: pass another --out.")
    use_cores(num_cores())
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows = [row for group in args.groups for row in GROUPS[group](args)]
    write_csv(args.out / "speed.csv", [*FIELDS, *about], [row | about for row in rows])
    (args.out / "speed.md").write_text(table(rows, about))
    draw(rows, args.out / "speed.png")
    print(f"rows: {args.out / 'speed.csv'}\ntable: {args.out / 'speed.md'}\nfigure: {args.out / 'speed.png'}")
    return rows


if __name__ == "__main__":
    run_cli(main, Args, PRESETS)
