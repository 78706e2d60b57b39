"""The table of environments and methods: means over tasks with intervals, per-task numbers, published ones beside them.

    python -m experiments.tasks --runs runs/tasks/* runs/seeds/* runs/paper/*
    python -m experiments.tasks --append --runs runs/tasks/scene-play
    python -m experiments.tasks

The first command gathers runs of `evor_value.py` into `tasks_runs.csv` (a row per run, task and seed, with all settings
and versions) and `tasks_episodes.csv` (a row per episode), the second adds a run to them (or puts it in the place of
one of the same name), the third only draws `tasks.md` and a figure per environment from them again. Success is that of
the last checkpoint. A mean of the last three evaluations stands in a column of its own, where a run has them.
Intervals: bootstrap over seeds and episodes for means over tasks, Wilson's over episodes for one task and seed. Runs
that differ in a setting which the table does not show are refused: `experiments.training` draws those.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common import figures
from common.errors import UserError, run_cli
from common.metrics import read_csv, write_csv
from common.statistics import mean_interval, success_interval
from evor_infer import summarise
from experiments.preview import gather, refuse_mixtures

ROOT = Path(__file__).parent.parent / "results"
HERE = ROOT
METHOD = ("env", "reward", "horizon", "td_target", "return_axis", "next_action", "critic", "discount", "steps")
METHOD += ("return_temperature", "action_temperature")
ALIKE = ("head_width", "head_depth", "width", "depth", "batch_size", "tau", "target_steps", "return_width")
ALIKE += ("solver",)
ALIKE += ("num_next_actions", "backup_temperature", "learning_rate", "schedule", "num_actions", "num_returns")
ALIKE += ("ignored_observations", "clip_margin", "backup_returns", "redraw_bank", "flow_steps", "policy_sha256")


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw the table of environments and methods."""

    runs: tuple[Path, ...] = ()
    """Run directories to gather first; none: what is stored."""
    name: str = "tasks"
    """Prefix of the files."""
    append: bool = False
    """Add to the rows that stand there."""


Rows = list[dict[str, str]]


def refuse(runs: Rows) -> None:
    """Raises `UserError` for runs that share no table, or one that was named twice."""
    refuse_mixtures(runs)
    for env in dict.fromkeys(row["env"] for row in runs):
        for field in ALIKE:
            found = {row[field]: row["run"] for row in select(runs, env=env) if row.get(field, "") != ""}
            if len(found) > 1:
                raise UserError(f"{' and '.join(list(found.values())[:2])} differ in {field}, which the table hides.")
    for rows in by_method(runs):
        seen: dict[tuple[str, str], str] = {}
        for row in rows:
            key = row["task"], row["seed"]
            if key in seen:
                raise UserError(
                    f"{seen[key]} and {row['run']} have the same settings, task and seed: name one of them."
                )
            seen[key] = row["run"]


def select(rows: Rows, **values: str) -> Rows:
    return [row for row in rows if all(row.get(key, "") == value for key, value in values.items())]


def named(row: dict[str, str]) -> str:
    """The environment, with what was made of its rewards."""
    return f"{row['env']}, sparse" if row["reward"] == "sparse" else row["env"]


def target(row: dict[str, str]) -> str:
    """The TD target and its return axis. (Rows of revision 90dd10a name none: all had that of the possible returns.)"""
    return ", ".join(filter(None, (f"`{row['td_target']}`", row.get("return_axis"))))


def by_method(runs: Rows) -> Iterator[Rows]:
    """The rows of each method, in the order in which they came."""
    for method in dict.fromkeys(tuple(row.get(key, "") for key in METHOD) for row in runs):
        yield select(runs, **dict(zip(METHOD, method, strict=True)))


def lines(runs: Rows) -> Iterator[Rows]:
    """The rows of each line of the table: of one method, all tasks with the seeds that they share; then those with more
    seeds again, with all of them."""
    for rows in by_method(runs):
        seeds = {task: frozenset(row["seed"] for row in select(rows, task=task)) for task in tasks_of(rows)}
        shared = frozenset.intersection(*seeds.values())
        if shared:
            yield [row for row in rows if row["seed"] in shared]
        for group in dict.fromkeys(seeds.values()):
            if group != shared:
                yield [row for row in rows if seeds[row["task"]] == group]


def tasks_of(rows: Rows) -> list[str]:
    return sorted({row["task"] for row in rows})


