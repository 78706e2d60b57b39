"""What a run leaves behind: rows in full precision, files that are whole or not there."""

import csv
import dataclasses
import gc
import json
import math
import os
import platform
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from common import files, metrics, provenance
from common.files import plain, write_csv, write_json
from common.metrics import Metrics
from tests.helpers import contents

ROOT = Path(__file__).parents[2]
REPLICAS = [(1, 0), (1, 3), (2, 0), (2, 3)]


def log_steps(path: Path, steps: list[int], *, resume_step: int | None = None) -> None:
    log = Metrics(path, stage="value", env="toy", resume_step=resume_step)
    for step in steps:
        log.log(step, REPLICAS, {"loss": [step + 0.1, 1 / 3, 1e-30, -2.5e7], "target_return": np.full(4, step / 7)})


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_step_metric_and_replica(tmp_path: Path):
    """Task and seed of every replica stay apart: nothing is averaged away."""
    log_steps(tmp_path / "metrics.csv", [10, 20])
    rows = read(tmp_path / "metrics.csv")
    assert list(rows[0]) == ["stage", "env", "task", "seed", "step", "metric", "value"]
    keys = [(r["stage"], r["env"], r["task"], r["seed"], r["step"], r["metric"]) for r in rows]
    assert keys == [
        ("value", "toy", str(task), str(seed), str(step), metric)
        for step in (10, 20)
        for metric in ("loss", "target_return")
        for task, seed in REPLICAS
    ]
    assert [float(r["value"]) for r in rows[:4]] == [10.1, 1 / 3, 1e-30, -2.5e7]


def test_a_metric_of_no_task_has_an_empty_task(tmp_path: Path):
    Metrics(tmp_path / "metrics.csv", stage="bc", env="toy").log(1, [("", 5)], {"loss": [0.5]})
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "bc,toy,,5,1,loss,0.5"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_come_back_exactly(tmp_path: Path, dtype: type):
    """Fails at any rounding in the file."""
    values = np.random.default_rng(0).normal(size=1000).astype(dtype) * dtype(1e-3)
    Metrics(tmp_path / "m.csv", stage="bc", env="toy").log(1, [("", s) for s in range(1000)], {"loss": values})
    found = np.array([float(row["value"]) for row in read(tmp_path / "m.csv")])
    assert found.astype(dtype).tobytes() == values.tobytes()


def test_a_number_for_every_replica(tmp_path: Path):
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        Metrics(tmp_path / "m.csv", stage="bc", env="toy").log(1, REPLICAS, {"loss": [0.5]})


def test_equal_runs_leave_equal_files(tmp_path: Path):
    log_steps(tmp_path / "a.csv", [10, 20])
    log_steps(tmp_path / "b.csv", [10, 20])
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


@pytest.mark.parametrize("resume_step", [0, 20, 25])
def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path: Path, resume_step: int):
    """A run that was stopped at step 40, after its checkpoint: fails if a step stands there twice or is missing."""
    log_steps(tmp_path / "stopped.csv", [10, 20, 30, 40])
    rest = [step for step in (10, 20, 30, 40, 50) if step > resume_step]
    log_steps(tmp_path / "stopped.csv", rest, resume_step=resume_step)
    log_steps(tmp_path / "whole.csv", [10, 20, 30, 40, 50])
    assert (tmp_path / "stopped.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_resuming_survives_a_line_that_was_cut_off(tmp_path: Path):
    """A process that is killed while it writes leaves half a line."""
    log_steps(tmp_path / "stopped.csv", [10, 20])
    whole = (tmp_path / "stopped.csv").read_bytes()
    (tmp_path / "stopped.csv").write_bytes(whole + b"value,toy,1,0")
    log_steps(tmp_path / "stopped.csv", [], resume_step=20)
    assert (tmp_path / "stopped.csv").read_bytes() == whole


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    log_steps(tmp_path / "metrics.csv", [10, 20])
    log_steps(tmp_path / "metrics.csv", [])
    assert (tmp_path / "metrics.csv").read_text().strip() == ",".join(metrics.FIELDS)


def test_tracking_gets_the_same_numbers(tmp_path: Path):
    calls = []
    track = types.SimpleNamespace(log=lambda values, step: calls.append((values, step)))
    log = Metrics(tmp_path / "m.csv", stage="value", env="toy", track=track)
    log.log(10, REPLICAS[:2], {"loss": [0.25, 0.5]})
    assert calls == [({"value/task1/seed0/loss": 0.25}, 10), ({"value/task1/seed3/loss": 0.5}, 10)]


def test_write_csv_and_json_replace_whole_files_or_nothing(tmp_path: Path):
    """The second row has a field too many, the second object cannot be written: fails if the old file is touched."""
    write_csv(tmp_path / "new" / "a.csv", ("x", "y"), [dict(x=1, y="two, three")])
    write_json(tmp_path / "new" / "a.json", {"x": 1})
    before = contents(tmp_path / "new")
    assert before == {"a.csv": b'x,y\r\n1,"two, three"\r\n', "a.json": b'{\n  "x": 1\n}\n'}
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        write_csv(tmp_path / "new" / "a.csv", ("x", "y"), [dict(x=5, y=6), dict(x=7, y=8, z=9)])
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "new" / "a.json", {"x": 2, "y": object()})
    after = contents(tmp_path / "new")
    assert {name: after[name] for name in before} == before


