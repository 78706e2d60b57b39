"""Arguments of the two trainings, and constraints that are declared beside a field.

    steps: Annotated[int, at_least(1), multiple_of("steps_per_call")] = 1_000_000

`check` holds an object's fields against them. It serves the command line and Python alike.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import optax

from common.data.foreign import environment_of
from common.data.names import DEFAULT_ENV, default_run_dir, run_name
from common.errors import UserError
from common.tracking import Tracker


@dataclasses.dataclass(frozen=True)
class Constraint:
    """What a field has to fulfil, and the sentence for one that does not."""

    holds: Callable[[Any, Any], bool]  # of the field's value and the whole object
    complaint: Callable[[str, Any, Any], str]  # of the flag, the value and the object


def at_least(low: int) -> Constraint:
    return Constraint(lambda x, _: x >= low, lambda flag, x, _: f"{flag} must be at least {low}, not {x}.")


def each(constraint: Constraint) -> Constraint:
    """Of a list: at least one element, and `constraint` for each of them."""
    return Constraint(
        lambda xs, args: len(xs) > 0 and all(constraint.holds(x, args) for x in xs),
        lambda flag, xs, args: next(
            (constraint.complaint(flag, x, args) for x in xs if not constraint.holds(x, args)),
            f"{flag} needs at least one number.",
        ),
    )


def multiple_of(other: str) -> Constraint:
    """A multiple of another field."""

    def holds(x: int, args: Any) -> bool:
        unit = getattr(args, other)
        return unit < 1 or x % unit == 0  # a unit below 1 breaks its own constraint

    return Constraint(
        holds,
        lambda flag, x, args: (
            f"{flag} {x} is no multiple of {flag_of(other)} {getattr(args, other)}: change one of them."
        ),
    )


def within(low: int, high: int, *, brackets: str) -> Constraint:
    """An interval, with `brackets` such as `[)` for one that its lower end belongs to."""

    def holds(x: float | int, _: Any) -> bool:
        return (low <= x if brackets[0] == "[" else low < x) and (x <= high if brackets[1] == "]" else x < high)

    interval = f"{brackets[0]}{low}, {high}{brackets[1]}"
    return Constraint(holds, lambda flag, x, _: f"{flag} must be in {interval}, not {x}.")


def size(most: int) -> Constraint:
    """A whole number from 1 to the largest that anybody could mean; also of what a file says."""
    return Constraint(
        lambda x, _: isinstance(x, int | np.integer) and not isinstance(x, bool) and 1 <= x <= most,
        lambda flag, x, _: f"{flag} must be a number in [1, {most}], not {x!r:.50}.",
    )


not_negative = Constraint(lambda x, _: x >= 0, lambda flag, x, _: f"{flag} must not be negative: {x}.")
positive = Constraint(lambda x, _: x > 0, lambda flag, x, _: f"{flag} must be positive, not {x}.")

Count = Annotated[int, at_least(1)]
Seed = Annotated[int, within(0, 2**31, brackets="[)")]  # JAX takes seeds modulo 2^32

# Of networks and of an extraction, which a file from a stranger may name.
Width = Annotated[int, at_least(1), size(100_000)]
Depth = Annotated[int, at_least(1), size(1_000)]
not_too_many = size(10_000)
not_endless = within(0, 1000, brackets="[]")
Draws = Annotated[int, at_least(1), not_too_many]
NoiseScale = Annotated[float, not_endless]


def unread(default: Any) -> Any:
    """A field that no compiled step reads: arguments that differ in nothing else are equal, and share a program."""
    return dataclasses.field(default=default, compare=False)


class Paths:
    """Arguments whose fields of type `Path` may be given as text, and begin with `~` for the home directory."""

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            value = getattr(self, field)
            if getattr(value, "shape", None) == ():  # a number of NumPy or JAX
                object.__setattr__(self, field, value.item())
            if Path in (hint, *get_args(hint)) and isinstance(value, str | Path):
                object.__setattr__(self, field, Path(value).expanduser())


def flag_of(field: str) -> str:
    """The field's name on the command line."""
    return f"--{field.replace('_', '-')}"


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of the type of a field; numbers of NumPy are numbers, and True is none."""
    if get_origin(hint) is Annotated:
        return _is_of(get_args(hint)[0], value)
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_of(kind, value) for kind in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of(get_args(hint)[0], x) for x in value)
    if hint in (int, float):
        kinds = (int, np.integer) if hint is int else (int, float, np.number)
        return isinstance(value, kinds) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, Path, types.NoneType) else True


def check(args: Any) -> None:
    """Holds the fields of `args` against their types and constraints; None fulfils all of these.

    Raises:
        UserError: one is of another type or does not hold, or `args.conflicts()` names settings that cannot work
            together.
    """
    hints = get_type_hints(type(args), include_extras=True)
    # What is traced by `jit`, or on the device, nobody looks at here.
    values = {field: getattr(args, field) for field in hints if not hasattr(getattr(args, field), "aval")}
    for field, value in values.items():
        hint = hints[field]
        if not _is_of(hint, value):
            raise UserError(f"{flag_of(field)} {value!r:.50} is of another type than it should be.")
        for kind in (hint, *get_args(hint)):  # also of `Literal[...] | None`
            if get_origin(kind) is Literal and value is not None and value not in get_args(kind):
                raise UserError(f"{flag_of(field)} must be one of {', '.join(get_args(kind))}, not {value!r:.50}.")
    for field, value in values.items():  # a constraint may look at other fields
        for constraint in getattr(hints[field], "__metadata__", ()) if value is not None else ():
            if isinstance(constraint, Constraint) and not constraint.holds(value, args):
                raise UserError(constraint.complaint(flag_of(field), value, args))
    for sentence in args.conflicts() if hasattr(args, "conflicts") else ():
        raise UserError(sentence)


def learning_rate(peak: float, schedule: str, steps: int) -> optax.ScalarOrSchedule:
    """`constant`, or `cosine`: `peak * (1 + cos(pi * step / steps)) / 2`."""
    return optax.cosine_decay_schedule(peak, steps) if schedule == "cosine" else peak


@dataclasses.dataclass(frozen=True)
class TrainArgs(Paths):
    """What both trainings take."""

    # --- experiment ---
    env: str = unread(DEFAULT_ENV)
    """OGBench dataset: a short name or a full id. With --dataset: an environment of Gymnasium (Id-v0, module:Id-v0; by
    default the one of a Minari dataset), or any name for the run."""
    seeds: Count = unread(1)
    """Number of seeds, all trained in one program: base policies, or a reward model per task and seed."""
    first_seed: Seed = unread(0)
    """The first seed; the others follow it."""
    run_dir: Path | None = unread(None)
    """Where the run goes; runs/ENV (runs/ENV-quick) by default. Stage 1 writes to its folder bc/, stage 2 to value/."""
    resume: bool = unread(False)
    """Continue from the last checkpoint in the run directory. Settings of the evaluation may be others then; of a run
    that is complete, only the evaluation is done again."""
    overwrite: bool = unread(False)
    """Start anew where a run stands already."""
    track: Tracker | None = unread(None)
    """Also log to Weights & Biases, TensorBoard or Trackio (a package of its own)."""
    distributed: bool = unread(False)
    """One of several processes that train together (jax.distributed); see `common.replicas.join_hosts`."""
    quick: bool = unread(False)
    """Preset: a smoke run that ends in minutes on a laptop's CPU. What it trains is not good."""
    preview: bool = unread(False)
    """Preset: reaches a working policy in about an hour on two cores."""

    # --- data ---
    dataset: Path | None = unread(None)
    """Other data to train on: an .npz file in OGBench's layout, or a folder of them, which take turns; a file in D4RL's
    layout (.hdf5); minari:ID. Stage 2 needs rewards in it (masks are optional), or qpos."""
    episodes: Annotated[int | None, at_least(1)] = unread(None)
    """Episodes to collect if the data can neither be found nor downloaded; OGBench's number by default."""
    file_steps: Count = unread(10_000)
    """Gradient steps before the next file takes its turn, where --dataset is a folder of several."""
    horizon: Depth = 1
    """Length of an action chunk; QC uses 5."""
    ignore_observations: tuple[int, ...] = unread(())
    """Coordinates of the observation that the base policy sees as constant, such as velocities (docs/tuning.md). The
    reward model always follows its policy."""

    # --- network and optimisation ---
    width: Width = 512
    """Units per hidden layer."""
    depth: Depth = 4
    """Hidden layers."""
    steps: Annotated[Count, multiple_of("steps_per_call")] = 1_000_000
    """Gradient steps."""
    batch_size: Count = 256
    """Transitions per gradient step (ours)."""
    learning_rate: Annotated[float, positive] = 3e-4
    """Adam's step size, or its peak with a schedule."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Constant as in the paper, or cosine decay to zero over all steps."""
    steps_per_call: Count = 1_000
    """Gradient steps per compiled call; metrics are averages over it."""
    save_every: Annotated[Count, multiple_of("steps_per_call")] = unread(10_000)
    """Gradient steps between checkpoints, at most: more are made where they cost little time."""

    @property
    def environment(self) -> str:
        """What `--env` names, or a Minari dataset's own."""
        return environment_of(self.env, self.dataset)

    @property
    def name(self) -> str:
        """Of the run: the environment, or what --dataset calls it."""
        return run_name(self.environment, self.dataset)

    @property
    def directory(self) -> Path:
        """The run directory, which both stages share."""
        return self.run_dir or default_run_dir(self.name, quick=self.quick)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        return tuple(range(self.first_seed, self.first_seed + self.seeds))

    @property
    def num_replicas(self) -> int:
        """Models that are trained in one program."""
        return self.seeds

    def conflicts(self) -> Iterator[str]:
        """Sentences about settings that cannot work together."""
        if self.first_seed + self.seeds > 2**31:
            yield f"--first-seed {self.first_seed}: the last of {self.seeds} seeds is above 2^31: use smaller ones."
        turns = multiple_of("steps_per_call")
        if self.dataset is not None and self.dataset.is_dir() and not turns.holds(self.file_steps, self):
            yield turns.complaint("--file-steps", self.file_steps, self)
