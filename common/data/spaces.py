"""Observations and actions of Gymnasium as vectors: what of its spaces is learned from, and what is refused."""

from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Shaped

from common.errors import UserError


def action_range(space: gymnasium.Space, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action of a `Box`.

    Raises:
        UserError: the actions are discrete, or not bounded.
    """
    if not isinstance(space, gymnasium.spaces.Box):
        raise UserError(
            f"{name} has actions of the kind {type(space).__name__}: only continuous ones (Box) are learned."
        )
    whole = not np.issubdtype(space.dtype, np.floating)
    half = space.high / 2 - space.low / 2
    fits = ((half > 0) & (half <= np.finfo(np.float32).max / 2)).all()  # single precision, which scales, has no more
    if not space.is_bounded("both") or len(space.shape) != 1 or whole or not fits:
        raise UserError(f"{name} has actions that are no bounded vector ({space}): they cannot be scaled to [-1, 1].")
    return space.low, space.high


def flat(space: gymnasium.Space, values: Any, name: str, *, batched: bool) -> Shaped[np.ndarray, "*rows observation"]:
    """An observation as a vector of numbers, or `batched` ones as rows. Those of a dictionary come in the alphabetical
    order of its keys, since a file keeps no other.

    Raises:
        UserError: they hold something else than numbers, or images.
    """
    if isinstance(space, gymnasium.spaces.Dict):
        parts = [flat(part, values[key], name, batched=batched) for key, part in sorted(space.spaces.items())]
        return np.concatenate(parts, axis=-1)
    if isinstance(space, gymnasium.spaces.Tuple):
        parts = [flat(part, values[i], name, batched=batched) for i, part in enumerate(space.spaces)]
        return np.concatenate(parts, axis=-1)
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) > 2:
        what = "images" if isinstance(space, gymnasium.spaces.Box) else f"the kind {type(space).__name__}"
        raise UserError(f"{name} has observations with {what}: only vectors of numbers are learned from.")
    return np.reshape(values, (len(values), -1) if batched else -1)
