"""The thirty tasks: one line per environment, the methods beside each other, and the highest success that is known.

A line is of the default: what `--preview` trains for the environment. The others change one thing: the backup, the TD
target (`paper` also needs the axis `std`), the return axis, the critic; or the whole method (QC). They stand beside
each other on the environment's default task, and those that ran all five tasks on the five. Means are over tasks,
intervals by bootstrap over seeds and episodes.
Runs of one environment that differ in data or in the steps of the value are refused.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from common import figures
from common.data.names import NUM_TASKS, parse_env
from experiments import gather, tasks
from experiments.rows import Frame, Place, cell, complete, numbers, rate, read, table

FILES = ("runs.csv", "episodes.csv")
OF_AN_EPISODE = ["run", "task", "seed", "num_actions", "episode", "success", "length", "total"]
KEY = ("run",)
DEFAULT = "EVOR"
ALONE = "base policy alone"
BASE = "`base` backup"
BOUNDS = f"{BASE}, axis of the possible returns"
SETTINGS = ("policy", "critic", "td_target", "return_axis", "next_action", "horizon", "reward")
SETTINGS += ("policy_seconds", "train_seconds")
HIDDEN = (*tasks.ALIKE, "return_axis", "discount", "return_temperature", "action_temperature")
LINES = "data | task 1 | task 2 | task 3 | task 4 | task 5 | mean | base policy alone | highest known | steps | minutes"


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Rows of runs, and of their episodes, which say no more than the run that they are of."""
    of_runs, episodes = gather.gather_all(runs)
    return [of_runs, episodes[OF_AN_EPISODE]]


def method(row: dict[str, str]) -> str:
    """What a run trained, in the words of the table."""
    if row["policy"]:
        return f"QC, chunks of {row['horizon']}"
    if row["critic"] == "scalar":
        return "scalar critic"
    if row["td_target"] == "paper":
        return "published target"
    backup = DEFAULT if row["next_action"] == "softmax" else f"`{row['next_action']}` backup"
    return f"{backup}, axis of the possible returns" if row["return_axis"] == "bounds" else backup


def methods_of(runs: Frame) -> list[str]:
    return [method(row) for row in runs.to_dict("records")]


def refuse(frames: Sequence[Frame]) -> None:
    """Raises `UserError` for runs whose numbers do not stand beside each other."""
    runs = complete(frames[0], (*SETTINGS, *HIDDEN))
    for _, of_env in runs.groupby("env"):
        gather.refuse_differences(of_env, ("steps", "data_sha256"), ": they share no table.")
    for _, of_method in runs.assign(method=methods_of(runs)).groupby(["env", "reward", "method"]):
        gather.refuse_differences(of_method, HIDDEN, ", which the table hides.")


def known(env: str) -> str:
    """The highest success that others published."""
    rows = read(tasks.PUBLISHED / "published.csv")
    found = rows[rows["env"] == env.replace(", sparse", " (sparse)")]
    return f"{found['success'].iloc[0]}% ({found['method'].iloc[0]})" if len(found) else ""


def minutes(rows: Frame) -> str:
    """Of the base policy and of the reward models of all tasks and seeds of a run."""
    first = rows.iloc[0]
    return " + ".join(f"{float(first[name]) / 60:.0f}" if first[name] else "?" for name in SETTINGS[-2:])


def mean_of_all(episodes: Frame) -> tuple[str, ...]:
    """The table's last line, of the default's episodes: each task of each environment counts once."""
    episodes = episodes.assign(task=episodes["line"] + episodes["task"])
    alone = episodes["num_actions"] == "1"
    of_tasks = [""] * NUM_TASKS
    number = episodes["task"].nunique()
    return f"all {number} tasks", *of_tasks, f"**{cell(episodes[~alone])}**", cell(episodes[alone]), "", "", ""


