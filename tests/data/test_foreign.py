"""Minari datasets and D4RL's layout: every transition of the source, and nothing else, is one of ours."""

import dataclasses
import errno
import re
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

import evor_bc
from common import environments
from common.data import download, files, foreign, transitions
from common.data.names import validation_path
from common.data.spaces import action_range, flat
from common.errors import UserError
from experiments import gym_data


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and an empty folder of Minari's."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def steps(path: Path) -> set[tuple[float, ...]]:
    """Transitions of a file: observation, action, reward, mask, next observation (all of one dimension)."""
    data = files.load_trajectories(path, env="anything", tasks=(0,))
    starts = transitions.transition_starts(data.terminals, 1)
    columns = data.observations[starts, 0], data.actions[starts, 0], data.rewards[0, starts], data.masks[0, starts]
    rows = zip(*columns, data.observations[starts + 1, 0], strict=True)
    return {tuple(round(float(x), 5) for x in row) for row in rows}


def write(path: Path, **arrays: Any) -> Path:
    if path.suffix.lower() in (".npz", ""):
        with open(path, "wb") as file:  # savez would add an ending to a name
            np.savez(file, **arrays)
    else:
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file[key] = array
    return path


def rows(number: int = 9) -> dict[str, np.ndarray]:
    """Three trajectories of three steps; the first ends, the others are cut. Observation i, action i / 10, reward i."""
    count = np.arange(number, dtype=np.float32)
    return dict(
        observations=count[:, None],
        actions=count[:, None] / max(10, number),
        rewards=count,
        terminals=count == 2,
        timeouts=count % 3 == 2,
    )


def step(i: int, mask: float = 1.0, after: float | None = None) -> tuple[float, ...]:
    return float(i), round(i / 10, 5), float(i), mask, float(i + 1 if after is None else after)


@pytest.mark.parametrize("name", ["rows.hdf5", "rows.h5", "rows.he5", "rows.npz", "ROWS.NPZ", "rows"])
def test_d4rl_without_the_states_after_the_last_actions(home: Path, name: str, capsys: pytest.CaptureFixture):
    """The reward of the step that ended is kept, with itself as the state that nothing looks at; the two cut
    trajectories lose a transition each. Wrong if a transition leads from one trajectory into the next."""
    path, source = download.find_files("robot", write(home / name, **rows()), episodes=None)
    assert steps(path) == {step(0), step(1), step(2, 0.0, 2), step(3), step(4), step(6), step(7)}
    assert source == "d4rl" and path.parent == home / "home/.ogbench/data/converted"
    said = capsys.readouterr().out
    assert "3 trajectories, 1 ended and 2 cut; 0 of them are for validation" in said
    assert "2 last transitions are left out: the data do not keep the state after them" in said


def test_d4rl_with_next_observations_keeps_every_transition(home: Path, capsys: pytest.CaptureFixture):
    """Without timeouts too: a row that is another state than the `next_observations` before it begins a trajectory."""
    data = rows()
    del data["timeouts"]
    after = data["observations"] + 1
    after[[5, 8], 0] = 50, 80
    path = foreign.converted(write(home / "rows.hdf5", **data, next_observations=after), "robot")
    assert steps(path) == {
        *(step(0), step(1), step(2, 0.0, 3), step(3), step(4), step(5, after=50), step(6), step(7), step(8, after=80))
    }
    said = capsys.readouterr().out
    assert "1 trajectories end where the next row is another state than next_observations" in said
    assert "left out" not in said


