"""The speed benchmark's own arithmetic: its FLOPs are those XLA counts, its table and figure hold what was measured."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import evor_value
from baselines import critics, qc
from benchmarks import inference, speed
from common import flops
from common.files import read_csv
from common.flow import Ode
from common.networks import FlowCritic, FlowPolicy, Sizes, VelocityCritic
from common.problem import Dataset, Replica
from common.returns import affine_axis
from tests.helpers import mostly_slow

PAGE = Path(__file__).parents[2] / "results" / "speed" / "README.md"
ARGS = speed.Args(rounds=1, width=32, rows=500, steps=2, replicas=(1, 2))


def test_the_pages_table_of_replicas_is_that_of_its_rows():
    files = [read_csv(PAGE.with_name(name)) for name in ("one_device.csv", "cores.csv")]
    for case in ("BC, 10 replicas", "value paper, trunk, 10 replicas"):
        one, cores = (next(float(row["ms"]) for row in rows if row["case"] == case) for rows in files)
        assert f"| {case} | {one:.1f} | {cores:.1f} |" in PAGE.read_text()
        assert 1.6 <= round(one / cores, 1) <= 2.0  # docs/running.md


def test_the_pages_table_of_steps_is_that_of_its_rows():
    files = [read_csv(PAGE.with_name(name)) for name in ("stages_90dd10a.csv", "stages.csv")]
    for case in ("mlp", "trunk", "mlp, softmax backup", "trunk, softmax backup"):
        name = f"shared-noise, {case}"
        then, now = (next(float(row["to_bc"]) for row in rows if row["case"] == f"value {name}") for rows in files)
        assert f"| {name} | {then:.1f} | {now:.1f} |" in PAGE.read_text()


def counted(function, *arguments) -> float:
    """FLOPs of a compiled function as XLA counts them."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_policy_macs_are_those_of_the_compiled_function():
    """Wide enough that activations, counted by XLA as well, hardly matter: within 3%."""
    policy = FlowPolicy(30, 6, width=256, depth=3, key=jax.random.key(0))
    macs, first = flops.policy_macs(policy)
    assert (macs, first) == (37 * 256 + 2 * 256 * 256 + 256 * 6, 37 * 256)
    batch = jnp.ones((64, 30)), jnp.ones((64, 6)), jnp.ones(64)

    def velocity(policy, x, a, t):
        return jax.vmap(lambda x, a, t: policy.velocity(policy.features(x), a, t))(x, a, t)

    assert counted(velocity, policy, *batch) == pytest.approx(2 * 64 * macs, rel=0.03)


@pytest.mark.parametrize("kind", ["mlp", "trunk"])
def test_critic_macs_are_those_of_the_compiled_functions(kind):
    critic = FlowCritic(30, 6, kind=kind, width=256, depth=3, head_width=128, key=jax.random.key(0))
    features, velocity, first = flops.critic_macs(critic)
    assert first == (38 if kind == "mlp" else 36) * 256
    x, a, z = jnp.ones((64, 30)), jnp.ones((64, 6)), jnp.ones(64)
    found = counted(lambda c, x, a: jax.vmap(c.features)(x, a), critic, x, a)
    assert found == pytest.approx(2 * 64 * features, rel=0.08)  # LayerNorm and GELU of the trunk
    hidden = jax.vmap(critic.features)(x, a)
    found = counted(lambda c, h, z: jax.vmap(c.velocity)(h, z, z), critic, hidden, z)
    assert found == pytest.approx(2 * 64 * velocity, rel=0.12)


class OwnCritic(VelocityCritic):
    """`s(z, t | x, a) = sum(W [x, a]) + t`, for tests."""

    weight: Array

    def features(self, observation, action):
        return self.weight @ jnp.concatenate([observation, action])

    def velocity(self, features, z, t):
        return jnp.sum(features) + t


def test_networks_of_ones_own_are_sampled_and_counted():
    """A critic that says its velocity alone, and a policy that has no `mlp`: docs/extending.md."""
    critic = OwnCritic(jnp.full((4, 5), 0.1))
    noise = jnp.linspace(-1.0, 1.0, 3)
    drawn, weights = critic.law(jnp.ones(3), jnp.zeros(2), noise, Ode())
    np.testing.assert_allclose(drawn, noise + 4 * 0.3 + 0.5, rtol=1e-6)  # midpoint is exact where dz/dt is linear in t
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    assert flops.critic_macs(critic) == (0, 20, 0)
    assert flops.policy_macs(critic) == (20, 0)


COUNTED = [
    (evor_value, dict(critic="trunk", flow_steps=1, solver="euler", next_action="softmax", backup_returns=2)),
    (evor_value, dict(td_target="shared-noise", critic="trunk", flow_steps=1, solver="euler")),
    (evor_value, dict(td_target="paper")),
    (critics, dict(critic="scalar", ensemble=2)),
    (critics, dict(critic="c51", next_action="softmax")),
    (qc, dict(flow_steps=1, solver="euler")),
]


