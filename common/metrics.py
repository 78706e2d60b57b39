"""Numbers that a run logs: `metrics.csv`, and what `--track` names."""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_csv

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
            complete = path.read_text(encoding="utf-8").rpartition("\n")[0]  # a kill may have cut the last line
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
        with open(self.path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            for metric, numbers in values.items():
                for (task, seed), value in zip(replicas, numbers, strict=True):
                    writer.writerow([self.stage, self.env, task, seed, step, metric, repr(float(value))])
                    self._send(f"{self.stage}/task{task}/seed{seed}/{metric}", float(value), step)

    def _send(self, name: str, value: float, step: int) -> None:
        """To what `--track` names; if that fails, the run goes on without it."""
        try:
            if self.track is not None:
                self.track.log({name: value}, step=step)
        except Exception as error:  # of the network or the service
            print(f"warning: --track failed and is left out from here on ({error}).", file=sys.stderr)
            self.track = None
