"""Gathers finished runs into one table: raw episodes, settings, calibration, provenance.

    python -m experiments.preview --runs runs/preview/*
    python -m experiments.preview

Each run directory is one of `evor_value.py`. Writes, in `results/`, `preview_episodes.csv` (one row per evaluation
episode of the last checkpoint), `preview_runs.csv` (one row per run, task and seed: success of EVOR and of the base
policy alone with intervals, calibration, settings, data, versions) and `preview.md` (the table for people), which the
second command draws again from the rows.
Runs at another scale or on other data never belong in the same table: it refuses to mix them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from common import checkpoint
from common.errors import UserError, run_cli
from common.metrics import read_csv, sha256, write_csv
from evor_infer import read_episodes, summarise

HERE = Path(__file__).parent.parent / "results"
FILES = ("config.json", "evaluation.csv", "calibration.csv", "model.eqx")
READOUT = ("num_returns", "return_temperature", "action_temperature")


@dataclasses.dataclass(frozen=True)
class Args:
    """Gather runs of evor_value.py into one table."""

    runs: tuple[Path, ...] = ()
    """Run directories; none: only draw the table of the rows that stand there."""
    name: str = "preview"
    """Prefix of the files."""


def of_readout(rows: list[dict[str, Any]], args: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an evaluation that have the settings of `args`: others are left where an evaluation anew was
    stopped."""
    return [row for row in rows if all(float(row.get(name, args[name])) == float(args[name]) for name in READOUT)]


