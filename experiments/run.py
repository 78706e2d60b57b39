"""Runs the experiments: lists them, skips what is done, goes on with what was stopped.

    python -m experiments.run --list
    python -m experiments.run --only policies tasks

Each experiment is a list of commands, in the order they need. A command is done if what it leaves stands in its run
directory, made with the same arguments and trained to its end; else it is run, a training with `--resume`, which starts
where nothing was saved. `--slot 9` stops a training after nine minutes, for a scheduler with short slots: the next call
goes on (sweeps and evaluations begin anew). What is not `full` is for two CPU
cores; `full` is the scale of the paper, for a GPU.
"""

import dataclasses
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import checkpoint
from common.envs import default_run_dir, run_name
from common.errors import UserError, parse_args, run_cli
from common.metrics import plain, read_csv, read_json, sha256
from common.training import PLACES
from experiments.preview import of_readout

ROOT = Path(__file__).parent.parent
TRAINED = {"evor_bc": "bc", "evor_value": "value", "baselines.critics": "value", "baselines.qc": "value"}
ANY = (*PLACES, "workers", "save_every", "video")

CUBE = "cube-double-play"
MAZE = "pointmaze-medium-navigate"
PREVIEW = ("cube-single-play", CUBE, MAZE)
FULL = ("pointmaze-large-navigate", "cube-single-play", CUBE, "scene-play", "puzzle-3x3-play")
HORIZON = dict.fromkeys((CUBE, "scene-play", "puzzle-3x3-play"), "--horizon 5")
POLICY = dict.fromkeys((CUBE, "scene-play"), "--ignore-observations 6 7 8 9 10 11")  # joint velocities, see the README
IMPROVED = "--next-action softmax --discount 0.995"  # what mazes need, see the README


def policy(env: str, flags: str) -> str:
    return f"evor_bc.py --env {env} {HORIZON.get(env, '')} {POLICY.get(env, '')} {flags}"


def preview(env: str, name: str, flags: str = "") -> str:
    return (
        f"evor_value.py --env {env} --preview {HORIZON.get(env, '')} --steps 50000 {flags} --run-dir runs/{name}/{env} "
        f"--policy-run-dir runs/{env}"
    )


def full(env: str, name: str, flags: str = "") -> str:
    return (
        f"evor_value.py --env {env} {HORIZON.get(env, '')} --critic trunk --tasks 1 2 3 4 5 --seeds 5 {flags} "
        f"--run-dir runs/full/{name} --policy-run-dir runs/full/{env}"
    )


def sweep(name: str, flags: str, *, run: str = "tasks", tasks: str = "2", env: str = CUBE) -> str:
    return (
        f"evor_infer.py --env {env} --run-dir runs/{run}/{env} --policy-run-dir runs/{env} --tasks {tasks} "
        f"--num-returns 8 {flags} --out {name}"
    )


def readout(env: str, run: str, name: str, flags: str = "") -> str:
    return (
        f"evor_infer.py --env {env} --run-dir runs/{run}/{env} --policy-run-dir runs/{env} "
        f"--num-actions 16 --num-returns 8 --eval-episodes {25 if env == 'scene-play' else 50} {flags} --out {name}"
    )


