"""How long a training will take: counted operations over a rate that is known here."""

import dataclasses
import itertools
from pathlib import Path

import jax
import pytest

import evor_bc
import evor_value
from common import plan
from common.networks import Sizes

SIZES = Sizes(30, 6, 1)
ARGS = evor_value.Args(
    critic="mlp", width=256, depth=3, steps=1_000, env="scene-play", num_actions=3, num_returns=2, flow_steps=4,
    solver="euler",
)  # fmt: skip


def test_a_policy_takes_its_operations_over_the_rate(monkeypatch: pytest.MonkeyPatch):
    """Three passes, but for one of the first layer. Three seeds on two devices take two rounds."""
    monkeypatch.setattr(plan, "product_rate", lambda width, devices: 1e6 / len(devices))
    first, whole = 37 * 256, 37 * 256 + 2 * 256 * 256 + 256 * 6
    args = evor_bc.Args(width=256, depth=3, steps=1_000, batch_size=64)
    stage = plan.policy_stage(args, SIZES)
    assert stage.what == "base policy, 1,000 steps"
    assert stage.seconds == pytest.approx(1_000 * 2 * 64 * (3 * whole - first) / (plan.SHARE * 1e6))
    monkeypatch.setattr(plan.jax, "local_devices", lambda: [None, None])
    three = plan.policy_stage(dataclasses.replace(args, seeds=3), SIZES)
    assert three.seconds == pytest.approx(2 * 2 * stage.seconds)


def test_an_evaluation_takes_its_decisions_and_its_simulation(monkeypatch: pytest.MonkeyPatch):
    """50 episodes of 750 steps, of the base policy alone too; on two cores."""
    monkeypatch.setattr(plan, "num_cores", lambda: 2)
    monkeypatch.setattr(plan, "product_rate", lambda width, devices: 1e12)
    critic = 38 * 256 + 2 * 256 * 256 + 256
    features = 36 * 256  # of the first layer
    decision = 2 * 3 * (4 * (37 * 256 + 2 * 256 * 256 + 256 * 6) + features + 2 * 4 * (critic - features))
    training, evaluation = plan.value_stages(ARGS, SIZES)
    steps = 2 * 50 * 750
    assert evaluation.seconds == pytest.approx(steps * (decision / (plan.SHARE * 1e12) + 1 / 1_200))
    more = plan.value_stages(dataclasses.replace(ARGS, tasks=(1, 2, 3), seeds=2), SIZES)
    assert [stage.what for stage in more] == ["6 reward models, 1,000 steps", "evaluation, at most"]
    assert [stage.seconds for stage in more] == pytest.approx([6 * training.seconds, 6 * evaluation.seconds])
    nowhere = dataclasses.replace(ARGS, env="my-robot", dataset=Path("x.npz"))
    assert plan.value_stages(nowhere, SIZES)[1].seconds == 0


def test_the_plan_is_said_and_what_preview_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A base policy that stands is not trained again; nothing is said of `--preview` where it is, or where it is not
    needed: below an hour."""
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(ARGS, preview=True, steps=10, horizon=5, num_next_actions=1)

    def said(args: evor_value.Args, rate: float, is_trained: bool = False) -> list[str]:
        monkeypatch.setattr(plan, "product_rate", lambda width, devices: rate)
        plan.print_plan(args, short, SIZES, policy_args=evor_bc.args_for, is_trained=lambda path: is_trained)
        return capsys.readouterr().out.splitlines()

    slow = said(ARGS, 1e9)
    assert (
        len(slow) == 2
        and slow[0].startswith("plan, without compiling: base policy, 1,000,000 steps: ")
        and "h in all" in slow[0]
    )
    assert slow[1].startswith("  with --preview: base policy, 100,000 steps: ")
    assert len(said(short, 1e9)) == len(said(ARGS, 1e13)) == 1
    (trained,) = said(ARGS, 1e13, is_trained=True)
    assert trained.startswith("plan, without compiling: 1 reward model, 1,000 steps: ")


def test_the_rate_is_that_of_a_chain_on_one_of_the_devices(monkeypatch: pytest.MonkeyPatch):
    """All chains take a second together, by this clock: 50 products of 256 x 512 with 512 x 512 each, as much work at
    another width, and no more than 5,000. It is measured once."""
    ticks = itertools.count()
    monkeypatch.setattr(plan.time, "perf_counter", lambda: next(ticks))
    devices = (jax.local_devices()[0],) * 2
    for width, length in ((16, 5_000), (512, 50), (3_000, 1)):
        assert plan.product_rate(width, devices) == 2.0 * length * 256 * width**2
        began = next(ticks)
        assert plan.product_rate(width, devices) == 2.0 * length * 256 * width**2
        assert next(ticks) == began + 1
