"""The table of environments and methods: means over tasks, per-task numbers, and published ones beside them.

Success is that of the last checkpoint. The mean of the last three evaluations has a column, where a run has them.
Intervals: bootstrap over seeds and episodes for means over tasks, Wilson's over episodes for one task and seed. Runs
that differ in a setting which the table does not show are refused: `experiments.training` draws those.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common import figures
from common.errors import UserError
from common.evaluation import summarise
from common.statistics import success_interval
from experiments import gather
from experiments.rows import RESULTS, Frame, Place, cell, complete, numbers, percent, read, table

FILES = ("runs.csv", "episodes.csv")
PUBLISHED = RESULTS / "tasks"
METHOD = ("env", "reward", "horizon", "td_target", "return_axis", "next_action", "critic", "discount", "steps")
METHOD += ("return_temperature", "action_temperature")
ALIKE = ("head_width", "head_depth", "width", "depth", "batch_size", "tau", "target_steps", "return_width")
ALIKE += ("solver",)
ALIKE += ("num_next_actions", "backup_temperature", "learning_rate", "schedule", "num_actions", "num_returns")
ALIKE += ("ignored_observations", "clip_margin", "backup_returns", "redraw_bank", "flow_steps", "policy_sha256")
ALIKE += ("noise_scale",)
MEANS = (
    "data | tasks | seeds | target | backup | critic | h | discount | tau_R | tau_Q | steps | EVOR "
    "| last three evaluations | base policy alone | CRPS"
)
SINGLES = "data | target | backup | discount | tau_R | tau_Q | task | seed | EVOR | base policy alone"
OTHERS = "data (official) | highest known | method | source"
PER_TASK = "data (official) | method | task 1 | task 2 | task 3 | task 4 | task 5 | source"
NOTE = (
    "Published by others: 1M steps, OGBench's own data, means over five tasks and single ones. Another scale and "
    "other data than the table above, so for orientation only."
)


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Rows of runs and of their episodes, with the mean of the last three evaluations."""
    of_runs, episodes = gather.gather_all(runs)
    last = {(str(run), *replica): mean for run in runs for replica, mean in last_three(run).items()}
    keys = of_runs[["run", "task", "seed"]].itertuples(index=False, name=None)
    return [of_runs.assign(last_three=[str(last.get(key, "")) for key in keys]), episodes]


def last_three(run: Path) -> dict[tuple[str, str], float]:
    """Mean success of the last three evaluations, where there are three, by (task, seed)."""
    rows = numbers(read(run / "value" / "evaluation.csv"), whole=["step"], real=["success"])
    steps = rows[rows["num_actions"] != "1"].groupby(["task", "seed", "step"])["success"].mean()
    return {key: float(means[-3:].mean()) for key, means in steps.groupby(["task", "seed"]) if len(means) >= 3}


def refuse(frames: Sequence[Frame]) -> None:
    """Raises `UserError` for runs that share no table, or one that was named twice."""
    runs = complete(frames[0], METHOD)
    gather.refuse_mixtures(runs)
    for _, of_env in runs.groupby("env"):
        gather.refuse_differences(of_env, ALIKE, ", which the table hides.")
    same = [*METHOD, "task", "seed"]
    for _, twins in runs[runs.duplicated(same, keep=False)].groupby(same):
        names = " and ".join(twins["run"][:2])
        raise UserError(f"{names} have the same settings, task and seed: name one of them.")


def named(row: dict[str, str]) -> str:
    """The environment, with what was made of its rewards."""
    return f"{row['env']}, sparse" if row["reward"] == "sparse" else row["env"]


def target(row: dict[str, str]) -> str:
    """The TD target and its return axis. (Rows of revision 90dd10a name none: all had that of the possible returns.)"""
    return ", ".join(filter(None, (f"`{row['td_target']}`", row["return_axis"])))


def by_method(runs: Frame) -> Iterator[Frame]:
    """The rows of each method, in the order in which they came."""
    for _, rows in complete(runs, METHOD).groupby(list(METHOD), sort=False):
        yield rows


def lines(runs: Frame) -> Iterator[Frame]:
    """The rows of each line of the table: of one method, all tasks with the seeds that they share; then those with more
    seeds again, with all of them."""
    for rows in by_method(runs):
        seeds = rows.groupby("task")["seed"].agg(frozenset)
        shared = frozenset.intersection(*seeds)
        if shared:
            yield rows[rows["seed"].isin(shared)]
        for group in dict.fromkeys(seeds):
            if group != shared:
                yield rows[[seeds[task] == group for task in rows["task"]]]


def episodes_of(rows: Frame, episodes: Frame) -> Frame:
    return episodes.merge(rows[["run", "task", "seed"]])


def mean_line(rows: Frame, episodes: Frame) -> tuple:
    """A line of the first table: means over the tasks of a method."""
    first, chosen = rows.iloc[0], episodes_of(rows, episodes)
    last = [float(value) for value in rows["last_three"] if value]
    return (
        f"{named(first)} ({first['data_source']})",
        " ".join(sorted(set(rows["task"]))),
        rows["seed"].nunique(),
        target(first),
        f"`{first['next_action']}`",
        *first[["critic", "horizon", "discount", "return_temperature", "action_temperature"]],
        f"{int(first['steps']):,}",
        f"**{cell(chosen[chosen['num_actions'] != '1'])}**",
        f"{np.mean(last):.0%}" if last else "",
        cell(chosen[chosen["num_actions"] == "1"]),
        f"{np.mean(crps):.1f}" if (crps := [float(value) for value in rows["crps"] if value]) else "",
    )


