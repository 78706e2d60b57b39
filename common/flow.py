"""The one place where an ODE is solved.

Convention of the whole project: noise `z_0 ~ N(0, I)`, data `z_1`, time `t: 0 -> 1`, straight path
`z_t = (1 - t) z_0 + t z_1`, velocity `z_1 - z_0`. A field `v` that regresses the velocity transports noise to data:
`d psi_t / dt = v(psi_t, t)`, `psi_0 = z_0` (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
"""

import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Solver = Literal["euler", "midpoint"]
SOLVERS = {"euler": diffrax.Euler, "midpoint": diffrax.Midpoint}


class Ode(NamedTuple):
    """How an ODE is solved: `steps` equal steps of a solver.

    `euler` is first order at one evaluation of the field a step, as in the papers; `midpoint` is second order at two.
    Both look at t < 1 alone. A field that was trained with t ~ U[0, 1) is wrong at t = 1, where Heun's method and most
    solvers of higher order look.
    """

    steps: int = 5
    solver: Solver = "midpoint"

    @property
    def evaluations(self) -> int:
        """Evaluations of the field in one solve: what it costs."""
        return self.steps * {"euler": 1, "midpoint": 2}[self.solver]


def integrate(
    velocity: Callable[[Array, Array], Array],
    z_0: Num[Array | np.ndarray, "*shape"],
    ode: Ode,
    *,
    end_time: Float[Array, "*times"] | float = 1.0,
) -> Float[Array, "*shape"]:
    """Solves `dz/dt = velocity(z, t)` from `t = 0` to `end_time`, in steps of equal length.

    Args:
        velocity: field; called with `z` of `z_0`'s shape and `t` of `end_time`'s shape.
        z_0: start, any shape.
        ode: the solver and its number of steps.
        end_time: where to stop. An array gives each element its own end: in the clock `u = t / end_time` all stop at
            `u = 1`, so one loop serves them all.

    Raises:
        ValueError: a shape, the solver or its number of steps is another.

    Returns z with the shape and type of `z_0`, which is float32 for whole numbers.
    """
    z_0, steps = jnp.asarray(z_0), operator.index(ode.steps)
    if steps < 1 or ode.solver not in SOLVERS or jnp.iscomplexobj(z_0):
        raise ValueError(f"a solver of {list(SOLVERS)}, a step and real numbers are needed: {ode}, {z_0.dtype}.")
    z_0 = z_0 if jnp.issubdtype(z_0.dtype, jnp.floating) else z_0.astype(jnp.float32)
    end_time = jnp.asarray(end_time, z_0.dtype)
    if end_time.shape != z_0.shape[: end_time.ndim]:
        raise ValueError(f"end_time must have the first axes of z_0, {z_0.shape}, not {end_time.shape}.")
    scale = end_time.reshape(end_time.shape + (1,) * (z_0.ndim - end_time.ndim))

    def field(u, z, _):
        moves = velocity(z, u * end_time)
        if jnp.shape(moves) != z.shape:
            raise ValueError(f"the velocity must have the shape of z, {z.shape}, not {jnp.shape(moves)}.")
        return jnp.broadcast_to(scale, z.shape) * moves

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        SOLVERS[ode.solver](),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=z_0,
        stepsize_controller=diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, steps + 1)),
        saveat=diffrax.SaveAt(t1=True),
        max_steps=steps,
        # The loop has a fixed length and cannot fail; checking for failure would cost a host call.
        throw=False,
    )
    return solution.ys[0].astype(z_0.dtype)
