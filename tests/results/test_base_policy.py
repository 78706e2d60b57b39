"""The base-policy check's own arithmetic, on trajectories whose lifts are known."""

from pathlib import Path

import numpy as np
import pytest

import evor_bc
from benchmarks import base_policy
from common.cli import parse_args
from common.errors import UserError
from common.files import read_csv, sha256


def test_approach_rows_are_those_with_a_lift_soon_but_not_at_once():
    """Two episodes of 100 rows, a lift at row 60 of the first and at row 10 of the second: of the first, the rows 31 to
    48 have it in 12 to 29 steps; of the second none, since row 10 is too near to its start."""
    qpos = np.zeros((200, 21), np.float32)
    qpos[60:70, 16] = qpos[110:115, 16] = 0.1
    terminals = np.arange(200) % 100 == 99
    rows = base_policy.approach_rows(qpos, terminals, 5)
    assert rows.tolist() == list(range(31, 49))


def test_a_policy_that_ignores_the_cubes_explains_as_much_with_shuffled_ones():
    """The data's action is half in the arm's coordinates, half in the cubes': a policy of both explains everything and
    loses with shuffled cubes; one of the arm alone explains half, shuffled or not."""
    rng = np.random.default_rng(0)
    count = 4000
    observations = rng.normal(size=(count, 24)).astype(np.float32)
    arm, cubes = observations[:, :2], observations[:, 19:21]
    qpos = np.zeros((count, 21), np.float32)
    qpos[::40, 16] = 0.1
    arrays = dict(
        observations=observations,
        actions=np.concatenate([arm + cubes, np.zeros((count, 3))], axis=1),
        terminals=np.arange(count) == count - 1,
        qpos=qpos,
    )

    def both(x, noise):
        x = np.asarray(x)
        return (x[:, None, :2] + x[:, None, 19:21]) + 0.0 * np.asarray(noise)[..., :2]

    def arm_only(x, noise):
        return np.asarray(x)[:, None, :2] + 0.0 * np.asarray(noise)[..., :2]

    full, shuffled = base_policy.explained_variance(both, arrays, 1)
    assert full > 0.999 and abs(shuffled) < 0.15
    full, shuffled = base_policy.explained_variance(arm_only, arrays, 1)
    assert full == shuffled and abs(full - 0.5) < 0.1


@pytest.mark.slow
def test_policies_are_measured_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two untrained policies lift nothing; each row names its training. One of other data is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    flags = "--env cube-single-play --episodes 2 --width 8 --depth 2 --batch-size 4 --steps 2 --steps-per-call 1"
    for name, more in (("a", ""), ("b", "--schedule cosine --learning-rate 1e-3"), ("c", "--episodes 3")):
        args = parse_args(evor_bc.Args, evor_bc.PRESETS, f"{flags} --run-dir {name} {more}".split())
        evor_bc.main(args)
    settings = dict(env="cube-single-play", episodes=2, num_episodes=1, out=tmp_path / "rows.csv")
    rows = base_policy.main(base_policy.Args(run_dirs=(Path("a"), Path("b")), **settings))
    assert [(row["schedule"], row["learning_rate"], row["bc_steps"]) for row in rows] == [
        ("constant", 3e-4, 2), ("cosine", 1e-3, 2)
    ]  # fmt: skip
    assert [row["policy_steps_lifted"] for row in rows] == [0.0, 0.0] and rows[0]["data_episodes_lifted"] == 1.0
    assert rows[0]["policy_sha256"] == sha256(Path("a/bc/model.eqx")) != rows[1]["policy_sha256"]
    assert [row["schedule"] for row in read_csv(tmp_path / "rows.csv")] == ["constant", "cosine"]
    with pytest.raises(UserError, match="was trained on other data"):
        base_policy.main(base_policy.Args(run_dirs=(Path("c"),), **settings))
