"""Roll-outs: all episodes of all replicas in lock-step, environments in parallel processes, one `act` for all of them.

Gymnasium's `AsyncVectorEnv` runs one `EpisodeRunner` per process. A runner steps a share of the environments of every
replica and starts the next episode in one as soon as it is free, so no environment waits for the longest episode.

Protocol (OGBench): `num_episodes` episodes per replica, an episode ends when the task is solved or its time is up, and
counts as a success if the environment says so at its last step (`success` is NaN if that says nothing). Initial
states depend on (seed, episode) alone: all replicas and all settings of a sweep see the same episodes, whatever the
number of processes.
"""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector.async_vector_env import AsyncState

from common.environments import episode_seed, is_registered, make_env, reported_success, seeded_reset, spec_of
from common.errors import UserError
from common.machine import free_memory, num_cores, trim_memory
from common.progress import progress

# Environments in all, if every process has one of each replica then. One of a manipulation task takes about 130 MB (its
# model and a second one for inverse kinematics) and a second to build.
ENVIRONMENTS = 32
ENVIRONMENT_BYTES = 130e6


def max_environments() -> int:
    """As many environments as fit into half of the memory that is free now."""
    return max(1, int(0.5 * free_memory() / ENVIRONMENT_BYTES))


def check_program() -> None:
    """Whether worker processes can import the program that starts them.

    Raises:
        UserError: they cannot.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "this program evaluates as soon as it is imported, and its worker processes import it: put what it does "
            "under `if __name__ == '__main__':`."
        )
    if getattr(sys.modules["__main__"], "__file__", None) == "<stdin>":
        raise UserError("worker processes import this program, which was read from stdin: save it as a file.")


class EpisodeRunner(gymnasium.Env):
    """A share of the environments of every replica, stepped one after the other in one process.

    Shapes: R replicas, m environments per replica in this process, h actions per chunk. An action is one chunk per
    environment, executed open loop until it ends or the episode does.
    """

    def __init__(
        self,
        gym_ids: Sequence[str],
        slots: Sequence[int],
        *,
        num_slots: int,
        num_episodes: int,
        horizon: int,
        seed: int,
        make: Callable[[str], gymnasium.Env] = make_env,
        specs: Mapping[str, gymnasium.envs.registration.EnvSpec] | None = None,
        probe: Callable[[dict[str, Any]], float] | None = None,
    ):
        """`slots` are this process' environments of each replica; slot s runs the episodes s, s + num_slots, ...
        `specs` are what the first process knows of `gym_ids`, which may be registered only there."""
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
        self.gym_ids, self.slots, self.num_slots = gym_ids, slots, num_slots
        self.num_episodes, self.horizon, self.seed, self.probe = num_episodes, horizon, seed, probe
        self.make = make
        for gym_id, spec in (specs or {}).items():
            if not is_registered(gym_id):
                gymnasium.registry[spec.id] = spec
        self.envs: list[list[gymnasium.Env]] = []
        first = make(gym_ids[0])
        shape = (len(gym_ids), len(slots))
        box = gymnasium.spaces.Box
        self.observation_space = gymnasium.spaces.Dict(
            observation=box(-np.inf, np.inf, shape + first.observation_space.shape, np.float32),
            episode=box(0, 2**31 - 1, shape, np.int32),
            step=box(0, 2**31 - 1, shape, np.int32),
            active=box(0, 1, shape, np.int8),
        )
        self.action_space = box(-1, 1, (*shape, horizon, *first.action_space.shape), np.float32)
        first.close()

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if not self.envs:
            self.envs = [[self.make(gym_id) for _ in self.slots] for gym_id in self.gym_ids]
            trim_memory()
        self.results: list[dict[str, Any]] = []  # one per episode begun, in the order they began
        self.records = [[{} for _ in envs] for envs in self.envs]  # the one that each environment is filling in
        spaces = self.observation_space.spaces
        self.state = {key: np.zeros(space.shape, space.dtype) for key, space in spaces.items()}
        self.state["episode"][:] = self.slots
        for r, envs in enumerate(self.envs):
            for j in range(len(envs)):
                self._begin(r, j)
        return self._copy(), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        for r, j in np.argwhere(self.state["active"]).tolist():
            self._execute(r, j, action[r, j])
        return self._copy(), 0.0, False, False, {}

    def _copy(self) -> dict[str, np.ndarray]:
        return {key: value.copy() for key, value in self.state.items()}

    def _begin(self, r: int, j: int) -> None:
        """Starts the episode that `episode[r, j]` names, or retires the environment if there is none."""
        episode = int(self.state["episode"][r, j])
        self.state["active"][r, j] = episode < self.num_episodes
        self.state["step"][r, j] = 0
        if episode < self.num_episodes:
            self.state["observation"][r, j] = seeded_reset(self.envs[r][j], episode_seed(self.seed, episode))
            self.records[r][j] = dict(replica=int(r), episode=episode, success=0.0, length=0, total=0.0, probe=0.0)
            self.results.append(self.records[r][j])

    def _execute(self, r: int, j: int, chunk: np.ndarray) -> None:
        env, record = self.envs[r][j], self.records[r][j]
        for action in chunk:
            observation, reward, terminated, truncated, info = env.step(action)
            record["length"] += 1
            record["total"] += float(reward)
            if self.probe is not None:
                record["probe"] += float(self.probe(info))
            self.state["step"][r, j] += 1
            if terminated or truncated:
                record["success"] = reported_success(info)
                self.state["episode"][r, j] += self.num_slots
                self._begin(r, j)
                return
        self.state["observation"][r, j] = observation

    def close(self) -> None:
        for env in (env for envs in self.envs for env in envs):
            env.close()


class Episodes:
    """Parallel environments for the evaluation of R replicas; build once, `run` many times, then `close`."""

    def __init__(
        self,
        gym_ids: Sequence[str],
        *,
        num_episodes: int,
        horizon: int = 1,
        seed: int = 0,
        action_noise: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        workers: int | None = None,
        probe: Callable[[dict[str, Any]], float] | None = None,
    ):
        """
        Args:
            gym_ids: one environment per replica; all with the same spaces.
            num_episodes: episodes per replica.
            horizon: actions per decision, executed open loop.
            seed: seed of the initial states.
            action_noise: standard deviation of the Gaussian noise in the executed actions, which are in [-1, 1].
            settings: of `make_env`, beyond the id.
            workers: processes; one per core by default.
            probe: a function of a step's `info`, summed over each episode; importable, since it goes to the workers.

        Raises:
            UserError: a process died, here or in `run`.
        """
        check_program()
        workers = min(workers or num_cores(), num_episodes, max(1, max_environments() // len(gym_ids)))
        self.num_replicas, self.num_episodes = len(gym_ids), num_episodes
        per_worker = math.ceil(num_episodes / workers)
        per_worker = max(1, min(per_worker, ENVIRONMENTS // (len(gym_ids) * workers)))
        in_common = dict(num_slots=workers * per_worker, num_episodes=num_episodes, horizon=horizon, seed=seed)
        in_common |= dict(specs={gym_id: spec_of(gym_id) for gym_id in gym_ids if is_registered(gym_id)})
        in_common |= dict(make=functools.partial(make_env, action_noise=action_noise, **settings or {}), probe=probe)
        with self._reporting_deaths():
            self.vector = gymnasium.vector.AsyncVectorEnv(
                [
                    functools.partial(
                        EpisodeRunner, tuple(gym_ids), range(w * per_worker, (w + 1) * per_worker), **in_common
                    )
                    for w in range(workers)
                ],
                context="spawn",  # JAX is multithreaded: a forked child could inherit a held lock.
            )
        trim_memory()  # Gymnasium builds an environment in this process, too, to ask for its spaces

    def run(
        self, act: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], *, desc: str = "evaluating"
    ) -> list[dict[str, Any]]:
        """Runs all episodes with `act(observations, episodes, steps) -> chunks`.

        Shapes: observations (R, n, d), episodes and steps (R, n), chunks (R, n, h, a). Returns one row per episode,
        ordered by replica and episode: `replica, episode, success, length, total` (undiscounted return), `probe`.
        The progress bar shows the share of the time in which environments wait for `act`; it stays in `policy_share`.
        """
        with self._reporting_deaths():
            return self._run(act, desc)

    def _run(self, act: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], desc: str) -> list[dict[str, Any]]:
        state, _ = self.vector.reset()
        began, acting = time.monotonic(), 0.0
        with progress(total=self.num_replicas * self.num_episodes, desc=desc, unit="episode") as bar:
            while state["active"].any():
                # (workers, R, m, ...) -> (R, workers * m, ...): `act` sees replicas, not processes.
                merged = {key: self._merge(value) for key, value in state.items()}
                asked = time.monotonic()
                chunks = np.asarray(act(merged["observation"], merged["episode"], merged["step"]))
                acting += time.monotonic() - asked
                state, *_ = self.vector.step(self._split(chunks, state["active"].shape[0]))
                finished = np.minimum(state["episode"] // self.num_slots, self._quota(state)).sum()
                self.policy_share = acting / (time.monotonic() - began)
                bar.set_postfix(policy=f"{self.policy_share:.0%}", refresh=False)
                bar.update(int(finished) - bar.n)
        rows = [row for results in self.vector.call("results") for row in results]
        return sorted(rows, key=lambda row: (row["replica"], row["episode"]))

    @property
    def num_slots(self) -> int:
        """Environments per replica."""
        return self.vector.num_envs * self.vector.single_observation_space["active"].shape[1]

    def _quota(self, state: dict[str, np.ndarray]) -> np.ndarray:
        """How many episodes each environment runs in all."""
        slot = state["episode"] % self.num_slots
        return (self.num_episodes - slot + self.num_slots - 1) // self.num_slots

    @staticmethod
    def _merge(value: np.ndarray) -> np.ndarray:
        value = np.moveaxis(value, 0, 1)
        return value.reshape(value.shape[0], -1, *value.shape[3:])

    @staticmethod
    def _split(chunks: np.ndarray, workers: int) -> np.ndarray:
        return np.moveaxis(chunks.reshape(chunks.shape[0], workers, -1, *chunks.shape[2:]), 1, 0)

    @contextlib.contextmanager
    def _reporting_deaths(self) -> Iterator[None]:
        """A process that is gone closes its pipe, which Gymnasium raises as one of these."""
        try:
            yield
        except (EOFError, ConnectionError):
            how = "at its start"
            if hasattr(self, "vector"):
                dead = multiprocessing.connection.wait([p.sentinel for p in self.vector.processes], timeout=5.0)
                for process in (p for p in self.vector.processes if p.sentinel in dead):
                    process.join(5.0)  # its status comes a moment later
                codes = [process.exitcode for process in self.vector.processes if process.exitcode is not None]
                how = ", ".join(signal.Signals(-c).name if c < 0 else f"exit status {c}" for c in codes) or "no status"
            raise UserError(
                f"a process of the evaluation died ({how}): see what it said above. If memory ran out, free some, or "
                f"pass fewer --workers to evor_infer.py; then run it again, a training with --resume. A program of "
                f"your own needs its `if __name__ == '__main__':`."
            ) from None

    def close(self) -> None:
        """Ends the processes, whatever they are doing: Gymnasium would wait for the answers of a step, and a process
        that died gives none."""
        self.vector._state = AsyncState.DEFAULT
        self.vector.close(terminate=True)

    def __enter__(self) -> "Episodes":
        return self

    def __exit__(self, *_) -> None:
        self.close()
