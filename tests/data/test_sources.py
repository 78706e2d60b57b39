"""Where datasets come from: the order of the sources, and downloads from hosts that fail in every way.

The hosts are local HTTP servers. Nothing but a complete, verified file may ever stand under a dataset's name.
"""

import errno
import hashlib
import http.client
import http.server
import io
import itertools
import os
import random
import signal
import ssl
import subprocess
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from common.data import download
from common.data.names import validation_path
from common.errors import UserError
from common.files import sha256
from tests.helpers import contents, tiny_dataset

ROOT = Path(__file__).parents[2]


class Host:
    """An HTTP server. Each request is answered by the next of `faults`, then as a good host does."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.faults: deque[Callable[[http.server.BaseHTTPRequestHandler, bytes], None]] = deque()
        self.requests: list[tuple[str, str]] = []
        self.etag = '"1"'
        self.rate: float | None = None  # bytes per second
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                host.requests.append((name, self.headers.get("Range", "")))
                content = host.files.get(name)
                try:
                    if host.faults:
                        host.faults.popleft()(self, content)
                    elif content is None:
                        self.send_error(404)
                    else:
                        host.good(self, content)
                except (BrokenPipeError, ConnectionResetError):
                    pass

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def good(self, request, content: bytes, *, most: int | None = None) -> None:
        """A host that resumes, checks `If-Range`, and optionally hangs up after `most` bytes."""
        asked, start = request.headers.get("Range"), 0
        if asked and request.headers.get("If-Range") in (None, self.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(content) - start))
        request.send_header("ETag", self.etag)
        request.end_headers()
        body = content[start:]
        body = body if most is None else body[:most]
        if self.rate is None:
            request.wfile.write(body)
            return
        pause = 4096 / self.rate
        for i in range(0, len(body), 4096):
            request.wfile.write(body[i : i + 4096])
            time.sleep(pause)

    def cut(self, after: int) -> None:
        """The next answer ends after so many bytes."""
        self.faults.append(lambda request, content: self.good(request, content, most=after))

    def status(self, code: int, times: int = 1) -> None:
        self.faults.extend([lambda request, content: request.send_error(code)] * times)

    def plain(self, body: bytes, *, length: bool = True) -> None:
        """The next answer is `body` with status 200, whatever was asked for."""

        def answer(request, content):
            request.send_response(200)
            if length:
                request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)

        self.faults.append(answer)

    def hang(self, seconds: float, times: int = 1) -> None:
        self.faults.extend([lambda request, content: time.sleep(seconds)] * times)


@pytest.fixture
def host() -> Iterator[Host]:
    server = Host()
    yield server
    server.close()


@pytest.fixture
def second() -> Iterator[Host]:
    server = Host()
    yield server
    server.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory without data, no host to download from, and no patience."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("EVOR_DATA_HOSTS", "")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, *hosts: Host) -> None:
    monkeypatch.setenv("EVOR_DATA_HOSTS", " ".join(host.url for host in hosts))


def npz(seed: int = 0, rows: int = 3_000) -> bytes:
    """A dataset file of about 100 kB."""
    rng, buffer = np.random.default_rng(seed), io.BytesIO()
    terminals = np.arange(rows) % 100 == 99
    actions = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    np.savez(buffer, observations=rng.normal(size=(rows, 6)).astype(np.float32), actions=actions, terminals=terminals)
    return buffer.getvalue()


FILE, VALIDATION = npz(0), npz(1, 300)


def fill(host: Host, dataset: str = "scene-play-v0") -> None:
    host.files = {f"{dataset}.npz": FILE, f"{dataset}-val.npz": VALIDATION}


def cache(home: Path) -> Path:
    return home / ".ogbench" / "data"


def visible(folder: Path) -> dict[str, bytes]:
    """Datasets in a folder: what another program would take for one."""
    return {name: content for name, content in contents(folder).items() if name.endswith(".npz") and name[0] != "."}


COMPLETE = {"scene-play-v0.npz": FILE, "scene-play-v0-val.npz": VALIDATION}


# --- The order of the sources ------------------------------------------------------------------------------------


def test_the_users_file_the_published_one_the_collected_one(home: Path):
    folder = cache(home)
    collected = tiny_dataset(folder / "collected" / "cube-single-play-v0-ep7-seed0.npz")
    assert download.find_files("cube-single-play", None, episodes=7) == (collected, "collected")
    tiny_dataset(folder / "cube-single-play-v0-val.npz")  # half of a download
    assert download.find_files("cube-single-play", None, episodes=7) == (collected, "collected")
    official = tiny_dataset(folder / "cube-single-play-v0.npz")
    assert download.find_files("cube-single-play", None, episodes=7) == (official, "ogbench")
    own = tiny_dataset(home / "own.npz")
    assert download.find_files("any name", own, episodes=7) == (own, "file")
    with pytest.raises(UserError, match=r"no dataset file at .*missing\.npz: check the path given to --dataset"):
        download.find_files("cube-single-play", home / "missing.npz", episodes=7)


def test_a_folder_has_the_environments_file_or_one_file_or_many(home: Path):
    folder = home / "folder"
    one = tiny_dataset(folder / "b.npz")
    tiny_dataset(folder / "b-val.npz")
    assert download.find_files("cube-single-play", folder, episodes=None) == (one, "file")
    two = tiny_dataset(folder / "a.npz")
    assert download.find_files("cube-single-play", folder, episodes=None) == (folder, "file")
    assert download.data_files(folder) == [two, one]
    named = tiny_dataset(folder / "cube-single-play-v0.npz")
    assert download.find_files("cube-single-play", folder, episodes=None) == (named, "file")
    (home / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no training files .*check --dataset"):
        download.find_files("my-robot", home / "empty", episodes=None)


def test_a_folder_is_read_whatever_the_case_of_its_endings(home: Path):
    """A file of another kind that would be left out is refused."""
    two, one = tiny_dataset(home / "folder/a.npz"), home / "folder/B.NPZ"
    tiny_dataset(home / "folder/b.npz").rename(one)
    tiny_dataset(home / "folder/b-val.npz").rename(validation_path(one))
    assert validation_path(one).name == "B-val.NPZ"
    assert download.find_files("my-robot", home / "folder", episodes=None) == (home / "folder", "file")
    assert download.data_files(home / "folder") == [one, two]
    (home / "folder/b.HDF5").touch()
    with pytest.raises(UserError, match=r"b\.HDF5 is no \.npz file: pass it to --dataset alone, or keep it outside"):
        download.find_files("my-robot", home / "folder", episodes=None)


def test_what_cannot_be_downloaded_is_collected_and_said_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    calls = []
    monkeypatch.setattr(download, "collect", lambda *args, **kwargs: calls.append((args, kwargs)))
    for episodes, number in ((7, 7), (None, 1000)):
        path, source = download.find_files("cube-double-play", None, episodes=episodes)
        assert source == "collected"
        assert path == cache(home) / "collected" / f"cube-double-play-v0-ep{number}-seed0.npz"
        assert calls.pop() == (("cube-double-play-v0", path), {"episodes": number})
    printed = capsys.readouterr().out
    assert "COLLECTED HERE" in printed and "not the published file" in printed


@pytest.mark.parametrize("env", ["antmaze-large-navigate", "humanoidmaze-medium-stitch", "antsoccer-arena-navigate"])
def test_experts_cannot_be_collected_and_one_sentence_says_what_to_do(home: Path, env: str):
    with pytest.raises(UserError, match=rf"driven by trained experts.*put {env}-v0\.npz and .* there.*--dataset"):
        download.find_files(env, None, episodes=7)


def test_data_that_ogbench_does_not_have_is_a_users_mistake(home: Path):
    with pytest.raises(UserError, match="no data called 'cube-double-navigate': choose among cube-double-play, "):
        download.find_files("cube-double-navigate", None, episodes=7)


# --- Downloads ---------------------------------------------------------------------------------------------------


def test_a_download_brings_both_files_and_records_what_they_are(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    path, source = download.find_files("scene-play", None, episodes=7)
    assert (path, source) == (cache(home) / "scene-play-v0.npz", "ogbench")
    assert visible(cache(home)) == COMPLETE
    for name, content in COMPLETE.items():
        record = (cache(home) / f"{name}.sha256").read_text()
        assert record == f"{hashlib.sha256(content).hexdigest()}  {name}\n"
    assert [name for name, _ in host.requests] == ["scene-play-v0-val.npz", "scene-play-v0.npz"]
    download.find_files("scene-play", None, episodes=7)
    assert len(host.requests) == 2  # nothing is downloaded twice
    leftovers = {name for name in contents(cache(home)) if name.startswith(".")}
    assert leftovers == {f".{name}.lock" for name in COMPLETE}


def test_a_cut_connection_goes_on_where_it_was_cut(home: Path, host: Host, monkeypatch):
    """Fails if a cut file is taken for a whole one, or if it is downloaded from the start."""
    fill(host)
    use(monkeypatch, host)
    for after in (10_000, 25_000, 1):
        host.cut(after)
    host.files["scene-play-v0-val.npz"] = FILE
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == dict.fromkeys(COMPLETE, FILE)
    assert [asked for _, asked in host.requests][:4] == ["", "bytes=10000-", "bytes=35000-", "bytes=35001-"]


def test_an_interrupted_download_is_continued_by_the_next_run(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    host.cut(5_000)
    host.status(404)  # ends the first run
    assert not download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == {}
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert host.requests[2] == ("scene-play-v0-val.npz", "bytes=5000-")


def test_a_host_that_does_not_resume_starts_again(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    host.cut(5_000)
    host.plain(VALIDATION)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE


def test_a_file_that_changed_meanwhile_is_not_glued_together(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    host.cut(5_000)

    def changed(request, content):
        host.etag = '"2"'
        host.good(request, content)

    host.faults.append(changed)
    host.files["scene-play-v0-val.npz"] = VALIDATION
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE


def test_a_host_that_sends_less_than_was_asked_for_is_asked_for_the_rest(home: Path, host: Host, monkeypatch):
    """A range may be answered in parts (RFC 9110): what came stays."""
    fill(host)
    use(monkeypatch, host)
    host.cut(5_000)

    def part(request, content):
        start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        request.send_response(206)
        request.send_header("Content-Range", f"bytes {start}-{start + 99}/{len(content)}")
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(content[start : start + 100])

    host.faults.append(part)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert [asked for _, asked in host.requests][:3] == ["", "bytes=5000-", "bytes=5100-"]


@pytest.mark.parametrize("says_so", [True, False])
def test_a_changed_file_in_the_middle_of_a_download_starts_it_again(home: Path, host: Host, monkeypatch, says_so: bool):
    """From a host that ignores `If-Range`: with another ETag, or without a word, which only the checksums show."""
    fill(host)
    use(monkeypatch, host)
    host.cut(5_000)

    def ignores(request, content):
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 5000-{len(VALIDATION) - 1}/{len(VALIDATION)}")
        request.send_header("Content-Length", str(len(VALIDATION) - 5000))
        request.send_header("ETag", '"2"' if says_so else host.etag)
        request.end_headers()
        request.wfile.write(npz(5, 300)[5000:])

    host.faults.append(ignores)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE


@pytest.mark.parametrize("error", [OSError(113, "No route to host"), ssl.SSLError("bad record")])
def test_network_errors_while_reading_are_no_disk_errors(home: Path, host: Host, second: Host, monkeypatch, error):
    fill(host)
    fill(second)
    use(monkeypatch, host, second)
    read1, calls = http.client.HTTPResponse.read1, []

    def failing(response, *args):
        calls.append(1)
        if len(calls) <= 3:
            raise error
        return read1(response, *args)

    monkeypatch.setattr(http.client.HTTPResponse, "read1", failing)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE and len(host.requests) >= 3 and len(second.requests) == 1


def test_strange_headers_and_leftovers_are_survived(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    cache(home).mkdir(parents=True)
    for name in COMPLETE:
        (cache(home) / f".{name}.origin").write_bytes(b"\xff\xfe\n" * 3)
        (cache(home) / f".{name}.part").write_bytes(b"x" * 10)

    def twice(request, content):
        request.send_response(200)
        request.send_header("Content-Length", f"{len(content)}, {len(content)}")
        request.end_headers()
        request.wfile.write(content)

    host.faults.append(twice)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_no_obstacle(home: Path, host: Host, monkeypatch, number: int):
    """Fails also if a file takes the place of the lock, which filelock warns of: a killed process would leave it."""
    import fcntl

    def refuse(*args):
        raise OSError(number, os.strerror(number))

    fill(host)
    use(monkeypatch, host)
    monkeypatch.setattr(fcntl, "flock", refuse)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE


def test_a_wrong_beginning_is_thrown_away(home: Path, host: Host, monkeypatch):
    """What an earlier run left may be damaged: one more attempt, from the start."""
    fill(host)
    use(monkeypatch, host)
    cache(home).mkdir(parents=True)
    name = "scene-play-v0-val.npz"
    (cache(home) / f".{name}.part").write_bytes(b"x" * 5_000)
    (cache(home) / f".{name}.origin").write_text(f"{host.url}/{name}\n{host.etag}")
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert [asked for _, asked in host.requests] == ["bytes=5000-", "", ""]


def test_a_part_that_is_the_whole_file_is_verified_and_kept(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    cache(home).mkdir(parents=True)
    name = "scene-play-v0-val.npz"
    (cache(home) / f".{name}.part").write_bytes(VALIDATION)
    (cache(home) / f".{name}.origin").write_text(f"{host.url}/{name}\n{host.etag}")
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert host.requests[0] == (name, f"bytes={len(VALIDATION)}-") and host.requests[1][0] == "scene-play-v0.npz"


def test_a_part_from_another_host_is_not_continued(home: Path, host: Host, second: Host, monkeypatch):
    fill(second)
    use(monkeypatch, host, second)
    host.files = dict(COMPLETE)
    host.cut(5_000)
    host.status(404)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert second.requests == [("scene-play-v0-val.npz", "")]


@pytest.mark.parametrize("code", [404, 403, 410])
def test_the_mirror_has_what_the_host_has_not(home: Path, host: Host, second: Host, monkeypatch, capsys, code: int):
    host.status(code, times=2)
    fill(second)
    use(monkeypatch, host, second)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert len(host.requests) == 2 and f"HTTP {code}" in capsys.readouterr().out


def test_a_host_in_trouble_is_asked_again_but_not_for_ever(home: Path, host: Host, second: Host, monkeypatch):
    fill(host)
    fill(second)
    use(monkeypatch, host, second)
    host.status(503, times=2)
    assert download.download("scene-play-v0", timeout=5.0)
    assert not second.requests
    assert [name for name, _ in host.requests] == ["scene-play-v0-val.npz"] * 3 + ["scene-play-v0.npz"]

    for name in COMPLETE:
        (cache(home) / name).unlink()
    host.requests.clear()
    host.status(500, times=99)
    assert download.download("scene-play-v0", timeout=5.0)
    assert len(host.requests) == 6 and len(second.requests) == 2


def test_wrong_bytes_are_refused_and_the_mirror_is_asked(home: Path, host: Host, second: Host, monkeypatch, capsys):
    """The checksum is known: another intact archive is not this dataset."""
    checksums = {name: hashlib.sha256(content).hexdigest() for name, content in COMPLETE.items()}
    monkeypatch.setattr(download, "CHECKSUMS", checksums)
    fill(second)
    host.files = dict.fromkeys(COMPLETE, npz(7))
    use(monkeypatch, host, second)
    assert download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == COMPLETE
    assert "SHA-256" in capsys.readouterr().out
    assert len(host.requests) == 2  # asking again would bring the same


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>moved</html>" * 500, FILE[:-2_000], FILE[:5_000] + b"\x00" * 2_000 + FILE[7_000:]],
    ids=["nothing", "a page", "a truncated archive", "a damaged archive"],
)
@pytest.mark.parametrize("length", [True, False])
def test_what_is_no_intact_archive_never_gets_the_name(home: Path, host: Host, monkeypatch, body: bytes, length: bool):
    """Where no checksum is known. Without a length even a truncated file looks complete to HTTP."""
    use(monkeypatch, host)
    host.plain(body, length=length)
    assert not download.download("scene-play-v0", timeout=5.0)
    assert visible(cache(home)) == {} and not list(cache(home).glob("*.sha256"))


def test_an_archive_without_the_arrays_is_refused(home: Path, host: Host, monkeypatch, capsys):
    buffer = io.BytesIO()
    np.savez(buffer, observations=np.zeros((3, 2)), actions=np.zeros((3, 2)))
    use(monkeypatch, host)
    host.files = dict.fromkeys(COMPLETE, buffer.getvalue())
    assert not download.download("scene-play-v0", timeout=5.0)
    assert "terminals" in capsys.readouterr().out and visible(cache(home)) == {}


def test_a_silent_host_is_left_after_its_timeouts(home: Path, host: Host, second: Host, monkeypatch):
    fill(second)
    use(monkeypatch, host, second)
    host.hang(1.0, times=99)
    assert download.download("scene-play-v0", timeout=0.1)
    assert visible(cache(home)) == COMPLETE
    assert len(host.requests) == 6  # three attempts for each file


def test_a_trickling_host_is_as_good_as_silent(home: Path, host: Host, second: Host, monkeypatch):
    """Each byte comes within the timeout, and all of them would take for ever."""

    def trickle(request, content):
        request.send_response(200)
        request.send_header("Content-Length", "1000000")
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b"x")
            time.sleep(0.02)

    fill(second)
    use(monkeypatch, host, second)
    host.faults.extend([trickle] * 99)
    assert download.download("scene-play-v0", timeout=0.1)
    assert visible(cache(home)) == COMPLETE


@pytest.mark.parametrize(("piece", "seconds"), [(2_000, 10.0), (100, 0.0)], ids=["slow", "cuts"])
def test_a_host_that_resumes_at_a_trickle_is_left(
    home: Path, host: Host, second: Host, monkeypatch, piece: int, seconds: float
):
    """Each connection brings a piece of the file: late, or at once, but then the pause takes the time. Fails if any
    byte counts as progress: a file of 300 MB would take days, and the second host would never be asked."""
    fill(host)
    fill(second)
    use(monkeypatch, host, second)
    passed = itertools.count(0.0, seconds)
    clock = types.SimpleNamespace(monotonic=lambda: next(passed), sleep=lambda seconds: None)
    monkeypatch.setattr(download, "time", clock)
    monkeypatch.setattr(download, "PAUSE", 1.0)
    for _ in range(2_000):
        host.cut(after=piece)
    assert download.download("scene-play-v0", timeout=15.0)
    assert visible(cache(home)) == COMPLETE
    assert len(host.requests) == 6  # three attempts for each file


def test_a_host_that_cuts_often_and_is_fast_is_kept(home: Path, host: Host, second: Host, monkeypatch):
    """Five pieces of 20 kB and more in a second each: fails if a number of cuts is too many."""
    fill(host)
    use(monkeypatch, host, second)
    clock = types.SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda seconds: None)
    monkeypatch.setattr(download, "time", clock)
    monkeypatch.setattr(download, "PAUSE", 1.0)
    for _ in range(5):
        host.cut(after=20_000)
    assert download.download("scene-play-v0", timeout=15.0)
    assert visible(cache(home)) == COMPLETE and not second.requests


def test_no_network_is_found_out_at_once(home: Path, host: Host, monkeypatch, capsys):
    """A refused connection is not tried again: fails if it is, by the length of the pauses."""
    monkeypatch.setattr(download, "PAUSE", 1e6)
    use(monkeypatch, host)
    host.close()
    monkeypatch.setattr(host, "close", lambda: None)
    assert not download.download("scene-play-v0", timeout=5.0)
    assert "refused" in capsys.readouterr().out


def test_a_full_disk_is_said_before_it_is_full(home: Path, host: Host, monkeypatch, capsys):
    fill(host)
    use(monkeypatch, host)
    usage = download.shutil.disk_usage(home)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert not download.download("scene-play-v0", timeout=5.0)
    assert f"it takes {len(VALIDATION):,} bytes, and 10 are free" in capsys.readouterr().out
    assert visible(cache(home)) == {}


def test_two_at_once_download_once(home: Path, host: Host, monkeypatch):
    fill(host)
    use(monkeypatch, host)
    host.rate = 1e6
    found = []
    threads = [threading.Thread(target=lambda: found.append(download.download("scene-play-v0"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True, True] and visible(cache(home)) == COMPLETE
    assert sorted(name for name, _ in host.requests) == sorted(COMPLETE)


KILLED = """
import os, time
from common.data import download

