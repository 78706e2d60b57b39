"""Whole runs: resuming, one compile, replicas over devices, and the three stages in a row on real OGBench data."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest

import evor_bc
import evor_infer
import evor_value
from baselines import critics, qc
from common import checkpoint, problem
from common.data.names import validation_path
from common.episodes import Episodes
from common.errors import UserError
from common.evaluation import Evaluation, read_episodes
from common.files import read_csv
from common.metrics import Metrics
from common.problem import Problem, ValueProblem
from common.run import Run
from tests.helpers import arrays, contents, rewrite, tiny_dataset

ROOT = Path(__file__).parents[2]
SMALL = dict(width=16, depth=2, batch_size=16, steps_per_call=10, steps=60, save_every=20)


class Interrupted(Exception):
    """Stands for a kill between two checkpoints."""


def interrupt_at(monkeypatch, step):
    log = Metrics.log

    def interrupted(self, at, *args):
        if at == step:
            raise Interrupted
        log(self, at, *args)

    monkeypatch.setattr(Metrics, "log", interrupted)


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "robot.npz"
    tiny_dataset(path)
    return path


SETTINGS = dict(env="robot", seeds=2, **SMALL)
SHORT = dict(td_target="velocity", discount=0.5, eval_every=20)  # returns are complete after seven steps


class Trained(NamedTuple):
    """Both stages of two seeds; no test changes them."""

    run_dir: Path
    dataset: Path
    programs: int  # of the training step, that stage 2 compiled
    result: list


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    dataset = tiny_dataset(folder / "robot.npz")
    tiny_dataset(validation_path(dataset), seed=1)
    settings = dict(dataset=dataset, run_dir=folder / "run", **SETTINGS)
    evor_bc.main(evor_bc.Args(**settings))
    before = evor_value.train_chunk._cache_size()
    result = evor_value.main(evor_value.Args(**settings, **SHORT))
    return Trained(folder / "run", dataset, evor_value.train_chunk._cache_size() - before, result)


def files(run_dir, stage):
    """What equal runs have alike."""
    return {
        "model.eqx": arrays(run_dir / stage / "model.eqx"),
        "metrics.csv": (run_dir / stage / "metrics.csv").read_bytes(),
    }


def test_resumed_stages_equal_uninterrupted_ones(tmp_path, trained, monkeypatch):
    """Stopped at step 50, resumed from the checkpoint of step 40: the same parameters and metrics.csv, in which
    the predictions are compared with returns at steps 20, 40 (before the stop and after it) and 60, once each."""
    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    parts = tmp_path / "parts"
    for module, stage, extra in ((evor_bc, "bc", {}), (evor_value, "value", SHORT)):
        settings = dict(dataset=trained.dataset, **SETTINGS, **extra)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 50)
            with pytest.raises(Interrupted):
                module.main(module.Args(run_dir=parts, **settings))
        assert json.loads((parts / stage / "train_state.eqx").read_bytes().split(b"\n")[0])["step"] == 40
        module.main(module.Args(run_dir=parts, resume=True, **settings))
        expected, found = files(trained.run_dir, stage), files(parts, stage)
        assert expected["metrics.csv"] == found["metrics.csv"]
        assert expected["model.eqx"] == found["model.eqx"]
    assert found["metrics.csv"].count(b"crps") == found["metrics.csv"].count(b"bias") == 3 * 2


def test_run_directory_of_own_data(trained):
    """One row per seed, step and metric; provenance in config.json; no environment is asked for anything. The training
    step is compiled once."""
    assert trained.result == [] and trained.programs == 1
    directory = trained.run_dir / "value"
    with open(directory / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 3 + 3 * 2 * 2  # three of the training, two of a comparison with returns
    assert {row["seed"] for row in rows} == {"0", "1"} and {row["task"] for row in rows} == {"0"}
    config = json.loads((directory / "config.json").read_text())
    assert config["data"]["source"] == "file" and len(config["data"]["sha256"]) == 64
    assert config["versions"]["jax"] == jax.__version__ and config["args"]["discount"] == 0.5
    agent = evor_infer.load_agent(trained.run_dir, seed=1)
    observations = np.zeros((5, 3), np.float32)
    actions = agent.act(observations, key=jax.random.key(0), num_actions=4, num_returns=2)
    assert actions.shape == (5, 1, 2) and np.abs(actions).max() <= 1.0
    returns = agent.sample_returns(observations, actions[:, 0], 7, key=jax.random.key(0))
    assert returns.shape == (5, 7) and np.isfinite(returns).all()


@pytest.mark.slow
def test_seeds_can_share_one_base_policy(tmp_path, dataset):
    """Seeds 0, 1 and 2 on the policy of seed 1: each with a critic of its own, seed 1 with the one it has alone."""
    settings = dict(env="robot", dataset=dataset, **SMALL)
    evor_bc.main(evor_bc.Args(**settings, run_dir=tmp_path / "bc", seeds=2))
    settings["policy_run_dir"] = tmp_path / "bc"
    evor_value.main(evor_value.Args(**settings, run_dir=tmp_path / "shared", seeds=3, policy_seed=1))
    evor_value.main(evor_value.Args(**settings, run_dir=tmp_path / "alone", first_seed=1))
    shared = [evor_infer.load_agent(tmp_path / "shared", seed=seed) for seed in range(3)]
    alone = evor_infer.load_agent(tmp_path / "alone", seed=1)
    x, a, key = np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32), jax.random.key(0)
    actions = [agent.sample_actions(x, 2, key=key) for agent in (*shared, alone)]
    returns = [agent.sample_returns(x, a, 3, key=key) for agent in (*shared, alone)]
    _, (policies, _) = evor_bc.load(tmp_path / "bc" / "bc" / "model.eqx")
    for agent, of_agent in zip((*shared, alone), actions, strict=True):
        np.testing.assert_array_equal(of_agent, actions[0])
        for mine, both in zip(jax.tree.leaves(agent.policy), jax.tree.leaves(policies), strict=True):
            np.testing.assert_array_equal(mine, both[1])
            assert mine.ndim == 1 or not np.array_equal(mine, both[0])
    np.testing.assert_allclose(returns[1], returns[3], rtol=1e-5)
    assert np.abs(returns[0] - returns[1]).min() > 1e-3 and np.abs(returns[2] - returns[1]).min() > 1e-3


def test_replicas_that_diverged_are_left_out(tmp_path, trained, capsys):
    """The other seed is loaded and acts as it did; the one that diverged is refused, also as a base policy."""
    shutil.copytree(trained.run_dir, tmp_path / "run")
    settings = dict(dataset=trained.dataset, run_dir=tmp_path / "run", **SETTINGS, **SHORT)
    x, act = np.ones((4, 3), np.float32), dict(key=jax.random.key(0), num_actions=4)
    expected = evor_infer.load_agent(tmp_path / "run", seed=1).act(x, **act)
    rewrite(tmp_path / "run" / "value" / "model.eqx", diverged=[[0, 0]])
    _, replicas, _ = evor_infer.load_agents(tmp_path / "run")
    assert replicas == [(0, 1)] and "(task, seed) (0, 0) diverged in training: left out." in capsys.readouterr().err
    np.testing.assert_array_equal(evor_infer.load_agent(tmp_path / "run").act(x, **act), expected)
    with pytest.raises(UserError, match=r"\(0, 0\) diverged in training: train it again with a smaller --learning"):
        evor_infer.load_agent(tmp_path / "run", seed=0)
    rewrite(tmp_path / "run" / "bc" / "model.eqx", diverged=[["", 0]])
    with pytest.raises(UserError, match=r"base policy of seed 0 at .* diverged: use another, with --policy-seed"):
        evor_value.main(evor_value.Args(**settings, overwrite=True))
    evor_value.main(evor_value.Args(**settings, overwrite=True, policy_seed=1))


def test_an_agent_needs_nothing_but_its_own_file(tmp_path, dataset):
    """A reward model from somebody else may name any file of this machine as its base policy: none is opened. Whether
    the base policy is there, was trained anew or is gone, the agent acts as it did."""
    settings = dict(env="robot", dataset=dataset, **SMALL)
    base = evor_bc.Args(**settings, run_dir=tmp_path / "bc")
    args = evor_value.Args(**settings, run_dir=tmp_path / "run", policy_run_dir=tmp_path / "bc")
    evor_bc.main(base)
    evor_value.main(args)
    with open(tmp_path / "run" / "value" / "metrics.csv", newline="") as file:  # no return is complete at 0.99
        assert len(list(csv.DictReader(file))) == 6 * 3
    header, _, _ = evor_infer.load_agents(tmp_path / "run")
    assert header["policy_run_dir"] == str((tmp_path / "bc").resolve())
    x, act = np.ones((4, 3), np.float32), dict(key=jax.random.key(0), num_actions=4)
    expected = evor_infer.load_agent(tmp_path / "run").act(x, **act)

    evor_bc.main(dataclasses.replace(base, overwrite=True, learning_rate=1e-2))
    np.testing.assert_array_equal(evor_infer.load_agent(tmp_path / "run").act(x, **act), expected)
    with pytest.raises(UserError, match=r"--resume: the run in .*run/value had another base policy: start over"):
        evor_value.main(dataclasses.replace(args, resume=True))

    shutil.rmtree(tmp_path / "bc")
    with pytest.raises(UserError, match=r"no base policy at .*bc/bc/model\.eqx: train it with evor_bc\.py"):
        evor_value.main(dataclasses.replace(args, resume=True))
    shutil.copytree(tmp_path / "run" / "value", tmp_path / "sent" / "value")
    rewrite(tmp_path / "sent" / "value" / "model.eqx", policy_run_dir="/dev/stdin", replicas=[[0, 7]])
    np.testing.assert_array_equal(evor_infer.load_agent(tmp_path / "sent", seed=7).act(x, **act), expected)
    with pytest.raises(UserError, match=r"sent/value has no seed 0: it has \[7\]"):
        evor_infer.load_agent(tmp_path / "sent", seed=0)


@pytest.mark.parametrize("script", [evor_bc, evor_value, critics, qc], ids=lambda script: script.__name__)
def test_a_compiled_step_reads_nothing_that_may_differ(tmp_path, dataset, script):
    """Arguments that differ in `unread` fields share a program: fails if a training step reads one of them."""

    class Spied(script.Args):
        def __getattribute__(self, name):
            field = type(self).__dataclass_fields__.get(name)
            assert field is None or field.compare, f"the step reads {name}"
            return super().__getattribute__(name)

        def __post_init__(self):  # no step calls it
            pass

    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", **SMALL | dict(steps=10, save_every=10))
    if script is evor_bc:
        problem = Problem(script.Args(**settings))
    else:
        evor_bc.main(evor_bc.Args(**settings))
        settings["next_action"] = "softmax"
        policy = None if script is qc else evor_bc.load_or_train
        problem = ValueProblem(script.Args(**settings), load_policy=policy)
    state = script.init_state(script.Args(**settings), problem.sizes, key=jax.random.key(0))
    replica = jax.tree.map(lambda x: x[0], problem.replicas)
    jax.eval_shape(functools.partial(script.train_step, Spied(**settings)), state, problem.data(0), replica)


def test_bank_is_reused_only_with_what_it_was_made_of(tmp_path, dataset):
    """The same policy and data: the file stays; another number of actions: another file."""
    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", **SMALL)
    evor_bc.main(evor_bc.Args(**settings))
    args = evor_value.Args(**settings, overwrite=True, num_actions=3, action_temperature=float("inf"))
    evor_value.main(args)
    bank = tmp_path / "r" / "bc" / "bank-4-seeds-0.eqx"
    stamp = bank.stat().st_mtime_ns
    evor_value.main(args)
    assert bank.stat().st_mtime_ns == stamp
    evor_bc.main(evor_bc.Args(**settings | {"steps": 20}, overwrite=True))
    evor_value.main(args)
    assert bank.stat().st_mtime_ns != stamp, "a new policy makes a new bank"
    assert evor_infer.load_agent(tmp_path / "r").settings == args.extraction, "the agent acts as stage 2 evaluated it"
    stamp = bank.stat().st_mtime_ns
    for scale, one_action in ((0.0, True), (1.0, False)):  # lambda = 0: every draw of a state is the same
        scaled = dataclasses.replace(args, noise_scale=scale)
        drawn = np.asarray(ValueProblem(scaled, load_policy=evor_value.load_policy).data(0).bank)
        assert (drawn == drawn[:, :, :1]).all() == one_action
    assert bank.stat().st_mtime_ns == stamp, "each lambda has a bank of its own"


def test_an_agent_takes_no_settings_of_another_unit_and_no_senseless_ones(tmp_path, dataset):
    """Revisions that knew no lambda measured tau_Q otherwise; a file may come from a stranger."""
    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", **SMALL)
    evor_value.main(evor_value.Args(**settings, policy_steps=20, num_actions=7))
    path = tmp_path / "r" / "value" / "model.eqx"
    trained = checkpoint.read_header(path, stage="value", remedy="")["args"]
    assert evor_infer.load_agent(tmp_path / "r").settings.num_actions == 7
    rewrite(path, args={name: value for name, value in trained.items() if name != "noise_scale"})
    assert evor_infer.load_agent(tmp_path / "r").settings == evor_infer.Extraction()
    for change in (dict(num_actions=10**10), dict(flow_steps=10**10), dict(noise_scale="inf")):
        rewrite(path, args=trained | change)
        with pytest.raises(UserError, match="is whole, and not of this revision"):
            evor_infer.load_agent(tmp_path / "r")


@pytest.mark.slow
def test_the_bank_is_drawn_anew_when_asked(tmp_path, dataset, monkeypatch):
    """60 steps with a new bank each 20: draws 0, 1 and 2, with other actions, and only the first is kept; a run resumed
    at step 40 goes on with draw 2 and ends as the uninterrupted one did."""
    settings = dict(env="robot", dataset=dataset, redraw_bank=20, **SMALL)
    evor_bc.main(evor_bc.Args(env="robot", dataset=dataset, run_dir=tmp_path / "r", **SMALL))
    banks = []

    def spy(*args, **keywords):
        banks.append((keywords["draw"], make_bank(*args, **keywords)))
        return banks[-1][1]

    make_bank = problem.make_bank
    monkeypatch.setattr(problem, "make_bank", spy)
    evor_value.main(evor_value.Args(run_dir=tmp_path / "r", **settings))
    assert [draw for draw, _ in banks] == [0, 1, 2]
    assert not np.array_equal(banks[0][1], banks[1][1]) and not np.array_equal(banks[1][1], banks[2][1])
    assert [path.name for path in (tmp_path / "r" / "bc").glob("bank-*")] == ["bank-4-seeds-0.eqx"]
    whole = files(tmp_path / "r", "value")
    evor_value.main(evor_value.Args(run_dir=tmp_path / "r", overwrite=True, **settings | {"redraw_bank": 0}))
    never, often = (
        text.decode().splitlines() for text in (files(tmp_path / "r", "value")["metrics.csv"], whole["metrics.csv"])
    )
    rows = 1 + 2 * len({line.split(",")[5] for line in never[1:]})  # the header, and two chunks of 10 steps
    assert never[:rows] == often[:rows], "the same until the first new bank"
    assert never[rows:] != often[rows:], "and not after it"

    interrupt_at(monkeypatch, 50)
    with pytest.raises(Interrupted):
        evor_value.main(evor_value.Args(run_dir=tmp_path / "r", overwrite=True, **settings))
    monkeypatch.undo()
    evor_value.main(evor_value.Args(run_dir=tmp_path / "r", resume=True, **settings))
    parts = files(tmp_path / "r", "value")
    assert parts["model.eqx"] == whole["model.eqx"]
    assert parts["metrics.csv"] == whole["metrics.csv"]


def test_ignored_coordinates_of_the_observation_change_no_action(tmp_path, dataset):
    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", ignore_observations=(1,), **SMALL)
    evor_bc.main(evor_bc.Args(**settings))
    evor_value.main(evor_value.Args(**settings))
    agent = evor_infer.load_agent(tmp_path / "r")
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    other = np.stack([x[:, 0], x[:, 1] + 5.0, x[:, 2]], axis=1)
    act = lambda observations: np.asarray(agent.act(observations, key=jax.random.key(0), num_actions=4))  # noqa: E731
    np.testing.assert_array_equal(act(other), act(x))
    assert not np.array_equal(act(other + 0.5), act(x))


def test_a_finished_run_is_not_overwritten_by_accident(tmp_path, dataset):
    """Only --overwrite starts over, and then nothing of the earlier run is left."""
    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", **SMALL)
    evor_bc.main(evor_bc.Args(**settings))
    before = contents(tmp_path / "r")
    with pytest.raises(UserError, match="--resume, --overwrite"):
        evor_bc.main(evor_bc.Args(**settings))
    assert contents(tmp_path / "r") == before
    (tmp_path / "r" / "bc" / "old.csv").write_text("left over")
    evor_bc.main(evor_bc.Args(**settings, overwrite=True))
    assert set(contents(tmp_path / "r")) == set(before)


def test_the_main_job_trains_finishes_or_refuses_the_base_policy(tmp_path, dataset, monkeypatch):
    """None: train it. Interrupted: continue it. Of other data: refuse it."""
    tiny = {field: SMALL[field] for field in ("width", "depth", "batch_size", "steps_per_call", "steps", "save_every")}
    monkeypatch.setitem(evor_bc.PRESETS, "quick", tiny)
    settings = dict(env="robot", dataset=dataset, run_dir=tmp_path / "r", quick=True, num_next_actions=2, **SMALL)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 50)
        with pytest.raises(Interrupted):
            evor_value.main(evor_value.Args(**settings))
    evor_value.main(evor_value.Args(**settings))
    header = json.loads((tmp_path / "r" / "bc" / "model.eqx").read_bytes().split(b"\n")[0])
    assert header["step"] == 60
    tiny_dataset(dataset, seed=1)
    with pytest.raises(UserError, match="trained on other data"):
        evor_value.main(evor_value.Args(**settings, overwrite=True))
    with pytest.raises(UserError, match="no base policy"):
        evor_value.main(evor_value.Args(**settings, policy_run_dir=tmp_path / "elsewhere", overwrite=True))


def test_the_softmax_backup_trains_with_the_return_temperature():
    assert "return_temperature" in evor_value.Args().evaluation_only
    assert "return_temperature" not in evor_value.Args(next_action="softmax").evaluation_only


@pytest.mark.parametrize("backup, without_training", [("base", False), ("softmax", False), ("dataset", True)])
def test_lambda_is_of_the_training_where_there_is_a_bank(backup: str, without_training: bool):
    assert ("noise_scale" in evor_value.Args(next_action=backup).evaluation_only) == without_training


@pytest.mark.slow
def test_replicas_equal_runs_of_their_own_on_any_number_of_devices(tmp_path, dataset):
    """Five seeds of both stages: on three of four virtual devices (one of the six places holds a repeat), on one, and
    one of the seeds alone. The metrics of every step agree up to the order of float additions, and the work is really
    spread."""
    settings = dict(env="robot", dataset=dataset, **SMALL)
    code = f"""