@pytest.mark.parametrize("resets", [0, 10])
def test_next_observations_that_are_the_next_rows_lead_into_no_other_trajectory(
    home: Path, resets: int, capsys: pytest.CaptureFixture
):
    """Of 100 trajectories of five rows, shifted with `np.roll`, each loses its last transition, whether all start in
    one state or not. Where the states after the cuts are true, all 500 transitions are kept."""
    count = np.arange(500.0)[:, None]
    observations = count % 5 + resets * (count // 5)
    data = dict(observations=observations, actions=np.zeros((500, 1)), rewards=np.zeros(500), terminals=np.zeros(500))
    data |= dict(timeouts=count[:, 0] % 5 == 4)
    for after, kept in ((np.roll(observations, -1, axis=0), 4), (observations + 1, 5)):
        path = foreign.converted(write(home / "rows.npz", **data, next_observations=after), "robot")
        for part, number in ((path, 95), (validation_path(path), 5)):
            arrays = files.read_arrays(part)
            starts = transitions.transition_starts(arrays["terminals"], 1)
            assert len(starts) == kept * number
            assert (arrays["observations"][starts + 1] - arrays["observations"][starts] == 1).all()
        said = capsys.readouterr().out
        assert ("of 99 of the 99 rows that were cut before the last one are the next row" in said) == (kept == 4)
        assert ("100 last transitions are left out" in said) == (kept == 4)


@pytest.mark.parametrize("name", ["rows.hdf5", "rows.npz"])
def test_gymnasiums_names_and_masks(home: Path, name: str):
    """`truncations` cut. With `masks`, `terminals` are ends of any kind: here none ended, and all three were cut."""
    data = rows()
    data["truncations"] = data.pop("timeouts")
    assert (2.0, 0.2, 2.0, 0.0, 2.0) in steps(foreign.converted(write(home / name, **data), "robot"))
    data = rows() | dict(terminals=rows()["timeouts"], masks=np.ones(9))
    assert steps(foreign.converted(write(home / name, **data), "robot")) == {step(i) for i in (0, 1, 3, 4, 6, 7)}


@pytest.mark.parametrize("name", ["rows.hdf5", "rows.npz"])
@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        *((key, "timeouts") for key in ("truncations", "truncation", "truncated", "timeout")),
        *((key, "terminals") for key in ("terminations", "termination", "terminated")),
        *((key, "next_observations") for key in ("next_obs", "next_observation")),
    ],
)
def test_other_names_mean_the_same(home: Path, name: str, key: str, meaning: str, capsys: pytest.CaptureFixture):
    """The same transitions as under D4RL's name, and nothing is left unused; two that differ are refused."""
    data = rows() | dict(next_observations=rows()["observations"] + 1 + 50 * rows()["timeouts"][:, None])
    expected = {*(step(i) for i in (0, 1, 3, 4, 6, 7)), step(2, 0.0, 53), step(5, after=56), step(8, after=59)}
    other = {key: array for key, array in data.items() if key != meaning} | {key: data[meaning]}
    path = download.find_files("robot", write(home / name, **other), episodes=None)[0]
    assert steps(path) == expected and "not used" not in capsys.readouterr().out
    for array in (data[meaning], data[meaning] + 1.0):
        source = write(home / name, **data | {key: array})
        if array is data[meaning]:
            assert steps(foreign.converted(source, "robot")) == expected
        else:
            with pytest.raises(UserError, match=f"has {key} and another array for {meaning}, which differs: keep the"):
                foreign.converted(source, "robot")


@pytest.mark.parametrize(("name", "timeouts"), [("rows.hdf5", True), ("rows.npz", True), ("rows.npz", False)])
def test_arrays_that_are_not_used_are_named(home: Path, name: str, timeouts: bool, capsys: pytest.CaptureFixture):
    """Those with a row for each observation, in either layout. OGBench's own arrays are known."""
    data = rows() | dict(dones=rows()["timeouts"], episode_ids=np.arange(9) // 3, seed=np.zeros(1))
    if not timeouts:
        del data["timeouts"]
        data |= dict(terminals=np.arange(9) == 8, qpos=np.zeros((9, 2)), qvel=np.zeros((9, 2)))
    download.find_files("robot", write(home / name, **data), episodes=None)
    assert f"  not used: dones, episode_ids of {name} (docs/data.md" in capsys.readouterr().out
    download.find_files("robot", write(home / name, **{key: data[key] for key in data if key != "dones"}), episodes=7)
    assert "not used: episode_ids of" in capsys.readouterr().out
    del data["dones"], data["episode_ids"]
    download.find_files("robot", write(home / name, **data), episodes=None)
    assert "not used" not in capsys.readouterr().out


def test_next_observations_may_be_rounded_and_mean_nothing_after_an_end(home: Path):
    """Off by one place in the last digit, and NaN where nothing follows. Wrong if each row becomes a trajectory."""
    data = rows() | dict(observations=(np.arange(9)[:, None] / 3).astype(np.float32))
    after = np.nextafter(data["observations"] + np.float32(1 / 3), np.float32(9))
    after[2], after[5] = np.nan, 50  # after the one that ended, and after one that was cut
    path = foreign.converted(write(home / "rows.hdf5", **data, next_observations=after), "robot")
    arrays = files.read_arrays(path)
    assert len(steps(path)) == 9 and arrays["terminals"].sum() == 3 and np.isfinite(arrays["observations"]).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(next_observations=np.zeros((9, 2))), r"have \[1, 2\] columns"),
        (dict(observations=np.float32(3.0)), "observations in .* must be a 2-D array of numbers"),
        (dict(rewards=np.full(9, 1e300)), r"rewards of trajectory 0 of rows are not finite"),
        (dict(actions=np.full((9, 1), 1e300)), r"actions of trajectory 0 of rows are not finite"),
    ],
)
def test_more_that_d4rls_layout_cannot_be(home: Path, changes: dict, says: str):
    """The sentence is about the user's file, not about what it is converted to."""
    with pytest.raises(UserError, match=says):
        foreign.converted(write(home / "rows.hdf5", **rows() | changes), "robot")


