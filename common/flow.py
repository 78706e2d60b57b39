"""The one place where an ODE is solved.

Convention of the whole project: noise `z_0 ~ N(0, I)`, data `z_1`, time `t: 0 -> 1`, straight path
`z_t = (1 - t) z_0 + t z_1`, velocity `z_1 - z_0`. A field `v` that regresses the velocity transports noise to data:
`d psi_t / dt = v(psi_t, t)`, `psi_0 = z_0` (Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003).
"""

from collections.abc import Callable
from typing import Literal

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Solver = Literal["euler", "midpoint", "heun", "tsit5"]
SOLVERS = {
    "euler": diffrax.Euler,
    "midpoint": diffrax.Midpoint,
    "heun": diffrax.Heun,
    "tsit5": diffrax.Tsit5,
}
# Velocities that each solver computes: (first step, every further step). Tsit5 passes its last stage on.
EVALUATIONS = {"euler": (1, 1), "midpoint": (2, 2), "heun": (2, 2), "tsit5": (7, 6)}


def num_evaluations(solver: Solver, num_steps: int) -> int:
    """Evaluations of the velocity field in one solve: what a solve costs."""
    first, further = EVALUATIONS[solver]
    return first + (num_steps - 1) * further


def integrate(
    velocity: Callable[[Array, Array], Array],
    z_0: Float[Array, "*shape"],
    *,
    num_steps: int,
    end_time: Float[Array, "*times"] | float = 1.0,
    solver: Solver = "euler",
) -> Float[Array, "*shape"]:
    """Solves `dz/dt = velocity(z, t)` from `t = 0` to `end_time` with `num_steps` steps of equal length.

    Args:
        velocity: field; called with `z` of `z_0`'s shape and `t` of `end_time`'s shape.
        z_0: start, any shape.
        num_steps: steps of the solver.
        end_time: where to stop. An array gives each element its own end: in the clock `u = t / end_time` all stop at
            `u = 1`, so one loop serves them all.
        solver: `euler`, with a global error of O(end_time / num_steps), as in the papers; `midpoint` and `heun`, second
            order at two evaluations a step; `tsit5`, fifth order at six.
    """
    end_time = jnp.asarray(end_time, z_0.dtype)
    scale = end_time.reshape(end_time.shape + (1,) * (z_0.ndim - end_time.ndim))

    def field(u, z, args):
        del args
        return jnp.broadcast_to(scale, z.shape) * velocity(z, u * end_time)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        SOLVERS[solver](),
        t0=0.0,
        t1=1.0,
        dt0=None,
        y0=z_0,
        stepsize_controller=diffrax.StepTo(ts=jnp.linspace(0.0, 1.0, num_steps + 1)),
        saveat=diffrax.SaveAt(t1=True),
        max_steps=num_steps,
        # The loop has a fixed length and cannot fail; checking for failure would cost a host call.
        throw=False,
    )
    return jax.tree.map(lambda z: z[0], solution.ys)
