"""Figures show the numbers they are given."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common import figures
from common.metrics import Metrics


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collects figures instead of writing them."""
    found = []
    monkeypatch.setattr(figures, "save", lambda figure, path: found.append(figure))
    return found


def summary_row(task: int, num_actions: int, success: float, **changes) -> dict:
    row = dict(
        task=task, num_actions=num_actions, success=success, low=success - 0.1, high=success + 0.05, noise_scale=1.0
    )
    return row | dict(num_returns=8, return_temperature=0.1, action_temperature=0.0, action_noise=0.0) | changes


def test_training_draws_one_line_per_replica_and_one_panel_per_metric(tmp_path: Path, drawn: list):
    log = Metrics(tmp_path / "metrics.csv", stage="value", env="toy")
    for step in (10, 20, 30):
        log.log(step, [(1, 0), (2, 0)], {"loss": [step / 10, 1.0], "gradient_norm": [0.5, step]})
    figures.training(tmp_path / "metrics.csv", tmp_path / "a.png", title="a run")
    loss, norm = drawn[0].axes
    assert (loss.get_title(), norm.get_title()) == ("loss", "gradient norm")
    assert [line.get_label() for line in loss.get_lines()] == ["task 1, seed 0", "task 2, seed 0"]
    assert [line.get_xydata().tolist() for line in loss.get_lines()] == [
        [[10, 1], [20, 2], [30, 3]],
        [[10, 1], [20, 1], [30, 1]],
    ]


def test_training_without_metrics_draws_nothing(tmp_path: Path, drawn: list):
    Metrics(tmp_path / "metrics.csv", stage="value", env="toy")
    figures.training(tmp_path / "metrics.csv", tmp_path / "a.png", title="a run")
    assert drawn == []


def test_success_draws_both_policies_of_each_task_with_intervals(tmp_path: Path, drawn: list):
    rows = [summary_row(task, n, s) for task, n, s in ((2, 1, 0.1), (2, 16, 0.8), (4, 1, 0.2), (4, 16, 0.6))]
    figures.success(rows, tmp_path / "a.png", title="a run")
    axis = drawn[0].axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([10, 20, 80, 60])
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["base policy alone", "best of 16"]
    ends = [segment[:, 1] for bars in axis.collections for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [[0, 15], [10, 25], [70, 85], [50, 65]], atol=1e-9)


def test_only_full_noise_is_the_base_policy_alone(tmp_path: Path, drawn: list):
    """Fails if two kinds of episodes are pooled, or the second is called the first."""
    rows = [summary_row(2, 1, 0.1), summary_row(2, 1, 0.8, noise_scale=0.3)]
    figures.success(rows, tmp_path / "a.png", title="a run")
    bars = dict(zip(("one action, lambda 0.3", "base policy alone"), (80, 10), strict=True))
    axis = drawn[0].axes[0]
    found = [text.get_text() for text in axis.get_legend().get_texts()]
    assert dict(zip(found, (bar.get_height() for bar in axis.patches), strict=True)) == pytest.approx(bars)


def test_sweep_draws_one_panel_per_setting_that_varies(tmp_path: Path, drawn: list):
    rows = [summary_row(2, n, n / 20, num_returns=m) for n in (1, 4, 16) for m in (2, 8)]
    figures.sweep(rows, tmp_path / "a.png", title="a run")
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["N_pi, candidate actions", "N, returns per candidate"]
    curves = [container.lines[0].get_ydata().tolist() for container in drawn[0].axes[0].containers]
    assert curves == [pytest.approx([5, 20, 80])] * 2
    assert len(drawn[0].axes[1].containers) == 3


def test_sweep_of_a_single_point_draws_it(tmp_path: Path, drawn: list):
    figures.sweep([summary_row(2, 16, 0.5)], tmp_path / "a.png", title="a run")
    assert [axis.get_xlabel() for axis in drawn[0].axes] == ["N_pi, candidate actions"]


def test_heat_maps_put_each_success_into_its_cell(tmp_path: Path, drawn: list):
    values = {(0.0, 0.1): 0.25, (0.0, 1.0): 0.5, (float("inf"), 0.1): 0.75}
    summary = [dict(a=a, b=b, success=success) for (a, b), success in values.items()]
    panels = {"one": summary, "two": [dict(a=0.0, b=1.0, success=1.0)]}
    figures.heat_maps(panels, tmp_path / "a.png", x="a", y="b", title="toy")
    axis, other = drawn[0].axes[:2]
    assert [axis.get_title(), other.get_title()] == ["one", "two"]
    np.testing.assert_array_equal(other.images[0].get_array().filled(-1), [[-1, -1], [100, -1]])
    np.testing.assert_array_equal(axis.images[0].get_array().filled(-1), [[25, 75], [50, -1]])
    assert {(*text.get_position(), text.get_text()) for text in axis.texts} == {
        (0, 0, "25"),
        (1, 0, "75"),
        (0, 1, "50"),
    }
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "inf"]


def test_calibration_draws_bins_and_shares(tmp_path: Path, drawn: list):
    levels = np.array([0.1, 0.5, 0.9])
    means = np.linspace(-3, 0, 30)
    draws = means[:, None] + np.linspace(-1, 1, 11)
    numbers = {"below_0.1": 0.2, "below_0.5": 0.4, "below_0.9": 0.8, "correlation": 0.5, "crps": 0.25}
    figures.calibration([("task 2, seed 0", draws, means + 0.5, numbers)], levels, tmp_path / "a.png")
    left, right = drawn[0].axes
    points = left.containers[0].lines[0].get_xydata()
    assert len(points) == 15
    np.testing.assert_allclose(points[:, 1] - points[:, 0], 0.5, atol=1e-9)
    assert right.get_lines()[1].get_xydata().tolist() == [[0.1, 0.2], [0.5, 0.4], [0.9, 0.8]]
    assert right.get_title() == "correlation 0.50, crps 0.25"


def test_save_writes_a_png_into_a_new_folder(tmp_path: Path):
    figure, _ = figures.subplots(1, 1, width=2.0, height=2.0)
    figures.save(figure, tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_leaves_the_callers_backend_alone():
    """Importing the project in a notebook must not switch off its inline plots."""
    code = (
        "import matplotlib; matplotlib.use('svg'); import evor_infer, evor_value, sys; "
        "assert matplotlib.get_backend().lower() == 'svg' and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(figures.__file__).parent.parent, check=True)
