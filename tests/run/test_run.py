"""What training loops share, on a toy: replicas, standardisation, and runs that can stop at any time."""

import contextlib
import csv
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evor_value
from common import checkpoint
from common.args import multiple_of
from common.errors import UserError
from common.networks import Standardizer
from common.replicas import over_replicas, stack_replicas
from common.run import STATE_FILES, Run, Signals, differences, state_to_resume
from tests.helpers import arrays, contents
from tests.processes import ROOT

# --- Parts -------------------------------------------------------------------------------------------------------


def test_standardizer_by_hand():
    """The second coordinate does not vary and the third is ignored: both become zero, whatever comes later."""
    rows = np.array([[1.0, 5.0, 1.0], [3.0, 5.0, 2.0], [5.0, 5.0, 4.0]], np.float32)
    standardizer = Standardizer.of(rows, ignore=(2,))
    np.testing.assert_allclose(standardizer.mean, [3.0, 5.0, 7 / 3], rtol=1e-6)
    np.testing.assert_allclose(standardizer.std, [np.sqrt(8 / 3), np.inf, np.inf], rtol=1e-6)
    assert standardizer.mean.dtype == standardizer.std.dtype == np.float32
    out = standardizer(jnp.array([3.0 + np.sqrt(8 / 3), 7.0, 99.0]))
    np.testing.assert_allclose(out, [1.0, 0.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(standardizer.rows(rows), [standardizer(jnp.asarray(row)) for row in rows], rtol=1e-6)


@pytest.mark.parametrize("unit", [1e-30, 5e-5, 50.0, 1e30])
def test_standardizer_does_not_depend_on_units(unit):
    """The same data in other units, also shifted by a thousand standard deviations, gives the same numbers."""
    x = np.random.default_rng(0).normal(size=(500, 1))
    expected = (x - x.mean()) / x.std()
    for offset, digits in ((0.0, 1e-5), (1e3, 2e-3)):
        rows = (unit * (x + offset)).astype(np.float32)
        np.testing.assert_allclose(Standardizer.of(rows).rows(rows), expected, atol=digits)


def test_standardizer_is_bounded():
    """A joint that moves in one row of 10,000 would be at 100 standard deviations there."""
    rows = np.zeros((10_000, 1), np.float32)
    rows[0] = 1e-6
    standardizer = Standardizer.of(rows)
    assert standardizer.rows(rows)[0] == standardizer(jnp.asarray(rows[0])) == 10.0
    assert standardizer(jnp.array([-1.0])) == -10.0


def test_standardizer_keeps_the_digits_of_many_rows():
    """A million float32 values near 1000: a float32 sum would be off by more than the tolerance."""
    observations = (1000 + 0.01 * np.random.default_rng(0).normal(size=(1_000_000, 1))).astype(np.float32)
    standardizer = Standardizer.of(observations)
    assert float(standardizer.mean[0]) == pytest.approx(observations.mean(dtype=np.float64), abs=1e-4)
    assert float(standardizer.std[0]) == pytest.approx(0.01, rel=0.01)


def test_stacked_replicas_are_the_single_ones():
    keys = jax.random.split(jax.random.key(0), 3)

    def init(key):
        return {"w": jax.random.normal(key, (2, 4)), "step": jnp.zeros((), jnp.int32)}

    stacked = stack_replicas(init, keys)
    for i in range(3):
        for a, b in zip(jax.tree.leaves(init(keys[i])), jax.tree.leaves(stacked), strict=True):
            np.testing.assert_array_equal(a, b[i])


def test_over_replicas_applies_the_function_to_each_replica():
    """Leaves of every argument are split along their first axis: fails if replicas are mixed or reordered."""

    @jax.jit
    def both(trees, scales):
        return over_replicas(lambda tree, scale: {"y": tree["x"] @ tree["m"] * scale, "s": scale}, trees, scales)

    trees = {"x": jnp.arange(12.0).reshape(3, 4), "m": jnp.arange(24.0).reshape(3, 4, 2)}
    scales = jnp.array([1.0, -2.0, 0.5])
    found = both(trees, scales)
    assert found["s"].tolist() == [1.0, -2.0, 0.5]
    for i in range(3):
        np.testing.assert_allclose(found["y"][i], np.asarray(trees["x"][i]) @ np.asarray(trees["m"][i]) * scales[i])


def test_replicas_are_spread_over_devices_and_the_rest_is_copied_to_each():
    """In a process of its own with four virtual devices: 6 are two on each of three, 5 too, one of them a repeat."""
    code = """
import jax, jax.numpy as jnp
from common.replicas import copy_to_devices, fetch, spread
counts = []
for replicas in (6, 4, 5, 3, 1):
    tree = {"a": jnp.arange(2.0 * replicas).reshape(replicas, 2), "b": jnp.arange(replicas)}
    many, shared = spread(tree, replicas), copy_to_devices(jnp.arange(7), replicas)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(fetch(many, replicas))))
    assert many["a"].sharding.device_set == many["b"].sharding.device_set == shared.sharding.device_set
    assert {s.data.shape for s in shared.addressable_shards} == {(7,)}
    assert len({s.data.unsafe_buffer_pointer() for s in shared.addressable_shards}) == 1  # one copy in memory
    counts.append((len(many["a"].sharding.device_set), {s.data.shape[0] for s in many["a"].addressable_shards}))
print(len(jax.devices()), counts)
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 [(3, {2}), (4, {1}), (3, {2}), (3, {1}), (1, {1})]"


def test_replicas_that_were_not_spread_train_too():
    """Three on two devices, in a process of its own."""
    code = """
import jax, jax.numpy as jnp
from common.replicas import chunked
from tests.run.test_run import Args
train_chunk = chunked(lambda args, state, dataset, replica: (state + dataset * replica, {"loss": state}))
state, metrics = train_chunk(Args(), jnp.zeros(3), jnp.asarray(2.0), jnp.arange(3.0))
print(len(jax.devices()), state.tolist(), metrics["loss"].tolist())
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 [0.0, 4.0, 8.0] [0.0, 1.0, 2.0]"


def test_each_core_is_a_device_where_there_are_replicas_for_it():
    code = """
import jax
from common import replicas

def after(cores, number):
    replicas.num_cores = lambda: cores
    jax.config.update("jax_num_cpu_devices", -1)
    replicas.use_cores(number)
    return jax.config.jax_num_cpu_devices

print(after(4, 10), after(4, 3), after(4, 1), after(1, 10))
replicas.num_cores = lambda: 4
jax.config.update("jax_num_cpu_devices", 2)
replicas.use_cores(10)  # a user's own choice stays
print(len(jax.devices()))
"""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "4 3 -1 -1\n2"
    late = "import jax; jax.devices(); from common import replicas; replicas.use_cores(10); print(len(jax.devices()))"
    done = subprocess.run([sys.executable, "-c", late], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


# --- Runs --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Args:
    steps: int = 12
    steps_per_call: int = 2
    save_every: int = 4
    rate: float = 0.1
    resume: bool = False
    overwrite: bool = False
    track: str | None = None
    distributed: bool = False
    run_dir: Path | None = None
    policy_run_dir: Path | None = None

    name = "nowhere"  # of the run
    num_replicas = 2

    @property
    def directory(self) -> Path:
        return self.run_dir


class State(NamedTuple):
    weight: Any
    step: Any


@dataclasses.dataclass(frozen=True)
class ChunkedArgs(Args):
    save_every: Annotated[int, multiple_of("steps_per_call")] = 4


@dataclasses.dataclass(frozen=True)
class Spec:
    replicas: int


class Model(NamedTuple):
    weight: Any

    def spec(self) -> Spec:
        return Spec(len(self.weight))


class Problem:
    """Two tasks without data."""

    pairs, sizes = ((1, 0), (2, 0)), None

    def __init__(self, sha256: str = "abc"):
        self.sha256, self.asked = sha256, []
        self.init_keys = jax.vmap(jax.random.key)(np.arange(2))

    def header(self) -> dict[str, Any]:
        return dict(env="nowhere", data={"sha256": self.sha256})

    def data(self, step: int) -> None:
        self.asked.append(step)


def init(args: Args, sizes: None, *, key: jax.Array) -> State:
    """The weights 0 and 1."""
    return State(jax.random.key_data(key)[-1].astype(jnp.float32), jnp.zeros((), jnp.int32))


def model(state: State) -> Model:
    return Model(state.weight)


def open_run(directory: Path, args: Args, *, sha256: str = "abc") -> Run:
    run = Run(dataclasses.replace(args, run_dir=directory), stage="toy")
    run.start(Problem(sha256), init, model=model)
    return run


def train(
    directory: Path,
    args: Args,
    *,
    until: int | None = None,
    bad_steps: Any = (0, 0),
    signal_at: Any = (),
    evaluate: Callable[[int, State], None] | None = None,
    evaluate_every: int = 4,
) -> tuple[Run, State]:
    """Trains a toy whose weight depends on its whole past; `until` interrupts it, `bad_steps` are those from
    which on the replicas are NaN, `signal_at` is a step and the signal that comes in the chunk after it."""
    with Run(dataclasses.replace(args, run_dir=directory), stage="toy") as run:
        state = run.start(Problem(), init, model=model)
        for step in run.steps():
            assert step == int(state.step[0])
            if evaluate is not None and step > 0 and step % evaluate_every == 0:
                run.on_first_host(functools.partial(evaluate, step, run.fetch(state)))
            if step == until:
                raise KeyboardInterrupt
            if signal_at and step == signal_at[0]:
                signal.raise_signal(signal_at[1])
            state = State(
                state.weight * 0.9 + jnp.sin(state.step.astype(jnp.float32)), state.step + args.steps_per_call
            )
            state = state._replace(weight=jnp.where(state.step == np.array(bad_steps), jnp.nan, state.weight))
            run.record(state, {"loss": state.weight})
        return run, run.fetch(state)


@pytest.mark.parametrize("share", [0.0, 1e9])
@pytest.mark.parametrize("until", [4, 6, 10])
def test_resuming_gives_the_same_files_as_not_stopping(
    tmp_path: Path, until: int, share: float, monkeypatch: pytest.MonkeyPatch
):
    """Interrupted right at a checkpoint, and one chunk behind one; also where every chunk is saved."""
    monkeypatch.setattr("common.run.SAVING_SHARE", share)
    train(tmp_path / "whole", Args())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Args(), until=until)
    saved = checkpoint.read_header(tmp_path / "stopped/toy/train_state.eqx", stage="toy", remedy="")["step"]
    assert saved == (until if share else until // 4 * 4)
    train(tmp_path / "stopped", Args(resume=True))
    assert (tmp_path / "stopped/toy/metrics.csv").read_bytes() == (tmp_path / "whole/toy/metrics.csv").read_bytes()
    for name in ("model.eqx", "train_state.eqx"):
        assert arrays(tmp_path / "stopped/toy" / name) == arrays(tmp_path / "whole/toy" / name)


def test_a_run_leaves_its_files_and_their_provenance(tmp_path: Path):
    run, state = train(tmp_path, Args())
    assert run.directory == tmp_path / "toy"
    states = {"train_state.eqx", "train_state.previous.eqx", ".lock"}
    assert contents(tmp_path / "toy").keys() == {"config.json", "metrics.csv", "model.eqx"} | states
    config = json.loads((tmp_path / "toy/config.json").read_text())
    assert config["args"] == dataclasses.asdict(Args()) | {"run_dir": str(tmp_path)}
    assert (config["stage"], config["env"], config["model"]) == ("toy", "nowhere", {"replicas": 2})
    assert config["versions"]["jax"] == jax.__version__ and config["git_revision"]
    assert re.fullmatch(r"\d+ cores of .+", config.pop("hardware")) and 0 <= config.pop("seconds") < 3600
    for path in (run.model_path, run.state_path):
        assert checkpoint.read_header(path, stage="toy", remedy="") == config | {"step": 12}
    assert state.step.tolist() == [12, 12]


def test_metrics_are_logged_once_per_chunk_and_replica(tmp_path: Path):
    train(tmp_path, Args())
    with open(tmp_path / "toy/metrics.csv", newline="") as file:
        found = [(int(row["step"]), int(row["task"]), float(row["value"])) for row in csv.DictReader(file)]
    weight, expected = np.array([0.0, 1.0]), []
    for step in range(0, 12, 2):
        weight = weight * 0.9 + np.sin(step)
        expected += [(step + 2, 1, weight[0]), (step + 2, 2, weight[1])]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2] for row in found], [row[2] for row in expected], rtol=1e-5)


