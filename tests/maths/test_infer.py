"""Stage 3: scores and selection against closed forms, and the properties that make them a policy."""

import dataclasses
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

import evor_infer
from common.episodes import Episodes
from common.errors import UserError
from common.evaluation import play, read_episodes, summarise
from common.files import write_csv
from common.flow import Ode
from common.networks import FlowCritic, FlowPolicy, Standardizer
from common.returns import affine_axis
from evor_infer import Agent, Extraction, log_mean_exp, select

act_one = jax.jit(evor_infer.act_one)


def make_agent(seed=0, kind="mlp"):
    policy_key, critic_key = jax.random.split(jax.random.key(seed))
    return Agent(
        # Scaled down: untrained, its actions would lie at their bounds.
        policy=jax.tree.map(lambda x: 0.3 * x, FlowPolicy(3, 2, width=16, depth=2, key=policy_key)),
        critic=FlowCritic(3, 2, kind=kind, width=16, depth=3, key=critic_key),
        standardizer=Standardizer(jnp.array([1.0, 0.0, -1.0]), jnp.array([2.0, 1.0, 0.5])),
        axis=affine_axis(-50.0, 25.0, low=-100.0, high=0.0),
    )


# Every setting of an extraction, none at its default.
OTHERS = dict(
    num_actions=3, num_returns=5, return_temperature=7.0, action_temperature=40.0, flow_steps=2, solver="euler",
    noise_scale=0.4, independent_noise=True, absolute=True,
)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1.0, 50.0])
def test_log_mean_exp_matches_scipy(temperature):
    returns = np.random.default_rng(0).normal(-50, 10, (4, 32))
    expected = temperature * (logsumexp(returns / temperature, axis=-1) - np.log(32))
    np.testing.assert_allclose(log_mean_exp(jnp.asarray(returns), temperature), expected, rtol=1e-5)


def test_log_mean_exp_at_the_limits_and_between():
    """A log-sum-exp without the - log N, or a float32 cancellation at a large temperature, fails here."""
    returns = jnp.array([-3.0, 1.0, 2.0])
    assert float(log_mean_exp(returns, 0.0)) == 2.0
    assert float(log_mean_exp(returns, np.inf)) == 0.0
    assert float(log_mean_exp(returns, 1e6)) == pytest.approx(0.0, abs=1e-4)
    assert float(log_mean_exp(returns, 1e-4)) == pytest.approx(2.0, abs=1e-3)
    values = [float(log_mean_exp(returns, t)) for t in (0.0, 0.1, 1.0, 10.0, np.inf)]
    assert values == sorted(values, reverse=True)
    assert float(log_mean_exp(jnp.full(7, -4.0), 0.5)) == -4.0


def test_select_is_a_softmax():
    """Shares of 20,000 draws within 0.015 of softmax(scores / temperature): four standard errors."""
    scores, temperature = jnp.array([0.0, 1.0, 2.0]), 1.5
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: select(scores, temperature, key=key))(keys)
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    np.testing.assert_allclose(shares, jax.nn.softmax(scores / temperature), atol=0.015)


def test_select_at_the_limits():
    scores = jnp.array([0.1, 0.3, 0.2])
    assert all(int(select(scores, 0.0, key=jax.random.key(i))) == 1 for i in range(20))
    assert all(int(select(scores, 1e-4, key=jax.random.key(i))) == 1 for i in range(20))
    keys = jax.random.split(jax.random.key(0), 9000)
    shares = np.bincount(jax.vmap(lambda key: select(scores, np.inf, key=key))(keys)) / 9000
    np.testing.assert_allclose(shares, 1 / 3, atol=0.025)


def test_one_action_is_the_base_policy():
    """num_actions = 1 returns the flow of the candidate noise, whatever the critic says."""
    agent, x = make_agent(), jnp.array([0.3, -0.2, 0.9])
    key = jax.random.key(4)
    action = act_one(agent, x, Extraction(num_actions=1, flow_steps=5), key=key)
    noise = jax.random.normal(jax.random.split(key, 3)[0], (1, 2))
    expected = agent.policy.sample((x - agent.standardizer.mean) / agent.standardizer.std, noise, Ode())[0]
    np.testing.assert_allclose(action, expected, rtol=1e-6)
    broken = dataclasses.replace(agent, critic=jax.tree.map(lambda x: x * jnp.nan, agent.critic))
    np.testing.assert_array_equal(act_one(broken, x, Extraction(num_actions=1, flow_steps=5), key=key), action)


