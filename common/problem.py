"""What is learned from: the data, the base policies and their actions, the tasks and seeds.

`Problem` is stage 1's. `ValueProblem` adds what stage 2 needs: rewards of each task, frozen base policies, their
next-action bank, and return axes. `problem.data(step)` is what a gradient step learns from, a function of the step
alone, so that a resumed run goes on as it was.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int, Key, PRNGKeyArray

from common.bank import make_bank
from common.data import describe, download, files, transitions
from common.data.files import Trajectories
from common.data.foreign import is_minari
from common.data.names import GYM_ID, parse_env, validation_path
from common.environments import check_sizes, evaluation_id, settings_of
from common.episodes import check_program
from common.errors import UserError
from common.machine import free_memory
from common.networks import Sizes, Standardizer, VelocityPolicy
from common.replicas import copy_to_devices, first_host_first, spread
from common.returns import ReturnAxis, make_axis
from common.rotation import Rotation, pad


class Dataset(NamedTuple):
    """The data as they lie on the device; an argument of every jitted function, never a closure.

    A transition i starts at row `starts[i]` and ends `horizon` rows later. Stage 1 has no tasks and no policies.
    """

    observations: Float[Array, "rows observation"]  # standardised
    actions: Float[Array, "rows action"]
    starts: Int[Array, " n"]
    rewards: Float[Array, "tasks n"]  # environment units
    bootstraps: Float[Array, "tasks n"]  # discount^horizon * masks
    bank: Float16[Array, "policies n K chunk"]  # next actions of each base policy; K = 0 for the data's own
    count: Int[Array, ""]  # how many of the n transitions count; the others fill up a file shorter than the longest


class Batch(NamedTuple):
    """Transitions. Stage 2 finds their rewards of a task as `dataset.rewards[task, index]`."""

    index: Int[Array, " batch"]  # which of the n transitions
    observations: Float[Array, "batch observation"]
    actions: Float[Array, "batch chunk"]
    next_observations: Float[Array, "batch observation"]


class Replica(NamedTuple):
    """What distinguishes one replica from another; with replicas, each leaf has a leading axis."""

    task: Int[Array, ""]  # index into rewards and bootstraps
    policy: Int[Array, ""]  # index into the base policies and the bank
    axis: ReturnAxis | None  # None in stage 1
    key: PRNGKeyArray


class BasePolicy(NamedTuple):
    """Stage 1's policies of some seeds, and the file that they come from."""

    policies: VelocityPolicy  # leading axis of seeds
    standardizer: Standardizer
    path: Path
    sha256: str


def action_chunks(
    actions: Float[Array, "rows action"], starts: Int[Array, " batch"], horizon: int
) -> Float[Array, "batch chunk"]:
    """The `horizon` actions from each start on, as one vector: `[a_i, ..., a_{i+h-1}]`."""
    return jax.vmap(lambda start: actions[start + jnp.arange(horizon)].reshape(-1))(starts)


def batch_of(dataset: Dataset, index: Int[Array, " batch"], horizon: int) -> Batch:
    """The transitions `index`."""
    starts = dataset.starts[index]
    return Batch(
        index,
        dataset.observations[starts],
        action_chunks(dataset.actions, starts, horizon),
        dataset.observations[starts + horizon],
    )


def sample_batch(dataset: Dataset, batch_size: int, horizon: int, *, key: PRNGKeyArray) -> Batch:
    """Transitions drawn uniformly, with replacement."""
    return batch_of(dataset, jax.random.randint(key, (batch_size,), 0, dataset.count), horizon)


