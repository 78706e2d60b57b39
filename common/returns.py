"""The return axis: the coordinate `z = h(Z)` in which stage 2 learns the law of the reward-to-go Z.

A flow starts from noise N(0, 1) and learns a law best where that law is about as wide as the noise. The possible
returns say little about where returns lie: those of a sparse task are nearly all within 1% of the lowest one. So h is
made from the returns of the data.

The axis does not change the fixed point. Let h be increasing and invertible, and let `Z(x, a) = r + g Z(x', a')` hold
in law. Then `h(Z(x, a)) = h(r + g h^-1(h(Z(x', a'))))` holds in law, and the other way round. So a model whose target
is `y = h(r + g h^-1(psi_bar_1(z_0 | x', a')))` has the law of h(Z) as its fixed point, whatever h is. Clipping
`h^-1(psi_bar_1)` to the possible returns changes nothing there, since the law has none beyond them.

A model that errs is another matter: where h bends, an error of the law's shape becomes one of its mean, which the
bootstrap multiplies by 1 / (1 - g). So half of h^-1 is a straight line where the data's returns lie.

The proof is for targets that bootstrap a *sample*. `velocity` bootstraps a velocity. With `f(z) = h(r + g h^-1(z))`,
the velocity of the image f(z'_t) of the next state's path is `f'(z'_t)` times that of z'_t. Its formula has the
constant g in the place of f'(z'_t), so it needs an affine h. So does `paper`, which takes g times the next state's
velocity.
"""

from typing import Literal, get_args

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float
from scipy import stats

AxisKind = Literal["quantiles", "std", "bounds"]

STD_ON_AXIS = 2.0  # standard deviation of all the data's returns on the axis; the law of one (x, a) is narrower
# In units of z / STD_ON_AXIS:
KNOTS = np.linspace(-4.5, 4.5, 91)  # normal quantiles: all levels but 3 in a million on each side
TAIL = np.linspace(0.5, 6.0, 12)  # knots further out, on each side
SMOOTHING = 0.3  # standard deviation of the Gaussian that smooths the quantiles
LINE = 0.5  # share of the straight line in h^-1: so h is nowhere more than twice as steep as the line alone


class ReturnAxis(eqx.Module):
    """The increasing map h between returns in the environment's units and places on the model's axis.

    It is straight between its knots, and straight on beyond the outermost ones. Two knots make it affine.
    """

    returns: Float[Array, "*replicas knots"]  # increasing, environment units
    places: Float[Array, "*replicas knots"]  # increasing: where they lie on the axis
    low: Float[Array, "*replicas"]  # lowest possible return, environment units
    high: Float[Array, "*replicas"]  # highest possible return
    spread: Float[Array, "*replicas"]  # standard deviation of the data's returns, environment units

    def to_model(self, returns: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """`h`, of one replica."""
        return _along(returns, self.returns, self.places)

    def to_environment(self, z: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """`h^-1`, of one replica."""
        return _along(z, self.places, self.returns)

    def bounds(self, margin: float) -> tuple[Float[Array, "*replicas"], Float[Array, "*replicas"]]:
        """The possible returns and `margin`, a fraction of their range, on both sides; environment units."""
        beyond = margin * (self.high - self.low)
        return self.low - beyond, self.high + beyond


def _along(x: Float[Array, "*batch"], xs: Float[Array, " knots"], ys: Float[Array, " knots"]) -> Float[Array, "*batch"]:
    """The line through the knots, at x."""
    i = jnp.searchsorted(xs[1:-1], x, method="compare_all")
    slopes = (ys[1:] - ys[:-1]) / (xs[1:] - xs[:-1])
    return ys[i] + slopes[i] * (x - xs[i])


def affine_axis(shift: ArrayLike, scale: ArrayLike, *, low: ArrayLike, high: ArrayLike) -> ReturnAxis:
    """`Z = shift + scale z`."""
    shift, scale, low, high = (jnp.asarray(x, jnp.float32) for x in (shift, scale, low, high))
    returns = jnp.stack([shift, shift + scale], axis=-1)
    return ReturnAxis(returns, jnp.broadcast_to(jnp.arange(2.0), returns.shape), low, high, scale)


def blank_axis(knots: int) -> ReturnAxis:
    """An axis of that many knots, to be filled in."""
    zero = jnp.zeros(())
    return ReturnAxis(jnp.zeros(knots), jnp.zeros(knots), zero, zero, zero)


def make_axis(returns: Float[np.ndarray, " n"], bounds: Float[np.ndarray, "2"], *, kind: AxisKind) -> ReturnAxis:
    """The axis of a task, from a sample of its data's returns, and the lowest and highest possible one.

    `std`: affine, the returns have mean 0 and standard deviation 2 on the axis.

    `quantiles`: h^-1 is the mean of the line of `std` and of the smoothed quantile function of the returns,
    `z -> E q(Phi(z / 2 + 0.3 e))` with e ~ N(0, 1) and q(p) the p-quantile of the returns, which alone would make the
    returns N(0, 4). It is finer where many returns lie, at atoms above all. Beyond the data's returns h grows like a
    logarithm, so that returns far beyond them have a place too: the interval of returns that one unit of z covers is e
    times as long every two units.

    `bounds`: affine, the mean return is at 0 and the possible returns are 4 long.

    A standard deviation below 1e-4 of the mean or 1e-3 of the range of the possible returns counts as that much, here
    and in `spread`. Multiplying all returns by a number changes no place on the axis.
    """
    if kind not in get_args(AxisKind):
        raise ValueError(f"the axis must be one of {get_args(AxisKind)}, not {kind!r}.")
    low, high = bounds
    mean, std = returns.mean(dtype=np.float64), returns.std(dtype=np.float64)
    # Single precision has to tell the knots apart, and the possible returns have to be within reach.
    std = max(std, 1e-4 * abs(mean), 1e-3 * (high - low)) or 1.0
    if kind != "quantiles":
        scale = std / STD_ON_AXIS if kind == "std" or low == high else (high - low) / 4
        return eqx.tree_at(lambda a: a.spread, affine_axis(mean, scale, low=low, high=high), jnp.float32(std))
    smoothing = SMOOTHING * stats.norm.ppf((np.arange(64) + 0.5) / 64)
    levels = stats.norm.cdf(KNOTS[:, None] + smoothing)
    quantiles = np.quantile(returns.astype(np.float64), levels, method="hazen").mean(axis=1)
    inner = (1 - LINE) * quantiles + LINE * (mean + std * KNOTS)
    first, last = np.diff(inner)[[0, -1]] / (KNOTS[1] - KNOTS[0])
    below, above = inner[0] - first * np.expm1(TAIL)[::-1], inner[-1] + last * np.expm1(TAIL)
    places = STD_ON_AXIS * np.concatenate([KNOTS[0] - TAIL[::-1], KNOTS, KNOTS[-1] + TAIL])
    arrays = np.concatenate([below, inner, above]), places, low, high, std
    return ReturnAxis(*(jnp.asarray(a, jnp.float32) for a in arrays))
