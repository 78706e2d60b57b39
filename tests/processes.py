"""Starts a script as a user would, looks at the processes that it starts, and at whether they end with it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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


def wait_for_workers(process: subprocess.Popen, number: int, ready: Callable[[dict[str, str]], bool]) -> list[int]:
    """Waits for `number` processes of `multiprocessing` whose `/proc/PID/status` is `ready`; returns them."""
    while process.poll() is None:
        found = [pid for pid in _children(process.pid) if ready(_status(pid))]
        if len(found) == number:
            return found
        time.sleep(0.02)
    raise AssertionError(f"it ended with {process.returncode} before its workers were ready")


def ignores_or_defaults_sigint(status: dict[str, str]) -> bool:
    """Whether Python's own handler of Ctrl-C is gone again, in a process that is past its start."""
    caught = int(status.get("SigCgt", "0"), 16)
    return int(status.get("Threads", "0")) > 1 and not caught & 1 << signal.SIGINT - 1


def gone(pids: list[int], *, seconds: float) -> bool:
    """Whether none of the processes is left after at most `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(_status(pid) for pid in pids):
        time.sleep(0.02)
    return not any(_status(pid) for pid in pids)


def _status(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    status = dict(line.split(":\t", 1) for line in lines)
    return {} if status["State"].startswith("Z") else status


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in task.read_text().split()]
    workers = []
    for child in found:
        with contextlib.suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                workers.append(child)
    return workers