def test_evaluations_lie_between_the_first_and_the_last_step(tmp_path: Path):
    """The one after the last step is the caller's: it also reports."""
    calls = []
    train(tmp_path, Args(), evaluate=lambda step, state: calls.append((step, int(state.step[0]))), evaluate_every=4)
    assert calls == [(4, 4), (8, 8)]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path):
    with pytest.raises(FloatingPointError, match=r"loss of \(task, seed\) \(2, 0\) is not finite before step 6"):
        train(tmp_path, Args(), bad_steps=(6, 6))
    assert checkpoint.read_header(tmp_path / "toy/model.eqx", stage="toy", remedy="")["step"] == 4
    assert "nan" not in (tmp_path / "toy/metrics.csv").read_text()


@pytest.mark.parametrize("until", [None, 6, 8])
def test_a_replica_that_diverges_is_given_up(tmp_path: Path, until: int | None, capsys: pytest.CaptureFixture):
    """The other one ends with the numbers that it has without it, also when the run was interrupted in between."""
    train(tmp_path / "whole", Args())
    capsys.readouterr()
    if until is not None:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "bad", Args(), until=until, bad_steps=(0, 6))
    run, state = train(tmp_path / "bad", Args(resume=until is not None), bad_steps=(0, 6))
    said = capsys.readouterr().err
    assert "loss of (task, seed) (2, 0) is not finite before step 6: it is given up, the others go on" in said
    assert run.good().tolist() == [0] and run.diverged == [(2, 0)]
    assert checkpoint.read_header(run.model_path, stage="toy", remedy="")["diverged"] == [[2, 0]]
    assert json.loads((tmp_path / "bad/toy/config.json").read_text())["diverged"] == [[2, 0]]
    whole = (tmp_path / "whole/toy/metrics.csv").read_text().splitlines()
    kept = [line for line in whole if ",2,0," not in line or int(line.split(",")[4]) < 6]
    assert (tmp_path / "bad/toy/metrics.csv").read_text().splitlines() == kept
    assert state.weight[0] == train(tmp_path / "again", Args())[1].weight[0]
    loss = [float(line.split(",")[-1]) for line in kept if line.split(",")[2:5] == ["1", "0", "12"]]
    assert run.means() == {"loss": pytest.approx(loss[0])}


