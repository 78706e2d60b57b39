"""Rows of finished runs of stage 2 and of the baselines: raw episodes, settings, calibration, provenance."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import checkpoint
from common.errors import UserError
from common.evaluation import read_episodes, summarise
from common.files import read_csv, sha256
from common.run import NOT_RESULTS
from experiments.rows import Frame, complete, frame

FILES = ("config.json", "evaluation.csv", "model.eqx")
READOUT = ("num_returns", "return_temperature", "action_temperature")
OF_A_SEED = (*NOT_RESULTS, "seeds", "first_seed")
OF_AN_EPISODE = ("task", "seed", "step", "num_actions", "episode", "success", "length", "total")
SHARED = ("env", "run", "td_target", "next_action", "critic", "horizon", "data_sha256", "git_revision")

Records = list[dict[str, Any]]


def of_readout(episodes: Records, args: dict[str, Any]) -> Records:
    """The episodes that have the settings of `args`: others are left where an evaluation anew was stopped."""
    return [row for row in episodes if all(float(row.get(name, args[name])) == float(args[name]) for name in READOUT)]


def finished(run: Path, files: Sequence[str] = FILES) -> dict[str, Any]:
    """The config.json of a run that came to its end, and left these files.

    Raises:
        UserError: the run is not there, or some of it diverged.
    """
    missing = [path for path in (run / "value" / name for name in files) if not path.is_file()]
    if missing:
        raise UserError(f"there is no {missing[0]}: name run directories of evor_value.py that came to their end.")
    config = json.loads((run / "value" / "config.json").read_text())
    if config.get("diverged"):
        raise UserError(f"{run}: (task, seed) {config['diverged']} diverged: its numbers are not those of all seeds.")
    return config


def settings(run: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a run that is one value, and where it comes from."""
    model = run / "value" / "model.eqx"
    of_policy: dict[str, Any] = {"args": {"steps": ""}}  # of one that was trained with the reward model
    if config["policy_run_dir"] is not None:
        of_policy = json.loads((Path(config["policy_run_dir"]) / "bc" / "config.json").read_text())
    policy = of_policy["args"]
    args = {key: value for key, value in config["args"].items() if key not in OF_A_SEED and not isinstance(value, list)}
    return args | dict(
        env=config["env"],
        run=str(run),
        return_axis=config.get("return_axis", ""),
        bc_steps=policy["steps"],
        ignored_observations=" ".join(map(str, policy.get("ignore_observations", []))),
        data_source=config["data"]["source"],
        data_sha256=config["data"]["sha256"],
        policy_sha256=config["policy_sha256"],
        critic_sha256=sha256(model),
        train_revision=checkpoint.read_header(model, stage="value", remedy="train it again.").get("git_revision", ""),
        git_revision=config["git_revision"],  # of the evaluation, where that was made anew
        hardware=config.get("hardware", ""),
        policy_seconds=of_policy.get("seconds", ""),  # of the base policy, all its seeds together
        train_seconds=config.get("seconds", ""),  # of all tasks and seeds of the run together
        **{f"version_{name}": version for name, version in config["versions"].items()},
    )


def gather(run: Path) -> tuple[Records, Records]:
    """Episodes of the last checkpoint, and one summary per task and seed.

    Raises:
        UserError: the run did not come to its end.
    """
    config = finished(run)
    args, about = config["args"], settings(run, config)
    episodes = [
        row
        for row in of_readout(read_episodes(run / "value" / "evaluation.csv"), args)
        if row["step"] == args["steps"] and row["num_actions"] in (1, args["num_actions"])
    ]
    if {row["num_actions"] == 1 for row in episodes} != {True, False}:
        raise UserError(f"{run} has no evaluation of its last checkpoint, or none of several actions: let it finish.")
    success = {
        (row["task"], row["seed"], row["num_actions"] == 1): row
        for row in summarise(episodes, ("task", "seed", "num_actions"))
    }
    calibration: dict[tuple[int, int], dict[str, float]] = {}
    path = run / "value" / "calibration.csv"
    for row in read_csv(path) if path.is_file() else ():  # no episode may be long enough for a complete return
        calibration.setdefault((int(row["task"]), int(row["seed"])), {})[row["metric"]] = float(row["value"])
    summary = []
    for task, seed in sorted({(task, seed) for task, seed, _ in success}):
        evor, base = success[task, seed, False], success[task, seed, True]
        errors = calibration.get((task, seed), {})
        names = ["mean_predicted", "mean_observed", "correlation", "crps"]
        names += [name for name in errors if name.startswith("below_")]
        summary.append(
            about
            | dict(task=task, seed=seed)
            | {name: evor[name] for name in ("success", "low", "high", "episodes")}
            | dict(base_success=base["success"], base_low=base["low"], base_high=base["high"])
            | {name: round(errors[name], 4) if name in errors else "" for name in names}
        )
    shared = {name: about[name] for name in SHARED}
    return [shared | {name: row[name] for name in OF_AN_EPISODE} for row in episodes], summary


def gather_all(runs: Sequence[Path]) -> list[Frame]:
    """Rows of runs and of their episodes."""
    gathered = [gather(run) for run in runs]
    return [frame(row for pair in gathered for row in pair[i]) for i in (1, 0)]


def refuse_differences(runs: Frame, names: Iterable[str], words: str) -> None:
    """Raises `UserError` where rows say different things in one of the columns; what is empty says nothing."""
    for name in names:
        told = complete(runs, [name]).drop_duplicates(name)
        told = told[told[name] != ""]
        if len(told) > 1:
            raise UserError(f"{' and '.join(told['run'][:2])} differ in {name}{words}")


def refuse_mixtures(runs: Frame) -> None:
    """Raises `UserError` for runs whose numbers belong in different tables."""
    for _, of_env in runs.groupby("env"):
        scales = ("steps", "bc_steps", "episodes", "data_sha256")
        refuse_differences(of_env, scales, ": numbers of different scales share no table.")
    if runs["data_source"].nunique() > 1:
        raise UserError("some runs are on collected and some on official data: their numbers share no table.")