import jax, evor_bc, evor_value
from pathlib import Path, PosixPath
from common import problem, run
seen = []
spread = run.spread
def spy(tree, replicas):
    tree = spread(tree, replicas)
    seen.append((type(tree).__name__, len(jax.tree.leaves(tree)[0].sharding.device_set)))
    return tree
problem.spread = run.spread = spy
for stage in (evor_bc, evor_value):
    stage.main(stage.Args(run_dir=Path("four"), seeds=5, **{settings!r}))
print("devices", seen)
"""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert f"devices {[('Replica', 3), ('TrainState', 3)] * 2}" in done.stdout
    for stage in (evor_bc, evor_value):
        stage.main(stage.Args(run_dir=tmp_path / "one", seeds=5, **settings))
        stage.main(stage.Args(run_dir=tmp_path / "alone", seeds=1, first_seed=3, **settings))

    def metrics(run: str, stage: str, seeds: str) -> list[float]:
        with open(tmp_path / run / stage / "metrics.csv") as file:
            return [float(row["value"]) for row in csv.DictReader(file) if row["seed"] in seeds]

    for stage in ("bc", "value"):
        one = metrics("one", stage, "01234")
        assert len(set(one)) == len(one) > 50, "replicas differ"
        np.testing.assert_allclose(metrics("four", stage, "01234"), one, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(metrics("alone", stage, "3"), metrics("one", stage, "3"), rtol=1e-3, atol=1e-5)


@contextlib.contextmanager
def two_processes(code: str, directory: Path) -> Iterator[list[subprocess.Popen]]:
    """Runs `code` twice, as the two processes of one program (`jax.distributed`)."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=directory,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_two_processes_train_together_as_one_does(tmp_path, dataset):
    """Both stages with three seeds on two processes of one device each (one place holds a repeat), and resumed at the
    end, with a model that somebody lost: the numbers of one process with one device. Only the first process evaluates
    and fills the run directory."""
    settings = dict(env="robot", dataset=dataset, seeds=3, **SMALL)
    code = f"""
import jax, evor_bc, evor_value
from pathlib import Path, PosixPath
from common.run import Run
evaluated, steps = [], Run.steps
def steps_and_evaluations(run):
    for step in steps(run):
        if step in (20, 40):
            run.on_first_host(lambda: evaluated.append(step))
        yield step
Run.steps = steps_and_evaluations
for stage in (evor_bc, evor_value):
    stage.main(stage.Args(run_dir=Path("two"), distributed=True, **{settings!r}))
    path = Path("two", stage.__name__.removeprefix("evor_"), "model.eqx")
    if jax.process_index() == 0:
        path.rename(path.with_name("lost"))
    stage.main(stage.Args(run_dir=Path("two"), distributed=True, resume=True, **{settings!r}))
print("process", jax.process_index(), "devices", len(jax.devices()), "evaluated", evaluated)
"""
    with two_processes(code, tmp_path) as processes:
        for i, process in enumerate(processes):
            output, _ = process.communicate(timeout=600)
            assert process.returncode == 0, output
            assert f"process {i} devices 2 evaluated {[20, 40, 20, 40] if i == 0 else []}" in output
    for stage in (evor_bc, evor_value):
        stage.main(stage.Args(run_dir=tmp_path / "one", **settings))
    for stage in ("bc", "value"):
        with (
            open(tmp_path / "one" / stage / "metrics.csv") as one,
            open(tmp_path / "two" / stage / "metrics.csv") as two,
        ):
            a, b = ([float(row["value"]) for row in csv.DictReader(file)] for file in (one, two))
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)
        (tmp_path / "two" / stage / "lost").rename(tmp_path / f"lost-{stage}")
        assert arrays(tmp_path / f"lost-{stage}") == arrays(tmp_path / "two" / stage / "model.eqx")
    names = {path.name for path in (tmp_path / "two").rglob("*") if path.is_file()}
    assert names == {path.name for path in (tmp_path / "one").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_and_saves_both(tmp_path, dataset):
    """The second one is stopped at step 20, then the first in an evaluation at step 40. Fails if a signal is lost, as
    JAX's own handler loses it, if one process goes on or waits for the other, or if the resumed run's numbers differ
    from those of one process that was never stopped by more than rounding."""
    settings = dict(env="robot", dataset=dataset, seeds=2, **SMALL | dict(save_every=60))
    code = f"""
import os, signal, sys, evor_bc
from common.cli import run_cli
from common.metrics import Metrics
from common.run import Run
from pathlib import Path, PosixPath
attempt, log, steps = int(os.environ["ATTEMPT"]), Metrics.log, Run.steps
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
def log_and_stop(self, step, *rest):
    log(self, step, *rest)
    if step == 20 and os.environ["JAX_PROCESS_ID"] == "1":
        stop()
def steps_and_evaluations(run):
    for step in steps(run):
        if step == 40:
            run.on_first_host(lambda: attempt == 1 and stop())
        yield step
Metrics.log, Run.steps = log_and_stop, steps_and_evaluations
args = evor_bc.Args(run_dir=Path("two"), distributed=True, resume=attempt > 0, **{settings!r})
sys.argv = ["evor_bc.py"]
run_cli(lambda _: evor_bc.main(args), evor_bc.Args)
"""
    for attempt, (status, step) in enumerate(((143, 20), (143, 40), (0, 60))):
        with mock.patch.dict(os.environ, ATTEMPT=str(attempt)), two_processes(code, tmp_path) as processes:
            outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert [process.returncode for process in processes] == [status] * 2, outputs
        header = checkpoint.read_header(tmp_path / "two" / "bc" / "train_state.eqx", stage="bc", remedy="")
        assert header["step"] == step and not any("Traceback" in output for output in outputs), outputs
        saved = f"SIGTERM: saved step {step} of 60 in two/bc/train_state.eqx; --resume goes on."
        assert [saved in output for output in outputs] == [status > 0, False], outputs
    evor_bc.main(evor_bc.Args(run_dir=tmp_path / "one", **settings))
    one, two = (
        [float(row["value"]) for row in read_csv(tmp_path / name / "bc" / "metrics.csv")] for name in ("one", "two")
    )
    assert len(one) == 6 * 2 * 2
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-5)


