"""Starts a script as a user would, looks at the processes that it starts, and at whether they end with it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def start(script: str, directory: Path) -> Iterator[subprocess.Popen]:
    """Runs `script` in `directory`, as the leader of a process group; nothing of it is left after the `with`."""
    path = directory / "script.py"
    path.write_text(script)
    with (directory / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(path)],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(directory: Path) -> str:
    """What the script and its processes wrote to stderr."""
    return (directory / "stderr").read_text()


def wait_for_workers(process: subprocess.Popen, number: int) -> list[psutil.Process]:
    """Waits for `number` processes of `multiprocessing` that are past their start; returns them."""
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(psutil.Error, OSError):
            children = psutil.Process(process.pid).children()
            found = [child for child in children if "spawn_main" in str(child.cmdline()) and has_begun(child)]
            if len(found) == number:
                return found
        time.sleep(0.02)
    raise AssertionError(f"{process.poll()} is its exit status, and its workers had not begun")


def has_begun(worker: psutil.Process) -> bool:
    """Whether a worker has put away Python's own handler of Ctrl-C, which all workers here do first (Linux): it ignores
    the signal, or it has the default action and, unlike a process that is only starting, a second thread."""
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines)
    ignored, caught = (int(status[key], 16) & 1 << signal.SIGINT - 1 for key in ("SigIgn", "SigCgt"))
    return bool(ignored) or (worker.num_threads() > 1 and not caught)


def all_end(workers: list[psutil.Process]) -> bool:
    """Whether none of the processes is left after at most 90 seconds."""
    return not psutil.wait_procs(workers, timeout=90)[1]
