"""How well, and how fast, flows and the baselines learn the law of the reward-to-go where it is known.

    python -m benchmarks.return_law

Trains critics on the probes of `benchmarks/probes.py`: stage 2's with each TD target, and the scalar critic, C51 and QR
of `baselines/critics.py`. Says, averaged over a probe's state-action pairs, and over seeds with their range,

    W1      the Wasserstein-1 distance to the exact law,
    Q*      the error of the log-mean-exp that stage 3 ranks actions by, at tau_R = 0.1 of the range of the laws and its
            default number of draws,

as shares of the range of the probe's laws (from their lowest to their highest atom), beside parameters and counted
FLOPs. For `paper` also the distance to N(Q, sigma^2), sigma the noise. With `--every` it does so over training, under
one learning-rate schedule (a number on the way is not that of a shorter training). Writes one row per probe, method,
seed and step to `--out`, with the table and the figure beside it; `--append` adds to what stands there, with no
`--methods` it only draws that anew.
"""

import dataclasses
import functools
import math
import time
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

import evor_infer
import evor_value
from baselines import critics
from benchmarks import probes
from common import figures
from common.cli import run_cli
from common.errors import UserError
from common.files import read_csv, write_csv
from common.flops import num_parameters, step_flops
from common.flow import Ode, Solver
from common.networks import Critic, stratified_normal
from common.provenance import git_revision, package_versions
from common.returns import AxisKind, ReturnAxis

FLOWS = get_args(evor_value.Target)
METHODS = (*FLOWS, "scalar", "c51", "qr")
RETURN_TEMPERATURE = 0.1  # of Q*
NUMBERS = dict.fromkeys(("w1", "w1_to_normal", "mean_error", "q_error", "mflop"), float)
NUMBERS |= dict.fromkeys(("parameters", "width", "step"), int)


@dataclasses.dataclass(frozen=True)
class Args:
    """Return-law accuracy of TD targets and baselines."""

    methods: tuple[str, ...] = METHODS
    """TD targets and baselines to compare."""
    probes: tuple[str, ...] = tuple(probe.name for probe in probes.PROBES)
    """Probes to train on."""
    critic: str = "trunk"
    """The flow's network: mlp or trunk."""
    head_width: int = 64
    """Units per hidden layer of the trunk critic's head."""
    head_depth: int = 3
    """Hidden layers of the trunk critic's head."""
    atoms: int = critics.Args.atoms
    """Atoms of C51."""
    quantiles: int = critics.Args.quantiles
    """Quantiles of QR."""
    huber: float = critics.Args.huber
    """Threshold of QR's Huber loss, on the return axis."""
    return_axis: AxisKind | None = None
    """The axis that laws are learned on; each method's default by default."""
    num_next_actions: int = 4
    """Actions per transition in the next-action bank."""
    copies: int = 400
    """Size of the data: transitions per unit of probability. Few of them leave sampling errors in the bank."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    steps: int = 10_000
    """Gradient steps."""
    every: int = 0
    """Gradient steps between measurements; 0 measures at the end alone."""
    width: int = 256
    """Units per hidden layer."""
    depth: int = 4
    """Hidden layers."""
    tau: float = 0.02
    """Polyak rate of the target network."""
    flow_steps: int = 5
    """Steps of the flow, in the bootstrap and at evaluation."""
    solver: Solver = "midpoint"
    """Its solver."""
    out: Path = Path("runs/tables/laws/methods.csv")
    """CSV file; the table and the figure go beside it."""
    append: bool = False
    """Add to the file that stands there: several settings in one table."""


def training_args(args: Args, method: str, probe: probes.Probe) -> evor_value.Args:
    """The settings of stage 2, or of a baseline."""
    settings = dict(
        width=args.width,
        depth=args.depth,
        head_width=args.head_width,
        head_depth=args.head_depth,
        num_next_actions=args.num_next_actions,
        steps=args.steps,
        steps_per_call=args.every or args.steps,
        flow_steps=args.flow_steps,
        solver=args.solver,
        return_axis=args.return_axis,
        tau=args.tau,
        learning_rate=1e-3,
        schedule="cosine",
    )
    if method in FLOWS:
        return evor_value.Args(**settings, td_target=method, critic=args.critic)
    direct = dict(atoms=args.atoms, quantiles=args.quantiles, huber=args.huber)
    return critics.Args(**settings, critic=method, **direct)


def q_errors(critic: Critic, axis: ReturnAxis, probe: probes.Probe, ode: Ode) -> np.ndarray:
    """|Q* - exact log-mean-exp|, averaged over the probe's queries; one number per seed."""
    temperature = RETURN_TEMPERATURE * probe.law_range
    noise = stratified_normal(evor_infer.Extraction().num_returns)
    score = functools.partial(evor_infer.score_one, temperature=temperature, ode=ode)
    scores = jax.jit(jax.vmap(score, (0, 0, None, None, None)))
    errors = []
    for (state, action), (values, weights) in probe.laws.items():
        x, a = jax.nn.one_hot(state, probe.num_states), jnp.array([action])
        largest = max(values)
        exact = largest + temperature * math.log(np.dot(weights, np.exp((np.array(values) - largest) / temperature)))
        errors.append(np.abs(np.asarray(scores(critic, axis, x, a, noise)) - exact))
    return np.mean(errors, axis=0)