def success_arrays(rows: Rows, episodes: Rows, *, base: bool) -> list[np.ndarray]:
    """Per task of a line, (seeds, episodes): of the base policy alone, or of the extracted one."""
    arrays = []
    for task in tasks_of(rows):
        found = []
        for row in sorted(select(rows, task=task), key=lambda row: row["seed"]):
            own = select(episodes, run=row["run"], task=task, seed=row["seed"])
            found.append([float(one["success"]) for one in own if (one["num_actions"] == "1") == base])
        arrays.append(np.array(found))
    return arrays


def mean_cell(arrays: list[np.ndarray]) -> str:
    low, high = mean_interval(arrays)
    return f"{np.mean([array.mean() for array in arrays]):.0%} [{low:.0%}, {high:.0%}]"


def task_cell(rate: float, episodes: int) -> str:
    low, high = success_interval(rate * episodes, episodes)
    return f"{rate:.0%} [{low:.0%}, {high:.0%}]"


def table(runs: Rows, episodes: Rows, published: Rows, published_tasks: Rows) -> str:
    """Markdown: the means over tasks, then every task, then what others published."""
    means = [
        "| data | tasks | seeds | target | backup | critic | h | discount | tau_R | tau_Q | steps | EVOR "
        "| last three evaluations | base policy alone | CRPS |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    singles = [
        "| data | target | backup | discount | tau_R | tau_Q | task | seed | EVOR | base policy alone |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in lines(runs):
        one = rows[0]
        evor, base = (mean_cell(success_arrays(rows, episodes, base=base)) for base in (False, True))
        last = [float(row["last_three"]) for row in rows if row["last_three"]]
        seeds = {row["seed"] for row in rows}
        means.append(
            f"| {named(one)} ({one['data_source']}) | {' '.join(tasks_of(rows))} | {len(seeds)} "
            f"| {target(one)} | `{one['next_action']}` | {one['critic']} | {one['horizon']} "
            f"| {one['discount']} | {one['return_temperature']} | {one['action_temperature']} "
            f"| {int(one['steps']):,} | **{evor}** | {f'{np.mean(last):.0%}' if last else ''} | {base} "
            f"| {np.mean([float(row['crps']) for row in rows]):.1f} |"
        )
    for rows in by_method(runs):
        for row in sorted(rows, key=lambda row: (row["task"], row["seed"])):
            cells = [task_cell(float(row[f"{name}success"]), int(row["episodes"])) for name in ("", "base_")]
            names = ("discount", "return_temperature", "action_temperature", "task", "seed")
            values = " | ".join(row[name] for name in names)
            singles.append(
                f"| {named(row)} | {target(row)} | `{row['next_action']}` | {values} | {' | '.join(cells)} |"
            )
    environments = {row["env"] for row in runs}
    others = ["| data (official) | highest known | method | source |", "|---|---|---|---|"]
    others += [
        f"| {row['env']} | {row['success']}% | {row['method']} | {row['source']} |"
        for row in published
        if row["env"].partition(" ")[0] in environments
    ]
    note = (
        "Published by others: 1M steps, OGBench's own data, means over five tasks and single ones. Another scale and "
        "other data than the table above, so for orientation only."
    )
    per_task = ["| data (official) | method | task 1 | task 2 | task 3 | task 4 | task 5 | source |", "|---" * 8 + "|"]
    per_task += [
        f"| {row['env']} | {row['method']} | {' | '.join(row[f'task_{task}'] + '%' for task in range(1, 6))} "
        f"| {row['source']} |"
        for row in published_tasks
        if row["env"] in environments
    ]
    parts = [*means, "", "Per task and seed:", "", *singles, "", note, "", *others, "", *per_task]
    return "\n".join(parts) + "\n"


def draw(runs: Rows, episodes: Rows, name: str) -> None:
    """Success per task, of the line with the most tasks of each environment, and of these with the highest success:
    `NAME_ENV.png`."""
    for env in dict.fromkeys(row["env"] for row in runs):
        found = lines(select(runs, env=env))
        rows = max(found, key=lambda rows: (len(tasks_of(rows)), np.mean([float(row["success"]) for row in rows])))
        replicas = {(row["run"], row["task"], row["seed"]) for row in rows}
        own = [
            row | dict(success=float(row["success"]), length=int(row["length"]), num_actions=int(row["num_actions"]))
            for row in episodes
            if (row["run"], row["task"], row["seed"]) in replicas
        ]
        one = rows[0]
        title = f"{named(one)} ({one['data_source']} data)\n"
        title += f"{one['td_target']}, {one['next_action']}, horizon {one['horizon']}, "
        title += f"discount {one['discount']}, tau_R {one['return_temperature']}, tau_Q {one['action_temperature']}"
        figures.success(summarise(own, ("task", "num_actions")), HERE / f"{name}_{env}.png", title=title)


def reliability(runs: Rows) -> tuple[list[str], dict[str, dict[float, float]]]:
    """The tasks that all reward models of one environment share, and per kind of model the share of observed returns
    below each predicted quantile, a mean over these tasks and the seeds. Only of backups that model the policy that
    made the data."""
    kinds: dict[str, Rows] = {}
    for row in runs:
        if row["next_action"] != "softmax" and row.get("below_0.5"):
            label = f"{row['td_target']}, {row['critic']}, horizon {row['horizon']}, discount {row['discount']}"
            label += ", sparse" * (row.get("reward") == "sparse")
            kinds.setdefault(label, []).append(row)
    shared = set.intersection(*(set(tasks_of(rows)) for rows in kinds.values())) if kinds else set()
    found = {}
    for label, rows in kinds.items() if shared else ():
        levels = [key for key in rows[0] if key.startswith("below_")]
        found[label] = {
            float(key.removeprefix("below_")): np.mean([float(row[key]) for row in rows if row["task"] in shared])
            for key in levels
        }
    return sorted(shared), found


def draw_calibration(runs: Rows, path: Path) -> None:
    """Predicted quantiles against the share of observed returns below them, a panel per environment."""
    panels = {env: reliability(select(runs, env=env)) for env in dict.fromkeys(row["env"] for row in runs)}
    panels = {env: (shared, found) for env, (shared, found) in panels.items() if found}
    if not panels:
        return
    figure, axes = figures.subplots(1, len(panels), width=4.2 * len(panels), height=3.8)
    for axis, (env, (shared, found)) in zip(axes[0], panels.items(), strict=True):
        axis.plot([0, 1], [0, 1], "k:", lw=1)
        for label, points in found.items():
            axis.plot(list(points), list(points.values()), "o-", ms=3, lw=1, label=label)
        axis.set(xlabel="predicted quantile", ylabel="share of observed returns below", xlim=(0, 1), ylim=(0, 1))
        source = select(runs, env=env)[0]["data_source"]
        axis.set_title(f"{env} ({source} data), task {' '.join(shared)}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower right")
    figures.save(figure, path)


def last_three(run: Path) -> dict[tuple[str, str], float]:
    """Mean success of the last three evaluations, where there are three, by (task, seed)."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in read_csv(run / "value" / "evaluation.csv"):
        if row["num_actions"] != "1":
            found.setdefault((row["task"], row["seed"]), {}).setdefault(int(row["step"]), []).append(
                float(row["success"])
            )
    return {
        key: float(np.mean([np.mean(steps[step]) for step in sorted(steps)[-3:]]))
        for key, steps in found.items()
        if len(steps) >= 3
    }


def main(args: Args) -> None:
    """Gathers, if runs are named, and draws."""
    paths = [HERE / f"{args.name}_{kind}.csv" for kind in ("runs", "episodes")]
    if args.runs:
        kept = [read_csv(path) if args.append and path.is_file() else [] for path in paths]
        rows, raw = ([row for row in old if row["run"] not in map(str, args.runs)] for old in kept)
        for run in args.runs:
            episodes, summary = gather(run)
            last = last_three(run)
            raw += [row | dict(run=str(run)) for row in episodes]
            rows += [
                row | dict(run=str(run), last_three=last.get((str(row["task"]), str(row["seed"])), ""))
                for row in summary
            ]
        refuse([{key: str(value) for key, value in row.items()} for row in rows])
        for path, found in zip(paths, (rows, raw), strict=True):
            write_csv(path, list(dict.fromkeys(key for row in found for key in row)), found)
    if not paths[0].is_file():
        raise UserError(f"there is no {paths[0]}: name run directories with --runs.")
    stored = [read_csv(path) for path in paths]
    published = [read_csv(ROOT / f"published{name}.csv") for name in ("", "_tasks")]
    text = table(*stored, *published)
    (HERE / f"{args.name}.md").write_text(text)
    draw(*stored, args.name)
    draw_calibration(stored[0], HERE / f"{args.name}_calibration.png")
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
