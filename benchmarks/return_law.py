"""How well, and how fast, flows and the baselines learn the law of the reward-to-go where it is known.

    python -m benchmarks.return_law

Trains critics on the probes of `benchmarks/probes.py`: stage 2's with each TD target, and the scalar critic, C51 and QR
of `baselines/critics.py`. Says, averaged over a probe's state-action pairs, and over seeds with their range,

    W1      the Wasserstein-1 distance to the exact law,
    Q*      the error of the log-mean-exp that stage 3 ranks actions by, at tau_R = 0.1 of the return range and its
            default number of draws,

in the probe's units, beside parameters and counted FLOPs. For `paper` also the distance to N(Q, sigma^2), sigma the
noise. With `--every` it does so over training, under one learning-rate schedule (a number on the way is not that of a
shorter training). Writes one row per probe, method, seed and step to `--out`, with the
table and the figure beside it; `--append` adds to what stands there, with no `--methods` it only draws that anew.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import evor_infer
import evor_value
from baselines import critics
from benchmarks import probes
from benchmarks.flops import num_parameters, step_flops
from common import figures
from common.errors import UserError, run_cli
from common.metrics import git_revision, package_versions, read_csv, write_csv
from common.networks import CRITIC_FIELDS, Critic, ReturnScale, stratified_normal

FLOWS = ("paper", "independent-noise", "shared-noise", "velocity")
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
    critic: str = "mlp"
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
    """Threshold of QR's Huber loss, as a fraction of the return range."""
    num_next_actions: int = 4
    """Actions per transition in the next-action bank."""
    copies: int = 400
    """Size of the data: transitions per unit of probability. Few of them leave sampling errors in the bank."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    steps: int = 3_000
    """Gradient steps."""
    every: int = 0
    """Gradient steps between measurements; 0 measures at the end alone."""
    width: int = 128
    """Units per hidden layer."""
    depth: int = 4
    """Hidden layers."""
    noise_std: float = 1.0
    """Return, in the probe's units, that one standard deviation of noise stands for."""
    target_steps: int = 10
    """Euler steps of the bootstrap."""
    flow_steps: int = 10
    """Euler steps at evaluation."""
    out: Path = Path("results/return_law.csv")
    """CSV file; the table and the figure go beside it."""
    append: bool = False
    """Add to the file that stands there: several settings in one table."""


def return_range(probe: probes.Probe) -> float:
    """Length of the interval of possible returns: the `return_width` at which the noise has standard deviation 1."""
    rewards = np.array([[t[3] for t in probe.transitions]])
    low, high = probes.data.return_bounds(rewards, probe.discount)[0]
    return float(high - low)


def training_args(args: Args, method: str, probe: probes.Probe) -> evor_value.Args:
    """The settings of stage 2, or of a baseline."""
    settings = dict(
        **{field: getattr(args, field) for field in CRITIC_FIELDS},
        num_next_actions=args.num_next_actions,
        steps=args.steps,
        chunk=args.every or args.steps,
        target_steps=args.target_steps,
        learning_rate=1e-3,
        schedule="cosine",
        return_width=return_range(probe) / args.noise_std,
    )
    if method in FLOWS:
        return evor_value.Args(**settings, td_target=method, critic=args.critic)
    direct = dict(atoms=args.atoms, quantiles=args.quantiles, huber=args.huber)
    return critics.Args(**settings, critic=method, **direct)


def q_errors(critic: Critic, scale: ReturnScale, probe: probes.Probe, *, flow_steps: int) -> np.ndarray:
    """|Q* - exact log-mean-exp|, averaged over the probe's queries; one number per seed."""
    temperature = RETURN_TEMPERATURE * return_range(probe)
    errors = []
    for (state, action), (values, weights) in probe.laws.items():
        x, a = jax.nn.one_hot(state, probe.num_states), jax.numpy.array([action])
        noise = stratified_normal(evor_infer.Extraction().num_returns)

        def score(critic, scale, x=x, a=a, noise=noise):
            limit = dict(temperature=temperature / scale.scale, flow_steps=flow_steps)
            return scale.to_environment(evor_infer.score_one(critic, x, a, noise, **limit))

        exact = temperature * math.log(np.dot(weights, np.exp(np.array(values) / temperature)))
        errors.append(np.abs(np.asarray(jax.vmap(score)(critic, scale)) - exact))
    return np.mean(errors, axis=0)


def measure(args: Args, critic: Critic, scale: ReturnScale, probe: probes.Probe) -> dict[str, np.ndarray]:
    """Errors of trained critics, each with one number per seed."""

    def mean_error(query):
        draws = probes.sample_returns(critic, scale, probe, query, flow_steps=args.flow_steps)
        return np.abs(draws.mean(axis=1) - np.dot(*probe.laws[query]))

    return dict(
        w1=probes.w1(critic, scale, probe, flow_steps=args.flow_steps),
        w1_to_normal=probes.w1(critic, scale, probe, flow_steps=args.flow_steps, noise_std=args.noise_std),
        mean_error=np.mean([mean_error(query) for query in probe.laws], axis=0),
        q_error=q_errors(critic, scale, probe, flow_steps=args.flow_steps),
    )