def test_an_hdf5_of_another_ending_and_one_with_groups(home: Path):
    assert len(steps(foreign.converted(write(home / "ROWS.HDF5", **rows()), "robot"))) == 7
    with h5py.File(home / "groups.h5", "w") as file:
        file["observations/position"] = np.zeros((9, 1))
        file.update({key: array for key, array in rows().items() if key != "observations"})
    with pytest.raises(UserError, match=r"observations in .*groups\.h5 is a group of arrays"):
        foreign.converted(home / "groups.h5", "robot")


LAST = np.arange(9) == 8


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        (dict(timeouts=None), True),
        (dict(timeouts=np.zeros(9)), True),
        (dict(timeouts=np.zeros(9), terminals=np.zeros(9)), True),
        (dict(timeouts=np.zeros(9), terminals=LAST), True),
        (dict(timeouts=LAST, terminals=np.zeros(9)), True),
        (dict(timeouts=None, terminals=LAST, next_observations=np.arange(1.0, 10)[:, None]), True),
        (dict(timeouts=None, next_observations=np.arange(1.0, 10)[:, None]), False),
        (dict(timeouts=LAST), False),
        ({}, False),
    ],
)
def test_rows_that_do_not_say_where_they_were_cut(
    home: Path, changes: dict, warned: bool, capsys: pytest.CaptureFixture
):
    """No array, one that is false all over, or no end of any kind before the last row."""
    arrays = {key: array for key, array in (rows() | changes).items() if array is not None}
    foreign.converted(write(home / "rows.hdf5", **arrays), "robot")
    assert ("WARNING: nothing says where trajectories were cut" in capsys.readouterr().out) == warned


def test_next_observations_in_another_precision_are_the_same(home: Path):
    data = rows() | dict(observations=np.arange(9)[:, None] + 1 / 3)
    after = (data["observations"] + 1).astype(np.float32)
    after[5] = 50
    path = foreign.converted(write(home / "rows.hdf5", **data, next_observations=after), "robot")
    assert len(steps(path)) == 9 and files.read_arrays(path)["terminals"].sum() == 3


def test_no_other_way_reads_d4rls_layout_as_ours(home: Path):
    """In a folder, or as validation data of a file of ours."""
    (home / "folder").mkdir()
    for name in ("a", "b"):
        write(home / "folder" / f"{name}.npz", **rows())
    ours = {key: array for key, array in rows().items() if key != "timeouts"} | dict(terminals=np.arange(9) == 8)
    write(home / "ours-val.npz", **rows())
    for dataset in (home / "folder", write(home / "ours.npz", **ours)):
        with pytest.raises(UserError, match="has an array timeouts, which is D4RL's layout"):
            evor_bc.main(evor_bc.Args(env="robot", dataset=dataset, run_dir=home / "run"))


