"""The table of experiments: for each the commands behind it, in the order that they need.

The last command of most draws their table. What is not `full-*` is for two CPU cores; `full-*` is the scale of the
paper, for a GPU.
"""

import dataclasses
from types import ModuleType

import evor_bc
import evor_value
from common.cli import flags_of

CUBE = "cube-double-play"
SINGLE = "cube-single-play"
MAZE = "pointmaze-medium-navigate"
SCENE = "scene-play"
PUZZLE = "puzzle-3x3-play"
LARGE = "pointmaze-large-navigate"
PREVIEW = (SINGLE, CUBE, MAZE)
THIRTY = (MAZE, LARGE, SINGLE, CUBE, SCENE, PUZZLE)
GYMNASIUM = ("Pendulum-v1", "Hopper-v5", "HalfCheetah-v5")
FULL = (LARGE, SINGLE, CUBE, SCENE, PUZZLE)
ENVIRONMENTS = tuple(dict.fromkeys((*PREVIEW, *FULL, *GYMNASIUM)))
# What the experiments before `thirty-tasks` set instead of the recipes and presets of today.
HORIZON = {env: f"--horizon {5 if env == CUBE else 1}" for env in PREVIEW}
POLICY = {env: f"--ignore-observations{' 6 7 8 9 10 11' * (env == CUBE)}" for env in PREVIEW}
BASE = "--width 512 --tau 0.02 --next-action base --discount 0.99 --reward default --noise-scale 1 --num-actions 16"
IMPROVED = "--next-action softmax --discount 0.995"  # what mazes need, see docs/tuning.md
CHANCE = "--action-temperature 0.003"  # a later flag beats an earlier one
GREEDY = "--action-temperature 0"  # the best candidate
SCHEDULES = {"cosine": "", "constant": "--schedule constant --learning-rate 3e-4"}  # the preset's, and the paper's
SIZES = ("--width 64", "--width 128", "--width 256", "--depth 2")  # beside 4 x 512
MAZES = (f"softmax/{MAZE}", *(f"softmax-{task}/{MAZE}" for task in (2, 3, 4, 5)))  # tasks 1 to 5


def policy(env: str, flags: str) -> str:
    return f"evor_bc.py --env {env} {HORIZON[env]} {POLICY[env]} --width 512 {flags}"


def preview(env: str, name: str, flags: str = "") -> str:
    return (
        f"evor_value.py --env {env} --preview {HORIZON[env]} {POLICY[env]} --steps 50000 {BASE} {CHANCE} {flags} "
        f"--run-dir runs/{name}/{env} --policy-run-dir runs/{env}"
    )


def small(env: str, run: str, flags: str = "", *, script: str = "evor_value.py") -> str:
    """At the scale of the preset, with the temperatures of the stored rows."""
    before = "--width 512" if script == "baselines.qc" else BASE
    return (
        f"{script} --env {env} --preview --return-temperature 0.1 {GREEDY} {HORIZON[env]} {POLICY[env]} --steps 20000 "
        f"{before} {flags} --run-dir runs/{run} --policy-run-dir runs/{env}"
    )


def compared(run: str, flags: str, *, critic: str | None = None) -> str:
    """A line of the tables of baselines: 30,000 steps on the base policy of seed 0."""
    flags = f"--steps 30000 --policy-seed 0 {flags}"
    if critic is None:
        return small(CUBE, run, flags)
    return small(CUBE, run, f"--critic {critic} {flags}", script="baselines.critics")


def recipe(script: ModuleType, env: str) -> str:
    """The flags of an environment's recipe, but for how long a base policy is trained."""
    args = script.Args(env=env)
    found = {name: value for name, value in script.recipe_of(args).items() if not name.endswith("steps")}
    return flags_of(dataclasses.replace(args, **found), found)


def full(env: str, name: str, flags: str = "") -> str:
    return (
        f"evor_value.py --env {env} {recipe(evor_value, env)} --tasks 1 2 3 4 5 --seeds 5 {flags} "
        f"--run-dir runs/full/{name} --policy-run-dir runs/full/{env}"
    )


def sweep(table: str, flags: str) -> list[str]:
    """A sweep of the reward models of `tasks` on cube-double, and its table."""
    about = f"evor_infer.py --env {CUBE} --run-dir runs/tasks/{CUBE} --num-returns 8"
    return [f"{about} {flags} --out {table}", draw(table, f"tasks/{CUBE}/{table}")]


def draw(name: str, *runs: str) -> str:
    """Makes rows of runs, and a table of them in runs/tables/."""
    return f"experiments.draw {name} --runs {' '.join(f'runs/{run}' for run in runs)}"