TEMPERATURES = "0 0.03 0.1 0.2 0.3 0.5 1 3 inf"
GREEDY = "--action-temperature 0"  # the best candidate
SCHEDULES = {"cosine": "", "constant": "--schedule constant --learning-rate 3e-4"}  # the preset's, and the paper's
AXES = {  # what the return axis is compared with, and the one before
    "quantiles": "",
    "std": "--return-axis std",
    "bounds": "--return-axis bounds --solver euler --flow-steps 10",
}
AXES_ON = {  # flags, and how long the range of the possible returns is
    "scene-play": ("--reward sparse --tasks 1 2 3 4 5", 100),
    **{env: ("", 200 if env == CUBE else 100) for env in PREVIEW},
}
SIZES = ("--width 64", "--width 128", "--width 256", "--depth 2")  # beside 4 x 512
EXPERIMENTS: dict[str, list[str]] = {
    # For two CPU cores.
    "policies": [policy(env, "--preview" + " --steps 200000" * (env == CUBE)) for env in PREVIEW],
    "tasks": [preview(env, "tasks", f"--tasks 1 2 3 4 5 {GREEDY * (env == MAZE)}") for env in PREVIEW],
    "seeds": [preview(env, "seeds", f"--first-seed 1 --policy-seed 0 {GREEDY * (env == MAZE)}") for env in PREVIEW],
    "paper": [preview(env, "paper", "--td-target paper") for env in PREVIEW[:2]],
    "maze": [
        preview(MAZE, "softmax", f"{IMPROVED}"),  # task 1; about 20 minutes each
        *(preview(MAZE, f"softmax-{task}", f"{IMPROVED} --tasks {task}") for task in (2, 3, 4, 5)),
        preview(MAZE, "softmax-seed", f"{IMPROVED} --first-seed 1 --policy-seed 0"),
    ],
    "maze_backup": [preview(MAZE, "discount", "--discount 0.995")],
    "scene_policy": [policy("scene-play", "--preview")],
    "axes": [
        command
        for env, (flags, returns) in AXES_ON.items()
        for command in (
            *(
                preview(env, f"axis-{name}", f"{flags} {axis} --seeds 2 --policy-seed 0 --eval-episodes 0")
                for name, axis in AXES.items()
            ),
            # The default of tau_Q when the stored rows were made; it is 1 today.
            readout(env, "axis-quantiles", "after", "--action-temperature 0.2"),
            readout(
                env,
                "axis-bounds",
                "before",
                "--absolute --solver euler --flow-steps 10 "
                f"--return-temperature {0.03 * returns:g} --action-temperature {0.003 * returns:g}",
            ),
        )
    ],
    "schedule": [preview(CUBE, name, f"{flags} --eval-every 10000 {GREEDY}") for name, flags in SCHEDULES.items()],
    "policy_schedule": [  # of stage 1, at a quarter of its steps
        policy(CUBE, f"--preview --steps 50000 {flags} --run-dir runs/policy-{name}/{CUBE}")
        for name, flags in SCHEDULES.items()
    ],
    "capacity": [preview(CUBE, "capacity" + flags[1:].replace(" ", "-"), f"{flags} {GREEDY}") for flags in SIZES],
    "actions": [sweep("actions", "--num-actions 1 2 4 8 16 32 64", tasks="1 2")],
    "tau_q": [sweep("tau_q", f"--num-actions 16 --action-temperature {TEMPERATURES}")],
    "tau_r": [
        sweep("tau_r", f"--num-actions 16 --return-temperature {TEMPERATURES} {GREEDY}", run=r)
        for r in ("tasks", "paper")
    ],
    "tau_r_tasks": [
        sweep("tau_r_tasks", f"--num-actions 16 --return-temperature 0.1 0.3 1 {GREEDY}", tasks="1 2 3 4 5", env=env)
        for env in ("cube-single-play", CUBE)
    ],
    "tau_q_tasks": [
        sweep("tau_q_tasks", "--num-actions 16 --action-temperature 0 0.1 0.2 0.5", run=run, tasks=tasks, env=env)
        for run, tasks in (("tasks", "1 2 3 4 5"), ("seeds", "2"))
        for env in PREVIEW[:2]
    ],
    "tau_q_maze": [
        sweep(
            "tau_q_maze",
            "--num-actions 16 --return-temperature 0.3 1 --action-temperature 0 0.2 0.5",
            run="softmax" if task == 1 else f"softmax-{task}",
            tasks=str(task),
            env=MAZE,
        )
        for task in (1, 2, 3, 4, 5)
    ],
    "temperatures": [
        sweep(
            "temperatures",
            "--num-actions 16 --return-temperature 0 0.1 0.3 1 inf --action-temperature 0 0.1 0.2 0.5 1",
        )
    ],
    "noise": [sweep("noise", "--num-actions 1 16 --action-noise 0 0.1 0.2 0.4")],
    # For a GPU: `--only full-cube-double-play --slot 9`.
    **{
        f"full-{env}": [policy(env, f"--seeds 5 --run-dir runs/full/{env}"), full(env, env, IMPROVED * ("maze" in env))]
        for env in FULL
    },
    "full-scene-play-sparse": [full("scene-play", "scene-play-sparse", "--reward sparse")],
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Run experiments; what is done is skipped."""

    only: tuple[str, ...] = ()
    """Experiments; all of the preview by default."""
    list: bool = False
    """Only say how far each command is."""
    slot: float | None = None
    """Minutes after which a command is stopped and saved; the next call goes on."""


def parse(command: str) -> tuple[str, Any]:
    """The module of a command and its arguments."""
    words = shlex.split(command)
    module = words[0].removesuffix(".py")
    script = importlib.import_module(module)
    return module, parse_args(script.Args, getattr(script, "PRESETS", {}), words[1:])


def progress(command: str) -> str:
    """How far a command is: `done`, `not begun`, `other arguments`, or `step N of M`."""
    module, args = parse(command)
    run_dir = args.run_dir or default_run_dir(run_name(args.env, getattr(args, "dataset", None)), quick=args.quick)
    policy = (args.policy_run_dir or run_dir) / "bc" / "model.eqx" if hasattr(args, "policy_run_dir") else None
    directory = run_dir / (TRAINED[module] if module in TRAINED else args.out)
    config = read_json(directory / "config.json")
    if config is None:
        return "not begun"
    if any(config.get("args", {}).get(field) != value for field, value in plain(args).items() if field not in ANY):
        return "other arguments"
    if config.get("policy_sha256") and not (policy.is_file() and sha256(policy) == config["policy_sha256"]):
        return "another base policy"
    if module not in TRAINED:
        critic = run_dir / "value" / "model.eqx"
        return "done" if critic.is_file() and sha256(critic) == config["critic_sha256"] else "not begun"
    model = directory / "model.eqx"
    if not checkpoint.complete(model):
        return "not begun"
    step = checkpoint.read_header(model, stage=TRAINED[module], remedy="")["step"]
    rows = read_csv(directory / "evaluation.csv") if (directory / "evaluation.csv").is_file() else []
    # Rows of other settings were left by an evaluation that was stopped before its end.
    own = [
        (row["task"], row["seed"])
        for row in of_readout(rows, plain(args))
        if row["step"] == str(args.steps) and row["num_actions"] == str(args.num_actions)
    ]
    evaluated = not getattr(args, "eval_episodes", 0) or all(
        own.count((str(task), str(seed))) == args.eval_episodes for task, seed in config["replicas"]
    )
    return "done" if step == args.steps and evaluated else f"step {step:,} of {args.steps:,}"


def run(command: str, slot: float | None) -> bool:
    """Runs a command from the repository's root; returns whether it came to its end within its slot.

    Raises:
        UserError: it failed.
    """
    module, _ = parse(command)
    words = shlex.split(command)[1:] + (["--resume"] if module in TRAINED else [])
    # It stops when this process is gone, also where that was killed.
    guard = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    # In a session of its own, so that one signal reaches it, from here: a second one would stop it at once.
    process = subprocess.Popen([*guard, sys.executable, "-m", module, *words], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(60 * slot if slot is not None and module in TRAINED else None)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code != 0:
        raise UserError(f"python -m {module} {shlex.join(words)} failed with {code}.")
    return True


def main(args: Args) -> None:
    """See the top of the file.

    Raises:
        UserError: commands failed, after all others were run.
    """
    unknown = set(args.only) - set(EXPERIMENTS)
    if unknown:
        raise UserError(f"there is no experiment {sorted(unknown)[0]!r}: choose among {', '.join(EXPERIMENTS)}.")
    os.chdir(ROOT)
    failed = 0
    names = args.only or [one for one in EXPERIMENTS if not one.startswith("full")]
    for name, command in [(one, command.strip()) for one in names for command in EXPERIMENTS[one]]:
        state = progress(command)
        print(f"{name}: {state}: python {' '.join(command.split())}", flush=True)
        if args.list or state == "done":
            continue
        try:
            if not run(command, args.slot):
                print(f"stopped after {args.slot:g} minutes, at {progress(command)}: run this again to go on.")
                break
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise UserError(f"{failed} commands failed: see above; mend what they say, then run this again.")


if __name__ == "__main__":
    run_cli(main, Args)