def named(frames: Sequence[Frame]) -> tuple[Frame, Frame]:
    """Runs and episodes with the line of the table that they are of, in the order of these, and with their method."""
    runs = complete(frames[0], SETTINGS)
    lines = [tasks.named(row) for row in runs.to_dict("records")]
    runs = runs.assign(line=lines, method=methods_of(runs)).sort_values("line", kind="stable")
    told = runs[["run", "task", "seed", "env", "line", "method"]]
    return runs, told.merge(frames[1], on=["run", "task", "seed"])


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown, and two figures: the default on each task, and the methods' means on each environment."""
    runs, episodes = named(frames)
    extracted = episodes[episodes["num_actions"] != "1"]
    default, lines = episodes[episodes["method"] == DEFAULT], []
    for env in default["line"].unique():
        own = runs[(runs["line"] == env) & (runs["method"] == DEFAULT)]
        lines.append(line_of(own, default[default["line"] == env]))
    if lines:
        lines.append(mean_of_all(default))
        both = default.assign(method=default["num_actions"].map(lambda number: ALONE if number == "1" else DEFAULT))
        draw_bars(both, place.path("tasks_figure.png"), ylabel="success, mean and single tasks (%)")
    on_default = extracted[extracted["task"] == extracted["env"].map(lambda env: str(parse_env(env).default_task))]
    all_tasks = extracted.groupby(["line", "method"])["task"].transform("nunique") == NUM_TASKS
    draw_bars(on_default, place.path("figure.png"), ylabel="success on the default task (%)")
    seeds = runs["seed"].nunique()
    each = int(extracted.groupby(["run", "task", "seed"]).size().max())
    about = f"{seeds} seeds, {each} episodes a task and seed, last checkpoint."
    beside = [beside_each_other(on_default, "default task"), beside_each_other(extracted[all_tasks], "five tasks")]
    return "\n".join([f"{about}\n", table(LINES, lines), *filter(None, beside)])


def line_of(runs: Frame, episodes: Frame) -> tuple[str, ...]:
    """The table's line of an environment, of the default's runs and episodes."""
    env, alone = episodes["line"].iloc[0], episodes["num_actions"] == "1"
    means = of_each_task(episodes[~alone])
    each = (f"{means[task]:.0%}" if task in means else "" for task in map(str, range(1, NUM_TASKS + 1)))
    steps = f"{int(float(runs['steps'].iloc[0])):,}"
    return env, *each, f"**{cell(episodes[~alone])}**", cell(episodes[alone]), known(env), steps, minutes(runs)


def of_each_task(episodes: Frame) -> pd.Series:
    return numbers(episodes, real=["success"]).groupby("task")["success"].mean()


def beside_each_other(episodes: Frame, what: str) -> str:
    """The methods' success in the environments in which several ran; nothing where there is none."""
    episodes = episodes[episodes.groupby("line")["method"].transform("nunique") > 1]
    methods = list(episodes["method"].unique())
    lines = [
        (env, *(cell(rows) if len(rows := of(episodes, env, name)) else "" for name in methods))
        for env in episodes["line"].unique()
    ]
    return table(f"{what} | {' | '.join(methods)}", lines) if lines else ""


def of(episodes: Frame, env: str, name: str) -> Frame:
    """The episodes of a method in an environment."""
    return episodes[(episodes["line"] == env) & (episodes["method"] == name)]


def draw_bars(episodes: Frame, path: Path, *, ylabel: str) -> None:
    """Mean success with its interval, a group of bars for each environment, and a dot for each of several tasks."""
    environments, methods = (list(episodes[name].unique()) for name in ("line", "method"))
    figure, axes = figures.subplots(1, 1, width=3.0 + 1.6 * len(environments), height=3.2)
    axis, width = axes[0, 0], 0.8 / len(methods)
    for i, name in enumerate(methods):
        place = width * (i - (len(methods) - 1) / 2)
        present = [(j, of(episodes, env, name)) for j, env in enumerate(environments)]
        points = [(j, *rate(rows)) for j, rows in present if len(rows)]
        where, height, low, high = (np.array(column) for column in zip(*points, strict=True))
        ends = 100 * np.abs([height - low, high - height])
        axis.bar(where + place, 100 * height, 0.9 * width, yerr=ends, label=name)
        for j, rows in present:
            of_tasks = 100 * of_each_task(rows)
            if len(of_tasks) > 1:
                axis.plot(j + place + width * np.linspace(-0.3, 0.3, len(of_tasks)), of_tasks, "k.", ms=4)
    axis.set(ylabel=ylabel, ylim=(0, 105), xticks=range(len(environments)))
    axis.set_xticklabels(environments, fontsize=7)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figures.save(figure, path)
