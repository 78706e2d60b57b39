"""Rows of results: where they stand, how they are read and written, and the cell that all tables share.

Stored rows stand in `results/QUESTION/`. Drawing writes to `runs/tables/QUESTION/`, and to the stored place only with
`--update`. A question with several tables has names such as `thirty-tasks/tau_r`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import UserError
from common.files import write_csv
from common.statistics import mean_interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
TABLES = ROOT / "runs" / "tables"
Frame = pd.DataFrame


@dataclasses.dataclass(frozen=True)
class Place:
    """The files of a table in the folder of its question."""

    folder: Path
    """`RESULTS` or `TABLES`."""
    name: str
    """QUESTION, or QUESTION/PART where a question has several tables."""
    rows: Path
    """Where rows are read: `RESULTS` or `TABLES`."""

    def path(self, file: str) -> Path:
        """Where a file of the table goes."""
        question, _, part = self.name.partition("/")
        return self.folder / question / (f"{part}_{file}" if part else file)

    def beside(self, name: str, file: str) -> Path:
        """A file with rows of this or of another table."""
        return Place(self.rows, name, self.rows).path(file)

    def table(self, text: str) -> None:
        """Writes a table: between its marks in README.md where it has them, else to `table.md`."""
        path, readme = self.path("table.md"), self.path("x").parent / "README.md"
        old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        marks = rf"(<!-- table {self.name} -->\n).*?(<!-- end -->)"
        if re.search(marks, old, re.S):
            path, text = readme, re.sub(marks, lambda mark: f"{mark[1]}{text}{mark[2]}", old, flags=re.S)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def read(path: Path) -> Frame:
    """Rows of a CSV file. All values are words, so what is written again stays as it was."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def write(path: Path, frame: Frame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, list(frame), frame.to_dict("records"))


def frame(records: Iterable[Mapping[str, Any]]) -> Frame:
    """Dictionaries as rows, in words as if they were read from a file."""
    records = list(records)
    names = list(dict.fromkeys(name for record in records for name in record))
    words = [["" if (value := record.get(name)) is None else str(value) for name in names] for record in records]
    return pd.DataFrame(words, columns=names, dtype=object)


def numbers(frame: Frame, whole: Iterable[str] = (), real: Iterable[str] = ()) -> Frame:
    """The frame with whole and real numbers in some of its columns."""
    kinds = dict.fromkeys(whole, int) | dict.fromkeys(real, float)
    return frame.astype({name: kind for name, kind in kinds.items() if name in frame})


def complete(frame: Frame, names: Iterable[str]) -> Frame:
    """The frame with empty columns for those of `names` that it lacks: rows of older revisions say less."""
    return frame.reindex(columns=list(dict.fromkeys([*frame, *names])), fill_value="")


def rate(episodes: Frame) -> tuple[float, float, float]:
    """Mean success over tasks with the ends of its 95% interval over seeds and episodes.

    Raises:
        UserError: the tasks differ in their number of seeds.
    """
    solved = numbers(episodes, real=["success"])
    groups = [
        np.stack([of_seed.to_numpy() for _, of_seed in task.groupby("seed")["success"]])
        for _, task in solved.groupby("task")
    ]
    if len(set(map(len, groups))) > 1:
        raise UserError("some tasks have more seeds than others: name runs of the same seeds.")
    return float(np.mean([group.mean() for group in groups])), *mean_interval(groups)


def percent(mean: float, low: float, high: float) -> str:
    return f"{mean:.0%} [{low:.0%}, {high:.0%}]"


def cell(episodes: Frame) -> str:
    """Success and its interval, for a table."""
    return percent(*rate(episodes))


def table(header: str, lines: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; the header's columns are parted by ` | `."""
    rule = "|---" * (header.count(" | ") + 1) + "|"
    rows = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"| {header} |", rule, *rows]) + "\n"
