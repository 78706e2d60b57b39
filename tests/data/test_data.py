"""Names, files, transitions, returns and rewards, against slow loops and OGBench's own functions."""

import functools
import io
import itertools
import subprocess
import sys
import zipfile
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evor_value
from common.data import describe, download, files, names, transitions
from common.data.collect import collect
from common.errors import UserError
from common.problem import ValueProblem
from tests.helpers import mostly_slow, tiny_dataset

ROOT = Path(__file__).parents[2]

# --- Names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "short", "prefix", "task"),
    [
        ("cube-double-play", "cube-double-play", "cube-double", 2),
        ("cube-double-play-v0", "cube-double-play", "cube-double", 2),
        ("cube-double-play-singletask-v0", "cube-double-play", "cube-double", 2),
        ("cube-double-play-singletask-task5-v0", "cube-double-play", "cube-double", 5),
        ("puzzle-4x4-noisy", "puzzle-4x4-noisy", "puzzle-4x4", 4),
        ("scene-play", "scene-play", "scene", 2),
        ("antmaze-teleport-stitch-v0", "antmaze-teleport-stitch", "antmaze-teleport", 1),
        ("antsoccer-arena-navigate-singletask-task1-v0", "antsoccer-arena-navigate", "antsoccer-arena", 1),
        ("antmaze-medium-explore", "antmaze-medium-explore", "antmaze-medium", 1),
    ],
)
def test_parse_env(env: str, short: str, prefix: str, task: int):
    name = names.parse_env(env)
    assert (name.short, name.dataset, name.prefix, name.default_task) == (short, f"{short}-v0", prefix, task)
    assert name.gym_id(3) == f"{prefix}-singletask-task3-v0"


@pytest.mark.parametrize(
    "env", ["", "nonsense", "cube-double", "cube-double-v0", "play", "Cube-Double-play", "../a-play"]
)
def test_parse_env_refuses_names_without_a_kind_of_data(env: str):
    with pytest.raises(UserError, match=r"unknown environment .*such as cube-double-play"):
        names.parse_env(env)


@pytest.mark.parametrize("task", [0, 6, 17])
def test_parse_env_refuses_tasks_that_do_not_exist(task: int):
    with pytest.raises(UserError, match=f"task {task} .* tasks 1 to 5"):
        names.parse_env(f"cube-double-play-singletask-task{task}-v0")


@pytest.mark.parametrize(
    "prefix",
    "cube-single cube-double scene puzzle-3x3 puzzle-4x4 puzzle-4x5 puzzle-4x6 pointmaze-large antsoccer-arena".split(),
)
def test_default_task_is_ogbenchs(prefix: str):
    """OGBench resolves the single-task environment without a number to its default task."""
    names.import_ogbench()
    env = gymnasium.make(f"{prefix}-singletask-v0")
    env.reset()
    assert names.parse_env(f"{prefix}-play").default_task == env.unwrapped._reward_task_id
    env.close()


def test_check_env_lists_what_is_installed():
    names.check_env(names.parse_env("cube-triple-play"))
    with pytest.raises(UserError, match=r"unknown environment 'cube-septuple-play'.*cube-double.*puzzle-3x3"):
        names.check_env(names.parse_env("cube-septuple-play"))


def test_run_name():
    assert names.run_name("cube-double-play-singletask-task2-v0", None) == "cube-double-play"
    assert names.run_name("my_robot.v2", Path("data.npz")) == "my_robot.v2"
    for bad in ("../escape", "", ".hidden", "two words"):
        with pytest.raises(UserError, match="use letters"):
            names.run_name(bad, Path("data.npz"))
    for env, name in (("Hopper-v5", "Hopper-v5"), ("my.module:team/Robot-v0", "team-Robot-v0")):
        assert names.run_name(env) == names.run_name(env, Path("data.npz")) == name
    with pytest.raises(UserError, match="bring data with --dataset"):
        names.run_name("my_robot.v2")


# --- Reading -----------------------------------------------------------------------------------------------------