@pytest.mark.parametrize(("learner", "changes"), mostly_slow(COUNTED, but=COUNTED[:1]))
def test_step_flops_are_those_of_the_compiled_step(learner, changes):
    """Within 9%: XLA counts activations and Adam too. (And the round of a loop once: one Euler step each.) The first
    layers are a sixth of the networks: leaving out what is saved there would show."""
    args = learner.Args(width=256, depth=3, batch_size=64, num_next_actions=4, horizon=20, **changes)
    state = learner.init_state(args, Sizes(observation=100, action=5, horizon=20), key=jax.random.key(0))
    count = 10
    dataset = Dataset(
        jnp.zeros((40, 100)), jnp.zeros((40, 5)), jnp.arange(count), jnp.zeros((1, count)), jnp.zeros((1, count)),
        jnp.zeros((1, count, 4, 100), jnp.float16), jnp.array(count),
    )  # fmt: skip
    scale = affine_axis(0.0, 0.5, low=-1.0, high=1.0)
    replica = Replica(jnp.array(0), jnp.array(0), scale, jax.random.key(0))
    found = counted(lambda s, d, r: learner.train_step(args, s, d, r), state, dataset, replica)
    expected = flops.step_flops(args, state.critic, getattr(state, "policy", None))
    assert found == pytest.approx(expected, rel=0.09)


@pytest.mark.slow
def test_rows_relate_a_case_to_the_first_and_to_bc(monkeypatch):
    """Times that are given: the product 1 s, BC 10 s, the cases 20 and 50 s; medians over three rounds of which one ran
    on a machine twice as slow, and one had a hiccup in the last case."""
    times = np.array([[1.0, 10.0, 20.0, 50.0], [2.0, 20.0, 40.0, 100.0], [1.0, 10.0, 20.0, 500.0]])
    monkeypatch.setattr(speed, "time_in_turn", lambda cases, rounds: times)
    product = speed.product_case(ARGS)
    cases = [speed.Case("one", print, flops=5 * product.flops), speed.Case("two", print)]
    rows = speed.measure("group", cases, ARGS)
    assert [row["case"] for row in rows][1:] == ["BC", "one", "two"]
    assert [row["to_bc"] for row in rows] == [0.1, 1.0, 2.0, 5.0]
    assert [row["to_first"] for row in rows[2:]] == [1.0, 2.5]
    assert [row["ms"] for row in rows] == [1e3, 1e4, 2e4, 1e5]
    assert rows[0]["peak_share"] == 1.0 and rows[2]["peak_share"] == 0.25


@pytest.mark.slow
def test_table_and_figure_of_small_groups(tmp_path, monkeypatch):
    """The groups that need no environment, at a size that means nothing: every row has its unit and its machine."""
    small = dataclasses.replace(ARGS, groups=("replicas", "data", "run"), out=tmp_path)
    rows = speed.main(small)
    found = {row["case"]: row["value"] for row in rows if row["group"] == "run"}
    assert found == {"compilations of BC training": 1, "compilations of value training": 1}
    text = (tmp_path / "speed.md").read_text()
    assert "value paper, trunk, 2 replicas" in text and "compilations of BC training" in text
    assert (tmp_path / "speed.png").stat().st_size > 5_000
    assert "git_revision" in (tmp_path / "speed.csv").read_text().splitlines()[0]


@pytest.mark.slow
def test_quantiles_rank_candidates_better_than_independent_draws():
    """On an untrained critic, whose returns are about the noise itself, at a high temperature: with N quantiles Q* has
    no variance and less error than with N independent draws; both have less with more returns."""
    agent = speed.agent(speed.Args(width=32), "trunk")
    observations = np.random.default_rng(0).normal(size=(6, speed.OBSERVATION)).astype(np.float32)
    args = inference.Args(num_actions=8, draws=8, return_temperature=1.0)
    rows = {(row["noise"], row["num_returns"]): row for row in inference.noise_rows(args, agent, observations)}
    for number in (4, 16, 32):
        assert rows["quantiles", number]["q_variance"] == 0.0 < rows["independent", number]["q_variance"]
        assert rows["quantiles", number]["q_rmse"] < 0.5 * rows["independent", number]["q_rmse"]
    assert rows["independent", 32]["q_rmse"] < rows["independent", 4]["q_rmse"]
    assert rows["quantiles", 32]["q_rmse"] < rows["quantiles", 4]["q_rmse"]


@pytest.mark.slow
def test_solver_errors_fall_with_the_steps():
    agent = speed.agent(speed.Args(width=32), "mlp")
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(5, speed.OBSERVATION)).astype(np.float32)
    actions = rng.uniform(-1, 1, (5, speed.ACTION)).astype(np.float32)
    rows = {(row["solver"], row["flow_steps"]): row for row in inference.solver_rows(agent, observations, actions)}
    for solver, few, many in (("euler", 5, 50), ("midpoint", 1, 10)):
        for error in ("action_rmse", "return_rmse"):
            assert rows[solver, many][error] < 0.3 * rows[solver, few][error]
    assert rows["midpoint", 5]["evaluations"] == rows["euler", 10]["evaluations"] == 10