def slowly(function):
    def call(*arguments):
        time.sleep(0.05)
        result = function(*arguments)
        time.sleep(0.05)
        return result
    return call

download.damage, download.record_sha256 = slowly(download.damage), slowly(download.record_sha256)
download.os.replace = slowly(os.replace)
print("ready", flush=True)
download.download("scene-play-v0")
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_nothing_half(home: Path, host: Host, monkeypatch):
    """At least twenty processes are killed while they download; then one may finish.

    Fails if a file ever stands under its final name that is not the whole of it, or if the pieces do not add up.
    """
    fill(host)
    host.rate = 4e5  # a quarter of a second for both
    use(monkeypatch, host)
    rng, kills, states = random.Random(0), 0, set()
    while kills < 24:
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdout.readline()
        try:
            process.wait(rng.uniform(0.0, 0.9))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        process.stdout.close()
        for name, content in visible(cache(home)).items():
            assert content == COMPLETE[name], name
        parts = {p.name: p.stat().st_size for p in cache(home).glob(".*.part")}
        whole = any(parts.get(f".{name}.part") == len(content) for name, content in COMPLETE.items())
        states.add((len(visible(cache(home))), bool(parts), whole))
        if visible(cache(home)) == COMPLETE:
            for path in cache(home).iterdir():
                path.unlink()
    assert any(asked for _, asked in host.requests)  # the pieces were put together
    # Killed with one file in place and the other on its way, and with one whole but not yet verified or renamed.
    assert {(1, True), (0, True)} <= {state[:2] for state in states} and any(state[2] for state in states), states
    host.rate = None
    assert download.download("scene-play-v0")
    assert visible(cache(home)) == COMPLETE