def measure(args: Args, critic: Critic, axis: ReturnAxis, probe: probes.Probe) -> dict[str, np.ndarray]:
    """Errors of trained critics as shares of the range of the probe's laws, each with one number per seed."""
    ode = Ode(args.flow_steps, args.solver)
    # What one standard deviation of the noise stands for on an affine axis.
    ends = jax.vmap(lambda a: a.to_environment(jnp.arange(2.0)))(axis)
    noise_std = float(ends[0, 1] - ends[0, 0])

    def mean_error(query):
        draws = probes.sample_returns(critic, axis, probe, query, ode=ode)
        return np.abs(draws.mean(axis=1) - np.dot(*probe.laws[query]))

    errors = dict(
        w1=probes.w1(critic, axis, probe, ode=ode),
        w1_to_normal=probes.w1(critic, axis, probe, ode=ode, noise_std=noise_std),
        mean_error=np.mean([mean_error(query) for query in probe.laws], axis=0),
        q_error=q_errors(critic, axis, probe, ode),
    )
    return {name: error / probe.law_range for name, error in errors.items()}


def rows_of(args: Args, method: str, probe: probes.Probe) -> list[dict[str, Any]]:
    """Trains a method on a probe with all seeds; one row per measurement and seed."""
    began = time.monotonic()
    settings = training_args(args, method, probe)
    fields = ("critic", "steps", "width", "depth", "head_width", "head_depth", "tau", "flow_steps", "solver")
    fields += ("num_next_actions", "copies", "atoms", "quantiles", "huber")
    common = dict(probe=probe.name, method=method, return_axis=settings.axis_kind)
    common |= {field: getattr(args, field) for field in fields}
    rows = []

    def report(step: int, state: Any, axis: ReturnAxis) -> None:
        one = jax.tree.map(lambda x: x[0], state.critic)
        size = dict(parameters=num_parameters(one), mflop=step_flops(settings, one) / 1e6)
        errors = measure(args, state.critic, axis, probe)
        versions = dict(git_revision=git_revision(), jax=package_versions()["jax"])
        for i, seed in enumerate(args.seeds):
            rows.append(common | dict(seed=seed, step=step) | {k: v[i] for k, v in errors.items()} | size | versions)

    learner = evor_value if method in FLOWS else critics
    probes.train_state(probe, settings, seeds=args.seeds, copies=args.copies, learner=learner, after_chunk=report)
    last = rows[-len(args.seeds) :]
    w1, mean, q = ([row[name] for row in last] for name in ("w1", "mean_error", "q_error"))
    print(
        f"{probe.name:<45} {method:<18} W1 {np.mean(w1):.2%} [{min(w1):.2%}, {max(w1):.2%}]  "
        f"mean off by {np.mean(mean):.2%}, Q* by {np.mean(q):.2%}  ({time.monotonic() - began:.0f} s)",
        flush=True,
    )
    return rows