def rows_of(args: Args, method: str, probe: probes.Probe) -> list[dict[str, Any]]:
    """Trains a method on a probe with all seeds; one row per measurement and seed."""
    began = time.monotonic()
    settings = training_args(args, method, probe)
    fields = ("critic", "steps", "width", "depth", "head_width", "head_depth", "noise_std", "target_steps")
    fields += ("flow_steps", "num_next_actions", "copies", "atoms", "quantiles", "huber")
    common = dict(probe=probe.name, method=method) | {field: getattr(args, field) for field in fields}
    rows = []

    def report(step: int, state: Any, scale: ReturnScale) -> None:
        one = jax.tree.map(lambda x: x[0], state.critic)
        size = dict(parameters=num_parameters(one), mflop=step_flops(settings, one) / 1e6)
        errors = measure(args, state.critic, scale, probe)
        versions = dict(git_revision=git_revision(), jax=package_versions()["jax"])
        for i, seed in enumerate(args.seeds):
            rows.append(common | dict(seed=seed, step=step) | {k: v[i] for k, v in errors.items()} | size | versions)

    learner = evor_value if method in FLOWS else critics
    probes.train_state(probe, settings, seeds=args.seeds, copies=args.copies, learner=learner, after_chunk=report)
    last = rows[-len(args.seeds) :]
    w1, mean, q = ([row[name] for row in last] for name in ("w1", "mean_error", "q_error"))
    print(
        f"{probe.name:<45} {method:<18} W1 {np.mean(w1):.3f} [{min(w1):.3f}, {max(w1):.3f}]  "
        f"mean off by {np.mean(mean):.3f}, Q* by {np.mean(q):.3f}  ({time.monotonic() - began:.0f} s)",
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
    rows: list[dict[str, Any]] = []
    for probe in (p for p in probes.PROBES if p.name in args.probes):
        for method in args.methods:
            rows += rows_of(args, method, probe)
    measured = {identity(row) for row in rows}
    rows = [row for row in old if identity(row) not in measured] + rows
    fields = list(dict.fromkeys(field for row in rows for field in row))
    write_csv(args.out, fields, rows)
    report(rows, args.out)
    print(f"rows: {args.out}\ntable: {args.out.with_suffix('.md')}")
    return rows


# --- Report ------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier comparison, with numbers as numbers."""
    rows = []
    for row in read_csv(path):
        missing = {
            "copies": "400",
            "num_next_actions": "4",
            "head_width": "64",
            "head_depth": "3",
            "step": row["steps"],
        }
        row = missing | row  # of the first files, which had fewer columns
        rows.append(row | {key: kind(row[key]) if row.get(key) else "" for key, kind in NUMBERS.items()})
    return rows


def label(row: dict[str, Any]) -> str:
    """What a line of the table is about."""
    words = [f"`{row['method']}`"]
    if row["method"] == "c51":
        words.append(f"{row['atoms']} atoms")
    elif row["method"] == "qr":
        words.append(f"{row['quantiles']} quantiles, Huber {float(row['huber']):g}")
    elif row["method"] != "scalar":
        words.append(row["critic"] + f" ({row['head_depth']} x {row['head_width']})" * (row["critic"] == "trunk"))
    unusual = dict(
        num_next_actions="K = {:g}", copies="{:,.0f} copies", noise_std="noise {:g}",
        target_steps="{:g} Euler steps in the target", flow_steps="{:g} Euler steps",
    )  # fmt: skip
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
    """The last measurements as a Markdown table: methods by probes."""
    last = {key: max(row["step"] for row in rows if setting(row) == key) for key in map(setting, rows)}
    rows = [row for row in rows if row["step"] == last[setting(row)]]
    names = list(dict.fromkeys(row["probe"] for row in rows))
    seeds, steps = {int(row["seed"]) for row in rows}, " or ".join(sorted({f"{int(at):,}" for at in last.values()}))
    lines = [
        f"W1 distance to the exact law of the reward-to-go: mean over {len(seeds)} seeds (range), after {steps} "
        f"steps. Where nothing else is said: noise standard deviation {Args.noise_std:g}, {Args.flow_steps} Euler "
        f"steps, K = {Args.num_next_actions} next actions per transition. Q*: error of the log-mean-exp, all "
        f"probes, at tau_R = {RETURN_TEMPERATURE:g} of the return range.",
        "",
        "| method | hidden layers | parameters | MFLOP per step | " + " | ".join(names) + " | Q* |",
        "|---|---|---|---|" + "---|" * len(names) + "---|",
    ]

    def line(name: str, size: str, found: list[dict[str, Any]], column: str) -> str:
        size_of, cost_of = found[0].get("parameters"), found[0].get("mflop")
        cost = [f"{size_of:,.0f}" if size_of else "", f"{cost_of:,.3g}" if cost_of else ""]
        cells = []
        for probe in names:
            w1 = [row[column] for row in found if row["probe"] == probe]
            cells.append(f"{np.mean(w1):.3f} ({min(w1):.3f} to {max(w1):.3f})" if w1 else "")
        errors = [row["q_error"] for row in found if row.get("q_error", "") != ""]
        cells.append(f"{np.mean(errors):.3f}" if errors else "")
        return "| " + " | ".join([name, size, *cost, *cells]) + " |"

    for name, size in dict.fromkeys(setting(row) for row in rows):
        found = [row for row in rows if setting(row) == (name, size)]
        lines.append(line(name, size, found, "w1"))
        if found[0]["method"] == "paper":
            lines.append(
                line("its distance to N(Q, sigma^2)", size, [f | dict(q_error="") for f in found], "w1_to_normal")
            )
    return "\n".join(lines) + "\n"


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
    axes[0][0].set_ylabel("W1 to the exact law")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figures.save(figure, path)


if __name__ == "__main__":
    run_cli(main, Args)
