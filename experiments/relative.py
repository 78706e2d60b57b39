"""The paper's figures: how success depends on one setting of the extraction, relative to the best, in all environments.

Rows are counts: the solved episodes of a setting, task and seed, from a sweep of `evor_infer.py`.
"""

from collections.abc import Sequence
from pathlib import Path

from common import figures
from common.errors import UserError
from experiments import sweeps
from experiments.rows import Frame, Place, complete, numbers, table

FILES = ("rows.csv",)
SWEPT = ("num_actions", "return_temperature", "action_temperature", "noise_scale")
ABOUT = ["env", "task", "seed", *SWEPT, "num_returns", "absolute", "eval_seed", "steps", "next_action", "horizon"]
ABOUT += ["discount", "data_sha256", "policy_sha256", "critic_sha256", "train_revision", "git_revision", "hardware"]
KEY = ("env",)


def gather_all(folders: Sequence[Path]) -> list[Frame]:
    """Solved and played episodes of each setting, task and seed of several sweeps."""
    episodes = numbers(sweeps.gather_all(folders)[0], real=["success"])
    groups = complete(episodes, ABOUT).groupby(ABOUT, sort=False)["success"]
    rows = groups.agg(solved="sum", episodes="size").reset_index()
    return [rows.astype({"solved": int}).astype(str)]


def swept_setting(rows: Frame) -> str:
    """The one setting that differs within an environment.

    Raises:
        UserError: none does, or several do.
    """
    of_envs = complete(rows, SWEPT).groupby(rows["env"])
    found = [name for name in SWEPT if of_envs[name].nunique().max() > 1]
    if len(found) != 1:
        raise UserError(f"one of {', '.join(SWEPT)} must be swept, not {', '.join(found) or 'none'}.")
    return found[0]


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown, and the figure: a line for each environment, and in the table one of their mean."""
    rows = frames[0]
    name = swept_setting(rows)
    rows = numbers(rows, real=[name, "solved", "episodes"])
    rates = rows.assign(rate=rows["solved"] / rows["episodes"]).groupby(["env", name], sort=False)["rate"].mean()
    success = rates.unstack().reindex(rows["env"].unique())
    figure, axes = figures.subplots(1, 1, width=5.0, height=3.4)
    for env, of_env in success.iterrows():
        axes[0, 0].plot(range(len(of_env)), of_env / max(of_env.max(), 1e-9), "o-", ms=3, label=env)
    axes[0, 0].set(xlabel=figures.SAYS[name], ylabel="success relative to the best", xticks=range(success.shape[1]))
    axes[0, 0].set_xticklabels([f"{value:g}" for value in success])
    axes[0, 0].legend(fontsize=7)
    figures.save(figure, place.path("figure.png"))
    if len(success) > 1:
        success.loc["mean of all"] = success.mean()
    lines = ((env, *(f"{rate:.0%}" for rate in of_env)) for env, of_env in success.iterrows())
    return table(f"success at {figures.SAYS[name]} | {' | '.join(f'{value:g}' for value in success)}", lines)
