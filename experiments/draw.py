"""Draws the tables and figures of `results/` again, from the rows in `results/`.

    python -m experiments.draw

Nothing is trained or evaluated, and no run directory is needed. (`speed.*`, `inference.md`, `same_data.md` and
`soak.png` are of their benchmarks, which measure and draw in one go; `quick.md` and `notes.md` are words,
`revision-90dd10a/` is drawn by that revision.)
"""

import dataclasses
from pathlib import Path

from benchmarks import return_law
from common.errors import run_cli
from common.metrics import read_csv
from experiments import baselines, candidates, preview, saturation, sweeps, tasks, training

HERE = Path(__file__).parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Args:
    """Draw everything again; there is nothing to set."""


def names(pattern: str) -> list[str]:
    """What stands for the `*` of a pattern in the names of files of `results/`."""
    before, after = pattern.split("*")
    return sorted(path.name.removeprefix(before).removesuffix(after) for path in HERE.glob(pattern))


def main(args: Args) -> None:
    """See the top of the file."""
    for name in names("*_runs.csv"):
        # Which module gathered them is told by the columns that it alone writes.
        columns = read_csv(HERE / f"{name}_runs.csv")[0]
        if "last_three" in columns:
            tasks.main(tasks.Args(name=name))
        elif "settings" in columns:
            baselines.main(baselines.Args(name=name, append=True))
        else:
            preview.main(preview.Args(name=name))
    for name in names("sweep_*_episodes.csv"):
        sweeps.main(sweeps.Args(name))
    for name in names("training_*_episodes.csv"):
        training.main(training.Args(name))
    if (HERE / "saturation.csv").is_file():
        saturation.main(saturation.Args())
    if (HERE / "candidates.csv").is_file():
        candidates.main(candidates.Args())
    for path in sorted((HERE / "laws").glob("*.csv")):
        return_law.report(return_law.read_rows(path), path)


if __name__ == "__main__":
    run_cli(main, Args)
