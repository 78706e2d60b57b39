"""Numbers that a run logs: `metrics.csv`, and with `--track` a Weights & Biases run."""

import csv
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import plain, read_json, write_csv, write_json

FIELDS = ("stage", "env", "task", "seed", "step", "metric", "value")

CALIBRATED = ("bias", "crps")  # of predictions, logged with each evaluation

EVALUATED = ("success", "return", *CALIBRATED)


class Metrics:
    """Appends rows `stage, env, task, seed, step, metric, value` to a CSV file: long format, one number a row.

    `task` is empty where a number belongs to no task. Numbers are written in full precision, and no wall-clock times
    are, so equal runs leave equal files.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        env: str,
        resume_step: int | None = None,
        track: Any = None,
    ):
        """Starts a new file, or, with `resume_step`, keeps the rows of the steps up to it. An evaluation at that step
        comes after the checkpoint and is done anew."""
        self.path, self.stage, self.env, self.track = path, stage, env, track
        kept = []
        if resume_step is not None and path.exists():
            complete = path.read_text().rpartition("\n")[0]  # a kill may have cut the last line
            kept = [row for row in csv.DictReader(complete.splitlines()) if int(row["step"]) <= resume_step]
            kept = [row for row in kept if row["metric"] not in EVALUATED or int(row["step"]) < resume_step]
        write_csv(path, FIELDS, kept)

    def log(
        self,
        step: int,
        replicas: Sequence[tuple[int | str, int]],
        values: Mapping[str, Iterable[Any]],
    ) -> None:
        """Logs metrics after `step` gradient steps: `values` maps a name to one number per (task, seed) replica."""
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            for metric, numbers in values.items():
                for (task, seed), value in zip(replicas, numbers, strict=True):
                    writer.writerow([self.stage, self.env, task, seed, step, metric, repr(float(value))])
                    if self.track is not None:
                        self.track.log({f"{self.stage}/task{task}/seed{seed}/{metric}": float(value)}, step=step)


def import_wandb() -> Any:
    """Weights & Biases; imported here and nowhere else.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    try:
        import wandb
    except Exception as error:  # what a broken installation raises
        raise UserError(f"--track needs Weights & Biases ({error}): install it with `pip install wandb`.") from None
    return wandb


def start_tracking(
    project: str, name: str, config: Mapping[str, Any], *, directory: Path | None = None, anew: bool = False
) -> Any:
    """A Weights & Biases run.

    Args:
        directory: that of the run, where `tracking.json` keeps the id: a run that goes on here is one run there, too.
        anew: whether it is a new run, whatever stands there.

    Raises:
        UserError: it does not start, without a key for instance.
    """
    wandb = import_wandb()
    settings = dict(project=project, name=name, config=plain(config), reinit="finish_previous")
    kept = (None if anew or directory is None else read_json(directory / "tracking.json")) or {}
    kept.setdefault("id", secrets.token_hex(8))
    try:
        run = wandb.init(**settings, id=kept["id"], resume="allow")
    except Exception as error:  # of the network, the key or the service
        raise UserError(
            f"--track: Weights & Biases does not start ({error}): `wandb login`, or set WANDB_MODE=offline."
        ) from None
    if directory is not None:
        write_json(directory / "tracking.json", kept)  # after what may fail
    return run
