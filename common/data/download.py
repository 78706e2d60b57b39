"""Where a dataset comes from, and that it is what it should be.

In this order: the user's file or folder, OGBench's cache, data collected before, a download from OGBench's host, from
the mirror, collection. Nothing but a complete, verified file ever stands under a dataset's name: a download grows under
a hidden name, survives a cut connection or a killed process, goes on where it stopped, and is renamed when its size and
its SHA-256 are right. Checksums come from the table below; where that has none, the file has to be an intact archive,
and what it was on first use is recorded beside it (`NAME.npz.sha256`, for `sha256sum -c`) and compared from then on.
"""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.data.collect import collect, recipe_of, why_not_collectable
from common.data.files import KNOWN
from common.data.foreign import converted, is_foreign, is_minari
from common.data.names import check_env, collected_path, data_dir, parse_env, validation_path
from common.data.opening import HDF5, unreadable, unused
from common.errors import UserError
from common.files import locked, read_json, record_sha256, sha256, sha256_path
from common.progress import progress

HOSTS = (
    "https://rail.eecs.berkeley.edu/datasets/ogbench",
    "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main",  # named by OGBench's author, ogbench#49
)
"""Tried in this order; the environment variable EVOR_DATA_HOSTS (URLs, separated by spaces) replaces them."""

# OGBench publishes no checksums. These are what several public reports on GitHub say of its files: of antmaze-large and
# cube-double downloaded from OGBench's own host, of cube-single from a mirror on Hugging Face.
CHECKSUMS = {
    "antmaze-large-navigate-v0.npz": "2dbe946ac107ca5ac524f82f7a72efa951ceab0be915201d6b32e612d823f2e7",
    "antmaze-large-navigate-v0-val.npz": "e9a4126825faefb57c34c29f1ee423858dbc4b6f71d9a9846a8b8bdb908b44a1",
    "cube-double-play-v0.npz": "a73d1a33d029cedb8bc170ef94791ec585fa2d9450096f4f2a02b8cfbcf608c9",
    "cube-double-play-v0-val.npz": "b1fcdf4bd40750351a58d0d491d6be198366ce898f0c6a2e4cb5db331966013e",
    "cube-single-play-v0.npz": "80f3b6fd27f4f9d9e9eb6f0d07d6951559012f45b1e15ea4046ef8ecd8d3684e",
    "cube-single-play-v0-val.npz": "96d07401bdebdc3f0ea6d56ed1333863e0962f441483adc2c43b83105046eb00",
}
PAUSE = 1.0  # seconds before the second attempt
LOWEST_RATE = 1_000  # bytes per second: a host slower than that, in a timeout or an attempt, is as good as silent


class Unavailable(Exception):
    """A host does not give a file; the message says why."""


# --- Choosing ----------------------------------------------------------------------------------------------------


def find_files(env: str, dataset: Path | None, *, episodes: int | None) -> tuple[Path, str]:
    """The training file, or a folder of several, and its source: `file` (the user's), `minari`, `d4rl`, `ogbench`
    or `collected`.

    Args:
        episodes: how many to collect, if it comes to that; OGBench's own number by default.

    Raises:
        UserError: there is none, and none can be made.
    """
    if dataset is not None and is_foreign(dataset):
        return converted(dataset, env), "minari" if is_minari(dataset) else "d4rl"
    if dataset is not None:
        path = own_file(env, dataset)
        for line in unused(data_files(path)[0], KNOWN):
            print(line, flush=True)
        return path, "file"
    name = parse_env(env)
    check_env(name)
    official = data_dir() / f"{name.dataset}.npz"
    if official.is_file():  # a download brings its validation file first
        return official, "ogbench"
    recipe = recipe_of(name.dataset)
    episodes = recipe.episodes if episodes is None and recipe is not None else episodes
    collected = collected_path(name.dataset, episodes or 0)
    if collected.is_file():
        return collected, "collected"
    if download(name.dataset):
        return official, "ogbench"
    if recipe is None:
        raise UserError(
            f"{name.dataset} is not in {data_dir()} and cannot be downloaded, and {why_not_collectable(name.dataset)}: "
            f"put {name.dataset}.npz and {name.dataset}-val.npz there, or pass --dataset FILE."
        )
    banner = "!" * 100
    print(
        f"{banner}\n{name.dataset} cannot be downloaded, so it is COLLECTED HERE with OGBench's scripted behaviour: "
        f"{episodes} episodes.\nIt is not the published file. Results made with it say so.\n{banner}",
        flush=True,
    )
    collect(name.dataset, collected, episodes=episodes)
    return collected, "collected"


