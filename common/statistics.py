"""Numbers that say how sure a number is."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats


def success_interval(successes: float, number: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a success rate; it stays in [0, 1] and is not empty at 0 or all successes."""
    interval = stats.binomtest(round(successes), number).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def calibration(
    draws: Float[np.ndarray, "n draws"], returns: Float[np.ndarray, " n"], levels: Float[np.ndarray, " levels"]
) -> dict[str, float]:
    """How predicted laws agree with one observed return each.

    `draws` are quantiles or samples of the predicted law, `returns` what was observed. `below_q` is the share of
    observations at or below the predicted q-quantile (q itself for a calibrated law; ties count half), `crps` the
    continuous ranked probability score `E|Z - G| - E|Z - Z'| / 2`, in the returns' units.
    """
    draws = np.sort(draws, axis=1)
    mean = draws.mean(axis=1)
    number = draws.shape[1]
    weight = 2 * np.arange(1, number + 1) - number - 1
    spread = (draws * weight).sum(axis=1) / number**2  # half the mean absolute difference of two draws
    constant = np.std(mean) == 0 or np.std(returns) == 0
    result = {
        "n": float(len(returns)),
        "mean_predicted": float(mean.mean()),
        "mean_observed": float(returns.mean()),
        "bias": float((mean - returns).mean()),
        "mae_of_mean": float(np.abs(mean - returns).mean()),
        "correlation": float("nan") if constant else float(np.corrcoef(mean, returns)[0, 1]),
        "crps": float((np.abs(draws - returns[:, None]).mean(axis=1) - spread).mean()),
    }
    for level in levels:
        quantile = np.quantile(draws, level, axis=1)
        result[f"below_{level:.2g}"] = float(((returns < quantile) + 0.5 * (returns == quantile)).mean())
    return result


def bootstrap_interval(
    groups: Sequence[Float[np.ndarray, "_ _"]], *, confidence: float = 0.95, draws: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over groups (tasks) of their means over seeds and episodes.

    Each group is an array (seeds, episodes), as many seeds in each. A draw takes seeds with replacement, the same ones
    in all groups since they share a base policy, and within each of them episodes. With one seed the interval tells of
    episodes alone.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for i in range(draws):
        seeds = rng.integers(len(groups[0]), size=len(groups[0]))
        for group in groups:
            episodes = rng.integers(group.shape[1], size=(len(seeds), group.shape[1]))
            means[i] += group[seeds[:, None], episodes].mean() / len(groups)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return float(low), float(high)


def mean_interval(groups: Sequence[Float[np.ndarray, "_ _"]]) -> tuple[float, float]:
    """95% interval of the mean success over groups (tasks), each an array (seeds, episodes) of zeros and ones.

    Wilson's over episodes for one task and one seed, and where all episodes ended alike, of which a bootstrap makes an
    empty interval; else by bootstrap over seeds and episodes. With two or three seeds that is too short: how much seeds
    differ is then hardly known.
    """
    ended = np.concatenate([np.ravel(group) for group in groups])
    if sum(map(len, groups)) == 1 or len(np.unique(ended)) == 1:
        return success_interval(ended.sum(), ended.size)
    return bootstrap_interval(groups)