@pytest.mark.parametrize("kind", ["mlp", "trunk"])
def test_greedy_action_is_the_candidate_with_the_largest_score(kind):
    agent, x, key = make_agent(kind=kind), jnp.array([0.3, -0.2, 0.9]), jax.random.key(4)
    settings = Extraction(num_actions=8, num_returns=5, return_temperature=0.2, action_temperature=0.0, flow_steps=4)
    action = act_one(agent, x, settings, key=key)
    standard = agent.standardizer(x)
    noise = jax.random.normal(jax.random.split(key, 3)[0], (8, 2))
    candidates = agent.policy.sample(standard, noise, Ode(4))
    z = evor_infer.return_noise(settings, key=key)
    sample = jax.jit(lambda x, a, z: agent.critic.sample(x, a, z, Ode(4)))
    returns = jnp.stack([sample(standard, c, z) for c in candidates])
    best = int(np.argmax([float(log_mean_exp(r, 0.2)) for r in returns]))
    np.testing.assert_allclose(action, candidates[best], rtol=1e-5)
    worst = int(np.argmin([float(log_mean_exp(r, 0.2)) for r in returns]))
    assert not np.allclose(candidates[best], candidates[worst])


def test_candidates_share_their_return_noise():
    """Equal candidates must get equal scores, also with independent noise: otherwise luck ranks them."""
    agent, x = make_agent(), jnp.zeros(3)
    for independent in (False, True):
        settings = Extraction(num_returns=6, independent_noise=independent)
        z = evor_infer.return_noise(settings, key=jax.random.key(0))

        def score_one(action, z=z):
            return evor_infer.score_one(agent.critic, agent.axis, x, action, z, temperature=0.5, ode=Ode(3))

        score = jax.vmap(score_one)(jnp.zeros((4, 2)))
        np.testing.assert_array_equal(score, jnp.full(4, score[0]))


def test_batched_equals_one_observation_at_a_time():
    """The per-observation argmax; an implementation that flattens candidates of all observations fails."""
    agent, key = make_agent(), jax.random.key(2)
    observations = jax.random.normal(jax.random.key(1), (6, 3))
    keys = jax.random.split(key, 6)
    for settings in (dict(num_actions=4, num_returns=3, flow_steps=3), OTHERS):
        batched = agent.act(observations, key=key, **settings)
        extraction = Extraction(**settings)
        single = [act_one(agent, x, extraction, key=k) for x, k in zip(observations, keys, strict=True)]
        assert batched.shape == (6, 1, 2)
        np.testing.assert_allclose(batched[:, 0], jnp.stack(single), rtol=1e-4, atol=1e-5)


def test_replicas_act_with_their_own_parameters_and_episode_keys():
    agents = jax.tree.map(lambda a, b: jnp.stack([a, b]), make_agent(0), make_agent(1))
    observations = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3]), (2, 3, 3))
    episodes, steps = jnp.array([[0, 1, 0]] * 2), jnp.array([[0, 0, 5]] * 2)
    keys = jax.vmap(jax.random.key)(np.array([0, 0]))
    settings = Extraction(num_actions=2, num_returns=2, flow_steps=2)
    actions = agents.decide(observations, episodes, steps, settings, keys=keys)
    assert actions.shape == (2, 3, 1, 2)
    key = jax.random.fold_in(jax.random.fold_in(keys[1], 1), 0)
    np.testing.assert_allclose(
        actions[1, 1, 0],
        act_one(make_agent(1), observations[0, 0], settings, key=key),
        rtol=1e-4,
        atol=1e-6,
    )
    flat = np.asarray(actions).reshape(6, 2)
    assert len(np.unique(flat.round(5), axis=0)) == 6, "replicas, episodes and steps must draw differently"


def test_candidates_start_from_scaled_noise():
    """A policy whose velocity is zero hands on its noise: candidates have the standard deviation lambda, the agent's
    own or that of the settings. At lambda = 0 all are `psi_1(0 | x)`."""
    agent, x, key = make_agent(), jnp.ones((1, 3)), jax.random.key(0)
    still = dataclasses.replace(agent, policy=jax.tree.map(jnp.zeros_like, agent.policy))
    own = dataclasses.replace(still, settings=Extraction(noise_scale=0.2))
    for settings, expected in ((dict(), 0.2), (dict(noise_scale=0.1), 0.1), (dict(noise_scale=0.3), 0.3)):
        actions = own.sample_actions(x, 4_000, key=key, **settings)
        assert float(jnp.std(actions)) == pytest.approx(expected, rel=0.05)
    assert float(jnp.std(still.sample_actions(x, 4_000, key=key))) > 0.7  # lambda = 1, clipped to [-1, 1]
    mode = agent.policy.sample(agent.standardizer(x[0]), jnp.zeros((1, 2)), Ode())
    for action in (agent.act(x, key=key, noise_scale=0.0)[0], agent.sample_actions(x, 3, key=key, noise_scale=0.0)[0]):
        np.testing.assert_allclose(action, jnp.broadcast_to(mode, action.shape), rtol=1e-5)


