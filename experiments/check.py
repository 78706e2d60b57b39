"""Does a command give its stored rows again? Compares a run with the rows of `results/thirty-tasks` or
`results/tasks`, episode by episode.

    python -m experiments.run --only thirty-tasks --env pointmaze-large-navigate
    python -m experiments.check --runs runs/thirty/pointmaze-large-navigate

A row is found by its run directory as it was named then, its task and its seed. On the same machine with the same
versions all episodes are the same; elsewhere rounding differs, and after long training so do the numbers: the table
shows both, and what of data, versions and hardware is not as it was.
"""

import dataclasses
from pathlib import Path

import pandas as pd

from common.cli import run_cli
from common.errors import UserError
from common.statistics import success_interval
from experiments import rows
from experiments.gather import gather_all
from experiments.rows import Frame, complete, percent, read, table
from experiments.tasks import ALIKE, FILES, METHOD

HEADER = "run | task | seed | success | stored | same episodes | CRPS | stored"
TABLES = ("thirty-tasks", "tasks")
EPISODE = ["run", "task", "seed", "num_actions", "episode", "success", "length"]


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare runs with their stored rows."""

    runs: tuple[Path, ...]
    """Run directories of evor_value.py, named as when the rows were gathered."""


def stored_row(new: dict[str, str], stored: Frame) -> dict[str, str]:
    """The stored row of a run's task and seed.

    Raises:
        UserError: there is none, or it has other settings.
    """
    run, task, seed = (new[name] for name in ("run", "task", "seed"))
    same = stored[(stored["run"] == run) & (stored["task"] == task) & (stored["seed"] == seed)]
    if not len(same):
        raise UserError(f"no table has a row of {run}, task {task}, seed {seed}.")
    old = same.iloc[0].to_dict()
    old["noise_scale"] = old.get("noise_scale") or "1.0"  # older revisions had no other
    # The base policy's file may be another: it names its revision. Whether it does the same, its own episodes say.
    for field in {*METHOD, *ALIKE, "bc_steps"} - {"policy_sha256"}:
        if new.get(field, "") != old.get(field, ""):
            raise UserError(
                f"{run} was made with another {field} than its row: {new.get(field)}, not {old.get(field)}."
            )
    return old


def success_cell(row: dict[str, str]) -> str:
    rate, number = float(row["success"]), int(row["episodes"])
    return percent(rate, *success_interval(rate * number, number))


def main(args: Args) -> str:
    """Prints and returns the comparison."""
    folders = [folder for name in TABLES if (folder := rows.RESULTS / name).is_dir()]
    stored, stored_episodes = (pd.concat([read(folder / file) for folder in folders]).fillna("") for file in FILES)
    new_rows, episodes = gather_all(args.runs)
    lines, around = [], {}
    for new in complete(new_rows, METHOD).to_dict("records"):
        old = stored_row(new, stored)
        replica = {name: new[name] for name in ("run", "task", "seed")}
        now, then = (
            set(frame.merge(rows.frame([replica]))[EPISODE].itertuples(index=False, name=None))
            for frame in (episodes, stored_episodes)
        )
        same = f"{len(now & then)} of {len(then)}"
        lines.append((*replica.values(), success_cell(new), success_cell(old), same, new["crps"], old["crps"]))
        names = [name for name in new if name in ("data_sha256", "hardware") or name.startswith("version_")]
        around |= {f"{name}: {new[name]}, then {old.get(name)}": None for name in names if new[name] != old.get(name)}
    alike = "Not as it was: " + "; ".join(around) if around else "Data, versions and hardware alike."
    text = f"{table(HEADER, lines)}\n{alike}"
    print(text)
    return text


if __name__ == "__main__":
    run_cli(main, Args)
