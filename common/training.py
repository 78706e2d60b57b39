"""What training loops share: replicas, learning rates, standardisation, and the loop over compiled chunks."""

import functools
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
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
from common.errors import UserError
from common.metrics import Metrics, git_revision, package_versions, start_tracking, write_json


class Standardizer(eqx.Module):
    """`(x - mean) / std` per coordinate; coordinates that hardly vary keep their scale, ignored ones become zero."""

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
        std = np.where(std < 1e-4, 1.0, std)
        std[list(ignore)] = np.inf
        return cls(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))

    def __call__(self, observation: Float[Array, " observation"]) -> Float[Array, " observation"]:
        return (observation - self.mean) / self.std

    def rows(self, observations: Float[np.ndarray, "rows observation"]) -> Float[np.ndarray, "rows observation"]:
        """A whole dataset, on the host."""
        return (observations - np.asarray(self.mean)) / np.asarray(self.std)


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


def in_blocks(function: Callable, *trees: Any, rows: int) -> Any:
    """`vmap` over the leading axis of every leaf of `trees`, a block at a time; for use inside `jit`.

    `rows` is how many network rows one element takes. On the CPU a block's activations stay in the cache, where a large
    batch at once would wait for the memory; elsewhere a block only bounds the memory.
    """
    most = 2_048 if jax.default_backend() == "cpu" else 2**19
    return jax.lax.map(lambda leaves: function(*leaves), trees, batch_size=max(1, most // rows))


def join_hosts() -> None:
    """Joins the processes of a run on several hosts (`jax.distributed`); call it before anything else.

    JAX finds out by itself under SLURM, Open MPI, Kubernetes and on TPUs. Elsewhere each process needs the variables
    JAX_COORDINATOR_ADDRESS (HOST:PORT of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID. The run directory and the
    data have to lie on a file system that all hosts share. Only the first process evaluates and keeps what it writes.

    Raises:
        UserError: the processes cannot be found.
    """
    if jax.distributed.is_initialized():
        return
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


class Run:
    """A run directory and the loop that fills it.

    Files: `config.json` (arguments, data, git revision, versions), `metrics.csv`, `model.eqx` (what later stages load)
    and `train_state.eqx` (what `--resume` continues from, with `model.eqx` written just before it). Of several hosts
    the first one fills it; what the others write goes to a temporary directory.
    """

    def __init__(
        self, directory: Path, header: dict[str, Any], *, replicas: Sequence[tuple[int | str, int]], args: Any
    ):
        """Opens the directory; a state left by an earlier run is only continued with `args.resume`.

        Raises:
            UserError: `--resume` with nothing to resume, or with other settings than the run had; a run stands here and
                neither `--resume` nor `--overwrite` is given.
        """
        self.replicas, self.args = list(replicas), args
        self.header = {**header, "versions": package_versions(), "git_revision": git_revision()}
        self.resume_path = directory / "train_state.eqx"
        resume_step = None
        if args.resume:
            stage = header["stage"]
            old = checkpoint.read_header(self.resume_path, stage=stage, remedy="start without --resume.")
            resume_step = old["step"]
            for field, value in checkpoint.plain(args).items():
                if (
                    field not in ("resume", "overwrite", "track", "distributed", "run_dir", "policy_run_dir", "dataset")
                    and old["args"].get(field) != value
                ):
                    raise UserError(
                        f"--resume: the run in {directory} has {field} {old['args'].get(field)!r}, not {value!r}: "
                        f"pass the same arguments, or start without --resume."
                    )
            if old["data"]["sha256"] != header["data"]["sha256"]:
                raise UserError(f"--resume: the run in {directory} was trained on other data: start without --resume.")
            if old.get("policy_sha256") != header.get("policy_sha256"):
                raise UserError(f"--resume: the run in {directory} had another base policy: start without --resume.")
        elif self.resume_path.is_file() and not args.overwrite:
            raise UserError(f"a run stands in {directory}: pass --resume, --overwrite, or another --run-dir.")
        elif jax.process_index() == 0:
            # Nothing of an earlier run may be taken for this one's. (The bank says itself what it was made of.)
            for path in directory.glob("*"):
                if path.suffix in (".json", ".csv", ".eqx", ".png") and not path.name.startswith("bank-"):
                    path.unlink()
        if jax.process_index() > 0:
            self._temporary = tempfile.TemporaryDirectory()  # removed with this object
            directory = Path(self._temporary.name)
        self.directory = directory
        self.state_path, self.model_path = directory / "train_state.eqx", directory / "model.eqx"
        write_json(directory / "config.json", self.header)
        track = None
        if args.track and jax.process_index() == 0:
            track = start_tracking("evor", f"{header['env']}-{header['stage']}", checkpoint.plain(args))
        self.metrics = Metrics(
            directory / "metrics.csv",
            stage=header["stage"],
            env=header["env"],
            resume_step=resume_step,
            finished=resume_step == args.steps,
            track=track,
        )

    def restore(self, state: Any) -> Any:
        """The state to start from: `state`, or with `--resume` the one that was saved."""
        if not self.args.resume:
            return state
        _, saved = checkpoint.load(
            self.resume_path, lambda header: state, stage=self.header["stage"], remedy="start without --resume."
        )
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

        Raises:
            FloatingPointError: a metric is not finite; the last checkpoint stays as it was.
        """
        own = functools.partial(fetch, replicas=len(self.replicas))
        args, first = self.args, int(np.max(own(state.step)))
        values: dict[str, Array] = {}
        name = f"{self.header['stage']} {self.header['env']}"
        quiet = jax.process_index() > 0
        with tqdm(total=args.steps, initial=first, desc=name, unit="step", disable=quiet) as bar:
            for step in range(first + args.chunk, args.steps + 1, args.chunk):
                began = time.monotonic()
                state, values = train_chunk(state, step - args.chunk)
                values = own(values)
                bar.update(args.chunk)
                bar.set_postfix(
                    loss=f"{np.mean(values['loss']):.4g}", ms=f"{1e3 * (time.monotonic() - began) / args.chunk:.2f}"
                )
                for metric, numbers in values.items():
                    if not np.isfinite(numbers).all():
                        bad = self.replicas[int(np.argwhere(~np.isfinite(numbers))[0][0])]
                        raise FloatingPointError(f"{metric} of (task, seed) {bad} is not finite before step {step}.")
                self.metrics.log(step, self.replicas, values)
                if evaluate is not None and evaluate_every and step % evaluate_every == 0 and step < args.steps:
                    found = own(state)  # on all hosts: each of them takes part in the exchange
                    if jax.process_index() == 0:
                        evaluate(step, found)
                if step % args.save_every == 0 or step == args.steps:
                    header = {**self.header, "step": step}
                    saved = own(state)
                    checkpoint.save(self.model_path, header, model(saved))
                    checkpoint.save(self.state_path, header, saved)
        self.state = own(state)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("saved")  # the other hosts read what the first one wrote
        return {metric: float(np.mean(numbers)) for metric, numbers in values.items()}