def single_line(row: dict[str, str]) -> tuple:
    """A line of the second table: one task and seed."""
    number, rates = int(row["episodes"]), [float(row[name]) for name in ("success", "base_success")]
    names = ("discount", "return_temperature", "action_temperature", "task", "seed")
    cells = [percent(rate, *success_interval(rate * number, number)) for rate in rates]
    return named(row), target(row), f"`{row['next_action']}`", *(row[name] for name in names), *cells


def published(runs: Frame) -> tuple[str, str]:
    """What others published: the highest means that are known, and numbers per task."""
    means, tasks = (read(PUBLISHED / f"{name}.csv") for name in ("published", "published_tasks"))
    means = means[means["env"].str.partition(" ")[0].isin(runs["env"])]
    tasks = tasks[tasks["env"].isin(runs["env"])]
    return (
        table(OTHERS, ((row.env, f"{row.success}%", row.method, row.source) for row in means.itertuples())),
        table(
            PER_TASK,
            (
                (row["env"], row["method"], *(f"{row[f'task_{task}']}%" for task in range(1, 6)), row["source"])
                for row in tasks.to_dict("records")
            ),
        ),
    )


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown, and figures: success per task of each environment, and calibration."""
    runs, episodes = complete(frames[0], METHOD), frames[1]
    means = table(MEANS, (mean_line(rows, episodes) for rows in lines(runs)))
    singles = [
        single_line(row)
        for rows in by_method(runs)
        for row in rows.sort_values(["task", "seed"], kind="stable").to_dict("records")
    ]
    for env, of_env in runs.groupby("env"):
        draw_success(of_env, episodes, place.path(f"{env}.png"))
    draw_calibration(runs, place.path("calibration.png"))
    parts = (means, "Per task and seed:\n", table(SINGLES, singles), f"{NOTE}\n", *published(runs))
    return "\n".join(parts)


def draw_success(runs: Frame, episodes: Frame, path: Path) -> None:
    """Success per task, of the line with the most tasks, and of these with the highest success."""
    rows = max(lines(runs), key=lambda rows: (rows["task"].nunique(), rows["success"].astype(float).mean()))
    chosen = numbers(episodes_of(rows, episodes), whole=["length", "num_actions"], real=["success"])
    first = rows.iloc[0]
    title = f"{named(first)} ({first['data_source']} data)\n"
    title += f"{first['td_target']}, {first['next_action']}, horizon {first['horizon']}, discount {first['discount']}, "
    title += f"tau_R {first['return_temperature']}, tau_Q {first['action_temperature']}"
    figures.success(summarise(chosen.to_dict("records"), ("task", "num_actions")), path, title=title)


def reliability(runs: Frame) -> tuple[list[str], dict[str, dict[float, float]]]:
    """The tasks that all reward models of one environment share, and per kind of model the share of observed returns
    below each predicted quantile, a mean over these tasks and the seeds. Only of backups that model the policy that
    made the data."""
    runs = complete(runs, ["below_0.5", "reward"])
    runs = runs[(runs["next_action"] != "softmax") & (runs["below_0.5"] != "")]
    sparse = runs["reward"].map(lambda reward: ", sparse" * (reward == "sparse"))
    label = runs["td_target"] + ", " + runs["critic"] + ", horizon " + runs["horizon"] + ", discount "
    kinds = runs.groupby(label + runs["discount"] + sparse, sort=False)
    shared = sorted(set.intersection(*kinds["task"].agg(set))) if len(kinds) else []
    levels = [name for name in runs if name.startswith("below_")]
    points = {
        label: {
            float(name.removeprefix("below_")): rows.loc[rows["task"].isin(shared), name].astype(float).mean()
            for name in levels
        }
        for label, rows in kinds
    }
    return shared, points if shared else {}


def draw_calibration(runs: Frame, path: Path) -> None:
    """Predicted quantiles against the share of observed returns below them, a panel per environment."""
    panels = {env: reliability(of_env) for env, of_env in runs.groupby("env", sort=False)}
    panels = {env: panel for env, panel in panels.items() if panel[1]}
    if not panels:
        return
    figure, axes = figures.subplots(1, len(panels), width=4.2 * len(panels), height=3.8)
    for axis, (env, (shared, curves)) in zip(axes[0], panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], "k:", lw=1)
        for label, points in curves.items():
            axis.plot(list(points), list(points.values()), "o-", ms=3, lw=1, label=label)
        axis.set(xlabel="predicted quantile", ylabel="share of observed returns below", xlim=(0, 1), ylim=(0, 1))
        source = runs.loc[runs["env"] == env, "data_source"].iloc[0]
        axis.set_title(f"{env} ({source} data), task {' '.join(shared)}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figures.save(figure, path)
