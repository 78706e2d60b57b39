"""`--track`: one run there for one run here, with the same numbers."""

import importlib.abc
import re
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.errors import UserError
from common.metrics import Metrics
from common.tracking import REMEDIES, Tracker, import_tracker, start_tracking

TRACKERS = get_args(Tracker)


def test_every_tracker_has_a_remedy():
    assert set(REMEDIES) == set(TRACKERS)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_without_the_package_it_is_a_users_mistake(tracker: Tracker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary" if tracker == "tensorboard" else tracker, None)
    with pytest.raises(UserError, match=rf"--track {tracker} needs the package .*: pip install {tracker}\.$"):
        import_tracker(tracker)


def test_a_broken_package_shows_its_cause(monkeypatch: pytest.MonkeyPatch):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "wandb":
                raise TypeError("Descriptors cannot be created directly.")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(UserError, match=r"needs the package \(Descriptors cannot be created directly\.\)"):
        import_tracker("wandb")


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_one_that_does_not_start_is_a_users_mistake(tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a key, or without a network; the words of the service are in the sentence, and no id is kept."""

    def init(**_: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match=rf"{tracker} does not start \(api_key not configured \(no-tty\)\): .*\.$"):
        start_tracking(tracker, "run", {}, directory=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tracker", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_goes_on_is_one_run(tracker: Tracker, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Fails if a resumed run begins another one there, or if two runs share theirs."""
    calls = []
    monkeypatch.setitem(sys.modules, tracker, types.SimpleNamespace(init=lambda **settings: calls.append(settings)))
    for directory in ("a", "a", "b"):
        start_tracking(tracker, "name", {"steps": 5, "run_dir": Path("x")}, directory=tmp_path / directory)
    first, resumed, other = calls
    assert first["config"] == {"steps": 5, "run_dir": "x"} and first["resume"] == "allow" and first["project"] == "evor"
    assert re.search(r"\w{8,64}$", first[key]) and resumed == first and other[key] != first[key]
    start_tracking(tracker, "name", {}, directory=tmp_path / "a", anew=True)
    assert calls[-1][key] not in (first[key], other[key])


def test_tensorboard_has_the_numbers_of_the_file(tmp_path: Path):
    """Of a run that went on, in one folder; of one that started over, none of the earlier one."""

    def events() -> dict[str, list[tuple[int, float]]]:
        read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return {
            tag: [(e.step, e.tensor_proto.float_val[0]) for e in read.Tensors(tag)] for tag in read.Tags()["tensors"]
        }

    def log(steps: list[int], **settings: Any) -> None:
        track = start_tracking("tensorboard", "name", {}, directory=tmp_path, **settings)
        metrics = Metrics(tmp_path / "metrics.csv", stage="bc", env="toy", track=track)
        for step in steps:
            metrics.log(step, [("", 0)], {"loss": [step / 8]})

    log([1, 2])
    log([3])
    assert events() == {"bc/task/seed0/loss": [(1, 0.125), (2, 0.25), (3, 0.375)]}
    log([1], anew=True)
    assert events() == {"bc/task/seed0/loss": [(1, 0.125)]}


def test_a_tracker_that_fails_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    def log(values: dict, *, step: int) -> None:
        raise ConnectionError("no network")

    metrics = Metrics(tmp_path / "metrics.csv", stage="bc", env="toy", track=types.SimpleNamespace(log=log))
    for step in (1, 2):
        metrics.log(step, [("", 0)], {"loss": [0.5]})
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("--track failed and is left out from here on (no network)") == 1
