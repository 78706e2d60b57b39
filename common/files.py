"""Files: written whole or not at all, locked while somebody fills them; JSON, CSV and SHA-256."""

import contextlib
import csv
import dataclasses
import glob
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from common.errors import UserError


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """`value` with paths as strings, numbers of NumPy and JAX as Python's, and non-finite floats as JSON can hold them,
    recursively."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if getattr(value, "shape", None) == ():
        value = value.item()
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
        temporary.write_text(f"{sha256(content)}  {path.name}\n", encoding="utf-8", errors="surrogateescape")


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes dictionaries as a CSV file, atomically."""
    with (
        atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
