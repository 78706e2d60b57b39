"""Are two datasets made in the same way? Collected data against a file from OGBench's own generation script.

    python -m benchmarks.same_data --env cube-double-play --reference REFERENCE.npz --collected COLLECTED.npz

Compares the distribution over rows of every observation and action coordinate, and over episodes of: how often each of
the five tasks is solved, and how many subgoals are done (manipulation: how often some object is picked up, or some
button pressed; mazes: how many cells are entered). For each variable the statistic is the Kolmogorov-Smirnov distance,
the largest difference of the two distribution functions. Rows of an episode depend on one another, so its p-value comes
from a permutation test over whole episodes: they are dealt out to two sets of the same sizes again and again, and p is
the share of deals with a distance at least as large. With all p-values uniform on [0, 1], as they are if nothing
differs, about 5% are below 0.05; `adjusted_p` corrects for the number of variables (Holm).

Writes a row per variable, with quantiles of both datasets, and prints what is not the same.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from common.cli import run_cli
from common.data import files
from common.data.names import ENVIRONMENTS, NUM_TASKS, parse_env
from common.errors import UserError
from common.files import sha256, write_csv
from common.provenance import package_versions

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
BINS = 400
LIFTED = 0.05  # metres; a cube's centre lies at 0.02 on the table


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare collected data with data from OGBench's own script."""

    reference: Path
    """File from OGBench's own generation script."""
    collected: Path
    """File of common.data.collect."""
    env: str = "cube-double-play"
    """What both files are data of."""
    permutations: int = 2_000
    """Deals of the episodes."""
    out: Path | None = None
    """CSV file; runs/tables/same_data/ENV.csv by default."""


def episodes_of(terminals: np.ndarray) -> Int[np.ndarray, " rows"]:
    """The number of each row's episode."""
    return np.concatenate([[0], np.cumsum(terminals)[:-1]]).astype(int)


def histograms(
    values: Float[np.ndarray, " rows"], episodes: Int[np.ndarray, " rows"], edges: Float[np.ndarray, " edges"]
) -> Float[np.ndarray, "episodes bins"]:
    """How many rows of each episode are in each bin."""
    bins = np.searchsorted(edges, values, side="right")
    counts = np.zeros((episodes[-1] + 1, len(edges) + 1))
    np.add.at(counts, (episodes, bins), 1.0)
    return counts


def distances(
    counts: Float[np.ndarray, "episodes bins"], weights: Float[np.ndarray, "deals episodes"]
) -> Float[np.ndarray, " deals"]:
    """Kolmogorov-Smirnov distance between the episodes of weight 1 and those of weight 0, for each deal."""
    first = weights @ counts
    second = counts.sum(axis=0) - first
    functions = [np.cumsum(part, axis=1) / part.sum(axis=1, keepdims=True) for part in (first, second)]
    return np.abs(functions[0] - functions[1]).max(axis=1)


def compare(
    values: tuple[np.ndarray, np.ndarray],
    episodes: tuple[np.ndarray, np.ndarray],
    weights: Float[np.ndarray, "deals episodes"],
) -> dict[str, float]:
    """Distance and p-value of one variable; the first of `weights` says which episodes are the reference's."""
    edges = np.unique(np.quantile(np.concatenate(values), np.linspace(0, 1, BINS)))
    counts = np.concatenate([histograms(v, e, edges) for v, e in zip(values, episodes, strict=True)])
    of_all = distances(counts, weights)
    row = {"distance": of_all[0], "usual_distance": np.quantile(of_all[1:], 0.95)}
    row["p"] = (1 + np.count_nonzero(of_all[1:] >= of_all[0] - 1e-12)) / len(of_all)
    for name, v in zip(("reference", "collected"), values, strict=True):
        row |= {f"{name}_{q:g}": float(x) for q, x in zip(QUANTILES, np.quantile(v, QUANTILES), strict=True)}
    return row


def subgoals(env: str, path: Path, episodes: Int[np.ndarray, " rows"]) -> Float[np.ndarray, " episodes"]:
    """Per episode: objects picked up and buttons pressed; in mazes, cells entered."""
    with np.load(path) as file:
        qpos = file["qpos"]
        buttons = file["button_states"] if "button_states" in file.files else np.zeros((len(qpos), 0))
    if "maze" in env:
        cells = np.floor(qpos[:, :2] / 4.0 + 1.5)
        event = (np.diff(cells, axis=0) != 0).any(axis=1)
    else:
        cubes = -ENVIRONMENTS[env].lowest_reward if env.startswith("cube") else int(env == "scene")
        heights = qpos[:, [14 + 7 * i + 2 for i in range(cubes)]]
        lifted = (heights > LIFTED).astype(int)
        event = (np.diff(lifted, axis=0) > 0).any(axis=1) | (np.diff(buttons, axis=0) != 0).any(axis=1)
    inside = episodes[1:] == episodes[:-1]
    return np.bincount(episodes[1:], weights=event & inside, minlength=episodes[-1] + 1)