def test_what_is_missing_is_made_again(home: Path):
    source = write(home / "rows.hdf5", **rows(120))
    path = foreign.converted(source, "robot")
    for missing in (validation_path(path), path, path.with_suffix(".json")):
        missing.unlink()
        assert foreign.converted(source, "robot") == path and missing.is_file()


def test_a_trajectory_of_one_cut_step_is_counted(home: Path, capsys: pytest.CaptureFixture):
    data = rows()
    data["timeouts"][3] = True
    path = foreign.converted(write(home / "rows.hdf5", **data), "robot")
    assert steps(path) == {step(0), step(1), step(2, 0.0, 2), step(4), step(6), step(7)}
    assert "1 trajectories are left out: no transition is left of them" in capsys.readouterr().out


def test_actions_have_the_range_of_the_environment(home: Path, capsys: pytest.CaptureFixture):
    """Pendulum's torque is within [-2, 2]."""
    data = rows() | dict(actions=np.linspace(-2, 2, 9, dtype=np.float32)[:, None])
    path = foreign.converted(write(home / "rows.hdf5", **data), "Pendulum-v1")
    assert {action for _, action, *_ in steps(path)} == {-1.0, -0.75, -0.5, -0.25, 0.0, 0.5, 0.75}
    assert "actions within [-2.0] and [2.0] are scaled to [-1, 1]" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--env Hopper-v5 has 3 actions, and the data 1"):
        foreign.converted(home / "rows.hdf5", "Hopper-v5")


WILD = [-4.0, 1.0, -1.0, 2.0, 2.1, 0.0]


@pytest.mark.parametrize("name", ["rows.npz", "minari:toy/wild-v0"])
@pytest.mark.parametrize(
    ("torques", "says"),
    [
        (WILD, "WARNING: actions of 2 of 6 rows leave [-2.0] to [2.0] by up to 50.0% of this range: they are clipped"),
        ([4.0, 4.0, *WILD[:3], 2.1], "actions of 4 of 6 rows"),
    ],
)
def test_actions_that_an_environment_clips(
    home: Path, name: str, torques: list[float], says: str, capsys: pytest.CaptureFixture
):
    """Up to half of the rows are clipped, here to Pendulum's [-2, 2]; data of which more are beyond it are refused."""
    dataset, actions = Path(name), np.array(torques, np.float32)[:, None]
    if name == "rows.npz":
        arrays = {key: array[:6] for key, array in rows().items()} | dict(actions=actions, timeouts=np.zeros(6))
        dataset = write(home / name, **arrays | dict(terminals=np.arange(6) == 5))
    else:
        buffers = [dataclasses.replace(buffer(np.arange(7), True), actions=actions)]
        make("toy/wild-v0", buffers, action_space=spaces.Box(-2, 2, (1,), np.float32))
    if torques is WILD:
        path = foreign.converted(dataset, "Pendulum-v1")
        np.testing.assert_allclose(files.read_arrays(path)["actions"][:6, 0], [-1, 0.5, -0.5, 1, 1, 0])
        assert says in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=rf"{re.escape(says)}.*: scale or clip them"):
            foreign.converted(dataset, "Pendulum-v1")


def test_an_action_beyond_the_range_of_no_environment_is_refused(home: Path):
    actions = np.where(np.arange(9) == 4, 1.2, 0.1)[:, None]
    with pytest.raises(UserError, match=r"actions of 1 of 9 rows of rows leave \[-1\.0\] to \[1\.0\] by up to 10\.0%"):
        foreign.converted(write(home / "rows.hdf5", **rows() | dict(actions=actions)), "robot")


