"""Predicted laws of the reward-to-go of several actions in one state, beside returns of roll-outs from there.

    python -m benchmarks.candidates --run-dir runs/tasks/cube-double-play

The extracted policy is run for `--step` steps of an evaluation episode. In the state that it reached, candidates of the
base policy are drawn, and some of them picked, from the lowest `Q*` to the highest. Each is executed many times, the
base policy after it: that is what a reward model under the `base` backup models. The return of a roll-out is
`sum_k discount^k r_k`; where time runs out the last reward is taken to go on for ever.

Writes a row per predicted draw and per roll-out. `experiments.draw candidates --rows runs/tables` draws them.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import gymnasium
import jax
import numpy as np
from jaxtyping import Float

from common import checkpoint
from common.cli import run_cli
from common.data.names import parse_env
from common.environments import episode_seed, make_env, seeded_reset
from common.errors import UserError
from common.files import sha256, write_csv
from common.progress import progress
from common.provenance import provenance
from evor_infer import Agent, Extraction, load_agent

ENVIRONMENTS = 16  # stepped side by side

TEMPERATURES = dict(return_temperature=Extraction.return_temperature, action_temperature=Extraction.action_temperature)
READOUT = dict(num_returns=8, noise_scale=1.0, **TEMPERATURES)  # that of the stored rows


@dataclasses.dataclass(frozen=True)
class Args:
    """Compare predicted laws with roll-outs."""

    run_dir: Path
    """Run directory of the reward model."""
    task: int = 2
    """The task."""
    episode: int = 0
    """Episode of the evaluation."""
    step: int = 80
    """Steps of the extracted policy before the state that is looked at."""
    num_actions: int = 64
    """Candidates drawn."""
    shown: int = 4
    """Candidates looked at, from the lowest Q* to the highest."""
    rollouts: int = 48
    """Roll-outs of each of them."""
    out: Path = Path("runs/tables/candidates/rows.csv")
    """CSV file."""


class Branch(gymnasium.Wrapper):
    """An environment that starts each time in the state to which given actions lead, and stands still at its end."""

    def __init__(self, gym_id: str, seed: int, actions: Float[np.ndarray, "steps a"]):
        super().__init__(make_env(gym_id))
        self.seed, self.actions = seed, actions

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        self.observation, self.ended = seeded_reset(self.env, self.seed), False
        for action in self.actions:
            self.observation, *_ = self.env.step(action)
        return self.observation, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """`info` says whether the reward counts, and whether time ran out at this step."""
        counts, truncated, reward = not self.ended, False, 0.0
        if counts:
            self.observation, reward, terminated, truncated, _ = self.env.step(action)
            self.ended, truncated = terminated or truncated, truncated and not terminated
        return self.observation, float(reward), False, False, dict(counts=counts, cut=truncated)


def discounted(
    rewards: Float[np.ndarray, "steps n"], cut: Float[np.ndarray, "steps n"], discount: float
) -> Float[np.ndarray, " n"]:
    """`sum_k discount^k r_k`; where `cut`, the reward of that step goes on for ever."""
    powers = discount ** np.arange(len(rewards))[:, None]
    return (powers * rewards * (1 + cut * discount / (1 - discount))).sum(axis=0)


def walk(agent: Agent, gym_id: str, seed: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The observation after `steps` steps of the extracted policy, and the actions that lead there.

    Raises:
        UserError: the episode ends before.
    """
    actions: list[np.ndarray] = []
    with contextlib.closing(make_env(gym_id)) as env:
        observation = seeded_reset(env, seed)
        while len(actions) < steps:
            key = jax.random.fold_in(jax.random.key(0), len(actions))
            chunk = agent.act(observation[None].astype(np.float32), key=key, num_actions=16, **READOUT)[0]
            for action in np.asarray(chunk)[: steps - len(actions)]:
                observation, _, terminated, truncated, _ = env.step(action)
                actions.append(action)
                if terminated or truncated:
                    raise UserError(f"the episode ends after {len(actions)} steps: pass a smaller --step.")
    return observation, np.array(actions)


