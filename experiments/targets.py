"""The table of targets, backups and critics: a line per run, task and seed."""

from collections.abc import Sequence

from experiments.gather import gather_all, refuse_mixtures
from experiments.rows import Frame, Place, numbers, percent, table

__all__ = ["FILES", "draw", "gather_all", "refuse"]
FILES = ("runs.csv", "episodes.csv")
HEADER = (
    "data | task | target | backup | critic | K | h | EVOR | base policy alone "
    "| mean return, predicted / observed | correlation | CRPS"
)
SHOWN = ("success", "low", "high", "base_success", "base_low", "base_high", "mean_predicted", "mean_observed")
SHOWN += ("correlation", "crps")


def refuse(frames: Sequence[Frame]) -> None:
    refuse_mixtures(frames[0])


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown."""
    lines = [
        (
            f"{row.env} ({row.data_source})",
            row.task,
            f"`{row.td_target}`",
            f"`{row.next_action}`",
            row.critic,
            row.num_next_actions,
            row.horizon,
            f"**{row.success:.0%}** [{row.low:.0%}, {row.high:.0%}]",
            percent(row.base_success, row.base_low, row.base_high),
            f"{row.mean_predicted:.1f} / {row.mean_observed:.1f}",
            f"{row.correlation:.2f}",
            f"{row.crps:.1f}",
        )
        for row in numbers(frames[0], real=SHOWN).itertuples()
    ]
    return table(HEADER, lines)
