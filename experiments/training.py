"""Success and errors of the predictions over training, or of runs that differ in a setting.

The rows are the episodes of every evaluation with several actions, and `bias` and `crps` of the predictions at each of
them, against the Monte-Carlo returns of validation states. A figure is drawn where all runs were evaluated more than
once. A run is named by the settings in which it differs from others.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import figures
from common.errors import UserError
from common.files import read_csv
from common.metrics import CALIBRATED
from common.provenance import VERSIONS
from common.run import NOT_RESULTS
from experiments.gather import READOUT, finished, of_readout
from experiments.rows import Frame, Place, frame, numbers, percent, rate, table

FILES = ("episodes.csv", "metrics.csv")
NOT_SETTINGS = (*NOT_RESULTS, "eval_every", "save_every", "steps_per_call")
OF_AN_EPISODE = ("task", "seed", "step", "num_actions", "num_returns", "episode", "success", "length")
HEADER = "run | steps | success | mean of the last three evaluations | bias | CRPS"


def labels(configs: list[dict[str, Any]]) -> list[str]:
    """What distinguishes each run: the settings in which the runs differ, as on the command line.

    Raises:
        UserError: two runs have the same settings.
    """
    names = [name for name in configs[0]["args"] if name not in NOT_SETTINGS]
    varied = [name for name in names if len({str(config["args"].get(name)) for config in configs}) > 1]
    labels = [", ".join(f"{name} {config['args'].get(name)}" for name in varied) for config in configs]
    if len(set(labels)) < len(labels):
        raise UserError("two of the runs have the same settings: name each of them once.")
    return labels


def read_configs(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """The config.json of each run.

    Raises:
        UserError: a run is not there, some of it diverged, or the runs' data, base policies or replicas differ.
    """
    configs = [finished(run, ("config.json", "evaluation.csv", "metrics.csv")) for run in runs]
    for field in ("env", "policy_sha256", "replicas"):
        if len({str(config[field]) for config in configs}) > 1:
            raise UserError(f"the runs differ in {field}: they share no figure.")
    if len({config["data"]["sha256"] for config in configs}) > 1:
        raise UserError("the runs were trained on different data: they share no figure.")
    return configs


def evaluations(run: Path, args: dict[str, Any]) -> list[dict[str, str]]:
    """The episodes of all evaluations of a run with several actions.

    Raises:
        UserError: there is none, or none of the last checkpoint.
    """
    episodes = of_readout(read_csv(run / "value" / "evaluation.csv"), args)
    episodes = [row for row in episodes if row["num_actions"] != "1"]
    if not episodes:
        raise UserError(f"{run} was evaluated with one action alone, the base policy: name others.")
    if max(int(row["step"]) for row in episodes) < args["steps"]:
        raise UserError(f"{run} has no evaluation of its last checkpoint: let it finish, with --resume.")
    return episodes


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Episodes and metrics of all evaluations of the runs."""
    configs = read_configs(runs)
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
        for row in evaluations(run, config["args"]):
            episodes.append(about | {name: row[name] for name in OF_AN_EPISODE})
        for row in read_csv(run / "value" / "metrics.csv"):
            if row["metric"] in CALIBRATED:
                names = ("task", "seed", "step", "metric", "value")
                metrics.append(dict(label=label) | {name: row[name] for name in names})
    return [frame(episodes), frame(metrics)]


def curves(episodes: Frame, metrics: Frame) -> dict[str, list[dict[str, Any]]]:
    """Per label, a point per evaluation: step, success with its interval, and means of the metrics over replicas."""
    means = numbers(metrics, whole=["step"], real=["value"]).groupby(["label", "step", "metric"])["value"].mean()
    curves: dict[str, list[dict[str, Any]]] = {label: [] for label in episodes["label"].unique()}
    for (label, step), rows in numbers(episodes, whole=["step"]).groupby(["label", "step"]):
        success, low, high = rate(rows)
        errors = {name: means.get((label, step, name), np.nan) for name in CALIBRATED}
        curves[label].append(dict(step=step, success=success, low=low, high=high, episodes=len(rows)) | errors)
    return curves


def about(episodes: Frame) -> str:
    """What all runs have in common."""
    names = ("task", "seed", "num_actions", "return_temperature", "action_temperature")
    tasks, seeds, actions, tau_r, tau_q = (
        ", ".join(f"{value:g}" for value in sorted(set(episodes[name].astype(float)))) for name in names
    )
    data = "{env} ({data_source} data)".format(**episodes.iloc[0])
    return f"{data}, task {tasks}, seed {seeds}; {actions} candidates, tau_R {tau_r}, tau_Q {tau_q}"


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: the last evaluation of each run, and the mean of its last three; and the figure."""
    points, common = curves(*frames), about(frames[0])
    if min(map(len, points.values())) > 1:
        draw_curves(points, place.path("figure.png"), title=common)
    lines = []
    for label, evaluated in points.items():
        last = evaluated[-1]
        three = f"{np.mean([point['success'] for point in evaluated[-3:]]):.0%}" if len(evaluated) > 2 else ""
        success, _, interval = percent(last["success"], last["low"], last["high"]).partition(" ")
        success = f"**{success}** {interval} of {last['episodes']}"
        lines.append((label, f"{last['step']:,}", success, three, f"{last['bias']:.1f}", f"{last['crps']:.1f}"))
    return f"{common}.\n\n{table(HEADER, lines)}"


def draw_curves(points: dict[str, list[dict[str, Any]]], path: Path, *, title: str) -> None:
    """Success, bias and CRPS over gradient steps, a line per run."""
    figure, axes = figures.subplots(1, 3, width=13.0, height=3.5)
    for label, evaluated in points.items():
        steps = [point["step"] for point in evaluated]
        success = np.array([100 * point["success"] for point in evaluated])
        ends = np.array([[100 * point["low"], 100 * point["high"]] for point in evaluated]).T
        axes[0][0].errorbar(steps, success, np.abs(ends - success), marker="o", ms=3, lw=1, capsize=2, label=label)
        for axis, name in zip(axes[0][1:], CALIBRATED, strict=True):
            axis.plot(steps, [point[name] for point in evaluated], marker="o", ms=3, lw=1, label=label)
    axes[0][0].set(ylabel="success (%)", ylim=(-3, 103))
    axes[0][1].set(ylabel="bias of the predicted mean")
    axes[0][1].axhline(0.0, color="k", lw=0.5)
    axes[0][2].set(ylabel="CRPS of the predictions")
    axes[0][2].set_ylim(0, 1.1 * max(point["crps"] for evaluated in points.values() for point in evaluated))
    for axis in axes[0]:
        axis.set(xlabel="gradient steps")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    figures.save(figure, path)
