"""Success and errors of the predictions over training, or of runs that differ in a setting.

    python -m experiments.training --name schedule --runs runs/cosine/cube-double-play runs/constant/cube-double-play
    python -m experiments.training --name schedule

The first command gathers runs of `evor_value.py` into `training_NAME_episodes.csv` (a row per episode of every
evaluation with several actions) and `training_NAME_metrics.csv` (`bias` and `crps` of the predictions at each of them,
against the Monte-Carlo returns of validation states); the second only draws `training_NAME.md` from them and, where all
runs were evaluated more than once, `training_NAME.png`. A run is named by the settings in which it differs from others.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from common import figures
from common.errors import UserError, run_cli
from common.metrics import CALIBRATED, read_csv, write_csv
from common.statistics import mean_interval
from common.training import PLACES, VERSIONS
from evor_infer import read_episodes, summarise
from experiments.preview import READOUT, of_readout

HERE = Path(__file__).parent.parent / "results"
WORDS = ("label", "policy_sha256", "git_revision", "hardware", "train_seconds")
WORDS += tuple(f"version_{name}" for name in VERSIONS)
NOT_SETTINGS = (*PLACES, "eval_every", "save_every", "chunk")
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw runs over training."""

    name: str
    """What differs between the runs: part of the files' names."""
    runs: tuple[Path, ...] = ()
    """Run directories to gather first; none: what is stored."""


def labels(configs: list[dict[str, Any]]) -> list[str]:
    """What distinguishes each run: the settings in which the runs differ, as on the command line.

    Raises:
        UserError: two runs have the same settings.
    """
    names = [name for name in configs[0]["args"] if name not in NOT_SETTINGS]
    varied = [name for name in names if len({str(config["args"].get(name)) for config in configs}) > 1]
    found = [", ".join(f"{name} {config['args'].get(name)}" for name in varied) for config in configs]
    if len(set(found)) < len(found):
        raise UserError("two of the runs have the same settings: name each of them once.")
    return found


def gather(runs: tuple[Path, ...]) -> tuple[Rows, Rows]:
    """Episodes and metrics of all evaluations of the runs.

    Raises:
        UserError: a run is not there or was not evaluated, some of it diverged, or the runs' data, base policies or
            replicas differ.
    """
    paths = [run / "value" / name for run in runs for name in ("config.json", "evaluation.csv", "metrics.csv")]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"there is no {missing[0]}: name run directories of evor_value.py that were evaluated.")
    configs = [json.loads((run / "value" / "config.json").read_text()) for run in runs]
    lost = [run for run, config in zip(runs, configs, strict=True) if config.get("diverged")]
    if lost:
        raise UserError(f"{lost[0]}: some replicas diverged: its numbers are not those of all seeds.")
    for field in ("env", "policy_sha256", "replicas"):
        if len({str(config[field]) for config in configs}) > 1:
            raise UserError(f"the runs differ in {field}: they share no figure.")
    if len({config["data"]["sha256"] for config in configs}) > 1:
        raise UserError("the runs were trained on different data: they share no figure.")
    episodes, metrics = [], []
    for run, config, label in zip(runs, configs, labels(configs), strict=True):
        about = dict(
            label=label,
            env=config["env"],
            data_source=config["data"]["source"],
            data_sha256=config["data"]["sha256"],
            policy_sha256=config["policy_sha256"],
            git_revision=config["git_revision"],
            hardware=config.get("hardware", ""),
            **{f"version_{name}": config["versions"].get(name, "") for name in VERSIONS},
            **{name: config["args"][name] for name in READOUT},
            train_seconds=config.get("seconds", ""),
        )
        keep = ("task", "seed", "step", "num_actions", "num_returns", "episode", "success", "length")
        rows = of_readout(read_csv(run / "value" / "evaluation.csv"), config["args"])
        found = [row for row in rows if row["num_actions"] != "1"]
        if not found:
            raise UserError(f"{run} was evaluated with one action alone, the base policy: name others.")
        if max(int(row["step"]) for row in found) < config["args"]["steps"]:
            raise UserError(f"{run} has no evaluation of its last checkpoint: let it finish, with --resume.")
        episodes += [about | {name: row[name] for name in keep} for row in found]
        found = [row for row in read_csv(run / "value" / "metrics.csv") if row["metric"] in CALIBRATED]
        metrics += [
            dict(label=label) | {name: row[name] for name in ("task", "seed", "step", "metric", "value")}
            for row in found
        ]
    return episodes, metrics


