"""Datasets of many files: which one is trained on when, and that nothing else changes."""

import threading
from pathlib import Path

import numpy as np
import pytest

import evor_bc
import evor_infer
import evor_value
from common import checkpoint
from common.cli import parse_args
from common.data import download, transitions
from common.errors import UserError
from common.files import read_csv
from common.rotation import Rotation, pad
from tests.helpers import contents, tiny_dataset

FILES = [Path("a"), Path("b"), Path("c")]


def test_files_take_turns_and_the_next_one_loads_meanwhile():
    loaded, release = [], threading.Event()

    def load(path: Path) -> str:
        loaded.append((path.name, threading.current_thread() is threading.main_thread()))
        if path.name == "b":
            release.wait(10)
        return path.name

    rotation = Rotation(FILES, load, every=100, steps=400)
    assert rotation.at(0) == "a"
    assert rotation.at(50) == "a"  # while b loads
    release.set()
    assert [rotation.at(step) for step in (100, 199, 200, 300, 301)] == ["b", "b", "c", "a", "a"]
    # The first one here, where an interrupt reaches it; the others beside; and none for a turn that never comes.
    assert loaded == [("a", True), ("b", False), ("c", False), ("a", False)]


def test_a_resumed_run_starts_with_the_file_of_its_step():
    for step, name in ((0, "a"), (250, "c"), (300, "a"), (499, "b")):
        rotation = Rotation(FILES, lambda path: path.name, every=100, steps=1000)
        assert rotation.at(step) == name
        assert rotation.at(step + 100) == "abc"[("abc".index(name) + 1) % 3]
        assert rotation.at(step + 500) == "abc"[("abc".index(name) + 2) % 3]  # not the one that was loaded ahead


def test_one_file_is_loaded_once():
    loaded = []
    rotation = Rotation(FILES[:1], lambda path: loaded.append(path) or path.name, every=100, steps=1000)
    assert {rotation.at(step) for step in range(0, 1000, 50)} == {"a"}
    assert loaded == FILES[:1]


def test_an_error_of_the_next_file_ends_training_as_soon_as_it_is_known():
    def load(path: Path) -> str:
        if path.name == "b":
            raise UserError("b is damaged.")
        return path.name

    rotation = Rotation(FILES, load, every=10_000, steps=30_000)
    assert rotation.at(0) == "a"
    rotation._next._thread.join()
    with pytest.raises(UserError, match="b is damaged"):
        rotation.at(10)
    with pytest.raises(UserError, match="b is damaged"):
        rotation.at(10_000)


def test_pad():
    np.testing.assert_array_equal(pad(np.ones((2, 3)), 4), [[1, 1, 1]] * 2 + [[0, 0, 0]] * 2)
    np.testing.assert_array_equal(pad(np.ones((2, 3)), 4, axis=1), [[1, 1, 1, 0]] * 2)
    array = np.ones((2, 0))
    assert pad(array, 2) is array


# --- Training ----------------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, dataset: Path, name: str, **changes) -> dict:
    settings = dict(
        dataset=dataset, env="my-robot", run_dir=tmp_path / name, width=16, depth=2, batch_size=16, steps=60,
        steps_per_call=10, save_every=10, file_steps=20,
    )  # fmt: skip
    return settings | changes


def losses(run_dir: Path, stage: str) -> list[float]:
    return [float(row["value"]) for row in read_csv(run_dir / stage / "metrics.csv") if row["metric"] == "loss"]


def train(tmp_path: Path, dataset: Path, name: str, *, next_action: str = "base") -> dict[str, list[float]]:
    settings = arguments(tmp_path, dataset, name)
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings, num_next_actions=2, next_action=next_action))
    return {stage: losses(tmp_path / name, stage) for stage in ("bc", "value")}


@pytest.mark.slow
def test_copies_of_one_file_train_as_that_file_does(tmp_path: Path):
    """Fails if the turns, the filling up or the banks of files change anything but the data."""
    for name in ("a", "b"):
        tiny_dataset(tmp_path / "copies" / f"{name}.npz")
    alone = train(tmp_path, tiny_dataset(tmp_path / "alone.npz"), "one")
    copies = train(tmp_path, tmp_path / "copies", "two")
    assert alone == copies and len(alone["bc"]) == len(alone["value"]) == 6
    banks = sorted(path.name for path in (tmp_path / "two" / "bc").glob("bank-*"))
    assert banks == ["bank-2-seeds-0-a.eqx", "bank-2-seeds-0-b.eqx"]