def test_what_a_killed_process_left_is_removed(tmp_path: Path):
    """But nothing that may still be written: of a running process, of another machine, of another file, of just now."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = platform.node()
    names = {
        "killed": f".{here}.{ended.pid}.a.json",
        "running": f".{here}.{os.getppid()}.a.json",
        "another machine": f".other{here}.{ended.pid}.a.json",
        "another file": f".{here}.{ended.pid}.b.json",
        "no number": f".{here}.x.a.json",
        "no process": f".{here}.{10**30}.a.json",
    }
    for name in names.values():
        (tmp_path / name).write_text("half")
    write_json(tmp_path / "a.json", {})
    assert {*names.values(), "a.json"} == set(contents(tmp_path))
    for name in names.values():
        os.utime(tmp_path / name, (0, time.time() - 601))
    write_json(tmp_path / "a.json", {})
    assert {*names.values(), "a.json"} - set(contents(tmp_path)) == {names["killed"]}


def test_a_lock_is_held_as_long_as_something_refers_to_it(tmp_path: Path):
    """By this process, which gets it as often as it asks. Fails if another process gets it, or if it stays for ever."""
    path = tmp_path / ".lock"
    code = "import pathlib, sys; from common.files import hold; print(hold(pathlib.Path(sys.argv[1])) is None)"

    def another_process_is_refused() -> bool:
        command = [sys.executable, "-c", code, str(path)]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return {"True": True, "False": False}[said.strip()]

    first = files.hold(path)
    second = files.hold(path)
    assert first is not None and second is first
    del first
    assert another_process_is_refused()
    del second
    gc.collect()
    assert not another_process_is_refused()


@dataclasses.dataclass(frozen=True)
class Settings:
    directory: Path | None = None
    temperatures: tuple[float, ...] = ()


def test_plain():
    settings = Settings(Path("runs/x"), (0.1, math.inf, -math.inf))
    assert plain({"args": settings, 3: [Path("a"), {"b": (1, None, True)}]}) == {
        "args": {"directory": "runs/x", "temperatures": [0.1, "inf", "-inf"]},
        "3": ["a", {"b": [1, None, True]}],
    }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, np.float64("inf")])
def test_files_hold_standard_json(tmp_path: Path, value: float):
    """`Infinity` and `NaN` are Python's, not JSON's: other readers refuse them."""
    write_json(tmp_path / "a.json", {"x": value})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert found == {"x": str(float(value))}


def test_provenance(tmp_path: Path):
    versions = provenance.package_versions()
    assert versions["numpy"] == np.__version__ and versions["python"].startswith("3.")
    (tmp_path / "abc").write_bytes(b"abc")
    assert files.sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_git_revision_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "common" / "provenance.py"))
    assert provenance.git_revision() == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert provenance.git_revision() == "unknown"
