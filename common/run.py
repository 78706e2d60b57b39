"""A run: the directory that a training fills, and the loop over its compiled calls.

with Run(args, stage="value") as run:
    state = run.start(problem, init_state, model=...)
    for step in run.steps():
        state, metrics = train_chunk(args, state, problem.data(step), problem.replicas)
        run.record(state, metrics)
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from common import checkpoint
from common.args import check
from common.errors import UserError
from common.files import hold_directory, read_json, write_json
from common.metrics import Metrics
from common.progress import progress
from common.provenance import git_revision, hardware, package_versions
from common.replicas import (
    check_devices,
    fetch,
    join_hosts,
    leave_hosts,
    noted_anywhere,
    spread,
    stack_replicas,
    use_cores,
)
from common.tracking import import_tracker, start_tracking

SAVING_SHARE = 0.05  # of the time: a run saves more often than it has to where that costs less
# Arguments that say where and how a run is made, and not what comes out.
NOT_RESULTS = ("run_dir", "policy_run_dir", "resume", "overwrite", "track", "distributed", "policy_steps")
START_OVER = "start over with --overwrite instead of --resume."
STATE_FILES = ("train_state.eqx", "train_state.previous.eqx")
LEFT_BY_A_KILL = (*STATE_FILES, "model.eqx", "config.json", "metrics.csv", "evaluation.csv", "calibration.csv")


class Signals:
    """Within `with`, SIGTERM and Ctrl-C are noted in `number`, for a loop to stop at a good place; a second one acts as
    it would outside. One that the loop did not act on acts at the end of the `with`."""

    def __init__(self):
        self.number, self._old = None, {}
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            self._old = {number: old for number, old in handlers.items() if old not in (signal.SIG_IGN, None)}

    def __enter__(self) -> "Signals":
        for number in self._old:
            signal.signal(number, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self._restore()
        if error is None and self.number is not None:
            signal.raise_signal(self.number)

    def _restore(self) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: Any) -> None:
        self.number = number
        self._restore()
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, b"\nstopping after this call, which is saved then; once more stops at once.\n")

    @contextlib.contextmanager
    def as_outside(self) -> Iterator[None]:
        self._restore()
        yield
        if self.number is None:
            self.__enter__()


def state_to_resume(directory: Path, stage: str) -> Path:
    """The newest complete training state of a run directory.

    Raises:
        UserError: there is none.
    """
    return checkpoint.newest(*(directory / name for name in STATE_FILES), stage=stage, remedy=START_OVER)


def differences(header: dict[str, Any], args: Any) -> Iterator[str]:
    """In what the arguments of a run that is to be resumed differ from those that its checkpoint names."""
    may_differ = (*NOT_RESULTS, "env", "dataset", *getattr(args, "evaluation_only", ()))
    if header.get("env", args.name) != args.name:  # whatever --env and --dataset called it
        yield f"env {header['env']!r}, not {args.name!r}"
    for field, value in checkpoint.plain(args).items():
        if field in may_differ:
            continue
        if field not in header["args"]:
            yield f"no {field}, as runs of another revision, which can finish it"
        elif header["args"][field] != value:
            yield f"{field} {header['args'][field]!r}, not {value!r}"


class Run:
    """A run directory and the loop that fills it.

    Files: `config.json` (arguments, data, git revision, versions, hardware, and the seconds that the run took up to its
    last checkpoint, evaluations included), `metrics.csv`, `model.eqx` (what later stages load), `train_state.eqx` (what
    `--resume` continues from, with `model.eqx` written just before it) and the one before it,
    `train_state.previous.eqx`. One process at a time may fill a directory. Of several hosts the first one fills it;
    what the others write goes to a temporary directory.

    Saves every `args.save_every` steps, before an evaluation, and in between where that takes little of the time.
    SIGTERM and Ctrl-C let the compiled call come to its end and save it, on all hosts if one gets it. A replica of
    which a number is not finite is given up and reported: the others have nothing to do with it.
    """

    def __init__(self, args: Any, *, stage: str):
        """Checks the arguments, that no other run stands here, and with `--resume` that there is a complete state,
        before any data are read.

        Raises:
            UserError: they do not hold.
        """
        numbers = all(isinstance(number, int | np.integer) for number in (args.save_every, args.steps))
        self.save_every = min(args.save_every, args.steps) if numbers else None
        check(dataclasses.replace(args, save_every=self.save_every) if numbers else args)
        self.args, self.stage = args, stage
        self.directory = args.directory / stage
        self.diverged: list[tuple[int | str, int]] = []
        self.resume_path: Path | None = None  # the newest complete state
        self.last_metrics: dict[str, np.ndarray] = {}
        self._loop: Iterator[int] | None = None
        if args.distributed:
            join_hosts()
        else:
            use_cores(args.num_replicas)
        check_devices()
        if args.track is not None and jax.process_index() == 0:
            import_tracker(args.track)
        self._seen = self._look()
        self._refuse_a_run()
        if args.resume and self._seen:
            self.resume_path = state_to_resume(self.directory, stage)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._loop is not None:
            self._loop.close()

    def _look(self) -> list[tuple[str, int, int]]:
        """The training states that stand here, by name, time and size."""
        paths = [path for path in (self.directory / name for name in STATE_FILES) if path.is_file()]
        return [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in paths]

    # --- Start ---

    def start(self, problem: Any, init: Callable[..., Any], *, model: Callable[[Any], Any]) -> Any:
        """Opens the directory; returns the state to start from, on the devices.

        Args:
            problem: has `header()`, `pairs`, `sizes`, `init_keys` and `data`.
            init: `(args, sizes, key=) -> state` of one replica.
            model: what `model.eqx` keeps of a state; its `spec()` goes into the header.

        Raises:
            UserError: another process is filling the directory; `--resume` with other settings than the run had; a run
                stands here and neither `--resume` nor `--overwrite` is given.
        """
        self.pairs, self._model = list(problem.pairs), model
        self.header = dict(stage=self.stage, **problem.header(), args=self.args, versions=package_versions())
        self.header |= dict(git_revision=git_revision(), diverged=self.diverged)
        self._claim()
        state = stack_replicas(lambda key: init(self.args, problem.sizes, key=key), problem.init_keys)
        self.header["model"] = model(state).spec()
        if self.resume_path is not None:
            _, saved = checkpoint.load(self.resume_path, lambda _: state, stage=self.stage, remedy=START_OVER)
            state = jax.tree.map(jnp.asarray, saved)
            del saved
        self.step = int(np.max(state.step))
        self._state = spread(state, len(self.pairs))
        del state  # its memory, before the data take theirs
        if self.step < self.args.steps:
            problem.data(self.step)  # takes its memory and its time before an earlier run goes, and the bar starts
        self._open()
        self._write_config()
        return self._state

    def _claim(self) -> None:
        """Locks the directory, and looks at what stands in it."""
        first_host = jax.process_index() == 0
        if first_host:
            self._lock = hold_directory(self.directory, "--run-dir")
            self._refuse_a_run()  # one that ended meanwhile
        if self.args.resume and self._look() != self._seen:  # another process was filling the directory
            self.resume_path = state_to_resume(self.directory, self.stage) if self._look() else None
        if self.resume_path is not None:
            self._check_resumable()
        elif self.args.resume and first_host:
            print(f"nothing to resume in {self.directory}: starting.", flush=True)

    def _refuse_a_run(self) -> None:
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is no directory: move it away, or pass another --run-dir.")
        something = self._look() or (self.directory / "model.eqx").is_file()
        if something and not (self.args.resume or self.args.overwrite):
            raise UserError(f"a run stands in {self.directory}: pass --resume, --overwrite, or another --run-dir.")

    def _open(self) -> None:
        """Removes what an earlier run left, and opens the log."""
        first_host, track = jax.process_index() == 0, None
        fresh = self.resume_path is None
        if first_host and self.args.track is not None:
            name, config = f"{self.header['env']}-{self.stage}", checkpoint.plain(self.args)
            track = start_tracking(self.args.track, name, config, directory=self.directory, anew=fresh)
        if first_host and fresh and self.args.track != "tensorboard":
            shutil.rmtree(self.directory / "tensorboard", ignore_errors=True)
        if first_host and fresh:
            # Nothing of an earlier run may be taken for this one's. (The bank says itself what it was made of.) A model
            # alone, which --resume does not go on from, stays until the first checkpoint takes its place.
            kept = ("tracking.json",) * (track is not None) + ("model.eqx",) * self.args.resume
            for path in self.directory.glob("*"):
                ours = path.suffix in (".json", ".csv", ".eqx", ".png") and "bank-" not in path.name
                if ours and path.name not in kept:
                    path.unlink()
        if not first_host:
            self._temporary = tempfile.TemporaryDirectory()  # removed with this object
            self.directory = Path(self._temporary.name)
        self.state_path, self.previous_path = (self.directory / name for name in STATE_FILES)
        self.model_path = self.directory / "model.eqx"
        if first_host and self.resume_path == self.previous_path:
            self.state_path.unlink(missing_ok=True)  # damaged: the next one must not push the good one out
        before = (read_json(self.directory / "config.json") if self.resume_path is not None else None) or {}
        self._began = time.monotonic() - before.get("seconds", 0.0)
        used = [*filter(None, before.get("hardware", "").split("; ")), hardware()]
        self._hardware = "; ".join(dict.fromkeys(used))  # of all that the run was trained on
        self.metrics = Metrics(
            self.directory / "metrics.csv",
            stage=self.stage,
            env=self.header["env"],
            resume_step=self._old["step"] if self.resume_path is not None else None,
            track=track,
        )

    def _check_resumable(self) -> None:
        """Whether the state that stands here is one of this run; removes what a kill left half written."""
        old = self._old = checkpoint.read_header(self.resume_path, stage=self.stage, remedy=START_OVER)
        self.diverged += [tuple(replica) for replica in old.get("diverged", ())]
        for difference in differences(old, self.args):
            raise UserError(
                f"--resume: the run in {self.directory} has {difference}: pass the same arguments, or {START_OVER}"
            )
        if old["data"]["sha256"] != self.header["data"]["sha256"]:
            raise UserError(f"--resume: the run in {self.directory} was trained on other data: {START_OVER}")
        if old.get("policy_sha256") != self.header.get("policy_sha256"):
            raise UserError(f"--resume: the run in {self.directory} had another base policy: {START_OVER}")
        if jax.process_index() == 0:
            for name in LEFT_BY_A_KILL:
                for path in self.directory.glob(f".*.{name}"):
                    path.unlink()

    def _write_config(self) -> None:
        # Not in the checkpoints: those of equal runs are equal.
        seconds = round(time.monotonic() - self._began, 1)
        write_json(self.directory / "config.json", {**self.header, "hardware": self._hardware, "seconds": seconds})

    # --- The loop ---

    def steps(self) -> Iterator[int]:
        """The number of steps done, before each compiled call. `record` has to be called once for each.

        Raises:
            FloatingPointError: no replica is left; the last checkpoint stays as it was.
            SystemExit, KeyboardInterrupt: after a signal.
        """
        self._loop = self._steps()
        return self._loop

    def _steps(self) -> Iterator[int]:
        args, first = self.args, self.step
        self._saved_step, self._saved_at, self._saving = first, time.monotonic(), 0.0  # the first call is saved
        name = f"{self.stage} {self.header['env']}"
        bar = progress(total=args.steps, initial=first, desc=name, unit="step", disable=jax.process_index() > 0)
        with Signals() as self._signals, bar as self._bar:
            for step in range(first, args.steps, args.steps_per_call):
                self._call_began = time.monotonic()
                yield step
        if first == args.steps:
            state = self.fetch(self._state)  # on all hosts
            if jax.process_index() == 0:
                self._renew_model(state)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("saved")  # the other hosts read what the first one wrote

    def _renew_model(self, state: Any) -> None:
        """Writes the model of a finished run again where somebody lost it, or where it names other settings of the
        extraction than the arguments. What trained it, and which revision, stays."""
        header = {**self.header, "step": self.step}
        if checkpoint.complete(self.model_path):
            header = checkpoint.read_header(self.model_path, stage=self.stage, remedy=START_OVER)
            now = checkpoint.plain(self.args)
            names = set(getattr(self.args, "evaluation_only", ())) - {"eval_episodes"}  # which no agent reads
            changed = {name: now[name] for name in names if header["args"].get(name) != now[name]}
            if not changed:
                return
            header = header | {"args": header["args"] | changed}
        checkpoint.save(self.model_path, header, self._model(state))

    def record(self, state: Any, metrics: dict[str, Any]) -> None:
        """Takes the state after a call and its mean metrics: logs, gives up what is not finite, saves where due."""
        args = self.args
        values = self.fetch(metrics)
        milliseconds = 1e3 * (time.monotonic() - self._call_began) / args.steps_per_call
        self._state, self.step = state, self.step + args.steps_per_call
        self._give_up_diverged(values)
        good = self.good()
        self.last_metrics = {metric: numbers[good] for metric, numbers in values.items()}
        self.metrics.log(self.step, [self.pairs[i] for i in good], self.last_metrics)
        self._bar.update(args.steps_per_call)
        self._bar.set_postfix(loss=f"{np.mean(self.last_metrics['loss']):.4g}", ms=f"{milliseconds:.2f}")
        self._save_where_due()

    def fetch(self, tree: Any) -> Any:
        """The run's own replicas of a tree that lies on the devices, on the host. All hosts have to call it."""
        return fetch(tree, len(self.pairs))

    def means(self) -> dict[str, float]:
        """The last metrics, averaged over the replicas."""
        return {metric: float(np.mean(numbers)) for metric, numbers in self.last_metrics.items()}

    def good(self) -> np.ndarray:
        """Indices of the replicas that have not diverged."""
        return np.array([i for i, pair in enumerate(self.pairs) if pair not in self.diverged])

    def on_first_host(self, function: Callable[[], None]) -> None:
        """Saves, then calls `function` on the first host. Meanwhile a signal acts at once."""
        self._save()
        self._stop_if_signalled()
        if jax.process_index() == 0:
            try:
                with self._signals.as_outside():
                    function()
            except (SystemExit, KeyboardInterrupt) as error:
                if jax.process_count() == 1:
                    raise
                self._signals.number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        self._stop_if_signalled()
        self._call_began = time.monotonic()

    def _stop_if_signalled(self) -> None:
        """Ends the run, which is saved, if one of the hosts noted a signal."""
        number = noted_anywhere(self._signals.number)
        if number is None:
            return
        leave_hosts()
        if jax.process_index() == 0:
            print(
                f"{signal.Signals(number).name}: saved step {self.step:,} of {self.args.steps:,} in {self.state_path}; "
                f"--resume goes on.",
                file=sys.stderr,
            )
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    # --- Saving ---

    def _save_where_due(self) -> None:
        # Several hosts have to decide alike, and their clocks differ.
        cheap = jax.process_count() == 1 and self._saving < SAVING_SHARE * (time.monotonic() - self._saved_at)
        due = self.step % self.save_every == 0 or self.step == self.args.steps
        if due or cheap or noted_anywhere(self._signals.number):
            self._save()
            self._stop_if_signalled()  # one may have come meanwhile

    def _save(self) -> None:
        """Writes a checkpoint, unless that of this step stands."""
        if self._saved_step == self.step:
            return
        began, state = time.monotonic(), self.fetch(self._state)
        finite = np.ones(len(self.pairs), bool)
        for leaf in jax.tree.leaves(state):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                finite &= np.isfinite(leaf).reshape(len(finite), -1).all(axis=1)
        # The metrics are of the losses before the last update; it may have spoiled the parameters.
        self._give_up_diverged({"a parameter": np.where(finite, 0.0, np.nan)})
        header = {**self.header, "step": self.step}
        checkpoint.save(self.model_path, header, self._model(state))
        checkpoint.save(self.state_path, header, state, previous=self.previous_path)
        self._write_config()
        self._saved_step, self._saved_at, self._saving = self.step, time.monotonic(), time.monotonic() - began

    def _give_up_diverged(self, values: dict[str, np.ndarray]) -> None:
        for metric, numbers in values.items():
            for i in np.flatnonzero(~np.isfinite(numbers)):
                if self.pairs[i] in self.diverged:
                    continue
                self.diverged.append(self.pairs[i])
                self._write_config()
                report = f"{metric} of (task, seed) {self.pairs[i]} is not finite before step {self.step:,}"
                if len(self.diverged) == len(self.pairs):
                    raise FloatingPointError(
                        f"{report}: the last checkpoint stays; start over with a smaller --learning-rate."
                    )
                tqdm.write(f"warning: {report}: it is given up, the others go on.", file=sys.stderr)
