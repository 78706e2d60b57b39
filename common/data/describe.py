"""What a dataset contains: success, returns, lengths and, in mazes, where it went.

python -m common.data --list                   # all environments of OGBench
python -m common.data --env cube-double-play   # what a dataset contains, as numbers and as a figure
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int
from matplotlib.axes import Axes

from common import figures
from common.args import Paths, check, each, within
from common.data import download, files, transitions
from common.data.collect import is_collectable
from common.data.foreign import environment_of
from common.data.names import DEFAULT_ENV, ENVIRONMENTS, NUM_TASKS, import_ogbench, parse_env, run_name
from common.errors import UserError
from common.files import write_csv

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclasses.dataclass(frozen=True)
class Args(Paths):
    """Describe a dataset, or list OGBench's."""

    list: bool = False
    """List OGBench's state-based single-task environments instead."""
    env: str = DEFAULT_ENV
    """OGBench dataset; with --dataset that brings rewards, a Gymnasium environment or only a name."""
    dataset: Path | None = None
    """Other data: an .npz file in OGBench's layout or a folder of them, a file in D4RL's layout (.hdf5), minari:ID."""
    tasks: Annotated[tuple[int, ...], each(within(1, NUM_TASKS, brackets="[]"))] = (1, 2, 3, 4, 5)
    """OGBench's single tasks."""
    discounts: Annotated[tuple[float, ...], each(within(0, 1, brackets="[)"))] = (0.99,)
    """Discounts of the returns."""
    episodes: int | None = None
    """Episodes to collect if the data can neither be found nor downloaded; OGBench's number by default."""
    out: Path | None = None
    """Folder for report.csv and report.png; runs/ENV/data by default."""


def main(args: Args) -> list[dict[str, Any]]:
    """Prints and draws the report; returns its rows."""
    if args.list:
        print(listing())
        return []
    check(args)
    env = environment_of(args.env, args.dataset)
    name = run_name(env, args.dataset)
    path, source = download.find_files(env, args.dataset, episodes=args.episodes)
    paths = download.data_files(path)
    own = args.dataset is not None and files.has_rewards(paths[0])
    tasks = (0,) if own else args.tasks
    trajectories = files.load_trajectories(paths[0], env=env, tasks=tasks)
    print_summary(trajectories, download.describe(path, source), tasks=tasks, discount=args.discounts[0])
    if len(paths) > 1:
        print(f"  the first of {len(paths)} files is described here: {paths[0].name}")
    rows = measure(trajectories, tasks, args.discounts)
    for row in rows:
        print(f"  {row['subject']:<28} " + "  ".join(f"{q:>4.0%} {row[f'q{q:g}']:10.4g}" for q in QUANTILES))
    out = args.out or Path("runs") / name / "data"
    write_csv(out / "report.csv", list(rows[0]), rows)
    draw(trajectories, tasks, args.discounts, out / "report.png", title=f"{paths[0].name} ({source})", env=env)
    print(f"rows: {out / 'report.csv'}\nfigure: {out / 'report.png'}")
    return rows


def listing() -> str:
    """A table of all environments; return bounds are those of the discount 0.99."""
    lines = [
        f"{'dataset':<30} {'observation':>11} {'action':>6} {'tasks':>5} {'episode':>7} {'returns (0.99)':>15}  "
        f"collectable here"
    ]
    for prefix, environment in ENVIRONMENTS.items():
        for kind in environment.kinds:
            name = parse_env(f"{prefix}-{kind}")
            bounds = f"[{100 * environment.lowest_reward}, 0]"
            lines.append(
                f"{name.short:<30} {environment.observations:>11} {environment.actions:>6} {5:>5} "
                f"{environment.episode_steps:>7} {bounds:>15}  {'yes' if is_collectable(name.dataset) else 'no'}"
            )
    return "\n".join(lines)


def warn_of_short(terminals: Bool[np.ndarray, " rows"], horizon: int, where: str = "") -> None:
    """Says how many episodes have fewer than the `horizon` steps that a transition takes."""
    lengths = episode_lengths(terminals)
    if (short := lengths < horizon).any():
        print(
            f"  WARNING: {where}{short.sum():,} episodes are shorter than {horizon} steps and not used; transitions of "
            f"{horizon} steps start in {np.maximum(lengths - horizon + 1, 0).sum():,} rows"
        )


