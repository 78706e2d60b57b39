"""What inference costs in accuracy: solver and number of steps, and how the return noise is drawn.

    python -m benchmarks.inference --env cube-single-play

On states of the validation data, with a trained base policy and reward model:

1. *Solvers.* Root mean square error of actions and of returns against 500 midpoint steps from the same noise, beside
   the evaluations of the velocity field that they cost.
2. *Return noise.* Error of Q* from N returns against Q* from 1,024 quantiles: N quantiles of the normal law (no
   variance, a bias) beside N independent draws (the other way round); and how often the best of 32 candidates is the
   same one.

Writes `runs/tables/inference/inference.csv`, and `inference.md` beside it.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import evor_infer
from common.cli import run_cli
from common.data import download, files, transitions
from common.data.names import default_run_dir, parse_env, validation_path
from common.errors import UserError
from common.files import write_csv
from common.flow import Ode
from common.networks import stratified_normal
from common.provenance import git_revision, package_versions

SOLVERS = (
    ("euler", 1), ("euler", 2), ("euler", 5), ("euler", 10), ("euler", 20), ("euler", 50), ("euler", 100),
    ("midpoint", 1), ("midpoint", 2), ("midpoint", 3), ("midpoint", 5), ("midpoint", 10), ("midpoint", 25),
)  # fmt: skip
REFERENCE = dict(solver="midpoint", flow_steps=500)


@dataclasses.dataclass(frozen=True)
class Args:
    """Errors of solvers and of return noise."""

    env: str = "cube-single-play"
    """Environment of the run; its validation data gives the states."""
    run_dir: Path | None = None
    """Run directory of stages 1 and 2; runs/ENV by default."""
    states: int = 64
    """Validation states."""
    num_actions: int = 32
    """Candidates per state."""
    return_temperature: float = evor_infer.Extraction().return_temperature
    """tau_R, in standard deviations of the data's returns."""
    draws: int = 16
    """Repetitions of the independent draws."""
    episodes: int | None = None
    """Collected episodes of the dataset."""
    out: Path = Path("runs/tables/inference/inference.csv")
    """CSV file; the table goes beside it."""


def rms(x: Any) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def solver_rows(agent: evor_infer.Agent, observations: np.ndarray, actions: np.ndarray) -> list[dict[str, Any]]:
    """Error of every solver in actions (which lie in [-1, 1]) and returns (environment units)."""
    draw = functools.partial(agent.sample_actions, observations, 8, key=jax.random.key(0))
    returns = functools.partial(agent.sample_returns, observations, actions, 16, key=jax.random.key(0))
    best = draw(**REFERENCE), returns(**REFERENCE)
    rows = []
    for solver, steps in SOLVERS:
        ode = dict(solver=solver, flow_steps=steps)
        rows.append(
            dict(
                part="solver",
                solver=solver,
                flow_steps=steps,
                evaluations=Ode(steps, solver).evaluations,
                action_rmse=rms(draw(**ode) - best[0]),
                return_rmse=rms(returns(**ode) - best[1]),
            )
        )
    return rows


def noise_rows(args: Args, agent: evor_infer.Agent, observations: np.ndarray) -> list[dict[str, Any]]:
    """Error of Q* (environment units) over candidates and draws, for quantiles and independent noise of equal N."""
    candidates = agent.sample_actions(observations, args.num_actions, key=jax.random.key(1))
    temperature = args.return_temperature * agent.axis.spread

    score = functools.partial(evor_infer.score_one, temperature=temperature, ode=Ode())
    of_candidates = jax.vmap(score, (None, None, None, 0, None))

    @jax.jit
    def scores(noise):
        return jax.lax.map(
            lambda xa: of_candidates(agent.critic, agent.axis, agent.standardizer(xa[0]), xa[1], noise),
            (jnp.asarray(observations), candidates),
        )

    exact = np.asarray(scores(stratified_normal(1024)))
    rows = []
    for number in (1, 2, 4, 8, 16, 32):
        independent = np.stack(
            [scores(jax.random.normal(jax.random.key(i), (number,))) for i in range(args.draws)]
        )  # (draws, states, candidates)
        for kind, scored in (
            ("quantiles", np.asarray(scores(stratified_normal(number)))[None]),
            ("independent", independent),
        ):
            within = scored - scored.mean(axis=2, keepdims=True) - (exact - exact.mean(axis=1, keepdims=True))
            rows.append(
                dict(
                    part="noise",
                    noise=kind,
                    num_returns=number,
                    q_variance=float(np.mean(np.var(scored, axis=0))),
                    q_rmse=rms(scored - exact),
                    ranking_rmse=rms(within),
                    same_best=float(np.mean(scored.argmax(axis=2) == exact.argmax(axis=1))),
                )
            )
    return rows


def table(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """Both comparisons as Markdown."""
    lines = [
        f"{about['env']} ({about['data_source']} data), task {about['task']}, {about['states']} validation states; "
        f"return range {about['return_range']:g}. Reference: 500 midpoint steps.",
        "",
        "| solver | steps | evaluations | RMSE of actions | RMSE of returns |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] == "solver":
            lines.append(
                f"| {row['solver']} | {row['flow_steps']} | {row['evaluations']} "
                f"| {row['action_rmse']:.4f} | {row['return_rmse']:.3f} |"
            )
    lines += [
        "",
        f"Q* of {about['num_actions']} candidates per state, tau_R {about['return_temperature']:g}. "
        f"Reference: 1,024 quantiles. `ranking` leaves out what all candidates of a state share.",
        "",
        "| noise | N | variance of Q* | RMSE of Q* | RMSE, ranking | same best candidate |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["part"] == "noise":
            lines.append(
                f"| {row['noise']} | {row['num_returns']} | {row['q_variance']:.3f} | {row['q_rmse']:.3f} "
                f"| {row['ranking_rmse']:.3f} | {row['same_best']:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main(args: Args) -> list[dict[str, Any]]:
    """Measures and writes both comparisons; returns the rows."""
    name = parse_env(args.env)
    run_dir = args.run_dir or default_run_dir(name.short, quick=False)
    header, pairs, agents = evor_infer.load_agents(run_dir)
    path, source = download.find_files(args.env, None, episodes=args.episodes)
    if not validation_path(path).is_file():
        raise UserError(f"there is no validation file {validation_path(path)}: collect or download the data anew.")
    arrays = files.read_arrays(validation_path(path))
    starts = transitions.transition_starts(arrays["terminals"], header["horizon"])
    rows = np.random.default_rng(0).choice(starts, args.states, replace=False)
    observations = arrays["observations"][rows]
    agent = evor_infer.first_of(agents)
    actions = np.stack([arrays["actions"][row : row + header["horizon"]].reshape(-1) for row in rows])
    axis = agent.axis
    about = dict(
        env=name.short,
        task=pairs[0][0],
        data_source=source,
        critic=agent.critic.spec.kind,
        td_target=header["args"]["td_target"],
        return_range=float(axis.high - axis.low),
        states=args.states,
        num_actions=args.num_actions,
        return_temperature=args.return_temperature,
        git_revision=git_revision(),
        jax=package_versions()["jax"],
    )
    rows = solver_rows(agent, observations, actions) + noise_rows(args, agent, observations)
    fields = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(args.out, [*fields, *about], [dict.fromkeys(fields, "") | row | about for row in rows])
    args.out.with_suffix(".md").write_text(table(rows, about))
    print(table(rows, about) + f"rows: {args.out}\ntable: {args.out.with_suffix('.md')}")
    return rows


if __name__ == "__main__":
    run_cli(main, Args)