def test_resuming_refuses_what_is_not_the_same_run(tmp_path: Path):
    train(tmp_path, Args())
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"--resume: the run in .* has rate 0\.1, not 0\.2: pass the same arguments"):
        open_run(tmp_path, Args(resume=True, rate=0.2))
    with pytest.raises(UserError, match="was trained on other data: start over with --overwrite instead of --resume"):
        open_run(tmp_path, Args(resume=True), sha256="def")
    assert contents(tmp_path) == before


def test_a_resumed_run_counts_its_time_on(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Args(), until=8)
    config = json.loads((tmp_path / "toy/config.json").read_text())
    (tmp_path / "toy/config.json").write_text(json.dumps(config | dict(seconds=5_000.0)))
    train(tmp_path, Args(resume=True))
    assert 5_000 <= json.loads((tmp_path / "toy/config.json").read_text())["seconds"] < 10_000
    train(tmp_path, Args(overwrite=True))
    assert json.loads((tmp_path / "toy/config.json").read_text())["seconds"] < 5_000


def test_a_moved_run_can_be_resumed(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "old", Args(), until=8)
    (tmp_path / "old").rename(tmp_path / "new")
    _, state = train(tmp_path / "new", Args(resume=True))
    assert state.step.tolist() == [12, 12]


def test_tracking_gets_every_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logged, ids = [], []
    track = types.SimpleNamespace(log=lambda values, step: logged.append((step, *values)))
    wandb = types.SimpleNamespace(init=lambda **settings: ids.append(settings["id"]) or track)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path, Args(steps=2, save_every=2, track="wandb"))
    assert logged == [(2, "toy/task1/seed0/loss"), (2, "toy/task2/seed0/loss")]
    train(tmp_path, Args(steps=2, save_every=2, track="wandb", resume=True))
    train(tmp_path, Args(steps=2, save_every=2, track="wandb", overwrite=True))
    assert ids[0] == ids[1] != ids[2]  # one run, gone on with, and a new one


