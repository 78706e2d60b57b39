"""Does a command give its stored rows again? Compares a run with the rows of `tasks_*.csv`, episode by episode.

    python -m experiments.run --only policies seeds
    python -m experiments.check --runs runs/seeds/cube-single-play

A row is found by its run directory as it was named then, its task and its seed. On the same machine with the same
versions all episodes are the same; elsewhere rounding differs, and after long training so do the numbers: the table
shows both, and what of data, versions and hardware is not as it was.
"""

import dataclasses
from pathlib import Path

from common.errors import UserError, run_cli
from common.metrics import read_csv
from common.statistics import success_interval
from experiments.preview import gather
from experiments.tasks import ALIKE, HERE, METHOD, select

Rows = list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare runs with their stored rows."""

    runs: tuple[Path, ...]
    """Run directories of evor_value.py, named as when the rows were gathered."""


def compare(run: Path, stored: Rows, stored_episodes: Rows) -> tuple[list[str], list[str]]:
    """A line of the table per task and seed, and the names and values of what differs around them.

    Raises:
        UserError: there is no such row, or it has other settings.
    """
    raw, rows = ([{k: str(v) for k, v in row.items()} for row in found] for found in gather(run))
    lines, around = [], []
    for row in rows:
        key = dict(task=row["task"], seed=row["seed"])
        olds = select(stored, run=str(run), **key)
        if not olds:
            raise UserError(f"tasks_runs.csv has no row of {run}, task {row['task']}, seed {row['seed']}.")
        old = olds[0]
        # The base policy's file may be another: it names its revision. Whether it does the same, its own episodes say.
        for field in (*METHOD, *ALIKE, "bc_steps"):
            if field != "policy_sha256" and row.get(field, "") != old.get(field, ""):
                raise UserError(
                    f"{run} was made with another {field} than its row: {row.get(field)}, not {old.get(field)}."
                )
        around += [
            f"{field}: {row[field]}, then {old[field]}"
            for field in row
            if (field in ("data_sha256", "hardware") or field.startswith("version_")) and row[field] != old.get(field)
        ]
        names = ("num_actions", "episode", "success", "length")
        now, then = (
            {tuple(one[name] for name in names) for one in select(found, **key)}
            for found in (raw, select(stored_episodes, run=str(run)))
        )
        cells = []
        for one in (row, old):
            low, high = success_interval(float(one["success"]) * int(one["episodes"]), int(one["episodes"]))
            cells.append(f"{float(one['success']):.0%} [{low:.0%}, {high:.0%}]")
        lines.append(
            f"| {run} | {row['task']} | {row['seed']} | {' | '.join(cells)} | {len(now & then)} of {len(then)} "
            f"| {row['crps']} | {old['crps']} |"
        )
    return lines, list(dict.fromkeys(around))


def main(args: Args) -> str:
    """Prints and returns the comparison."""
    paths = [HERE / f"tasks_{kind}.csv" for kind in ("runs", "episodes")]
    stored, episodes = map(read_csv, paths)
    lines = ["| run | task | seed | success | stored | same episodes | CRPS | stored |", "|---" * 8 + "|"]
    around: list[str] = []
    for run in args.runs:
        found, differing = compare(run, stored, episodes)
        lines += found
        around += differing
    lines += [
        "",
        "Not as it was: " + "; ".join(dict.fromkeys(around)) if around else "Data, versions and hardware alike.",
    ]
    text = "\n".join(lines)
    print(text)
    return text


if __name__ == "__main__":
    run_cli(main, Args)
