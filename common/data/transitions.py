"""From rows to transitions of a horizon, their rewards, and returns.

A transition of horizon `h` starts at row `i` and ends at row `i + h` of the same trajectory.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from common.data.files import Trajectories, read_arrays
from common.data.names import ENVIRONMENTS, parse_env
from common.errors import UserError


def last_rows(terminals: Bool[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """For each row the last row of its trajectory."""
    ends = np.flatnonzero(terminals)
    return ends[np.searchsorted(ends, np.arange(len(terminals)))]


def transition_starts(
    terminals: Bool[np.ndarray, " rows"], horizon: int, *, extra: int = 0, where: str = "the data"
) -> Int[np.ndarray, " n"]:
    """Rows `i` whose trajectory also has row `i + horizon + extra`: the starts of all transitions of a horizon.

    Raises:
        UserError: no trajectory of `where` is that long.
    """
    rows = np.arange(len(terminals))
    starts = rows[rows + horizon + extra <= last_rows(terminals)].astype(np.int32)
    if len(starts) == 0:
        raise UserError(
            f"no trajectory in {where} is longer than {horizon + extra} rows: use a shorter --horizon or longer data."
        )
    return starts


def chunk_rewards(
    rewards: Float[np.ndarray, "tasks rows"],
    masks: Float[np.ndarray, "tasks rows"],
    starts: Int[np.ndarray, " n"],
    *,
    horizon: int,
    discount: float,
) -> tuple[Float[np.ndarray, "tasks n"], Float[np.ndarray, "tasks n"]]:
    """Reward and bootstrap factor of each transition: `Z(x, a) = reward + bootstrap * Z(x', a')`.

    `reward_i = sum_{k<h} discount^k (prod_{j<k} masks_{i+j}) rewards_{i+k}`,
    `bootstrap_i = discount^h prod_{k<h} masks_{i+k}`.
    With horizon 1: the row's reward, and discount * mask. A chunk in which the task is solved stops there, as the
    environment does; QC (arXiv 2507.07969) counts the later rewards of such a chunk.
    """
    if rewards.shape != masks.shape:
        raise ValueError(f"rewards and masks must have one shape, not {rewards.shape} and {masks.shape}.")
    reward = np.zeros((len(rewards), len(starts)), np.float32)
    bootstrap = np.ones_like(reward)
    for k in range(horizon):
        reward += bootstrap * rewards[:, starts + k]
        bootstrap *= np.float32(discount) * masks[:, starts + k]
    return reward, bootstrap


def monte_carlo_returns(
    rewards: Float[np.ndarray, " rows"],
    masks: Float[np.ndarray, " rows"],
    terminals: Bool[np.ndarray, " rows"],
    *,
    discount: float,
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Discounted reward-to-go of each row as far as its trajectory goes, and the weight of what is missing.

    `G_i = rewards_i + discount * masks_i * G_{i+1}` up to the last transition. An episode that was cut by its time
    limit has no complete return: what it lacks is `tail_i * Z(last state)`, `tail_i = prod discount * masks`. A return
    is complete where `tail_i = 0` (the task was solved on the way) and complete up to a tolerance where it is small.
    """
    if not rewards.shape == masks.shape == terminals.shape:
        raise ValueError(f"the shapes must be equal: {rewards.shape}, {masks.shape}, {terminals.shape}.")
    ends = np.flatnonzero(terminals)
    starts = np.concatenate([[0], ends[:-1] + 1])
    returns, tails = np.zeros(len(rewards)), np.ones(len(rewards))
    for back in range(1, int((ends - starts).max(initial=0)) + 1):
        rows = ends[ends - starts >= back] - back
        factor = discount * masks[rows]
        returns[rows] = rewards[rows] + factor * returns[rows + 1]
        tails[rows] = factor * tails[rows + 1]
    return returns, tails


def rows_with_complete_returns(
    terminals: Bool[np.ndarray, " rows"],
    masks: Float[np.ndarray, "tasks rows"],
    *,
    discount: float,
    horizon: int,
    tolerance: float = 0.01,
    most: int = 2_000,
) -> Int[np.ndarray, " chosen"]:
    """Rows, `most` of them at random, whose Monte-Carlo return can lack no more than `tolerance` of the return range.

    They are chosen by their place in the episode: `log(tolerance) / log(discount)` steps or more come after them.
    Choosing the rows whose returns happen to be complete would choose the successful ones. If every episode ends by a
    mask of 0 for every task, all returns are complete, and `horizon` steps are enough.
    """
    steps = int(np.ceil(np.log(tolerance) / np.log(discount))) if discount > 0 else 1
    left = last_rows(terminals) - np.arange(len(terminals))
    if not masks[:, left == 1].any():
        steps = 1
    candidates = np.flatnonzero(left >= max(steps, horizon))
    return np.sort(np.random.default_rng(0).choice(candidates, min(most, len(candidates)), replace=False))


def return_bounds(rewards: Float[np.ndarray, "tasks rows"], discount: float) -> Float[np.ndarray, "tasks 2"]:
    """Lowest and highest discounted return that rewards within the data's range can give, for episodes of any length.

    A sum of one to infinitely many terms: a positive lowest reward is bounded by a single one, and so on.
    """
    low, high = rewards.min(axis=1), rewards.max(axis=1)
    horizon = 1.0 / (1.0 - discount)
    with np.errstate(over="ignore"):  # infinite ones are refused where they are used
        return np.stack([np.minimum(low, low * horizon), np.maximum(high, high * horizon)], axis=1)


def reward_range(
    files: Sequence[Path], rewards: Float[np.ndarray, "tasks rows"], *, env: str, own: bool, reward: str
) -> Float[np.ndarray, "tasks 2"]:
    """Lowest and highest reward per task over all files of a dataset; `rewards` are those of the first one's
    transitions."""
    spans = np.stack([rewards.min(axis=1), rewards.max(axis=1)], axis=1)
    if len(files) == 1:
        return spans
    if own and reward == "default":
        parts = [read_arrays(file, skip=("qpos", "button_states"))["rewards"] for file in files[1:]]
        return np.array([[min(p.min() for p in [spans[0], *parts]), max(p.max() for p in [spans[0], *parts])]])
    lowest = -1.0 if reward == "sparse" or own else ENVIRONMENTS[parse_env(env).prefix].lowest_reward
    return np.stack([np.minimum(spans[:, 0], lowest), np.maximum(spans[:, 1], 0.0)], axis=1)


def return_sample(trajectories: Trajectories, *, discount: float, most: int = 50_000) -> Float[np.ndarray, "tasks m"]:
    """Returns of `most` of the data's transitions, drawn at random, for each task: how they are distributed.

    What an episode lacks that was cut short, by its time limit say, is filled with a return of another transition:
    `G_i = partial_i + tail_i G_j`, j at random, repeated until nothing is lacking (see `monte_carlo_returns`).
    """
    rng = np.random.default_rng(0)
    rows = np.flatnonzero(~trajectories.terminals)
    rows = np.sort(rng.choice(rows, min(most, len(rows)), replace=False))
    samples = []
    for rewards, masks in zip(trajectories.rewards, trajectories.masks, strict=True):
        partial, tail = monte_carlo_returns(rewards, masks, trajectories.terminals, discount=discount)
        partial, tail = partial[rows], tail[rows]
        mean = partial.mean() / (1.0 - tail.mean())  # of the complete returns
        while tail.mean() > 1e-3:  # each round squares what is lacking
            j = rng.permutation(len(rows))
            partial, tail = partial + tail * partial[j], tail * tail[j]
        samples.append(partial + tail * mean)
    return np.stack(samples)