def own_file(env: str, dataset: Path) -> Path:
    """What `--dataset` names: a file; a folder with the environment's file, or with one file; a folder of many."""
    if dataset.is_file():
        return dataset
    if not dataset.is_dir():
        raise UserError(f"there is no dataset file at {dataset}: check the path given to --dataset.")
    with contextlib.suppress(UserError):
        named = dataset / f"{parse_env(env).dataset}.npz"
        if named.is_file():
            return named
    files = data_files(dataset)
    return files[0] if len(files) == 1 else dataset


def data_files(path: Path) -> list[Path]:
    """The training files of a dataset: itself, or, of a folder, all `.npz` but the `-val.npz`, in order of their names.

    Raises:
        UserError: the folder has none, or others too.
    """
    if path.is_file():
        return [path]
    seen = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    for other in (p for p in seen if p.suffix.lower() in HDF5):
        raise UserError(f"{other} is no .npz file: pass it to --dataset alone, or keep it outside the folder.")
    files = [p for p in seen if p.suffix.lower() == ".npz" and not p.stem.endswith("-val")]
    if not files:
        raise UserError(f"the folder {path} has no training files (*.npz, without *-val.npz): check --dataset.")
    return files


# --- Downloading -------------------------------------------------------------------------------------------------


def hosts() -> Sequence[str]:
    """Where datasets are downloaded from, best first.

    Raises:
        UserError: an address without http:// or https://.
    """
    own = os.environ.get("EVOR_DATA_HOSTS")
    if own is None:
        return HOSTS
    for host in own.split():
        if not host.startswith(("http://", "https://")):
            raise UserError(f"EVOR_DATA_HOSTS has {host!r}: write http:// or https:// before it.")
    return own.split()


def download(dataset: str, *, timeout: float = 20.0) -> bool:
    """Downloads both files of a dataset into OGBench's cache; False, with the reasons printed, if no host has them.

    The validation file comes first: where the training file stands, the other one stands too.
    """
    names = f"{dataset}-val.npz", f"{dataset}.npz"
    return bool(hosts()) and all(_download_file(name, timeout) for name in names)


def _download_file(name: str, timeout: float) -> bool:
    path = data_dir() / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{name}.lock")):
            for host in hosts():
                if path.is_file():  # it stood there before, or another process has downloaded it meanwhile
                    return True
                print(f"asking {host} for {name}", flush=True)
                try:
                    fetch(f"{host.rstrip('/')}/{name}", path, timeout=timeout)
                except Unavailable as error:
                    print(f"no download of {name} from {host}: {error}", flush=True)
    except OSError as error:
        print(f"no download of {name} into {path.parent}: {error}", flush=True)
    return path.is_file()


class Partial(NamedTuple):
    """A download on its way: its bytes, and what they are the beginning of (the address and the host's validator)."""

    data: Path
    origin: Path

    def clear(self) -> None:
        self.data.unlink(missing_ok=True)
        self.origin.unlink(missing_ok=True)

    def size(self) -> int:
        return self.data.stat().st_size if self.data.is_file() else 0

    def validator(self, url: str) -> str:
        """What the host called the file, if it is from `url`; else nothing."""
        lines = self.origin.read_text(encoding="utf-8", errors="replace").split("\n") if self.origin.is_file() else []
        return lines[1] if len(lines) == 2 and lines[0] == url else ""


