"""The table of base policies of cube environments, from the rows of `benchmarks.base_policy`."""

from collections.abc import Sequence

from experiments.rows import Frame, Place, complete, table

FILES = ("cube-single-play.csv", "cube-double-play.csv", "cube-double-play_velocities.csv", "schedule.csv")
HEADER = (
    "data | BC steps | schedule | hidden observations | episodes | steps with a cube lifted | data "
    "| beside the cube at the first pick | R2 of the mean action | cubes shuffled"
)


def lines(frame: Frame) -> list[tuple[str, ...]]:
    """A line per policy."""
    return [
        (
            f"{row['env']} ({row['data_source']})",
            f"{int(row['bc_steps']):,}",
            row["schedule"],
            row["ignored_observations"],
            row["episodes"],
            f"{float(row['policy_steps_lifted']):.1%}",
            f"{float(row['data_steps_lifted']):.1%}",
            f"{100 * float(row['first_pick_error_median_m']):.1f} cm",
            f"{float(row['r2_of_mean_action']):.2f}",
            f"{float(row['r2_with_shuffled_cubes']):.2f}",
        )
        for row in complete(frame, ["schedule"]).to_dict("records")
    ]


def draw(frames: Sequence[Frame], place: Place) -> str:
    """Markdown: a table of the policies of the previews, and one of schedules, which are of other data."""
    *previews, schedules = frames
    return "\n".join(
        [table(HEADER, [line for frame in previews for line in lines(frame)]), table(HEADER, lines(schedules))]
    )