def print_summary(
    trajectories: files.Trajectories,
    info: dict[str, Any],
    *,
    tasks: Sequence[int],
    discount: float,
    num_files: int = 1,
    horizon: int = 1,
) -> None:
    """Prints transitions, episodes, and per task return bounds and success; warns where a task is never solved, and
    where episodes have fewer than the `horizon` steps that a transition takes."""
    terminals = trajectories.terminals
    episodes, steps = int(terminals.sum()), int((~terminals).sum())
    print(f"data: {info['name']} (source: {info['source']}, sha256 {info['sha256'][:12]})")
    if num_files > 1:
        print(f"  {num_files} files that take turns; the numbers below, and all scales, are those of the first")
    print(
        f"  {steps:,} transitions in {episodes:,} episodes, "
        f"observations {trajectories.observations.shape[1]}-D, actions {trajectories.actions.shape[1]}-D"
    )
    warn_of_short(terminals, horizon)
    if trajectories.rewards is None:
        return
    episode_of = np.searchsorted(np.flatnonzero(terminals), np.arange(len(terminals)))
    bounds = transitions.return_bounds(trajectories.rewards[:, ~terminals], discount)
    for i, task in enumerate(tasks):
        solved = (trajectories.masks[i] == 0) & ~terminals
        ever = len(np.unique(episode_of[solved]))
        label = f"task {task}" if task else "own rewards"
        if task:
            what = f"solved in {solved[~terminals].mean():.2%} of the transitions, in {ever:,} of {episodes:,} episodes"
        else:
            totals = np.bincount(episode_of[~terminals], trajectories.rewards[i, ~terminals], minlength=episodes)
            what = f"of an episode, undiscounted, {totals.mean():.4g} on average and {totals.max():.4g} at best; "
            what += f"{ever:,} of {episodes:,} episodes ended by a mask of 0"
        low, high = bounds[i]
        print(f"  {label}: possible returns within [{low:.4g}, {high:.4g}] at discount {discount}; {what}")
        if task == 0 and (unused := _unused(trajectories)):
            print(
                f"  WARNING: {unused:,} last rows have rewards or masks of their own. The last row of a trajectory is "
                f"a state alone: they are not used. If they are steps, append the final observation as one more row."
            )
        elif ever == 0 and (task or np.ptp(trajectories.rewards[i, ~terminals]) == 0):
            print(f"  WARNING: {label} is never solved in this data: its rewards cannot tell actions apart.")


def warn_of_constants(
    observations: Float[np.ndarray, "rows observation"],
    constant: Bool[np.ndarray, " observation"],
    ignore: Sequence[int],
) -> None:
    """Says which columns vary, and are constant to the networks because single precision tells too little of them."""
    varies = observations.max(axis=0) > observations.min(axis=0)
    lost = sorted(set(np.flatnonzero(constant & varies).tolist()) - set(ignore))
    if lost:
        print(
            f"  WARNING: observations {lost[:10]} vary by no more than what single precision rounds of their mean: "
            f"they count as constant. Subtract their mean."
        )


def warn_of_flat_returns(returns: Float[np.ndarray, " n"], spread: ArrayLike, what: str) -> None:
    """Says where returns vary by much less than the unit of temperatures, which their mean and bounds widen."""
    std = float(returns.std(dtype=np.float64))
    if 0 < std < 0.3 * float(spread):
        print(
            f"  WARNING: {what}: returns vary by {std:.3g} around {float(returns.mean()):.4g}, and count as if they "
            f"varied by {float(spread):.3g}: subtract from the rewards what they have in common."
        )


def _unused(trajectories: files.Trajectories) -> int:
    """Last rows, which are no transitions, with another reward than 0 and the row before, or with a mask of 0 where the
    row before has none."""
    last, rewards, masks = np.flatnonzero(trajectories.terminals), trajectories.rewards[0], trajectories.masks[0]
    rewarded = (rewards[last] != 0) & (rewards[last] != rewards[last - 1])
    return int((rewarded | ((masks[last] == 0) & (masks[last - 1] != 0))).sum())


def episode_lengths(terminals: np.ndarray) -> Int[np.ndarray, " episodes"]:
    """Transitions of each trajectory."""
    ends = np.flatnonzero(terminals)
    return np.diff(np.concatenate([[-1], ends])) - 1