class Problem:
    """Data for behaviour cloning, and one replica per seed.

    Attributes:
        info, files: what `common.data.download` says of the data, and the files that take turns.
        sizes, standardizer, pairs, replicas, init_keys: the networks' sizes and inputs; the (task, seed) of each
            replica; what distinguishes the replicas, spread over the devices; the keys that initialise them.
    """

    tasks: tuple[int, ...] = ()
    _beyond = 0  # rows beyond a chunk that have to be of its trajectory

    def __init__(self, args: Any):
        """Reads the first file, says what is in it, and checks the headers and the trajectories of the others.

        Raises:
            UserError: the data cannot be found, are malformed, or too short for the horizon.
        """
        self.args = args
        path, source = first_host_first(
            lambda: download.find_files(args.environment, args.dataset, episodes=args.episodes)
        )
        self.info = download.describe(path, source)
        self.files = download.data_files(path)
        self._first = self._read_first()
        held_out = validation_path(self.files[0])
        lengths = [files.check_headers(file, like=self._first) for file in (*self.files, held_out) if file.is_file()]
        self.longest = max(lengths[: len(self.files)])
        have = [sorted({"rewards", "masks", "qpos"} & files.read_headers(file).keys()) for file in self.files]
        for file, arrays in zip(self.files, have, strict=True):
            if arrays != have[0]:
                raise UserError(f"{file} has {arrays}, and {self.files[0].name} {have[0]}: they must have the same.")
        observation, action = self._first.observations.shape[1], self._first.actions.shape[1]
        self.sizes = Sizes(observation, action, args.horizon)
        self._transitions(self._first, self.files[0])  # an error comes before an old run is deleted
        for file in self.files[1:]:
            terminals = files.read_terminals(file)
            describe.warn_of_short(terminals, args.horizon + self._beyond, f"{file.name}: ")
            transitions.transition_starts(terminals, args.horizon, extra=self._beyond, where=file.name)
        self._rotation = Rotation(self.files, self._load, every=args.file_steps, steps=args.steps)
        self._prepare()

    def _read_first(self) -> Trajectories:
        trajectories = files.load_trajectories(self.files[0], env=self.args.environment)
        describe.print_summary(
            trajectories, self.info, tasks=(), discount=0.0, num_files=len(self.files), horizon=self.args.horizon
        )
        return trajectories

    def _prepare(self) -> None:
        """Inputs of the networks, and replicas."""
        self.standardizer = self._standardizer()
        seeds = np.asarray(self.args.all_seeds)
        self.pairs: list[tuple[int | str, int]] = [("", seed) for seed in self.args.all_seeds]
        keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(seeds)
        zeros = jnp.zeros(len(seeds), jnp.int32)
        self._set_replicas(Replica(zeros, zeros, None, keys[:, 1]), keys[:, 0])

    def _standardizer(self) -> Standardizer:
        observations, ignore = self._first.observations, self.args.ignore_observations
        standardizer = Standardizer.of(observations, ignore=ignore)
        describe.warn_of_constants(observations, np.isinf(standardizer.std), ignore)
        return standardizer

    def _set_replicas(self, replicas: Replica, init_keys: Key[Array, " replicas"]) -> None:
        self.init_keys, self.replicas = init_keys, spread(replicas, len(self.pairs))

    def header(self) -> dict[str, Any]:
        """What a checkpoint says of the problem."""
        return dict(env=self.args.name, horizon=self.sizes.horizon, seeds=self.args.all_seeds, data=self.info)

    def data(self, step: int) -> Dataset:
        """What step number `step` learns from."""
        return self._rotation.at(step)

    def _transitions(
        self, trajectories: Trajectories, file: Path
    ) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "tasks n"], Float[np.ndarray, "tasks n"]]:
        """Starts, rewards and bootstrap factors."""
        starts = transitions.transition_starts(trajectories.terminals, self.args.horizon, where=file.name)
        return starts, np.zeros((0, len(starts)), np.float32), np.zeros((0, len(starts)), np.float32)

    def _read(self, file: Path) -> Trajectories:
        return self._first if file == self.files[0] else files.load_trajectories(file, env=self.args.environment)

    def _bank(
        self, observations: Float[np.ndarray, "rows d"], starts: Int[np.ndarray, " n"], file: Path, draw: int = 0
    ) -> Float16[np.ndarray, "policies n K chunk"]:
        return np.zeros((0, len(starts), 0, self.sizes.chunk), np.float16)

    def _load(self, file: Path) -> Dataset:
        """A file, on the devices."""
        trajectories = self._read(file)
        starts, rewards, bootstraps = self._transitions(trajectories, file)
        observations = self.standardizer.rows(trajectories.observations)
        dataset = Dataset(
            observations=pad(observations, self.longest),
            actions=pad(trajectories.actions, self.longest),
            starts=pad(starts, self.longest),
            rewards=pad(rewards, self.longest, axis=1),
            bootstraps=pad(bootstraps, self.longest, axis=1),
            bank=pad(self._bank(observations, starts, file), self.longest, axis=1),
            count=np.asarray(len(starts)),
        )
        return copy_to_devices(jax.tree.map(jnp.asarray, dataset), len(self.pairs))


