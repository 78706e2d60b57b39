"""Trains a stage, killing it at random moments and resuming it; a process of its own, without JAX's threads.

Arguments: STAGE KILLS SEED (`test_kill.py` runs it). In the working directory stands `data.npz`, and for stage 2 a base
policy in `run/`. Each attempt is a fork of this process, which has imported everything and started nothing: what costs
seconds is paid for once. Trains `whole/` without a kill, then `killed-0/`, `killed-1/`, ... each with as many kills as
it takes to get to its end, until there were KILLS of them. Prints, for each kill, the signal and the step saved.

A kill comes a random number of steps after the last one, plus a random part of the time that a few steps take; one in
four comes while the attempt is starting. So they are spread over the run on a busy machine, too.
"""

import dataclasses
import os
import random
import signal
import sys
import time
from pathlib import Path

import evor_bc
import evor_value
from baselines import qc
from common import checkpoint
from common.cli import run_cli
from common.errors import UserError
from common.run import state_to_resume

SMALL = dict(
    env="toy", dataset=Path("data.npz"), width=4, depth=2, batch_size=2, steps_per_call=2, steps=1_000, save_every=20
)  # fmt: skip
STAGES = {
    "bc": (evor_bc, evor_bc.Args(**SMALL), "bc"),
    "value": (evor_value, evor_value.Args(**SMALL, num_next_actions=2, policy_run_dir=Path("run")), "value"),
    "qc": (qc, qc.Args(**SMALL, num_next_actions=2), "value"),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
CAUGHT = (signal.SIGTERM, signal.SIGINT)


def start(stage: str, directory: Path) -> int:
    """Forks an attempt, as the command line would begin or go on; returns its process."""
    # A signal that comes before the `try` would let the child run on as its parent.
    signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
    process = os.fork()
    if process:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        return process
    log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    module, args, _ = STAGES[stage]
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, CAUGHT)
        sys.argv = ["attempt"]
        run_cli(
            lambda _: module.main(dataclasses.replace(args, run_dir=directory, resume=directory.exists())), type(args)
        )
        code = 0
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:  # before the stage began
        code = 130
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def saved_step(stage: str, directory: Path) -> int:
    folder = STAGES[stage][2]
    try:
        path = state_to_resume(directory / folder, folder)
        return checkpoint.read_header(path, stage=folder, remedy="")["step"]
    except UserError:
        return 0


def logged_rows(stage: str, directory: Path) -> int:
    """Chunks that metrics.csv tells of."""
    try:
        return (directory / STAGES[stage][2] / "metrics.csv").read_bytes().count(b"loss")
    except OSError:
        return 0


def has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def main(stage: str, kills: int, seed: int) -> None:
    """See the top of the file."""
    rng = random.Random(seed)
    for name in ("compiled", "whole"):  # the second one finds the programs of the first one
        began = time.monotonic()
        _, status = os.waitpid(start(stage, Path(name)), 0)
        assert status == 0, Path(f"{name}.log").read_text()
    whole, done, number = time.monotonic() - began, 0, 0
    while done < kills:
        directory, at_end = Path(f"killed-{number}"), False
        while not at_end:
            first = logged_rows(stage, directory)
            process = start(stage, directory)
            if rng.random() < 0.25:
                time.sleep(rng.uniform(0.0, 0.5 * whole))
            else:
                rows = first + rng.randrange(1, STAGES[stage][1].steps // STAGES[stage][1].steps_per_call // 2)
                while logged_rows(stage, directory) < rows and not has_ended(process):
                    time.sleep(0.001)
                time.sleep(rng.uniform(0.0, 0.02 * whole))
            chosen = SIGNALS[done % len(SIGNALS)]
            os.kill(process, chosen)  # it may have ended: it is ours until we ask how
            _, status = os.waitpid(process, 0)
            at_end = os.waitstatus_to_exitcode(status) == 0
            killed = os.waitstatus_to_exitcode(status) in (-chosen, 128 + chosen)
            assert at_end or killed, directory.with_suffix(".log").read_text()
            done += killed
            if killed:
                print(f"{signal.Signals(chosen).name} {saved_step(stage, directory)}", flush=True)
        number += 1


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
