"""Intervals and calibration against known values."""

import numpy as np
import pytest
from scipy import stats

from common.statistics import bootstrap_interval, calibration, mean_interval, success_interval

LEVELS = np.linspace(0.1, 0.9, 9)


@pytest.mark.parametrize(
    ("successes", "number", "low", "high"),
    [
        (45, 50, 0.786398, 0.956524),
        (0, 50, 0.0, 0.071348),
        (50, 50, 0.928652, 1.0),
        (1, 10, 0.017876, 0.404150),
        (25, 50, 0.366445, 0.633555),
    ],
)
def test_wilson_interval(successes: int, number: int, low: float, high: float):
    """(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) at z = 1.959964, worked out elsewhere."""
    assert success_interval(float(successes), number) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_of_another_confidence():
    z, p, n = stats.norm.ppf(0.95), 0.3, 40
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert success_interval(12.0, 40, confidence=0.9) == pytest.approx(expected, abs=1e-9)


def normal_laws(*, shift: float = 0.0, spread: float = 1.0) -> dict[str, float]:
    """Predicted: N(m_i + shift, spread), as 400 quantiles. Observed: one draw of N(m_i, 1) each, m_i in {-5, 5}."""
    rng = np.random.default_rng(0)
    means = rng.choice([-5.0, 5.0], 10_000)
    quantiles = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    draws = means[:, None] + shift + spread * quantiles
    return calibration(rng.permuted(draws, axis=1), means + rng.normal(size=10_000), LEVELS)


def test_a_calibrated_law():
    """10,000 observations: shares are within 0.015 (three standard errors), the CRPS of N(0,1) is 1/sqrt(pi)."""
    numbers = normal_laws()
    for level in LEVELS:
        assert numbers[f"below_{level:.2g}"] == pytest.approx(level, abs=0.015)
    assert numbers["n"] == 10_000
    assert numbers["bias"] == pytest.approx(0.0, abs=0.03)
    assert numbers["mae_of_mean"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.03)
    assert numbers["crps"] == pytest.approx(1 / np.sqrt(np.pi), abs=0.02)
    assert numbers["correlation"] == pytest.approx(5 / np.sqrt(26), abs=0.005)
    assert numbers["mean_predicted"] == pytest.approx(numbers["mean_observed"], abs=0.03)


def test_a_shifted_law():
    """Predictions one too high: the share below the q-quantile is Phi(Phi^-1(q) + 1)."""
    numbers = normal_laws(shift=1.0)
    assert numbers["bias"] == pytest.approx(1.0, abs=0.03)
    for level in LEVELS:
        assert numbers[f"below_{level:.2g}"] == pytest.approx(stats.norm.cdf(stats.norm.ppf(level) + 1), abs=0.015)
    # E|Z - G| with Z - G ~ N(1, 2), less 1/sqrt(pi)
    distance = 2 * np.exp(-0.25) / np.sqrt(np.pi) + 1 - 2 * stats.norm.cdf(-1 / np.sqrt(2))
    assert numbers["crps"] == pytest.approx(distance - 1 / np.sqrt(np.pi), abs=0.02)


def test_a_law_that_is_too_narrow():
    """Its 10% quantile is at -0.1281: too many observations lie below it, and too few below the 90% quantile."""
    numbers = normal_laws(spread=0.1)
    assert numbers["below_0.1"] == pytest.approx(stats.norm.cdf(-0.12816), abs=0.015)
    assert numbers["below_0.9"] == pytest.approx(stats.norm.cdf(0.12816), abs=0.015)
    assert numbers["crps"] > normal_laws()["crps"] + 0.1


def test_crps_by_hand():
    """Draws 0 and 2, observed 3: E|Z - G| = 2; the four pairs of draws differ by 1 on average, half of it is 0.5."""
    numbers = calibration(np.array([[2.0, 0.0]]), np.array([3.0]), np.array([0.5]))
    assert numbers["crps"] == pytest.approx(1.5)
    assert (numbers["bias"], numbers["mae_of_mean"], numbers["below_0.5"]) == (-2.0, 2.0, 0.0)


def test_a_constant_that_is_predicted_exactly():
    """Ties count half, and a correlation with a constant is not a number rather than a warning."""
    numbers = calibration(np.full((5, 8), -2.0), np.full(5, -2.0), LEVELS)
    assert all(numbers[f"below_{level:.2g}"] == 0.5 for level in LEVELS)
    assert numbers["crps"] == numbers["bias"] == 0.0
    assert np.isnan(numbers["correlation"])


def test_bootstrap_over_episodes_and_seeds():
    """One seed: the normal interval of a mean over 2 x 400 episodes. Twenty seeds whose rates differ by much more than
    episodes explain: the interval of a mean of twenty. Fails if only one of the two levels is drawn anew."""
    rng = np.random.default_rng(0)
    one_seed = [(rng.random((1, 400)) < p).astype(float) for p in (0.2, 0.6)]
    low, high = bootstrap_interval(one_seed)
    expected = 1.96 * np.sqrt((0.2 * 0.8 + 0.6 * 0.4) / 400) / 2
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    assert (low + high) / 2 == pytest.approx(np.mean(one_seed), abs=0.01)
    rates = rng.uniform(0.0, 1.0, 20)
    seeds = [(rng.random((20, 400)) < rates[:, None]).astype(float) for _ in range(2)]
    low, high = bootstrap_interval(seeds)
    assert (high - low) / 2 == pytest.approx(1.96 * rates.std() / np.sqrt(20), rel=0.15)
    assert bootstrap_interval([np.ones((3, 50))]) == (1.0, 1.0)


def test_the_interval_of_a_mean_is_never_empty():
    """Wilson's for one task and seed, and for outcomes that are all alike (250 failures: z^2 / (n + z^2) at most); two
    seeds or two tasks are drawn anew."""
    one = (np.arange(50) < 30).astype(float)[None]
    assert mean_interval([one]) == success_interval(30.0, 50)
    low, high = mean_interval([np.zeros((1, 50))] * 5)
    assert low == 0.0 and high == pytest.approx(1.96**2 / (250 + 1.96**2), rel=1e-3)
    assert mean_interval([np.ones((3, 50))]) == success_interval(150.0, 150)
    for groups in ([np.concatenate([one, 1 - one])], [one, np.zeros((1, 50))]):
        assert mean_interval(groups) == bootstrap_interval(groups)
