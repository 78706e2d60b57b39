"""Constraints declared beside a field."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pytest

import evor_bc
import evor_infer
import evor_value
from baselines import critics, qc
from common.args import (
    Constraint,
    Count,
    at_least,
    check,
    each,
    flag_of,
    learning_rate,
    multiple_of,
    not_negative,
    positive,
    size,
    within,
)
from common.cli import parse_args
from common.errors import UserError
from common.replicas import chunked
from common.run import Run
from tests.helpers import tiny_dataset
from tests.processes import ROOT

Width = Annotated[int, size(100)]


@dataclasses.dataclass(frozen=True)
class Args:
    unit: Count = 2
    steps: Annotated[Count, multiple_of("unit")] = 4
    maybe: Annotated[int | None, at_least(3)] = None
    share: Annotated[float, within(0, 1, brackets="[)")] = 0.0
    rate: Annotated[float, within(0, 1, brackets="(]")] = 1.0
    size: Annotated[float, positive] = 1.0
    noise: Annotated[float, not_negative] = 0.0
    many: Annotated[tuple[int, ...], each(at_least(1))] = (1,)
    width: Width = 1
    kind: Literal["a", "b"] = "a"
    other: Literal["c", "d"] | None = None

    def conflicts(self):
        if self.size == self.noise:
            yield "--size and --noise are the same."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(unit=0), "--unit must be at least 1, not 0."),
        (dict(unit=0, steps=3), "--unit must be at least 1, not 0."),
        (dict(steps=0), "--steps must be at least 1, not 0."),
        (dict(steps=3), "--steps 3 is no multiple of --unit 2: change one of them."),
        (dict(maybe=2), "--maybe must be at least 3, not 2."),
        (dict(share=1.0), "--share must be in [0, 1), not 1.0."),
        (dict(share=float("nan")), "--share must be in [0, 1), not nan."),
        (dict(rate=0.0), "--rate must be in (0, 1], not 0.0."),
        (dict(size=0.0), "--size must be positive, not 0.0."),
        (dict(noise=-0.1), "--noise must not be negative: -0.1."),
        (dict(noise=float("nan")), "--noise must not be negative: nan."),
        (dict(many=()), "--many needs at least one number."),
        (dict(many=(2, 0)), "--many must be at least 1, not 0."),
        (dict(width=0), "--width must be a number in [1, 100], not 0."),
        (dict(width=101), "--width must be a number in [1, 100], not 101."),
        (dict(width=2.0), "--width 2.0 is of another type than it should be."),
        (dict(width=True), "--width True is of another type than it should be."),
        (dict(width="8"), "--width '8' is of another type than it should be."),
        (dict(kind="c"), "--kind must be one of a, b, not 'c'."),
        (dict(kind=[]), "--kind must be one of a, b, not []."),
        (dict(other="a"), "--other must be one of c, d, not 'a'."),
        (dict(noise=1.0), "--size and --noise are the same."),
    ],
)
def test_what_breaks_a_constraint_is_said(changes: dict, sentence: str):
    with pytest.raises(UserError) as error:
        check(Args(**changes))
    assert str(error.value) == sentence


def test_what_fulfils_all_passes():
    check(Args())
    check(Args(unit=1, steps=1, maybe=3, share=0.999, rate=1e-9, noise=5.0, many=(1, 1), width=100, kind="b"))


@pytest.mark.parametrize("script", [evor_bc, evor_value, evor_infer, critics, qc], ids=lambda script: script.__name__)
def test_defaults_and_presets_fulfil_their_constraints(script):
    """Fails if a subclass that declares a field anew has another default than its constraint allows."""
    for words in ([], *([f"--{name}"] for name in script.PRESETS)):
        check(parse_args(script.Args, script.PRESETS, words))


def test_a_baseline_keeps_the_constraints_of_fields_that_it_declares_anew():
    """A field that is declared anew loses what its parent's annotation said."""
    for args in (critics.Args, qc.Args):
        for field in dataclasses.fields(args):
            parent = evor_value.Args.__annotations__.get(field.name)
            declared = args.__annotations__.get(field.name)
            if parent is not None and declared is not None:
                constrained = [x for x in getattr(parent, "__metadata__", ()) if isinstance(x, Constraint)]
                assert bool(constrained) <= bool(getattr(declared, "__metadata__", ())), field.name


