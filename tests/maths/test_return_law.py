"""The return-law benchmark's own arithmetic, table and figure."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float

from benchmarks import probes, return_law
from common.errors import UserError
from common.networks import Critic
from common.returns import affine_axis


class Known(Critic):
    """Says the same law everywhere."""

    values: Float[Array, "*seeds n"]
    weights: Float[Array, "*seeds n"]

    def law(self, observation, action, noise, ode):
        return self.values, self.weights


def test_errors_of_a_critic_that_is_known():
    """The law -1 or 1, said as it is, with the wrong odds, and as its mean; in returns scaled by 2 and shifted by 1."""
    probe = dataclasses.replace(probes.CHAIN, laws={(4, 0.0): ((-1.0, 1.0), (0.5, 0.5))})
    values = jnp.array([[-1.0, 0.0], [-1.0, 0.0], [-0.5, -0.5]])  # (returns - 1) / 2
    weights = jnp.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])
    shift, scale, low, high = (jnp.full(3, x) for x in (1.0, 2.0, -10.0, 10.0))
    axis = affine_axis(shift, scale, low=low, high=high)
    found = return_law.measure(return_law.Args(), Known(values, weights), axis, probe)
    np.testing.assert_allclose(found["w1"], [0.0, 0.3, 0.5], atol=0.005)
    np.testing.assert_allclose(found["mean_error"], [0.0, 0.3, 0.0], atol=0.005)
    tau = return_law.RETURN_TEMPERATURE * probe.law_range  # 0.2
    exact = tau * np.log(np.cosh(1 / tau))
    wrong = tau * np.log(0.2 * np.exp(-1 / tau) + 0.8 * np.exp(1 / tau))
    np.testing.assert_allclose(found["q_error"], [0.0, (wrong - exact) / 2, exact / 2], atol=1e-5)


@pytest.mark.slow
def test_table_and_figure_of_a_small_comparison(tmp_path: Path):
    """Over training, then another size appended; the last measurements stand in the table, all of them in the rows."""
    args = return_law.Args(
        methods=("paper", "c51"), probes=("five-state chain",), seeds=(0, 1), steps=4, every=2, width=8, depth=2,
        out=tmp_path / "law.csv",
    )  # fmt: skip
    return_law.main(args)
    rows = return_law.main(dataclasses.replace(args, methods=("qr",), width=16, append=True))
    assert len(rows) == 3 * 2 * 2 and {row["step"] for row in rows} == {2, 4}
    text = (tmp_path / "law.md").read_text()
    assert (
        "`c51`, 51 atoms, 2 x 8 |" in text and "| 619 |" in text
    )  # (5 + 1) 8 + 8, 8 8 + 8, 8 51 + 51, and 32 of LayerNorm
    assert "`qr`, 32 quantiles, Huber 0.02, 2 x 16 |" in text and "to N(Q, sigma^2)" in text
    assert (tmp_path / "law.png").stat().st_size > 5_000
    again = return_law.main(dataclasses.replace(args, methods=(), append=True))
    assert len(again) == len(rows) and (tmp_path / "law.md").read_text() == text


def test_mistakes(tmp_path: Path):
    for changes, sentence in (
        (dict(methods=("dqn",)), "choose --methods among"),
        (dict(methods=("qr",)), "would replace the whole table"),
        (dict(methods=(), out=tmp_path / "none.csv", append=True), "stands already"),
        (dict(every=7), "no multiple of --every 7"),
    ):
        with pytest.raises(UserError, match=sentence):
            return_law.main(return_law.Args(**changes))
