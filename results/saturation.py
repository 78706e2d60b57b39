"""Why more candidates stop helping: what the choosing critic promises, and what a critic of another seed makes of it.

    python -m results.saturation --run-dir runs/tasks/cube-double-play --other runs/seeds/cube-double-play \
        --policy-run-dir runs/cube-double-play --task 2
    python -m results.saturation

In validation states, N_pi candidates of the base policy are drawn and the best is chosen by `Q*` of one reward model.
That model's own value of the choice can only grow with N_pi; part of the growth is its error, since the largest of
N_pi values is chosen for its error too. A second reward model, trained with another seed on the same base policy and
data, has an error of its own and did not choose: its value of the same choice grows as far as the two agree. Their
difference is the error of the selection. (Errors that the two models share, such as those of the data, stay in both.)

The first command writes `saturation.csv`, a row per state and N_pi; the second only draws `saturation.png` and
`saturation.md` from it, beside the success over N_pi of `sweep_actions_episodes.csv` where that stands.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common import checkpoint, data, figures, sources
from common.envs import validation_path
from common.errors import UserError, run_cli
from common.metrics import read_csv, write_csv
from evor_infer import Agent, load_agent, read_episodes, summarise

HERE = Path(__file__).parent
NUMBERS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare what two reward models say of the action that one of them chose."""

    run_dir: Path | None = None
    """Run directory of the reward model that chooses; none: draw what is stored."""
    other: Path | None = None
    """Run directory of the one that does not, of another seed."""
    policy_run_dir: Path | None = None
    """Run directory of the base policy that both were trained with."""
    task: int = 2
    """The task."""
    states: int = 1_000
    """Validation states."""
    num_returns: int = 8
    """Draws of the return per candidate."""


def rows_of(chooser: Agent, other: Agent, observations: np.ndarray, *, num_returns: int) -> list[dict[str, Any]]:
    """Per state and N_pi: `own` and `others` value of the action that `chooser` chooses among the first N_pi."""
    most = max(NUMBERS)
    candidates = chooser.sample_actions(observations, most, key=jax.random.key(0))
    states = np.repeat(observations, most, axis=0)
    flat = candidates.reshape(len(states), -1)
    own, others = (
        np.asarray(agent.q_value(states, flat, num_returns=num_returns, key=jax.random.key(1))).reshape(-1, most)
        for agent in (chooser, other)
    )
    rows = []
    for number in NUMBERS:
        chosen = own[:, :number].argmax(axis=1)
        for state, i in enumerate(chosen):
            rows.append(dict(state=state, num_actions=number, own=float(own[state, i]), others=float(others[state, i])))
    return rows


def gather(args: Args) -> list[dict[str, Any]]:
    """The rows of two runs, with what they were trained on."""
    if args.other is None or args.policy_run_dir is None:
        raise UserError("--run-dir needs --other and --policy-run-dir too.")
    headers = [
        checkpoint.read_header(run / "value" / "model.eqx", stage="value", remedy="train it with evor_value.py first.")
        for run in (args.run_dir, args.other)
    ]
    seeds = [next((s for task, s in header["replicas"] if task == args.task), None) for header in headers]
    if None in seeds or seeds[0] == seeds[1]:
        raise UserError(f"the runs need task {args.task} with different seeds, not {seeds}.")
    if len({(header["policy_sha256"], header["data"]["sha256"], header["step"]) for header in headers}) > 1:
        raise UserError("the runs differ in base policy, data or steps: their values do not compare.")
    agents = [
        load_agent(run, task=args.task, seed=seed, policy_run_dir=args.policy_run_dir)
        for run, seed in zip((args.run_dir, args.other), seeds, strict=True)
    ]
    env = headers[0]["env"]
    path, source = sources.find_files(env, None, episodes=None)
    if sources.describe(path, source)["sha256"] != headers[0]["data"]["sha256"]:
        raise UserError(f"{path} is not what the runs were trained on: states of other data do not compare.")
    held_out = data.load_trajectories(validation_path(sources.data_files(path)[0]), env=env)
    starts = data.transition_starts(held_out.terminals, headers[0]["horizon"], where="validation data")
    chosen = np.random.default_rng(0).choice(starts, args.states, replace=False)
    rows = rows_of(*agents, held_out.observations[chosen], num_returns=args.num_returns)
    about = dict(
        env=env,
        data_source=headers[0]["data"]["source"],
        data_sha256=headers[0]["data"]["sha256"],
        policy_sha256=headers[0]["policy_sha256"],
        td_target=headers[0]["args"]["td_target"],
        task=args.task,
        steps=headers[0]["step"],
        seeds=" ".join(map(str, seeds)),
        num_returns=args.num_returns,
    )
    return [about | row for row in rows]


