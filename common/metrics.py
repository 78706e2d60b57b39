"""What a run leaves behind as plain files: `config.json` and `metrics.csv` (and, with `--track`, a W&B run)."""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from common.errors import UserError

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "diffrax", "ogbench", "gymnasium", "mujoco", "numpy", "scipy")
FIELDS = ("stage", "env", "task", "seed", "step", "metric", "value")
CALIBRATED = ("bias", "crps")  # of predictions, logged with each evaluation
EVALUATED = ("success", *CALIBRATED)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str:
    """The commit of this code, with `-dirty` where files differ from it; `unknown` outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """`value` with paths as strings and non-finite floats as JSON can hold them, recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `path` at the end, or removed if writing fails: no reader ever sees half
    a file. What a process that was killed left half written under this name is removed, if it was one of this machine
    and ten minutes ago (containers may share a host name and not their processes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    here = f".{platform.node()}."
    for left in path.parent.glob(f"{glob.escape(here)}*.{glob.escape(path.name)}"):
        number = left.name.removeprefix(here).removesuffix(f".{path.name}")
        with contextlib.suppress(OSError, OverflowError):  # the latter: no number of a process at all
            if number.isdecimal() and left.stat().st_mtime < time.time() - 600 and not psutil.pid_exists(int(number)):
                left.unlink()
    temporary = path.with_name(f"{here}{os.getpid()}.{path.name}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno is not None:  # a full disk does not say which file it has no room for
            error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_directory(path: Path) -> None:
    """Makes a renaming last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_path(path: Path) -> Path:
    """Where the SHA-256 of the file `path` is recorded: `NAME.sha256` beside it, in the format of `sha256sum`."""
    return path.with_name(f"{path.name}.sha256")


def record_sha256(content: Path, path: Path) -> None:
    """Records the SHA-256 of the file `content`, which stands or will stand under `path`."""
    with atomic(sha256_path(path)) as temporary:
        temporary.write_text(f"{sha256(content)}  {path.name}\n")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets in one process at a time; a killed process lets go. Where the file system has no locks, everybody is let in:
    what they write is renamed when it is complete."""
    lock = FileLock(path, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            try:
                stack.enter_context(lock.acquire(blocking=False))
            except Timeout:
                print(f"waiting for another process, which has locked {path}", flush=True)
                stack.enter_context(lock.acquire())
        yield


def hold(path: Path) -> BaseFileLock | None:
    """Locks the file `path`, which it makes, for this process; None if another one has it. Where the file system has no
    locks, everybody gets it. It is let go when nothing refers to the lock any more, or the process ends."""
    path.touch()
    lock = FileLock(path, is_singleton=True, thread_local=False, fallback_to_soft=False)
    with contextlib.suppress(OSError):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return None
    return lock


def hold_directory(directory: Path, flag: str) -> BaseFileLock:
    """Makes `directory` and locks it for this process, which is going to fill it; `flag` names it on the command line.

    Raises:
        UserError: another process is filling it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mine = hold(directory / ".lock")
    if mine is None:
        raise UserError(f"another process is writing to {directory}: wait for it, or pass another {flag}.")
    return mine


def read_json(path: Path) -> Any:
    """What `path` holds; None if it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2) + "\n")


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


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes dictionaries as a CSV file, atomically."""
    with atomic(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


def start_tracking(project: str, name: str, config: Mapping[str, Any], *, directory: Path | None = None) -> Any:
    """A Weights & Biases run; the package is imported here and nowhere else.

    Args:
        directory: that of the run, where `tracking.json` keeps the id: a run that goes on here is one run there, too.

    Raises:
        UserError: `wandb` is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("--track needs Weights & Biases: install it with `pip install wandb`.") from None
    settings = dict(project=project, name=name, config=plain(config), reinit="finish_previous")
    if directory is None:
        return wandb.init(**settings)
    kept = read_json(directory / "tracking.json") or {"id": secrets.token_hex(8)}
    write_json(directory / "tracking.json", kept)
    return wandb.init(**settings, id=kept["id"], resume="allow")