def beyond_ogbench(env: str) -> list[str]:
    """Two seeds of critics on one base policy of data that does not come from OGBench."""
    run, data = f"beyond/{env}", f"--dataset minari:evor/{env.rpartition('-')[0].lower()}-v0 --env {env} --preview"
    policy = critic = ""
    if env != "Hopper-v5":  # of which the rows are those of an older `--preview`
        width = 128 if env == "Pendulum-v1" else 256
        policy, critic = f"--width {width} --steps 30000", f"--width {width} --steps 20000 --tau 0.02"
    about = f"{data} {critic} --policy-run-dir runs/{run} --policy-seed 0 --seeds 2"
    critics = {
        "default": "evor_value.py",
        "paper": "evor_value.py --td-target paper",
        "scalar": "baselines.critics --critic scalar",
    }
    return [
        f"experiments.gym_data --env {env} --steps {150_000 if env == 'Hopper-v5' else 100_000} "
        f"--out runs/tables/beyond-ogbench/{env}.json",
        f"evor_bc.py {data} {policy} --run-dir runs/{run}",
        *(f"{command} {about} --run-dir runs/{run}-{name}" for name, command in critics.items()),
    ]


COMPARED = ("thirty", "thirty-base", "thirty-paper", "thirty-bounds", "thirty-scalar", "thirty-qc", "thirty-h1")


ALL_TASKS = "--tasks 1 2 3 4 5"
TWO_SEEDS = "--preview --seeds 2 --policy-seed 0"


def thirty(env: str) -> str:
    """The default on all tasks: two seeds on one base policy."""
    return f"evor_value.py --env {env} {TWO_SEEDS} {ALL_TASKS} --run-dir runs/thirty/{env}"


def thirty_methods(env: str) -> list[str]:
    """What `thirty` is compared with, on its base policy and the default task. Each changes one thing, QC all but the
    base policy. In mazes and on scene-play the `base` backup has all tasks, on scene-play also on another axis."""
    about, run = f"--env {env} {TWO_SEEDS}", f"runs/thirty/{env}"
    methods = {
        "base": f"evor_value.py {ALL_TASKS if env in (MAZE, LARGE, SCENE) else ''} --next-action base",
        "paper": "evor_value.py --td-target paper",
        "scalar": "baselines.critics --critic scalar",
        "qc": "baselines.qc",
    }
    if env != PUZZLE:  # at its discount no episode is long enough for a calibration
        on = ALL_TASKS if env == SCENE else ""
        methods["bounds"] = f"evor_value.py {on} --next-action base --return-axis bounds"
    short = f"runs/thirty-h1/{env}"
    return [
        *(
            f"{command} {about} --policy-run-dir {run} --run-dir runs/thirty-{name}/{env}"
            for name, command in methods.items()
        ),
        f"evor_bc.py --env {env} --preview --horizon 1 --run-dir {short}",
        f"baselines.qc {about} --horizon 1 --num-next-actions 4 --run-dir {short}",
    ]


SWEPT = {
    "num_actions": "--num-actions 1 2 4 8 16 32 64",
    "tau_q": "--action-temperature 0 0.003 0.03 0.3 3 inf",
    "tau_r": "--return-temperature 0 0.03 0.1 0.3 1 3 inf",
}


def thirty_sweeps(env: str) -> list[str]:
    """What the paper's figures sweep, on the reward models of `thirty`."""
    about = f"evor_infer.py --env {env} --run-dir runs/thirty/{env} --eval-episodes 5"
    return [f"{about} {flags} --out {name}" for name, flags in SWEPT.items()]


def targets() -> list[str]:
    """The published target and the default one, each with the base and the softmax backup."""
    commands = []
    for target in ("shared-noise", "paper"):
        flags = f"--td-target {target}"
        commands += [
            small(SINGLE, f"targets/single-{target}-base", f"--tasks 2 1 4 {flags}"),
            small(SINGLE, f"targets/single-{target}-softmax", f"{flags} --next-action softmax"),
            small(CUBE, f"targets/double-{target}-base", flags),
            small(CUBE, f"targets/double-{target}-softmax", f"{flags} --next-action softmax"),
        ]
    names = (f"{env}-{target}-{backup}" for env in ("double", "single") for target in ("paper", "shared-noise")
             for backup in ("base", "softmax"))  # fmt: skip
    return [*commands, draw("targets", *(f"targets/{name}" for name in names))]


