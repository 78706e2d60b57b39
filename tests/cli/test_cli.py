"""The command line: presets, and what a user can get wrong. Every mistake is one sentence with a remedy, and leaves
the run directory as it was."""

import contextlib
import dataclasses
import errno
import gc
import importlib.util
import inspect
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

import evor_bc
import evor_infer
import evor_value
import recipes
from baselines import qc
from common import checkpoint
from common.args import check
from common.cli import parse_args, run_cli
from common.errors import UserError
from common.run import STATE_FILES
from experiments.run import parse
from experiments.table import MAZE
from recipes import recipe_of
from tests.helpers import contents, mostly_slow, rewrite, tiny_dataset

SCRIPTS = (evor_bc, evor_value, evor_infer)
ROOT = Path(evor_bc.__file__).parent
ENV = "cube-single-play"

# --- Presets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("preset", ["quick", "preview"])
def test_presets_change_defaults(script, preset: str):
    args = parse_args(script.Args, script.PRESETS, [f"--{preset}"])
    expected = dataclasses.replace(script.Args(), **script.PRESETS[preset], **{preset: True})
    settings = dataclasses.asdict(args)  # arguments are equal, too, that differ in what no compiled step reads
    assert settings == dataclasses.asdict(expected) != dataclasses.asdict(script.Args())
    assert dataclasses.asdict(parse_args(script.Args, script.PRESETS, [])) == dataclasses.asdict(script.Args())


@pytest.mark.parametrize(
    "argv", [["--quick", "--steps", "5000"], ["--steps", "5000", "--quick"], ["--quick", "--steps=5000"]]
)
def test_flags_override_their_preset(argv: list[str]):
    args = parse_args(evor_value.Args, evor_value.PRESETS, [*argv, "--tasks", "1", "4"])
    assert (args.steps, args.tasks, args.quick) == (5000, (1, 4), True)
    assert args.width == evor_value.PRESETS["quick"]["width"]


def test_a_flag_may_ask_for_the_default_against_its_preset():
    default = evor_bc.Args().width
    assert evor_bc.PRESETS["quick"]["width"] != default
    assert parse_args(evor_bc.Args, evor_bc.PRESETS, ["--quick", "--width", str(default)]).width == default


def parse_with_recipe(script: Any, *argv: str) -> Any:
    return parse_args(script.Args, script.PRESETS, list(argv), recipe_of=script.recipe_of)


def test_the_preview_of_an_environment_follows_its_recipe():
    """In all scripts that train, under any name of the environment. Fails if a recipe beats a flag, or is applied
    without `--preview`, to another environment, or to a field that the script does not have."""
    cube, arm = "--env=cube-double-play", (6, 7, 8, 9, 10, 11)
    args = parse_with_recipe(evor_value, cube, "--preview")
    assert (args.horizon, args.ignore_observations, args.policy_steps, args.steps) == (5, arm, 200_000, 30_000)
    assert parse_with_recipe(evor_value, "--preview") == args  # the default environment
    policy = parse_with_recipe(evor_bc, "--preview", "--env", "cube-double-play-singletask-task2-v0")
    assert (policy.horizon, policy.ignore_observations, policy.steps) == (5, arm, 200_000)
    assert evor_bc.args_for(args) == dataclasses.replace(policy, run_dir=args.directory)
    args = parse_with_recipe(evor_value, cube, "--preview", "--horizon", "1", "--ignore-observations")
    assert (args.horizon, args.ignore_observations, args.policy_steps) == (1, (), 200_000)
    maze = parse_with_recipe(evor_value, "--preview", "--env", "pointmaze-medium-navigate")
    assert (maze.next_action, maze.discount, maze.horizon) == ("softmax", 0.995, 5)
    assert (maze.noise_scale, maze.num_actions, maze.action_temperature) == (0.3, 8, 0.03)
    assert (maze.extraction.noise_scale, maze.base_policy_alone.noise_scale) == (0.3, 1.0)
    baseline = parse_with_recipe(qc, "--preview", "--env", "pointmaze-medium-navigate")
    assert (baseline.discount, baseline.horizon) == (0.995, 5)
    assert (baseline.noise_scale, baseline.num_actions, baseline.action_temperature) == (1.0, None, 0.0)  # QC's own
    scene = parse_with_recipe(evor_value, "--preview", "--env", "scene-play")
    assert (scene.reward, scene.discount, scene.ignore_observations) == ("sparse", 0.99, arm)
    puzzle = parse_with_recipe(evor_value, "--preview", "--env", "puzzle-3x3-play")
    assert (puzzle.reward, puzzle.discount, puzzle.steps) == ("default", 0.998, 160_000)
    policy = parse_with_recipe(evor_bc, "--preview", "--env", "puzzle-3x3-play")
    assert policy.steps == 200_000
    baseline = parse_with_recipe(qc, cube, "--preview")
    assert (baseline.horizon, baseline.noise_scale, baseline.action_temperature) == (5, 1.0, 0.0)
    for argv in (
        [cube],
        [cube, "--quick"],
        ["--env=antmaze-large-navigate", "--preview"],
        ["--env=Hopper-v5", "--preview"],
    ):
        args = parse_with_recipe(evor_value, *argv)
        assert (args.horizon, args.ignore_observations, args.policy_steps) == (1, (), None)


