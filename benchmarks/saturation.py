"""What more candidates promise: the gain that the choosing critic sees, and what a critic of another seed sees of it.

    python -m benchmarks.saturation --run-dir runs/tasks/cube-double-play --other runs/seeds/cube-double-play

In validation states, N_pi candidates of the base policy are drawn and the best is chosen by `Q*` of one reward model.
That model's own value of the choice can only grow with N_pi; part of the growth is its error, since the largest of
N_pi values is chosen for its error too. A second reward model, trained with another seed on the same base policy and
data, has an error of its own and did not choose: its value of the same choice grows as far as the two agree. Their
difference is the error of the selection. (Errors that the two models share, such as those of the data, stay in both.)

Each of the two chooses once, and both answers count; they are one pair of seeds all the same.

Writes a row per validation episode, N_pi and critic that chooses, the mean over its states, which are no independent
observations. `experiments.draw saturation --rows runs/tables` draws them.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from common import checkpoint
from common.cli import run_cli
from common.data import download, files, transitions
from common.data.names import validation_path
from common.errors import UserError
from common.files import sha256, write_csv
from common.provenance import provenance
from common.run import NOT_RESULTS
from evor_infer import load_agent

NUMBERS = (1, 2, 4, 8, 16, 32, 64)
MAY_DIFFER = (*NOT_RESULTS, "seeds", "first_seed", "policy_seed", "tasks", "eval_every", "eval_episodes", "save_every")


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare what two reward models say of the action that one of them chose."""

    run_dir: Path
    """Run directory of a reward model."""
    other: Path
    """Run directory of one of another seed."""
    task: int = 2
    """The task."""
    states: int = 1_000
    """Validation states."""
    num_returns: int = 8
    """Draws of the return per candidate."""
    return_temperature: float = 0.3
    """tau_R, in standard deviations of the data's returns."""
    out: Path = Path("runs/tables/saturation/rows.csv")
    """CSV file."""


def values_of(
    agents: Sequence[Any], observations: Float[np.ndarray, "states observation"], **settings: float | int
) -> Float[np.ndarray, "two states N"]:
    """`Q*` of the same candidates by each agent."""
    most = max(NUMBERS)
    candidates = agents[0].sample_actions(observations, most, key=jax.random.key(0))
    states = np.repeat(observations, most, axis=0)
    flat = candidates.reshape(len(states), -1)
    values = [agent.q_value(states, flat, key=jax.random.key(1), **settings) for agent in agents]
    return np.stack([np.asarray(value).reshape(-1, most) for value in values])


def rows_of(values: Float[np.ndarray, "two states N"], trajectory: Int[np.ndarray, " states"]) -> list[dict[str, Any]]:
    """Per critic that chooses, N_pi and trajectory: what it and the other one say of its choices among the first N_pi,
    on average over the trajectory's states."""
    names, place = np.unique(trajectory, return_inverse=True)
    counts = np.bincount(place)
    rows = []
    for chooser in range(2):
        for number in NUMBERS:
            best = values[chooser, :, :number].argmax(axis=1)
            chosen = np.take_along_axis(values, best[None, :, None], axis=2)[..., 0]
            means = [np.bincount(place, one) / counts for one in (chosen[chooser], chosen[1 - chooser])]
            rows += [
                dict(
                    trajectory=int(name),
                    chooser=chooser,
                    num_actions=number,
                    states=int(count),
                    own=own,
                    others=others,
                )
                for name, count, own, others in zip(names, counts, *(mean.tolist() for mean in means), strict=True)
            ]
    return rows


def read_headers(args: Args, paths: Sequence[Path]) -> tuple[list[dict[str, Any]], list[int]]:
    """The headers of the two reward models, and their seeds of the task.

    Raises:
        UserError: they differ in more than their seed.
    """
    remedy = "train it with evor_value.py first."
    headers = [checkpoint.read_header(path, stage="value", remedy=remedy) for path in paths]
    seeds = [next((s for task, s in header["replicas"] if task == args.task), None) for header in headers]
    if None in seeds or seeds[0] == seeds[1]:
        raise UserError(f"the runs need task {args.task} with different seeds, not {seeds}: name others.")
    policies = [header["args"].get("policy_seed") for header in headers]
    policies = [seed if policy is None else policy for seed, policy in zip(seeds, policies, strict=True)]
    for what, (first, second) in dict(
        base_policy=[(header["policy_sha256"], seed) for header, seed in zip(headers, policies, strict=True)],
        data=[header["data"]["sha256"] for header in headers],
        steps=[header["step"] for header in headers],
        settings=[{k: v for k, v in header["args"].items() if k not in MAY_DIFFER} for header in headers],
    ).items():
        if first != second:
            raise UserError(f"the runs differ in {what.replace('_', ' ')}: their values do not compare.")
    return headers, seeds


def measure(args: Args) -> list[dict[str, Any]]:
    """The rows of two runs, with what they were trained on.

    Raises:
        UserError: the runs differ in more than their seed, or there are no such states.
    """
    paths = [run / "value" / "model.eqx" for run in (args.run_dir, args.other)]
    headers, seeds = read_headers(args, paths)
    agents = [
        load_agent(run, task=args.task, seed=seed) for run, seed in zip((args.run_dir, args.other), seeds, strict=True)
    ]
    header = headers[0]
    path, source = download.find_files(header["env"], None, episodes=None)
    if download.describe(path, source)["sha256"] != header["data"]["sha256"]:
        raise UserError(f"{path} is not what the runs were trained on: states of other data do not compare.")
    held_out = files.load_trajectories(validation_path(download.data_files(path)[0]), env=header["env"])
    starts = transitions.transition_starts(held_out.terminals, header["horizon"], where="validation data")
    if not 1 <= args.states <= len(starts):
        raise UserError(f"--states must be between 1 and {len(starts):,}, not {args.states}.")
    rows_used = np.random.default_rng(0).choice(starts, args.states, replace=False)
    trajectory = np.cumsum(held_out.terminals)[rows_used]
    readout = dict(num_returns=args.num_returns, return_temperature=args.return_temperature)
    values = values_of(agents, held_out.observations[rows_used], **readout)
    about = dict(
        env=header["env"],
        data_source=header["data"]["source"],
        data_sha256=header["data"]["sha256"],
        policy_sha256=header["policy_sha256"],
        critic_sha256=sha256(paths[0]),
        other_critic_sha256=sha256(paths[1]),
        td_target=header["args"]["td_target"],
        task=args.task,
        steps=header["step"],
        seeds=" ".join(map(str, seeds)),
        **readout,
        **provenance(),
    )
    return [about | row for row in rows_of(values, trajectory)]


def main(args: Args) -> list[dict[str, Any]]:
    """Makes and writes the rows of two reward models."""
    rows = measure(args)
    write_csv(args.out, list(rows[0]), rows)
    print(f"rows: {args.out}")
    return rows


if __name__ == "__main__":
    run_cli(main, Args)
