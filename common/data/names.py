"""Names: what `--env` means, which Gymnasium environment and which files belong to it."""

import dataclasses
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError

KINDS = "play|noisy|navigate|stitch|explore"
DEFAULT_TASKS = {"cube": 2, "scene": 2, "puzzle-3x3": 4, "puzzle-4x4": 4, "puzzle": 2, "antsoccer": 4}  # mazes: 1
NUM_TASKS = 5
DEFAULT_ENV = "cube-double-play"
GYM_ID = r"([\w.]+:)?([\w-]+/)?[\w.-]+-v\d+"  # Gymnasium's: module:namespace/Name-v0


class Environment(NamedTuple):
    """A state-based environment of OGBench, each with five tasks."""

    observations: int
    """Numbers per observation."""
    actions: int
    """Numbers per action."""
    episode_steps: int
    """Steps after which an evaluation episode is cut."""
    lowest_reward: int
    """Of a step: minus the number of subgoals. The highest is 0, where the task is solved."""
    kinds: tuple[str, ...]
    """Kinds of data."""


_MAZE, _MANIPULATION = ("navigate", "stitch"), ("play", "noisy")
ENVIRONMENTS = {
    **{f"pointmaze-{m}": Environment(2, 2, 1000, -1, _MAZE) for m in ("medium", "large", "giant", "teleport")},
    **{f"antmaze-{m}": Environment(29, 8, 1000, -1, (*_MAZE, "explore")) for m in ("medium", "large", "teleport")},
    "antmaze-giant": Environment(29, 8, 1000, -1, _MAZE),
    **{f"humanoidmaze-{m}": Environment(69, 21, 2000, -1, _MAZE) for m in ("medium", "large")},
    "humanoidmaze-giant": Environment(69, 21, 4000, -1, _MAZE),
    **{f"antsoccer-{m}": Environment(42, 8, 1000, -1, _MAZE) for m in ("arena", "medium")},
    "cube-single": Environment(28, 5, 200, -1, _MANIPULATION),
    "cube-double": Environment(37, 5, 500, -2, _MANIPULATION),
    "cube-triple": Environment(46, 5, 1000, -3, _MANIPULATION),
    "cube-quadruple": Environment(55, 5, 1000, -4, _MANIPULATION),
    "cube-octuple": Environment(91, 5, 1500, -8, _MANIPULATION),
    "scene": Environment(40, 5, 750, -5, _MANIPULATION),
    "puzzle-3x3": Environment(55, 5, 500, -9, _MANIPULATION),
    "puzzle-4x4": Environment(83, 5, 500, -16, _MANIPULATION),
    "puzzle-4x5": Environment(99, 5, 1000, -20, _MANIPULATION),
    "puzzle-4x6": Environment(115, 5, 1000, -24, _MANIPULATION),
}


@dataclasses.dataclass(frozen=True)
class EnvName:
    """What a user's `--env` names."""

    short: str
    """`cube-double-play`: the name of the run."""
    dataset: str
    """`cube-double-play-v0`: OGBench's name of the data."""
    prefix: str
    """`cube-double`: the environment without the kind of data."""
    default_task: int

    def gym_id(self, task: int) -> str:
        """Gymnasium's id of a single-task environment, such as `cube-double-singletask-task2-v0`."""
        return f"{self.prefix}-singletask-task{task}-v0"


def parse_env(env: str) -> EnvName:
    """Understands `cube-double-play`, `cube-double-play-v0` and `cube-double-play-singletask[-task2]-v0`.

    Raises:
        UserError: the name has no kind of data in it, or a task out of range.
    """
    pattern = rf"(?P<prefix>[a-z0-9-]+?)-(?P<kind>{KINDS})(-singletask)?(-task(?P<task>\d+))?(-v0)?"
    match = re.fullmatch(pattern, env)
    if match is None:
        raise UserError(
            f"unknown environment {env!r}: name an OGBench dataset, such as cube-double-play or "
            f"cube-double-play-singletask-task2-v0 (one of {KINDS.replace('|', ', ')} belongs to the name), or bring "
            f"data with --dataset."
        )
    prefix, kind = match["prefix"], match["kind"]
    if prefix.startswith("visual-"):
        raise UserError(f"{env!r} has images for observations: only state-based environments are supported.")
    default = DEFAULT_TASKS.get(prefix, DEFAULT_TASKS.get(prefix.split("-")[0], 1))
    task = int(match["task"]) if match["task"] else default
    if not 1 <= task <= NUM_TASKS:
        raise UserError(f"task {task} of {env!r} does not exist: OGBench has tasks 1 to {NUM_TASKS}.")
    return EnvName(f"{prefix}-{kind}", f"{prefix}-{kind}-v0", prefix, task)