def test_a_twentieth_is_for_validation_and_a_conversion_is_made_once(home: Path, capsys: pytest.CaptureFixture):
    data = rows(120)
    source = write(home / "rows.hdf5", **data)
    path = foreign.converted(source, "robot")
    assert "2 of them are for validation" in capsys.readouterr().out
    assert len(steps(path)) == 38 * 2 + 1 and len(steps(validation_path(path))) == 2 * 2
    before = path.stat().st_mtime_ns
    assert foreign.converted(source, "robot") == path and path.stat().st_mtime_ns == before
    assert "2 of them are for validation" in capsys.readouterr().out  # said each time
    data["rewards"] += 1
    assert foreign.converted(write(source, **data), "robot") != path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(terminals=None), "no array 'terminals': D4RL's layout needs observations, actions, terminals"),
        (dict(observations=np.zeros(9)), r"observations in .* must be a 2-D array of numbers with 9 rows"),
        (dict(terminals=np.full(9, np.nan)), r"terminals in .* must be 0 or 1 everywhere"),
        (dict(timeouts=np.full(9, 2)), r"timeouts in .* must be 0 or 1 everywhere"),
        (dict(observations=np.full((9, 1), np.inf)), r"observations of trajectory 0 of rows are not finite"),
        (dict(actions=np.full((9, 1), 1.2)), r"actions of 9 of 9 rows of rows leave \[-1\.0\] to \[1\.0\] by"),
        (dict(timeouts=np.zeros(8)), r"timeouts in .* must be a 1-D array of numbers with 9 rows"),
        (dict(terminals=np.full(9, b"no")), r"terminals in .* must be a 1-D array of numbers"),
        (dict(next_observations=np.zeros((9, 1, 1))), r"next_observations in .* must be a 2-D array"),
        ({key: array[:0] for key, array in rows().items()}, "has no rows"),
    ],
)
def test_what_is_not_d4rls_layout(home: Path, changes: dict[str, Any], says: str):
    arrays = {key: array for key, array in (rows() | changes).items() if array is not None}
    with pytest.raises(UserError, match=says):
        foreign.converted(write(home / "rows.hdf5", **arrays), "robot")


def test_rewards_are_not_needed_for_behaviour_cloning(home: Path):
    """Ends of trajectories in `timeouts`, one `terminals` at the file's end: four transitions of each five rows, and
    none of the 99 that would lead from one trajectory into the next."""
    count = np.arange(500)
    arrays = dict(observations=(count % 5)[:, None], actions=np.zeros((500, 1)), terminals=count == 499)
    path = write(home / "rows.npz", **arrays, timeouts=count % 5 == 4)
    data = files.load_trajectories(foreign.converted(path, "robot"), env="robot")
    starts = transitions.transition_starts(data.terminals, 1)
    ends = data.observations[starts + 1, 0] - data.observations[starts, 0]
    assert len(starts) == 4 * 95 and set(ends.tolist()) == {1.0}
    with pytest.raises(UserError, match="has no array 'rewards'"):
        files.load_trajectories(foreign.converted(path, "robot"), env="robot", tasks=(0,))


CAUSES = [
    (PermissionError(errno.EACCES, "Permission denied"), "change its permissions"),
    (OSError(errno.EMFILE, "Too many open files"), "raise the limit of open files"),
    (BlockingIOError(errno.EAGAIN, "unable to lock file"), "wait until the process that writes it has closed it"),
    (OSError(errno.EIO, "Input/output error"), "see that it is still there and that its disk works"),
    (MemoryError(), "free some memory"),
    (OSError(errno.EINVAL, "Invalid argument"), "anew|numpy.savez"),
    (ValueError("no array"), "anew|numpy.savez"),
]


@pytest.mark.parametrize("read", ["read_d4rl", "hdf5", "read_headers", "read_terminals", "fingerprint"])
@pytest.mark.parametrize(("error", "remedy"), CAUSES, ids=[repr(error) for error, _ in CAUSES])
def test_the_cause_is_of_the_file_only_where_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, read: str, error: Exception, remedy: str
):
    """Fails if a whole file is to be made anew, since the system refuses it."""
    path = write(home / ("rows.hdf5" if read == "hdf5" else "rows.npz"), **rows())
    function = {
        "read_headers": files.read_headers, "read_terminals": files.read_terminals, "fingerprint": download.fingerprint
    }.get(read, foreign.read_d4rl)  # fmt: skip
    for module, name in ((h5py, "File"), (np, "load"), (zipfile, "ZipFile")):
        monkeypatch.setattr(module, name, mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=rf"{path.name} cannot be read \(.+\): .*({remedy})"):
        function(path)


