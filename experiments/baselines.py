"""EVOR, its critic without the flow, and QC: one task, one base policy, one budget, in one table.

    python -m benchmarks.speed --groups baselines --out runs/speed-baselines
    python -m experiments.baselines --runs runs/baselines/* --speed runs/speed-baselines/speed.csv

Runs that differ in their seed alone are one line: successes of all their episodes with a 95% interval, Wilson's for one
seed, else by bootstrap over seeds and episodes; the seeds stand beside it. Milliseconds and the share of the machine's
rate are those of `benchmarks.speed`, where all steps were timed in turn. Writes, in `results/`,
`baselines_episodes.csv` (one row per evaluation episode), `baselines_runs.csv` (one per run and seed, with settings,
data and versions), `baselines_speed.csv`, and `baselines.md` (the table, drawn from those rows, with the words of
`baselines_words.md`).
`--append` adds runs to the rows that stand there; with no runs it only draws them anew. Refuses runs of different
environments, tasks or scales, on different data or base policies, and lines whose seeds had different settings.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import evor_value
from baselines import critics, qc
from benchmarks.flops import num_parameters, step_flops
from common.errors import UserError, run_cli
from common.metrics import read_csv, write_csv
from common.networks import make_critic, make_policy
from common.statistics import mean_interval
from common.training import PLACES
from experiments.preview import HERE, gather, refuse_mixtures

NUMBERS = dict.fromkeys(("task", "seed", "episodes", "steps", "horizon", "num_actions", "parameters", "bc_steps"), int)
NUMBERS |= dict.fromkeys(("success", "mean_predicted", "mean_observed", "correlation", "crps", "mflop"), float)
OF_A_SEED = (*PLACES, "seeds", "first_seed")


@dataclasses.dataclass(frozen=True)
class Args:
    """Gather runs of stage 2 and of the baselines into one table."""

    runs: tuple[Path, ...] = ()
    """Run directories."""
    speed: Path | None = None
    """speed.csv of `benchmarks.speed --groups baselines`; kept, so that later tables need not name it."""
    name: str = "baselines"
    """Prefix of the files."""
    append: bool = False
    """Add to the rows that stand there; a run of the same name takes the place of the old one."""


def stored(name: str, replaced: set[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Episodes and rows that stand in `results/`, but for those of the runs in `replaced`."""
    paths = [HERE / f"{name}_{kind}.csv" for kind in ("episodes", "runs")]
    if not all(path.is_file() for path in paths):
        return [], []
    episodes = [row for row in read_csv(paths[0]) if row["run"] not in replaced]
    for row in episodes:
        row |= dict(seed=int(row["seed"]), num_actions=int(row["num_actions"]))
        row |= dict(success=float(row["success"]), length=int(row["length"]))
    rows = [
        row | {key: kind(row[key]) if row[key] else "" for key, kind in NUMBERS.items()} for row in read_csv(paths[1])
    ]
    return episodes, [row for row in rows if row["run"] not in replaced]


def arguments(config: dict[str, Any]) -> evor_value.Args:
    """The arguments of a run, from its config.json."""
    found = config["args"]
    kind = qc.Args if "policy" in found else critics.Args if "ensemble" in found else evor_value.Args
    known = {field.name for field in dataclasses.fields(kind)} - {"run_dir", "policy_run_dir", "dataset"}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return kind(**{name: value for name, value in values.items() if name in known})


def describe(run: Path, row: dict[str, Any]) -> dict[str, Any]:
    """What the table says of a run beside its results."""
    config, key = json.loads((run / "value" / "config.json").read_text()), jax.random.key(0)
    args, critic = arguments(config), eqx.filter_eval_shape(make_critic, config, key=key)
    policy = eqx.filter_eval_shape(make_policy, config, key=key) if config.get("own_policy") else None
    backup = args.next_action
    if backup == "softmax":
        greedy = args.backup_temperature == 0
        backup = f"best of {args.num_next_actions}" if greedy else (
            f"softmax of {args.num_next_actions}, temperature {args.backup_temperature:g}"
        )  # fmt: skip
    return row | dict(
        run=str(run),
        method=args.method + (f", {args.critic}" if args.critic in ("mlp", "trunk") else ""),
        backup=backup,
        parameters=num_parameters(critic),
        mflop=step_flops(args, critic, policy) / 1e6,
        policy_sha256=config["policy_sha256"],
        settings=json.dumps({k: v for k, v in config["args"].items() if k not in OF_A_SEED}, sort_keys=True),
    )


def setting(row: dict[str, Any]) -> tuple[str, str, int]:
    """What a line of the table is about: method, backup, horizon."""
    return row["method"], row["backup"], row["horizon"]


def timed_as(backup: str) -> str:
    """The backup that costs the same: a bank's action or the data's, greedy or by softmax."""
    return backup.replace("dataset", "base").split(", temperature")[0].replace("softmax", "best")