# --- Stopping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_state_gives_way_to_the_one_before_it(
    tmp_path: Path, damage: bytes | None, capsys: pytest.CaptureFixture
):
    """The same result, from one checkpoint earlier, of which one warning tells; and the good one is not pushed out by
    the bad one."""
    train(tmp_path / "whole", Args())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Args(), until=8)
    state, previous = (tmp_path / "stopped/toy" / name for name in STATE_FILES)
    if damage is None:
        state.unlink()
    else:
        state.write_bytes(damage)
    step = checkpoint.read_header(previous, stage="toy", remedy="")["step"]
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Args(resume=True), until=step)  # killed again, before it saved anything
    assert capsys.readouterr().err.count("going on from the one before it") == 1
    assert state_to_resume(tmp_path / "stopped/toy", "toy") == previous
    with pytest.raises(UserError, match="pass --resume"):
        open_run(tmp_path / "stopped", Args())
    train(tmp_path / "stopped", Args(resume=True))
    assert (tmp_path / "stopped/toy/metrics.csv").read_bytes() == (tmp_path / "whole/toy/metrics.csv").read_bytes()
    assert arrays(state) == arrays(tmp_path / "whole/toy/train_state.eqx")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_chunk_that_it_interrupts(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    """Fails if a signal is lost, ends the chunk, or stays noted after the loop."""
    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    before = signal.getsignal(number)
    train(tmp_path / "whole", Args())
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stop:
        train(tmp_path / "stopped", Args(), signal_at=(6, number))
    assert getattr(stop.value, "code", 143) == 143 and signal.getsignal(number) == before
    assert checkpoint.read_header(tmp_path / "stopped/toy/train_state.eqx", stage="toy", remedy="")["step"] == 8
    train(tmp_path / "stopped", Args(resume=True))
    assert (tmp_path / "stopped/toy/metrics.csv").read_bytes() == (tmp_path / "whole/toy/metrics.csv").read_bytes()
    assert arrays(tmp_path / "stopped/toy/model.eqx") == arrays(tmp_path / "whole/toy/model.eqx")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("at", "save_every"), [(8, 4), (8, 12), (12, 4)])
