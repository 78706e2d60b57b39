"""The return axis before and after: calibration and success on OGBench.

Rows come from runs of `evor_value.py`, and from what `evor_infer.py --out before` and `--out after` left beside them: a
row per run, task and seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.evaluation import read_episodes, summarise
from common.files import read_json
from experiments.rows import Frame, Place, cell, complete, frame, numbers, read, table

FILES = ("calibration.csv", "success.csv")
KEY = ("env", "reward", "return_axis", "readout", "task", "seed")
METRICS = ("crps", "correlation", "mean_predicted", "mean_observed")
READOUTS = ("before", "after")
COUNTED = ("success", "episodes")
EXTRACTION = ("num_actions", "num_returns", "return_temperature", "action_temperature", "absolute")
EXTRACTION += ("flow_steps", "solver")
HEADER = (
    "data | task | CRPS: bounds, Euler 10 | std | quantiles | correlation: bounds, Euler 10 | std | quantiles "
    "| success before | after"
)


def gather(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
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
    measured = read(run / "value" / "calibration.csv").pivot(index=["task", "seed"], columns="metric", values="value")
    calibration = [
        about | dict(task=task, seed=seed) | {name: f"{float(row[name]):.4f}" for name in METRICS}
        for (task, seed), row in measured.iterrows()
    ]
    success = []
    for readout in READOUTS:
        path = run / readout / "episodes.csv"
        for row in summarise(read_episodes(path), ("task", "seed", *EXTRACTION)) if path.is_file() else ():
            kept = {key: row[key] for key in ("task", "seed", *EXTRACTION, *COUNTED)}
            success.append({key: about[key] for key in ("env", "reward", "return_axis")} | dict(readout=readout) | kept)
    return calibration, success


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Rows of several runs."""
    gathered = [gather(run) for run in runs]
    return [frame(row for pair in gathered for row in pair[i]) for i in (0, 1)]


def episodes_of(success: Frame) -> Frame:
    """A row per episode of rows that count them; which of them were solved makes no difference."""
    episodes = success.loc[success.index.repeat(success["episodes"])]
    solved = (episodes["success"] * episodes["episodes"]).round()
    return episodes.assign(success=(episodes.groupby(level=0).cumcount() < solved).astype(float))


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: a line per environment and task, means over seeds, intervals over seeds and episodes."""
    calibration = numbers(frames[0], real=METRICS)
    success = numbers(complete(frames[1], (*KEY, *COUNTED)), whole=["episodes"], real=["success"])
    lines = []
    for (env, reward, task), rows in calibration.groupby(["env", "reward", "task"]):
        cells = [env + ", sparse" * (reward == "sparse"), task]
        means = rows.groupby("return_axis")[["crps", "correlation"]].mean()
        for metric in ("crps", "correlation"):
            for axis in ("bounds", "std", "quantiles"):
                cells.append(f"{means.loc[axis, metric]:.2f}" if axis in means.index else "")
        for readout in READOUTS:
            same = dict(env=env, reward=reward, task=task, readout=readout)
            chosen = success[np.logical_and.reduce([success[name] == value for name, value in same.items()])]
            cells.append(cell(episodes_of(chosen)) if len(chosen) else "")
        lines.append(cells)
    return table(HEADER, lines)
