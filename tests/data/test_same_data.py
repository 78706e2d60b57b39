"""The comparison of datasets: it finds what differs, and nothing where nothing does."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import same_data
from common.data.collect import collect
from common.errors import UserError
from common.files import read_csv
from tests.helpers import mostly_slow


def test_distance_is_kolmogorov_and_smirnovs():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50, 300).astype(float), rng.integers(5, 50, 400).astype(float)
    episodes = np.arange(300) // 10, np.arange(400) // 10
    edges = np.unique(np.concatenate(values))
    counts = np.concatenate([same_data.histograms(v, e, edges) for v, e in zip(values, episodes, strict=True)])
    assert counts.shape[0] == 70 and counts.sum() == 700
    found = same_data.distances(counts, (np.arange(70) < 30).astype(float)[None])
    np.testing.assert_allclose(found, stats.ks_2samp(*values).statistic)


def walks(rng: np.random.Generator, episodes: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Episodes of 100 rows that hardly move: what one says of a row, it says of the whole episode."""
    level = rng.normal(size=(episodes, 1)) + shift
    return (level + 0.05 * rng.normal(size=(episodes, 100))).ravel(), np.repeat(np.arange(episodes), 100)


def test_p_values_are_those_of_episodes_not_of_rows():
    """Rows are no independent draws: a test that took them for that would find differences where there are none.

    Over 40 pairs of sets made in the same way, the share of p-values below 0.2 is 0.2 up to 0.13 (two standard
    deviations); the row-wise test has all of them below 0.001.
    """
    rng = np.random.default_rng(1)
    labels = np.arange(60) < 25
    weights = np.stack([labels, *(rng.permutation(labels) for _ in range(200))]).astype(float)
    p, naive = [], []
    for _ in range(40):
        (first, a), (second, b) = walks(rng, 25), walks(rng, 35)
        p.append(same_data.compare((first, second), (a, b), weights)["p"])
        naive.append(stats.ks_2samp(first, second).pvalue)
    assert abs(np.mean(np.array(p) < 0.2) - 0.2) < 0.13 and max(naive) < 0.001
    (first, a), (second, b) = walks(rng, 25), walks(rng, 35, shift=2.0)
    row = same_data.compare((first, second), (a, b), weights)
    assert row["p"] == 1 / 201 and row["distance"] > 1.5 * row["usual_distance"]
    assert row["collected_0.5"] - row["reference_0.5"] > 1.0


def test_holm():
    np.testing.assert_allclose(same_data.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(same_data.holm(np.array([0.9, 0.8])), [1.0, 1.0])


def test_subgoals(tmp_path: Path):
    """Two episodes: a cube is lifted twice in the first and lies lifted from the start in the second, in which a
    button is pressed; a maze's point enters two cells, and one more."""
    qpos, buttons = np.zeros((10, 21)), np.zeros((10, 2), int)
    qpos[[1, 2, 4, 5, 6], 16] = 0.1
    buttons[8:, 1] = 1
    np.savez(tmp_path / "scene.npz", qpos=qpos, button_states=buttons)
    episodes = np.repeat([0, 1], 5)
    assert same_data.subgoals("scene", tmp_path / "scene.npz", episodes).tolist() == [2, 1]
    assert same_data.subgoals("puzzle-3x3", tmp_path / "scene.npz", episodes).tolist() == [0, 1]
    qpos[:, 0] = [0, 1.9, 2.1, 3, 6.5, 0, 0, 2.5, 3, 3]
    np.savez(tmp_path / "maze.npz", qpos=qpos)
    assert same_data.subgoals("pointmaze-medium", tmp_path / "maze.npz", episodes).tolist() == [2, 1]


@pytest.mark.parametrize("noise", mostly_slow([0.5, 2.0], but=[2.0]))
def test_collected_data_is_told_from_data_with_other_noise(tmp_path: Path, noise: float):
    """With OGBench's noise nothing differs between two seeds; with another one the actions do."""
    files = tmp_path / "reference.npz", tmp_path / "collected.npz"
    collect("pointmaze-medium-navigate-v0", files[0], episodes=40, rows=200, seed=1, workers=1)
    collect("pointmaze-medium-navigate-v0", files[1], episodes=40, rows=200, seed=2, workers=1, noise=noise)
    args = same_data.Args(*files, env="pointmaze-medium-navigate", permutations=400, out=tmp_path / "rows.csv")
    rows = {row["variable"]: row for row in same_data.main(args)}
    assert len(rows) == len(read_csv(tmp_path / "rows.csv")) == 2 + 2 + 1 + 10 + 1
    smallest = min(row["adjusted_p"] for row in rows.values())
    assert smallest > 0.05 if noise == 0.5 else smallest < 0.05
    if noise == 2.0:
        assert rows["actions[0]"]["p"] == rows["actions[1]"]["p"] == 1 / 401


def test_an_unknown_environment_is_a_users_mistake(tmp_path: Path):
    path = tmp_path / "maze.npz"
    collect("pointmaze-medium-navigate-v0", path, episodes=2, rows=20, workers=1)
    with pytest.raises(UserError, match="--permutations 100: 16 variables need 320"):
        same_data.main(same_data.Args(path, path, env="pointmaze-medium-navigate", permutations=100))
    with pytest.raises(UserError, match="no environment of OGBench"):
        same_data.main(same_data.Args(tmp_path / "a.npz", tmp_path / "b.npz", env="cube-septuple-play"))