def main(args: Args) -> list[dict[str, Any]]:
    """Runs the comparison; returns its rows."""
    known = {probe.name for probe in probes.PROBES}
    if not set(args.probes) <= known or not args.probes or not set(args.methods) <= set(METHODS):
        raise UserError(f"choose --methods among {', '.join(METHODS)} and --probes among {', '.join(sorted(known))}.")
    if not args.methods and not (args.append and args.out.is_file()):
        raise UserError(f"no --methods: only with --append, and where {args.out} stands already.")
    part = (set(args.probes), set(args.methods)) != (known, set(METHODS))
    if part and args.out == Args.out and not args.append:
        raise UserError("a part of the comparison would replace the whole table: pass another --out.")
    if args.every < 0 or (args.every and args.steps % args.every):
        raise UserError(f"--steps {args.steps} is no multiple of --every {args.every}: change one of them.")
    old = read_rows(args.out) if args.append and args.out.is_file() else []
    rows = write_rows(args.out, old, [])
    new: list[dict[str, Any]] = []
    for probe in (p for p in probes.PROBES if p.name in args.probes):
        for method in args.methods:
            new += rows_of(args, method, probe)
            rows = write_rows(args.out, old, new)  # what is measured stays if the rest is stopped
    report(rows, args.out)
    print(f"rows: {args.out}\ntable: {args.out.with_suffix('.md')}")
    return rows


