"""What training loops share: replicas, learning rates, standardisation, and the loop over compiled chunks."""

import collections
import contextlib
import functools
import math
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PRNGKeyArray
from tqdm import tqdm

from common import checkpoint
from common.envs import num_cores
from common.errors import UserError
from common.metrics import (
    Metrics,
    git_revision,
    hold_directory,
    package_versions,
    read_json,
    start_tracking,
    write_json,
)

VERSIONS = ("python", "jax", "mujoco")  # that stand in a row of results; a run's config.json holds all
SAVING_SHARE = 0.05  # of the time: a run saves more often than it has to where that costs less


BOUND = 10.0  # of standardised observations; the usual one (VecNormalize of Stable-Baselines3)


class Standardizer(eqx.Module):
    """`clip((x - mean) / std, -10, 10)` per coordinate; one that does not vary, or is ignored, becomes zero.

    Units do not matter: `a x + b` in the place of `x` gives the same numbers, but for rounding. The bound is for
    coordinates that hardly ever move, such as some joints of OGBench's arm: their rare moves would be hundreds of
    standard deviations.
    """

    mean: Float[Array, " observation"]
    std: Float[Array, " observation"]

    @classmethod
    def of(cls, observations: Float[np.ndarray, "rows observation"], *, ignore: Sequence[int] = ()) -> "Standardizer":
        """Mean and standard deviation of the data.

        Raises:
            UserError: `ignore` names a coordinate that does not exist.
        """
        dims = observations.shape[1]
        if not set(ignore) <= set(range(dims)):
            raise UserError(f"--ignore-observations {list(ignore)}: observations have 0 to {dims - 1}.")
        # float64 sums: a million float32 terms lose digits.
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64)
        # What single precision rounds off is no signal.
        constant = std <= np.maximum(2 * np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
        std[constant] = np.inf
        std[list(ignore)] = np.inf
        return cls(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))

    def __call__(self, observation: Float[Array, " observation"]) -> Float[Array, " observation"]:
        return jnp.clip((observation - self.mean) / self.std, -BOUND, BOUND)

    def rows(self, observations: Float[np.ndarray, "rows observation"]) -> Float[np.ndarray, "rows observation"]:
        """A whole dataset, on the host."""
        standard = (observations - np.asarray(self.mean)) / np.asarray(self.std)
        return np.clip(standard, -BOUND, BOUND, out=standard)


def learning_rate(peak: float, schedule: str, steps: int) -> optax.ScalarOrSchedule:
    """`constant`, or `cosine`: `peak * (1 + cos(pi * step / steps)) / 2`."""
    return optax.cosine_decay_schedule(peak, steps) if schedule == "cosine" else peak


def stack_replicas(init: Callable[[PRNGKeyArray], Any], keys: Key[Array, " replicas"]) -> Any:
    """One state per key, stacked along a leading axis."""
    return jax.jit(jax.vmap(init))(keys)


def over_replicas(function: Callable, *trees: Any) -> Any:
    """Applies `function` to each replica, the leading axis of every leaf of `trees`; for use inside `jit`.

    On accelerators this is `vmap`: one wide kernel serves all replicas. A single CPU device runs them one after the
    other instead: XLA's batched matrix product is slower there than as many plain ones, even at one replica.
    """
    if jax.default_backend() == "cpu" and jax.device_count() == 1:
        return jax.lax.map(lambda leaves: function(*leaves), trees)
    return jax.vmap(function)(*trees)


def chunked(train_step: Callable) -> Callable:
    """`train_chunk(args, state, dataset, replicas)`: `args.chunk` steps of all replicas in one compiled call.

    Args:
        train_step: `(args, state, dataset, replica) -> (state, metrics)`, one gradient step of one replica.

    `state`, whose memory is reused, and `replicas` have a leading axis of replicas. Metrics are means over the steps.
    """

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train_chunk(args: Any, state: Any, dataset: Any, replicas: Any) -> tuple[Any, dict[str, Array]]:
        def steps_of_one(state, replica):
            return jax.lax.scan(lambda s, _: train_step(args, s, dataset, replica), state, length=args.chunk)

        state, metrics = over_replicas(steps_of_one, state, replicas)
        return state, jax.tree.map(lambda m: jnp.mean(m, axis=1), metrics)

    return train_chunk