def write(path: Path, **changes) -> Path:
    """A file of two trajectories of three rows with own rewards and masks; None leaves an array out."""
    arrays = dict(
        observations=np.zeros((6, 2), np.float32),
        actions=np.zeros((6, 1), np.float32),
        terminals=np.array([0, 0, 1, 0, 0, 1], bool),
        rewards=np.zeros(6, np.float32),
        masks=np.ones(6, np.float32),
    )
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def with_value(shape: tuple[int, ...], index: int, value: float) -> np.ndarray:
    array = np.zeros(shape, np.float32)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(observations=None), ["'observations'", "needs observations, actions and terminals"]),
        (dict(actions=None), ["'actions'", "needs observations, actions and terminals"]),
        (dict(terminals=None), ["'terminals'", "needs observations, actions and terminals"]),
        (dict(observations=np.zeros((6, 2, 2), np.float32)), ["observations", "must be a 2-D array", "(6, 2, 2)"]),
        (dict(actions=np.zeros(6, np.float32)), ["actions", "must be a 2-D array", "(6,)"]),
        (dict(terminals=np.ones((6, 1), bool)), ["terminals", "must be a 1-D array", "(6, 1)"]),
        (dict(rewards=np.zeros((6, 1), np.float32)), ["rewards", "must be a 1-D array", "(6, 1)"]),
        (dict(actions=np.full((6, 1), "left")), ["actions", "must be a 2-D array of numbers", "<U4"]),
        (dict(actions=np.zeros((6, 1), np.complex64)), ["actions", "array of numbers", "complex64"]),
        (dict(actions=np.zeros((6, 0), np.float32)), ["actions", "(6, 0)"]),
        (dict(observations=np.zeros((6, 0), np.float32)), ["observations", "(6, 0)"]),
        (dict(actions=np.zeros((5, 1), np.float32)), ["actions", "5 rows", "6", "must be equal"]),
        (dict(masks=np.ones(7, np.float32)), ["masks", "7 rows", "6", "must be equal"]),
        (dict(observations=with_value((6, 2), 4, np.nan)), ["observations", "row 4", "remove or repair"]),
        (dict(actions=with_value((6, 1), 3, -np.inf)), ["actions", "row 3", "remove or repair"]),
        (dict(rewards=with_value((6,), 5, np.nan)), ["rewards", "row 5", "remove or repair"]),
        (dict(terminals=np.zeros(6, bool)), ["terminals", "must be true at the last row"]),
        (dict(terminals=np.array([0, 0, 1, 0, 1, 0], bool)), ["terminals", "must be true at the last row"]),
        (dict(actions=with_value((6, 1), 2, -1.5)), ["actions", "leave [-1, 1]", "scale"]),
        (dict(masks=with_value((6,), 2, 0.5)), ["masks", "must be 0", "or 1"]),
        (dict(terminals=np.array([0, 0, 1, 0, 0.5, 1])), ["terminals", "row 4", "0 or 1"]),
        (dict(observations=np.full((6, 2), 1e39)), ["observations", "row 0", "not finite"]),
        (dict(qpos=np.zeros(6)), ["qpos", "must be a 2-D array", "(6,)"]),
        (dict(terminals=np.ones(6, bool)), ["terminals", "true everywhere", "no transition"]),
        (dict(observations=np.full((6, 2), np.inf, np.float16)), ["observations", "row 0", "not finite"]),
        (dict(actions=np.full((6, 1), -128, np.int8)), ["actions", "row 0", "leave [-1, 1]"]),
    ],
)
def test_read_arrays_names_the_array_and_the_remedy(tmp_path: Path, changes: dict, words: list[str]):
    with pytest.raises(UserError) as error:
        files.read_arrays(write(tmp_path / "data.npz", **changes))
    assert all(word in str(error.value) for word in ["data.npz", *words]), str(error.value)


def test_objects_are_never_unpickled(tmp_path: Path):
    """Unpickling runs code of the file's choosing: this one would leave a file behind."""
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trace,))

    path = write(tmp_path / "data.npz", actions=np.array([[Trap()]] * 6, object))
    with pytest.raises(UserError, match=r"actions in .* is an array of objects, which is never unpickled"):
        files.read_arrays(path)
    assert not trace.exists()


@pytest.mark.parametrize("key", ["rewards", "masks", "qpos", "button_states"])
def test_read_arrays_skips_what_is_not_needed(tmp_path: Path, key: str):
    """A broken array that nobody asked for is no reason to refuse a file; one that is asked for is."""
    path = write(tmp_path / "data.npz", **{key: np.full((6, 1, 1), np.nan)})
    with pytest.raises(UserError, match=key):
        files.read_arrays(path)
    assert key not in files.read_arrays(path, skip=(key,))


def test_read_arrays_ignores_arrays_it_does_not_know(tmp_path: Path):
    path = write(tmp_path / "data.npz", infos=np.array([None]), qvel=np.full(3, np.nan))
    assert files.read_arrays(path).keys() == {"observations", "actions", "terminals", "rewards", "masks"}


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """64 MiB of zeros in 64 kB; fails if they are unpacked, which the archive would then have to survive."""
    path = tmp_path / "bomb.npz"
    np.savez_compressed(path, observations=np.zeros((2**21, 4)), actions=np.zeros((6, 1)), terminals=np.ones(6))
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(files, "free_memory", lambda: 2**26)
    monkeypatch.setattr(files.np, "load", None)
    with pytest.raises(UserError, match=r"takes 0\.0625 GiB once unpacked, and 0\.0625 GiB of memory are free: split"):
        files.read_arrays(path)


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path):
    """NumPy allocates what the header of an array says before it reads any of it."""
    path, header = tmp_path / "data.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12, 37)})
    write(tmp_path / "good.npz")
    with zipfile.ZipFile(tmp_path / "good.npz") as good, zipfile.ZipFile(path, "w") as archive:
        for name in good.namelist():
            archive.writestr(name, header.getvalue() + b"0" * 64 if name == "observations.npy" else good.read(name))
    with pytest.raises(UserError, match=r"observations in .*its header promises 148,000,000,000,000 bytes"):
        files.read_arrays(path)