def test_files_that_are_none(home: Path):
    with pytest.raises(UserError, match="there is no dataset file at"):
        foreign.converted(home / "none.hdf5", "robot")
    (home / "text.hdf5").write_text("text")
    with pytest.raises(UserError, match=r"text\.hdf5 cannot be read"):
        foreign.converted(home / "text.hdf5", "robot")
    assert not foreign.is_foreign(write(home / "ours.npz", observations=np.zeros((2, 1))))


def buffer(numbers: np.ndarray, ended: bool, observations: Any = None) -> EpisodeBuffer:
    """Steps with the observations of `numbers`, actions and rewards as in `rows`."""
    observed = numbers[:, None].astype(np.float32) if observations is None else observations
    here = numbers[:-1]
    last = np.arange(len(here)) == len(here) - 1
    return EpisodeBuffer(
        observations=observed,
        actions=here[:, None].astype(np.float32) / 10,
        rewards=here.astype(np.float32),
        terminations=last & ended,
        truncations=last & (not ended),
        infos={},
    )


def make(name: str, buffers: list[EpisodeBuffer], observation: spaces.Space | None = None, **changes: Any) -> None:
    settings = dict(
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        observation_space=observation or spaces.Box(-np.inf, np.inf, (1,), np.float32),
    )
    with pytest.warns(UserWarning):  # no author, no code
        minari.create_dataset_from_buffers(name, buffers, **settings | changes)


def test_minari_keeps_every_transition(home: Path):
    make("toy/steps-v0", [buffer(np.arange(0, 4), True), buffer(np.arange(4, 7), False)])
    path, source = download.find_files("robot", Path("minari:toy/steps-v0"), episodes=None)
    assert source == "minari" and path.name.startswith("toy-steps-v0-")
    assert steps(path) == {step(0), step(1), step(2, 0.0), step(4), step(5)}
    info = download.describe(path, source)
    assert info["source"] == "minari" and info["name"] == path.name


def test_an_environment_of_other_settings(home: Path, capsys: pytest.CaptureFixture):
    """It is made as the dataset says, and only where it is the environment of the evaluation."""
    spec = gymnasium.make("Pendulum-v1", g=5.0, max_episode_steps=50).spec
    make("toy/slow-v0", [buffer(np.arange(4), True)], env=spec)
    path = foreign.converted(Path("minari:toy/slow-v0"), "Pendulum-v1")
    assert "Pendulum-v1 is made with {'g': 5.0, 'max_episode_steps': 50}" in capsys.readouterr().out
    info = download.describe(path, "minari")
    assert info["converted_from"] == "toy/slow-v0"
    settings = environments.settings_of(info, "Pendulum-v1")
    assert settings == {"g": 5.0, "max_episode_steps": 50} and environments.settings_of(info, "Hopper-v5") == {}
    assert environments.make_env("Pendulum-v1", **settings).unwrapped.g == 5.0
    make("toy/plain-v0", [buffer(np.arange(4), True)], env=spec, eval_env="Pendulum-v1")
    plain = foreign.converted(Path("minari:toy/plain-v0"), "Pendulum-v1")
    assert "settings" not in download.describe(plain, "minari")
    assert foreign.environment_of("cube-double-play", Path("minari:toy/slow-v0")) == "Pendulum-v1"
    assert foreign.environment_of("mine", Path("minari:toy/slow-v0")) == "mine"


def test_wrappers_of_an_environment_are_not_forgotten(home: Path, capsys: pytest.CaptureFixture):
    """The default environment is refused, which would be without them; one that is named is taken with a warning."""
    spec = gymnasium.wrappers.TimeAwareObservation(gymnasium.make("Pendulum-v1")).spec
    make("toy/wrapped-v0", [buffer(np.arange(4), True)], env=spec)
    with pytest.raises(UserError, match=r"made in Pendulum-v1 within TimeAwareObservation: register an environment"):
        foreign.environment_of("cube-double-play", Path("minari:toy/wrapped-v0"))
    foreign.converted(Path("minari:toy/wrapped-v0"), "Pendulum-v1")
    assert "WARNING: made in Pendulum-v1 within TimeAwareObservation, which is not there" in capsys.readouterr().out