def summary(rows: list[dict[str, str]]) -> dict[str, np.ndarray]:
    """Means over states with the half-width of their 95% interval, relative to one candidate: (len(NUMBERS), 2)."""
    values = {
        name: np.array([[float(row[name]) for row in rows if int(row["num_actions"]) == n] for n in NUMBERS])
        for name in ("own", "others")
    }
    gains = {name: value - value[0] for name, value in values.items()}
    gains["error"] = gains["own"] - gains["others"]
    return {
        name: np.stack([gain.mean(axis=1), 1.96 * gain.std(axis=1) / np.sqrt(gain.shape[1])], axis=1)
        for name, gain in gains.items()
    }


def main(args: Args) -> None:
    """Gathers, if runs are named, and draws."""
    path = HERE / "saturation.csv"
    if args.run_dir is not None:
        rows = gather(args)
        write_csv(path, list(rows[0]), rows)
    if not path.is_file():
        raise UserError(f"there is no {path}: name runs with --run-dir and --other.")
    stored = read_csv(path)
    found, first = summary(stored), stored[0]
    sweep = HERE / "sweep_actions_episodes.csv"
    episodes = read_episodes(sweep) if sweep.is_file() else []
    success = {
        row["num_actions"]: row
        for row in summarise([row for row in episodes if row["task"] == int(first["task"])], ("num_actions",))
    }
    number = len({row["state"] for row in stored})
    lines = [
        f"{first['env']} ({first['data_source']} data), task {first['task']}, `{first['td_target']}`, "
        f"{int(first['steps']):,} steps: value of the chosen action above that of one candidate, mean over {number} "
        f"validation states with its 95% interval, in the environment's units.",
        "",
        "| N_pi | by the critic that chose | by one of another seed | error of the selection | success |",
        "|---|---|---|---|---|",
    ]
    for i, n in enumerate(NUMBERS):
        cells = [f"{found[name][i, 0]:.2f} ± {found[name][i, 1]:.2f}" for name in ("own", "others", "error")]
        cells.append("{success:.0%} [{low:.0%}, {high:.0%}]".format(**success[n]) if n in success else "")
        lines.append(f"| {n} | {' | '.join(cells)} |")
    (HERE / "saturation.md").write_text("\n".join(lines) + "\n")
    figure, axes = figures.subplots(1, 2 if success else 1, width=10.0 if success else 5.0, height=3.6)
    says = dict(
        own="by the critic that chose", others="by a critic of another seed", error="difference: error of the selection"
    )
    for name, label in says.items():
        mean, half = found[name].T
        axes[0][0].errorbar(NUMBERS, mean, half, marker="o", ms=3, lw=1, capsize=2, label=label)
    axes[0][0].set(ylabel="value of the choice above one candidate", title=f"{first['env']}, task {first['task']}")
    if success:
        y = np.array([100 * row["success"] for row in success.values()])
        ends = np.array([[100 * row["low"], 100 * row["high"]] for row in success.values()]).T
        axes[0][1].errorbar(list(success), y, np.abs(ends - y), marker="o", ms=3, lw=1, capsize=2, color="k")
        axes[0][1].set(ylabel="success (%)", ylim=(-3, 103), title="in the environment")
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set(xlabel="N_pi, candidates", xticks=NUMBERS, xticklabels=NUMBERS)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figures.save(figure, HERE / "saturation.png")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main, Args)