def test_read_arrays_refuses_what_is_no_npz_file(tmp_path: Path):
    """Fails if reading one of them raises anything but a UserError."""
    text, empty, single = tmp_path / "text.npz", tmp_path / "empty.npz", tmp_path / "single.npy"
    text.write_text("observations,actions\n0,0\n")
    empty.touch()
    np.save(single, np.zeros((6, 2)))
    for path in (text, empty, single):
        with pytest.raises(UserError, match=rf"{path.name} cannot be read.*numpy\.savez"):
            files.read_arrays(path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # NumPy's, where the archive itself is damaged
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_read_arrays_refuses_a_damaged_file(tmp_path: Path, save):
    """Every third byte in turn: fails if reading raises anything but a UserError, wherever the damage is."""
    path = tmp_path / "data.npz"
    rng = np.random.default_rng(0)
    save(path, observations=rng.normal(size=(6, 2)), actions=np.zeros((6, 1)), terminals=np.arange(6) == 5)
    good, refused = path.read_bytes(), 0
    for i in range(0, len(good), 3):
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x55]) + good[i + 1 :])
        try:
            files.read_arrays(path)
        except UserError:
            refused += 1
    assert refused > len(good) // 12
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        files.read_arrays(path)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(["observations", "actions", "terminals", "rewards", "masks", "qpos"]),
        st.one_of(
            st.none(),
            st.tuples(
                st.sampled_from(["f2", "f4", "f8", "i4", "u1", "?", "c8", "U3", "O", "M8[s]", "V4"]),
                st.lists(st.integers(0, 7), max_size=3).map(tuple),
            ),
            st.tuples(
                st.integers(0, 5),
                st.sampled_from([np.nan, np.inf, -np.inf, 1.0, 2.0, -1.5, -128, 1e39, 0.5]),
                st.sampled_from(["f2", "f4", "f8", "i1", "?"]),
            ),
            st.tuples(st.just("?"), st.just((6,)), st.just(1)),
        ),
        max_size=3,
    ),
    compressed=st.booleans(),
    tail=st.one_of(st.none(), st.integers(0, 200)),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=3),
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # NumPy's, where the archive itself is damaged
@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's, of a flipped bit in a name
def test_no_file_brings_a_traceback(tmp_path: Path, changes: dict, compressed: bool, tail: int | None, flips: list):
    """Arrays left out, of other types and shapes, with other values; the archive cut, and bytes of it flipped.

    Whatever the file, the user gets trajectories that keep the contract, or one sentence.
    """
    arrays = dict(
        observations=np.zeros((6, 2), np.float32),
        actions=np.zeros((6, 1), np.float32),
        terminals=np.array([0, 0, 1, 0, 0, 1], bool),
        rewards=np.zeros(6, np.float32),
        masks=np.ones(6, np.float32),
    )
    for key, change in changes.items():
        if change is None:
            arrays.pop(key, None)
        elif isinstance(change[0], str):
            arrays[key] = np.zeros(change[1], change[0]) if len(change) == 2 else np.ones(change[1], change[0])
        else:
            array = np.array(arrays.get(key, np.zeros((6, 3))), change[2])
            with np.errstate(all="ignore"):
                array[change[0]] = np.array(change[1]).astype(change[2])
            arrays[key] = array
    path = tmp_path / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    content = bytearray(path.read_bytes())
    for place, value in flips:
        content[int(place * (len(content) - 1))] ^= value
    path.write_bytes(content if tail is None else content[: max(0, len(content) - tail)])
    try:
        found = files.load_trajectories(path, env="my-robot", tasks=(0,))
        describe.measure(found, (0,), (0.9,))
        describe.print_summary(found, download.describe(path, "file"), tasks=(0,), discount=0.9)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error).replace(str(path), "")
        return
    assert np.isfinite(found.observations).all() and found.observations.dtype == np.float32
    assert np.abs(found.actions).max() <= 1.0 and found.terminals[-1] and np.isfinite(found.rewards).all()
    assert len(found.observations) == len(found.actions) == len(found.terminals) == found.masks.shape[1]
    assert set(np.unique(found.masks)) <= {0.0, 1.0}


