"""The table of results/beyond-ogbench: returns of the behaviour, of the base policy and of what critics choose."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.files import load_trajectories
from common.data.names import data_dir
from common.evaluation import read_episodes
from common.statistics import bootstrap_interval
from experiments.gather import finished
from experiments.rows import Frame, Place, frame, numbers, table

FILES = ("episodes.csv",)
KEY = ("run",)
HEADER = "environment | policy | return | normalised score | episodes | seeds"
BEHAVIOUR, ALONE = "behaviour", "base policy alone"


def behaviour(config: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per trajectory of the training data."""
    path = data_dir() / "converted" / config["data"]["name"]
    data = load_trajectories(path, env=config["env"], tasks=(0,))
    ends = np.flatnonzero(data.terminals)
    totals = np.add.reduceat(np.where(data.terminals, 0.0, data.rewards[0]), np.concatenate([[0], ends[:-1] + 1]))
    lengths = np.diff(np.concatenate([[-1], ends])) - 1
    return [
        about | dict(run=config["data"]["name"], policy=BEHAVIOUR, seed=0, episode=i, length=length, total=total)
        for i, (length, total) in enumerate(zip(lengths.tolist(), totals.tolist(), strict=True))
    ]


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """A row per episode of the last evaluations, and one per trajectory of the data."""
    records: list[dict[str, Any]] = []
    for run in runs:
        config = finished(run, files=("config.json", "evaluation.csv", "model.eqx"))
        args = config["args"]
        about = dict(env=config["env"], data_sha256=config["data"]["sha256"], git_revision=config["git_revision"])
        about |= dict(hardware=config["hardware"], seconds=config["seconds"])
        if config["data"]["name"] not in {record["run"] for record in records}:
            records += behaviour(config, about)
        method = args["critic"] if args["critic"] in ("scalar", "c51", "qr") else args["td_target"]
        rows = read_episodes(run / "value" / "evaluation.csv")
        for row in (row for row in rows if row["step"] == args["steps"]):
            policy = ALONE if row["num_actions"] == 1 else f"`{method}`, best of {row['num_actions']}"
            kept = {name: row[name] for name in ("seed", "episode", "length", "total", "normalised") if name in row}
            records.append(about | dict(run=run, policy=policy) | kept)
    return [frame(records)]


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: mean returns with 95% bootstrap intervals over seeds and episodes. All critics of an environment share
    a base policy, so that it has one line."""
    rows = numbers(frames[0], whole=["seed", "episode"], real=["total"])
    rows = rows.drop_duplicates(["env", "policy", "seed", "episode"])
    lines = []
    for (env, policy), group in rows.groupby(["env", "policy"], sort=False):
        seeds = [of_seed["total"].to_numpy() for _, of_seed in group.groupby("seed")]
        low, high = bootstrap_interval([np.stack(seeds)])
        scores = [float(value) for value in group.get("normalised", ()) if value]
        score = f"{np.mean(scores):.1f}" if scores else ""
        lines.append(
            (env, policy, f"{group['total'].mean():.0f} [{low:.0f}, {high:.0f}]", score, len(group), len(seeds))
        )
    return table(HEADER, lines)