def test_learning_rate():
    assert learning_rate(3e-4, "constant", 100) == 3e-4
    schedule = learning_rate(2.0, "cosine", 100)
    assert [float(schedule(step)) for step in (0, 25, 50, 100)] == pytest.approx([2.0, 1 + np.sqrt(0.5), 1.0, 0.0])


def test_runs_that_differ_in_a_path_share_a_program():
    """Fails if a place or a readout compiles a step anew, or if a setting that the step reads does not."""
    step = chunked(lambda args, state, dataset, replica: (state * args.tau, {"loss": state}))
    args = evor_value.Args(steps_per_call=2)
    places = dict(run_dir=Path("b"), policy_run_dir=Path("c"), env="scene-play", dataset=Path("d"))
    elsewhere = dataclasses.replace(args, **places, overwrite=True, num_actions=3, first_seed=1, tasks=(1,))
    for settings in (args, elsewhere):
        state, _ = step(settings, jnp.ones(1), jnp.ones(1), jnp.ones(1))
    assert step._cache_size() == 1
    other, _ = step(dataclasses.replace(args, tau=0.5), jnp.ones(1), jnp.ones(1), jnp.ones(1))
    assert step._cache_size() == 2 and float(other[0]) == 0.25 and float(state[0]) == pytest.approx(0.005**2)


def test_paths_are_given_as_text_too_and_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without the checks of types that are active in tests alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    code = (
        "import evor_value, evor_infer; from pathlib import Path; "
        "args = evor_value.Args(run_dir='~/runs', dataset='~/my.npz', policy_run_dir=Path('~/policies')); "
        "print(args.directory, args.dataset, args.policy_run_dir, evor_infer.Args(run_dir='~/x').directory)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == [str(tmp_path / name) for name in ("runs", "my.npz", "policies", "x")]
    args = dataclasses.replace(
        evor_value.Args(), run_dir=Path("~/runs"), dataset=Path("minari:mujoco/hopper/expert-v0")
    )
    assert args.directory == tmp_path / "runs" and str(args.dataset) == "minari:mujoco/hopper/expert-v0"


@pytest.mark.parametrize(
    "settings",
    [
        dict(width=True), dict(width="8"), dict(seeds=2.0), dict(eval_episodes=2.5), dict(ignore_observations=[1]),
        dict(ignore_observations=(1.5,)), dict(run_dir=3), dict(resume="no"), dict(discount=None), dict(tasks=2),
        dict(steps="20"), dict(steps=None), dict(save_every="10"), dict(steps_per_call="10"),
    ],
)  # fmt: skip
def test_values_of_other_types(settings: dict):
    """As Python takes them, without the checks of types that are active in tests."""
    args = evor_value.Args()
    for name, value in settings.items():
        object.__setattr__(args, name, value)
    with pytest.raises(UserError, match=f"{flag_of(next(iter(settings)))} .* is of another type than it should be"):
        check(args) if "steps" not in settings else Run(args, stage="value")  # which compares it with others first
    for name, value in dict(width=np.int64(8), learning_rate=1).items():
        object.__setattr__(args := evor_value.Args(), name, value)
        check(args)


def test_numbers_of_numpy_and_jax_are_numbers(tmp_path: Path):
    """Twice, since the second run deletes the first one before it writes its arguments. In a process without the checks
    of types that are active in tests."""
    tiny_dataset(tmp_path / "data.npz")
    code = (
        "import evor_bc, numpy as np, jax.numpy as jnp; evor_bc.main(evor_bc.Args(env='mine', dataset='data.npz', "
        "width=np.int32(8), depth=2, batch_size=np.int64(4), steps=2, steps_per_call=2, "
        "learning_rate=jnp.float32(0.25), ignore_observations=(np.int64(1),), overwrite=np.bool_(True)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    args = json.loads((tmp_path / "runs/mine/bc/config.json").read_text())["args"]
    assert (args["width"], args["batch_size"], args["learning_rate"]) == (8, 4, 0.25)
    assert (args["ignore_observations"], args["overwrite"]) == ([1], True)


def test_a_discount_that_single_precision_takes_for_one():
    """Fails if the returns of a cut episode are filled for ever."""
    check(evor_value.Args(discount=0.99999))
    for discount in (0.999999, 0.99999999):
        with pytest.raises(UserError, match=r"--discount 0\.9+: single precision hardly tells it from 1"):
            check(evor_value.Args(discount=discount))