def test_a_sweep_takes_from_stage_2_what_it_does_not_sweep():
    trained = Extraction(**OTHERS | dict(independent_noise=False, absolute=False))
    assert evor_infer.combinations(evor_infer.Args(), trained) == [trained]
    swept = evor_infer.combinations(
        evor_infer.Args(num_actions=(1, 9), noise_scale=(0.0, 1.0), solver="midpoint"), trained
    )
    assert [(e.num_actions, e.noise_scale) for e in swept] == [(1, 0.0), (1, 1.0), (9, 0.0), (9, 1.0)]
    assert {(e.num_returns, e.action_temperature, e.flow_steps, e.solver) for e in swept} == {(5, 40.0, 2, "midpoint")}


def test_temperatures_compile_nothing_anew():
    agents = jax.tree.map(lambda a: a[None], make_agent())
    keys = jax.vmap(jax.random.key)(np.array([0]))
    shapes = (jnp.zeros((1, 2, 3)), jnp.zeros((1, 2), int), jnp.zeros((1, 2), int))
    before = evor_infer._decide._cache_size()
    for temperature, scale in ((0.0, 1.0), (0.1, 0.0), (float("inf"), 0.5)):
        settings = Extraction(3, 2, temperature, temperature, scale, 2)
        agents.decide(*shapes, settings, keys=keys)
    assert evor_infer._decide._cache_size() == before + 1


def test_returns_and_values_are_in_environment_units():
    agent = make_agent()
    x, a, key = jnp.zeros((4, 3)), jnp.zeros((4, 2)), jax.random.key(0)
    returns = agent.sample_returns(x, a, 8, key=key)
    standard = agent.standardizer(x[0])
    z = evor_infer.stratified_normal(8)
    expected = -50.0 + 25.0 * agent.critic.sample(standard, a[0], z, Ode())
    np.testing.assert_allclose(returns[0], expected, rtol=1e-4)
    value = agent.q_value(x, a, num_returns=8, return_temperature=float("inf"), key=key)
    np.testing.assert_allclose(value, returns.mean(axis=1), rtol=1e-4)
    assert agent.sample_actions(x, 5, key=key).shape == (4, 5, 2)


def test_temperatures_are_relative_unless_they_are_absolute():
    """Both are multiples of the spread of the data's returns, 25 here."""
    agent = make_agent()
    x, a, key = jnp.zeros((4, 3)), jnp.zeros((4, 2)), jax.random.key(0)
    returns = agent.sample_returns(x, a, 8, key=key)
    absolute = dict(return_temperature=7.0, absolute=True)
    for settings, temperature in ((dict(return_temperature=0.2), 5.0), (absolute, 7.0)):
        value = agent.q_value(x, a, num_returns=8, key=key, **settings)
        np.testing.assert_allclose(value, log_mean_exp(returns, temperature), rtol=1e-5)
    settings = dict(num_actions=4, num_returns=3, key=key)
    relative = agent.act(x, return_temperature=0.2, action_temperature=0.1, **settings)
    units = agent.act(x, return_temperature=5.0, action_temperature=2.5, absolute=True, **settings)
    np.testing.assert_array_equal(relative, units)


def test_absolute_temperatures_are_said():
    """Those of stage 2 have another unit. Fails if they are taken for units of return."""
    agent, x, key = make_agent(), jnp.zeros((4, 3)), jax.random.key(0)
    for given in ({}, {"return_temperature": 7.0}, {"action_temperature": 0.1}):
        with pytest.raises(UserError, match="absolute=True needs the temperatures"):
            agent.act(x, key=key, absolute=True, **given)
        lists = {name: (value,) for name, value in given.items()}
        assert any("--absolute needs" in said for said in evor_infer.Args(absolute=True, **lists).conflicts())
    with pytest.raises(UserError, match="absolute=True needs the temperatures"):
        agent.q_value(x, jnp.zeros((4, 2)), key=key, absolute=True)
    assert not list(evor_infer.Args(absolute=True, return_temperature=(7.0,), action_temperature=(0.1,)).conflicts())