MEMORY = """
import contextlib
import sys
from pathlib import Path
from common.data import files

def memory(what):
    return int(Path("/proc/self/status").read_text().split(what)[1].split()[0]) * 1024

path, tasks = Path(sys.argv[1]), tuple(map(int, sys.argv[2:]))
with contextlib.ExitStack() as stack:
    if tasks:  # the environment is there before: it takes 200 MB whatever the data
        simulator = stack.enter_context(files._simulator(path, "cube-double-play"))
        simulator.reset()
        files._simulator = lambda path, env: contextlib.nullcontext(simulator)
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    found = files.load_trajectories(path, env="cube-double-play", tasks=tasks)
    print(memory("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("tasks", [(), (2,)])
def test_loading_takes_at_most_half_more_than_the_arrays(tmp_path: Path, tasks: tuple[int, ...]):
    """A 1M x 37 dataset; with a task, the joint positions (1M x 28) are needed as well, and rewards and masks."""
    path, rows = tmp_path / "data.npz", 1_000_000
    qpos = np.zeros((rows, 28), np.float32)
    np.savez(
        path, observations=np.zeros((rows, 37), np.float32), actions=np.resize(np.float32([-1, 1]), (rows, 5)),
        terminals=np.arange(rows) % 1000 == 999, qpos=qpos, qvel=qpos[:, :26],
    )  # fmt: skip
    size = rows * (4 * (37 + 5) + 1 + (4 * (28 + 2) if tasks else 0))
    command = [sys.executable, "-c", MEMORY, str(path), *map(str, tasks)]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    assert 0.8 * size < taken < 1.5 * size, taken / size


def test_load_trajectories_takes_own_rewards_and_masks_as_they_are(tmp_path: Path):
    rewards = np.array([0.5, -2.0, 7.0, 0.0, 1.0, 3.0])
    masks = np.array([1, 0, 1, 1, 0, 1])
    path = write(tmp_path / "data.npz", rewards=rewards, masks=masks)
    found = files.load_trajectories(path, env="my-robot", tasks=(0,))
    np.testing.assert_array_equal(found.rewards, rewards[None])
    np.testing.assert_array_equal(found.masks, masks[None])
    assert found.rewards.dtype == found.masks.dtype == np.float32
    assert files.has_rewards(path)
    assert not files.has_rewards(write(path, rewards=None))


def test_terminals_never_become_a_mask(tmp_path: Path):
    path = write(tmp_path / "data.npz", masks=None)
    found = files.load_trajectories(path, env="my-robot", tasks=(0,))
    assert found.terminals.tolist() == [False, False, True, False, False, True]
    np.testing.assert_array_equal(found.masks, np.ones((1, 6)))


def test_load_trajectories_without_tasks_reads_no_rewards(tmp_path: Path):
    found = files.load_trajectories(write(tmp_path / "data.npz", rewards=None, masks=None), env="my-robot")
    assert found.rewards is None and found.masks is None


def test_load_trajectories_converts_and_clips(tmp_path: Path):
    """The rounding of stored actions may leave [-1, 1] by a hair; observations come as float32 whatever they were."""
    path = write(
        tmp_path / "data.npz",
        observations=np.arange(12).reshape(6, 2),
        actions=np.full((6, 1), 1.0005),
        terminals=np.array([0, 0, 1, 0, 0, 1], np.float32),
    )
    found = files.load_trajectories(path, env="my-robot")
    assert found.observations.dtype == found.actions.dtype == np.float32 and found.terminals.dtype == bool
    np.testing.assert_array_equal(found.observations, np.arange(12).reshape(6, 2))
    assert found.actions.max() == 1.0


def test_sparse_rewards_of_ones_own_follow_the_masks(tmp_path: Path):
    """`sparse` is -1 until the task is solved, whatever the rewards are: +1 at success must not turn into -1."""
    rewards, masks = np.array([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]), np.array([1, 0, 1, 1, 1, 1])
    path = write(tmp_path / "data.npz", rewards=rewards, masks=masks)
    found = files.load_trajectories(path, env="my-robot", tasks=(0,), reward="sparse")
    np.testing.assert_array_equal(found.rewards, [[-1, 0, -1, -1, -1, -1]])


def test_own_rewards_that_are_missing_are_a_users_mistake(tmp_path: Path):
    """A validation file beside a file with rewards may lack them."""
    with pytest.raises(UserError, match="rewards"):
        files.load_trajectories(write(tmp_path / "data.npz", rewards=None), env="my-robot", tasks=(0,))


# --- All environments --------------------------------------------------------------------------------------------


def test_the_table_has_the_environments_that_are_installed():
    """But for one that OGBench registers and that cannot be built: no maze of the humanoid has teleports."""
    names.import_ogbench()
    ids = [i for i in gymnasium.registry if "-singletask-task1-" in i and not i.startswith("visual-")]
    assert {i.removesuffix("-singletask-task1-v0") for i in ids} - {"humanoidmaze-teleport"} == set(names.ENVIRONMENTS)


@pytest.mark.parametrize("prefix", mostly_slow(names.ENVIRONMENTS, but=["pointmaze-medium", "scene"]))
def test_every_environment_relabels_data_for_its_five_tasks(tmp_path: Path, prefix: str):
    """Three rows of the environment's own initial states; fails where an environment, its numbers in the table or its
    reward differ from OGBench's, computed here from one state at a time."""
    names.import_ogbench()
    about = names.ENVIRONMENTS[prefix]
    path = tmp_path / "data.npz"
    env_name = f"{prefix}-{about.kinds[0]}"
    rows = []
    for task in range(1, 6):
        env = gymnasium.make(names.parse_env(env_name).gym_id(task))
        observation, _ = env.reset(seed=0)
        inner = env.unwrapped
        assert observation.shape == env.observation_space.shape == (about.observations,)
        assert env.action_space.shape == (about.actions,) and inner.num_tasks == 5
        assert env.spec.max_episode_steps == about.episode_steps
        row = dict(observations=observation, qpos=inner.data.qpos.copy())
        if hasattr(inner, "_cur_button_states"):
            row["button_states"] = inner._cur_button_states.copy()
        _, reward, *_ = env.step(np.zeros(about.actions))
        rows.append(row | {"reward": reward})
        env.close()
    columns = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key != "reward"}
    actions, terminals = np.zeros((5, about.actions), np.float32), np.arange(5) == 4
    np.savez(path, actions=actions, terminals=terminals, **columns)
    found = files.load_trajectories(path, env=env_name, tasks=(1, 2, 3, 4, 5))
    assert found.rewards.shape == found.masks.shape == (5, 5)
    assert set(np.unique(found.rewards)) <= set(range(about.lowest_reward, 1))
    np.testing.assert_array_equal(found.masks == 0, found.rewards == 0)
    # OGBench's single tasks reward the state in which an action is taken: the initial state of each task.
    np.testing.assert_array_equal(np.diag(found.rewards), [row["reward"] for row in rows])
    assert (np.diag(found.masks) == 1).all()


def test_states_of_another_environment_are_refused(tmp_path: Path):
    """A maze's reward looks at two columns, which every robot has."""
    path = write(tmp_path / "data.npz", rewards=None, masks=None, qpos=np.zeros((6, 28), np.float32))
    with pytest.raises(UserError, match=r"does not hold states of antmaze-.*qpos has 28 columns instead of 15"):
        files.load_trajectories(path, env="antmaze-large-navigate", tasks=(1,))
    write(path, rewards=None, masks=None, qpos=np.zeros((6, 23), np.float32))
    with pytest.raises(UserError, match=r"does not hold states of puzzle-3x3.*button_states"):
        files.load_trajectories(path, env="puzzle-3x3-play", tasks=(4,))


