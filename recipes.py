"""Recipes: what `--preview` sets for an environment of OGBench, beyond the presets of the scripts.

Any flag overrides it, and it is printed at the start. docs/tuning.md gives the reasons.
"""

import dataclasses
from typing import Any

from common.data.names import parse_env
from common.errors import UserError

# Chunks of actions commit to a direction or an object, and the value of the extracted policy is learned instead of the
# base policy's, which hardly ever arrives.
ALL = dict(horizon=5, next_action="softmax", action_temperature=0.03)
# The value of a rare action is a guess, and the best of many candidates often is a wrong one. In a maze rare actions
# run into walls, and values leak through those.
MAZE = ALL | dict(noise_scale=0.3, num_actions=8, discount=0.995, policy_steps=50_000)
# The velocities of the arm's six joints say where the demonstrator goes: a policy that sees them looks at nothing else.
MANIPULATION = ALL | dict(noise_scale=0.5, ignore_observations=(6, 7, 8, 9, 10, 11), policy_steps=200_000)

RECIPES: dict[str, dict[str, Any]] = {
    "pointmaze": MAZE,
    "cube": MANIPULATION,
    # With 0.99 two wrong buttons for ever cost less than five presses. The value spreads one press at a time.
    "puzzle": MANIPULATION | dict(discount=0.998, steps=160_000),
    "scene": MANIPULATION | dict(reward="sparse"),  # as QC reports it
}


def recipe_of(args: Any) -> dict[str, Any]:
    """The fields of `args` that the recipe of `args.env` sets; none for other environments and data."""
    try:
        family = parse_env(args.env).prefix.partition("-")[0]
    except UserError:
        return {}
    recipe = dict(RECIPES.get(family, {}))
    fields = {field.name for field in dataclasses.fields(args)}
    if "policy_steps" in recipe and "policy_steps" not in fields:  # of stage 1
        recipe["steps"] = recipe.pop("policy_steps")
    return {name: value for name, value in recipe.items() if name in fields}