def test_rows_say_the_temperatures_in_units_of_return():
    class Played(Episodes):
        def __init__(self):
            pass

        def run(self, act, *, desc):
            return [dict(replica=0, episode=0, success=1.0, length=1)]

    agents = jax.tree.map(lambda x: x[None], make_agent())
    settings = Extraction(return_temperature=0.2, action_temperature=0.1)
    (row,) = play(agents, Played(), settings, pairs=[(2, 0)], seed=0)
    assert (row["return_temperature_units"], row["action_temperature_units"]) == (5.0, 2.5)


def test_choices_do_not_depend_on_where_the_scores_are():
    """A million above zero: probabilities by hand, exp(0), exp(-1), exp(-2). Fails where scores are divided by a small
    temperature before their maximum is taken off, which rounds them."""
    scores = 2.0**20 + jnp.array([0.25, 0.125, 0.0])
    keys = jax.random.split(jax.random.key(0), 4_000)
    drawn = jax.vmap(lambda key: select(scores, 0.125, key=key))(keys)
    expected = np.exp([0.0, -1.0, -2.0]) / np.exp([0.0, -1.0, -2.0]).sum()
    np.testing.assert_allclose(np.bincount(drawn) / 4_000, expected, atol=0.03)


def test_rows_of_an_evaluation_keep_their_settings(tmp_path: Path):
    """Fails if a flag is read as text: a resumed run would drop its earlier evaluations as those of other settings."""
    settings = dataclasses.asdict(Extraction(absolute=True, noise_scale=1.0))
    write_csv(tmp_path / "evaluation.csv", [*settings, "success"], [settings | dict(success=1.0)])
    (row,) = read_episodes(tmp_path / "evaluation.csv")
    assert row == settings | dict(success=1.0)


@pytest.mark.parametrize("temperature", [0.5, np.inf])
def test_candidates_of_one_score_are_equally_likely(temperature):
    scores = jnp.full(3, -100.0)
    keys = jax.random.split(jax.random.key(0), 3_000)
    drawn = jax.vmap(lambda key: select(scores, temperature, key=key))(keys)
    np.testing.assert_allclose(np.bincount(drawn) / 3_000, 1 / 3, atol=0.04)


def test_the_unit_of_the_returns_changes_no_choice():
    """Returns times 1,024, which rounds nothing: the same actions. At an absolute temperature others are chosen."""
    agent, observations = make_agent(), jax.random.normal(jax.random.key(1), (64, 3))
    scaled = dataclasses.replace(agent, axis=affine_axis(-50.0 * 1024, 25.0 * 1024, low=-100.0 * 1024, high=0.0))
    settings = dict(key=jax.random.key(2), num_actions=4, num_returns=3, action_temperature=0.1)
    np.testing.assert_array_equal(agent.act(observations, **settings), scaled.act(observations, **settings))
    absolute = settings | dict(return_temperature=0.3, absolute=True)
    assert not np.array_equal(agent.act(observations, **absolute), scaled.act(observations, **absolute))


def test_stratified_noise_has_less_error_than_independent_noise():
    """Error of Q* at N = 16 for a normal law, whose log-mean-exp is mu + sigma^2 / (2 tau) = 0.5 at mu 0, tau 1."""
    stratified = abs(float(log_mean_exp(evor_infer.stratified_normal(16), 1.0)) - 0.5)
    keys = jax.random.split(jax.random.key(0), 500)
    settings = Extraction(num_returns=16, independent_noise=True)
    draws = jax.vmap(lambda key: log_mean_exp(evor_infer.return_noise(settings, key=key), 1.0))(keys)
    independent = float(jnp.sqrt(jnp.mean((draws - 0.5) ** 2)))
    assert stratified < 0.1 < independent


def test_summary_counts_and_intervals():
    rows = [dict(task=1, success=float(i < 45), length=100) for i in range(50)] + [
        dict(task=2, success=0.0, length=200)
    ]
    first, second = summarise(rows, ("task",))
    assert first["success"] == 0.9 and first["episodes"] == 50 and first["mean_length"] == 100
    assert first["low"] == pytest.approx(0.7864, abs=1e-3) and first["high"] == pytest.approx(0.9565, abs=1e-3)
    assert second["success"] == 0.0 and second["low"] == 0.0 and second["high"] > 0.5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(num_actions=0), "--num-actions must be at least 1, not 0"),
        (dict(num_returns=0), "--num-returns must be at least 1, not 0"),
        (dict(flow_steps=0), "--flow-steps must be at least 1, not 0"),
        (dict(action_temperature=-1.0), "--action-temperature must not be negative"),
        (dict(return_temperature=float("nan")), "--return-temperature must not be negative"),
    ],
)
def test_an_agent_refuses_what_the_command_line_refuses(settings: dict, says: str):
    with pytest.raises(UserError, match=says):
        make_agent().act(jnp.zeros((1, 3)), key=jax.random.key(0), **settings)


