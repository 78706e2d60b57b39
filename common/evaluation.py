"""What trained agents are worth: success in the environment, and predicted against observed returns."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from common import figures
from common.data import transitions
from common.environments import reference_scores, settings_of
from common.episodes import Episodes
from common.files import read_csv, write_csv
from common.metrics import CALIBRATED
from common.problem import ValueProblem, action_chunks
from common.run import Run
from common.statistics import bootstrap_interval, calibration, success_interval

METHOD = ("num_actions", "noise_scale")  # the base policy alone, or an extracted one
LEVELS = np.linspace(0.1, 0.9, 9)  # of the quantiles that returns are compared with
WORDS = ("env", "data_source", "data_sha256", "solver")  # columns of rows that are no numbers
WHOLE = ("task", "seed", "step", "steps", "eval_seed", "num_actions", "num_returns", "flow_steps", "episode", "length")


# --- Episodes ----------------------------------------------------------------------------------------------------


def play(
    agents: Any,
    episodes: Episodes,
    settings: Any,
    *,
    pairs: Sequence[tuple[int, int]],
    seed: int,
    reference: tuple[float, float] | None = None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """Runs all episodes of all replicas; one row per episode, with `columns`, task, seed and settings.

    Args:
        agents: one `Agent` whose leaves have a leading axis of replicas.
        settings: the `Extraction` of its actions.
        pairs: task and seed of each replica.
        reference: returns of a random and of an expert policy. With them a row has D4RL's normalised score, `100
            (return - random) / (expert - random)`.
    """
    keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.key(seed), s))(np.array([s for _, s in pairs]))

    def act(observations, counts, steps):
        return agents.decide(*(jnp.asarray(x) for x in (observations, counts, steps)), settings, keys=keys)

    desc = f"N_pi={settings.num_actions} N={settings.num_returns} tau_R={settings.return_temperature:g} " + (
        f"tau_Q={settings.action_temperature:g}"
    )
    units = np.asarray(settings.unit(agents.axis))
    rows = []
    for row in episodes.run(act, desc=" ".join([desc, *(f"{name}={value:g}" for name, value in columns.items())])):
        replica = row.pop("replica")
        task, replica_seed = pairs[replica]
        of_settings = dataclasses.asdict(settings)
        for name in ("return_temperature", "action_temperature"):
            of_settings[f"{name}_units"] = getattr(settings, name) * float(units[replica])
        if reference is not None:
            row["normalised"] = 100.0 * (row["total"] - reference[0]) / (reference[1] - reference[0])
        rows.append(columns | dict(task=task, seed=replica_seed) | of_settings | row)
    return rows


def read_episodes(path: Path, *, words: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of an `evaluation.csv` or `episodes.csv`, with numbers as numbers; `words` are more columns without any."""
    kinds = dict.fromkeys((*WORDS, *words), str) | dict.fromkeys(WHOLE, int)
    kinds |= dict.fromkeys(("independent_noise", "absolute"), "True".__eq__)
    return [{key: kinds.get(key, float)(value) for key, value in row.items()} for row in read_csv(path)]


def summarise(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Success rate or mean return of the episodes of each group, its 95% interval, and their mean length."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    if not np.isnan([row["success"] for row in rows]).all():  # an environment may say it only where it is one
        rows = [{**row, "success": 0.0 if np.isnan(row["success"]) else row["success"]} for row in rows]
    for row in rows:
        groups.setdefault(tuple(row[k] for k in by), []).append(row)
    out = []
    for values, members in groups.items():
        lengths = float(np.mean([r["length"] for r in members]))
        about = dict(zip(by, values, strict=True))
        out.append(about | score(members) | dict(episodes=len(members), mean_length=lengths))
    return out


def score(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`success` with Wilson's interval. Where the environment does not say it: `return`, the mean undiscounted return,
    with a bootstrap interval, and the mean normalised score where rows have one."""
    success = [row["success"] for row in rows]
    if not np.isnan(success).all():
        low, high = success_interval(sum(success), len(rows))
        return dict(success=sum(success) / len(rows), low=low, high=high)
    totals = np.array([[row["total"] for row in rows]], float)
    low, high = bootstrap_interval([totals])
    normalised = {"normalised": float(np.mean([row["normalised"] for row in rows]))} if "normalised" in rows[0] else {}
    return {"return": float(totals.mean()), "low": low, "high": high} | normalised


def score_text(row: Mapping[str, Any], digits: int = 0) -> str:
    """What a row of `summarise` says, and its interval: `success 90% [79%, 96%]` or `return 930.2 [880.1, 975.0]`."""
    if "success" in row:
        return f"success {row['success']:.{digits}%} [{row['low']:.{digits}%}, {row['high']:.{digits}%}]"
    normalised = f", normalised score {row['normalised']:.1f}" if "normalised" in row else ""
    return f"return {row['return']:.1f} [{row['low']:.1f}, {row['high']:.1f}]{normalised}"


def reference_of(info: Mapping[str, Any], gym_id: str) -> tuple[float, float] | None:
    """Returns of a random and of an expert policy: of the dataset, or of D4RL's table, or nobody's."""
    return tuple(info["reference"]) if info.get("reference") else reference_scores(gym_id)


# --- Calibration -------------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """Predicted reward-to-go of one replica against Monte-Carlo returns of validation states."""

    pair: tuple[int, int]
    draws: Float[np.ndarray, "states draws"]
    returns: Float[np.ndarray, " states"]
    numbers: dict[str, float]


def calibrate(args: Any, agents: Any, problem: ValueProblem, pairs: Sequence[tuple[int, int]]) -> list[Calibration]:
    """Compares each replica's predictions with what was observed; nothing if no episode has a complete return.

    The returns are those of the policy that made the data, which `--next-action base` and `dataset` model; with
    `softmax` the predictions should be higher.
    """
    validation = problem.validation
    rows = transitions.rows_with_complete_returns(
        validation.terminals, validation.masks, discount=args.discount, horizon=args.horizon
    )
    if len(rows) == 0:
        return []
    observations = jnp.asarray(validation.observations[rows])
    actions = action_chunks(jnp.asarray(validation.actions), jnp.asarray(rows), args.horizon)
    calibrations = []
    for i, (task, seed) in enumerate(pairs):
        agent = jax.tree.map(lambda x, i=i: x[i], agents)
        ode = dict(flow_steps=args.flow_steps, solver=args.solver)
        draws = np.asarray(agent.sample_returns(observations, actions, 64, **ode, key=jax.random.key(0)))
        rewards, masks = (labels[problem.tasks.index(task)] for labels in (validation.rewards, validation.masks))
        returns, _ = transitions.monte_carlo_returns(rewards, masks, validation.terminals, discount=args.discount)
        numbers = calibration(draws, returns[rows], LEVELS)
        calibrations.append(Calibration((task, seed), draws, returns[rows], numbers))
    return calibrations


def report_calibration(calibrations: Sequence[Calibration], directory: Path) -> None:
    """Prints, writes and draws it."""
    if not calibrations:
        print("calibration skipped: no validation episode is long enough for a complete return.")
        return
    for (task, seed), _, returns, numbers in calibrations:
        print(
            f"calibration, task {task}, seed {seed}: mean {numbers['mean_predicted']:.2f} predicted, "
            f"{numbers['mean_observed']:.2f} observed; correlation {numbers['correlation']:.2f}; "
            f"crps {numbers['crps']:.2f} ({len(returns)} validation states)"
        )
    rows = [
        dict(task=task, seed=seed, metric=metric, value=value)
        for (task, seed), _, _, numbers in calibrations
        for metric, value in numbers.items()
    ]
    write_csv(directory / "calibration.csv", ("task", "seed", "metric", "value"), rows)
    panels = [(f"task {task}, seed {seed}", *rest) for (task, seed), *rest in calibrations]
    figures.calibration(panels, LEVELS, directory / "calibration.png")


# --- During and after a training ---------------------------------------------------------------------------------


class Evaluation:
    """Evaluates the agents of a training, every `args.eval_every` steps and at its end.

    Leaves `evaluation.csv` (a row per episode), `calibration.csv`, figures, and numbers in `metrics.csv`.
    """

    def __init__(self, args: Any, problem: ValueProblem, run: Run):
        """`args.extraction` says how actions are extracted. The run has started."""
        self.args, self.problem, self.run = args, problem, run
        self.path = run.directory / "evaluation.csv"
        self.plays = args.eval_episodes > 0 and None not in problem.gym_ids
        self.rows: list[dict[str, Any]] = []
        if run.resume_path is not None and self.path.is_file():
            # One at the run's step is done anew. Earlier ones with other settings would mix with it.
            same = dataclasses.asdict(args.extraction)
            earlier = [row for row in read_episodes(self.path) if row["step"] < run.step]
            self.rows = [row for row in earlier if all(row[name] == value for name, value in same.items())]

    def is_due(self, step: int) -> bool:
        every = self.args.eval_every
        something = self.plays or self.problem.validation is not None
        return something and every > 0 and step % every == 0 and 0 < step < self.args.steps

    def __call__(self, agents: Any) -> None:
        """Evaluates agents at the run's step; what they have learned is saved before."""

        def assess() -> None:
            good = self._good(agents)
            if self.problem.validation is not None:
                self._calibrate(good)
            if self.plays:
                self._play(good, [self.args.extraction])

        self.run.on_first_host(assess)

    def final(self, agents: Any) -> list[dict[str, Any]]:
        """Evaluates the trained agents, and the base policy alone on the same episodes; prints, writes and draws all
        there is. Returns the summary."""
        if jax.process_index() > 0:
            return []
        args, problem, directory = self.args, self.problem, self.run.directory
        good = self._good(agents)
        if problem.validation is not None:
            report_calibration(self._calibrate(good), directory)
        rows = []
        if self.plays:
            rows = self._play(good, list(dict.fromkeys([args.base_policy_alone, args.extraction])))
        figures.training(directory / "metrics.csv", directory / "training.png", title=f"{args.name}: {args.method}")
        summary = summarise(rows, ("task", *METHOD))
        if self.plays:
            title = f"{args.method}, {args.name} ({problem.info['source']} data)"
            figures.success(summary, directory / "evaluation.png", title=title)
        elif None in problem.gym_ids:
            print(f"evaluation skipped: Gymnasium has no {args.environment}.")
        for line in last_screen(args, problem, self.run, rows):
            print(line)
        return summary

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(task, seed) of the replicas that have not diverged."""
        return [self.run.pairs[i] for i in self.run.good()]

    def _good(self, agents: Any) -> Any:
        """Their agents, on the device."""
        agents = jax.tree.map(jnp.asarray, agents)
        return jax.tree.map(lambda x: x[self.run.good()], agents) if self.run.diverged else agents

    def _calibrate(self, agents: Any) -> list[Calibration]:
        calibrations = calibrate(self.args, agents, self.problem, self.pairs)
        if calibrations:
            numbers = {name: [c.numbers[name] for c in calibrations] for name in CALIBRATED}
            self.run.metrics.log(self.run.step, self.pairs, numbers)
        return calibrations

    def _play(self, agents: Any, sweep: Sequence[Any]) -> list[dict[str, Any]]:
        gym_ids = [self.problem.gym_ids[self.problem.tasks.index(task)] for task, _ in self.pairs]
        columns = dict(env=self.args.name, data_source=self.problem.info["source"], step=self.run.step)
        reference, rows = reference_of(self.problem.info, gym_ids[0]), []
        in_common = dict(num_episodes=self.args.eval_episodes, horizon=self.args.horizon)
        with Episodes(gym_ids, **in_common, settings=settings_of(self.problem.info, gym_ids[0])) as episodes:
            for settings in sweep:
                played = play(agents, episodes, settings, pairs=self.pairs, seed=0, reference=reference)
                rows += [columns | row for row in played]
        self.rows += rows
        write_csv(self.path, list(self.rows[0]), self.rows)
        extracted = [row for row in rows if all(row[name] == getattr(self.args, name) for name in METHOD)]
        of_pairs = summarise(extracted, ("task", "seed"))
        measure = "success" if "success" in of_pairs[0] else "return"
        self.run.metrics.log(self.run.step, self.pairs, {measure: [row[measure] for row in of_pairs]})
        return rows


def last_screen(args: Any, problem: ValueProblem, run: Run, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines on what was trained on what, how well it does, and where everything is."""
    info, line = problem.info, "-" * 100
    source = f"{info['name']} (source: {info['source']}, sha256 {info['sha256'][:12]})"
    yield f"\n{line}\n{args.method} on {args.name}: {source}"
    yield (
        f"reward model: next action {args.next_action}, critic {args.critic}, "
        f"horizon {args.horizon}, {args.steps:,} steps, seeds {list(args.all_seeds)}"
    )
    if args.quick:
        yield "--quick is a smoke run: these numbers say that everything runs, not how good the method is."
    if run.diverged:
        yield f"diverged and left out, (task, seed): {', '.join(map(str, run.diverged))}"
    if not rows:
        yield "not evaluated."
    yield from success_lines(rows, by_seed=args.seeds > 1)
    if problem.base is not None:
        yield f"base policy:  {problem.base.path}"
    yield f"reward model: {run.directory / 'model.eqx'}"
    if rows:
        yield f"a sweep:      python evor_infer.py --env {args.environment} --run-dir {run.directory.parent} " + (
            "--num-actions 1 4 16 64"
        )
    yield f"in Python:    load_agent({str(run.directory.parent)!r})"
    for file in sorted(run.directory.glob("*.csv")) + sorted(run.directory.glob("*.png")):
        yield f"              {file}"
    yield line


def success_lines(rows: Sequence[Mapping[str, Any]], *, by_seed: bool) -> Iterator[str]:
    """A line for each task and method, and below it one for each seed; intervals of 95% over episodes."""
    for row in summarise(rows, ("task", *METHOD)):
        task = f"task {row['task']}" if row["task"] else "        "
        what = figures.method(*(row[name] for name in METHOD))
        yield f"  {task}  {what:<20} {score_text(row, 1)} of {row['episodes']} episodes"
        same = [r for r in rows if all(r[name] == row[name] for name in ("task", *METHOD))]
        for seed in summarise(same, ("seed",)) if by_seed else ():
            yield f"      seed {seed['seed']}: {score_text(seed, 1)}"