def holm(p: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """p-values corrected for their number: with any probability alpha, at most, one is below alpha by chance."""
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def variables(
    loaded: Sequence[files.Trajectories], episodes: Sequence[np.ndarray]
) -> tuple[dict[str, tuple[np.ndarray, ...]], dict[str, tuple[np.ndarray, ...]]]:
    """What is compared, of both files: numbers per row, and numbers per episode."""
    per_row = {}
    for kind in ("observations", "actions"):
        for i in range(getattr(loaded[0], kind).shape[1]):
            per_row[f"{kind}[{i}]"] = tuple(getattr(t, kind)[:, i] for t in loaded)
    per_episode = {"rows": tuple(np.bincount(e).astype(float) for e in episodes)}
    for i in range(NUM_TASKS):
        solved = [t.masks[i] == 0 for t in loaded]
        steps = tuple(np.bincount(e, weights=s) for e, s in zip(episodes, solved, strict=True))
        per_episode[f"steps in which task {i + 1} is solved"] = steps
        per_episode[f"task {i + 1} is solved"] = tuple((s > 0).astype(float) for s in steps)
    return per_row, per_episode


def main(args: Args) -> list[dict]:
    """Compares, prints and writes; returns the rows."""
    name = parse_env(args.env)
    if name.prefix not in ENVIRONMENTS:
        raise UserError(f"--env {args.env} is no environment of OGBench: see python -m common.data --list.")
    tasks = tuple(range(1, NUM_TASKS + 1))
    paths = args.reference, args.collected
    loaded = [files.load_trajectories(path, env=args.env, tasks=tasks) for path in paths]
    episodes = tuple(episodes_of(t.terminals) for t in loaded)
    counts = [e[-1] + 1 for e in episodes]
    number = sum(t.shape[1] for t in (loaded[0].observations, loaded[0].actions)) + 2 * NUM_TASKS + 2
    if args.permutations < 20 * number:
        raise UserError(
            f"--permutations {args.permutations}: {number} variables need {20 * number} for p-values of 0.05."
        )
    rng = np.random.default_rng(0)
    labels = np.arange(sum(counts)) < counts[0]
    weights = np.stack([labels, *(rng.permutation(labels) for _ in range(args.permutations))]).astype(float)

    per_row, per_episode = variables(loaded, episodes)
    per_episode["subgoals"] = tuple(subgoals(name.prefix, p, e) for p, e in zip(paths, episodes, strict=True))
    rows = []
    once = tuple(np.arange(n) for n in counts)
    for unit, some, where in (("row", per_row, episodes), ("episode", per_episode, once)):
        for variable, values in some.items():
            compared = compare(values, where, weights)
            means = {f"{n}_mean": float(v.mean()) for n, v in zip(("reference", "collected"), values, strict=True)}
            rows.append(dict(env=name.short, variable=variable, per=unit) | compared | means)
    for row, adjusted in zip(rows, holm(np.array([row["p"] for row in rows])), strict=True):
        row["adjusted_p"] = adjusted
    about = dict(
        reference_episodes=counts[0], collected_episodes=counts[1], permutations=args.permutations,
        reference_sha256=sha256(args.reference), collected_sha256=sha256(args.collected), **package_versions(),
    )  # fmt: skip
    out = args.out or Path(f"runs/tables/same_data/{name.short}.csv")
    write_csv(out, [*rows[0], *about], [row | about for row in rows])
    print(f"{name.short}: {counts[0]} episodes of the reference, {counts[1]} collected; {len(rows)} variables")
    below = [row for row in rows if row["p"] < 0.05]
    print(f"  p < 0.05: {len(below)}, with {0.05 * len(rows):.1f} expected if nothing differs")
    print(f"  smallest p corrected for the number of variables: {min(row['adjusted_p'] for row in rows):.3f}")
    for row in sorted(below, key=lambda row: row["p"]):
        usual = f"{row['distance']:.4f}, {row['usual_distance']:.4f} in 95% of the deals"
        print(f"  {row['variable']:<40} p {row['p']:.4f}  distance {usual}")
    print(f"rows: {out}")
    return rows


if __name__ == "__main__":
    run_cli(main, Args)