def run_name(env: str, dataset: Path | None = None) -> str:
    """The name of a run: OGBench's short name; `Id-v0` of Gymnasium's `module:Id-v0`, with `-` for `/`; or, with a
    dataset of one's own, `env` as it is."""
    try:
        return parse_env(env).short
    except UserError:
        if dataset is None and not re.fullmatch(GYM_ID, env):
            raise
    name = env.rpartition(":")[2].replace("/", "-")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"--env {env!r} cannot name a run: use letters, digits, '-', '_' and '.'.")
    return name


def default_run_dir(name: str, *, quick: bool) -> Path:
    """`runs/NAME`; smoke runs go to `runs/NAME-quick`, where no real run takes their base policy for its own."""
    return Path("runs") / (f"{name}-quick" if quick else name)


def _name_window_library() -> None:
    """Tells `glfw`, which Gymnasium imports with any MuJoCo environment, which of its libraries to load (Linux).

    Else it starts a Python process for each, to ask for its version, which prints a traceback if ours ends meanwhile.
    """
    package = importlib.util.find_spec("glfw")
    library = Path(package.origin).parent / "x11" / "libglfw.so" if package else None
    if library and library.is_file():
        os.environ.setdefault("PYGLFW_LIBRARY", str(library))


def import_ogbench() -> None:
    """Imports `ogbench`, which registers its environments with Gymnasium, without looking for a display."""
    asked = os.environ.get("MUJOCO_GL")
    if "mujoco" not in sys.modules:
        os.environ.setdefault("MUJOCO_GL", "disable")
    if asked != "glfw":
        _name_window_library()
    import gymnasium

    try:
        import mujoco  # noqa: F401
        import ogbench  # noqa: F401
    except Exception as error:  # a graphics library that is missing raises any kind
        graphics = f", and leave MUJOCO_GL={asked} away where nothing is drawn" if asked else ""
        raise UserError(
            f"OGBench's simulator cannot be imported ({error}): pip install -r requirements.txt{graphics}."
        ) from None

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's own boxes make it warn about precision.


def check_env(name: EnvName) -> None:
    """Raises `UserError` unless the installed `ogbench` has the single-task environment."""
    import_ogbench()
    import gymnasium

    if name.gym_id(1) not in gymnasium.registry:
        known = sorted({i.partition("-singletask")[0] for i in gymnasium.registry if "-singletask-task1-" in i})
        known = [i for i in known if not i.startswith("visual-")]
        raise UserError(
            f"unknown environment {name.short!r}: the installed ogbench has {', '.join(known)}, "
            f"each followed by a kind of data such as -play or -navigate."
        )
    kind = name.short.removeprefix(f"{name.prefix}-")
    if name.prefix in ENVIRONMENTS and kind not in ENVIRONMENTS[name.prefix].kinds:
        kinds = ", ".join(f"{name.prefix}-{k}" for k in ENVIRONMENTS[name.prefix].kinds)
        raise UserError(f"OGBench has no data called {name.short!r}: choose among {kinds}.")


def data_dir() -> Path:
    """OGBench's cache, `~/.ogbench/data`."""
    return Path("~/.ogbench/data").expanduser()


def collected_path(dataset: str, episodes: int, seed: int = 0) -> Path:
    """Where collected data stands: in a folder of its own, so that nobody takes it for OGBench's published file."""
    return data_dir() / "collected" / f"{dataset}-ep{episodes}-seed{seed}.npz"


def validation_path(train: Path) -> Path:
    """OGBench's convention: `NAME-val.npz` beside `NAME.npz`."""
    return train.with_name(f"{train.stem}-val{train.suffix if train.suffix.lower() == '.npz' else '.npz'}")