def write_rows(path: Path, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes the new rows, and those old ones that they do not replace; returns them all."""
    measured = {identity(row) for row in new}
    rows = [row for row in old if identity(row) not in measured] + new
    if rows:
        write_csv(path, list(dict.fromkeys(field for row in rows for field in row)), rows)
    return rows


# --- Report ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier comparison, with numbers as numbers."""
    return [
        row | {key: kind(row[key]) if row.get(key) else "" for key, kind in NUMBERS.items()} for row in read_csv(path)
    ]


def label(row: dict[str, Any]) -> str:
    """What a line of the table is about."""
    words = [f"`{row['method']}`"]
    if row["method"] == "c51":
        words.append(f"{row['atoms']} atoms")
    elif row["method"] == "qr":
        words.append(f"{row['quantiles']} quantiles, Huber {float(row['huber']):g}")
    elif row["method"] != "scalar":
        words.append(row["critic"] + f" ({row['head_depth']} x {row['head_width']})" * (row["critic"] == "trunk"))
    usual = training_args(Args(), row["method"], probes.CHAIN)
    if row["return_axis"] != usual.axis_kind:
        words.append(f"axis: {row['return_axis']}")
    if (row["solver"], int(row["flow_steps"])) != (Args.solver, Args.flow_steps):
        words.append(f"{row['flow_steps']} {row['solver']} steps")
    unusual = dict(num_next_actions="K = {:g}", copies="{:,.0f} copies", tau="tau {:g}")
    words += [
        says.format(float(row[name])) for name, says in unusual.items() if float(row[name]) != getattr(Args, name)
    ]
    return ", ".join(words)


def setting(row: dict[str, Any]) -> tuple[str, str]:
    """A method, and the size of its network."""
    return label(row), f"{row['depth']} x {int(row['width'])}"


def identity(row: dict[str, Any]) -> tuple:
    """What a row measured; a second measurement takes its place."""
    return row["probe"], setting(row), int(row["seed"]), int(row["step"])


def table(rows: list[dict[str, Any]]) -> str:
    """The last measurements as a Markdown table: probes by methods."""
    last = {key: max(row["step"] for row in rows if setting(row) == key) for key in map(setting, rows)}
    rows = [row for row in rows if row["step"] == last[setting(row)]]
    seeds, steps = {int(row["seed"]) for row in rows}, " or ".join(sorted({f"{int(at):,}" for at in last.values()}))
    columns: list[tuple[str, list[dict[str, Any]], str]] = []
    for name, size in dict.fromkeys(setting(row) for row in rows):
        alike = [row for row in rows if setting(row) == (name, size)]
        columns.append((f"{name}, {size}", alike, "w1"))
        if alike[0]["method"] == "paper":
            columns.append((f"{name}, {size}: to N(Q, sigma^2)", alike, "w1_to_normal"))

    def line(first: str, cells: list[str]) -> str:
        return "| " + " | ".join([first, *cells]) + " |"

    def share(values: list[float]) -> str:
        return f"{np.mean(values):.2%} ({min(values):.2%} to {max(values):.2%})" if values else ""

    names = dict.fromkeys(row["probe"] for row in rows)
    return "\n".join(
        [
            f"W1 distance to the exact law of the reward-to-go, as a share of the range of the probe's laws: mean over "
            f"{len(seeds)} seeds (range), after {steps} steps. Q*: error of the log-mean-exp at tau_R = "
            f"{RETURN_TEMPERATURE:g} of that range, all probes.",
            "",
            line("probe", [name for name, _, _ in columns]),
            "|---|" + "---|" * len(columns),
            *(
                line(
                    name,
                    [share([row[column] for row in alike if row["probe"] == name]) for _, alike, column in columns],
                )
                for name in names
            ),
            line(
                "Q*",
                [
                    f"{np.mean([row['q_error'] for row in alike]):.2%}" if column == "w1" else ""
                    for _, alike, column in columns
                ],
            ),
            line("parameters", [f"{alike[0]['parameters']:,.0f}" for _, alike, _ in columns]),
            line("MFLOP per step", [f"{alike[0]['mflop']:,.3g}" for _, alike, _ in columns]),
            "",
        ]
    )


def report(rows: list[dict[str, Any]], path: Path) -> None:
    """Table and figure of the rows that stand in `path`, beside it."""
    path.with_suffix(".md").write_text(table(rows))
    draw(rows, path.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """W1 per probe: over training where it was measured, else against the number of parameters where that varies."""
    by_step = len({row["step"] for row in rows}) > 1
    sized = [row for row in rows if row.get("parameters")]
    if not by_step and len({row["width"] for row in sized}) < 2:
        return
    rows, axis_of = (rows, "step") if by_step else (sized, "parameters")
    names = list(dict.fromkeys(row["probe"] for row in rows))
    figure, axes = figures.subplots(1, len(names), width=5.0 * len(names), height=4.0)
    for axis, name in zip(axes[0], names, strict=True):
        for method, depth in dict.fromkeys((label(row), row["depth"]) for row in rows):
            points: dict[float, list[float]] = {}
            for row in rows:
                if (row["probe"], label(row), row["depth"]) == (name, method, depth):
                    points.setdefault(row[axis_of], []).append(row["w1"])
            x, y = sorted(points), [points[at] for at in sorted(points)]
            (drawn,) = axis.plot(
                x, [np.mean(w) for w in y], label=f"{method}, depth {depth}".replace("`", ""), marker=".", lw=1
            )
            axis.fill_between(x, [min(w) for w in y], [max(w) for w in y], color=drawn.get_color(), alpha=0.2, lw=0)
        xlabel = "gradient steps" if by_step else "parameters"
        axis.set(title=name, xlabel=xlabel, yscale="log", xscale="linear" if by_step else "log")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("W1 as a share of the range")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figures.save(figure, path)


if __name__ == "__main__":
    run_cli(main, Args)
