"""Replicas, tasks x seeds: many trainings in one program, over the devices of one or several hosts."""

import contextlib
import functools
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Key, PRNGKeyArray

from common.errors import UserError
from common.machine import num_cores


def stack_replicas(init: Callable[[PRNGKeyArray], Any], keys: Key[Array, " replicas"]) -> Any:
    """One state per key, stacked along a leading axis."""
    return jax.jit(jax.vmap(init))(keys)


def over_replicas(function: Callable, *trees: Any) -> Any:
    """Applies `function` to each replica, the leading axis of every leaf of `trees`; for use inside `jit`.

    On accelerators this is `vmap`: one wide kernel serves all replicas. A CPU device runs them one after the other
    instead: XLA's batched matrix product is slower there than as many plain ones, even at one replica.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda leaves: function(*leaves), trees)
    return jax.vmap(function)(*trees)


def chunked(train_step: Callable) -> Callable:
    """`train_chunk(args, state, dataset, replicas)`: `args.steps_per_call` steps of all replicas in one compiled call.

    Args:
        train_step: `(args, state, dataset, replica) -> (state, metrics)`, one gradient step of one replica.

    `state`, whose memory is reused, and `replicas` have a leading axis of replicas, spread over the devices (`spread`);
    each device has a copy of `dataset`. Metrics are means over the steps.
    """

    def steps(args: Any, dataset: Any, state: Any, replica: Any) -> tuple[Any, dict[str, Array]]:
        return jax.lax.scan(lambda s, _: train_step(args, s, dataset, replica), state, length=args.steps_per_call)

    def of_device(args: Any, dataset: Any, state: Any, replicas: Any) -> tuple[Any, dict[str, Array]]:
        state, metrics = over_replicas(functools.partial(steps, args, dataset), state, replicas)
        return state, jax.tree.map(lambda m: jnp.mean(m, axis=1), metrics)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
    def train_chunk(args: Any, state: Any, dataset: Any, replicas: Any) -> tuple[Any, dict[str, Array]]:
        call, number = functools.partial(of_device, args), len(jax.tree.leaves(replicas)[0])
        mesh = _mesh(number)
        if mesh is not None and number % mesh.size == 0:  # else they were not spread
            # Nothing is shared between the shards, so that shard_map has nothing to check (check_vma).
            copied, split = PartitionSpec(), PartitionSpec("replica")
            call = jax.shard_map(call, mesh=mesh, in_specs=(copied, split, split), out_specs=split, check_vma=False)
        return call(dataset, state, replicas)

    return train_chunk


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

    SIGTERM to any of them stops all after the same call, which is saved (`Run.steps`).

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


def use_cores(replicas: int) -> None:
    """Makes each core of the CPU a device of JAX, so that `spread` gives each its replicas: several cores at once are
    hardly faster than one at the small products of one replica.

    Nothing changes where JAX has looked at its devices before, or is told how many there are (JAX_NUM_CPU_DEVICES).
    With `--distributed` the processes share the replicas instead.
    """
    told = jax.config.jax_num_cpu_devices >= 0 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    most = min(num_cores(), replicas)
    if most > 1 and not told:
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", most)


def check_devices() -> None:
    """Whether JAX has a device to compute on.

    Raises:
        UserError: it has none of the platforms that JAX_PLATFORMS asks for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the platform's package is missing too
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = str(error).partition("\n")[0] or "its package is not installed"
        raise UserError(
            f"JAX has no device for JAX_PLATFORMS={asked} ({why}): install JAX for it, or unset JAX_PLATFORMS."
        ) from None


def first_host_first(function: Callable[[], Any]) -> Any:
    """Calls `function` on every host, on the first one before the others: it may write files that they read."""
    if jax.process_count() == 1:
        return function()
    result = function() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("first host first")
    return result if jax.process_index() == 0 else function()


def _mesh(replicas: int) -> Mesh | None:
    """The devices that share the replicas; None if it is one. No more than are needed: five replicas on four devices
    take two rounds, for which three devices are enough. Of several processes all devices take part."""
    devices = jax.devices()
    if jax.process_count() == 1:
        rounds = math.ceil(replicas / len(devices))
        devices = devices[: math.ceil(replicas / rounds)]
    return Mesh(np.asarray(devices), ("replica",)) if len(devices) > 1 else None


def spread(tree: Any, replicas: int) -> Any:
    """Spreads the leading (replica) axis of every leaf over the devices of `_mesh`.

    Where the devices do not divide the replicas evenly the last replica is repeated; `fetch` leaves the repeats out.
    """
    mesh = _mesh(replicas)
    if mesh is None:
        return tree
    index = np.minimum(np.arange(math.ceil(replicas / mesh.size) * mesh.size), replicas - 1)
    return _put(jax.tree.map(lambda x: x[index], tree), NamedSharding(mesh, PartitionSpec("replica")))


def copy_to_devices(tree: Any, replicas: int) -> Any:
    """A copy of `tree`, which all replicas share, on each of the devices that `spread` uses. Cores share one copy."""
    mesh = _mesh(replicas)
    if mesh is None:
        return tree
    if jax.default_backend() == "cpu":
        tree = jax.tree.map(np.asarray, tree)  # whose memory JAX takes as it is, where it would copy its own
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


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
    """The signal that one of the hosts noted, if one did: they have to stop after the same call."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.asarray(number or 0)))) or None


def leave_hosts() -> None:
    """Leaves the other hosts, which do so too: one that just ended would be taken for a failure."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
