"""The figure and the table of `benchmarks.saturation`, beside the success over N_pi of the sweep `num_actions`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.saturation import NUMBERS
from common import figures
from common.errors import UserError
from common.evaluation import summarise
from experiments.rows import Frame, Place, numbers, percent, read, table

FILES = ("rows.csv",)
HEADER = "N_pi | by the critic that chose | by one of another seed | error of the selection | success"
SAYS = dict(
    own="by the critic that chose", others="by a critic of another seed", error="difference: error of the selection"
)


def summary(stored: Frame) -> dict[str, Float[np.ndarray, "numbers 2"]]:
    """Gains over one candidate: their mean over trajectories and the half-width of its 95% interval. The two critics
    that chose in a trajectory are no independent observations: they are averaged first."""
    columns = numbers(stored, whole=["num_actions"], real=["own", "others"])
    means = columns.groupby(["num_actions", "trajectory"])[["own", "others"]].mean().unstack()
    gains = {name: (means[name] - means[name].loc[1]).to_numpy() for name in ("own", "others")}
    gains["error"] = gains["own"] - gains["others"]
    half = {name: 1.96 * gain.std(axis=1, ddof=1) / np.sqrt(gain.shape[1]) for name, gain in gains.items()}
    return {name: np.stack([gain.mean(axis=1), half[name]], axis=1) for name, gain in gains.items()}


def success_of(first: dict[str, str], sweep: Path) -> tuple[dict[int, dict[str, Any]], float | None]:
    """Success over N_pi of the reward model, at the tau_R of the rows, and its tau_Q; nothing where no sweep is stored.

    Raises:
        UserError: the sweep has several tau_Q.
    """
    if not sweep.is_file():
        return {}, None
    real = ("return_temperature", "action_temperature", "success")
    episodes = numbers(read(sweep), whole=["num_actions", "num_returns", "length"], real=real)
    same = dict(num_returns=int(first["num_returns"]), return_temperature=float(first["return_temperature"]))
    same |= dict(task=first["task"], critic_sha256=first["critic_sha256"])
    chosen = episodes[np.logical_and.reduce([episodes[name] == value for name, value in same.items()])]
    tau_q = sorted(set(chosen["action_temperature"]))
    if len(tau_q) > 1:
        raise UserError(f"{sweep} holds several tau_Q for this reward model, {tau_q}: draw a sweep of one.")
    success = {row["num_actions"]: row for row in summarise(chosen.to_dict("records"), ("num_actions",))}
    return success, next(iter(tau_q), None)


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown and a figure."""
    stored = frames[0]
    gains, first = summary(stored), stored.iloc[0].to_dict()
    success, tau_q = success_of(first, place.beside("num_actions", "episodes.csv"))
    states = stored.drop_duplicates("trajectory")["states"].astype(int)
    tau_r, data = float(first["return_temperature"]), f"{first['env']} ({first['data_source']} data)"
    about = (
        f"{data}, task {first['task']}, `{first['td_target']}`, {int(first['steps']):,} steps: value of the chosen "
        f"action above that of one candidate. Mean over {len(states)} validation episodes of the means of their "
        f"states, {states.sum():,} in all, with its 95% interval, in the environment's units. One pair of reward "
        f"models, seeds {first['seeds'].replace(' ', ' and ')}; each chooses once, the best by Q* at tau_R = {tau_r:g}."
    )
    if success:
        about += f" Success: of the extracted policy at the same tau_R and tau_Q = {tau_q:g}."
    lines = []
    for i, number in enumerate(NUMBERS):
        cells = [f"{gains[name][i, 0]:.2f} ± {gains[name][i, 1]:.2f}" for name in SAYS]
        row = success.get(number)
        lines.append((number, *cells, percent(row["success"], row["low"], row["high"]) if row else ""))
    draw_gains(
        gains, success, place.path("figure.png"), tau_r=tau_r, tau_q=tau_q, title=f"{data}, task {first['task']}"
    )
    return f"{about}\n\n{table(HEADER, lines)}"


def draw_gains(
    gains: dict[str, Float[np.ndarray, "numbers 2"]],
    success: dict[int, dict[str, Any]],
    path: Path,
    *,
    tau_r: float,
    tau_q: float | None,
    title: str,
) -> None:
    """Gains over N_pi; beside them success, where a sweep is stored."""
    figure, axes = figures.subplots(1, 2 if success else 1, width=10.0 if success else 5.0, height=3.6)
    for i, (name, label) in enumerate(SAYS.items()):
        mean, half = gains[name].T
        x = np.array(NUMBERS) * 1.05 ** (i - 1)
        axes[0][0].errorbar(x, mean, half, marker="o", ms=3, lw=1, capsize=2, label=label)
    axes[0][0].set(ylabel=f"gain in Q* (return), tau_R {tau_r:g}", title=title)
    if success:
        y = np.array([100 * row["success"] for row in success.values()])
        ends = np.array([[100 * row["low"], 100 * row["high"]] for row in success.values()]).T
        axes[0][1].errorbar(list(success), y, np.abs(ends - y), marker="o", ms=3, lw=1, capsize=2, color="k")
        axes[0][1].set(ylabel="success (%)", ylim=(-3, 103), title=f"in the environment, tau_Q {tau_q:g}")
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set(xlabel="N_pi, candidates", xticks=NUMBERS, xticklabels=NUMBERS)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figures.save(figure, path)