def baselines() -> list[str]:
    """EVOR and its critic without the flow: two seeds on one base policy, one bank; QC on the same base policies."""
    short = f"runs/{CUBE}-h1"
    commands, runs = (
        [policy(CUBE, f"--preview --steps 200000 --run-dir {short}").replace("--horizon 5", "--horizon 1")],
        [],
    )
    for backup in ("base", "softmax"):
        flags = f"--seeds 2 --next-action {backup}"
        for name in ("paper", "shared-noise", "scalar", "c51", "qr"):
            runs.append(f"baselines/{name}-{backup}")
            if name in ("paper", "shared-noise"):
                commands.append(compared(runs[-1], f"{flags} --td-target {name}"))
            else:
                commands.append(compared(runs[-1], flags, critic=name))
    qc = small(CUBE, "baselines/qc-h5-n32", "--steps 30000", script="baselines.qc")
    # The same with chunks of one action, on the base policy of horizon 1.
    commands += [qc, qc.replace("--horizon 5", "--horizon 1 --num-next-actions 4").replace("h5-n32", "h1-n4") + "-h1"]
    # The same models ranked by the mean of their returns.
    commands += [
        f"evor_infer.py --env {CUBE} --run-dir runs/baselines/{name}-base --num-actions 16 --num-returns 8 "
        f"--return-temperature 0.1 inf {GREEDY} --out readout"
        for name in ("shared-noise", "qr", "c51")
    ]
    runs += ["baselines/qc-h5-n32", "baselines/qc-h1-n4"]
    timing = "benchmarks.speed --groups baselines --rounds 2 --steps 5 --out runs/tables/baselines"
    return [*commands, timing, draw("baselines --rows runs/tables", *runs)]


def backups() -> list[str]:
    """Between the one-step and the greedy backup, one seed: the data's action, a softmax of 4 at a temperature of 4
    units of return (0.02 of their range), the best of 4."""
    flags = {name: f"--next-action {name}" for name in ("base", "dataset", "softmax")}
    lines = {f"scalar-{name}": ("scalar", flags[name]) for name in flags}
    lines["scalar-softmax-warm"] = "scalar", "--next-action softmax --backup-temperature 0.02"
    lines |= {f"shared-noise-{name}": (None, flags[name]) for name in flags}
    lines["c51-base"] = "c51", "--first-seed 1"
    commands = [compared(f"backups/{run}", flags, critic=critic) for run, (critic, flags) in lines.items()]
    return [*commands, draw("backups", *(f"backups/{run}" for run in lines))]


def same_data(env: str) -> str:
    collected = f"~/.ogbench/data/collected/{env}-v0-ep1000-seed0.npz"
    return (
        f"benchmarks.same_data --env {env} --reference reference/{env}-v0.npz --collected {collected} "
        f"--out runs/tables/same_data/{env}.csv"
    )