def test_wrappers_that_change_nothing_are_no_obstacle(home: Path, capsys: pytest.CaptureFixture):
    """A time limit that a wrapper sets is kept."""
    env = gymnasium.wrappers.TimeLimit(gymnasium.make("Pendulum-v1"), 7)
    make("toy/counted-v0", [buffer(np.arange(4), True)], env=gymnasium.wrappers.RecordEpisodeStatistics(env).spec)
    dataset = Path("minari:toy/counted-v0")
    assert foreign.environment_of("cube-double-play", dataset) == "Pendulum-v1"
    foreign.converted(dataset, "Pendulum-v1")
    said = capsys.readouterr().out
    assert "WARNING" not in said and "Pendulum-v1 is made with {'max_episode_steps': 7}" in said


@pytest.mark.parametrize("scores", [(-5.0, -5.0), (0.0, np.nan)])
def test_reference_scores_that_are_none(home: Path, scores: tuple[float, float], capsys: pytest.CaptureFixture):
    reference = dict(ref_min_score=scores[0], ref_max_score=scores[1])
    make("toy/scores-v0", [buffer(np.arange(4), True)], env="Pendulum-v1", **reference)
    path = foreign.converted(Path("minari:toy/scores-v0"), "robot")
    assert "reference" not in download.describe(path, "minari")
    assert "no normalised score" in capsys.readouterr().out


def test_minaris_actions_and_dictionaries(home: Path):
    """Keys in alphabetical order, whatever the order in the environment; the range of the actions becomes [-1, 1]."""
    space = spaces.Dict(position=spaces.Box(-9, 9, (1, 2)), angle=spaces.Box(-9, 9, (1,)))
    values = np.arange(4, dtype=np.float32)
    observed = dict(position=np.stack([values, values + 10], axis=1)[:, None], angle=values[:, None] + 100)
    action_space = spaces.Box(0, 4, (1,), np.float32)
    make("toy/dict-v0", [buffer(np.arange(4), True, observed)], space, action_space=action_space)
    data = files.load_trajectories(foreign.converted(Path("minari:toy/dict-v0"), "robot"), env="robot", tasks=(0,))
    np.testing.assert_array_equal(data.observations[2], [102.0, 2.0, 12.0])
    np.testing.assert_allclose(data.actions[:, 0], [-1.0, -0.95, -0.9, -0.9], rtol=1e-6)


LARGEST = np.finfo(np.float32).max


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (dict(action_space=spaces.Discrete(3)), "actions of the kind Discrete"),
        (dict(action_space=spaces.Box(0, 9, (1,), np.int32)), "actions that are no bounded vector"),
        (dict(action_space=spaces.Box(np.array([-1, 0]), np.array([1, 0]))), "actions that are no bounded vector"),
        (dict(action_space=spaces.Box(-1, 1, (1, 2))), "actions that are no bounded vector"),
        (dict(action_space=spaces.Box(-np.inf, np.inf, (1,))), "actions that are no bounded vector"),
        (
            dict(action_space=spaces.Box(-LARGEST, LARGEST, (1,))),
            "actions that are no bounded vector .*cannot be scaled",
        ),
        (dict(action_space=spaces.Box(-1.7e308, 1.7e308, (1,), np.float64)), "actions that are no bounded vector"),
        (dict(observation_space=spaces.Discrete(3)), "observations with the kind Discrete"),
        (dict(observation_space=spaces.Box(0, 255, (8, 8, 3), np.uint8)), "observations with images"),
    ],
)
def test_minari_spaces_that_no_network_here_takes(space: dict[str, spaces.Space], says: str):
    actions = space.get("action_space", spaces.Box(-1, 1, (1,)))
    observations = space.get("observation_space", spaces.Box(-1, 1, (1,)))
    with pytest.raises(UserError, match=says):
        action_range(actions, "toy")
        flat(observations, np.zeros((2, *observations.shape)), "toy", batched=True)


def test_a_minari_dataset_without_a_version():
    with pytest.raises(UserError, match=r"outside/pendulum has no version: write minari:NAME-vN, such as minari:out"):
        foreign.converted(Path("minari:outside/pendulum"), "robot")


def test_a_minari_dataset_that_is_nowhere(monkeypatch: pytest.MonkeyPatch):
    def nowhere(*_: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: nowhere())
    with pytest.raises(UserError, match=r"minari:toy/none-v0 is not in Minari's folder .* \(no network\)"):
        foreign.converted(Path("minari:toy/none-v0"), "robot")


