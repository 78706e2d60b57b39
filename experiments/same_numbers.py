"""Did a refactoring change a number? Trains with two revisions and compares every bit.

    python -m experiments.same_numbers main~3
    python -m experiments.same_numbers main~3 --only velocity qc

Both the working tree and a checkout of the revision train 60 steps of each stage, TD target, backup, critic and
baseline on four collected episodes of a maze, and evaluate. Each array of the revision's checkpoints has to be among
those of the working tree, and each row of its CSV files has to stand there, byte for byte.
"""

import dataclasses
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from common import checkpoint
from common.cli import run_cli
from common.errors import UserError

ROOT = Path(__file__).parent.parent
SMALL = (
    "--env pointmaze-medium-navigate --episodes 4 --width 32 --depth 2 --batch-size 16 --steps 60 --steps-per-call 20 "
    "--overwrite --run-dir {out}/{name}"
)
VALUE = f"evor_value {SMALL} --policy-run-dir {{out}}/{{policy}} --num-next-actions 2 --eval-episodes 1 --tasks 1 2"
MLP = f"{VALUE} --critic mlp"  # named, so that another default changes nothing here
BASELINE = VALUE.replace("evor_value", "baselines.{module}")
# Name and command. `{out}`, `{name}` and `{policy}`, the case with the base policy, are filled in by `train`.
CASES: dict[str, str] = {
    "bc": f"evor_bc {SMALL} --seeds 2",
    "bc-horizon": f"evor_bc {SMALL} --horizon 3 --schedule cosine --ignore-observations 1",
    "value": f"{MLP} --seeds 2".replace("--run-dir {out}/{name}", "--run-dir {out}/bc"),
    "horizon": f"{MLP} --horizon 3 --eval-every 20".replace("{policy}", "bc-horizon"),
    "infer": "evor_infer --env pointmaze-medium-navigate --run-dir {out}/bc --out {out}/infer "
    "--num-actions 1 4 --num-returns 2 --eval-episodes 1",
    **{target: f"{MLP} --td-target {target}" for target in ("paper", "independent-noise", "velocity")},
    "dataset": f"{MLP} --next-action dataset",
    "softmax": f"{MLP} --next-action softmax --backup-temperature 0.5 --redraw-bank 20",
    "trunk": f"{VALUE} --critic trunk --head-width 64 --return-axis std --solver euler --schedule cosine "
    "--reward sparse",
    "bounds": f"{MLP} --return-axis bounds --policy-seed 1 --seeds 2 --discount 0.995",
    **{
        critic: f"{BASELINE} --critic {critic} --next-action {backup}".replace("{module}", "critics")
        for critic, backup in dict(scalar="base", c51="softmax", qr="dataset").items()
    },
    "qc": BASELINE.replace("{module}", "qc").replace("--policy-run-dir {out}/{policy} ", ""),
    "qc-frozen": f"{BASELINE} --policy frozen".replace("{module}", "qc"),
}
NEEDED = ("bc", "bc-horizon", "value")
RUN = """
import json, runpy, sys
for words in json.load(sys.stdin):
    print("$ python -m", *words, flush=True)
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if stop.code:
            raise
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare the numbers of the working tree with those of a revision."""

    revision: Annotated[str, tyro.conf.Positional]
    """The revision to compare with."""
    only: tuple[str, ...] = ()
    """Cases; all by default. `bc`, `bc-horizon` and `value` are always trained, since others need them."""


def train(tree: Path, out: Path, cases: list[str]) -> subprocess.Popen:
    """Runs the cases with the code in `tree`, in one process; what it prints goes to `out`.log."""
    commands = [
        shlex.split(CASES[name].replace("{out}", str(out)).replace("{name}", name).replace("{policy}", "bc"))
        for name in cases
    ]
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN],
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    process.stdin.write(json.dumps(commands))
    process.stdin.close()
    return process


def arrays(path: Path) -> Counter:
    """How often each array stands in a checkpoint: a header of one line, arrays as `np.save` writes them, a digest."""
    counted: Counter = Counter()
    with open(path, "rb") as file:
        end = path.stat().st_size - checkpoint.TRAILER_BYTES
        file.readline()
        while file.tell() < end:
            array = np.load(file, allow_pickle=False)
            counted[array.dtype.str, array.shape, hashing(array)] += 1
    return counted


def hashing(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def rows(path: Path) -> Counter:
    """How often each line stands in a CSV file."""
    return Counter(path.read_text().splitlines())


def differences(old: Path, new: Path) -> list[str]:
    """What of the run directory `old` is not in `new`, a sentence each."""
    sentences, paths = [], [path for path in sorted(old.rglob("*")) if path.suffix in (".csv", ".eqx")]
    for path in paths:
        name = path.relative_to(old)
        if not (new / name).is_file():
            sentences.append(f"{name} is missing")
            continue
        read, what = (arrays, "arrays") if path.suffix == ".eqx" else (rows, "rows")
        before = read(path)
        lost = before - read(new / name)
        if lost:
            sentences.append(f"{name}: {lost.total()} of {before.total()} {what} differ")
    return sentences if paths else [f"there is nothing to compare in {old}"]


def main(args: Args) -> None:
    """Trains with both, compares, and prints what differs.

    Raises:
        UserError: something differs, a training failed, or there is no such revision or case.
    """
    if unknown := set(args.only) - set(CASES):
        raise UserError(f"there are no cases {', '.join(sorted(unknown))}: choose among {', '.join(CASES)}.")
    cases = [name for name in CASES if not args.only or name in args.only or name in NEEDED]
    place = Path(tempfile.mkdtemp(prefix="same_numbers-"))
    tree = place / "tree"
    git = ["git", "-C", str(ROOT), "worktree"]
    made = subprocess.run([*git, "add", "--detach", str(tree), args.revision], capture_output=True, text=True)
    if made.returncode:
        place.rmdir()
        raise UserError(f"git cannot check out {args.revision!r}: {made.stderr.strip()}.")
    try:
        outs = {place / "old": tree, place / "new": ROOT}
        processes = {out: train(code, out, cases) for out, code in outs.items()}
        failed = [str(out) for out, process in processes.items() if process.wait()]  # both end before the tree goes
        if failed:
            raise UserError(f"a training failed: its last words stand at the end of {failed[0]}.log.")
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=False)
    differ = 0
    for name in cases:
        if name == "value":
            continue  # beside the policy, in the folder of `bc`
        sentences = differences(place / "old" / name, place / "new" / name)
        differ += bool(sentences)
        print(f"{name:<20} {'; '.join(sentences) or 'the same'}")
    if differ:
        raise UserError(f"{differ} of {len(cases)} cases differ from {args.revision}: see {place}.")
    shutil.rmtree(place)


if __name__ == "__main__":
    run_cli(main, Args)
