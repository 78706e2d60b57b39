"""The list of experiments, and the script that runs what is left of it."""

import contextlib
import shutil
import sys
import time
from pathlib import Path

import psutil
import pytest

import evor_bc
import evor_value
from baselines import qc
from common import checkpoint
from common.data.names import default_run_dir
from common.errors import UserError
from common.files import read_json, sha256, write_csv, write_json
from common.run import Run
from experiments import draw, rows, run, thirty
from tests import processes
from tests.helpers import tiny_dataset


def test_every_experiment_finds_what_it_needs():
    """All flags exist; each reward model, sweep, benchmark and table names run directories that earlier commands fill,
    with the same environment and horizon. Fails if a full-scale command has another number of tasks or seeds than the
    paper."""
    policies, values, sweeps = {}, set(), set()
    for name, commands in run.EXPERIMENTS.items():
        for command in commands:
            module, args = run.parse(command)
            if module == "evor_bc":
                policies[args.run_dir or default_run_dir(args.env, quick=False)] = args
            elif module in run.TRAINED:
                if args.policy_run_dir is None:  # trained on the way, if it is not there
                    policy = policies.setdefault(args.directory, evor_bc.args_for(args))
                else:
                    policy = policies[args.policy_run_dir]
                assert (policy.env, policy.horizon) == (args.env, args.horizon), command
                values.add(args.run_dir)
                if name.startswith("full"):
                    assert (args.seeds, len(args.tasks), args.steps, args.eval_episodes) == (5, 5, 1_000_000, 50)
                    assert policy.seeds == 5
            elif module == "evor_infer":
                assert args.run_dir in values, command
                sweeps.add(args.run_dir / args.out)
            elif module == "experiments.draw":
                assert set(args.runs) <= values | sweeps and set(args.names) <= set(draw.DRAWN), command
            elif module == "benchmarks.base_policy":
                assert set(args.run_dirs) <= set(policies), command
            elif module in ("benchmarks.candidates", "benchmarks.saturation"):
                assert args.run_dir in values, command
    assert len(values) > 50 and len(sweeps) > 20


def test_the_minutes_are_those_of_the_rows():
    """Seconds of every run whose rows have them, by the experiment that trains it."""
    runs = rows.read(rows.RESULTS / "tasks" / "runs.csv").drop_duplicates("run")
    seconds = dict(zip(runs["run"], runs["train_seconds"].astype(float), strict=True))
    minutes = {}
    for name, commands in run.EXPERIMENTS.items():
        parsed = [run.parse(command) for command in commands]
        trained = [seconds.get(str(args.run_dir)) for module, args in parsed if module == "evor_value"]
        if trained and all(trained):
            minutes[name] = round(sum(trained) / 60)
    of_thirty = rows.complete(rows.read(rows.RESULTS / "thirty-tasks" / "runs.csv"), thirty.SETTINGS)
    ours = of_thirty[[method == thirty.DEFAULT for method in thirty.methods_of(of_thirty)]].drop_duplicates("run")
    spent = rows.numbers(ours, real=["policy_seconds", "train_seconds"])
    of_policies = spent.drop_duplicates("env")["policy_seconds"].sum()  # the seeds share it
    minutes["thirty-tasks"] = round((of_policies + spent["train_seconds"].sum()) / 60)
    for name in ("schedule", "capacity"):
        labels = rows.read(rows.RESULTS / name / "episodes.csv").drop_duplicates("label")
        if name == "capacity":
            labels = labels[labels["label"] != "width 512, depth 4"]  # that of `schedule`
        minutes[name] = round(labels["train_seconds"].astype(float).sum() / 60)
    assert minutes == run.MINUTES
    for name in ("thirty-tasks", "tasks", "schedule", "capacity"):
        text = (rows.RESULTS / name / "README.md").read_text().partition("**Minutes.**")[2]
        assert f" {minutes[name]}" in text