def roll_out(
    agent: Agent, gym_id: str, seed: int, actions: np.ndarray, chunks: Float[np.ndarray, "n h a"], *, discount: float
) -> Float[np.ndarray, " n"]:
    """The return of each chunk, executed in the state to which `actions` lead, with the base policy after it."""
    vector = gymnasium.vector.AsyncVectorEnv(
        [lambda: Branch(gym_id, seed, actions)] * ENVIRONMENTS, context="spawn", shared_memory=False
    )
    longest = gymnasium.spec(gym_id).max_episode_steps
    returns = []
    try:
        for first in progress(iterable=range(0, len(chunks), ENVIRONMENTS), desc="roll-outs", unit="batch"):
            some = chunks[first : first + ENVIRONMENTS]
            chunk = np.concatenate([some, np.repeat(some[-1:], ENVIRONMENTS - len(some), axis=0)])  # fills up
            observations, _ = vector.reset()
            rewards, cuts, going = [], [], True
            while going and len(rewards) < longest:
                for action in np.moveaxis(chunk, 1, 0):
                    observations, reward, _, _, info = vector.step(action)
                    rewards.append(reward * info["counts"])
                    cuts.append(info["cut"])
                    going = bool(info["counts"].any())
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), first), len(rewards))
                chunk = np.asarray(agent.act(observations.astype(np.float32), key=key, num_actions=1))
            returns.append(discounted(np.array(rewards), np.array(cuts, dtype=float), discount)[: len(some)])
    finally:
        vector.close(terminate=True)
    return np.concatenate(returns)


def measure(args: Args) -> list[dict[str, Any]]:
    """The rows of one state."""
    path = args.run_dir / "value" / "model.eqx"
    header = checkpoint.read_header(path, stage="value", remedy="train it with evor_value.py first.")
    agent = load_agent(args.run_dir, task=args.task)
    gym_id, seed = parse_env(header["env"]).gym_id(args.task), episode_seed(0, args.episode)
    observation, actions = walk(agent, gym_id, seed, args.step)
    one = observation[None].astype(np.float32)
    candidates = np.asarray(agent.sample_actions(one, args.num_actions, key=jax.random.key(2))[0])
    many = np.repeat(one, len(candidates), axis=0)
    tau_r = READOUT["return_temperature"]
    order = np.argsort(np.asarray(agent.q_value(many, candidates, return_temperature=tau_r, key=jax.random.key(3))))
    picked = candidates[order[np.linspace(0, len(order) - 1, args.shown).round().astype(int)]]
    draws = np.asarray(agent.sample_returns(many[: args.shown], picked, args.rollouts, key=jax.random.key(4)))
    chunks = np.repeat(picked.reshape(args.shown, agent.horizon, -1), args.rollouts, axis=0)
    returns = roll_out(agent, gym_id, seed, actions, chunks, discount=header["args"]["discount"])
    about = dict(
        env=header["env"],
        data_source=header["data"]["source"],
        data_sha256=header["data"]["sha256"],
        policy_sha256=header["policy_sha256"],
        critic_sha256=sha256(path),
        td_target=header["args"]["td_target"],
        steps=header["step"],
        task=args.task,
        episode=args.episode,
        step=args.step,
        **READOUT,
        **provenance(),
    )
    return [
        about | dict(candidate=i, kind=kind, value=float(value))
        for kind, values in (("predicted", draws), ("observed", returns.reshape(args.shown, -1)))
        for i in range(args.shown)
        for value in values[i]
    ]


def main(args: Args) -> list[dict[str, Any]]:
    """Makes and writes the rows of one state."""
    rows = measure(args)
    write_csv(args.out, list(rows[0]), rows)
    print(f"rows: {args.out}")
    return rows


if __name__ == "__main__":
    run_cli(main, Args)
