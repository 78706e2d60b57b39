"""Networks of all stages and the scaling of their inputs: plain functions of one example, `vmap`ped by the caller.

Numerics follow the FQL code base, the lineage of EVOR's paper, not Equinox's defaults: Glorot-uniform kernels, zero
biases, tanh-approximate GELU, LayerNorm *after* the activation with eps 1e-6 in critics and none in policies, the raw
time `t` appended to the input. Three initialisations differ: critics start with an output layer a hundred times
smaller, the head of a trunk critic with larger weights for z_t and t, and the first layer of policies with larger
weights and random biases.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from common.args import Depth, Width
from common.errors import UserError
from common.flow import Ode, integrate


class Sizes(NamedTuple):
    """What the data say about the sizes of networks."""

    observation: int
    action: int
    horizon: int  # actions in a chunk

    @property
    def chunk(self) -> int:
        """Length of an action chunk as one vector."""
        return self.action * self.horizon


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """What determines the shapes of a `FlowPolicy`."""

    observation: Width
    action: Width  # of a chunk, as one vector
    width: Width
    depth: Depth


@dataclasses.dataclass(frozen=True)
class CriticSpec:
    """What determines the shapes of a `FlowCritic` (`mlp`, `trunk`) or of a `DirectCritic`."""

    observation: Width
    action: Width  # of a chunk, as one vector
    kind: Literal["mlp", "trunk", "scalar", "c51", "qr"]
    width: Width
    depth: Depth
    head_width: Width = 128  # of `trunk`
    head_depth: Depth = 3
    outputs: Width = 1  # of a `DirectCritic`


BOUND = 10.0  # of standardised observations; the usual one (VecNormalize of Stable-Baselines3)
FIRST_LAYER = 3.0  # standard deviation of what the first layer of a policy makes of a standardised observation


class Standardizer(eqx.Module):
    """`clip((x - mean) / std, -10, 10)` per coordinate; one that does not vary, or is ignored, becomes zero.

    Units do not matter: `a x + b` in the place of `x` gives the same numbers, but for rounding. The bound is for
    coordinates that hardly ever move, such as some joints of OGBench's arm: their rare moves would be hundreds of
    standard deviations.
    """

    mean: Float[Array, " observation"]
    std: Float[Array, " observation"]

    @classmethod
    def of(cls, observations: Float[np.ndarray, "rows observation"], *, ignore: Sequence[int] = ()) -> "Standardizer":
        """Mean and standard deviation of the data.

        Raises:
            UserError: `ignore` names a coordinate that does not exist.
        """
        dims = observations.shape[1]
        if not set(ignore) <= set(range(dims)):
            raise UserError(f"--ignore-observations {list(ignore)}: observations have 0 to {dims - 1}.")
        # float64 sums: a million float32 terms lose digits.
        mean = observations.mean(axis=0, dtype=np.float64)
        std = observations.std(axis=0, dtype=np.float64)
        # What single precision rounds off is no signal.
        constant = std <= np.maximum(2 * np.finfo(np.float32).eps * np.abs(mean), np.finfo(np.float32).tiny)
        std[constant] = np.inf
        std[list(ignore)] = np.inf
        return cls(jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))

    def __call__(self, observation: Float[Array, " observation"]) -> Float[Array, " observation"]:
        if observation.shape != self.mean.shape:
            raise ValueError(f"an observation must have the shape {self.mean.shape}, not {observation.shape}.")
        return jnp.clip((observation - self.mean) / self.std, -BOUND, BOUND)

    def rows(self, observations: Float[np.ndarray, "rows observation"]) -> Float[np.ndarray, "rows observation"]:
        """A whole dataset, on the host."""
        standard = (observations - np.asarray(self.mean)) / np.asarray(self.std)
        return np.clip(standard, -BOUND, BOUND, out=standard)


def has_shapes(*expected: tuple[Array, int | None]) -> None:
    """Whether arrays are vectors of these sizes, or numbers (None): one example at a time, `jax.vmap` does batches.

    Raises:
        ValueError: they are not, and would be broadcast.
    """
    shapes = [jnp.shape(array) for array, _ in expected]
    wanted = [() if size is None else (size,) for _, size in expected]
    if shapes != wanted:
        raise ValueError(f"the shapes must be {wanted}, not {shapes}.")


class Linear(eqx.Module):
    """`x @ weight + bias`, Glorot-uniform weight, zero bias."""

    weight: Float[Array, "inputs outputs"]
    bias: Float[Array, " outputs"]

    def __init__(self, inputs: int, outputs: int, *, key: PRNGKeyArray):
        self.weight = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
        self.bias = jnp.zeros(outputs)

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        has_shapes((x, len(self.weight)))
        return x @ self.weight + self.bias


class LayerNorm(eqx.Module):
    """`(x - mean) / sqrt(variance + 1e-6) * scale + bias` over the last axis."""

    scale: Float[Array, " width"]
    bias: Float[Array, " width"]

    def __init__(self, width: int):
        self.scale, self.bias = jnp.ones(width), jnp.zeros(width)

    def __call__(self, x: Float[Array, " width"]) -> Float[Array, " width"]:
        has_shapes((x, len(self.scale)))
        mean = jnp.mean(x)
        # E[x^2] - E[x]^2, as flax computes it: one pass over x.
        variance = jnp.maximum(jnp.mean(x * x) - mean * mean, 0.0)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-6) * self.scale + self.bias


class MLP(eqx.Module):
    """Hidden layers `norm(gelu(linear(x)))`, then a linear output; `norm` is LayerNorm or nothing."""

    hidden: tuple[Linear, ...]
    norms: tuple[LayerNorm, ...]
    output: Linear

    def __init__(self, inputs: int, outputs: int, *, width: int, depth: int, layer_norm: bool, key: PRNGKeyArray):
        hidden_key, output_key = jax.random.split(key)
        sizes = [inputs] + [width] * depth
        keys = jax.random.split(hidden_key, depth)
        self.hidden = tuple(Linear(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True))
        self.norms = tuple(LayerNorm(width) for _ in range(depth)) if layer_norm else ()
        self.output = Linear(sizes[-1], outputs, key=output_key)

    def from_first(self, preactivation: Float[Array, " width"]) -> Float[Array, " outputs"]:
        """The rest of the network, given what the first linear layer puts out."""
        x = preactivation
        for i in range(len(self.hidden)):
            x = jax.nn.gelu(x if i == 0 else self.hidden[i](x))
            if self.norms:
                x = self.norms[i](x)
        return self.output(x)

    def __call__(self, x: Float[Array, " inputs"]) -> Float[Array, " outputs"]:
        return self.from_first(self.hidden[0](x))


class VelocityPolicy(eqx.Module):
    """A velocity field `v(a_t, t | x)` whose flow draws (chunks of) actions. A subclass has `features`, `velocity` and
    a static `spec`."""

    def features(self, observation: Float[Array, " observation"]) -> Float[Array, " width"]:
        """What all actions in an observation share."""
        raise NotImplementedError

    def velocity(
        self, features: Float[Array, " width"], action: Float[Array, " action"], t: Float[Array, ""]
    ) -> Float[Array, " action"]:
        """`v(a_t, t | x)`."""
        raise NotImplementedError

    def sample(
        self,
        observation: Float[Array, " observation"],
        noise: Float[Array, "num action"],
        ode: Ode,
    ) -> Float[Array, "num action"]:
        """Actions `psi_1(noise | x)`, clipped to [-1, 1]."""
        features = self.features(observation)
        velocity = jax.vmap(self.velocity, (None, 0, None))
        actions = integrate(lambda a, t: velocity(features, a, t), noise, ode)
        return jnp.clip(actions, -1.0, 1.0)


class FlowPolicy(VelocityPolicy):
    """Velocity field `v(a_t, t | x)`, an MLP.

    `features` holds the part of the first layer that depends on the observation alone, so that an ODE solve computes
    it once; the function is the same as an MLP on the concatenation `[x, a_t, t]`.
    """

    mlp: MLP
    spec: PolicySpec = eqx.field(static=True)

    def __init__(self, observation: int, action: int, *, width: int = 512, depth: int = 4, key: PRNGKeyArray):
        self.spec = PolicySpec(observation, action, width, depth)
        mlp = MLP(observation + action + 1, action, width=width, depth=depth, layer_norm=False, key=key)
        # With Glorot's small weights and no biases the first layer is nearly linear in x, and a policy smears what
        # differs between neighbouring states. Wide ones bend in many places.
        weight_key, bias_key = jax.random.split(jax.random.fold_in(key, 1))
        weight = FIRST_LAYER / observation**0.5 * jax.random.normal(weight_key, (observation, width))
        bias = jax.random.normal(bias_key, (width,))
        first = mlp.hidden[0]
        wide = first.weight.at[:observation].set(weight), bias
        self.mlp = eqx.tree_at(lambda mlp: (mlp.hidden[0].weight, mlp.hidden[0].bias), mlp, wide)

    def features(self, observation: Float[Array, " observation"]) -> Float[Array, " width"]:
        has_shapes((observation, self.spec.observation))
        first = self.mlp.hidden[0]
        return observation @ first.weight[: self.spec.observation] + first.bias

    def velocity(
        self, features: Float[Array, " width"], action: Float[Array, " action"], t: Float[Array, ""]
    ) -> Float[Array, " action"]:
        has_shapes((features, self.spec.width), (action, self.spec.action), (t, None))
        weight = self.mlp.hidden[0].weight[self.spec.observation :]
        return self.mlp.from_first(features + jnp.append(action, t) @ weight)


class Critic(eqx.Module):
    """A law of the reward-to-go, on the return axis, and draws from it. A subclass has a `law`."""

    def law(
        self,
        observation: Float[Array, " observation"],
        action: Float[Array, " action"],
        noise: Float[Array, " num"],
        ode: Ode,
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        """Values of the return and their probabilities. Only a flow has to sample, and makes use of the noise."""
        raise NotImplementedError

    def sample(
        self,
        observation: Float[Array, " observation"],
        action: Float[Array, " action"],
        noise: Float[Array, " num"],
        ode: Ode,
    ) -> Float[Array, " num"]:
        """Draws of the return: the quantiles of the law at `Phi(noise)`."""
        values, weights = self.law(observation, action, noise, ode)
        order = jnp.argsort(values)
        below = jnp.cumsum(weights[order])
        index = jnp.searchsorted(below, jax.scipy.special.ndtr(noise) * below[-1])
        return values[order][jnp.minimum(index, len(values) - 1)]


class VelocityCritic(Critic):
    """A velocity field `s(z_t, t | x, a)` whose flow draws returns. A subclass has `features` and `velocity`."""

    def features(
        self, observation: Float[Array, " observation"], action: Float[Array, " action"]
    ) -> Float[Array, " width"]:
        """What all draws of the return share."""
        raise NotImplementedError

    def velocity(self, features: Float[Array, " width"], z: Float[Array, ""], t: Float[Array, ""]) -> Float[Array, ""]:
        """`s(z, t | x, a)`."""
        raise NotImplementedError

    def sample(
        self,
        observation: Float[Array, " observation"],
        action: Float[Array, " action"],
        noise: Float[Array, " num"],
        ode: Ode,
    ) -> Float[Array, " num"]:
        """Draws `psi_1(noise | x, a)` of the return."""
        features = self.features(observation, action)
        velocity = jax.vmap(self.velocity, (None, 0, None))
        return integrate(lambda z, t: velocity(features, z, t), noise, ode)

    def law(
        self,
        observation: Float[Array, " observation"],
        action: Float[Array, " action"],
        noise: Float[Array, " num"],
        ode: Ode,
    ) -> tuple[Float[Array, " num"], Float[Array, " num"]]:
        """The draws that the flow makes of the noise, equally probable."""
        values = self.sample(observation, action, noise, ode)
        return values, jnp.full_like(values, 1.0 / len(values))


class FlowCritic(VelocityCritic):
    """Velocity field `s(z_t, t | x, a)` of the reward-to-go law.

    kind `mlp`: one MLP on `[x, a, z_t, t]`, the paper's. kind `trunk`: hidden layers compute features of `(x, a)` and a
    small MLP, the head, maps `[features, z_t, t]` to the velocity, so that many draws of the return, and many steps
    each, cost little more than one. In both, `features` is computed once per `(x, a)`, `velocity` once per step and
    draw, and the first linear layer that meets `z_t` is split so that `features` does its larger part.
    """

    trunk: tuple[tuple[Linear, LayerNorm], ...]
    head: MLP
    inputs: int = eqx.field(static=True)  # of the head, beside z_t and t
    spec: CriticSpec = eqx.field(static=True)

    def __init__(
        self,
        observation: int,
        action: int,
        *,
        kind: str = "trunk",
        width: int = 512,
        depth: int = 4,
        head_width: int = 128,
        head_depth: int = 3,
        key: PRNGKeyArray,
    ):
        """`mlp` has `depth` hidden layers of `width` units; `trunk` has one less, and in the place of the last a head
        of `head_depth` layers of `head_width` units."""
        trunk_key, head_key = jax.random.split(key)
        inputs = observation + action
        if kind == "mlp":
            self.trunk, self.inputs = (), inputs
            head = MLP(inputs + 2, 1, width=width, depth=depth, layer_norm=True, key=head_key)
        elif kind == "trunk":
            if depth < 2:
                raise ValueError(f"a trunk critic needs a depth of at least 2, not {depth}: use 'mlp'.")
            sizes, keys = [inputs] + [width] * (depth - 1), jax.random.split(trunk_key, depth - 1)
            self.trunk = tuple(
                (Linear(size, width, key=k), LayerNorm(width)) for size, k in zip(sizes[:-1], keys, strict=True)
            )
            self.inputs = width
            head = MLP(width + 2, 1, width=head_width, depth=head_depth, layer_norm=True, key=head_key)
            # Among `width` features Glorot's weights would make z_t and t faint: the head learns the law more slowly.
            weight = head.hidden[0].weight
            z_t = 1.5 * jax.random.normal(jax.random.fold_in(head_key, 2), (2, head_width))
            head = eqx.tree_at(lambda mlp: mlp.hidden[0].weight, head, weight.at[width:].set(z_t))
        else:
            raise ValueError(f"critic must be 'mlp' or 'trunk', not {kind!r}.")
        # A small output: after LayerNorm a Glorot output layer starts off by about one unit, and a
        # bootstrapped level takes 1 / (tau (1 - discount)) steps to mend by a factor e.
        self.head = eqx.tree_at(lambda mlp: mlp.output.weight, head, 0.01 * head.output.weight)
        self.spec = CriticSpec(observation, action, kind, width, depth, head_width, head_depth)

    def features(
        self, observation: Float[Array, " observation"], action: Float[Array, " action"]
    ) -> Float[Array, " width"]:
        has_shapes((observation, self.spec.observation), (action, self.spec.action))
        x = jnp.concatenate([observation, action])
        for linear, norm in self.trunk:
            x = norm(jax.nn.gelu(linear(x)))
        first = self.head.hidden[0]
        return x @ first.weight[: self.inputs] + first.bias

    def velocity(self, features: Float[Array, " width"], z: Float[Array, ""], t: Float[Array, ""]) -> Float[Array, ""]:
        has_shapes((features, self.head.hidden[0].bias.size), (z, None), (t, None))
        weight = self.head.hidden[0].weight[self.inputs :]
        return self.head.from_first(features + z * weight[0] + t * weight[1])[0]


class DirectCritic(Critic):
    """A critic of the baselines: one MLP on `[x, a]` whose outputs say the law at once.

    kind `scalar`: the expected return, the mean over `outputs` MLPs. `qr`: `outputs` quantiles of the return at the
    levels (i + 1/2) / outputs, each of probability 1 / outputs. `c51`: logits of the probabilities of the values
    `atoms`. All start, with the small outputs of an untrained network, at what a flow starts from: N(0, 1), or its
    mean.
    """

    mlps: tuple[MLP, ...]
    atoms: Float[Array, " outputs"]  # of `c51`: the values of the return, no parameters
    spec: CriticSpec = eqx.field(static=True)

    def __init__(
        self,
        observation: int,
        action: int,
        *,
        kind: str,
        outputs: int,
        width: int = 512,
        depth: int = 4,
        key: PRNGKeyArray,
    ):
        self.spec = CriticSpec(observation, action, kind, width, depth, outputs=outputs)
        make = functools.partial(MLP, observation + action, width=width, depth=depth, layer_norm=True)
        if kind == "scalar":  # not one batched MLP: XLA's batched product is slow on a CPU
            mlps = tuple(make(1, key=k) for k in jax.random.split(key, outputs))
        else:
            mlps = (make(outputs, key=key),)
        self.mlps = tuple(eqx.tree_at(lambda m: m.output.weight, mlp, 0.01 * mlp.output.weight) for mlp in mlps)
        self.atoms = jnp.zeros(outputs)

    @property
    def kind(self) -> str:
        return self.spec.kind

    def __call__(
        self, observation: Float[Array, " observation"], action: Float[Array, " action"]
    ) -> Float[Array, " outputs"]:
        """The value according to each MLP, the quantiles, or the logits of the atoms' probabilities."""
        has_shapes((observation, self.spec.observation), (action, self.spec.action))
        x = jnp.concatenate([observation, action])
        out = jnp.concatenate([mlp(x) for mlp in self.mlps])
        if self.kind == "scalar":
            return out
        if self.kind == "qr":
            return stratified_normal(len(out)) + out
        if self.kind == "c51":
            return out - 0.5 * jax.lax.stop_gradient(self.atoms) ** 2
        raise ValueError(f"critic must be 'scalar', 'c51' or 'qr', not {self.kind!r}.")

    def law(
        self,
        observation: Float[Array, " observation"],
        action: Float[Array, " action"],
        noise: Float[Array, " num"],
        ode: Ode,
    ) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        out = self(observation, action)
        if self.kind == "scalar":
            return jnp.mean(out, keepdims=True), jnp.ones(1)
        if self.kind == "c51":
            return self.atoms, jax.nn.softmax(out)
        return out, jnp.full_like(out, 1.0 / len(out))


def stratified_normal(num: int) -> Float[Array, " num"]:
    """Midpoint quantiles of N(0, 1): `Phi^-1((i + 1/2) / num)`. Deterministic, so shared by all candidates; for a
    one-dimensional law, averages over them have far less error than over as many independent draws."""
    return jax.scipy.special.ndtri(jnp.arange(0.5, num) / num)


def make_policy(spec: PolicySpec, *, key: PRNGKeyArray) -> VelocityPolicy:
    """An untrained policy."""
    return FlowPolicy(**dataclasses.asdict(spec), key=key)


def make_critic(spec: CriticSpec, *, key: PRNGKeyArray) -> Critic:
    """An untrained critic."""
    fields = dataclasses.asdict(spec)
    if spec.kind in ("mlp", "trunk"):
        del fields["outputs"]
        return FlowCritic(**fields, key=key)
    del fields["head_width"], fields["head_depth"]
    return DirectCritic(**fields, key=key)
