"""Sweeps of `evor_infer.py` on one figure and in one table.

A folder is what `evor_infer.py --out` filled. Its rows are episodes, with every setting and where it comes from. The
figure has lines, or a heat map of each target and task where both temperatures were swept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import checkpoint, figures
from common.errors import UserError
from common.files import read_csv, read_json, sha256
from common.provenance import VERSIONS
from experiments.rows import Frame, Place, complete, frame, numbers, percent, rate, table

FILES = ("episodes.csv",)
ALIKE = ("env", "data_sha256", "policy_sha256", "steps", "next_action", "backup_return_temperature", "critic")
ALIKE += ("horizon", "discount", "flow_steps", "solver", "absolute", "eval_seed")
SETTINGS = tuple(figures.SAYS)
MODEL = ["td_target", "task", "seed"]
# Whether temperatures are absolute, and whether rows say what tau_Q is in units of return. Those of revision 90dd10a
# do not say the first. Later ones that do not say the second have a tau_Q in standard deviations of the scores.
UNITS = {
    ("", False): "fractions of the return range",
    ("", True): "fractions of the return range",
    ("True", False): "units of return",
    ("True", True): "units of return",
    ("False", False): "standard deviations",
    ("False", True): "standard deviations of the data's returns",
}


def gather(folder: Path) -> list[dict[str, Any]]:
    """The episodes of a sweep, with what the reward model was trained on and by which revision."""
    config = read_json(folder / "config.json")
    if config is None or not (folder / "episodes.csv").is_file():
        raise UserError(f"{folder} holds no finished sweep of evor_infer.py: name its --out folder.")
    model = folder.parent / "value" / "model.eqx"
    value = checkpoint.read_header(model, stage="value", remedy="train it first.")
    if sha256(model) != config["critic_sha256"]:
        raise UserError(f"{model} is not what {folder} evaluated: run evor_infer.py again.")
    trained = value["args"]
    about = dict(
        td_target=trained.get("td_target", ""),
        next_action=trained["next_action"],
        critic=trained["critic"],
        # A setting of the training too, where the backup chooses among actions.
        backup_return_temperature=trained["return_temperature"] if trained["next_action"] == "softmax" else "",
        steps=value["step"],
        horizon=value["horizon"],
        discount=trained["discount"],
        git_revision=config["git_revision"],
        train_revision=value.get("git_revision", ""),
        critic_sha256=config["critic_sha256"],
        policy_sha256=config["policy_sha256"] or "",
        hardware=config["hardware"],
        **{f"version_{name}": config["versions"][name] for name in VERSIONS},
    )
    return [about | row for row in read_csv(folder / "episodes.csv")]


def gather_all(folders: Sequence[Path]) -> list[Frame]:
    """Rows of several sweeps."""
    if len(set(folders)) < len(folders):
        raise UserError("two of the folders are of one target, task and seed: name one of them.")
    return [frame(row for folder in folders for row in gather(folder))]


def refuse(frames: Sequence[Frame]) -> None:
    """Raises `UserError` for sweeps that share no figure."""
    episodes = complete(frames[0], [*ALIKE, "action_temperature_units"])
    if (episodes["absolute"] == "False").any() and (episodes["action_temperature_units"] == "").nunique() > 1:
        raise UserError("the folders' tau_Q have different units: they share no figure.")
    for name in ALIKE:
        if episodes[name].nunique() > 1:
            raise UserError(f"the folders' evaluations differ in {name}: they share no figure.")
    if episodes.groupby(MODEL)["critic_sha256"].nunique().max() > 1:
        raise UserError("two of the folders are of one target, task and seed: name one of them.")


def summarise(episodes: Frame) -> list[dict[str, Any]]:
    """Success with its interval for each target, task and setting."""
    by = ["env", "data_source", "td_target", "task", *SETTINGS]
    summary = []
    for values, rows in episodes.groupby(by, sort=False):
        success, low, high = rate(rows)
        measured = dict(success=success, low=low, high=high, episodes=len(rows))
        summary.append(dict(zip(by, values, strict=True)) | measured)
    return summary


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown, and the figure."""
    episodes = complete(frames[0], ["absolute", "action_temperature_units", "noise_scale"])
    episodes["noise_scale"] = episodes["noise_scale"].replace("", "1")  # older revisions had no other
    episodes = numbers(episodes, whole=["task"], real=[*SETTINGS, "success"])
    summary, first = summarise(episodes), episodes.iloc[0]
    swept = [name for name in SETTINGS if episodes[name].nunique() > 1] or ["num_actions"]
    title = f"{first['env']} ({first['data_source']} data), {int(first['steps']):,} steps"
    if {"return_temperature", "action_temperature"} & set(swept):
        title += f",\ntemperatures in {UNITS[first['absolute'], first['action_temperature_units'] != '']}"
    path = place.path("figure.png")
    if swept == ["return_temperature", "action_temperature"]:
        panels: dict[str, list[dict[str, Any]]] = {}
        for row in summary:
            panels.setdefault(f"{row['td_target']}, task {row['task']}", []).append(row)
        figures.heat_maps(panels, path, x=swept[0], y=swept[1], title=title)
    else:
        figures.sweep(summary, path, title=title, by=("td_target", "task"))
    lines = []
    for row in summary:
        rate_cell, _, interval = percent(row["success"], row["low"], row["high"]).partition(" ")
        about = f"{row['env']} ({row['data_source']})", f"`{row['td_target']}`", row["task"]
        lines.append((*about, *(f"{row[name]:g}" for name in swept), f"**{rate_cell}** {interval}", row["episodes"]))
    return table(f"data | target | task | {' | '.join(swept)} | success | episodes", lines)
