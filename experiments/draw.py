"""Gathers rows of runs, and draws tables and figures of rows.

    python -m experiments.draw
    python -m experiments.draw tasks --runs runs/tasks/cube-double-play runs/seeds/cube-double-play
    python -m experiments.draw tasks --append --runs runs/tasks/scene-play

The first command draws every table and figure again from the stored rows, into `runs/tables/`. The second makes rows of
runs and draws those. The third adds the rows of a run to the stored ones, or puts them in the place of those of the
same run. Only `--update` writes to `results/`. Nothing is trained or evaluated.

The benchmarks measure and draw in one go (`results/speed`, `inference`, `same_data`, `soak`). Revision 90dd10a drew
`results/revision-90dd10a`.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pandas as pd
import tyro

from benchmarks import return_law
from common.cli import run_cli
from common.errors import UserError
from experiments import (
    axes,
    base_policy,
    baselines,
    candidates,
    relative,
    returns,
    rows,
    saturation,
    sweeps,
    targets,
    tasks,
    thirty,
    training,
)
from experiments.rows import Place

# The module of each table. It has FILES, the names of its row files, and `draw`; and, where rows are made of runs,
# `gather_all`, and maybe `refuse` and KEY, the columns that tell whether two rows are of the same run. ROWS names the
# table whose rows it draws, where it has none of its own.
DRAWN: dict[str, ModuleType] = {
    "thirty-tasks": thirty,
    **dict.fromkeys([f"thirty-tasks/{part}" for part in ("num_actions", "tau_q", "tau_r")], relative),
    "tasks": tasks,
    **dict.fromkeys(("targets", "target_steps", "next_actions", "critics"), targets),
    **dict.fromkeys(("baselines", "backups"), baselines),
    **dict.fromkeys(("schedule", "capacity"), training),
    **dict.fromkeys(("num_actions", "action_noise"), sweeps),
    "axes": axes,
    "beyond-ogbench": returns,
    "base_policy": base_policy,
    "candidates": candidates,
    "saturation": saturation,
}
KEY = ("run",)


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw tables and figures."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Tables, as their folders are named; all by default."""
    runs: tuple[Path, ...] = ()
    """Run directories, or the --out folders of a sweep, to make rows of; none: the stored rows."""
    append: bool = False
    """Add to the rows that stand there."""
    rows: Path | None = None
    """Where rows are read: `results/` by default, `runs/tables` for those that were made here."""
    update: bool = False
    """Write to `results/` instead of `runs/tables/`."""


def merge(old: rows.Frame, new: rows.Frame, key: tuple[str, ...]) -> rows.Frame:
    """Both, but for those old rows that the new ones replace.

    Raises:
        UserError: the rows do not say of which run they are.
    """
    if new.empty:
        return old
    key = [name for name in key if name in old and name in new]
    if not key:
        raise UserError("--append: this table is made of all its runs at once: name them all.")
    replaced = pd.MultiIndex.from_frame(old[key]).isin(pd.MultiIndex.from_frame(new[key]))
    return pd.concat([old[~replaced], new], ignore_index=True).fillna("")


def draw(name: str, args: Args) -> str:
    """Gathers, if runs are named, and draws; returns the table.

    Raises:
        UserError: there are no rows, or rows that share no table.
    """
    kind = DRAWN[name]
    place = Place(rows.RESULTS if args.update else rows.TABLES, name, args.rows or rows.RESULTS)
    frames = None
    if args.append or not args.runs:
        paths = [place.beside(getattr(kind, "ROWS", name), file) for file in kind.FILES]
        if not paths[0].is_file():
            raise UserError(f"there is no {paths[0]}: name run directories with --runs.")
        frames = [rows.read(path) for path in paths]
    if args.runs:
        gathered = kind.gather_all(args.runs)
        key = getattr(kind, "KEY", KEY)
        frames = [merge(*pair, key) for pair in zip(frames, gathered, strict=True)] if frames else gathered
        if hasattr(kind, "refuse"):
            kind.refuse(frames)
        for file, frame in zip(kind.FILES, frames, strict=True):
            rows.write(place.path(file), frame)
    text = kind.draw(frames, place)
    place.table(text)
    return text


def main(args: Args) -> None:
    """See the top of the file.

    Raises:
        UserError: there is no such table, or runs are named for several or for one that is not made of runs.
    """
    unknown = [name for name in args.names if name not in DRAWN]
    if unknown:
        raise UserError(f"there is no table {unknown[0]!r}: choose among {', '.join(DRAWN)}.")
    if args.runs and (len(args.names) != 1 or not hasattr(DRAWN[args.names[0]], "gather_all")):
        raise UserError("--runs makes rows of one table: name one that is made of run directories.")
    for name in args.names or DRAWN:
        print(f"{name}\n\n{draw(name, args)}")
    print(f"in {rows.RESULTS if args.update else rows.TABLES}")
    for path in sorted((rows.RESULTS / "laws").glob("*.csv")) if not args.names else ():
        out = path if args.update else rows.TABLES / "laws" / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        return_law.report(return_law.read_rows(path), out)


if __name__ == "__main__":
    run_cli(main, Args)
