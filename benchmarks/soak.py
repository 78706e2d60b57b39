"""Does a long run keep its memory? Runs a command, samples the memory of its processes, ends it, looks for orphans.

    python -m benchmarks.soak -- evor_value.py --env cube-single-play --quick --steps 20000000 --eval-every 10000

Memory is the proportional set size (Linux): a page that several processes share is counted once. The growth per hour is
the slope of a straight line through the samples of the training process from `--warm-up` on: compiling, the first
evaluation and the first checkpoint take memory once. Worker processes live for one evaluation; for them the peak over
the first half of the run is compared with the peak over the second. After `--minutes` the command gets SIGTERM.

Needs psutil (requirements-test.txt). Writes a row per sample, and a figure with the growth in its title.
"""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import tyro

from common import figures
from common.cli import run_cli
from common.errors import UserError
from common.files import write_csv


@dataclasses.dataclass(frozen=True)
class Args:
    """Sample the memory of a long run."""

    command: Annotated[tuple[str, ...], tyro.conf.Positional]
    """A script and its arguments, after `--`."""
    minutes: float = 60.0
    """How long to let it run."""
    warm_up: float = 10.0
    """Minutes after which memory should not grow any more."""
    interval: float = 5.0
    """Seconds between samples."""
    out: Path = Path("runs/tables/soak/soak.csv")
    """CSV file; the figure stands beside it."""


def proportional_size(process: psutil.Process) -> float:
    """MB of memory; 0 for one that is gone."""
    try:
        return process.memory_full_info().pss / 1e6
    except psutil.Error:
        return 0.0


def sample(process: psutil.Process) -> tuple[float, float, list[psutil.Process]]:
    """MB of the process, MB of all processes below it, and those processes."""
    try:
        below = process.children(recursive=True)
    except psutil.Error:
        below = []
    return proportional_size(process), sum(map(proportional_size, below), 0.0), below


def growth(minutes: np.ndarray, megabytes: np.ndarray) -> float:
    """MB per hour: the slope of the least-squares line."""
    return 60.0 * float(np.polyfit(minutes, megabytes, 1)[0])


def main(args: Args) -> list[dict[str, float]]:
    """See the top of the file; returns the samples."""
    if not 0 < args.warm_up < args.minutes:
        raise UserError(f"--warm-up {args.warm_up} must be positive and below --minutes {args.minutes}.")
    began, rows, seen = time.monotonic(), [], {}
    command = subprocess.Popen([sys.executable, *args.command])
    process = psutil.Process(command.pid)
    try:
        while (minutes := (time.monotonic() - began) / 60) < args.minutes and command.poll() is None:
            own, workers, below = sample(process)
            seen |= {child.pid: child for child in below}
            rows.append(dict(minutes=round(minutes, 3), process_mb=own, workers_mb=workers, workers=len(below)))
            time.sleep(args.interval)
    finally:
        how = "by itself" if command.poll() is not None else "after SIGTERM"
        command.terminate()
        code = command.wait()
        if rows:
            write_csv(args.out, list(rows[0]), rows)
    _, left = psutil.wait_procs(seen.values(), timeout=10)
    late = [row for row in rows[:-1] if row["minutes"] >= args.warm_up]  # the last one may have met it ending
    if len(late) < 10:
        raise UserError(f"the command ended with {code} after {minutes:.1f} minutes: give it more steps.")

    column = {key: np.array([row[key] for row in late]) for key in late[0]}
    slope, half = growth(column["minutes"], column["process_mb"]), len(late) // 2
    peaks = [column["workers_mb"][:half].max(), column["workers_mb"][half:].max()]
    title = (
        f"{slope:+.1f} MB an hour after {args.warm_up:g} minutes, {column['process_mb'].mean():,.0f} MB on average; "
        f"{len(seen)} worker processes, at most {peaks[0]:,.0f} and {peaks[1]:,.0f} MB in either half"
    )
    figure, axes = figures.subplots(1, 1, width=10.0, height=3.5)
    for key, label in (("process_mb", "training process"), ("workers_mb", "worker processes")):
        axes[0][0].plot([row["minutes"] for row in rows], [row[key] for row in rows], label=label, lw=1)
    axes[0][0].set(xlabel="minutes", ylabel="memory (MB)", ylim=(0, None))
    axes[0][0].set_title(title, fontsize=8)
    axes[0][0].legend()
    figures.save(figure, args.out.with_suffix(".png"))
    print(f"{title}; exit status {code} {how}, {len(left)} processes left behind")
    return rows


if __name__ == "__main__":
    run_cli(main, Args)
