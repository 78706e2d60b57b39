"""The return axis before and after: calibration and success on OGBench, a table of rows that are gathered from runs.

    python -m experiments.run --only policies scene_policy axes
    python -m experiments.axes --runs runs/axis-*/*
    python -m experiments.axes

The second command gathers runs of `evor_value.py`, and what `evor_infer.py --out before` and `--out after` left beside
them, into `axes/calibration.csv` and `axes/success.csv`, a row per run, task and seed. A run that stands there is
replaced. The third command draws `axes/table.md` again from the rows.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, run_cli
from common.metrics import read_csv, read_json, write_csv
from common.statistics import mean_interval
from evor_infer import read_episodes, summarise

HERE = Path(__file__).parent.parent / "results" / "axes"
METRICS = ("crps", "correlation", "mean_predicted", "mean_observed")
READOUTS = ("before", "after")
EXTRACTION = ("num_actions", "num_returns", "return_temperature", "action_temperature", "absolute")
EXTRACTION += ("flow_steps", "solver")

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare return axes."""

    runs: tuple[Path, ...] = ()
    """Run directories of evor_value.py to gather first; none: what is stored."""


def gather(run: Path) -> tuple[Rows, Rows]:
    """Rows of calibration and of success of one run.

    Raises:
        UserError: the run is not there, or not calibrated.
    """
    config = read_json(run / "value" / "config.json")
    if config is None or not (run / "value" / "calibration.csv").is_file():
        raise UserError(f"{run} holds no run of evor_value.py that came to its end: name run directories.")
    args = config["args"]
    about = {key: args[key] for key in ("env", "reward", "horizon", "discount", "steps", "solver", "flow_steps")}
    about |= {key: config.get(key, "") for key in ("return_axis", "policy_sha256", "git_revision", "hardware")}
    about["data_sha256"] = config["data"]["sha256"]
    found: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)
    for row in read_csv(run / "value" / "calibration.csv"):
        if row["metric"] in METRICS:
            found[row["task"], row["seed"]][row["metric"]] = f"{float(row['value']):.4f}"
    calibration = [about | dict(task=task, seed=seed) | numbers for (task, seed), numbers in found.items()]
    success = []
    for readout in READOUTS:
        path = run / readout / "episodes.csv"
        rows = summarise(read_episodes(path), ("task", "seed", *EXTRACTION)) if path.is_file() else []
        for row in rows:
            kept = {key: row[key] for key in ("task", "seed", *EXTRACTION, "success", "episodes")}
            success.append({key: about[key] for key in ("env", "reward", "return_axis")} | dict(readout=readout) | kept)
    return calibration, success


def table(calibration: Rows, success: Rows) -> str:
    """Markdown: a line per environment and task, means over seeds, intervals over seeds and episodes."""
    lines = [
        "| data | task | CRPS: bounds, Euler 10 | std | quantiles | correlation: bounds, Euler 10 | std | quantiles "
        "| success before | after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for env, reward, task in dict.fromkeys((row["env"], row["reward"], row["task"]) for row in calibration):
        cells = [env + ", sparse" * (reward == "sparse"), task]
        for metric in ("crps", "correlation"):
            for axis in ("bounds", "std", "quantiles"):
                same = dict(env=env, reward=reward, task=task, return_axis=axis)
                values = [float(row[metric]) for row in calibration if same.items() <= row.items()]
                cells.append(f"{np.mean(values):.2f}" if values else "")
        for readout in READOUTS:
            same = dict(env=env, reward=reward, task=task, readout=readout)
            rows = [row for row in success if same.items() <= row.items()]
            if not rows:
                cells.append("")
                continue
            # (seeds, episodes): which of them were solved makes no difference.
            solved = np.array([np.arange(n := int(row["episodes"])) < round(float(row["success"]) * n) for row in rows])
            low, high = mean_interval([solved.astype(float)])
            cells.append(f"{solved.mean():.0%} [{low:.0%}, {high:.0%}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in ("env", "reward", "return_axis", "readout", "task", "seed"))


def main(args: Args) -> None:
    """Gathers, if runs are named, and draws.

    Raises:
        UserError: there are no rows.
    """
    paths = [HERE / "calibration.csv", HERE / "success.csv"]
    stored = [read_csv(path) if path.is_file() else [] for path in paths]
    for run in args.runs:
        for rows, new in zip(stored, gather(run), strict=True):
            replaced = {key(row) for row in new}
            rows[:] = [row for row in rows if key(row) not in replaced] + new
    for path, rows in zip(paths, stored, strict=True):
        if args.runs and rows:
            write_csv(path, list(rows[0]), sorted(rows, key=key))
    if not paths[0].is_file():
        raise UserError(f"there is no {paths[0]}: name run directories with --runs.")
    text = table(*(read_csv(path) if path.is_file() else [] for path in paths))
    (HERE / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