class Cut(Exception):
    """A connection ended before the file did; what came stays."""


def fetch(url: str, path: Path, *, timeout: float, patience: int = 3) -> None:
    """Downloads `url` to `path`, from where an earlier attempt stopped, and verifies it.

    Args:
        timeout: seconds without an answer, or at less than `LOWEST_RATE`, after which a connection counts as cut.
        patience: attempts in a row that may bring less than `LOWEST_RATE`; the pause doubles with each.

    Raises:
        Unavailable: the host does not have the file, keeps failing, or has another file under that name.
        OSError: the file cannot be written.
    """
    partial = Partial(path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.origin"))
    pieces, failures = int(partial.size() > 0), 0
    while True:
        before, began = partial.size(), time.monotonic()
        try:
            _transfer(url, partial, timeout)
        except Cut as error:
            gained, seconds = partial.size() - before, time.monotonic() - began + PAUSE
            pieces += gained > 0
            failures = 1 if gained >= LOWEST_RATE * seconds else failures + 1
            if failures >= patience:
                raise Unavailable(f"{error} ({partial.size():,} bytes are kept)") from None
            time.sleep(PAUSE * 2 ** (failures - 1))
            continue
        problem = damage(partial.data, path.name)
        if problem is None:
            break
        partial.clear()
        if pieces == 0:
            raise Unavailable(problem)
        pieces = 0  # they may have been of different files: once more, in one piece
    record_sha256(partial.data, path)
    os.replace(partial.data, path)
    partial.clear()


def _transfer(url: str, partial: Partial, timeout: float) -> None:
    """One connection: appends what is missing to `partial`. Returns at the end of the file.

    Raises:
        Cut: the connection failed; trying again may help.
        Unavailable: trying again will not help.
    """
    start, validator = partial.size(), partial.validator(url)
    headers = {"User-Agent": "evor-jax"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    else:
        start = 0
    response = _open(urllib.request.Request(url, headers=headers), timeout)
    if response is None:  # status 416: nothing is left to send, or the file is shorter than what is here
        return
    with response:
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", "").strip())
        same = response.headers.get("ETag" if validator.startswith('"') else "Last-Modified", validator) == validator
        if response.status == 206 and (span is None or int(span[1]) != start or not same):
            partial.clear()
            raise Cut("the host sent another part than was asked for")
        if response.status == 206:
            total: int | None = int(span[3])
        else:
            start = 0
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
        free = shutil.disk_usage(partial.data.parent).free
        if total is not None and total - start > free:
            raise Unavailable(f"it takes {total - start:,} bytes, and {free:,} are free in {partial.data.parent}")
        if start == 0:
            partial.clear()
            etag = response.headers.get("ETag", "")  # a weak one does not promise the same bytes
            validator = etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
            partial.origin.write_text(f"{url}\n{validator}", encoding="utf-8")
        _copy(response, partial.data, start=start, total=total, timeout=timeout, name=url.rpartition("/")[2])


def _open(request: urllib.request.Request, timeout: float) -> http.client.HTTPResponse | None:
    """The response; None where there is nothing left to send."""
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            return None
        reason = f"HTTP {error.code} {error.reason}"
        if error.code in (408, 425, 429) or error.code >= 500:
            raise Cut(reason) from None
        raise Unavailable(reason) from None
    except urllib.error.URLError as error:  # no connection: no network, no such host, nobody listens
        raise Unavailable(str(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        raise Cut(str(error) or repr(error)) from None
    except ValueError as error:
        raise Unavailable(str(error)) from None


def _copy(
    response: http.client.HTTPResponse, path: Path, *, start: int, total: int | None, timeout: float, name: str
) -> None:
    """Appends a response to a file, with a progress bar."""
    with (
        open(path, "ab") as file,
        progress(desc=name, initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024) as bar,
    ):
        began, received = time.monotonic(), 0
        while True:
            try:
                block = response.read1(1 << 18)
            except (OSError, http.client.HTTPException) as error:
                raise Cut(str(error) or repr(error)) from None
            if not block:
                break
            file.write(block)
            bar.update(len(block))
            received += len(block)
            if (passed := time.monotonic() - began) > timeout:
                if received < LOWEST_RATE * passed:
                    raise Cut(f"slower than {LOWEST_RATE:,} bytes per second")
                began, received = time.monotonic(), 0
        file.flush()
        os.fsync(file.fileno())
        if total is not None and file.tell() < total:
            raise Cut(f"cut after {file.tell():,} of {total:,} bytes")


# --- Verifying ---------------------------------------------------------------------------------------------------


def damage(path: Path, name: str) -> str | None:
    """What is wrong with a file that should be the dataset file `name`; None if nothing is."""
    if name in CHECKSUMS:
        digest = sha256(path)
        return None if digest == CHECKSUMS[name] else f"its SHA-256 is {digest}, and {CHECKSUMS[name]} was expected"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            names = set(archive.namelist())
    except Exception as error:  # a damaged archive raises a dozen types
        return f"it is no intact .npz file ({error})"
    if broken is not None:
        return f"{broken} in it is damaged"
    missing = {"observations.npy", "actions.npy", "terminals.npy"} - names
    return f"it has no {min(missing)}" if missing else None


def fingerprint(path: Path) -> str:
    """SHA-256 of the names, sizes and checksums of the arrays in an `.npz` file; it takes no time.

    Raises:
        UserError: it is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted((info.filename, info.file_size, info.CRC) for info in archive.infolist())
    except Exception as error:  # a damaged archive raises a dozen types
        raise unreadable(str(path), error, "make or fetch it anew, or remove it from the folder") from None
    return hashlib.sha256(repr(members).encode()).hexdigest()


def describe(path: Path, source: str) -> dict[str, Any]:
    """Provenance of a dataset, for headers, configurations and result tables. Of a folder, `sha256` is that of the
    `fingerprint`s of its files.

    Raises:
        UserError: a published or collected file, or the validation file beside it, is damaged, or not what it was on
            first use.
    """
    if path.is_dir():
        listed = "\n".join(f"{file.name} {fingerprint(file)}" for file in data_files(path))
        return {"name": path.resolve().name, "source": source, "sha256": hashlib.sha256(listed.encode()).hexdigest()}
    if source != "file":
        for file in (path, validation_path(path)):
            if file.is_file():
                _compare_with_first_use(file, source)
    info = {"name": path.name, "source": source, "sha256": sha256(path)}
    about = read_json(path.with_suffix(".json")) if source in ("minari", "d4rl") else None
    if about is None:
        return info
    kept = {key: about[key] for key in ("reference", "settings") if about.get(key)}
    return info | {"converted_from": about["name"]} | kept


def _compare_with_first_use(path: Path, source: str) -> None:
    digest, record = sha256(path), sha256_path(path)
    expected = CHECKSUMS.get(path.name) if source == "ogbench" else None
    if expected is None and record.is_file():
        expected = (re.findall(r"^[0-9a-f]{64}", record.read_text(encoding="utf-8", errors="replace")) or [None])[0]
    if expected is not None and digest != expected:
        raise UserError(
            f"{path} has the SHA-256 {digest[:12]}..., and {expected[:12]}... was expected: it was changed or damaged; "
            f"delete it and {record.name}, and it will be fetched anew."
        )
    if record.is_file():
        return
    problem = damage(path, path.name)
    if problem is not None:
        raise UserError(f"{path} is damaged, {problem}: delete it, and it will be fetched anew.")
    with contextlib.suppress(OSError):  # a cache that others share may be read-only
        record_sha256(path, path)
