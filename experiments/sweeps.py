"""Sweeps of `evor_infer.py` on one figure and in one table.

    python -m experiments.sweeps --name tau_r --folders runs/tasks/cube-double-play/tau_r \
        runs/paper/cube-double-play/tau_r
    python -m experiments.sweeps --name tau_r

A folder is what `evor_infer.py --out` filled. The first command gathers them into `sweep_NAME_episodes.csv`, a row per
episode with every setting and where it comes from; the second only draws `sweep_NAME.md` and `sweep_NAME.png` from it:
lines, or a heat map of each target and task where both temperatures were swept. Intervals: Wilson's over episodes
for one seed, else by bootstrap over seeds and episodes.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoint, figures
from common.errors import UserError, run_cli
from common.metrics import read_json, sha256, write_csv
from common.statistics import mean_interval
from common.training import VERSIONS
from evor_infer import read_episodes, summarise

HERE = Path(__file__).parent.parent / "results"
WORDS = ("td_target", "next_action", "critic", "git_revision", "critic_sha256", "policy_sha256")
WORDS += ("train_revision", "backup_return_temperature", "hardware", *(f"version_{name}" for name in VERSIONS))
ALIKE = (
    "env",
    "data_sha256",
    "policy_sha256",
    "steps",
    "next_action",
    "backup_return_temperature",
    "critic",
    "horizon",
    "discount",
    "flow_steps",
    "solver",
    "absolute",
    "eval_seed",
)
SETTINGS = ("num_actions", "num_returns", "return_temperature", "action_temperature", "action_noise")


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw sweeps of evor_infer.py."""

    name: str
    """What was swept: part of the files' names."""
    folders: tuple[Path, ...] = ()
    """Folders to gather first; none: what is stored."""


def gather(folder: Path) -> list[dict[str, Any]]:
    """The episodes of a sweep, with what the reward model was trained on and by which revision."""
    config = read_json(folder / "config.json")
    if config is None or not (folder / "episodes.csv").is_file():
        raise UserError(f"{folder} holds no finished sweep of evor_infer.py: name its --out folder.")
    model = folder.parent / "value" / "model.eqx"
    value = checkpoint.read_header(model, stage="value", remedy="train it first.")
    if sha256(model) != config["critic_sha256"]:
        raise UserError(f"{model} is not what {folder} evaluated: run evor_infer.py again.")
    about = dict(
        td_target=value["args"].get("td_target", ""),
        next_action=value["args"]["next_action"],
        critic=value["critic"],
        # A setting of the training too, where the backup chooses among actions.
        backup_return_temperature=value["args"]["return_temperature"]
        if value["args"]["next_action"] == "softmax"
        else "",
        steps=value["step"],
        horizon=value["horizon"],
        discount=value["args"]["discount"],
        git_revision=config["git_revision"],
        train_revision=value.get("git_revision", ""),
        critic_sha256=config["critic_sha256"],
        policy_sha256=config["policy_sha256"] or "",
        hardware=config["hardware"],
        **{f"version_{name}": config["versions"][name] for name in VERSIONS},
    )
    return [about | row for row in read_episodes(folder / "episodes.csv")]


def main(args: Args) -> None:
    """Gathers, if folders are named, and draws."""
    path = HERE / f"sweep_{args.name}_episodes.csv"
    if args.folders:
        rows = [row for folder in args.folders for row in gather(folder)]
        for field in ALIKE:
            if len({row.get(field) for row in rows}) > 1:
                raise UserError(f"the folders' evaluations differ in {field}: they share no figure.")
        models = [(row["td_target"], row["task"], row["seed"], row["critic_sha256"]) for row in rows]
        if len({model[:3] for model in models}) < len(set(models)) or len(set(args.folders)) < len(args.folders):
            raise UserError("two of the folders are of one target, task and seed: name one of them.")
        write_csv(path, list(rows[0]), rows)
    if not path.is_file():
        raise UserError(f"there is no {path}: name folders with --folders.")
    rows = read_episodes(path, words=WORDS)
    by = ("env", "data_source", "td_target", "task", *SETTINGS)
    summary = summarise(rows, by)
    for one in summary if len({row["seed"] for row in rows}) > 1 else ():
        seeds: dict[int, list[float]] = {}
        for row in rows:
            if all(row[name] == one[name] for name in by):
                seeds.setdefault(row["seed"], []).append(row["success"])
        one["low"], one["high"] = mean_interval([np.array(list(seeds.values()))])
    swept = [name for name in SETTINGS if len({row[name] for row in summary}) > 1] or ["num_actions"]
    lines = [
        f"| data | target | task | {' | '.join(swept)} | success | episodes |",
        "|---" * (len(swept) + 5) + "|",
    ]
    for row in summary:
        values = " | ".join(f"{row[name]:g}" for name in swept)
        lines.append(
            f"| {row['env']} ({row['data_source']}) | `{row['td_target']}` | {row['task']} | {values} "
            f"| **{row['success']:.0%}** [{row['low']:.0%}, {row['high']:.0%}] | {row['episodes']} |"
        )
    (HERE / f"sweep_{args.name}.md").write_text("\n".join(lines) + "\n")
    title = f"{summary[0]['env']} ({summary[0]['data_source']} data), {rows[0]['steps']:,} steps"
    if {"return_temperature", "action_temperature"} & set(swept):
        # Rows of revision 90dd10a do not say it: theirs are fractions of the range of the possible returns.
        units = {None: "fractions of the return range", True: "units of return", False: "standard deviations"}
        title += f", temperatures in {units[rows[0].get('absolute')]}"
    path = HERE / f"sweep_{args.name}.png"
    if swept == ["return_temperature", "action_temperature"]:
        panels: dict[str, list[dict[str, Any]]] = {}
        for row in summary:
            panels.setdefault(f"{row['td_target']}, task {row['task']}", []).append(row)
        figures.heat_maps(panels, path, x=swept[0], y=swept[1], title=title)
    else:
        figures.sweep(summary, path, title=title, by=("td_target", "task"))
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main, Args)
