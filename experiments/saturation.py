"""What more candidates promise: the gain that the choosing critic sees, and what a critic of another seed sees of it.

    python -m experiments.saturation --run-dir runs/tasks/cube-double-play --other runs/seeds/cube-double-play \
        --policy-run-dir runs/cube-double-play

In validation states, N_pi candidates of the base policy are drawn and the best is chosen by `Q*` of one reward model.
That model's own value of the choice can only grow with N_pi; part of the growth is its error, since the largest of
N_pi values is chosen for its error too. A second reward model, trained with another seed on the same base policy and
data, has an error of its own and did not choose: its value of the same choice grows as far as the two agree. Their
difference is the error of the selection. (Errors that the two models share, such as those of the data, stay in both.)

Each of the two chooses once, and both answers count; they are one pair of seeds all the same.

Writes a row per validation episode, N_pi and critic that chooses, the mean over its states, which are no independent
observations; and draws them, beside the success over N_pi where a sweep of the first reward model is stored.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from common import checkpoint, data, figures, sources
from common.envs import validation_path
from common.errors import UserError, run_cli
from common.metrics import sha256
from common.training import PLACES, provenance
from evor_infer import Agent, load_agent, summarise
from experiments import rows
from experiments.rows import Frame, Place, numbers, percent, read, table

FILES = ("rows.csv",)
HEADER = "N_pi | by the critic that chose | by one of another seed | error of the selection | success"
SAYS = dict(
    own="by the critic that chose", others="by a critic of another seed", error="difference: error of the selection"
)
NUMBERS = (1, 2, 4, 8, 16, 32, 64)
MAY_DIFFER = (*PLACES, "seeds", "first_seed", "policy_seed", "tasks", "eval_every", "eval_episodes", "save_every")


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare what two reward models say of the action that one of them chose."""

    run_dir: Path
    """Run directory of a reward model."""
    other: Path
    """Run directory of one of another seed."""
    policy_run_dir: Path
    """Run directory of the base policy that both were trained with."""
    task: int = 2
    """The task."""
    states: int = 1_000
    """Validation states."""
    num_returns: int = 8
    """Draws of the return per candidate."""
    return_temperature: float = 0.3
    """tau_R, in standard deviations of the data's returns."""
    update: bool = False
    """Write to `results/` instead of `runs/tables/`."""


def values_of(
    agents: tuple[Agent, Agent], observations: Float[np.ndarray, "states observation"], **settings: float
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


def gather(args: Args) -> list[dict[str, Any]]:
    """The rows of two runs, with what they were trained on.

    Raises:
        UserError: the runs differ in more than their seed.
    """
    paths = [run / "value" / "model.eqx" for run in (args.run_dir, args.other)]
    remedy = "train it with evor_value.py first."
    headers = [checkpoint.read_header(path, stage="value", remedy=remedy) for path in paths]
    seeds = [next((s for task, s in header["replicas"] if task == args.task), None) for header in headers]
    if None in seeds or seeds[0] == seeds[1]:
        raise UserError(f"the runs need task {args.task} with different seeds, not {seeds}: name others.")
    policies = [header["args"].get("policy_seed") for header in headers]
    policies = [seed if policy is None else policy for seed, policy in zip(seeds, policies, strict=True)]
    settings = [{k: v for k, v in header["args"].items() if k not in MAY_DIFFER} for header in headers]
    for what, (one, two) in dict(
        base_policy=[(header["policy_sha256"], seed) for header, seed in zip(headers, policies, strict=True)],
        data=[header["data"]["sha256"] for header in headers],
        steps=[header["step"] for header in headers],
        settings=settings,
    ).items():
        if one != two:
            raise UserError(f"the runs differ in {what.replace('_', ' ')}: their values do not compare.")
    agents = tuple(
        load_agent(run, task=args.task, seed=seed, policy_run_dir=args.policy_run_dir)
        for run, seed in zip((args.run_dir, args.other), seeds, strict=True)
    )
    header = headers[0]
    path, source = sources.find_files(header["env"], None, episodes=None)
    if sources.describe(path, source)["sha256"] != header["data"]["sha256"]:
        raise UserError(f"{path} is not what the runs were trained on: states of other data do not compare.")
    held_out = data.load_trajectories(validation_path(sources.data_files(path)[0]), env=header["env"])
    starts = data.transition_starts(held_out.terminals, header["horizon"], where="validation data")
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
    success, tau_q = success_of(first, Place(rows.RESULTS, "num_actions").path("episodes.csv"))
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


def main(args: Args) -> None:
    """Makes the rows of two reward models, and draws them."""
    place, stored = Place(rows.RESULTS if args.update else rows.TABLES, "saturation"), rows.frame(gather(args))
    rows.write(place.path(*FILES), stored)
    text = draw([stored], place)
    place.table(text)
    print(text)


if __name__ == "__main__":
    run_cli(main, Args)