# --- OGBench's rewards -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["cube-single", "cube-double"])
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny collected file in which every task is solved at row 5, and all but its last cube at row 7."""
    path = tmp_path_factory.mktemp(request.param) / "data.npz"
    collect(f"{request.param}-play-v0", path, episodes=1, rows=40, workers=1)
    arrays = dict(np.load(path))
    names.import_ogbench()
    env = gymnasium.make(f"{request.param}-singletask-task2-v0")
    goals = env.unwrapped.task_infos[1]["goal_xyzs"]
    env.close()
    above = np.array([0.0, 0.0, 0.3])
    for i, goal in enumerate(goals):
        columns = slice(14 + 7 * i, 14 + 7 * i + 3)
        arrays["qpos"][5, columns] = goal + np.array([0.03, 0.0, 0.0])  # within the tolerance of 0.04
        arrays["qpos"][7, columns] = goal + (above if i == len(goals) - 1 else 0.0)
        arrays["qpos"][9, columns] = goal + above
    np.savez(path, **arrays)
    return request.param, path


def test_rewards_equal_ogbenchs(collected: tuple[str, Path]):
    from ogbench import make_env_and_datasets

    name, path = collected
    found = files.load_trajectories(path, env=f"{name}-play", tasks=(1, 2))
    for i, task in enumerate((1, 2)):
        env, theirs, _ = make_env_and_datasets(
            f"{name}-play-singletask-task{task}-v0", dataset_path=str(path), compact_dataset=True
        )
        env.close()
        np.testing.assert_array_equal(found.rewards[i], theirs["rewards"])
        np.testing.assert_array_equal(found.masks[i], theirs["masks"])
        np.testing.assert_array_equal(found.observations, theirs["observations"])
    assert found.rewards.shape == found.masks.shape == (2, 40)


def test_rewards_count_unsolved_cubes_and_masks_stop_at_the_solution(collected: tuple[str, Path]):
    name, path = collected
    cubes = {"cube-single": 1, "cube-double": 2}[name]
    found = files.load_trajectories(path, env=f"{name}-play", tasks=(2,))
    assert found.rewards[0, [5, 7, 9]].tolist() == [0, -1, -cubes]
    assert found.masks[0, [5, 7, 9]].tolist() == [0, 1, 1]
    assert set(np.unique(found.rewards)) <= set(range(-cubes, 1))
    np.testing.assert_array_equal(found.masks == 0, found.rewards == 0)

    # Rows are relabelled in blocks; where the blocks end changes nothing.
    with np.load(path) as file, files._simulator(path, f"{name}-play") as simulator:
        rewards, masks = files.relabel(simulator, 2, {"qpos": file["qpos"]}, path, block=7)
    np.testing.assert_array_equal(rewards, found.rewards[0])
    np.testing.assert_array_equal(masks, found.masks[0])

    sparse = files.load_trajectories(path, env=f"{name}-play", tasks=(2,), reward="sparse")
    np.testing.assert_array_equal(sparse.rewards, np.where(found.rewards == 0, 0, -1))
    np.testing.assert_array_equal(sparse.masks, found.masks)


def test_relabel_says_what_is_missing(tmp_path: Path):
    path = write(tmp_path / "data.npz", rewards=None, masks=None)
    with pytest.raises(UserError, match=r"neither rewards nor qpos .*add an array rewards"):
        files.load_trajectories(path, env="cube-single-play", tasks=(2,))
    with pytest.raises(UserError, match="'cube-septuple-play' is no OGBench environment"):
        files.load_trajectories(path, env="cube-septuple-play", tasks=(2,))
    write(path, rewards=None, masks=None, qpos=np.zeros((6, 9), np.float32))
    with pytest.raises(UserError, match="does not hold states of cube-single "):
        files.load_trajectories(path, env="cube-single-play", tasks=(2,))


# --- Transitions and returns -------------------------------------------------------------------------------------


def ends_at(lengths: list[int]) -> np.ndarray:
    """`terminals` of trajectories of these lengths."""
    return np.concatenate([np.arange(n) == n - 1 for n in lengths])


@pytest.mark.parametrize(
    ("horizon", "extra", "expected"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 14, 15, 16]),
        (5, 0, [0, 1, 10, 11, 12]),
        (5, 1, [0, 10, 11]),
        (5, 2, [10]),
        (7, 0, [10]),
    ],
)
def test_transition_starts(horizon: int, extra: int, expected: list[int]):
    """Trajectories of 7, 3 and 8 rows: rows 0-6, 7-9 and 10-17."""
    starts = transitions.transition_starts(ends_at([7, 3, 8]), horizon, extra=extra)
    assert starts.tolist() == expected and starts.dtype == np.int32


@settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.sampled_from([1, 5]), st.integers(0, 4))
def test_transitions_never_cross_the_end_of_a_trajectory(lengths: list[int], horizon: int, extra: int):
    """A start is exactly a row of which `horizon + extra` successors belong to its trajectory."""
    terminals = ends_at(lengths)
    trajectory = np.repeat(np.arange(len(lengths)), lengths)
    rows = range(len(terminals))
    expected = [i for i in rows if i + horizon + extra in rows and trajectory[i + horizon + extra] == trajectory[i]]
    if expected:
        assert transitions.transition_starts(terminals, horizon, extra=extra).tolist() == expected
    else:
        with pytest.raises(UserError, match=f"longer than {horizon + extra} rows: use a shorter --horizon"):
            transitions.transition_starts(terminals, horizon, extra=extra)


def test_last_rows():
    assert transitions.last_rows(ends_at([2, 1, 3])).tolist() == [1, 1, 2, 5, 5, 5]


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_chunk_rewards_equal_a_loop(horizon: int):
    """Two tasks whose masks are 0 in a third of the rows, so that most chunks of five stop inside."""
    rng = np.random.default_rng(0)
    terminals = ends_at([20, 7, 13])
    rewards = rng.normal(size=(2, 40)).astype(np.float32)
    masks = rng.integers(0, 3, (2, 40)).clip(max=1).astype(np.float32)
    starts = transitions.transition_starts(terminals, horizon)
    reward, bootstrap = transitions.chunk_rewards(rewards, masks, starts, horizon=horizon, discount=0.9)
    assert reward.shape == bootstrap.shape == (2, len(starts)) and reward.dtype == bootstrap.dtype == np.float32
    stopped = 0
    for task, (n, i) in itertools.product(range(2), enumerate(starts)):
        total, weight = 0.0, 1.0
        for k in range(horizon):
            total += weight * rewards[task, i + k]
            weight *= 0.9
            if masks[task, i + k] == 0:
                weight, stopped = 0.0, stopped + (k < horizon - 1)
                break
        np.testing.assert_allclose([reward[task, n], bootstrap[task, n]], [total, weight], rtol=1e-5, atol=1e-6)
    assert stopped > 0 or horizon == 1


def test_chunk_rewards_of_one_chunk_by_hand():
    """Solved at the second of three rows: 1 + 2/2 counts, 4/4 does not, and nothing is bootstrapped."""
    rewards, masks = np.array([[1, 2, 4, 8]], np.float32), np.array([[1, 0, 1, 1]], np.float32)
    starts = np.array([0, 1], np.int32)
    reward, bootstrap = transitions.chunk_rewards(rewards, masks, starts, horizon=3, discount=0.5)
    assert reward.tolist() == [[2.0, 2.0]] and bootstrap.tolist() == [[0.0, 0.0]]
    reward, bootstrap = transitions.chunk_rewards(rewards, np.ones_like(masks), starts, horizon=3, discount=0.5)
    assert reward.tolist() == [[3.0, 6.0]] and bootstrap.tolist() == [[0.125, 0.125]]


def test_monte_carlo_returns_equal_a_loop():
    """The last row is no transition: its reward must not count, and the tail is the weight of its value."""
    rng = np.random.default_rng(0)
    lengths = [20, 1, 7, 12]
    terminals = ends_at(lengths)
    rewards = rng.normal(size=40).astype(np.float32)
    masks = rng.integers(0, 6, 40).clip(max=1).astype(np.float32)
    returns, tails = transitions.monte_carlo_returns(rewards, masks, terminals, discount=0.9)
    ends = np.repeat(np.cumsum(lengths) - 1, lengths)
    for i in range(40):
        total, weight = 0.0, 1.0
        for k in range(i, ends[i]):
            total += weight * rewards[k]
            weight *= 0.9 * masks[k]
        np.testing.assert_allclose([returns[i], tails[i]], [total, weight], rtol=1e-6, atol=1e-9)
    assert (tails == 0).sum() > 3 and (tails > 0).sum() > 3


def test_monte_carlo_returns_by_hand():
    """Three rows, cut by the time limit, then three that reach the goal at their second row."""
    rewards, masks = np.full(6, -1.0), np.array([1.0, 1, 1, 1, 0, 1])
    rewards[4] = 0.0
    returns, tails = transitions.monte_carlo_returns(rewards, masks, ends_at([3, 3]), discount=0.5)
    assert returns.tolist() == [-1.5, -1.0, 0.0, -1.0, 0.0, 0.0]
    assert tails.tolist() == [0.25, 0.5, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("rewards", [(-1.0, 0.0), (-2.0, -1.0), (0.0, 1.0), (0.5, 2.0), (-1.0, 3.0), (0.7, 0.7)])
@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_return_bounds_are_the_extremes_of_all_returns(rewards: tuple[float, float], discount: float):
    """Every sequence of up to ten of the two rewards, enumerated."""
    sequences = [s for n in range(1, 11) for s in itertools.product(rewards, repeat=n)]
    returns = [sum(discount**k * r for k, r in enumerate(s)) for s in sequences]
    low, high = transitions.return_bounds(np.array([rewards, rewards[::-1]]), discount)[1]
    rest = discount**10 / (1 - discount) * max(map(abs, rewards))  # what longer sequences may add
    assert low - 1e-9 <= min(returns) <= low + rest + 1e-9
    assert high + 1e-9 >= max(returns) >= high - rest - 1e-9


def test_print_summary_counts_success_and_warns(capsys: pytest.CaptureFixture):
    terminals = ends_at([4, 4, 2])
    masks = np.ones((2, 10), np.float32)
    masks[0, [1, 2, 5]] = 0
    trajectories = files.Trajectories(
        np.zeros((10, 3), np.float32), np.zeros((10, 2), np.float32), terminals, masks - 1.0 - (masks == 1), masks
    )
    info = {"name": "data.npz", "source": "collected", "sha256": "0123456789abcdef"}
    describe.print_summary(trajectories, info, tasks=(1, 4), discount=0.9)
    printed = capsys.readouterr().out
    assert "data.npz (source: collected, sha256 0123456789ab)" in printed
    assert "7 transitions in 3 episodes, observations 3-D, actions 2-D" in printed
    assert "task 1: possible returns within [-10, -1]" in printed
    assert "solved in 42.86% of the transitions, in 2 of 3 episodes" in printed
    assert "WARNING: task 4 is never solved" in printed and "WARNING: task 1" not in printed


def test_success_in_last_rows_alone_is_no_success(capsys: pytest.CaptureFixture):
    """A last row is no transition: its reward and mask are never trained on, and that has to be said."""
    terminals = ends_at([4, 4])
    masks = np.where(terminals, 0.0, 1.0).astype(np.float32)[None]
    trajectories = files.Trajectories(
        np.zeros((8, 3), np.float32), np.zeros((8, 2), np.float32), terminals, 1.0 - masks, masks
    )
    describe.print_summary(trajectories, {"name": "a", "source": "file", "sha256": "0" * 64}, tasks=(0,), discount=0.9)
    printed = capsys.readouterr().out
    assert (
        "possible returns within [0, 0] at discount 0.9; of an episode, undiscounted, 0 on average and 0 at best"
        in printed
    )
    assert "0 of 2 episodes ended by a mask of 0" in printed
    assert "WARNING: 2 last rows have rewards or masks of their own" in printed


def test_dense_rewards_of_last_rows_are_counted(capsys: pytest.CaptureFixture):
    """Of two episodes of four rows, one ends with a reward of its own; where rows repeat the one before, nothing is
    said, as where foreign data were converted."""
    info = {"name": "a", "source": "file", "sha256": "0" * 64}
    terminals, ones = ends_at([4, 4]), np.ones((1, 8), np.float32)
    for rewards, expected in (([1, 2, 3, 2.5, 3, 2, 1, 1], True), ([1, 2, 3, 3, 3, 2, 1, 0], False)):
        rows = np.zeros((8, 3), np.float32), np.zeros((8, 2), np.float32), terminals
        trajectories = files.Trajectories(*rows, np.array([rewards], np.float32), ones)
        describe.print_summary(trajectories, info, tasks=(0,), discount=0.9)
        assert ("1 last rows have rewards or masks of their own" in capsys.readouterr().out) == expected


def test_offsets_that_leave_no_signal_are_said(tmp_path: Path, capsys: pytest.CaptureFixture):
    """In observations, returns and actions, whatever the precision of the file; nothing is said of ordinary ones."""
    rng = np.random.default_rng(0)
    ordinary = dict(np.load(tiny_dataset(tmp_path / "data.npz", trajectories=20)))

    def said(**changes: np.ndarray) -> str:
        np.savez(tmp_path / "data.npz", **ordinary | changes)
        settings = dict(env="mine", dataset=tmp_path / "data.npz", run_dir=tmp_path / "run", eval_episodes=0)
        ValueProblem(evor_value.Args(**settings, next_action="dataset"), load_policy=None)
        return capsys.readouterr().out

    large = (1e8 + 10 * rng.normal(size=(600, 3))).astype(np.float32)
    assert "WARNING: observations [0, 1, 2] vary by no more than" in said(observations=large)
    rewards = (1e6 + rng.normal(size=600)).astype(np.float32)
    assert "own rewards: returns vary by" in said(rewards=rewards, masks=np.ones(600, np.float32))
    assert "columns [0, 1] vary by 2e-06 or less" in said(actions=(ordinary["actions"] * 1e-6).astype(np.float32))
    assert "actions in" in said(actions=0.5 + 1e-9 * ordinary["actions"].astype(np.float64))
    with pytest.raises(UserError, match="are not finite: scale the rewards"):
        said(rewards=(1e38 * ordinary["rewards"]).astype(np.float32))
    capsys.readouterr()
    assert "WARNING" not in said(masks=np.ones(600, np.float32))


def test_events_of_last_rows_are_counted_where_other_rows_have_them_too(capsys: pytest.CaptureFixture):
    """Six episodes with the reward, and the end, in their last row, and one row that has both in the middle."""
    terminals = ends_at([4] * 6)
    event = (terminals | (np.arange(24) == 5)).astype(np.float32)
    rows = np.zeros((24, 3), np.float32), np.zeros((24, 2), np.float32), terminals
    info, none = {"name": "a", "source": "file", "sha256": "0" * 64}, np.zeros_like(event)
    for rewards, masks in ((event, 1 + none), (none, 1 - event)):
        describe.print_summary(files.Trajectories(*rows, rewards[None], masks[None]), info, tasks=(0,), discount=0.9)
        assert "WARNING: 6 last rows have rewards or masks of their own" in capsys.readouterr().out


def test_rewards_of_last_rows_are_counted_where_no_other_row_has_them(capsys: pytest.CaptureFixture):
    """100 at the end of one of two episodes, which would be the goal; -1 at the end of the other is nothing new."""
    terminals = ends_at([4, 4])
    rewards = np.full((1, 8), -1, np.float32)
    rewards[0, 3] = 100
    trajectories = files.Trajectories(
        np.zeros((8, 3), np.float32), np.zeros((8, 2), np.float32), terminals, rewards, np.ones((1, 8), np.float32)
    )
    describe.print_summary(trajectories, {"name": "a", "source": "file", "sha256": "0" * 64}, tasks=(0,), discount=0.9)
    printed = capsys.readouterr().out
    assert "WARNING: 1 last rows have rewards or masks of their own" in printed
    assert "-3 on average and -3 at best" in printed


def test_episodes_that_are_shorter_than_a_chunk_are_counted(capsys: pytest.CaptureFixture):
    """One of 29 steps and 19 of three, in chunks of five: 25 chunks of the long one."""
    terminals = ends_at([30, *[4] * 19])
    rows = np.zeros((len(terminals), 1), np.float32)
    info = {"name": "a", "source": "file", "sha256": "0" * 64}
    describe.print_summary(files.Trajectories(rows, rows, terminals), info, tasks=(), discount=0.0, horizon=5)
    expected = "19 episodes are shorter than 5 steps and not used; transitions of 5 steps start in 25 rows"
    assert expected in capsys.readouterr().out and len(transitions.transition_starts(terminals, 5)) == 25
    describe.print_summary(files.Trajectories(rows, rows, terminals), info, tasks=(), discount=0.0, horizon=3)
    assert "shorter" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "lost"),
    [
        (1.6e9 + np.arange(6.0), True),  # seconds since 1970: every 128th of them has a number
        (np.array([2**40 + i for i in range(6)]), True),
        (1e-44 * np.arange(6.0), True),
        (1e3 + np.arange(6.0), False),
        (np.full(6, 1.6e9), False),
        ((1.6e9 + np.arange(6.0)).astype(np.float32), False),  # lost before it came here
        (np.arange(6), False),
    ],
)
@pytest.mark.parametrize("array", ["observations", "rewards"])
def test_what_single_precision_rounds_off_is_said(
    tmp_path: Path, column: np.ndarray, lost: bool, array: str, capsys: pytest.CaptureFixture
):
    values = np.stack([np.zeros(6), column], axis=1) if array == "observations" else column
    files.load_trajectories(write(tmp_path / "data.npz", **{array: values}), env="robot", tasks=(0,))
    said = capsys.readouterr().out
    assert (f"{array} in {tmp_path / 'data.npz'}: single precision rounds columns" in said) == lost
    assert not lost or f"columns [{int(array == 'observations')}] by up to" in said


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (np.linspace(-1e-4, 1e-4, 6), "columns [1] vary by 0.0002 or less"),
        (np.linspace(0.899, 0.901, 6), "columns [1] vary by 0.002 or less"),
        (np.full(6, -1.0), "columns [1] vary by 0 or less"),
        (np.linspace(0.0, 0.03, 6), None),
    ],
)
def test_actions_that_hardly_move_are_named(
    tmp_path: Path, column: np.ndarray, said: str | None, capsys: pytest.CaptureFixture
):
    """Beside a column that fills [-1, 1]."""
    actions = np.stack([np.linspace(-1, 1, 6), column], axis=1).astype(np.float32)
    files.read_arrays(write(tmp_path / "data.npz", actions=actions))
    printed = capsys.readouterr().out
    assert printed == "" if said is None else f"actions in {tmp_path / 'data.npz'}: {said}: scale them" in printed


def test_rows_with_complete_returns():
    """0.5^7 < 0.01: seven steps after a row are enough; the last seven rows of each trajectory are out. If all end by a
    mask of 0, for all tasks, only a chunk has to follow. The last trajectory is a state alone."""
    terminals = ends_at([20, 5, 12, 1])
    masks = np.ones((2, len(terminals)), np.float32)
    find = functools.partial(transitions.rows_with_complete_returns, terminals)
    assert find(masks, discount=0.5, horizon=1).tolist() == [*range(13), *range(25, 30)]
    assert len(find(masks, discount=0.5, horizon=1, most=4)) == 4
    masks[:, [18, 23]] = 0  # the last steps of two; the third ends by its time
    assert find(masks, discount=0.99, horizon=1).tolist() == []
    masks[0, 35] = 0
    assert find(masks, discount=0.99, horizon=1).tolist() == []
    masks[1, 35] = 0
    assert find(masks, discount=0.99, horizon=3).tolist() == [*range(17), *range(20, 22), *range(25, 34)]


# --- Report ------------------------------------------------------------------------------------------------------


def test_listing_has_every_dataset():
    lines = describe.listing().splitlines()
    assert len(lines) == 1 + sum(len(about.kinds) for about in names.ENVIRONMENTS.values())
    table = {line.split()[0]: line.split() for line in lines[1:]}
    assert table["cube-double-play"][1:] == ["37", "5", "5", "500", "[-200,", "0]", "yes"]
    assert table["humanoidmaze-giant-stitch"][1:] == ["69", "21", "5", "4000", "[-100,", "0]", "no"]
    for name in table:
        names.check_env(names.parse_env(name))


def test_report_of_ones_own_data(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Two trajectories of three rows: G = -1 - 0.5 = -1.5 and -1, and 0.5 of the next one, solved at once, is none."""
    rewards, masks = np.array([-1.0, -1, 9, -1, 0, 9]), np.array([1, 1, 1, 1, 0, 1])
    path = write(tmp_path / "data.npz", rewards=rewards, masks=masks)
    rows = describe.main(describe.Args(env="my-robot", dataset=path, discounts=(0.5, 0.0), out=tmp_path / "out"))
    assert [row["subject"] for row in rows] == ["transitions per episode", "returns (0.5)", "returns (0)"]
    quantiles = [[row[f"q{q:g}"] for q in describe.QUANTILES] for row in rows]
    assert quantiles == [[2, 2, 2, 2, 2], [-1.5, -1.125, -1, -0.75, 0], [-1, -1, -1, -0.75, 0]]
    assert rows[1]["solved_transitions"] == 0.25 and rows[1]["solved_episodes"] == 0.5
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    assert len((tmp_path / "out" / "report.csv").read_text().splitlines()) == 4
    said = capsys.readouterr().out
    assert "undiscounted, -1.5 on average and -1 at best; 1 of 2 episodes ended by a mask of 0" in said


