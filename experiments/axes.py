"""The return axis of the data against the one of the possible returns: calibration and success on the thirty tasks.

The rows are those of `thirty-tasks`, in which the two differ in the axis alone.
"""

import itertools
from collections.abc import Sequence

from experiments import thirty
from experiments.rows import Frame, Place, cell, numbers, table

ROWS = "thirty-tasks"
FILES = thirty.FILES
METRICS = ("crps", "correlation")
METHODS = (thirty.BOUNDS, thirty.DEFAULT)
HEADER = "data | task | CRPS: bounds | quantiles | correlation: bounds | quantiles | success: bounds | quantiles"


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: a line for each task that both axes ran, means over seeds, intervals over seeds and episodes."""
    runs, episodes = thirty.named(frames)
    runs = numbers(runs[runs["method"].isin(METHODS) & (runs["crps"] != "")], real=METRICS)
    extracted = episodes[episodes["num_actions"] != "1"]
    means = runs.pivot_table(index=["line", "task"], columns="method", values=list(METRICS))
    means = means.reindex(columns=itertools.product(METRICS, METHODS)).dropna()  # the columns of the table
    lines = []
    for (line, task), mean in means.iterrows():
        success = (cell(thirty.of(extracted[extracted["task"] == task], line, name)) for name in METHODS)
        lines.append([line, task, *(f"{number:.2f}" for number in mean), *success])
    return table(HEADER, lines)
