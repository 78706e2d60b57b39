"""Recipes: what `--preview` sets for an environment of OGBench, beyond the presets of the scripts.

Any flag overrides it, and it is printed at the start. docs/tuning.md gives the reasons.
"""

import dataclasses
from typing import Any

from common.data.names import parse_env
from common.errors import UserError

# Without the velocities of the arm's six joints and with chunks, the base policy commits to one of several objects.
SEVERAL_OBJECTS = dict(horizon=5, ignore_observations=(6, 7, 8, 9, 10, 11))
# A base policy that hardly ever arrives has a value that cannot guide: that of the extracted policy is learned instead.
FAR_GOALS = dict(next_action="softmax", discount=0.995)

RECIPES: dict[str, dict[str, Any]] = {
    "cube-double": SEVERAL_OBJECTS | dict(policy_steps=200_000),
    "scene": SEVERAL_OBJECTS,
    "pointmaze-medium": FAR_GOALS,
}


def recipe_of(args: Any) -> dict[str, Any]:
    """The fields of `args` that the recipe of `args.env` sets; none for other environments and data."""
    try:
        recipe = dict(RECIPES.get(parse_env(args.env).prefix, {}))
    except UserError:
        return {}
    fields = {field.name for field in dataclasses.fields(args)}
    if "policy_steps" in recipe and "policy_steps" not in fields:  # of stage 1
        recipe["steps"] = recipe.pop("policy_steps")
    return {name: value for name, value in recipe.items() if name in fields}
