"""The return axis of the data against the one of the possible returns: calibration and success on tasks of OGBench.

The rows are those of `thirty-tasks` with the `base` backup, whose law is that of the data's policy, or nearly so: with
`softmax` the returns of the data say nothing about it.
"""

import itertools
from collections.abc import Sequence

from experiments import thirty
from experiments.rows import Frame, Place, cell, complete, numbers, table

ROWS = "thirty-tasks"
FILES = thirty.FILES
METRICS = ("crps", "correlation")
METHODS = (thirty.BOUNDS, thirty.BASE)
HEADER = "data | task | CRPS: bounds | quantiles | correlation: bounds | quantiles | success: bounds | quantiles"


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: a line for each calibrated task of both axes, means over seeds, intervals over seeds and episodes."""
    runs, episodes = thirty.named(frames)
    runs = complete(runs[runs["method"].isin(METHODS)], METRICS)
    runs = numbers(runs[runs["crps"] != ""], real=METRICS)
    extracted = episodes[episodes["num_actions"] != "1"]
    means = runs.pivot_table(index=["line", "task"], columns="method", values=list(METRICS))
    means = means.reindex(columns=itertools.product(METRICS, METHODS)).dropna()  # the columns of the table
    lines = []
    for (line, task), mean in means.iterrows():
        success = (cell(thirty.of(extracted[extracted["task"] == task], line, name)) for name in METHODS)
        lines.append([line, task, *(f"{number:.2f}" for number in mean), *success])
    return table(HEADER, lines)