def test_an_unwritable_cache_is_said(home: Path, host: Host, monkeypatch, capsys):
    fill(host)
    use(monkeypatch, host)
    (home / ".ogbench").write_text("a file where the folder should be")
    assert not download.download("scene-play-v0", timeout=5.0)
    assert "no download of scene-play-v0-val.npz into" in capsys.readouterr().out


# --- What a file was on first use --------------------------------------------------------------------------------


def test_describe_holds_the_hash_of_the_file(tmp_path: Path):
    (tmp_path / "abc.npz").write_bytes(b"abc")
    assert download.describe(tmp_path / "abc.npz", "file") == {
        "name": "abc.npz",
        "source": "file",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert contents(tmp_path) == {"abc.npz": b"abc"}  # nothing is written beside a file of the user's


def test_describe_tells_folders_apart(tmp_path: Path):
    tiny_dataset(tmp_path / "one" / "a.npz")
    tiny_dataset(tmp_path / "one" / "b.npz", trajectories=5)
    found = download.describe(tmp_path / "one", "file")
    assert (found["name"], found["source"], len(found["sha256"])) == ("one", "file", 64)
    tiny_dataset(tmp_path / "one" / "b.npz", trajectories=5, seed=1)  # of the same size
    assert download.describe(tmp_path / "one", "file")["sha256"] != found["sha256"]


def test_a_damaged_file_in_a_folder_is_a_users_mistake(tmp_path: Path):
    tiny_dataset(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_text("no archive")
    with pytest.raises(UserError, match=r"b\.npz cannot be read .*remove it from the folder"):
        download.describe(tmp_path, "file")


@pytest.mark.parametrize("source", ["ogbench", "collected"])
def test_a_file_that_changed_since_its_first_use_is_refused(tmp_path: Path, source: str):
    path = tiny_dataset(tmp_path / "data.npz")
    first = download.describe(path, source)
    assert (tmp_path / "data.npz.sha256").read_text() == f"{first['sha256']}  data.npz\n"
    assert download.describe(path, source) == first
    tiny_dataset(tmp_path / "data-val.npz", seed=2)
    assert download.describe(path, source) == first
    tiny_dataset(tmp_path / "data-val.npz", seed=3)
    with pytest.raises(UserError, match=r"data-val\.npz has the SHA-256 .*was expected.*delete it"):
        download.describe(path, source)
    tiny_dataset(path, seed=1)
    with pytest.raises(UserError, match=r"data\.npz has the SHA-256 .*was expected.*delete it and data\.npz\.sha256"):
        download.describe(path, source)


def test_half_a_file_is_not_recorded_as_what_it_should_be(tmp_path: Path):
    """A copy that is still under way: what comes of it later must not be refused for what it was then."""
    path = tiny_dataset(tmp_path / "data.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data\.npz is damaged, it is no intact \.npz file"):
        download.describe(path, "ogbench")
    assert not (tmp_path / "data.npz.sha256").exists()
    path.write_bytes(whole)
    assert download.describe(path, "ogbench")["sha256"] == sha256(path)


def test_a_published_file_is_compared_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tiny_dataset(tmp_path / "data.npz")
    monkeypatch.setattr(download, "CHECKSUMS", {"data.npz": "0" * 64})
    with pytest.raises(UserError, match=r"000000000000\.\.\. was expected"):
        download.describe(path, "ogbench")
    assert download.describe(path, "file")["sha256"] == sha256(path)


def test_a_read_only_cache_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tiny_dataset(tmp_path / "data.npz")

    def refuse(content, path):
        raise PermissionError("read-only")

    monkeypatch.setattr(download, "record_sha256", refuse)
    assert download.describe(path, "collected")["sha256"] == sha256(path)


def test_checksums_are_of_pairs_of_files():
    """Both files of a dataset, each with 64 hexadecimal digits, none twice."""
    names = set(download.CHECKSUMS)
    assert names == {n.replace("-val", "") for n in names} | {n for n in names if n.endswith("-val.npz")}
    assert {n.replace("-v0.npz", "-v0-val.npz") for n in names if "-val" not in n} < names
    assert all(len(value) == 64 and int(value, 16) for value in download.CHECKSUMS.values())
    assert len(set(download.CHECKSUMS.values())) == len(names)


def test_hosts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("EVOR_DATA_HOSTS", raising=False)
    assert download.hosts() == download.HOSTS and all(host.startswith("https://") for host in download.HOSTS)
    monkeypatch.setenv("EVOR_DATA_HOSTS", "http://a/b http://c")
    assert download.hosts() == ["http://a/b", "http://c"]
    monkeypatch.setenv("EVOR_DATA_HOSTS", "mirror.local/data")
    with pytest.raises(UserError, match=r"'mirror\.local/data': write http:// or https:// before it"):
        download.hosts()
