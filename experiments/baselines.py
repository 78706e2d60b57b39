"""EVOR, its critic without the flow, and QC: one task, one base policy, one budget, in one table.

Runs that differ in their seed alone are one line: successes of all their episodes with a 95% interval, Wilson's for one
seed, else by bootstrap over seeds and episodes; the seeds stand beside it. Milliseconds and the share of the machine's
rate are those of `benchmarks.speed --groups baselines`, where all steps were timed in turn. Runs of different
environments, tasks or scales, on different data or base policies, and lines whose seeds had different settings are
refused.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax

import evor_value
from baselines import critics, qc
from common.checkpoint import read_spec
from common.errors import UserError
from common.flops import num_parameters, step_flops
from common.networks import make_critic, make_policy
from evor_infer import AgentSpec
from experiments import gather
from experiments.gather import OF_A_SEED
from experiments.rows import Frame, Place, cell, frame, numbers, read, table

FILES = ("runs.csv", "episodes.csv")
HEADER = (
    "method | next action | horizon | N_pi | success | per seed | base policy alone | parameters | MFLOP per step "
    "| ms per step | of the machine's rate | mean return, predicted / observed | correlation | CRPS"
)
MEANS = ["mean_predicted", "mean_observed", "correlation", "crps"]


def arguments(config: dict[str, Any]) -> evor_value.Args:
    """The arguments of a run, from its config.json."""
    stored = config["args"]
    kind = qc.Args if "policy" in stored else critics.Args if "ensemble" in stored else evor_value.Args
    known = {field.name for field in dataclasses.fields(kind)} - {"run_dir", "policy_run_dir", "dataset"}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return kind(**{name: value for name, value in values.items() if name in known})


def describe(run: Path) -> dict[str, Any]:
    """What the table says of a run beside its results."""
    config, key = json.loads((run / "value" / "config.json").read_text()), jax.random.key(0)
    args, spec = arguments(config), read_spec(AgentSpec, config["model"])
    critic = eqx.filter_eval_shape(make_critic, spec.critic, key=key)
    policy = eqx.filter_eval_shape(make_policy, spec.policy, key=key) if config["policy_run_dir"] is None else None
    backup = args.next_action
    if backup == "softmax" and args.backup_temperature == 0:
        backup = f"best of {args.num_next_actions}"
    elif backup == "softmax":
        backup = f"softmax of {args.num_next_actions}, temperature {args.backup_temperature:g}"
    return dict(
        method=args.method + (f", {args.critic}" if args.critic in ("mlp", "trunk") else ""),
        backup=backup,
        parameters=num_parameters(critic),
        mflop=step_flops(args, critic, policy) / 1e6,
        settings=json.dumps({k: v for k, v in config["args"].items() if k not in OF_A_SEED}, sort_keys=True),
    )


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Rows of runs and of their episodes, with what the table says of each run."""
    of_runs, episodes = gather.gather_all(runs)
    about = frame(dict(run=str(run)) | describe(run) for run in runs)
    return [of_runs.merge(about), episodes.merge(about[["run", "method"]])]


def timed_as(backup: str) -> str:
    """The backup that costs the same: a bank's action or the data's, greedy or by softmax."""
    return backup.replace("dataset", "base").split(", temperature")[0].replace("softmax", "best")


def refuse(frames: Sequence[Frame]) -> None:
    """Raises `UserError` for runs that are not the same but for what the table names."""
    runs = frames[0]
    gather.refuse_mixtures(runs)
    gather.refuse_differences(runs, ("env", "task"), ": one table is about one.")
    for _, line in runs.groupby(["method", "backup", "horizon"]):
        gather.refuse_differences(line, ["settings"], ": they share no line.")
    for _, line in runs.groupby("horizon"):
        gather.refuse_differences(line, ["policy_sha256"], ": they share no line.")


def line(members: Frame, episodes: Frame, timed: dict[str, str]) -> tuple:
    """A line of the table: all seeds of a setting."""
    first, mean = members.iloc[0], members[MEANS].mean()
    chosen = episodes.merge(members[["run", "seed"]])
    success, _, interval = cell(chosen[chosen["num_actions"] != "1"]).partition(" ")
    return (
        f"`{first['method']}`",
        *first[["backup", "horizon", "num_actions"]],
        f"**{success}** {interval}",
        ", ".join(f"{rate:.0%}" for rate in members.sort_values("seed")["success"]),
        cell(chosen[chosen["num_actions"] == "1"]),
        f"{int(first['parameters']):,}",
        f"{float(first['mflop']):,.0f}",
        f"{float(timed['ms']):.1f}" if timed else "",
        f"{float(timed['peak_share']):.0%}" if timed else "",
        f"{mean['mean_predicted']:.1f} / {mean['mean_observed']:.1f}",
        f"{mean['correlation']:.2f}",
        f"{mean['crps']:.1f}",
    )


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: one line per setting; those of a method and horizon stand together."""
    runs, episodes = numbers(frames[0], real=["success", *MEANS]), frames[1]
    first, lines, timed = runs.iloc[0], [], place.beside("baselines", "speed.csv")
    speed = {row["case"]: row for row in read(timed).to_dict("records")} if timed.is_file() else {}
    for (method, horizon), of_method in runs.groupby(["method", "horizon"], sort=False):
        for backup, members in of_method.groupby("backup", sort=False):
            case = f"{method}, {timed_as(backup)}, horizon {horizon}"
            if speed and case not in speed:
                raise UserError(f"no case {case!r} was timed, only {', '.join(speed)}: time it with benchmarks.speed.")
            lines.append(line(members, episodes, speed.get(case, {})))
    bc_steps = " or ".join(sorted({f"{int(steps):,}" for steps in runs["bc_steps"] if steps}))
    about = (
        f"{first['env']} ({first['data_source']} data), task {first['task']}: {int(first['steps']):,} steps, on one "
        f"base policy per horizon ({bc_steps} steps); {first['episodes']} episodes per seed with the best of N_pi "
        "actions."
    )
    return f"{about}\n\n{table(HEADER, lines)}"
