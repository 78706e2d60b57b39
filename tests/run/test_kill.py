"""Stages that are killed at any moment go on with `--resume` as if nothing had been."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import evor_bc
from tests import kill
from tests.helpers import arrays, tiny_dataset

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kills"), [("bc", 35), ("value", 10), ("qc", 5)])
def test_killed_at_random_moments(tmp_path: Path, stage: str, kills: int, monkeypatch: pytest.MonkeyPatch):
    """SIGKILL, SIGTERM and Ctrl-C: parameters, training state and metrics are those of a run that was never stopped,
    bit for bit. Fails if a batch is drawn twice or left out, if a row is, if a file is half written or left behind, or
    if the kills all come before the first checkpoint."""
    monkeypatch.chdir(tmp_path)
    tiny_dataset(tmp_path / "data.npz")
    if stage == "value":
        evor_bc.main(evor_bc.Args(**kill.SMALL | dict(steps=20), run_dir=Path("run")))
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache"), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", stage, str(kills), "0"],
        env=os.environ | cache | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed = [line.split() for line in done.stdout.splitlines()]
    assert len(killed) >= kills
    assert [name for name, _ in killed] == [kill.SIGNALS[i % len(kill.SIGNALS)].name for i in range(len(killed))]
    assert len({step for _, step in killed} - {"0", "1000"}) >= min(3, kills // 3), killed
    folder = kill.STAGES[stage][2]
    runs = sorted(path for path in tmp_path.glob("killed-*") if path.is_dir())
    for run in runs:
        for name in ("model.eqx", "train_state.eqx"):
            assert arrays(run / folder / name) == arrays(tmp_path / "whole" / folder / name), (run, name)
        metrics = (run / folder / "metrics.csv").read_bytes()
        assert metrics == (tmp_path / "whole" / folder / "metrics.csv").read_bytes()
        assert sorted(os.listdir(run / folder)) == sorted(os.listdir(tmp_path / "whole" / folder))