def test_report_of_a_maze_draws_its_map(tmp_path: Path):
    path = tmp_path / "maze.npz"
    collect("pointmaze-medium-navigate-v0", path, episodes=2, rows=300, workers=1)
    rows = describe.main(describe.Args(env="pointmaze-medium-navigate", dataset=path, out=tmp_path / "out"))
    assert [row["task"] for row in rows[1:]] == [1, 2, 3, 4, 5]
    walls, unit, goals = describe.maze_of("pointmaze-medium-navigate")
    assert walls.shape == (8, 8) and unit == 4.0 and goals[1] == (20.0, 20.0)  # cell (6, 6)
    assert describe.maze_of("cube-double-play") is None and describe.maze_of("my-robot") is None
    # Where the point went there is no wall.
    with np.load(path) as file:
        cells = np.floor(file["observations"][:, ::-1] / unit + 1.5).astype(int)
    assert (walls[tuple(cells.T)] == 0).all() and len(np.unique(cells, axis=0)) > 3
    assert (tmp_path / "out" / "report.png").is_file()


def test_report_refuses_an_impossible_discount(tmp_path: Path):
    with pytest.raises(UserError, match=r"--discounts must be in \[0, 1\), not 1"):
        describe.main(describe.Args(env="my-robot", dataset=write(tmp_path / "data.npz"), discounts=(1.0,)))
    with pytest.raises(UserError, match="--discounts needs at least one number"):
        describe.main(describe.Args(env="my-robot", dataset=tmp_path / "data.npz", discounts=()))
    with pytest.raises(UserError, match=r"--tasks must be in \[1, 5\], not 0"):
        describe.main(describe.Args(env="my-robot", dataset=tmp_path / "data.npz", tasks=(0,)))