class OneStep(Episodes):
    """Episodes of one step, from observations that are known, solved where the action is small."""

    def __init__(self, gym_ids, *, num_episodes, horizon, settings):
        self.shape, self.horizon = (len(gym_ids), num_episodes), horizon

    def close(self):
        pass

    def run(self, act, desc):
        _, episode = np.indices(self.shape)
        observations = (np.ones((*self.shape, 2)) * (1 + episode[..., None])).astype(np.float32)
        chunks = np.asarray(act(observations, episode, np.zeros(self.shape, int)))
        assert chunks.shape == (*self.shape, self.horizon, 2)
        return [
            dict(replica=r, episode=e, length=1, total=float(chunks[r, e].sum()), probe=0.0)
            | dict(success=float(np.abs(chunks[r, e]).max() < 0.5))
            for r, e in np.ndindex(self.shape)
        ]


@pytest.fixture
def maze(tmp_path, monkeypatch):
    """Arguments of a training with evaluations at steps 20, 40 and 60 (the end), of two seeds."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("common.evaluation.Episodes", OneStep)
    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    settings = dict(env="pointmaze-medium-navigate", episodes=2, seeds=2, **SMALL)
    evor_bc.main(evor_bc.Args(**settings, run_dir=tmp_path / "bc"))
    return evor_value.Args(
        **settings, policy_run_dir=tmp_path / "bc", num_next_actions=2, eval_every=20, eval_episodes=3, num_actions=2,
        num_returns=2,
    )  # fmt: skip


def stripped(rows):
    """Rows of `evaluation.csv`: what was evaluated when."""
    return sorted({(row["step"], row["seed"], row["num_actions"], row["num_returns"]) for row in rows})


@pytest.mark.slow
def test_evaluations_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path, maze, monkeypatch):
    """Stopped in the chunk after the evaluation of step 40, and in the middle of that: once more from there, each row
    once. Of a run that is complete only the evaluation is done again, with other settings if these are given."""
    whole, parts = (dataclasses.replace(maze, run_dir=tmp_path / name) for name in ("whole", "parts"))
    summary = evor_value.main(whole)
    path = tmp_path / "whole" / "value" / "evaluation.csv"
    rows = read_episodes(path)
    both = [(seed, number, 2) for seed in (0, 1) for number in (1, 2)]
    every = [(step, seed, 2, 2) for step in (20, 40) for seed in (0, 1)] + [(60, *rest) for rest in both]
    assert stripped(rows) == every and len(rows) == 3 * len(every)
    assert {(row["task"], row["num_actions"], row["episodes"]) for row in summary} == {(1, 1, 6), (1, 2, 6)}

    play, calls = OneStep.run, []

    def play_and_stop(self, act, desc):
        calls.append(desc)
        played = play(self, act, desc)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return played

    with monkeypatch.context() as patch:
        patch.setattr(OneStep, "run", play_and_stop)
        with pytest.raises(KeyboardInterrupt):
            evor_value.main(parts)
        assert stripped(read_episodes(tmp_path / "parts" / "value" / "evaluation.csv")) == every[:2]
        interrupt_at(patch, 50)
        with pytest.raises(Interrupted):
            evor_value.main(dataclasses.replace(parts, resume=True))
    assert len(calls) == 3 and stripped(read_episodes(tmp_path / "parts" / "value" / "evaluation.csv")) == every[:4]
    evor_value.main(dataclasses.replace(parts, resume=True))
    assert (tmp_path / "parts" / "value" / "evaluation.csv").read_bytes() == path.read_bytes()
    assert files(tmp_path / "parts", "value") == files(tmp_path / "whole", "value")

    before, parameters = contents(tmp_path / "whole" / "value"), arrays(path.with_name("model.eqx"))
    assert evor_value.main(dataclasses.replace(whole, resume=True)) == summary
    after = contents(tmp_path / "whole" / "value")
    same = ("evaluation.csv", "metrics.csv", "model.eqx", "train_state.eqx", "train_state.previous.eqx")
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    evor_value.main(dataclasses.replace(whole, resume=True, num_returns=3))
    rows = read_episodes(path)
    assert stripped(rows) == [(60, seed, number, 3) for seed in (0, 1) for number in (1, 2)]
    assert len(rows) == 3 * 4 and arrays(path.with_name("model.eqx")) == parameters
    assert json.loads((tmp_path / "whole" / "value" / "config.json").read_text())["args"]["num_returns"] == 3


@pytest.mark.slow
def test_a_replica_that_diverges_is_not_evaluated(tmp_path, maze, monkeypatch, capsys):
    """Seed 1, from step 30 on: the other seed is evaluated with the numbers that it has without it, also by a run that
    is resumed."""
    whole, bad = (dataclasses.replace(maze, run_dir=tmp_path / name) for name in ("whole", "bad"))
    evor_value.main(whole)
    train_chunk = evor_value.train_chunk

    def spoil(args, state, *rest):
        state, metrics = train_chunk(args, state, *rest)
        return state, metrics | dict(loss=metrics["loss"].at[1].set(np.nan)) if state.step[0] == 30 else metrics

    with monkeypatch.context() as patch:
        patch.setattr(evor_value, "train_chunk", spoil)
        interrupt_at(patch, 50)
        with pytest.raises(Interrupted):
            evor_value.main(bad)
    capsys.readouterr()
    summary = evor_value.main(dataclasses.replace(bad, resume=True))
    printed = capsys.readouterr().out
    assert "diverged and left out, (task, seed): (1, 1)" in printed
    assert {row["episodes"] for row in summary} == {3}
    rows, expected = (read_episodes(tmp_path / name / "value" / "evaluation.csv") for name in ("bad", "whole"))
    assert rows == [row for row in expected if row["seed"] == 0 or row["step"] == 20]
    for name in ("loss", "success"):
        logged, unspoiled = (
            [row for row in read_csv(tmp_path / run / "value" / "metrics.csv") if row["metric"] == name]
            for run in ("bad", "whole")
        )
        assert logged == [row for row in unspoiled if row["seed"] == "0" or int(row["step"]) < 30]
    header, pairs, _ = evor_infer.load_agents(tmp_path / "bad")
    assert pairs == [(1, 0)] and header["diverged"] == [[1, 1]]


@pytest.mark.parametrize(
    ("changes", "nowhere", "held_out", "due"),
    [
        (dict(), False, False, [20, 40]),
        (dict(), True, False, []),
        (dict(), True, True, [20, 40]),
        (dict(eval_episodes=0), False, False, []),
        (dict(eval_episodes=0), False, True, [20, 40]),
        (dict(eval_every=0), False, True, []),
        (dict(eval_every=60), False, True, []),
        (dict(eval_every=30), False, True, [30]),
    ],
)
def test_evaluations_lie_between_the_first_and_the_last_step(tmp_path, changes, nowhere, held_out, due):
    """The one after the last step also reports. None is made where there is nothing to evaluate."""
    args = evor_value.Args(**dict(steps_per_call=10, steps=60, eval_every=20) | changes)
    run = mock.Mock(spec=Run, directory=tmp_path, resume_path=None)
    held_out = "some" if held_out else None
    data = mock.Mock(spec=problem.ValueProblem, gym_ids=[None if nowhere else "Id-v0"], validation=held_out)
    evaluation = Evaluation(args, data, run)
    assert [step for step in range(0, 70, 10) if evaluation.is_due(step)] == due


@pytest.mark.slow
def test_the_main_job_on_collected_data_with_chunks(tmp_path, monkeypatch, capsys):
    """Everything from nothing, offline: collection, base policy, reward model, evaluation, figures, then a sweep."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = SMALL | dict(steps=20, save_every=20)
    bc = evor_bc.Args(env="cube-single-play", episodes=2, horizon=5, **settings)
    evor_bc.main(bc)
    args = evor_value.Args(
        env="cube-single-play", episodes=2, horizon=5, tasks=(1, 2), eval_every=10, eval_episodes=2, num_actions=2,
        num_returns=2, next_action="softmax", critic="trunk", **settings | {"depth": 3},
    )  # fmt: skip
    summary = evor_value.main(args)
    printed = capsys.readouterr().out
    assert "COLLECTED HERE" in printed and "base policy alone" in printed and "source: collected" in printed
    assert {(row["task"], row["num_actions"]) for row in summary} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    run = tmp_path / "runs" / "cube-single-play"
    for name in ("evaluation.csv", "calibration.csv", "training.png", "calibration.png", "evaluation.png"):
        assert (run / "value" / name).stat().st_size > 0
    with open(run / "value" / "evaluation.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 + 2 * 2 * 2, "two tasks x two episodes at step 10, twice that at the end"
    assert {row["length"] for row in rows} <= {str(n) for n in range(1, 201)}
    with open(run / "value" / "metrics.csv", newline="") as file:
        logged = {(r["metric"], r["step"], r["task"]): float(r["value"]) for r in csv.DictReader(file)}
    with open(run / "value" / "calibration.csv", newline="") as file:
        last = {(r["metric"], "20", r["task"]): float(r["value"]) for r in csv.DictReader(file)}
    for metric in ("bias", "crps"):
        for task in ("1", "2"):
            assert logged[metric, "20", task] == last[metric, "20", task] != logged[metric, "10", task]
    sweep = evor_infer.Args(
        env="cube-single-play", tasks=(2,), num_actions=(1, 2), num_returns=(2,), return_temperature=(0.1, 0.0),
        eval_episodes=2,
    )  # fmt: skip
    (run / "infer").mkdir()
    lock = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", lock, str(run / "infer" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"another process is writing to .*: wait for it, or pass another --out"):
            evor_infer.main(sweep)
        other.kill()
    swept = evor_infer.main(sweep)
    assert len(swept) == 4 and (run / "infer" / "sweep.png").stat().st_size > 0
    base = {row["success"] for row in swept if row["num_actions"] == 1}
    assert len(base) == 1, "the base policy does not depend on the temperature"

    # The same model, evaluated with another number of actions: no row of the earlier settings stays.
    parameters = arrays(run / "value" / "model.eqx")
    evor_value.main(dataclasses.replace(args, resume=True, num_actions=3))
    rows = read_episodes(run / "value" / "evaluation.csv")
    assert sorted({(row["step"], row["num_actions"]) for row in rows}) == [(20, 1), (20, 3)]
    assert json.loads((run / "value" / "config.json").read_text())["args"]["num_actions"] == 3
    assert arrays(run / "value" / "model.eqx") == parameters
    assert evor_infer.load_agent(run).settings.num_actions == 3
    with pytest.raises(UserError, match=r"has return_temperature 0\.3, not 0\.5"):  # the softmax backup trains with it
        evor_value.main(dataclasses.replace(args, resume=True, return_temperature=0.5))