EXPERIMENTS: dict[str, list[str]] = {
    "thirty-tasks": [
        *(thirty(env) for env in THIRTY),
        draw("thirty-tasks", *(f"thirty/{env}" for env in THIRTY)),
    ],
    "thirty-methods": [
        *(command for env in THIRTY for command in thirty_methods(env)),
        draw(
            "thirty-tasks",
            *(f"{name}/{env}" for name in COMPARED for env in THIRTY if (name, env) != ("thirty-bounds", PUZZLE)),
        ),
        "experiments.draw axes --rows runs/tables",
    ],
    "thirty-sweeps": [
        *(command for env in THIRTY for command in thirty_sweeps(env)),
        *(draw(f"thirty-tasks/{name}", *(f"thirty/{env}/{name}" for env in THIRTY)) for name in SWEPT),
    ],
    "policies": [policy(env, f"--preview --steps {200 if env == CUBE else 100}000") for env in PREVIEW],
    "tasks": [preview(env, "tasks", f"--tasks 1 2 3 4 5 {GREEDY * (env == MAZE)}") for env in PREVIEW],
    "seeds": [preview(env, "seeds", f"--first-seed 1 --policy-seed 0 {GREEDY * (env == MAZE)}") for env in PREVIEW],
    "paper": [
        *(preview(env, "paper", "--td-target paper") for env in PREVIEW[:2]),
        draw("tasks", *(f"{name}/{env}" for name in ("tasks", "seeds", "paper") for env in PREVIEW[:2])),
    ],
    "maze": [
        preview(MAZE, "discount", "--discount 0.995"),
        preview(MAZE, "softmax", f"{IMPROVED}"),  # task 1
        *(preview(MAZE, f"softmax-{task}", f"{IMPROVED} --tasks {task}") for task in (2, 3, 4, 5)),
        preview(MAZE, "softmax-seed", f"{IMPROVED} --first-seed 1 --policy-seed 0"),
        draw(
            "tasks",
            *(f"{name}/{env}" for name in ("tasks", "seeds", "paper") for env in PREVIEW[:2]),
            *(f"{name}/{MAZE}" for name in ("tasks", "seeds", "discount", "softmax-seed")),
            *MAZES,
        ),
    ],
    "beyond-ogbench": [
        *(command for env in GYMNASIUM for command in beyond_ogbench(env)),
        draw(
            "beyond-ogbench", *(f"beyond/{env}-{name}" for env in GYMNASIUM for name in ("default", "paper", "scalar"))
        ),
    ],
    "schedule": [
        *(preview(CUBE, name, f"{flags} --eval-every 10000 {GREEDY}") for name, flags in SCHEDULES.items()),
        draw("schedule", *(f"{name}/{CUBE}" for name in SCHEDULES)),
    ],
    "policy_schedule": [  # of stage 1, at a quarter of its steps
        *(
            policy(CUBE, f"--preview --steps 50000 {flags} --run-dir runs/policy-{name}/{CUBE}")
            for name, flags in SCHEDULES.items()
        ),
        f"benchmarks.base_policy --env {CUBE} --num-episodes 50 --run-dirs runs/{CUBE} runs/policy-cosine/{CUBE} "
        f"runs/policy-constant/{CUBE} --out runs/tables/base_policy/schedule.csv",
    ],
    "velocities": [  # seen or hidden
        f"evor_bc.py --env {CUBE} --preview --width 512 --ignore-observations --steps 250000 "
        f"--run-dir runs/{CUBE}-velocities",
        *(f"benchmarks.base_policy --env {env} --out runs/tables/base_policy/{env}.csv" for env in PREVIEW[:2]),
        f"benchmarks.base_policy --env {CUBE} --run-dirs runs/{CUBE}-velocities "
        f"--out runs/tables/base_policy/{CUBE}_velocities.csv",
    ],
    "capacity": [
        *(preview(CUBE, "capacity" + flags[1:].replace(" ", "-"), f"{flags} {GREEDY}") for flags in SIZES),
        draw("capacity", f"cosine/{CUBE}", *(f"capacity{flags[1:].replace(' ', '-')}/{CUBE}" for flags in SIZES)),
    ],
    "num_actions": sweep("num_actions", "--tasks 1 2 --num-actions 1 2 4 8 16 32 64"),
    "action_noise": sweep("action_noise", "--tasks 2 --num-actions 1 16 --action-noise 0 0.1 0.2 0.4"),
    "candidates": [
        f"benchmarks.candidates --run-dir runs/tasks/{CUBE}",
        f"benchmarks.saturation --run-dir runs/tasks/{CUBE} --other runs/seeds/{CUBE}",
        "experiments.draw candidates saturation --rows runs/tables",
    ],
    "targets": targets(),
    "target_steps": [  # four Euler steps, in the bootstrap too
        small(SINGLE, "target_steps/single", "--tasks 2 1 4 --flow-steps 4 --solver euler"),
        small(CUBE, "target_steps/double", "--flow-steps 4 --solver euler"),
        draw("target_steps", "target_steps/double", "target_steps/single"),
    ],
    "next_actions": [  # K = 4 is the default
        *(small(CUBE, f"next_actions/double-{k}", f"--num-next-actions {k}") for k in (1, 2, 8)),
        draw(
            "next_actions",
            "next_actions/double-1",
            "next_actions/double-2",
            "targets/double-shared-noise-base",
            "next_actions/double-8",
        ),
    ],
    "critics": [  # the paper's MLP
        small(CUBE, "critics/double-mlp", "--critic mlp"),
        small(SINGLE, "critics/single-mlp", "--tasks 2 --critic mlp"),
        draw(
            "critics",
            "critics/double-mlp",
            "targets/double-shared-noise-base",
            "critics/single-mlp",
            "targets/single-shared-noise-base",
        ),
    ],
    "baselines": baselines(),
    "backups": backups(),
    # Collected data against data of OGBench's own script (data_gen_scripts/ of its repository), in reference/.
    "same_data": [same_data(env) for env in (CUBE, LARGE)],
    # For a GPU: `--only full-cube-double-play --slot 9`.
    **{
        f"full-{env}": [
            f"evor_bc.py --env {env} {recipe(evor_bc, env)} --seeds 5 --run-dir runs/full/{env}",
            full(env, env),
        ]
        for env in FULL
    },
    "full-scene-play-default": [full(SCENE, "scene-play-default", "--reward default")],
}
# Not run unless they are named.
NAMED_ONLY = ("same_data", *(name for name in EXPERIMENTS if name.startswith("full")))
# Of training, where stored rows have them: on one core of an AMD EPYC, and for what is older on two of an Intel Xeon.
MINUTES = {"thirty-tasks": 444, "tasks": 109, "seeds": 17, "paper": 13, "maze": 175, "schedule": 19, "capacity": 9}
