"""Figures of runs. Each function draws one file from numbers that also stand in a CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import read_csv


def subplots(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, without pyplot: no display is needed and nobody's backend is changed."""
    figure = Figure(figsize=(width, height), layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def training(metrics_csv: Path, path: Path, *, title: str) -> None:
    """Every metric of a `metrics.csv` over gradient steps, one line per (task, seed)."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in read_csv(metrics_csv):
        label = f"task {row['task']}, seed {row['seed']}" if row["task"] else f"seed {row['seed']}"
        points = curves.setdefault(row["metric"], {}).setdefault(label, [])
        points.append((int(row["step"]), float(row["value"])))
    if not curves:
        return
    figure, axes = subplots(1, len(curves), width=4.0 * len(curves), height=3.0)
    for axis, (metric, lines) in zip(axes[0], curves.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 3 else None, lw=1)
        axis.set(xlabel="gradient steps", title=metric.replace("_", " "))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title)
    save(figure, path)


def _scores(rows: Sequence[Mapping[str, Any]]) -> tuple[str, Float[np.ndarray, "3 n"]]:
    """What the rows of a summary measure, and its value, low and high end: success in percent, or the return."""
    name, scale = ("success", 100.0) if "success" in rows[0] else ("return", 1.0)
    values = np.array([[row[key] for row in rows] for key in (name, "low", "high")], float)
    return "success (%)" if name == "success" else "return of an episode", scale * values


def method(num_actions: int, noise_scale: float) -> str:
    """What chose the actions of an evaluation."""
    if num_actions > 1:
        return f"best of {num_actions}"
    return "base policy alone" if noise_scale == 1 else f"one action, lambda {noise_scale:g}"


def success(summary: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Success rates or returns with 95% intervals: base policy alone beside the extracted policy, per task."""
    tasks = sorted({row["task"] for row in summary})
    summary = [{"noise_scale": 1.0, **row} for row in summary]  # of older revisions
    methods = sorted({(row["num_actions"], row["noise_scale"]) for row in summary})
    figure, axes = subplots(1, 1, width=3.0 + 1.3 * len(tasks), height=3.0)
    axis: Axes = axes[0, 0]
    for i, (number, scale) in enumerate(methods):
        of_method = [row for row in summary if (row["num_actions"], row["noise_scale"]) == (number, scale)]
        rows = {row["task"]: row for row in of_method}
        what, (height, low, high) = _scores([rows[task] for task in tasks])
        ends, label = np.abs([height - low, high - height]), method(number, scale)
        place = np.arange(len(tasks)) + 0.38 * (i - (len(methods) - 1) / 2)
        axis.bar(place, height, 0.34, yerr=ends, capsize=3, label=label)
    axis.set(ylabel=what, xticks=range(len(tasks)), title=title)
    if what == "success (%)":
        axis.set_ylim(0, 105)
    axis.set_xticklabels([f"task {t}" if t else "" for t in tasks])
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def calibration(
    panels: Sequence[tuple[str, Float[np.ndarray, "n draws"], Float[np.ndarray, " n"], Mapping[str, float]]],
    levels: Float[np.ndarray, " levels"],
    path: Path,
) -> None:
    """Per replica: predicted mean against observed return (states binned by prediction, with the spread of both), and
    the share of observed returns below each predicted quantile."""
    figure, axes = subplots(len(panels), 2, width=8.0, height=3.4 * len(panels))
    for (title, draws, returns, numbers), (left, right) in zip(panels, axes, strict=True):
        mean = draws.mean(axis=1)
        order = np.argsort(mean)
        bins = [b for b in np.array_split(order, 15) if len(b)]
        predicted = np.array([mean[b].mean() for b in bins])
        observed = np.array([returns[b].mean() for b in bins])
        spread = np.array([np.quantile(returns[b], [0.1, 0.9]) for b in bins]).T
        law = np.array([np.quantile(draws[b], [0.1, 0.9]) for b in bins]).T
        left.fill_between(predicted, *law, alpha=0.2, label="predicted 10% to 90%")
        left.errorbar(
            predicted,
            observed,
            np.abs(spread - observed),
            fmt="o",
            ms=3,
            lw=0.7,
            color="C1",
            label="observed, 10% to 90%",
        )
        ends = [min(predicted.min(), observed.min()), max(predicted.max(), observed.max())]
        left.plot(ends, ends, "k:", lw=1)
        left.set(xlabel="predicted mean return", ylabel="return", title=title)
        left.legend(fontsize=7)
        right.plot([0, 1], [0, 1], "k:", lw=1)
        right.plot(levels, [numbers[f"below_{level:.2g}"] for level in levels], "o-", ms=3)
        right.set(
            xlabel="predicted quantile",
            ylabel="share of observed returns below",
            xlim=(0, 1),
            ylim=(0, 1),
            title=f"correlation {numbers['correlation']:.2f}, crps {numbers['crps']:.2f}",
        )
    save(figure, path)


SAYS = {
    "num_actions": "N_pi, candidate actions",
    "num_returns": "N, returns per candidate",
    "return_temperature": "tau_R",
    "action_temperature": "tau_Q",
    "noise_scale": "lambda, scale of the candidates' noise",
    "action_noise": "standard deviation of the action noise",
}


def sweep(summary: Sequence[Mapping[str, Any]], path: Path, *, title: str, by: Sequence[str] = ("task",)) -> None:
    """Success over each swept setting that takes more than one value; a line for each value of the columns `by` and of
    the other settings."""
    names = tuple(SAYS)
    swept = [n for n in names if len({row[n] for row in summary}) > 1] or ["num_actions"]
    figure, axes = subplots(1, len(swept), width=5.6 * len(swept), height=3.8)
    for axis, name in zip(axes[0], swept, strict=True):
        others = [n for n in (*names, *by) if n != name]
        shown = [n for n in others if n in by or n in swept]
        lines: dict[tuple, list[Mapping[str, Any]]] = {}
        for row in summary:
            lines.setdefault(tuple(row[n] for n in others), []).append(row)
        values = sorted({row[name] for row in summary})
        for key, rows in lines.items():
            label = ", ".join(
                v if isinstance(v, str) else f"{n} {v:g}" for n, v in zip(others, key, strict=True) if n in shown
            )
            x = [values.index(row[name]) for row in rows]
            what, (y, low, high) = _scores(rows)
            error = np.abs([low - y, high - y])
            axis.errorbar(x, y, error, marker="o", ms=3, lw=1, capsize=2, label=label)
        axis.set(xlabel=SAYS.get(name, name), ylabel=what, xticks=range(len(values)))
        if what == "success (%)":
            axis.set_ylim(-3, 103)
        axis.set_xticklabels([f"{v:g}" for v in values], rotation=30 if len(values) > 7 else 0)
        axis.grid(alpha=0.3)
        # Beside the axis: nothing is covered, however many lines there are.
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def heat_maps(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, x: str, y: str, title: str) -> None:
    """Success over two swept settings, written into each cell; a panel for each name of `panels`."""
    columns, rows = (sorted({row[name] for panel in panels.values() for row in panel}) for name in (x, y))
    width = (0.7 + 0.8 * len(columns)) * len(panels) + 1.3
    figure, axes = subplots(1, len(panels), width=width, height=1.7 + 0.5 * len(rows))
    for axis, (name, panel) in zip(axes[0], panels.items(), strict=True):
        success = np.full((len(rows), len(columns)), np.nan)
        for row in panel:
            success[rows.index(row[y]), columns.index(row[x])] = 100 * row["success"]
        image = axis.imshow(success, vmin=0, vmax=100, cmap="viridis", aspect="auto", origin="lower")
        for i, j in np.argwhere(np.isfinite(success)):
            color = "black" if success[i, j] > 60 else "white"
            axis.text(j, i, f"{success[i, j]:.0f}", ha="center", va="center", color=color, fontsize=8)
        axis.set(xticks=range(len(columns)), yticks=range(len(rows)))
        axis.set_xticklabels([f"{value:g}" for value in columns])
        axis.set_yticklabels([f"{value:g}" for value in rows])
        axis.set_title(name, fontsize=8)
    figure.supxlabel(SAYS.get(x, x), fontsize=9)
    axes[0, 0].set_ylabel(SAYS.get(y, y))
    figure.suptitle(title, fontsize=9)
    figure.set_layout_engine("constrained")  # takes the bar's space from all panels alike
    figure.colorbar(image, ax=list(axes[0]), label="success (%)")
    save(figure, path)
