"""The figure and the table of `benchmarks.candidates`: predicted laws beside returns of roll-outs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import figures
from experiments.rows import Frame, Place, table

FILES = ("rows.csv",)
HEADER = "candidate | predicted mean | observed mean | predicted 10% to 90% | observed 10% to 90%"


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown and a figure: each candidate's predicted law beside the returns of its roll-outs."""
    stored = frames[0].astype({"value": float})
    first, shown = stored.iloc[0], sorted(stored["candidate"].unique(), key=int)
    values = {key: law["value"].to_numpy() for key, law in stored.groupby(["kind", "candidate"])}
    lines = []
    for name in shown:
        predicted, observed = values["predicted", name], values["observed", name]
        ranges = ["{:.0f} to {:.0f}".format(*np.quantile(law, [0.1, 0.9])) for law in (predicted, observed)]
        error = 1.96 * observed.std(ddof=1) / np.sqrt(len(observed))
        means = f"{predicted.mean():.1f}", f"{observed.mean():.1f} ± {error:.1f}"
        lines.append((int(name) + 1, *means, *ranges))
    data = f"{first['env']} ({first['data_source']} data), task {first['task']}"
    title = f"{data}, the state after {first['step']} steps of an episode"
    draw_laws(values, shown, place.path("figure.png"), title=title)
    about = (
        f"{data}, `{first['td_target']}`, {int(first['steps']):,} steps; the state after {first['step']} steps of "
        f"episode {first['episode']}."
    )
    return f"{about}\n\n{table(HEADER, lines)}"


def draw_laws(values: dict[tuple[str, str], np.ndarray], shown: list[str], path: Path, *, title: str) -> None:
    """Histograms of the predicted law and of the observed returns, a panel per candidate."""
    everything = np.concatenate(list(values.values()))
    bins = np.linspace(everything.min(), everything.max(), 41)
    figure, axes = figures.subplots(1, len(shown), width=3.6 * len(shown), height=3.6)
    top = 1.4 * max(np.histogram(law, bins)[0].max() / len(law) for law in values.values())
    for axis, name in zip(axes[0], shown, strict=True):
        predicted, observed = values["predicted", name], values["observed", name]
        for law, label in ((predicted, "predicted law"), (observed, f"{len(observed)} roll-outs")):
            shares = np.histogram(law, bins)[0] / len(law)
            axis.stairs(shares, bins, fill=True, alpha=0.5, label=f"{label}, mean {law.mean():.0f}")
        axis.set(xlabel="discounted reward-to-go", title=f"candidate {int(name) + 1}", ylim=(0, top))
        axis.legend(fontsize=7, loc="upper right")
    axes[0][0].set_ylabel("share")
    figure.suptitle(title, fontsize=10)
    figures.save(figure, path)
