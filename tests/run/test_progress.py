"""What a run of hours leaves of its progress: in a file, a line now and then."""

import re
from pathlib import Path

import pytest
from tqdm import std

from common import progress


class Clock:
    """Seconds that pass when they are told to; `progress` and tqdm look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1_000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(std, "time", lambda: self.now)
        monkeypatch.setattr(progress._Lines, "latest", self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_file_gets_at_most_one_line_in_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture):
    """100 seconds, eight steps in each, with numbers that are set anew at each step. Fails if tqdm's carriage returns
    reach the file."""
    with progress.progress(total=800, desc="value", unit="step") as bar:
        for step in range(800):
            clock.now += 0.125
            bar.update(1)
            bar.set_postfix(loss=f"{step + 1}")
    said = capsys.readouterr().err
    assert said.endswith("\n") and not set("\r\x1b") & set(said)
    assert re.findall(r"(\d+)/800", said) == [str(step) for step in range(80, 801, 80)]
    assert all(line.startswith("value: ") for line in said.splitlines()) and said.count("\n") == 10


def test_the_lines_of_nested_bars_share_the_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture):
    """A training of 60 seconds with six evaluations in it. Fails if each of them gets lines of its own."""
    with progress.progress(total=6, desc="value") as outer:
        for _ in range(6):
            with progress.progress(total=100, desc="evaluating") as inner:
                for _ in range(100):
                    clock.now += 0.1
                    inner.update(1)
            outer.update(1)
    said = capsys.readouterr().err
    assert len(said.splitlines()) in (5, 6) and not set("\r\x1b") & set(said)
    assert all(re.match("(value|evaluating): ", line) for line in said.splitlines())


def test_lines_are_bars_and_nothing_else(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Fails if what moves a terminal's cursor between nested bars makes lines."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.progress(total=2, desc="value"), progress.progress(total=2, desc="evaluating") as inner:
        inner.update(1)
        inner.set_postfix(policy="50%")
    said = capsys.readouterr().err
    assert "policy" in said and all(re.match("(value|evaluating): ", line) for line in said.splitlines())


def test_what_takes_less_than_ten_seconds_leaves_nothing(clock: Clock, capsys: pytest.CaptureFixture):
    with progress.progress(total=9) as bar:
        for _ in range(9):
            clock.now += 1.0
            bar.update(1)
    assert capsys.readouterr().err == ""


def test_all_bars_are_of_this_kind():
    """Fails if a script shows a bar of tqdm's own, which fills a file."""
    root = Path(progress.__file__).parent.parent
    folders = "common", "baselines", "benchmarks", "experiments", "examples"
    files = [*root.glob("*.py"), *(path for name in folders for path in (root / name).rglob("*.py"))]
    assert len(files) > 40  # the whole code, and nothing of a virtual environment beside it
    assert [path.name for path in files if re.search(r"\btqdm\(", path.read_text())] == ["progress.py"]


def test_a_terminal_gets_a_bar_that_moves(clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    with progress.progress(total=9) as bar:
        for _ in range(9):
            clock.now += 1.0
            bar.update(1)
    assert capsys.readouterr().err.count("\r") >= 9
