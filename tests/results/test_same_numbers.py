"""The guard for refactorings sees a changed number."""

from pathlib import Path

import numpy as np
import pytest

from common import checkpoint
from common.errors import UserError
from experiments import same_numbers


def run_directory(directory: Path, arrays: list[np.ndarray], *, header: str = "{}", loss: float = 0.5) -> Path:
    """A run with one checkpoint and one CSV file."""
    directory.mkdir()
    with open(directory / "model.eqx", "wb") as file:
        file.write(header.encode() + b"\n")
        for array in arrays:
            np.save(file, array)
        file.write(b" " * checkpoint.TRAILER_BYTES)
    (directory / "metrics.csv").write_text(f"step,loss\n20,{loss!r}\n")
    return directory


def test_more_arrays_in_another_order_are_the_same_numbers(tmp_path: Path):
    """A refactoring may put more into a checkpoint, and other words into its header."""
    weights, bias = np.arange(6.0).reshape(2, 3), np.zeros(3, np.float32)
    old = run_directory(tmp_path / "old", [weights, bias])
    new = run_directory(tmp_path / "new", [bias, np.ones(2), weights], header='{"version": 2}')
    assert same_numbers.differences(old, new) == []
    assert same_numbers.differences(new, old) == ["model.eqx: 1 of 3 arrays differ"]


def test_one_bit_is_a_difference(tmp_path: Path):
    weights = np.ones((2, 3), np.float32)
    old = run_directory(tmp_path / "old", [weights, weights])
    other = weights.copy()
    other[1, 2] = np.nextafter(np.float32(1), np.float32(2))
    new = run_directory(tmp_path / "new", [weights, other], loss=np.nextafter(0.5, 1.0))
    found = same_numbers.differences(old, new)
    assert found == ["metrics.csv: 1 of 2 rows differ", "model.eqx: 1 of 2 arrays differ"]
    (new / "metrics.csv").unlink()
    assert same_numbers.differences(old, new)[0] == "metrics.csv is missing"


def test_a_run_that_left_nothing_is_no_success(tmp_path: Path):
    assert "nothing to compare" in same_numbers.differences(tmp_path / "none", tmp_path)[0]


def test_mistakes():
    with pytest.raises(UserError, match="no cases typo"):
        same_numbers.main(same_numbers.Args("HEAD", only=("typo",)))
    with pytest.raises(UserError, match="cannot check out 'no-such-revision'"):
        same_numbers.main(same_numbers.Args("no-such-revision"))