class ValueProblem(Problem):
    """Data for temporal differences, and one replica per task and seed.

    Further attributes:
        tasks, own_rewards: OGBench's tasks, or (0,) for the file's own rewards.
        gym_ids: the environment of each task, None where there is none.
        base: the frozen base policies; None where a policy is trained with the reward model.
        axis: the return axis of each replica (leading axis).
        validation: trajectories that are not trained on, or None.
    """

    def __init__(self, args: Any, *, load_policy: Callable[..., BasePolicy] | None):
        """Args:
            load_policy: called as `load_policy(args, sizes=, data_sha256=)`, once the data are known to be good.

        Raises:
            UserError: as above, or the data do not fit the tasks, or the base policy does not fit the data.
        """
        self._load_policy = load_policy
        super().__init__(args)

    def _read_first(self) -> Trajectories:
        args, first = self.args, self.files[0]
        self.own_rewards = args.dataset is not None and files.has_rewards(first)
        self.tasks = choose_tasks(args, first, self.own_rewards)
        self.gym_ids = [evaluation_id(args.environment, task) for task in self.tasks]
        trajectories = self._parse(first)
        if args.reward == "sparse" and self.own_rewards and np.all(trajectories.masks):
            raise UserError(
                f"--reward sparse: no masks of {first} say where the task is solved: leave it out, or add masks."
            )
        if args.eval_episodes and self.gym_ids[0] is None:
            if is_minari(args.dataset) or re.fullmatch(GYM_ID, args.environment):
                raise UserError(
                    f"Gymnasium has no {args.environment}: name an environment that is installed (module:Id-v0 imports "
                    f"what registers it), or pass --eval-episodes 0."
                )
            print(f"  not to be evaluated: Gymnasium has no {args.environment}")
        elif args.eval_episodes:
            check_program()
            settings = settings_of(self.info, self.gym_ids[0])
            check_sizes(self.gym_ids[0], settings, trajectories.observations.shape[1], trajectories.actions.shape[1])
        held_out = validation_path(first)
        self.validation = self._parse(held_out) if held_out.is_file() else None
        describe.print_summary(
            trajectories, self.info, tasks=self.tasks, discount=args.discount, num_files=len(self.files),
            horizon=args.horizon + self._beyond,
        )  # fmt: skip
        if len(self.files) > 1 and args.redraw_bank:
            raise UserError("--redraw-bank: each file of a folder has one bank: leave it out.")
        return trajectories

    @property
    def _beyond(self) -> int:
        """Rows after a chunk that the data's own next chunk needs."""
        return self.args.horizon - 1 if self.args.next_action == "dataset" else 0

    def _parse(self, file: Path) -> Trajectories:
        return files.load_trajectories(file, env=self.args.environment, tasks=self.tasks, reward=self.args.reward)

    def _read(self, file: Path) -> Trajectories:
        return self._first if file == self.files[0] else self._parse(file)

    def _transitions(self, trajectories, file):
        args, extra = self.args, self._beyond
        starts = transitions.transition_starts(trajectories.terminals, args.horizon, extra=extra, where=file.name)
        rewards, bootstraps = transitions.chunk_rewards(
            trajectories.rewards, trajectories.masks, starts, horizon=args.horizon, discount=args.discount
        )
        return starts, rewards, bootstraps

    def _prepare(self) -> None:
        args, first = self.args, self._first
        in_transitions = first.rewards[:, ~first.terminals]
        span = transitions.reward_range(
            self.files, in_transitions, env=args.environment, own=self.own_rewards, reward=args.reward
        )
        if self._load_policy is None:
            self.base = None
            self.standardizer = self._standardizer()
        else:
            self._check_bank()
            self.base = self._load_policy(args, sizes=self.sizes, data_sha256=self.info["sha256"])
            self.standardizer = self.base.standardizer
        bounds = transitions.return_bounds(span, args.discount)
        if not np.isfinite(bounds).all():
            raise UserError(f"returns of rewards within {span.tolist()} are not finite: scale the rewards.")
        returns = transitions.return_sample(first, discount=args.discount)
        axes = [make_axis(*of_task, kind=args.axis_kind) for of_task in zip(returns, bounds, strict=True)]
        for task, of_task, axis in zip(self.tasks, returns, axes, strict=True):
            describe.warn_of_flat_returns(of_task, axis.spread, "own rewards" if task == 0 else f"task {task}")
        self.pairs = [(task, seed) for task in self.tasks for seed in args.all_seeds]
        task = np.repeat(np.arange(len(self.tasks)), args.seeds)
        one_policy = np.zeros(args.seeds, int) if args.policy_seed is not None else np.arange(args.seeds)
        policy = np.tile(one_policy, len(self.tasks))
        self.axis = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(axes[i] for i in task))
        # A replica's randomness depends on its task and seed, not on what is trained beside it.
        keys = [jax.random.split(jax.random.fold_in(jax.random.key(s), t)) for t, s in self.pairs]
        init_keys, train_keys = jnp.stack([k[0] for k in keys]), jnp.stack([k[1] for k in keys])
        self._policy_index = policy
        self._redrawn: tuple[int, Any] = (0, None)  # which draw of the bank, and it
        self._set_replicas(Replica(jnp.asarray(task), jnp.asarray(policy), self.axis, train_keys), init_keys)

    @property
    def policies(self) -> VelocityPolicy:
        """The base policy of each replica (leading axis)."""
        return jax.tree.map(lambda x: x[self._policy_index], self.base.policies)

    @property
    def standardizers(self) -> Standardizer:
        """The standardizer, for each replica."""
        return jax.tree.map(lambda x: jnp.stack([x] * len(self.pairs)), self.standardizer)

    def header(self) -> dict[str, Any]:
        base = None if self.base is None else self.base.path.parent.parent.resolve()
        return super().header() | dict(
            replicas=self.pairs,
            method=self.args.method,
            return_axis=self.args.axis_kind,
            policy_run_dir=base,
            policy_sha256="" if self.base is None else self.base.sha256,
        )

    def _check_bank(self) -> None:
        """Whether the memory that the bank is going to take is there; before stage 1 takes its time."""
        args = self.args
        number = 0 if args.next_action == "dataset" else args.num_next_actions
        size = len(args.policy_seeds) * self.longest * number * self.sizes.chunk * np.float16().nbytes
        if size > (free := free_memory()):
            raise UserError(
                f"the bank of {number:,} next actions takes {size / 2**30:,.3g} GiB, and {free / 2**30:.3g} GiB of "
                f"memory are free: use a smaller --num-next-actions, or fewer --seeds."
            )

    def _bank(self, observations, starts, file, draw=0):
        """The next-action bank of a file; the first draw is kept beside the base policy."""
        args = self.args
        if args.next_action == "dataset" or self.base is None:
            return np.zeros((len(args.policy_seeds), len(starts), 0, self.sizes.chunk), np.float16)
        many = len(self.files) > 1
        seeds = "-".join(map(str, args.policy_seeds))
        name = f"bank-{args.num_next_actions}-seeds-{seeds}" + f"-{file.stem}" * many
        name += f"-lambda-{args.noise_scale:g}" * (args.noise_scale != 1)
        data_sha256 = download.fingerprint(file) if many else self.info["sha256"]
        return make_bank(
            self.base.policies,
            jnp.asarray(observations),
            starts + args.horizon,
            seeds=args.policy_seeds,
            num_actions=args.num_next_actions,
            noise_scale=args.noise_scale,
            ode=args.ode,
            draw=draw,
            path=None if draw else self.base.path.parent / f"{name}.eqx",
            made_of=dict(policy_sha256=self.base.sha256, data_sha256=data_sha256),
        )

    def data(self, step: int) -> Dataset:
        """What step number `step` learns from: a file, and with `--redraw-bank` a bank of its own."""
        dataset = super().data(step)
        draw = step // self.args.redraw_bank if self.args.redraw_bank else 0
        if draw != self._redrawn[0]:
            self._redrawn = draw, None  # frees the memory of the last one, but for the first draw
            observations = self.standardizer.rows(self._first.observations)
            starts, _, _ = self._transitions(self._first, self.files[0])
            bank = pad(self._bank(observations, starts, self.files[0], draw), self.longest, axis=1)
            self._redrawn = draw, copy_to_devices(jnp.asarray(bank), len(self.pairs))
        return dataset._replace(bank=self._redrawn[1]) if draw else dataset


def choose_tasks(args: Any, path: Path, own_rewards: bool) -> tuple[int, ...]:
    """The tasks to train: those asked for, the environment's default, or 0 for a file's own rewards."""
    if own_rewards:
        if args.tasks:
            raise UserError(f"{args.dataset} brings its own rewards: leave out --tasks.")
        return (0,)
    if args.tasks:
        return args.tasks
    try:
        return (parse_env(args.environment).default_task,)
    except UserError:
        raise UserError(
            f"{args.dataset or path} brings no rewards, and {args.environment!r} is no OGBench environment to compute "
            f"them with: add an array rewards."
        ) from None
