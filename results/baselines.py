"""EVOR, its critic without the flow, and QC: one task, one base policy, one budget, in one table.

    python -m benchmarks.speed --groups baselines --out runs/speed-baselines
    python -m results.baselines --runs runs/baselines/* --speed runs/speed-baselines/speed.csv

Runs that differ in their seed alone are one line: successes of all their episodes, with Wilson's 95% interval. (The
interval knows of episodes, not of seeds; these stand beside it.) Milliseconds and the share of the machine's rate are
those of `benchmarks.speed`, where all steps were timed in turn. Writes `baselines_episodes.csv` (one row per evaluation
episode), `baselines_runs.csv` (one per run and seed, with its settings, data and versions) and `baselines.md` (the
table, with the words of `baselines_words.md`) beside this file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import evor_value
from benchmarks.flops import step_flops
from common.errors import UserError, run_cli
from common.metrics import read_csv, write_csv
from common.networks import make_critic, make_policy
from evor_infer import summarise
from results.preview import HERE, gather, refuse_mixtures


@dataclasses.dataclass(frozen=True)
class Args:
    """Gather runs of stage 2 and of the baselines into one table."""

    runs: tuple[Path, ...] = ()
    """Run directories."""
    speed: Path | None = None
    """speed.csv of `benchmarks.speed --groups baselines`."""
    name: str = "baselines"
    """Prefix of the files."""


def cost(config: dict[str, Any]) -> dict[str, float]:
    """Parameters of the reward model, and MFLOP per gradient step."""
    args, key = config["args"], jax.random.key(0)
    critic = make_critic(config, key=key)
    policy = make_policy(config, key=key) if config.get("own_policy") else None
    known = {field.name for field in dataclasses.fields(evor_value.Args)}
    settings = evor_value.Args(**{k: v for k, v in args.items() if k in known})
    atoms = getattr(critic, "atoms", np.zeros(0)).size
    parameters = sum(leaf.size for leaf in jax.tree.leaves(critic)) - atoms
    return dict(parameters=parameters, mflop=step_flops(settings, critic, policy) / 1e6)


def backup(row: dict[str, Any]) -> str:
    """Whose reward-to-go: the `--next-action` with what matters to it."""
    if row["next_action"] != "softmax":
        return row["next_action"]
    temperature = float(row["backup_temperature"])
    return f"best of {row['num_next_actions']}" if temperature == 0 else (
        f"softmax of {row['num_next_actions']} at {temperature:g}"
    )  # fmt: skip


def setting(row: dict[str, Any]) -> tuple[str, str, int]:
    """What a line of the table is about: method, backup, horizon."""
    flow = row["critic"] in ("mlp", "trunk")
    return row["method"] + (f", {row['critic']}" if flow else ""), backup(row), int(row["horizon"])


def table(rows: list[dict[str, Any]], episodes: list[dict[str, Any]], speed: dict[str, dict[str, str]]) -> str:
    """Markdown: one line per setting, all its seeds together."""
    of_run = {(row["run"], row["task"], row["seed"]): setting(row) for row in rows}
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(setting(row), []).append(row)
    first = rows[0]
    lines = [
        f"{first['env']} ({first['data_source']} data), task {first['task']}: {int(first['steps']):,} steps on one "
        f"base policy per horizon ({int(first['bc_steps']):,} steps), {first['episodes']} episodes per seed.",
        "",
        "| method | next action | horizon | success | per seed | base policy alone | parameters | MFLOP per step "
        "| ms per step | of the machine's rate | mean return, predicted / observed | correlation | CRPS |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, members in groups.items():
        method, action, horizon = key
        own = [row | dict(base=row["num_actions"] == 1) for row in episodes
               if of_run.get((row["run"], row["task"], row["seed"])) == key]  # fmt: skip
        pooled = {row["base"]: row for row in summarise(own, ("base",))}
        timed = speed.get(f"{method}, {action}")
        mean = {name: np.mean([row[name] for row in members]) for name in
                ("mean_predicted", "mean_observed", "correlation", "crps")}  # fmt: skip
        cells = (
            f"`{method}`"
            if method.split(",")[0] in ("paper", "shared-noise", "velocity", "independent-noise")
            else method,
            action,
            horizon,
            "**{success:.0%}** [{low:.0%}, {high:.0%}]".format(**pooled[False]),
            ", ".join(f"{row['success']:.0%}" for row in sorted(members, key=lambda row: row["seed"])),
            "{success:.0%} [{low:.0%}, {high:.0%}]".format(**pooled[True]),
            f"{members[0]['parameters']:,}",
            f"{members[0]['mflop']:,.0f}",
            f"{float(timed['ms']):.1f}" if timed else "",
            f"{float(timed['peak_share']):.0%}" if timed else "",
            f"{mean['mean_predicted']:.1f} / {mean['mean_observed']:.1f}",
            f"{mean['correlation']:.2f}",
            f"{mean['crps']:.1f}",
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    """Writes the three files."""
    if not args.runs:
        raise UserError("name at least one run directory with --runs.")
    episodes, rows = [], []
    for run in args.runs:
        config = json.loads((run / "value" / "config.json").read_text())
        raw, summary = gather(run)
        episodes += raw
        rows += [row | cost(config) for row in summary]
    refuse_mixtures(rows)
    speed = {row["case"]: row for row in read_csv(args.speed)} if args.speed else {}
    text = table(rows, episodes, speed)
    words = HERE / f"{args.name}_words.md"
    if words.is_file():
        text += "\n" + words.read_text()
    write_csv(HERE / f"{args.name}_episodes.csv", list(episodes[0]), episodes)
    write_csv(HERE / f"{args.name}_runs.csv", list(rows[0]), rows)
    (HERE / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