def in_blocks(function: Callable, *trees: Any, rows: int) -> Any:
    """`vmap` over the leading axis of every leaf of `trees`, a block at a time; for use inside `jit`.

    `rows` is how many network rows one element takes. On the CPU a block's activations stay in the cache, where a large
    batch at once would wait for the memory; elsewhere a block only bounds the memory.
    """
    most = 2_048 if jax.default_backend() == "cpu" else 2**19
    return jax.lax.map(lambda leaves: function(*leaves), trees, batch_size=max(1, most // rows))


@functools.cache
def hardware() -> str:
    """What this host computes on, such as `2 cores of Intel Xeon Processor @ 2.60GHz, 1 NVIDIA H100`."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        processor = found[1] if found else processor
    kinds = collections.Counter(device.device_kind for device in jax.local_devices() if device.platform != "cpu")
    return ", ".join([f"{num_cores()} cores of {processor}", *(f"{number} {kind}" for kind, number in kinds.items())])


def provenance() -> dict[str, str]:
    """What code and machine a row of numbers comes from: `git_revision`, `hardware` and the main versions."""
    versions = package_versions()
    about = dict(git_revision=git_revision(), hardware=hardware())
    return about | {f"version_{name}": versions[name] for name in VERSIONS if name in versions}


def join_hosts() -> None:
    """Joins the processes of a run on several hosts (`jax.distributed`); call it before anything else.

    JAX finds out by itself under SLURM, Open MPI, Kubernetes and on TPUs. Elsewhere each process needs the variables
    JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The run directory and the
    data have to lie on a file system that all hosts share. Only the first process evaluates and keeps what it writes.

    SIGTERM to any of them stops all after the same chunk, which is saved (`Run.train`).

    Raises:
        UserError: the processes cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM and tell nobody
    number, process = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(
            num_processes=None if number is None else int(number),
            process_id=None if process is None else int(process),
            shutdown_timeout_seconds=24 * 3600,  # the others wait while the first one evaluates
        )
        # A process that fails must not wait for the others, which would wait for it.
        sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in each process."
        ) from None


def first_host_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on every host, on the first one before the others: it may write files that they read."""
    if jax.process_count() == 1:
        return function()
    result = function() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("first host first")
    return result if jax.process_index() == 0 else function()


def _mesh(replicas: int) -> Mesh | None:
    """The devices that share the replicas; None if it is one."""
    devices = jax.devices() if jax.process_count() > 1 else jax.devices()[:replicas]  # each process takes part
    return Mesh(np.asarray(devices), ("replica",)) if len(devices) > 1 else None


def spread(tree: Any, replicas: int) -> Any:
    """Spreads the leading (replica) axis of every leaf over all devices.

    Where the devices do not divide the replicas evenly the last replica is repeated; `fetch` leaves the repeats out.
    """
    mesh = _mesh(replicas)
    if mesh is None:
        return tree
    index = np.minimum(np.arange(math.ceil(replicas / mesh.size) * mesh.size), replicas - 1)
    return _put(jax.tree.map(lambda x: x[index], tree), NamedSharding(mesh, PartitionSpec("replica")))


def copy_to_devices(tree: Any, replicas: int) -> Any:
    """A copy of `tree`, which all replicas share, on each of the devices that `spread` uses."""
    mesh = _mesh(replicas)
    return tree if mesh is None else _put(tree, NamedSharding(mesh, PartitionSpec()))


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """`jax.device_put`, also where some of the devices belong to other hosts, which hold the same `tree`."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(put(jax.random.key_data(x)))
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


@functools.cache
def _gather(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def fetch(tree: Any, replicas: int) -> Any:
    """The first `replicas` replicas of `tree`, from the devices of all hosts, on this one."""
    if jax.process_count() > 1:
        tree = _gather(jax.tree.leaves(tree)[0].sharding.mesh)(tree)
    return jax.tree.map(lambda x: x[:replicas], jax.device_get(tree))


def noted_anywhere(number: int | None) -> int | None:
    """The signal that one of the hosts noted, if one did: they have to stop after the same chunk."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.asarray(number or 0)))) or None


def leave_hosts() -> None:
    """Leaves the other hosts, which do so too: one that just ended would be taken for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


class Signals:
    """Within `with`, SIGTERM and Ctrl-C are noted in `number`, for a loop to stop at a good place; a second one acts as
    it would outside. One that the loop did not act on acts at the end of the `with`."""

    def __init__(self):
        self.number, self._old = None, {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            self._old = {number: old for number, old in found.items() if old not in (signal.SIG_IGN, None)}

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
        os.write(2, b"\nstopping after this chunk, which is saved then; once more stops at once.\n")

    @contextlib.contextmanager
    def as_outside(self) -> Iterator[None]:
        self._restore()
        yield
        if self.number is None:
            self.__enter__()


# Arguments that say where and how a run is made, and not what comes out.
PLACES = ("run_dir", "policy_run_dir", "resume", "overwrite", "track", "distributed")
OVER = "start over with --overwrite instead of --resume."
STATES = ("train_state.eqx", "train_state.previous.eqx")


def state_to_resume(directory: Path, stage: str) -> Path:
    """The newest complete training state of a run directory.

    Raises:
        UserError: there is none.
    """
    return checkpoint.newest(*(directory / name for name in STATES), stage=stage, remedy=OVER)


class Run:
    """A run directory and the loop that fills it.

    Files: `config.json` (arguments, data, git revision, versions, hardware, and the seconds that the run took up to its
    last checkpoint, evaluations included), `metrics.csv`, `model.eqx` (what later stages load), `train_state.eqx` (what
    `--resume` continues from, with `model.eqx` written just before it) and the one before it,
    `train_state.previous.eqx`. One process at a time may fill a directory. Of several hosts the first one fills it;
    what the others write goes to a temporary directory.
    """

    def __init__(
        self, directory: Path, header: dict[str, Any], *, replicas: Sequence[tuple[int | str, int]], args: Any
    ):
        """Opens the directory; a state left by an earlier run is only continued with `args.resume`.

        Raises:
            UserError: another process is filling the directory; `--resume` with nothing to resume, or with other
                settings than the run had; a run stands here and neither `--resume` nor `--overwrite` is given.
        """
        self.replicas, self.args = list(replicas), args
        self.diverged: list[tuple[int | str, int]] = []
        self.header = {**header, "versions": package_versions(), "git_revision": git_revision()}
        self.header["diverged"] = self.diverged
        self.resume_path, resume_step = None, None
        found = any((directory / name).is_file() for name in STATES)
        if found and jax.process_index() == 0:
            self._lock = hold_directory(directory, "--run-dir")
        if args.resume and found:
            stage = header["stage"]
            self.resume_path = state_to_resume(directory, stage)
            old = checkpoint.read_header(self.resume_path, stage=stage, remedy=OVER)
            resume_step = old["step"]
            self.diverged += [tuple(replica) for replica in old.get("diverged", ())]
            may_differ = (*PLACES, "dataset", *getattr(args, "evaluation_only", ()))
            for field, value in checkpoint.plain(args).items():
                if field not in may_differ and old["args"].get(field) != value:
                    raise UserError(
                        f"--resume: the run in {directory} has {field} {old['args'].get(field)!r}, not {value!r}: "
                        f"pass the same arguments, or {OVER}"
                    )
            if old["data"]["sha256"] != header["data"]["sha256"]:
                raise UserError(f"--resume: the run in {directory} was trained on other data: {OVER}")
            if old.get("policy_sha256") != header.get("policy_sha256"):
                raise UserError(f"--resume: the run in {directory} had another base policy: {OVER}")
            if jax.process_index() == 0:
                for name in (*STATES, "model.eqx", "config.json", "metrics.csv", "evaluation.csv", "calibration.csv"):
                    for path in directory.glob(f".*.{name}"):
                        path.unlink()  # half written by a process that was killed
        elif found and not args.overwrite:
            raise UserError(f"a run stands in {directory}: pass --resume, --overwrite, or another --run-dir.")
        elif jax.process_index() == 0:
            if args.resume:
                print(f"nothing to resume in {directory}: starting.", flush=True)
            self._lock = hold_directory(directory, "--run-dir")
            # Nothing of an earlier run may be taken for this one's. (The bank says itself what it was made of.)
            for path in directory.glob("*"):
                if path.suffix in (".json", ".csv", ".eqx", ".png") and "bank-" not in path.name:
                    path.unlink()
        if jax.process_index() > 0:
            self._temporary = tempfile.TemporaryDirectory()  # removed with this object
            directory = Path(self._temporary.name)
        self.directory = directory
        self.state_path, self.previous_path = (directory / name for name in STATES)
        self.model_path = directory / "model.eqx"
        before = (read_json(directory / "config.json") if self.resume_path is not None else None) or {}
        self._began = time.monotonic() - before.get("seconds", 0.0)
        used = [*filter(None, before.get("hardware", "").split("; ")), hardware()]
        self._hardware = "; ".join(dict.fromkeys(used))  # of all that the run was trained on
        self._write_config()
        track = None
        if args.track and jax.process_index() == 0:
            track = start_tracking("evor", f"{header['env']}-{header['stage']}", checkpoint.plain(args))
        self.metrics = Metrics(
            directory / "metrics.csv",
            stage=header["stage"],
            env=header["env"],
            resume_step=resume_step,
            track=track,
        )

    def _write_config(self) -> None:
        # Not in the checkpoints: those of equal runs are equal.
        seconds = round(time.monotonic() - self._began, 1)
        write_json(self.directory / "config.json", {**self.header, "hardware": self._hardware, "seconds": seconds})

    def restore(self, state: Any) -> Any:
        """The state to start from: `state`, or with `--resume` the one that was saved, if one was."""
        if self.resume_path is None:
            return state
        _, saved = checkpoint.load(self.resume_path, lambda header: state, stage=self.header["stage"], remedy=OVER)
        if self.resume_path != self.state_path:
            self.state_path.unlink(missing_ok=True)  # damaged: the next one must not push the good one out
        return jax.tree.map(jnp.asarray, saved)

    def train(
        self,
        state: Any,
        train_chunk: Callable[[Any, int], tuple[Any, dict[str, Array]]],
        *,
        model: Callable[[Any], Any],
        evaluate: Callable[[int, Any], None] | None = None,
        evaluate_every: int = 0,
    ) -> dict[str, float]:
        """Runs chunks up to `args.steps`, logs their mean metrics, saves, evaluates; returns the last metrics.

        Args:
            state: what `spread` returned.
            train_chunk: `(state, steps done) -> (state, metrics)`.
            model: what `model.eqx` keeps of a state.
            evaluate: called with the step and the state, every `evaluate_every` steps but the last. It and `model` get
                the state of the run's own replicas, on the host.

        Saves every `args.save_every` steps, before an evaluation, and in between where that takes little of the time.
        SIGTERM and Ctrl-C let the chunk come to its end and save it, on all hosts if one gets it. `--resume` evaluates
        first where an evaluation is due at its step.

        A replica of which a number is not finite is given up and reported: the others have nothing to do with it.

        Raises:
            FloatingPointError: no replica is left; the last checkpoint stays as it was.
            SystemExit, KeyboardInterrupt: after a signal.
        """
        own = functools.partial(fetch, replicas=len(self.replicas))
        args, first = self.args, int(np.max(own(state.step)))
        values: dict[str, np.ndarray] = {}
        name = f"{self.header['stage']} {self.header['env']}"
        quiet = jax.process_index() > 0

        def evaluate_where_due(step: int) -> None:
            if not evaluation_due(step):
                return
            found = own(state)  # on all hosts: each of them takes part in the exchange
            if jax.process_index() == 0:
                try:
                    with signals.as_outside():
                        evaluate(step, found)
                except (SystemExit, KeyboardInterrupt) as error:
                    if jax.process_count() == 1:
                        raise
                    signals.number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
            stop_if(noted_anywhere(signals.number), step)

        def stop_if(number: int | None, step: int) -> None:
            """Ends the run, which is saved at `step`, if a signal was noted."""
            if number is None:
                return
            leave_hosts()
            if not quiet:
                print(
                    f"{signal.Signals(number).name}: saved step {step:,} of {args.steps:,} in {self.state_path}; "
                    f"--resume goes on.",
                    file=sys.stderr,
                )
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        def evaluation_due(step: int) -> bool:
            return evaluate is not None and evaluate_every > 0 and step % evaluate_every == 0 and 0 < step < args.steps

        saved_at, saving = time.monotonic(), 0.0  # the first chunk is saved: then it is known what that takes
        bar = tqdm(total=args.steps, initial=first, desc=name, unit="step", disable=quiet)
        with Signals() as signals, bar:
            if self.resume_path is not None:
                evaluate_where_due(first)
            for step in range(first + args.chunk, args.steps + 1, args.chunk):
                began = time.monotonic()
                state, values = train_chunk(state, step - args.chunk)
                values = own(values)
                milliseconds = 1e3 * (time.monotonic() - began) / args.chunk
                self._give_up_diverged(step, values)
                good = self.good()
                values = {metric: numbers[good] for metric, numbers in values.items()}
                self.metrics.log(step, [self.replicas[i] for i in good], values)
                bar.update(args.chunk)
                bar.set_postfix(loss=f"{np.mean(values['loss']):.4g}", ms=f"{milliseconds:.2f}")
                # Several hosts have to decide alike, and their clocks differ.
                cheap = jax.process_count() == 1 and saving < SAVING_SHARE * (time.monotonic() - saved_at)
                due = step % args.save_every == 0 or step == args.steps or evaluation_due(step)
                stop = noted_anywhere(signals.number)
                if due or cheap or stop:
                    saving = self._save(step, own(state), model)
                    saved_at = time.monotonic()
                    stop_if(noted_anywhere(signals.number), step)  # one may have come meanwhile
                evaluate_where_due(step)
        self.state = own(state)
        if first == args.steps and jax.process_index() == 0 and not checkpoint.complete(self.model_path):
            checkpoint.save(self.model_path, {**self.header, "step": first}, model(self.state))  # somebody lost it
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("saved")  # the other hosts read what the first one wrote
        return {metric: float(np.mean(numbers)) for metric, numbers in values.items()}

    def good(self) -> np.ndarray:
        """Indices of the replicas that have not diverged."""
        return np.array([i for i, replica in enumerate(self.replicas) if replica not in self.diverged])

    def _give_up_diverged(self, step: int, values: dict[str, np.ndarray]) -> None:
        for metric, numbers in values.items():
            for i in np.flatnonzero(~np.isfinite(numbers)):
                if self.replicas[i] in self.diverged:
                    continue
                self.diverged.append(self.replicas[i])
                self._write_config()
                report = f"{metric} of (task, seed) {self.replicas[i]} is not finite before step {step:,}"
                if len(self.diverged) == len(self.replicas):
                    raise FloatingPointError(
                        f"{report}: the last checkpoint stays; start over with a smaller --learning-rate."
                    )
                tqdm.write(f"warning: {report}: it is given up, the others go on.", file=sys.stderr)

    def _save(self, step: int, state: Any, model: Callable[[Any], Any]) -> float:
        """Writes a checkpoint; returns the seconds that it took."""
        began = time.monotonic()
        finite = np.ones(len(self.replicas), bool)
        for leaf in jax.tree.leaves(state):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                finite &= np.isfinite(leaf).reshape(len(finite), -1).all(axis=1)
        # The metrics are of the losses before the last update; it may have spoiled the parameters.
        self._give_up_diverged(step, {"a parameter": np.where(finite, 0.0, np.nan)})
        header = {**self.header, "step": step}
        checkpoint.save(self.model_path, header, model(state))
        checkpoint.save(self.state_path, header, state, previous=self.previous_path)
        self._write_config()
        return time.monotonic() - began