@pytest.mark.parametrize(
    ("error", "allowed", "says"),
    [
        (PermissionError(13, "Permission denied"), True, r"minari:toy/a-v0 .*denied\): change its permissions"),
        (ConnectionError(), False, r"minari/toy/a-v0 .*\(ConnectionError\(\)\): change its permissions"),
        (ValueError("no data"), True, r"minari/toy/a-v0 .*\(no data\): delete it, and it will be downloaded anew"),
    ],
)
def test_a_minari_dataset_that_is_here_and_cannot_be_read(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, allowed: bool, says: str
):
    make("toy/a-v0", [buffer(np.arange(4), True)])
    monkeypatch.setattr(minari, "load_dataset", mock.Mock(side_effect=error))
    monkeypatch.setattr(foreign.os, "access", lambda *_: allowed)
    with pytest.raises(UserError, match=says):
        foreign.converted(Path("minari:toy/a-v0"), "robot")


@pytest.mark.parametrize("package", ["h5py", "minari"])
@pytest.mark.parametrize("error", ["ImportError", "ValueError", "AttributeError"])
def test_a_package_that_cannot_be_imported(home: Path, monkeypatch: pytest.MonkeyPatch, package: str, error: str):
    """Missing, or made for another version of NumPy."""
    (home / f"{package}.py").write_text(f"raise {error}('no binary')")
    dataset = Path("minari:toy/none-v0") if package == "minari" else write(home / "rows.hdf5", **rows())
    monkeypatch.syspath_prepend(home)
    monkeypatch.delitem(sys.modules, package)
    with pytest.raises(
        UserError, match=rf"(?i)needs {package} \(no binary\): pip install --upgrade '?{package}"
    ) as caught:
        foreign.converted(dataset, "robot")
    assert "anew" not in str(caught.value)


def test_minari_is_optional(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"needs Minari .*pip install --upgrade 'minari\[hdf5\]'"):
        foreign.converted(Path("minari:toy/none-v0"), "robot")


def test_nested_observations_as_rows():
    space = spaces.Dict(b=spaces.Box(0, 1, (2,)), a=spaces.Tuple([spaces.Box(0, 1, (1,)), spaces.Box(0, 1, (1, 2))]))
    values = dict(b=np.array([[4, 5], [14, 15]]), a=(np.array([[1], [11]]), np.array([[[2, 3]], [[12, 13]]])))
    rows = flat(space, values, "toy", batched=True)
    np.testing.assert_array_equal(rows, [[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    one = dict(b=np.array([4, 5]), a=(np.array([1]), np.array([[2, 3]])))
    np.testing.assert_array_equal(flat(space, one, "toy", batched=False), [1, 2, 3, 4, 5])


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of what a description could say
def test_the_dataset_of_pendulum(home: Path):
    """The controller alone brings the pole up and holds it, mostly at more than -300. A dataset is made once, and is
    the one that `--dataset minari:evor/pendulum-v0` names."""
    env, totals = gymnasium.make("Pendulum-v1"), []
    for seed in range(5):
        observation, total, done = env.reset(seed=seed)[0], 0.0, False
        while not done:
            torque = np.clip([gym_data.pendulum_torque(observation)], -2, 2).astype(np.float32)
            observation, reward, _, done, _ = env.step(torque)
            total += reward
        totals.append(total)
    assert np.median(totals) > -300
    args = gym_data.Args(episodes=20, out=home / "made.json")
    made = gym_data.main(args)
    low, _, middle, _, high = made["return_quantiles"]
    assert made["episodes"] == 20 and -1_900 < low < middle < high < 0 and high > -400
    data = files.load_trajectories(
        foreign.converted(Path(f"minari:{made['dataset']}"), "Pendulum-v1"), env="", tasks=(0,)
    )
    assert data.observations.shape == (19 * 201, 3) and abs(data.actions).max() == 1.0 and (data.masks == 1).all()
    with pytest.raises(UserError, match="evor/pendulum-v0 stands already"):
        gym_data.main(args)