def interval(rows: Rows) -> tuple[float, float]:
    """95% interval of the mean success over tasks."""
    by_task: dict[int, dict[int, list[float]]] = {}
    for row in rows:
        by_task.setdefault(row["task"], {}).setdefault(row["seed"], []).append(row["success"])
    return mean_interval([np.array(list(seeds.values())) for seeds in by_task.values()])


def curves(episodes: Rows, metrics: Rows) -> dict[str, list[dict[str, Any]]]:
    """Per label, a point per evaluation: step, success with its interval, and means of the metrics over replicas."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in summarise(episodes, ("label", "step")):
        key = point["label"], point["step"]
        low, high = interval([row for row in episodes if (row["label"], row["step"]) == key])
        point |= dict(low=low, high=high)
        for name in CALIBRATED:
            same = [row for row in metrics if (row["label"], int(row["step"])) == key and row["metric"] == name]
            point[name] = float(np.mean([float(row["value"]) for row in same])) if same else float("nan")
        found.setdefault(point["label"], []).append(point)
    return {label: sorted(points, key=lambda point: point["step"]) for label, points in found.items()}


def about(episodes: Rows) -> str:
    """What all runs have in common."""
    names = ("task", "seed", "num_actions", "return_temperature", "action_temperature")
    tasks, seeds, actions, tau_r, tau_q = (
        ", ".join(f"{value:g}" for value in sorted({row[name] for row in episodes})) for name in names
    )
    data = f"{episodes[0]['env']} ({episodes[0]['data_source']} data)"
    return f"{data}, task {tasks}, seed {seeds}; {actions} candidates, tau_R {tau_r}, tau_Q {tau_q}"


def table(points: dict[str, list[dict[str, Any]]], episodes: Rows) -> str:
    """Markdown: the last evaluation of each run, and the mean of its last three."""
    lines = [
        f"{about(episodes)}.",
        "",
        "| run | steps | success | mean of the last three evaluations | bias | CRPS |",
        "|---|---|---|---|---|---|",
    ]
    for label, found in points.items():
        last = found[-1]
        three = f"{np.mean([point['success'] for point in found[-3:]]):.0%}" if len(found) > 2 else ""
        lines.append(
            f"| {label} | {last['step']:,} | **{last['success']:.0%}** [{last['low']:.0%}, {last['high']:.0%}] "
            f"of {last['episodes']} | {three} | {last['bias']:.1f} | {last['crps']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(points: dict[str, list[dict[str, Any]]], path: Path, *, title: str) -> None:
    """Success, bias and CRPS over gradient steps, a line per run."""
    figure, axes = figures.subplots(1, 3, width=13.0, height=3.5)
    for label, found in points.items():
        steps = [point["step"] for point in found]
        success = np.array([100 * point["success"] for point in found])
        ends = np.array([[100 * point["low"], 100 * point["high"]] for point in found]).T
        axes[0][0].errorbar(steps, success, np.abs(ends - success), marker="o", ms=3, lw=1, capsize=2, label=label)
        for axis, name in zip(axes[0][1:], CALIBRATED, strict=True):
            axis.plot(steps, [point[name] for point in found], marker="o", ms=3, lw=1, label=label)
    axes[0][0].set(ylabel="success (%)", ylim=(-3, 103))
    axes[0][1].set(ylabel="bias of the predicted mean")
    axes[0][1].axhline(0.0, color="k", lw=0.5)
    axes[0][2].set(ylabel="CRPS of the predictions")
    axes[0][2].set_ylim(0, 1.1 * max(point["crps"] for found in points.values() for point in found))
    for axis in axes[0]:
        axis.set(xlabel="gradient steps")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figures.save(figure, path)


def main(args: Args) -> None:
    """Gathers, if runs are named, and draws."""
    paths = [HERE / f"training_{args.name}_{kind}.csv" for kind in ("episodes", "metrics")]
    if args.runs:
        for path, rows in zip(paths, gather(args.runs), strict=True):
            write_csv(path, list(rows[0]), rows)
    if not paths[0].is_file():
        raise UserError(f"there is no {paths[0]}: name run directories with --runs.")
    episodes = read_episodes(paths[0], words=WORDS)
    points = curves(episodes, read_csv(paths[1]))
    text = table(points, episodes)
    (HERE / f"training_{args.name}.md").write_text(text)
    if min(map(len, points.values())) > 1:
        draw(points, HERE / f"training_{args.name}.png", title=about(episodes))
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