def test_the_commands_about_one_environment_are_printed(capsys: pytest.CaptureFixture):
    run.main(run.Args(only=("policies", "thirty-sweeps"), env="cube-single-play", print=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["python", "evor_bc.py", "--env", "cube-single-play"],
        *[["python", "evor_infer.py", "--env", "cube-single-play"]] * 3,
    ]
    assert not run.about(
        "experiments.draw tasks --runs runs/tasks/cube-single-play runs/tasks/cube-double-play", "cube-single-play"
    )
    with pytest.raises(UserError, match="no command is about 'cube' alone"):
        run.main(run.Args(env="cube"))


def test_a_benchmark_is_done_where_its_rows_stand_and_a_table_never(tmp_path: Path):
    out = tmp_path / "rows.csv"
    command = f"benchmarks.base_policy --env cube-double-play --out {out}"
    assert run.progress(command) == "not begun"
    out.touch()
    assert run.progress(command) == "done"
    assert run.progress("experiments.draw tasks --runs runs/a") == "drawn anew"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    dataset = tiny_dataset(tmp_path / "data.npz")
    flags = "--width 8 --depth 2 --batch-size 4 --steps 40 --steps-per-call 10"
    command = f"evor_bc.py --env robot --dataset {dataset} --run-dir {tmp_path / 'run'} {flags}"
    monkeypatch.setattr(run, "EXPERIMENTS", {"toy": [command]})
    return command


def test_what_was_stopped_goes_on_and_what_is_done_is_skipped(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    assert run.progress(command) == "not begun"
    module, args = run.parse(command)
    assert module == "evor_bc"
    with monkeypatch.context() as patch:
        save = Run._save
        patch.setattr(Run, "_save", lambda self: sys.exit(1) if self.step == 40 else save(self))
        with pytest.raises(SystemExit):
            evor_bc.main(args)
    stopped = run.progress(command)
    assert stopped in ("step 10 of 40", "step 20 of 40", "step 30 of 40")
    run.main(run.Args(list=True))
    assert run.progress(command) == stopped
    run.main(run.Args(only=("toy",)))
    assert f"toy: {stopped}: python evor_bc.py" in capfd.readouterr().out
    assert run.progress(command) == "done"
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("ran again"))
    run.main(run.Args())
    assert "toy: done: python evor_bc.py" in capfd.readouterr().out
    other = command.replace("--batch-size 4", "--batch-size 8")
    assert run.progress(other) == "other arguments"
    model = args.run_dir / "bc" / "model.eqx"
    model.write_bytes(model.read_bytes()[:-5])
    assert run.progress(command) == "not begun"


@pytest.mark.slow
def test_a_default_that_the_command_chooses_is_no_other_argument(tmp_path: Path):
    """QC takes N from another flag; what it ran with stands in config.json."""
    dataset = tiny_dataset(tmp_path / "data.npz")
    flags = "--width 8 --depth 2 --batch-size 4 --steps 20 --steps-per-call 10 --eval-episodes 0 --num-next-actions 2"
    command = f"baselines.qc --env robot --dataset {dataset} --run-dir {tmp_path / 'run'} {flags}"
    _, args = run.parse(command)
    qc.main(args)
    assert args.num_actions is None and run.progress(command) == "done"


def test_a_sweep_is_done_where_its_agent_stands(tmp_path: Path):
    command = f"evor_infer.py --env cube-single-play --run-dir {tmp_path} --num-actions 2"
    _, args = run.parse(command)
    assert run.progress(command) == "not begun"
    model = tmp_path / "value" / "model.eqx"
    model.parent.mkdir()
    model.write_bytes(b"an agent")
    config = dict(args=args, policy_sha256="of its base policy", critic_sha256=sha256(model))
    write_json(tmp_path / "infer" / "config.json", config)
    assert run.progress(command) == "done"
    model.write_bytes(b"another agent")
    assert run.progress(command) == "not begun"


@pytest.mark.slow
def test_an_evaluation_of_other_settings_is_not_the_one_that_was_asked_for(tmp_path: Path):
    """Rows of another temperature stand where an evaluation anew was stopped before its end."""
    dataset = tiny_dataset(tmp_path / "data.npz")
    flags = "--width 8 --depth 2 --batch-size 4 --steps 20 --steps-per-call 10"
    flags = f"--env robot --dataset {dataset} --run-dir {tmp_path / 'run'} {flags}"
    evor_bc.main(run.parse(f"evor_bc.py {flags}")[1])
    command = f"evor_value.py {flags} --return-temperature 0.1"
    _, args = run.parse(command)
    evor_value.main(args)
    ((task, seed),) = read_json(tmp_path / "run" / "value" / "config.json")["replicas"]
    row = dict(step=20, task=task, seed=seed, num_actions=args.num_actions, num_returns=args.num_returns)
    row |= dict(return_temperature=0.1, action_temperature=args.action_temperature)
    for changes, number, found in (
        ({}, args.eval_episodes, "done"),
        ({}, args.eval_episodes - 1, "step 20 of 20"),
        (dict(step=10), args.eval_episodes, "step 20 of 20"),
        (dict(num_actions=args.num_actions + 1), args.eval_episodes, "step 20 of 20"),
        (dict(return_temperature=0.03), args.eval_episodes, "step 20 of 20"),
        (dict(action_temperature=0.1), args.eval_episodes, "step 20 of 20"),
        (dict(num_returns=args.num_returns + 1), args.eval_episodes, "step 20 of 20"),
    ):
        write_csv(tmp_path / "run" / "value" / "evaluation.csv", list(row), [row | changes] * number)
        assert run.progress(command) == found, (changes, number)


def test_a_slot_that_is_over_and_a_command_that_fails(
    command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    run.main(run.Args(slot=0.001))
    assert "stopped after 0.001 minutes, at not begun: run this again to go on" in capfd.readouterr().out
    monkeypatch.setattr(run, "EXPERIMENTS", {"toy": [command.replace("data.npz", "missing.npz"), command]})
    with pytest.raises(UserError, match="1 commands failed: see above"):
        run.main(run.Args())
    assert "missing.npz" in capfd.readouterr().err
    assert run.progress(command) == "done", "the others are run all the same"

    def run_one(one: str, slot: float | None) -> bool:
        if "missing" in one:
            raise UserError("no data")
        return False  # its slot was over

    longer = command.replace("--steps 40", "--steps 80")
    monkeypatch.setattr(run, "EXPERIMENTS", {"toy": [command.replace("data.npz", "missing.npz"), longer]})
    monkeypatch.setattr(run, "run", run_one)
    with pytest.raises(UserError, match="1 commands failed"):
        run.main(run.Args(slot=1))
    with pytest.raises(UserError, match="there is no experiment 'x': choose among toy"):
        run.main(run.Args(only=("x",)))


SCRIPT = """
from experiments import draw, rows, run

flags = "--width 8 --depth 2 --batch-size 4 --steps-per-call 100 --steps 2000000"
run.ROOT = run.Path(".").resolve()
run.EXPERIMENTS = {"toy": [f"evor_bc.py --env robot --dataset data.npz --run-dir run {flags}"]}
run.main(run.Args(only=("toy",)))
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_training_does_not_outlive_the_script_that_started_it(tmp_path: Path):
    """Not even where that was killed."""
    tiny_dataset(tmp_path / "data.npz")
    state = tmp_path / "run" / "bc" / "train_state.eqx"
    with processes.start(SCRIPT, tmp_path) as process:
        while process.poll() is None and not state.is_file():
            time.sleep(0.1)
        trainings = psutil.Process(process.pid).children()
        try:
            assert len(trainings) == 1
            process.kill()
            assert processes.all_end(trainings), processes.said(tmp_path)
        finally:
            for training in trainings:  # in a session of its own
                with contextlib.suppress(psutil.NoSuchProcess):
                    training.kill()
    assert checkpoint.complete(state)