def test_the_recipe_is_printed_as_it_is_followed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["evor_value.py", "--preview", "--horizon", "2"])
    run_cli(lambda args: None, evor_value.Args, evor_value.PRESETS, recipe_of=recipe_of)
    flags = "--horizon 2 --next-action softmax --action-temperature 0.03 --noise-scale 0.5"
    flags += " --ignore-observations 6 7 8 9 10 11 --policy-steps 200000"
    assert capsys.readouterr().out == f"recipe of cube-double-play: {flags}\n"


@pytest.mark.parametrize("script", ["evor_bc", "evor_value", "baselines.critics", "baselines.qc"])
def test_every_training_follows_recipes_on_the_real_command_line(script: str, tmp_path: Path):
    """A width that is refused ends it there. Fails if a script does not hand its recipes on."""
    env = os.environ | dict(PYTHONPATH=str(ROOT), HOME=str(tmp_path))
    command = [sys.executable, "-m", script, "--preview", "--width", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and "--width must be at least 1" in done.stderr
    assert done.stdout.startswith("recipe of cube-double-play: --horizon 5 ")


def test_an_experiment_follows_recipes_too():
    (_, args), (_, maze) = (parse(f"evor_value.py --env {env} --preview") for env in ("scene-play", MAZE))
    assert (args.horizon, args.reward, maze.discount) == (5, "sparse", 0.995)


def test_recipes_are_those_of_the_docs():
    rows = re.findall(r"^\| ([\w-]+) \| `(--.*)` \|$", (ROOT / "docs" / "tuning.md").read_text(), re.MULTILINE)
    assert dict(rows).keys() == recipes.RECIPES.keys()
    for env, flags in rows:
        args = parse_args(evor_value.Args, {}, flags.split())
        changed = {f.name for f in dataclasses.fields(args) if getattr(args, f.name) != f.default}
        assert {name: getattr(args, name) for name in changed} == recipes.RECIPES[env]


def test_steps_of_a_missing_base_policy():
    args = evor_value.Args(policy_steps=20)
    assert (evor_bc.args_for(args).steps, evor_bc.args_for(args).steps_per_call) == (20, 20)
    assert evor_bc.args_for(dataclasses.replace(args, policy_steps=3_000)).steps_per_call == 1_000
    assert evor_bc.args_for(evor_value.Args()).steps == 1_000_000
    with pytest.raises(UserError, match="--policy-steps must be at least 1, not 0"):
        check(evor_value.Args(policy_steps=0))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_presets_exclude_each_other(script):
    with pytest.raises(UserError, match="--quick and --preview exclude each other: pass one of them"):
        parse_args(script.Args, script.PRESETS, ["--preview", "--quick"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_every_flag_is_explained(script, capsys: pytest.CaptureFixture):
    """`--help` comes out, and has the docstring of each field."""
    with pytest.raises(SystemExit) as stop:
        parse_args(script.Args, script.PRESETS, ["--help"])
    assert stop.value.code == 0
    words = "".join(c if c.isalnum() else " " for c in capsys.readouterr().out).split()
    docstrings = []
    for kind in script.Args.__mro__[:-1]:  # all but `object`
        lines = [line.strip().strip('"') for line in inspect.getsource(kind).splitlines() if line.startswith('    """')]
        docstrings += lines[1:]
    assert len(docstrings) == len(dataclasses.fields(script.Args))
    for docstring in docstrings:
        last = "".join(c if c.isalnum() else " " for c in docstring).split()[-1]
        assert last in words, docstring


def test_run_cli_says_a_users_mistake_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def main(args):
        raise UserError(f"steps {args.steps} are too many: pass fewer.")

    monkeypatch.setattr(sys, "argv", ["script", "--steps", "7"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main, evor_bc.Args, evor_bc.PRESETS)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: steps 7 are too many: pass fewer.\n")


def test_run_cli_says_a_mistake_in_the_presets_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["script", "--quick", "--preview"])
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda args: None, evor_bc.Args, evor_bc.PRESETS)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "run/value/model.eqx"), 2,
         "run/value/model.eqx: No space left on device: free some space, then go on with --resume."),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 2,
         "runs: Permission denied: change its permissions, or choose another place."),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/runs"), 2,
         "/mnt/runs: Read-only file system: choose a place that can be written to, with --run-dir or --out."),
        (OSError("strange"), 2, "strange: --debug shows where this happened."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 2, "Broken pipe: --debug shows where this happened."),
        (MemoryError("Unable to allocate 3 TiB"), 2,
         "out of memory (Unable to allocate 3 TiB): use a smaller --batch-size, fewer --seeds or --num-next-actions."),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), 2,
         "out of memory (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.): use a smaller --batch-size, fewer "
         "--seeds or --num-next-actions."),
        (RuntimeError("INVALID_ARGUMENT: Disallowed host-to-device transfer: int32[1]"), 2,
         "JAX allows no transfer to the device (INVALID_ARGUMENT: Disallowed host-to-device transfer: int32[1]): unset "
         "JAX_TRANSFER_GUARD."),
        (FloatingPointError("loss is not finite."), 1, "loss is not finite."),
        (UserError("wrong: mend it."), 2, "wrong: mend it."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("debug", [False, True])
def test_run_cli_says_what_went_wrong(
    error: Exception, code: int, line: str, debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """One line, and with --debug, wherever it stands, the traceback before it."""

    def main(args):
        assert args.steps == 7
        raise error

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["script", *["--debug"] * debug, "--steps", "7"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main, evor_bc.Args, evor_bc.PRESETS)
    said = capsys.readouterr().err
    assert stop.value.code == code and said.endswith(f"error: {line}\n")
    assert ("Traceback" in said) == debug and (debug or said.count("\n") == 1)
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_run_cli_cleans_up_after_a_signal(number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    cleaned = []

    def main(args):
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(True)

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main, evor_bc.Args, evor_bc.PRESETS)
    assert stop.value.code == 128 + number and cleaned and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_garbage_collection(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Python ignores errors in callbacks of the garbage collector. Fails if the signal is lost with them."""

    def callback(*_):
        gc.callbacks.remove(callback)
        signal.raise_signal(number)

    def main(args):
        gc.callbacks.append(callback)
        gc.collect()
        ignored.append(True)
        for _ in range(100):
            time.sleep(0.1)

    ignored = []
    hook = sys.unraisablehook
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as stop:
        run_cli(main, evor_bc.Args, evor_bc.PRESETS)
    assert stop.value.code == 128 + number and ignored and "Traceback" not in capsys.readouterr().err
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()], ids=["SIGTERM", "SIGINT"])
def test_a_lost_signal_does_not_come_after_the_end(error: BaseException, monkeypatch: pytest.MonkeyPatch):
    """Fails if it is repeated when `main` is over: there it would end the process, cleaned up or not."""
    stops, lost = [], types.SimpleNamespace(exc_type=type(error), exc_value=error)
    number = signal.SIGTERM if isinstance(error, SystemExit) else signal.SIGINT
    monkeypatch.setattr(sys, "argv", ["script"])
    handler = signal.signal(number, lambda *_: stops.append(True))
    try:
        run_cli(lambda args: sys.unraisablehook(lost), evor_bc.Args, evor_bc.PRESETS)
        time.sleep(0.3)
    finally:
        signal.signal(number, handler)
    assert not stops


def test_run_cli_hides_no_error_of_its_own(monkeypatch: pytest.MonkeyPatch):
    """A ValueError that is no UserError is a bug of ours, and keeps its traceback."""

    def main(args):
        raise ValueError("a bug")

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(ValueError, match="a bug"):
        run_cli(main, evor_bc.Args, evor_bc.PRESETS)


# --- Processes ---------------------------------------------------------------------------------------------------


def run_python(*args: str, home: Path) -> subprocess.CompletedProcess:
    env = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *args], cwd=home, env=env, capture_output=True, text=True)


def test_a_mistake_on_the_real_command_line(tmp_path: Path):
    done = run_python(str(ROOT / "evor_value.py"), "--env", "nonsense", home=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown environment 'nonsense'") and done.stderr.count("\n") == 1
    assert "runs" not in os.listdir(tmp_path)


PRINTS = """
import dataclasses
import pathlib
from common.cli import run_cli
from common.errors import UserError

@dataclasses.dataclass(frozen=True)
class Args:
    letters: int = 10
    wrong: bool = False

def main(args):
    print("x" * args.letters)
    if args.wrong:
        raise UserError("wrong: mend it.")
    pathlib.Path(__file__).with_name("done").touch()

run_cli(main, Args)
"""


def check_what_is_done(
    tmp_path: Path, words: list[str], code: int, said: str | None, *, unbuffered: str, **streams: Any
) -> None:
    """Runs PRINTS; `said` on stderr is not looked at where it is None."""
    (tmp_path / "script.py").write_text(PRINTS)
    command = [sys.executable, str(tmp_path / "script.py"), *words]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, env=env, text=True, **streams)
    assert done.returncode == code and (tmp_path / "done").exists() == (code == 0 and words != ["--help"])
    assert said is None or done.stderr == said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--letters", "1000000"], 0, ""),  # more than a buffer: printing fails
        (["--help"], 0, ""),  # less: it is written at the end of the process
        ([], 0, ""),
        (["--wrong"], 2, "error: wrong: mend it.\n"),
    ],
    ids=["long", "help", "short", "mistake"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_nobody_reads_what_is_printed(
    tmp_path: Path, words: list[str], code: int, said: str, unbuffered: str, both: bool
):
    """As after `| head` and `2>&1 | head`: not a word of it, neither ours nor Python's at the end of the process, and
    what is to be done is done. Without a buffer it shows at the first word."""
    reader, writer = os.pipe()
    os.close(reader)
    streams = dict(stdout=writer, stderr=writer if both else subprocess.PIPE)
    check_what_is_done(tmp_path, words, code, None if both else said, unbuffered=unbuffered, **streams)
    os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is Linux's")
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(("words", "code"), [(["--letters", "1000000"], 0), ([], 0), (["--wrong"], 2), (["--help"], 0)])
def test_the_disk_that_takes_what_is_printed_is_full(
    tmp_path: Path, words: list[str], code: int, unbuffered: str, both: bool
):
    """What is to be done is done, and a mistake has its status; a warning says that output is lost."""
    mistake = "error: wrong: mend it.\n" if code else ""
    said = None if both else f"{mistake}warning: some of the output is lost (No space left on device).\n"
    with open("/dev/full", "w") as full:
        streams = dict(stdout=full, stderr=full if both else subprocess.PIPE)
        check_what_is_done(tmp_path, words, code, said, unbuffered=unbuffered, **streams)


NO_CUDA = (
    importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None
)


@pytest.mark.parametrize("platform", ["no_such_platform", *["cuda"] * NO_CUDA])
@pytest.mark.parametrize("script", mostly_slow(["evor_bc.py", "evor_infer.py"], but=["evor_infer.py"]))
def test_an_accelerator_that_is_not_there(script: str, platform: str, tmp_path: Path):
    """The real command line, with the real JAX."""
    settings = dict(capture_output=True, text=True, cwd=tmp_path, env=os.environ | dict(JAX_PLATFORMS=platform))
    done = subprocess.run([sys.executable, str(ROOT / script)], **settings)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"error: JAX has no device for JAX_PLATFORMS={platform} (" in done.stderr


def test_a_name_that_the_terminal_cannot_show():
    code = "from common.cli import run_cli; import dataclasses\n" + (
        "run_cli(lambda args: print('gr\\u00fc\\u00dfe'), dataclasses.make_dataclass('Args', []))"
    )
    settings = dict(capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(PYTHONIOENCODING="ascii"))
    done = subprocess.run([sys.executable, "-c", code], **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "gr\\xfc\\xdfe\n", "")


@pytest.mark.slow
def test_a_file_whose_name_is_not_ascii_where_everything_else_is(tmp_path: Path):
    """As in many containers; fails if what is written takes the encoding of the terminal."""
    with h5py.File(tmp_path / "h\u00fchn.hdf5", "w") as file:
        file.update(observations=np.ones((9, 3)) * np.arange(9)[:, None], actions=np.zeros((9, 2)) + 0.5)
        file.update(terminals=np.zeros(9), timeouts=np.arange(9) == 8, rewards=np.arange(9.0))
    words = "--env mine --width 8 --depth 2 --batch-size 4 --steps 2 --steps-per-call 2".split()
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", HOME=str(tmp_path))
    done = subprocess.run(
        [sys.executable, str(ROOT / "evor_bc.py"), "--dataset", "h\u00fchn.hdf5", *words],
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | plain,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mine/bc/model.eqx").is_file()


def test_a_simulator_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As where MUJOCO_GL names a graphics library that is not installed, which shows in MuJoCo's import alone."""
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    done = run_python(str(ROOT / "evor_value.py"), "--env", ENV, home=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "MUJOCO_GL" in done.stderr and "leave MUJOCO_GL=nonsense away" in done.stderr
    assert "runs" not in os.listdir(tmp_path)


@pytest.mark.parametrize("script", [evor_bc, evor_value], ids=lambda script: script.__name__)
def test_a_place_that_cannot_be_written(
    tmp_path: Path, script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """/sys takes no directory from anybody, root or not: said in a line, before anything is trained."""
    tiny_dataset(tmp_path / "data.npz")
    words = ["--env", "robot", "--dataset", str(tmp_path / "data.npz"), "--run-dir", "/sys/run", "--width", "8"]
    monkeypatch.setattr(sys, "argv", ["script", *words])
    monkeypatch.setattr(evor_bc, "train_chunk", training_begins)
    with pytest.raises(SystemExit) as stop:
        run_cli(script.main, script.Args, script.PRESETS)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    assert re.fullmatch(r"error: /sys/run.*: (change its permissions, or )?choose (another|a) place.*\.", said.strip())


def test_importing_the_scripts_does_nothing(tmp_path: Path):
    """Fails if an import prints, touches a file, starts a JAX backend or parses the command line."""
    code = (
        "import evor_bc, evor_value, evor_infer\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    done = run_python("-W", "error", "-c", code, "--no-such-flag", home=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- Mistakes ----------------------------------------------------------------------------------------------------

SMALL = dict(steps=4, steps_per_call=2, width=8, depth=2, batch_size=4)
SMALL_VALUE = SMALL | dict(eval_episodes=0, eval_every=0, num_next_actions=2, flow_steps=2)


def here_args(changes: dict) -> dict:
    """On the data and in the run directory of `here`. A run stands there: without --overwrite that is the mistake."""
    return dict(env=ENV, dataset=Path("data.npz"), run_dir=Path("run"), overwrite="resume" not in changes)


def bc_args(**changes) -> evor_bc.Args:
    return evor_bc.Args(**here_args(changes) | SMALL | changes)


def bc(**changes) -> Callable[[], object]:
    """The command that trained the base policy, with changes."""
    return lambda: evor_bc.main(bc_args(**changes))


def value(**changes) -> Callable[[], object]:
    """The command that trained the reward model, with changes."""
    return lambda: evor_value.main(evor_value.Args(**here_args(changes) | SMALL_VALUE | changes))


def infer(**changes) -> Callable[[], object]:
    settings = dict(env=ENV, run_dir=Path("run"), eval_episodes=1, workers=1)
    return lambda: evor_infer.main(evor_infer.Args(**settings | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data.npz` with its own rewards, and `run/` with both stages trained on it for two chunks."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_dataset(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        bc()()
        value()()
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a copy of `trained`, no other data, and a dataset host that does not answer."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training_begins(*_):
    raise AssertionError("training began before the mistake was seen")


def fails_cleanly(command: Callable[[], object], directory: Path, words: str) -> None:
    """`command` is a mistake: the command line says it in a sentence with all `words` (separated by |), without a
    traceback, exits with 2, and no file changes."""
    before, stderr = contents(directory), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as stop,
    ):
        for script in (evor_bc, evor_value):
            patch.setattr(script, "train_chunk", training_begins)
        patch.setattr(sys, "argv", ["script"])
        run_cli(lambda _: command(), evor_bc.Args)
    said = stderr.getvalue()
    message = said.splitlines()[-1].removeprefix("error: ")
    assert stop.value.code == 2 and said.endswith(f"error: {message}\n") and "Traceback" not in said, said
    assert all(word in message for word in words.split("|")), message
    assert message.endswith((".", ")"))
    after = contents(directory)
    assert {name for name in before | after if before.get(name) != after.get(name)} == set()


MISTAKES_OF_TRAINING = {
    "no kind of data": (dict(env="nonsense", dataset=None), "unknown environment 'nonsense'|such as cube-double-play"),
    "no such environment": (dict(env="cube-septuple-play", dataset=None), "'cube-septuple-play'|has|cube-double"),
    "no such task": (dict(env="cube-double-play-singletask-task9-v0", dataset=None), "task 9|tasks 1 to 5"),
    "no data to be had": (
        dict(env="antmaze-large-navigate", dataset=None),
        "antmaze-large-navigate-v0.npz|trained experts|--dataset FILE",
    ),
    "nothing to collect": (dict(env="cube-triple-play", dataset=None, episodes=0), "episodes must be at least 1"),
    "no such file": (dict(dataset=Path("missing.npz")), "missing.npz|check the path given to --dataset"),
    "a folder as dataset": (dict(dataset=Path("run")), "no training files|--dataset"),
    "a name for no run": (dict(env="../escape"), "--env '../escape'|use letters"),
    "steps and steps per call": (dict(steps=5), "--steps 5|--steps-per-call 2|change one of them"),
    "no steps": (dict(steps=0), "--steps must be at least 1, not 0"),
    "save_every and steps per call": (dict(save_every=3), "--save-every 3|--steps-per-call 2"),
    "no steps per call": (dict(steps_per_call=0), "--steps-per-call"),
    "negative steps per call": (dict(steps_per_call=-2), "--steps-per-call"),
    "a seed that JAX does not tell from another": (dict(first_seed=2**32), "--first-seed must be in [0, 2147483648)"),
    "a negative seed": (dict(first_seed=-1), "--first-seed must be in [0, 2147483648), not -1"),
    "no seeds": (dict(seeds=0), "--seeds|at least 1"),
    "a coordinate that does not exist": (dict(ignore_observations=(0, 99)), "--ignore-observations [0, 99]"),
    "no horizon": (dict(horizon=0), "--horizon must be at least 1, not 0"),
    "an empty batch": (dict(batch_size=0), "--batch-size"),
    "no width": (dict(width=0), "--width"),
    "no depth": (dict(depth=0), "--depth"),
    "a chunk that no later stage takes": (dict(horizon=1001), "--horizon must be a number in [1, 1000], not 1001"),
    "layers that no later stage takes": (dict(depth=1001), "--depth must be a number in [1, 1000], not 1001"),
    "a width that no later stage takes": (dict(width=100_001), "--width must be a number in [1, 100000]"),
}
MISTAKES_OF_VALUE = {
    "another horizon": (
        dict(horizon=5),
        "run/bc/model.eqx was made with horizon 1, this run has 5|pass the same horizon",
    ),
    "another environment": (dict(env="cube-double-play"), "made with env 'cube-single-play'|'cube-double-play'"),
    "a seed the policy lacks": (dict(seeds=6), "no seed 1|evor_bc.py --first-seed 0 --seeds 6"),
    "a shared seed the policy lacks": (dict(policy_seed=3), "no seed 3|evor_bc.py --first-seed 3 --seeds 1"),
    "no base policy where one is named": (
        dict(policy_run_dir=Path("elsewhere")),
        "no base policy at elsewhere/bc/model.eqx|evor_bc.py, or leave out --policy-run-dir",
    ),
    "a negative shared seed": (dict(policy_seed=-1), "--policy-seed must be in [0, 2147483648), not -1"),
    "tasks twice": (dict(tasks=(1, 1)), "--tasks needs each task once"),
    "tasks with own rewards": (dict(tasks=(2,)), "brings its own rewards|leave out --tasks"),
    "eval_every and steps per call": (dict(eval_every=3), "--eval-every 3|--steps-per-call 2"),
    "no discounting": (dict(discount=1.0), "--discount must be in [0, 1), not 1.0"),
    "an axis that the target cannot have": (
        dict(td_target="velocity", return_axis="quantiles"),
        "--td-target velocity needs an affine axis",
    ),
    "no next actions": (dict(num_next_actions=0), "--num-next-actions must be at least 1"),
    "a bank that no memory holds": (dict(num_next_actions=10**9), "bank of 1,000,000,000|GiB|--num-next-actions"),
    "no flow steps": (dict(flow_steps=0), "--flow-steps must be at least 1"),
    "no evaluated actions": (dict(num_actions=0), "--num-actions must be at least 1"),
    "a negative return temperature": (dict(return_temperature=-0.1), "--return-temperature"),
    "a negative action temperature": (dict(action_temperature=-0.1), "--action-temperature"),
    "a negative backup temperature": (dict(backup_temperature=-0.1), "--backup-temperature"),
    "a tau of 2": (dict(tau=2.0), "--tau"),
    "a redrawn bank and steps per call": (dict(redraw_bank=3), "--redraw-bank 3|--steps-per-call 2"),
    "a trunk of no layers": (dict(critic="trunk", depth=1), "--critic trunk needs --depth 2"),
    "coordinates the policy looks at": (dict(ignore_observations=(1,)), "--ignore-observations [1]|ignores []"),
}
MISTAKES_OF_INFERENCE = {
    "no kind of data": (dict(env="nonsense", run_dir=None), "unknown environment 'nonsense'"),
    "no run": (dict(run_dir=None, env="scene-play"), "runs/scene-play/value/model.eqx|evor_value.py first"),
    "another environment": (dict(env="cube-double-play"), "made with env 'cube-single-play'|'cube-double-play'"),
    "own rewards": (dict(), "was trained on rewards of its own|cube-single-play is no environment"),
    "a task not trained": (dict(tasks=(0, 3)), "has no task 3|[0]|evor_value.py"),
    "a seed not trained": (dict(seeds=1, first_seed=7), "has no seed 7|[0]|evor_value.py"),
    "nothing to sweep": (dict(num_actions=()), "--num-actions needs at least one number"),
    "no actions": (dict(num_actions=(4, 0)), "--num-actions must be at least 1, not 0"),
    "no returns": (dict(num_returns=(0,)), "--num-returns must be at least 1, not 0"),
    "a negative temperature": (dict(return_temperature=(-0.1,)), "--return-temperature must not be negative: -0.1"),
    "endless noise": (dict(noise_scale=(1.0, float("inf"))), "--noise-scale must be in [0, 1000], not inf"),
    "temperatures of another unit": (dict(absolute=True), "--absolute needs the temperatures, too"),
    "the folder of the reward model": (dict(out="value"), "--out value|not for sweeps"),
    "a folder of no name": (dict(out="."), "--out .|not for sweeps"),
    "no episodes": (dict(eval_episodes=0), "--eval-episodes must be at least 1"),
    "no flow steps": (dict(flow_steps=0), "--flow-steps must be at least 1"),
    "fewer than no processes": (dict(workers=-1), "--workers"),
}


@pytest.mark.parametrize("name", MISTAKES_OF_TRAINING)
@pytest.mark.parametrize("command", [bc, value])
def test_mistakes_of_training(here: Path, command: Callable, name: str):
    changes, words = MISTAKES_OF_TRAINING[name]
    fails_cleanly(command(**changes), here, words)


@pytest.mark.parametrize("name", MISTAKES_OF_VALUE)
def test_mistakes_of_the_value_stage(here: Path, name: str):
    changes, words = MISTAKES_OF_VALUE[name]
    fails_cleanly(value(**changes), here, words)


def test_where_stage_2_may_not_write_is_said_before_stage_1(here: Path):
    """Its run stands there, its base policy does not; or its folder is a file."""
    shutil.rmtree(here / "run" / "bc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evor_bc, "main", training_begins)
        fails_cleanly(value(overwrite=False), here, "a run stands in run/value|--resume, --overwrite")
        shutil.rmtree(here / "run" / "value")
        (here / "run" / "value").write_text("mine")
        fails_cleanly(value(overwrite=False), here, "run/value is no directory|move it away")
        fails_cleanly(value(), here, "run/value is no directory|move it away")


def test_a_sweep_of_data_that_have_no_environment(here: Path):
    """Its name means something only to this run: the sentence is about the environment that is missing."""
    rewrite(here / "run" / "value" / "model.eqx", env="my-robot")
    fails_cleanly(infer(env="my-robot"), here, "my-robot is no environment of Gymnasium|load_agent('run')")
    fails_cleanly(infer(env="your-robot"), here, "made with env 'my-robot'|'your-robot'")


@pytest.mark.parametrize("name", MISTAKES_OF_INFERENCE)
def test_mistakes_of_inference(here: Path, name: str):
    changes, words = MISTAKES_OF_INFERENCE[name]
    fails_cleanly(infer(**changes), here, words)


@pytest.mark.parametrize("command", [bc, value])
def test_a_malformed_dataset(here: Path, command: Callable):
    tiny_dataset(here / "bad.npz")
    arrays = dict(np.load(here / "bad.npz"))
    arrays["actions"][11, 1] = np.nan
    np.savez(here / "bad.npz", **arrays)
    fails_cleanly(command(dataset=Path("bad.npz")), here, "actions in bad.npz|row 11|remove or repair")
    (here / "bad.npz").write_text("not a dataset")
    fails_cleanly(command(dataset=Path("bad.npz")), here, "bad.npz|numpy.savez")


def test_a_dataset_of_other_dimensions(here: Path):
    tiny_dataset(here / "wide.npz", observation_dim=4)
    fails_cleanly(value(dataset=Path("wide.npz")), here, "observation 3, this run has 4|--run-dir")


@pytest.mark.parametrize("command", [bc, value])
def test_a_validation_file_of_other_dimensions(here: Path, command: Callable):
    with np.load("data.npz") as file:
        arrays = dict(file)
    arrays["observations"] = np.pad(arrays["observations"], ((0, 0), (0, 1)))
    np.savez("data-val.npz", **arrays)
    fails_cleanly(command(overwrite=True), here, "data-val.npz have 4 columns|3")


def test_a_dataset_without_rewards(here: Path):
    tiny_dataset(here / "plain.npz", rewards=False)
    fails_cleanly(value(dataset=Path("plain.npz")), here, "neither rewards nor qpos|add an array rewards")
    fails_cleanly(value(dataset=Path("plain.npz"), env="my-robot"), here, "plain.npz|rewards")


def test_minus_one_until_nobody_says_when(here: Path):
    with np.load(here / "data.npz") as file:
        np.savez(here / "data.npz", **{name: array for name, array in file.items() if name != "masks"})
    fails_cleanly(value(reward="sparse"), here, "--reward sparse|no masks of data.npz|leave it out")


def test_a_task_that_does_not_exist(here: Path):
    tiny_dataset(here / "plain.npz", rewards=False)
    fails_cleanly(value(dataset=Path("plain.npz"), tasks=(7,)), here, "--tasks [7]|tasks 1 to 5")


@pytest.mark.parametrize("command", [bc, value])
def test_trajectories_shorter_than_a_chunk(here: Path, command: Callable):
    tiny_dataset(here / "short.npz", length=5)
    fails_cleanly(
        command(dataset=Path("short.npz"), horizon=5, run_dir=Path("new")), here, "longer than 5 rows|--horizon"
    )


def test_trajectories_shorter_than_two_chunks(here: Path):
    """`--next-action dataset` needs the next chunk in the data too. Fails if an earlier run's files are overwritten."""
    tiny_dataset(here / "short.npz", length=8)
    shutil.rmtree(here / "run" / "bc")
    bc(dataset=Path("short.npz"), horizon=5, steps=2)()
    changes = dict(dataset=Path("short.npz"), horizon=5, next_action="dataset")
    fails_cleanly(value(**changes), here, "longer than 9 rows|--horizon")


@pytest.mark.parametrize("command", [bc, value])
def test_resuming_with_other_settings_or_data(here: Path, command: Callable):
    fails_cleanly(command(resume=True, learning_rate=0.5), here, "--resume|learning_rate 0.0003, not 0.5|start over")
    fails_cleanly(command(resume=True, seeds=2), here, "seed")
    tiny_dataset(here / "data.npz", seed=1)
    fails_cleanly(command(resume=True), here, "other data")


@pytest.mark.parametrize(("command", "stage"), [(value, "bc"), (infer, "value")])
def test_a_damaged_checkpoint(here: Path, command: Callable, stage: str):
    path = here / "run" / stage / "model.eqx"
    path.write_bytes(path.read_bytes()[:-200])
    fails_cleanly(command(), here, f"run/{stage}/model.eqx is damaged|move it away and train again")


@pytest.mark.parametrize(("command", "stage", "other"), [(value, "bc", "value"), (infer, "value", "bc")])
def test_checkpoints_in_each_others_place(here: Path, command: Callable, stage: str, other: str):
    shutil.copy(here / "run" / other / "model.eqx", here / "run" / stage / "model.eqx")
    fails_cleanly(command(), here, f"of stage '{other}', not '{stage}'|run directory")


def test_resuming_with_another_base_policy(here: Path):
    """Stage 1 was trained anew after stage 2: its actions are no longer those the reward model knows. What was trained
    has the policy that it knows, and is evaluated with that one, whatever stands in the place of stage 1."""
    bc(steps=2, overwrite=True)()
    fails_cleanly(value(resume=True), here, "--resume|had another base policy|start over with --overwrite")
    agent = evor_infer.load_agent("run")
    for change in (lambda path: path.write_bytes(b"x"), Path.unlink):
        change(here / "run" / "bc" / "model.eqx")
        again = evor_infer.load_agent("run")
        for a, b in zip(jax.tree.leaves(agent), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)
        fails_cleanly(infer(), here, "was trained on rewards of its own|cube-single-play is no environment")


def test_a_base_policy_that_was_not_trained_to_its_end(here: Path):
    """Its training was interrupted after the first checkpoint: the value stage must not take it for the base policy."""
    shutil.rmtree(here / "run")
    train_chunk, calls = evor_bc.train_chunk, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_chunk(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evor_bc, "train_chunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bc(save_every=2)()
    assert (here / "run" / "bc" / "model.eqx").is_file()
    fails_cleanly(
        value(), here, "run/bc|is not trained to its end, and has|finish it with evor_bc.py --resume|--run-dir"
    )


def test_a_base_policy_whose_first_save_was_killed(here: Path, monkeypatch: pytest.MonkeyPatch):
    """`model.eqx` stands alone then, and is unfinished: the value stage trains it from the start."""
    shutil.rmtree(here / "run" / "value")
    for name in STATE_FILES:
        (here / "run" / "bc" / name).unlink(missing_ok=True)
    rewrite(here / "run/bc/model.eqx", step=2)
    monkeypatch.setattr(evor_bc, "args_for", lambda args: bc_args())
    value()()
    assert checkpoint.read_header(here / "run/bc/model.eqx", stage="bc", remedy="")["step"] == 4
    assert (here / "run/value/model.eqx").is_file()
