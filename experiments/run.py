"""Runs the experiments: lists them, skips what is done, goes on with what was stopped.

    python -m experiments.run --list
    python -m experiments.run --only policies tasks --env cube-single-play
    python -m experiments.run --only maze --print

`experiments/table.py` has the commands of each experiment, in the order that they need. A training or a sweep is done
if what it leaves stands in its run directory, made with the same arguments and trained to its end. A benchmark is done
if its rows stand there. Else it is run, a training with `--resume`, which starts where nothing was saved. Tables are
drawn anew each time, into `runs/tables/`. `--slot 9` stops a training after nine minutes, for a scheduler with short
slots: the next call goes on (sweeps and evaluations begin anew).
"""

import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import checkpoint
from common.cli import parse_args, run_cli
from common.data.names import default_run_dir, run_name
from common.errors import UserError
from common.files import plain, read_csv, read_json, sha256
from common.run import NOT_RESULTS
from experiments.gather import of_readout
from experiments.table import ENVIRONMENTS, EXPERIMENTS, MINUTES, NAMED_ONLY

ROOT = Path(__file__).parent.parent
TRAINED = {"evor_bc": "bc", "evor_value": "value", "baselines.critics": "value", "baselines.qc": "value"}
MAY_DIFFER = (*NOT_RESULTS, "workers", "save_every", "video")


@dataclasses.dataclass(frozen=True)
class Args:
    """Run experiments; what is done is skipped."""

    only: tuple[str, ...] = ()
    """Experiments; by default all that two CPU cores can do."""
    env: str | None = None
    """Only the commands about this environment alone, which draws no table; all by default."""
    list: bool = False
    """Only say how far each command is."""
    print: bool = False
    """Only print the commands, for a shell."""
    slot: float | None = None
    """Minutes after which a command is stopped and saved; the next call goes on."""


def parse(command: str) -> tuple[str, Any]:
    """The module of a command and its arguments."""
    words = shlex.split(command)
    module = words[0].removesuffix(".py")
    script = importlib.import_module(module)
    recipe_of = getattr(script, "recipe_of", lambda args: {})
    return module, parse_args(script.Args, getattr(script, "PRESETS", {}), words[1:], recipe_of=recipe_of)


def shell(command: str) -> str:
    """The command as one types it."""
    module, *words = command.split()
    return " ".join(["python", *(() if module.endswith(".py") else ["-m"]), module, *words])


def about(command: str, env: str) -> bool:
    """Whether the command names this environment and no other."""
    return {name for name in ENVIRONMENTS if name in re.split(r"[\s/]", command)} == {env}


def progress(command: str) -> str:
    """How far a command is: `done`, `not begun`, `other arguments`, `step N of M`, or `drawn anew`."""
    module, args = parse(command)
    if module == "experiments.draw":
        return "drawn anew"
    if module not in (*TRAINED, "evor_infer"):  # a benchmark, or what makes data
        return "done" if (args.out if args.out.suffix else args.out / "speed.csv").is_file() else "not begun"
    run_dir = args.run_dir or default_run_dir(run_name(args.env, getattr(args, "dataset", None)), quick=args.quick)
    policy = (args.policy_run_dir or run_dir) / "bc" / "model.eqx" if hasattr(args, "policy_run_dir") else None
    directory = run_dir / (TRAINED[module] if module in TRAINED else args.out)
    config = read_json(directory / "config.json")
    if config is None:
        return "not begun"
    # None stands for a default that is only known when the command runs.
    asked = {name: value for name, value in plain(args).items() if name not in MAY_DIFFER and value is not None}
    if any(config.get("args", {}).get(name) != value for name, value in asked.items()):
        return "other arguments"
    if policy and config.get("policy_sha256") and not (policy.is_file() and sha256(policy) == config["policy_sha256"]):
        return "another base policy"
    if module in TRAINED:
        return progress_of_training(directory, TRAINED[module], args, config)
    critic = run_dir / "value" / "model.eqx"
    return "done" if critic.is_file() and sha256(critic) == config["critic_sha256"] else "not begun"


def progress_of_training(directory: Path, stage: str, args: Any, config: dict[str, Any]) -> str:
    """How far a training with the arguments of a command is, its evaluation included."""
    model = directory / "model.eqx"
    if not checkpoint.complete(model):
        return "not begun"
    step = checkpoint.read_header(model, stage=stage, remedy="")["step"]
    episodes = read_csv(directory / "evaluation.csv") if (directory / "evaluation.csv").is_file() else []
    # Rows of other settings were left by an evaluation that was stopped before its end.
    evaluated = [
        (row["task"], row["seed"])
        for row in of_readout(episodes, plain(args))
        if row["step"] == str(args.steps) and row["num_actions"] == str(config["args"]["num_actions"])
    ]
    complete = not getattr(args, "eval_episodes", 0) or all(
        evaluated.count((str(task), str(seed))) == args.eval_episodes for task, seed in config["replicas"]
    )
    return "done" if step == args.steps and complete else f"step {step:,} of {args.steps:,}"


def run(command: str, slot: float | None) -> bool:
    """Runs a command from the repository's root; returns whether it came to its end within its slot.

    Raises:
        UserError: it failed.
    """
    module, _ = parse(command)
    words = [os.path.expanduser(word) for word in shlex.split(command)[1:]] + ["--resume"] * (module in TRAINED)
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


def chosen(args: Args) -> list[tuple[str, str]]:
    """Names and commands of the experiments that were asked for.

    Raises:
        UserError: there is no such experiment, or nothing about the environment.
    """
    unknown = set(args.only) - set(EXPERIMENTS)
    if unknown:
        raise UserError(f"there is no experiment {sorted(unknown)[0]!r}: choose among {', '.join(EXPERIMENTS)}.")
    names = args.only or [name for name in EXPERIMENTS if name not in NAMED_ONLY]
    commands = [(name, command.strip()) for name in names for command in EXPERIMENTS[name]]
    if args.env is not None:
        commands = [pair for pair in commands if about(pair[1], args.env)]
        if not commands:
            raise UserError(f"no command is about {args.env!r} alone: choose among {', '.join(ENVIRONMENTS)}.")
    return commands


def main(args: Args) -> None:
    """See the top of the file.

    Raises:
        UserError: commands failed, after all others were run.
    """
    commands = chosen(args)
    if args.print:
        print(*(shell(command) for _, command in commands), sep="\n")
        return
    os.chdir(ROOT)
    failed = 0
    for name, command in commands:
        state = progress(command)
        minutes = f" ({MINUTES[name]} minutes of training in all)" if args.list and name in MINUTES else ""
        print(f"{name}{minutes}: {state}: {shell(command)}", flush=True)
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