def test_settings_are_a_fixed_set():
    with pytest.raises(TypeError):
        make_agent().act(jnp.zeros((1, 3)), key=jax.random.key(0), temperature=1.0)
    assert [f.name for f in dataclasses.fields(Extraction)][:2] == ["num_actions", "num_returns"]
    defaults = dataclasses.asdict(Extraction())
    assert list(evor_infer.Settings.__annotations__) == list(defaults)
    assert set(OTHERS) == set(defaults) and all(OTHERS[name] != default for name, default in defaults.items())


def test_an_agent_takes_lists_and_numpy_numbers_and_no_observation_at_all():
    agent, key, x = make_agent(), jax.random.key(0), [[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]
    actions = agent.act(x, key=key, num_actions=np.int64(4), return_temperature=np.float32(0.5))
    expected = agent.act(np.asarray(x, np.float32), key=key, num_actions=4, return_temperature=0.5)
    np.testing.assert_array_equal(actions, expected)
    flat = actions.reshape(2, 2).tolist()
    np.testing.assert_array_equal(agent.q_value(x, flat, key=key), agent.q_value(jnp.array(x), actions, key=key))
    none = np.zeros((0, 3))
    assert agent.act(none, key=key).shape == (0, 1, 2)
    assert agent.sample_actions(none, 5, key=key).shape == (0, 5, 2)
    assert agent.sample_returns(none, np.zeros((0, 2)), 4, key=key).shape == (0, 4)
    assert agent.q_value(none, np.zeros((0, 2)), key=key).shape == agent.q_value([], [], key=key).shape == (0,)
    assert agent.act([], key=key).shape == (0, 1, 2)


def test_an_agent_inside_of_a_compiled_function():
    agent, key, x = make_agent(), jax.random.key(0), jnp.ones((2, 3))
    inside = eqx.filter_jit(lambda agent, x: agent.act(x, key=key, num_actions=4))(agent, x)
    np.testing.assert_allclose(inside, agent.act(x, key=key, num_actions=4), rtol=1e-5)


def test_chunks_are_actions_in_a_row():
    """A policy over chunks of 2 actions, horizon 2 of one coordinate: `act` and `decide` give what `act_one` gives as
    one vector, in its order; `sample_returns` takes chunks in both shapes."""
    agent, x, key = dataclasses.replace(make_agent(), horizon=2), jnp.ones((1, 3)), jax.random.key(0)
    settings = Extraction(num_actions=4, num_returns=3)
    actions = agent.act(x, key=key, num_actions=4, num_returns=3)
    vector = act_one(agent, x[0], settings, key=jax.random.split(key, 1)[0])
    assert actions.shape == (1, 2, 1) and abs(float(vector[0] - vector[1])) > 1e-2
    np.testing.assert_allclose(actions.ravel(), vector, rtol=1e-4, atol=1e-5)
    count = jnp.zeros((1, 1), int)
    decided = jax.tree.map(lambda a: a[None], agent).decide(x[None], count, count, settings, keys=key[None])
    vector = act_one(agent, x[0], settings, key=jax.random.fold_in(jax.random.fold_in(key, 0), 0))
    assert decided.shape == (1, 1, 2, 1)
    np.testing.assert_allclose(decided.ravel(), vector, rtol=1e-4, atol=1e-5)
    flat, chunked = (agent.sample_returns(x, actions.reshape(shape), 4, key=key) for shape in ((1, 2), (1, 2, 1)))
    np.testing.assert_array_equal(flat, chunked)


def test_a_sweep_does_not_go_where_a_model_stands(tmp_path: Path):
    """Not even into the run directory of another run: it would put its config.json in the place of that one's."""
    other = tmp_path / "other" / "value"
    other.mkdir(parents=True)
    (other / "model.eqx").write_bytes(b"a model")
    with pytest.raises(UserError, match="is not for sweeps: name another folder"):
        evor_infer.open_run(evor_infer.Args(env="cube-single-play", run_dir=tmp_path / "run", out=str(other)))