@pytest.mark.slow
def test_files_of_different_lengths_share_one_program_and_every_row(tmp_path: Path):
    """The second file is three times as long. In the turn of the first one, training is that on it alone: its filling
    is never drawn. (With the next actions of the data: the base policies of the two runs differ.)"""
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz", trajectories=2)
    tiny_dataset(folder / "b.npz", trajectories=6, seed=1)
    before = evor_bc.train_chunk._cache_size(), evor_value.train_chunk._cache_size()
    mixed = train(tmp_path, folder, "mixed", next_action="dataset")
    after = evor_bc.train_chunk._cache_size(), evor_value.train_chunk._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    first = train(tmp_path, folder / "a.npz", "first", next_action="dataset")
    for stage in ("bc", "value"):
        np.testing.assert_allclose(mixed[stage][:2], first[stage][:2], rtol=1e-6)
        assert mixed[stage][2:4] != first[stage][2:4]


@pytest.mark.slow
def test_what_a_later_file_lacks_is_found_out_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Its turn would come after 20 steps. Fails if a run directory is made before."""
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz")
    tiny_dataset(folder / "b.npz", length=4)
    settings = arguments(tmp_path, folder, "run", horizon=5)
    with pytest.raises(UserError, match=r"no trajectory in b\.npz is longer than 5 rows"):
        evor_bc.main(evor_bc.Args(**settings))
    assert not (tmp_path / "run" / "bc" / "config.json").exists()
    evor_bc.main(evor_bc.Args(**settings | dict(horizon=3, overwrite=True)))
    with pytest.raises(UserError, match=r"no trajectory in b\.npz is longer than 5 rows"):  # with the data's next chunk
        evor_value.main(evor_value.Args(**settings | dict(horizon=3), next_action="dataset"))
    tiny_dataset(folder / "b.npz", trajectories=2, length=6)
    capsys.readouterr()
    evor_bc.main(evor_bc.Args(**settings | dict(run_dir=tmp_path / "other")))
    assert "shorter" not in capsys.readouterr().out
    rows = dict(np.load(folder / "b.npz"))
    np.savez(folder / "b.npz", **rows | dict(terminals=np.isin(np.arange(12), (3, 11))))
    evor_bc.main(evor_bc.Args(**settings | dict(run_dir=tmp_path / "third")))
    expected = "b.npz: 1 episodes are shorter than 5 steps and not used; transitions of 5 steps start in 3 rows"
    assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_resuming_in_the_middle_of_a_turn_changes_nothing(tmp_path: Path):
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz")
    tiny_dataset(folder / "b.npz", trajectories=3, seed=1)
    whole = train(tmp_path, folder, "whole")
    settings = arguments(tmp_path, folder, "resumed", steps=60)

    stop = RuntimeError("stopped")
    for stage, main, args in (
        ("bc", evor_bc, evor_bc.Args(**settings)),
        ("value", evor_value, evor_value.Args(**settings, num_next_actions=2)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            chunk, calls = main.train_chunk, []

            def interrupted(*arguments, chunk=chunk, calls=calls):
                calls.append(1)
                if len(calls) > 3:
                    raise stop
                return chunk(*arguments)

            patch.setattr(main, "train_chunk", interrupted)
            with pytest.raises(RuntimeError, match="stopped"):
                main.main(args)
        assert checkpoint.read_header(tmp_path / "resumed" / stage / "model.eqx", stage=stage, remedy="")["step"] == 30
        main.main(evor_bc.dataclasses.replace(args, resume=True))
        assert losses(tmp_path / "resumed", stage) == whole[stage]


@pytest.mark.slow
def test_a_bad_file_is_found_before_training_and_before_an_old_run_is_deleted(tmp_path: Path):
    """Also the tenth of them: fails if a run has to come to its turn to find out, or if `--overwrite` is too quick."""
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz")
    tiny_dataset(folder / "b.npz")
    settings = arguments(tmp_path, folder, "run", overwrite=True)
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings))
    before = contents(tmp_path / "run")

    tiny_dataset(folder / "c.npz", observation_dim=4)
    other = r"observations in .*c\.npz have 4 columns, those of the folder's first file 3"
    for main, args in ((evor_bc.main, evor_bc.Args), (evor_value.main, evor_value.Args)):
        with pytest.raises(UserError, match=other):
            main(args(**settings))
        np.savez(folder / "c.npz", observations=np.zeros(()), actions=np.zeros(()), terminals=np.zeros(()))
        with pytest.raises(
            UserError, match=r"observations in .*c\.npz must be a 2-D array of numbers, not float64 \(\)"
        ):
            main(args(**settings))
        tiny_dataset(folder / "c.npz", observation_dim=4)
    (folder / "c.npz").unlink()
    for main, args in ((evor_bc.main, evor_bc.Args), (evor_value.main, evor_value.Args)):
        with pytest.raises(UserError, match=r"no trajectory in a\.npz is longer than 30 rows"):
            main(args(**settings | dict(horizon=30)))
    assert contents(tmp_path / "run") == before


def test_a_file_that_changed_is_another_dataset(tmp_path: Path):
    """Of the same name and size: its bank must not be used again, nor the base policy of what it was."""
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz")
    tiny_dataset(folder / "b.npz")
    settings = arguments(tmp_path, folder, "run", overwrite=True)
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings))
    banks = {path.name: path.read_bytes() for path in (tmp_path / "run" / "bc").glob("bank-*")}
    size = (folder / "b.npz").stat().st_size
    tiny_dataset(folder / "b.npz", seed=5)
    assert (folder / "b.npz").stat().st_size == size
    with pytest.raises(UserError, match="was trained on other data"):
        evor_value.main(evor_value.Args(**settings))
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings))
    again = {path.name: path.read_bytes() for path in (tmp_path / "run" / "bc").glob("bank-*")}
    assert banks.keys() == again.keys() == {"bank-4-seeds-0-a.eqx", "bank-4-seeds-0-b.eqx"}
    assert banks["bank-4-seeds-0-b.eqx"] != again["bank-4-seeds-0-b.eqx"]


def test_returns_are_bounded_by_the_rewards_of_all_files(tmp_path: Path):
    """0 in the first file and 1 in the second: with the bounds of the first, every return would be clipped to zero."""
    folder = tmp_path / "folder"
    for name, reward in (("a", 0.0), ("b", 1.0)):
        arrays = dict(np.load(tiny_dataset(folder / f"{name}.npz")))
        np.savez(folder / f"{name}.npz", **arrays | dict(rewards=np.full(120, reward, np.float32)))
    settings = arguments(tmp_path, folder, "run")
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings, discount=0.9))
    axis = evor_infer.load_agent(tmp_path / "run").axis
    np.testing.assert_allclose([float(axis.low), float(axis.high)], [0.0, 10.0], rtol=1e-6)


@pytest.mark.parametrize(("reward", "lowest"), [("default", -2.0), ("sparse", -1.0)])
def test_ogbenchs_rewards_are_bounded_by_its_subgoals(reward: str, lowest: float):
    """Also where the first file has not all of them."""
    found = transitions.reward_range(
        [Path("a"), Path("b")], np.array([[-1.0, -1.0]]), env="cube-double-play", own=False, reward=reward
    )
    assert found.tolist() == [[lowest, 0.0]]
    alone = transitions.reward_range(
        [Path("a")], np.array([[-1.0, -1.0]]), env="cube-double-play", own=False, reward=reward
    )
    assert alone.tolist() == [[-1.0, -1.0]]


def test_a_missing_base_policy_gets_turns_that_fit_its_own_calls(tmp_path: Path):
    args = evor_value.Args(file_steps=1_010, steps_per_call=10, run_dir=tmp_path)
    assert evor_bc.args_for(args).file_steps == 2_000
    assert evor_bc.args_for(args).directory == tmp_path


def test_turns_have_to_fit(tmp_path: Path):
    folder = tmp_path / "folder"
    tiny_dataset(folder / "a.npz")
    tiny_dataset(folder / "b.npz")
    with pytest.raises(UserError, match="--file-steps 25 is no multiple of --steps-per-call 10"):
        evor_bc.main(evor_bc.Args(**arguments(tmp_path, folder, "run", file_steps=25)))
    settings = arguments(tmp_path, folder, "run")
    evor_bc.main(evor_bc.Args(**settings))
    with pytest.raises(UserError, match="--redraw-bank: each file of a folder has one bank"):
        evor_value.main(evor_value.Args(**settings, redraw_bank=20))
    assert len(download.data_files(folder)) == 2


@pytest.mark.parametrize("preset", ["quick", "preview"])
def test_a_missing_base_policy_has_the_preset_of_stage_2(preset: str):
    """And its data, where a flag overrides the preset."""
    args = parse_args(evor_value.Args, evor_value.PRESETS, [f"--{preset}", "--episodes", "7", "--horizon", "2"])
    wanted = evor_bc.args_for(args)
    assert (wanted.steps, wanted.episodes, wanted.horizon) == (evor_bc.PRESETS[preset]["steps"], 7, 2)
    assert getattr(wanted, preset) and wanted.directory == args.directory
