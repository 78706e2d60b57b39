"""How well each TD target learns the law of the reward-to-go, on probe problems where it is known.

    python -m benchmarks.return_law

Trains stage 2's critic with every target on every probe of `benchmarks/probes.py` and prints the Wasserstein-1
distance to the exact law, averaged over the probe's state-action pairs: mean and range over seeds. For `paper` it also
prints the distance to N(Q, sigma^2), sigma the noise, and the error of the mean. Writes one row per probe, target and
seed to `results/return_law.csv` with versions, and `results/return_law.md`.
"""

import dataclasses
import time
from pathlib import Path

import numpy as np

import evor_value
from benchmarks import probes
from common.errors import UserError, run_cli
from common.metrics import git_revision, package_versions, read_csv, write_csv
from common.networks import CRITIC_FIELDS

TARGETS = ("paper", "independent-noise", "shared-noise", "velocity")


@dataclasses.dataclass(frozen=True)
class Args:
    """Return-law accuracy of the TD targets."""

    targets: tuple[str, ...] = TARGETS
    """Targets to compare."""
    probes: tuple[str, ...] = tuple(probe.name for probe in probes.PROBES)
    """Probes to train on."""
    critic: str = "mlp"
    """mlp or trunk."""
    head_width: int = 64
    """Units per hidden layer of the trunk critic's head."""
    head_depth: int = 3
    """Hidden layers of the trunk critic's head."""
    num_next_actions: int = 4
    """Actions per transition in the next-action bank."""
    copies: int = 400
    """Size of the data: transitions per unit of probability. Few of them leave sampling errors in the bank."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds."""
    steps: int = 3_000
    """Gradient steps."""
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
    """CSV file; the table goes beside it."""
    append: bool = False
    """Add to the file that stands there: several settings in one table."""


def return_range(probe: probes.Probe) -> float:
    """Length of the interval of possible returns: the `return_width` at which the noise has standard deviation 1."""
    rewards = np.array([[t[3] for t in probe.transitions]])
    low, high = probes.data.return_bounds(rewards, probe.discount)[0]
    return float(high - low)


def main(args: Args) -> list[dict]:
    """Runs the comparison; returns its rows."""
    known = {probe.name for probe in probes.PROBES}
    if not set(args.probes) <= known or not args.probes or not set(args.targets) <= set(TARGETS):
        raise UserError(f"choose --targets among {', '.join(TARGETS)} and --probes among {', '.join(sorted(known))}.")
    if (set(args.probes), set(args.targets)) != (known, set(TARGETS)) and args.out == Args.out:
        raise UserError("a part of the comparison would replace the whole table: pass another --out.")
    rows = []
    for probe in (p for p in probes.PROBES if p.name in args.probes):
        for target in args.targets:
            began = time.monotonic()
            train_args = evor_value.Args(
                td_target=target,
                critic=args.critic,
                **{field: getattr(args, field) for field in CRITIC_FIELDS},
                num_next_actions=args.num_next_actions,
                steps=args.steps,
                chunk=args.steps,
                target_steps=args.target_steps,
                learning_rate=1e-3,
                schedule="cosine",
                return_width=return_range(probe) / args.noise_std,
            )
            critic, scale = probes.train(probe, train_args, seeds=args.seeds, copies=args.copies)
            exact = probes.w1(critic, scale, probe, flow_steps=args.flow_steps)
            normal = probes.w1(critic, scale, probe, flow_steps=args.flow_steps, noise_std=args.noise_std)
            mean_error = np.mean(
                [
                    np.abs(
                        probes.sample_returns(critic, scale, probe, q, flow_steps=args.flow_steps).mean(axis=1)
                        - np.dot(*probe.laws[q])
                    )
                    for q in probe.laws
                ],
                axis=0,
            )
            settings = dict(
                probe=probe.name, target=target, critic=args.critic, steps=args.steps, width=args.width,
                depth=args.depth, head_width=args.head_width, head_depth=args.head_depth, noise_std=args.noise_std,
                target_steps=args.target_steps, flow_steps=args.flow_steps, num_next_actions=args.num_next_actions,
                copies=args.copies,
            )  # fmt: skip
            versions = dict(git_revision=git_revision(), jax=package_versions()["jax"])
            for i, seed in enumerate(args.seeds):
                numbers = dict(seed=seed, w1=exact[i], w1_to_normal=normal[i], mean_error=mean_error[i])
                rows.append(settings | numbers | versions)
            print(
                f"{probe.name:<45} {target:<18} W1 {exact.mean():.3f} [{exact.min():.3f}, {exact.max():.3f}]  "
                f"to N(Q, sigma^2) {normal.mean():.3f}  mean off by {mean_error.mean():.3f}  "
                f"({time.monotonic() - began:.0f} s)",
                flush=True,
            )
    if args.append and args.out.is_file():
        rows = read_rows(args.out) + rows
    write_csv(args.out, list(rows[0]), rows)
    args.out.with_suffix(".md").write_text(table(args, rows))
    print(f"rows: {args.out}\ntable: {args.out.with_suffix('.md')}")
    return rows


def read_rows(path: Path) -> list[dict]:
    """Rows of an earlier comparison, with their distances as numbers."""
    numbers = ("w1", "w1_to_normal", "mean_error")
    return [{"copies": "400"} | row | {key: float(row[key]) for key in numbers} for row in read_csv(path)]


def setting(row: dict) -> str:
    """What a column of the table is about."""
    head = f" {row['head_depth']} x {row['head_width']}" if row["critic"] == "trunk" else ""
    size = f", {int(row['copies']):,} copies" if int(row["copies"]) != Args.copies else ""
    return f"`{row['target']}`, {row['critic']}{head}, K = {row['num_next_actions']}{size}"


def table(args: Args, rows: list[dict]) -> str:
    """The comparison as a Markdown table: probes by targets and settings."""
    settings = list(dict.fromkeys(setting(row) for row in rows))
    names = list(dict.fromkeys(row["probe"] for row in rows))
    published = [row for row in rows if row["target"] == "paper"]
    columns = settings + ["`paper` to N(Q, sigma^2)"] * bool(published)
    lines = [
        f"W1 distance to the exact law of the reward-to-go, mean over {len(args.seeds)} seeds (range). "
        f"{args.depth} x {args.width}, {args.steps:,} steps, noise standard deviation {args.noise_std:g}, "
        f"{args.flow_steps} Euler steps; K next actions per transition.",
        "",
        "| probe | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in names:
        cells = []
        for column in settings:
            w1 = [row["w1"] for row in rows if row["probe"] == name and setting(row) == column]
            cells.append(f"{np.mean(w1):.3f} ({min(w1):.3f} to {max(w1):.3f})" if w1 else "")
        if published:
            cells.append(f"{np.mean([row['w1_to_normal'] for row in published if row['probe'] == name]):.3f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_cli(main, Args)