def refuse_differences(rows: list[dict[str, Any]]) -> None:
    """Raises `UserError` for runs that are not the same but for what the table names."""
    refuse_mixtures(rows)
    for field in ("env", "task"):
        if len({row[field] for row in rows}) > 1:
            raise UserError(f"the runs differ in {field}: one table is about one.")
    shared = [(setting(row), "settings", row) for row in rows]
    shared += [(row["horizon"], "policy_sha256", row) for row in rows if row["policy_sha256"]]
    for key, field, row in shared:
        other = next(r for k, f, r in shared if (k, f) == (key, field))
        if row[field] != other[field]:
            raise UserError(f"{row['run']} and {other['run']} differ in {field}: they share no line.")


def line(members: list[dict[str, Any]], episodes: list[dict[str, Any]], timed: dict[str, str]) -> str:
    """A line of the table: all seeds of a setting."""
    method, backup, horizon = setting(members[0])
    runs = {(row["run"], row["seed"]) for row in members}
    own = [row | dict(base=row["num_actions"] == 1) for row in episodes if (row["run"], row["seed"]) in runs]

    def pooled(base: bool) -> tuple[str, str]:
        successes: dict[int, list[float]] = {}
        for row in own:
            if row["base"] == base:
                successes.setdefault(row["seed"], []).append(row["success"])
        found = np.array(list(successes.values()))
        low, high = mean_interval([found])
        return f"{found.mean():.0%}", f"[{low:.0%}, {high:.0%}]"

    mean = {name: np.mean([row[name] for row in members])
            for name in ("mean_predicted", "mean_observed", "correlation", "crps")}  # fmt: skip
    cells = (
        f"`{method}`",
        backup,
        horizon,
        members[0]["num_actions"],
        "**{}** {}".format(*pooled(base=False)),
        ", ".join(f"{row['success']:.0%}" for row in sorted(members, key=lambda row: row["seed"])),
        "{} {}".format(*pooled(base=True)),
        f"{members[0]['parameters']:,}",
        f"{members[0]['mflop']:,.0f}",
        f"{float(timed['ms']):.1f}" if timed else "",
        f"{float(timed['peak_share']):.0%}" if timed else "",
        f"{mean['mean_predicted']:.1f} / {mean['mean_observed']:.1f}",
        f"{mean['correlation']:.2f}",
        f"{mean['crps']:.1f}",
    )
    return "| " + " | ".join(str(c) for c in cells) + " |"


def table(rows: list[dict[str, Any]], episodes: list[dict[str, Any]], speed: dict[str, dict[str, str]]) -> str:
    """Markdown: one line per setting."""
    first = rows[0]
    bc_steps = " or ".join(sorted({f"{row['bc_steps']:,}" for row in rows if row["bc_steps"]}))
    lines = [
        f"{first['env']} ({first['data_source']} data), task {first['task']}: {first['steps']:,} steps, on one base "
        f"policy per horizon ({bc_steps} steps); {first['episodes']} episodes per seed with the best of N_pi actions.",
        "",
        "| method | next action | horizon | N_pi | success | per seed | base policy alone | parameters "
        "| MFLOP per step | ms per step | of the machine's rate | mean return, predicted / observed | correlation "
        "| CRPS |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    methods = list(dict.fromkeys((row["method"], row["horizon"]) for row in rows))
    for key in sorted(dict.fromkeys(map(setting, rows)), key=lambda key: methods.index((key[0], key[2]))):
        members = [row for row in rows if setting(row) == key]
        case = f"{key[0]}, {timed_as(key[1])}, horizon {key[2]}"
        if speed and case not in speed:
            raise UserError(f"no case {case!r} was timed, only {', '.join(speed)}: name another --speed.")
        lines.append(line(members, episodes, speed.get(case, {})))
    return "\n".join(lines) + "\n"


def main(args: Args) -> str:
    """Writes the files; returns the table."""
    episodes, rows = stored(args.name, {str(run) for run in args.runs}) if args.append else ([], [])
    if not args.runs and not rows:
        raise UserError("name at least one run directory with --runs, or --append to rows that stand there.")
    for run in args.runs:
        raw, summary = gather(run)
        rows += [describe(run, row) for row in summary]
        episodes += [row | dict(run=str(run), method=rows[-1]["method"]) for row in raw]
    refuse_differences(rows)
    timings = HERE / "baselines_speed.csv"  # of all tables
    if args.speed:
        timed = read_csv(args.speed)
        write_csv(timings, list(timed[0]), timed)
    speed = {row["case"]: row for row in read_csv(timings)} if timings.is_file() else {}
    text = table(rows, episodes, speed)
    words = HERE / f"{args.name}_words.md"
    if words.is_file():
        text += "\n" + words.read_text()
    write_csv(HERE / f"{args.name}_episodes.csv", list(episodes[0]), episodes)
    write_csv(HERE / f"{args.name}_runs.csv", list(rows[0]), rows)
    (HERE / f"{args.name}.md").write_text(text)
    print(text)
    return text


if __name__ == "__main__":
    run_cli(main, Args)