def measure(
    trajectories: files.Trajectories, tasks: tuple[int, ...], discounts: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Quantiles of the episode lengths and of the returns-to-go, and the success shares, one row per subject."""
    terminals = trajectories.terminals
    kept = ~terminals
    episode = np.searchsorted(np.flatnonzero(terminals), np.arange(len(terminals)))

    def row(subject: str, values: np.ndarray, **more: Any) -> dict[str, Any]:
        columns = dict(task="", discount="", solved_transitions="", solved_episodes="")
        quantiles = {
            f"q{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        }
        return dict(subject=subject) | columns | more | quantiles

    rows = [row("transitions per episode", episode_lengths(terminals))]
    for i, task in enumerate(tasks):
        solved = (trajectories.masks[i] == 0) & kept
        shares = dict(
            solved_transitions=float(solved[kept].mean()),
            solved_episodes=len(np.unique(episode[solved])) / int(terminals.sum()),
        )
        for discount in discounts:
            values = returns(trajectories, i, discount)[kept]
            subject = f"returns of task {task} ({discount:g})" if task else f"returns ({discount:g})"
            rows.append(row(subject, values, task=task, discount=discount, **shares))
    return rows


def returns(trajectories: files.Trajectories, task: int, discount: float) -> Float[np.ndarray, " rows"]:
    """Returns-to-go as far as the trajectory goes; what comes after its end counts nothing."""
    partial, _ = transitions.monte_carlo_returns(
        trajectories.rewards[task], trajectories.masks[task], trajectories.terminals, discount=discount
    )
    return partial


def draw(
    trajectories: files.Trajectories,
    tasks: tuple[int, ...],
    discounts: tuple[float, ...],
    path: Path,
    *,
    title: str,
    env: str,
) -> None:
    """Histograms of the returns, one axis per discount; of the episode lengths; and the map of a maze."""
    maze = maze_of(env)
    figure, axes = figures.subplots(
        1, len(discounts) + 1 + (maze is not None), width=4.2 * (len(discounts) + 2), height=3.6
    )
    kept = ~trajectories.terminals
    for axis, discount in zip(axes[0], discounts, strict=False):
        values = [returns(trajectories, i, discount)[kept] for i in range(len(tasks))]
        edges = np.linspace(min(v.min() for v in values), max(v.max() for v in values) + 1e-9, 41)
        for task, v in zip(tasks, values, strict=True):
            share = np.histogram(v, edges)[0] / len(v)
            axis.stairs(100 * share, edges, label=f"task {task}" if task else "own rewards", lw=1.2)
        axis.set(xlabel="return-to-go within the episode", ylabel="% of transitions", yscale="log")
        axis.set_title(f"discount {discount:g}", fontsize=9)
        axis.legend(fontsize=7)
    lengths = axes[0][len(discounts)]
    steps = episode_lengths(trajectories.terminals)
    lengths.hist(steps, bins=30, range=(0, 1.05 * steps.max()))
    lengths.set(xlabel="transitions per episode", ylabel="episodes")
    if maze is not None:
        _draw_maze(axes[0][-1], trajectories, *maze, tasks=tasks)
    figure.suptitle(title, fontsize=10)
    figures.save(figure, path)


def maze_of(env: str) -> tuple[np.ndarray, float, dict[int, tuple[float, float]]] | None:
    """Walls (1) and free cells (0) of a maze, metres per cell, and the goal of each task; None without a maze.

    Cell (i, j) is centred at x = unit (j - 1), y = unit (i - 1).
    """
    try:
        name = parse_env(env)
    except UserError:
        return None
    if name.prefix not in ENVIRONMENTS or not ("maze" in name.prefix or "soccer" in name.prefix):
        return None
    import_ogbench()
    import gymnasium

    made = gymnasium.make(name.gym_id(1))
    maze = made.unwrapped
    goals = {i + 1: info["goal_xy"] for i, info in enumerate(maze.task_infos)}
    drawn = maze.maze_map.copy(), maze._maze_unit, goals
    made.close()
    return drawn


def _draw_maze(
    axis: Axes,
    trajectories: files.Trajectories,
    walls: np.ndarray,
    unit: float,
    goals: dict[int, tuple[float, float]],
    *,
    tasks: tuple[int, ...],
) -> None:
    """Visits per place, logarithmic; walls in grey, goals with the numbers of their tasks."""
    rows, columns = walls.shape
    extent = (-1.5 * unit, (columns - 1.5) * unit, -1.5 * unit, (rows - 1.5) * unit)
    axis.imshow(np.where(walls, 1.0, np.nan), extent=extent, origin="lower", cmap="Greys", vmin=0, vmax=2)
    x, y = trajectories.observations[:, 0], trajectories.observations[:, 1]
    visits, x_edges, y_edges = np.histogram2d(x, y, bins=(6 * columns, 6 * rows), range=(extent[:2], extent[2:]))
    axis.pcolormesh(x_edges, y_edges, np.where(visits > 0, np.log10(np.maximum(visits, 1)), np.nan).T)
    for goal in {goals[task] for task in tasks if task in goals}:
        text = ", ".join(str(task) for task in tasks if goals.get(task) == goal)
        axis.annotate(text, goal, ha="center", va="center", color="red", fontsize=9, fontweight="bold")
    axis.set(xlabel="x (m)", ylabel="y (m)", aspect="equal")
    axis.set_title("visits (log), goals of the tasks", fontsize=9)