def test_a_signal_while_saving_stops_there(
    tmp_path: Path, number: int, at: int, save_every: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """Before an evaluation that is due at step 8, whether the step is saved anyway or for the evaluation alone, and at
    the end: fails if the evaluation begins, or if the loop ends as though nothing had been."""
    calls, save, args = [], Run._save, Args(save_every=save_every)

    def save_and_signal(run: Run) -> None:
        save(run)
        if run.step == at:
            signal.raise_signal(number)

    def evaluate(step: int, state: State) -> None:
        calls.append(step)

    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", save_and_signal)
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            train(tmp_path, args, evaluate=evaluate)
    assert calls == [step for step in (4, 8) if step < at]
    assert f"saved step {at} of 12" in capfd.readouterr().err
    assert checkpoint.read_header(tmp_path / "toy/train_state.eqx", stage="toy", remedy="")["step"] == at
    train(tmp_path, dataclasses.replace(args, resume=True), evaluate=evaluate)
    assert calls == [4, 8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_an_evaluation_ends_it_at_once(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch):
    """As it would outside of the training, whose handlers are back for the chunk after it: there, it is saved first."""
    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    raised, calls = (KeyboardInterrupt if number == signal.SIGINT else SystemExit), []
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}

    def evaluate(step: int, state: State) -> None:
        assert all(signal.getsignal(n) == handler for n, handler in handlers.items())
        calls.append(step)
        if calls == [4]:
            signal.raise_signal(number)
            pytest.fail("the evaluation went on")

    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as `run_cli` does
    handlers[signal.SIGTERM] = signal.getsignal(signal.SIGTERM)
    try:
        train(tmp_path / "whole", Args())
        for begun, stops in (([4], {}), ([4, 4, 8], dict(signal_at=(8, number)))):
            with pytest.raises(raised):
                train(tmp_path / "run", Args(resume=True), evaluate=evaluate, **stops)
            assert calls == begun
            state = checkpoint.read_header(tmp_path / "run/toy/train_state.eqx", stage="toy", remedy="")
            assert state["step"] == (10 if stops else 4)
    finally:
        signal.signal(signal.SIGTERM, old)
    train(tmp_path / "run", Args(resume=True), evaluate=evaluate)
    assert calls == [4, 4, 8]
    assert (tmp_path / "run/toy/metrics.csv").read_bytes() == (tmp_path / "whole/toy/metrics.csv").read_bytes()
    assert arrays(tmp_path / "run/toy/model.eqx") == arrays(tmp_path / "whole/toy/model.eqx")


def test_a_signal_that_nobody_acted_on_acts_at_the_end():
    """And after one that was noted, a second acts at once, also after an evaluation."""
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
    with pytest.raises(ZeroDivisionError), Signals():
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        with signals.as_outside():
            pass
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second was noted only")


def test_a_signal_is_noted_where_nobody_reads_what_is_said(monkeypatch: pytest.MonkeyPatch):
    def write(*_):
        raise BrokenPipeError

    with pytest.raises(KeyboardInterrupt), Signals() as signals:
        with monkeypatch.context() as unread:
            unread.setattr(os, "write", write)
            signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT


def test_ignored_signals_stay_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As for a background job of a script, which Ctrl-C in the foreground must not stop."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(tmp_path, Args(), signal_at=(6, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_resuming_nothing_starts(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A job that always says --resume starts the first time, also if it was killed between the first two files."""
    train(tmp_path / "whole", Args())
    (tmp_path / "run/toy").mkdir(parents=True)
    (tmp_path / "run/toy/model.eqx").write_bytes(b"of a run that was killed before it saved its state")
    train(tmp_path / "run", Args(resume=True))
    assert "nothing to resume in" in capsys.readouterr().out
    assert arrays(tmp_path / "run/toy/model.eqx") == arrays(tmp_path / "whole/toy/model.eqx")


def test_a_model_alone_is_not_overwritten(tmp_path: Path):
    """One that was copied from elsewhere, say. Fails if the run begins, or removes anything."""
    train(tmp_path, Args())
    for name in STATE_FILES:
        (tmp_path / "toy" / name).unlink()
    before = contents(tmp_path)
    with pytest.raises(UserError, match="a run stands in"):
        train(tmp_path, Args())
    assert contents(tmp_path) == before


def test_a_model_alone_stays_until_the_first_checkpoint_of_a_run_that_says_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its training state is elsewhere, and `--resume` starts anew."""
    train(tmp_path, Args())
    before = (tmp_path / "toy/model.eqx").read_bytes()
    for name in STATE_FILES:
        (tmp_path / "toy" / name).unlink()
    run = open_run(tmp_path, Args(resume=True, rate=0.2))
    assert (tmp_path / "toy/model.eqx").read_bytes() == before and not (tmp_path / "toy/metrics.csv").read_text()[50:]
    del run
    train(tmp_path, Args(resume=True, rate=0.2))
    assert checkpoint.read_header(tmp_path / "toy/model.eqx", stage="toy", remedy="")["args"]["rate"] == 0.2


@pytest.mark.parametrize("missing", ["the package", "the login", "memory"])
def test_an_old_run_stays_until_the_new_one_can_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str):
    """Without Weights & Biases, or without memory for the data, `--overwrite` removes and changes nothing."""
    wandb = types.SimpleNamespace(init=lambda **settings: types.SimpleNamespace(log=lambda values, step: None))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train(tmp_path, Args(track="wandb"))
    before = contents(tmp_path)
    assert "toy/tracking.json" in before
    if missing == "the package":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif missing == "the login":
        wandb.init = mock.Mock(side_effect=RuntimeError)
    else:
        monkeypatch.setattr(Problem, "data", mock.Mock(side_effect=MemoryError))
    with pytest.raises((UserError, RuntimeError, MemoryError)):
        train(tmp_path, Args(overwrite=True, track="wandb"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", [8, 12, None])
def test_the_state_to_resume_is_the_one_under_the_lock(tmp_path: Path, step: int | None):
    """Another process saves, ends or starts over between the first look and the lock. Fails if its newer state is taken
    for a damaged one and removed, or if a state that is gone is gone on from."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Args(), until=8)
    run = Run(dataclasses.replace(Args(resume=True), run_dir=tmp_path), stage="toy")
    if step is None:
        for name in STATE_FILES:
            (tmp_path / "toy" / name).unlink()
    elif step == 12:
        train(tmp_path, Args(resume=True))
    run.start(Problem(), init, model=model)
    assert run.step == (step or 0)
    if step is not None:
        state = tmp_path / "toy" / STATE_FILES[0]
        assert checkpoint.read_header(state, stage="toy", remedy="")["step"] == step


@pytest.mark.parametrize("damage", [None, b"x"])
def test_a_finished_run_mends_its_model(tmp_path: Path, damage: bytes | None):
    path = train(tmp_path, Args())[0].model_path
    before, unchanged = arrays(path), path.read_bytes()
    train(tmp_path, Args(resume=True))
    assert path.read_bytes() == unchanged  # whose SHA-256 later stages remember
    path.unlink() if damage is None else path.write_bytes(damage)
    train(tmp_path, Args(resume=True))
    assert arrays(path) == before


def test_the_model_says_how_the_resumed_run_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`load_agent` extracts as it says. Fails if a finished run keeps the settings that it was trained with."""

    @dataclasses.dataclass(frozen=True)
    class Evaluated(Args):
        candidates: int = 5
        eval_episodes: int = 2
        evaluation_only = ("candidates", "eval_episodes")

    path = train(tmp_path, Evaluated())[0].model_path
    before, parameters = checkpoint.read_header(path, stage="toy", remedy=""), arrays(path)
    monkeypatch.setattr("common.run.git_revision", lambda: "a later one")
    unchanged = path.read_bytes()
    train(tmp_path, Evaluated(resume=True, eval_episodes=9))
    assert path.read_bytes() == unchanged  # a sweep knows it by its SHA-256
    train(tmp_path, Evaluated(resume=True, candidates=7))
    after = checkpoint.read_header(path, stage="toy", remedy="")
    assert after == before | {"args": before["args"] | {"candidates": 7}} and arrays(path) == parameters


def test_a_parameter_that_the_last_update_spoiled(tmp_path: Path):
    """Its losses were finite, and it must not be saved as good."""
    with Run(Args(run_dir=tmp_path), stage="toy") as run:
        state = run.start(Problem(), init, model=model)
        for step in run.steps():
            bad = np.array([False, step == 10])
            state = State(jnp.where(bad, jnp.inf, state.weight), state.step + 2)
            run.record(state, {"loss": jnp.ones(2)})
    assert run.diverged == [(2, 0)]
    assert checkpoint.read_header(run.state_path, stage="toy", remedy="")["diverged"] == [[2, 0]]


@pytest.mark.parametrize("save_every", [4, 12])
def test_an_evaluation_that_was_cut_short_is_done_anew(
    tmp_path: Path, save_every: int, monkeypatch: pytest.MonkeyPatch
):
    """The state is saved before the evaluation, which may take long, and once; so a resumed run begins with it."""
    monkeypatch.setattr("common.run.SAVING_SHARE", 0.0)
    calls, args = [], Args(save_every=save_every)

    def evaluate(step: int, state: State) -> None:
        header = checkpoint.read_header(tmp_path / "toy/train_state.eqx", stage="toy", remedy="")
        assert header["step"] == step == int(state.step[0])
        calls.append(step)
        if calls in ([4], [4, 4, 8]):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, dataclasses.replace(args, resume=True), evaluate=evaluate)
    assert checkpoint.read_header(tmp_path / "toy/train_state.previous.eqx", stage="toy", remedy="")["step"] == 4
    train(tmp_path, dataclasses.replace(args, resume=True), evaluate=evaluate)
    assert calls == [4, 4, 8, 8]


@pytest.mark.parametrize("leave", [ZeroDivisionError, None])
def test_the_loop_that_is_left_early_leaves_nothing_behind(tmp_path: Path, leave: type[Exception] | None):
    """By an error or by `break`: the handlers of signals are those from before, and what was saved is continued."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    train(tmp_path / "whole", Args())
    with contextlib.suppress(ZeroDivisionError), Run(Args(run_dir=tmp_path / "run"), stage="toy") as run:
        run.start(Problem(), init, model=model)
        for _ in run.steps():
            assert all(signal.getsignal(number) != handler for number, handler in handlers.items())
            if leave is None:
                break
            raise leave
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    train(tmp_path / "run", Args(resume=True))
    assert arrays(tmp_path / "run/toy/model.eqx") == arrays(tmp_path / "whole/toy/model.eqx")


def test_the_data_of_the_first_chunk_are_asked_for_before_the_loop(tmp_path: Path):
    """So that they load before the progress bar starts; those of a finished run are not."""
    for args, until, steps in ((Args(), 8, [0]), (Args(resume=True), None, [8]), (Args(resume=True), None, [])):
        problem = Problem()
        with (
            contextlib.suppress(KeyboardInterrupt),
            Run(dataclasses.replace(args, run_dir=tmp_path), stage="toy") as run,
        ):
            state = run.start(problem, init, model=model)
            assert problem.asked == steps
            for step in run.steps():
                if step == until:
                    raise KeyboardInterrupt
                state = state._replace(step=state.step + 2)
                run.record(state, {"loss": state.weight})


def test_what_stands_there_is_looked_at_before_anything_is_read(tmp_path: Path):
    """A state that cannot be continued is said by `Run` itself, before the data are loaded for minutes."""
    train(tmp_path, Args())
    for name in STATE_FILES:
        (tmp_path / "toy" / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"not a checkpoint of this project"):
        Run(Args(run_dir=tmp_path, resume=True), stage="toy")


def test_the_progress_bar_does_not_count_evaluations_as_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """On a clock that runs in the chunks, for 4 seconds each, and in the evaluations: two steps, 2,000 ms each."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("common.run.time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def evaluate(step: int) -> None:
        clock.now += 1_000.0

    with Run(Args(run_dir=tmp_path), stage="toy") as run:
        state = run.start(Problem(), init, model=model)
        for step in run.steps():
            if step == 4:
                run.on_first_host(functools.partial(evaluate, step))
            clock.now += 4.0
            state = state._replace(step=state.step + 2)
            run.record(state, {"loss": state.weight})
    assert set(re.findall(r"ms=([\d.]+)", capsys.readouterr().err)) == {"2000.00"}


def test_a_run_that_is_shorter_than_its_checkpoints_are_apart(tmp_path: Path):
    """`save_every` is then the number of steps, of which it need not be a multiple of `chunk`."""
    args = ChunkedArgs(steps=9, steps_per_call=3, save_every=10, run_dir=tmp_path)
    assert Run(args, stage="toy").save_every == 9
    with pytest.raises(UserError, match="--save-every 10 is no multiple of --steps-per-call 3"):
        Run(dataclasses.replace(args, steps=12), stage="toy")


def test_a_directory_belongs_to_one_process(tmp_path: Path):
    """A second process is refused, also with --overwrite, before it touches anything; when the first ends, it may."""
    code = f"""
        import sys
        from tests.run.test_run import *
        run = open_run(Path({str(tmp_path)!r}), Args())
        print("open", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "open\n"
        before = contents(tmp_path)
        for args in (Args(), Args(overwrite=True), Args(resume=True)):
            with pytest.raises(UserError, match=r"another process is writing to .*: wait for it, or pass another"):
                open_run(tmp_path, args)
        assert contents(tmp_path) == before
        first.kill()
        first.wait()
    finally:
        first.kill()
        first.communicate()
    train(tmp_path, Args())


def test_a_full_disk_leaves_the_last_good_state(tmp_path: Path):
    """Files of a process may not get larger than 20,000 bytes, and a model of 80,000 does not fit: one line says so,
    nothing half written; with more room the run goes on and ends as if nothing had been."""
    train(tmp_path / "whole", Args())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Args(), until=8)
    before = contents(tmp_path / "run")
    code = f"""
        import resource, sys
        from tests.run import test_run
        from common.cli import run_cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        sys.argv = ["script", "--resume"]
        test_run.model = lambda state: test_run.Model(test_run.np.zeros(10_000))
        run_cli(lambda args: test_run.train(test_run.Path({str(tmp_path / "run")!r}), args), test_run.Args)
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in code.splitlines())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    path = tmp_path / "run/toy/model.eqx"
    assert done.stderr.splitlines()[-1] == (
        f"error: {path}: File too large: raise the limit (ulimit -f), then go on with --resume."
    )
    after = contents(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.endswith(".eqx"))
    train(tmp_path / "run", Args(resume=True))
    assert (tmp_path / "run/toy/metrics.csv").read_bytes() == (tmp_path / "whole/toy/metrics.csv").read_bytes()
    assert arrays(tmp_path / "run/toy/train_state.eqx") == arrays(tmp_path / "whole/toy/train_state.eqx")


def test_differences_are_named_with_both_values_and_another_revision_is_said():
    args = evor_value.Args(eval_episodes=10)
    header = {"args": checkpoint.plain(args)}
    others = dataclasses.replace(args, discount=0.9, eval_episodes=20, resume=True, run_dir=Path("elsewhere"))
    assert list(differences(header, args)) == []
    assert list(differences(header, others)) == ["discount 0.99, not 0.9"]
    del header["args"]["clip_margin"]
    assert list(differences(header, args)) == ["no clip_margin, as runs of another revision, which can finish it"]