def gather(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Episodes of the last checkpoint and one summary row per task and seed."""
    directory, model = run / "value", run / "value" / "model.eqx"
    missing = [path for path in map(directory.joinpath, FILES) if not path.is_file()]
    if missing:
        raise UserError(f"there is no {missing[0]}: name run directories of evor_value.py that came to their end.")
    config = json.loads((directory / "config.json").read_text())
    args, versions = config["args"], config["versions"]
    if config.get("diverged"):
        raise UserError(f"{run}: (task, seed) {config['diverged']} diverged: its numbers are not those of all seeds.")
    bc = {"args": dict(steps="")}  # of a policy that was trained with the reward model
    if not config.get("own_policy"):
        bc = json.loads((Path(config["policy_run_dir"]) / "bc" / "config.json").read_text())
    settings = dict(
        env=config["env"],
        run=run.name,
        td_target=args["td_target"],
        next_action=args["next_action"],
        critic=args["critic"],
        width=args["width"],
        depth=args["depth"],
        batch_size=args["batch_size"],
        tau=args["tau"],
        head_width=args["head_width"],
        head_depth=args["head_depth"],
        horizon=args["horizon"],
        discount=args["discount"],
        return_axis=config.get("return_axis", ""),
        num_next_actions=args["num_next_actions"],
        backup_temperature=args["backup_temperature"],
        steps=args["steps"],
        learning_rate=args["learning_rate"],
        schedule=args["schedule"],
        bc_steps=bc["args"]["steps"],
        ignored_observations=" ".join(map(str, bc["args"].get("ignore_observations", []))),
        num_actions=args["num_actions"],
        num_returns=args["num_returns"],
        return_temperature=args["return_temperature"],
        action_temperature=args["action_temperature"],
        **{
            name: args.get(name, "")
            for name in ("reward", "clip_margin", "backup_returns", "redraw_bank", "flow_steps", "solver")
        },
        data_source=config["data"]["source"],
        data_sha256=config["data"]["sha256"],
        policy_sha256=config["policy_sha256"],
        critic_sha256=sha256(model),
        train_revision=checkpoint.read_header(model, stage="value", remedy="train it again.").get("git_revision", ""),
        git_revision=config["git_revision"],  # of the evaluation, where that was made anew
        hardware=config.get("hardware", ""),
        train_seconds=config.get("seconds", ""),  # of all tasks and seeds of the run together
        **{f"version_{k}": v for k, v in versions.items()},
    )
    episodes = [
        row
        for row in of_readout(read_episodes(directory / "evaluation.csv"), args)
        if row["step"] == args["steps"] and row["num_actions"] in (1, args["num_actions"])
    ]
    if {row["num_actions"] == 1 for row in episodes} != {True, False}:
        raise UserError(f"{run} has no evaluation of its last checkpoint, or none of several actions: let it finish.")
    by_method = {
        (row["task"], row["seed"], row["num_actions"] == 1): row
        for row in summarise(episodes, ("task", "seed", "num_actions"))
    }
    calibration = {}
    for row in read_csv(directory / "calibration.csv"):
        calibration.setdefault((int(row["task"]), int(row["seed"])), {})[row["metric"]] = float(row["value"])
    rows = []
    for task, seed in sorted({(task, seed) for task, seed, _ in by_method}):
        evor, base = by_method[task, seed, False], by_method[task, seed, True]
        found = calibration[task, seed]
        rows.append(
            dict(task=task, seed=seed)
            | {k: evor[k] for k in ("success", "low", "high", "episodes")}
            | dict(base_success=base["success"], base_low=base["low"], base_high=base["high"])
            | {k: round(found[k], 4) for k in ("mean_predicted", "mean_observed", "correlation", "crps")}
            | {k: round(value, 4) for k, value in found.items() if k.startswith("below_")}
            | settings
        )
    keep = ("env", "run", "td_target", "next_action", "critic", "horizon", "data_sha256", "git_revision")
    chosen = ("task", "seed", "step", "num_actions", "episode", "success", "length", "total")
    raw = [{k: settings[k] for k in keep} | {k: row[k] for k in chosen} for row in episodes]
    return raw, rows


SHOWN = ("success", "low", "high", "base_success", "base_low", "base_high", "mean_predicted", "mean_observed")
SHOWN += ("correlation", "crps")


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: one line per run, task and seed."""
    lines = [
        "| data | task | target | backup | critic | K | h | EVOR | base policy alone "
        "| mean return, predicted / observed | correlation | CRPS |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in (row | {name: float(row[name]) for name in SHOWN} for row in rows):
        cells = (
            f"{r['env']} ({r['data_source']})",
            r["task"],
            f"`{r['td_target']}`",
            f"`{r['next_action']}`",
            r["critic"],
            r["num_next_actions"],
            r["horizon"],
            f"**{r['success']:.0%}** [{r['low']:.0%}, {r['high']:.0%}]",
            f"{r['base_success']:.0%} [{r['base_low']:.0%}, {r['base_high']:.0%}]",
            f"{r['mean_predicted']:.1f} / {r['mean_observed']:.1f}",
            f"{r['correlation']:.2f}",
            f"{r['crps']:.1f}",
        )
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def refuse_mixtures(rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` for runs whose numbers belong in different tables."""
    for field in ("steps", "bc_steps", "episodes", "data_sha256"):
        per_env = {}
        for row in rows:
            per_env.setdefault(row["env"], set()).update({row[field]} - {""})
        mixed = [env for env, values in per_env.items() if len(values) > 1]
        if mixed:
            raise UserError(f"the runs of {mixed[0]} differ in {field}: numbers of different scales share no table.")
    if len({row["data_source"] for row in rows}) > 1:
        raise UserError("some runs are on collected and some on official data: their numbers share no table.")


def main(args: Args) -> None:
    """Gathers, if runs are named, and writes the table."""
    stored = HERE / f"{args.name}_runs.csv"
    if args.runs:
        raw, rows = [], []
        for run in args.runs:
            episodes, summary = gather(run)
            raw += episodes
            rows += summary
        refuse_mixtures(rows)
        write_csv(HERE / f"{args.name}_episodes.csv", list(raw[0]), raw)
        write_csv(stored, list(rows[0]), rows)
    if not stored.is_file():
        raise UserError(f"there is no {stored}: name run directories with --runs.")
    text = table(read_csv(stored))
    (HERE / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
