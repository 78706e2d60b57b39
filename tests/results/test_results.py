"""Tables and figures: what shares a line, what shares no table, what a line says, and what drawing overwrites."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import evor_value
from baselines import critics, qc
from benchmarks import candidates, speed
from benchmarks import saturation as benchmark
from common import checkpoint
from common.errors import UserError
from common.files import read_csv, sha256, write_csv
from common.networks import CriticSpec, PolicySpec
from evor_infer import AgentSpec
from experiments import check, draw, gather, relative, rows, saturation, sweeps, tasks, thirty

ROOT = Path(__file__).parents[2]


def make_run(path: Path, args: Any, *, solved: int, policy: str = "ab", bc_steps: int = 70, task: int = 2) -> Path:
    """A finished run of two episodes with one action, none solved, and ten with the best, `solved` of them solved."""
    base = path.parent / f"{path.name}-base"
    for folder in (path / "value", base / "bc"):
        folder.mkdir(parents=True)
    (base / "bc" / "config.json").write_text(json.dumps(dict(args=dict(steps=bc_steps))))
    seed = args.first_seed
    sizes = dict(observation=37, action=5 * args.horizon, width=args.width, depth=args.depth)
    critic = CriticSpec(**sizes, kind=args.critic, outputs=getattr(args, "outputs", 1))
    spec = AgentSpec(PolicySpec(**sizes), critic, args.horizon, 115)
    joint = getattr(args, "policy", "frozen") == "joint"
    config = dict(
        env="cube-double-play", horizon=args.horizon, seeds=[seed], model=checkpoint.plain(spec),
        return_axis=args.axis_kind, policy_run_dir=None if joint else str(base), policy_sha256=policy,
        args=checkpoint.plain(args),
        data=dict(name="d", source="collected", sha256="cd"), versions=dict(jax="1"), git_revision="ef",
        replicas=[[task, seed]],
    )  # fmt: skip
    (path / "value" / "config.json").write_text(json.dumps(config))
    checkpoint.save(path / "value" / "model.eqx", config | dict(stage="value", step=args.steps), ())
    rows = [
        dict(env="cube-double-play", data_source="collected", step=args.steps, task=task, seed=seed, num_actions=n,
             num_returns=args.num_returns, episode=i, success=float(n > 1 and i < solved), length=100, total=-50.0)
        for n in (1, args.num_actions) for i in range(2 if n == 1 else 10)
    ]  # fmt: skip
    write_csv(path / "value" / "evaluation.csv", list(rows[0]), rows)
    numbers = dict(mean_predicted=-10.0 - seed, mean_observed=-12.0, correlation=0.5, crps=3.0)
    numbers["below_0.5"] = 0.4
    calibration = [dict(task=task, seed=seed, metric=metric, value=value) for metric, value in numbers.items()]
    write_csv(path / "value" / "calibration.csv", list(calibration[0]), calibration)
    return path


def test_numbers_without_the_seeds_that_diverged_make_no_row(tmp_path: Path):
    run = make_run(tmp_path / "run", evor_value.Args(horizon=5, width=64), solved=8)
    gather.gather(run)
    config = json.loads((run / "value" / "config.json").read_text())
    (run / "value" / "config.json").write_text(json.dumps(config | dict(diverged=[[2, 0]])))
    with pytest.raises(UserError, match=r"run: \(task, seed\) \[\[2, 0\]\] diverged"):
        gather.gather(run)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs; the results go to its `results/`, what is not stored to `tables/`."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(rows, "TABLES", tmp_path / "tables")
    return tmp_path


def stored(name: str, *runs: Path, append: bool = False) -> str:
    """Draws a table and stores it with its rows; returns the table."""
    return draw.draw(name, draw.Args(runs=runs, append=append, update=True))


def test_seeds_share_a_line_and_settings_do_not(here: Path):
    runs = [
        make_run(here / "a", evor_value.Args(critic="mlp", horizon=5, width=64), solved=8),
        make_run(here / "elsewhere" / "a", evor_value.Args(critic="mlp", horizon=5, width=64, first_seed=1), solved=4),
        make_run(here / "b", critics.Args(critic="c51", horizon=5, width=64, next_action="softmax"), solved=1),
        make_run(here / "c", qc.Args(horizon=1, num_actions=32, policy="frozen"), solved=0, policy="other"),
        make_run(here / "d", qc.Args(horizon=1, num_actions=32), solved=0, policy=""),
        make_run(here / "e", evor_value.Args(critic="mlp", horizon=5, width=64, next_action="dataset"), solved=3),
        make_run(
            here / "f",
            critics.Args(critic="c51", horizon=5, width=64, next_action="softmax", backup_temperature=0.02),
            solved=2,
        ),
    ]
    timed = dict.fromkeys(speed.FIELDS, "")
    names = ("shared-noise, mlp, base", "c51, best of 4")
    cases = [timed | dict(case=f"{name}, horizon 5", ms=7.0, peak_share=0.5) for name in names]
    cases += [timed | dict(case=f"QC, {p} policy, best of 32, horizon 1", ms=9, peak_share=0.25)
              for p in ("joint", "frozen")]  # fmt: skip
    write_csv(here / "results" / "baselines" / "speed.csv", speed.FIELDS, cases)
    text = stored("backups", *runs)  # which has the times of `baselines`
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("| `")]) == 6
    # (37 + 25 + 2 + 1) 64 of the first layer, three more, the output, four times LayerNorm's 128
    parameters = 65 * 64 + 3 * 65 * 64 + 65 + 4 * 128
    assert (
        f"| `shared-noise, mlp` | base | 5 | 32 | **60%** [30%, 90%] | 80%, 40% | 0% [0%, 49%] | {parameters:,} |"
        in (text)
    )
    assert "| 7.0 | 50% | -10.5 / -12.0 | 0.50 | 3.0 |" in text
    assert "| `c51` | best of 4 | 5 | 32 | **10%**" in text and "| `QC, frozen policy` | best of 32 | 1 | 32 |" in text
    assert "base policy per horizon (70 steps)" in text
    # Lines of a method stand together, wherever its runs were named; what costs the same has one timing.
    assert [line.split(" |")[:2] for line in lines if line.startswith("| `")][:4] == [
        ["| `shared-noise, mlp`", " base"], ["| `shared-noise, mlp`", " dataset"], ["| `c51`", " best of 4"],
        ["| `c51`", " softmax of 4, temperature 0.02"],
    ]  # fmt: skip
    assert text.count("| 7.0 | 50% |") == 4
    assert len(read_csv(here / "results" / "backups" / "episodes.csv")) == 7 * 12
    write_csv(here / "tables" / "baselines" / "speed.csv", speed.FIELDS, cases[1:])
    assert stored("backups") == text
    with pytest.raises(UserError, match="no case 'shared-noise, mlp, base, horizon 5' was timed"):
        draw.draw("backups", draw.Args(runs=tuple(runs), rows=here / "tables"))


def test_a_table_grows_from_its_rows(here: Path):
    """Runs added one by one, without those before them at hand, give the table of all of them at once."""
    made = [
        ("a", evor_value.Args(), 8),
        ("b", critics.Args(critic="qr", next_action="softmax"), 5),
        ("a-1", evor_value.Args(first_seed=1), 4),
    ]
    runs = [make_run(here / name, args, solved=solved) for name, args, solved in made]
    whole = stored("baselines", *runs)
    folder = here / "results" / "baselines"
    files = {path: read_csv(path) for path in folder.glob("*.csv")}
    shutil.rmtree(folder)
    for run in runs:
        text = stored("baselines", run, append=folder.is_dir())
        shutil.rmtree(run)
    assert text == whole and {path: read_csv(path) for path in folder.glob("*.csv")} == files
    assert stored("baselines") == whole
    shutil.rmtree(here / "a-base")
    make_run(here / "a", evor_value.Args(), solved=10)
    assert "**70%**" in stored("baselines", here / "a", append=True)  # (10 + 4) of 20, not of 30
    other = make_run(here / "c", critics.Args(critic="c51"), solved=5, policy="other")
    with pytest.raises(UserError, match="differ in policy_sha256"):
        stored("baselines", other, append=True)


@pytest.mark.parametrize(
    ("changes", "of_run", "sentence"),
    [
        (dict(discount=0.9), {}, "differ in settings"),
        (dict(num_next_actions=8), {}, "differ in settings"),
        (dict(steps=2_000), {}, "differ in steps"),
        ({}, dict(policy="other"), "differ in policy_sha256"),
        ({}, dict(bc_steps=71), "differ in bc_steps"),
        ({}, dict(task=3), "differ in task"),
    ],
)
def test_what_differs_shares_no_line(here: Path, changes: dict, of_run: dict, sentence: str):
    runs = (
        make_run(here / "a", evor_value.Args(), solved=8),
        make_run(here / "b", evor_value.Args(first_seed=1, **changes), solved=8, **of_run),
    )
    with pytest.raises(UserError, match=sentence):
        stored("baselines", *runs)


def test_only_rows_of_the_settings_that_a_run_names_count(here: Path):
    """An evaluation anew at another temperature, stopped half-way, leaves the rows of the one before."""
    run = make_run(here / "run", evor_value.Args(horizon=5, width=64), solved=8)
    path = run / "value" / "evaluation.csv"
    rows = [row | dict(return_temperature=evor_value.Args.return_temperature) for row in read_csv(path)]
    write_csv(path, list(rows[0]), rows)
    assert gather.gather(run)[1][0]["success"] == 0.8
    write_csv(path, list(rows[0]), [row | dict(return_temperature=0.5) for row in rows])
    with pytest.raises(UserError, match="no evaluation of its last checkpoint"):
        gather.gather(run)
    with pytest.raises(UserError, match=r"no .*nothing/value/config\.json: name run directories"):
        gather.gather(here / "nothing")


def test_preview_refuses_an_unfinished_run(here: Path):
    run = make_run(here / "a", evor_value.Args(), solved=8)
    text = (run / "value" / "evaluation.csv").read_text()
    (run / "value" / "evaluation.csv").write_text(text.replace("1000000", "500000"))
    with pytest.raises(UserError, match="no evaluation of its last checkpoint"):
        gather.gather(run)


def test_speed_times_the_lines_of_the_table(monkeypatch: pytest.MonkeyPatch):
    """The names under which `benchmarks.speed` times the steps are those that the table looks for."""
    monkeypatch.setattr(speed, "measure", lambda group, cases, args: [dict(case=case.name) for case in cases])
    monkeypatch.setattr(speed, "value_case", lambda name, args, **settings: speed.Case(name, lambda: None))
    found = {row["case"] for row in speed.baselines(speed.Args())}
    for method, backup, horizon in (
        ("paper, trunk", "base", 5), ("shared-noise, trunk", "best of 4", 5), ("scalar", "base", 5),
        ("qr", "best of 4", 5), ("QC, frozen policy", "best of 4", 1), ("QC, joint policy", "best of 32", 5),
    ):  # fmt: skip
        assert f"{method}, {backup}, horizon {horizon}" in found


def test_means_over_tasks_and_seeds(here: Path):
    """Tasks 1 to 3 share a line with the seed that all have, task 3 with two has one of its own besides; drawing again
    changes nothing."""
    folder = here / "results" / "tasks"
    args = evor_value.Args(horizon=5, width=64)
    other = evor_value.Args(horizon=5, width=64, first_seed=1)
    runs = [
        make_run(here / "one" / "cube-double-play", args, solved=8, task=1),
        make_run(here / "two" / "cube-double-play", args, solved=4, task=2),
        make_run(here / "three" / "cube-double-play", args, solved=10, task=3),
        make_run(here / "four" / "cube-double-play", other, solved=0, task=3),
    ]
    text = stored("tasks", *runs)
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| cube")
    ]
    shared, alone = lines[:2]
    assert shared[1:3] == ["1 2 3", "1"] and shared[11].startswith("**73% [") and shared[13].startswith("0% [")
    assert alone[1:3] == ["3", "2"] and alone[11] == "**50% [0%, 100%]**" and alone[13] == "0% [0%, 49%]"
    assert [line[6:9] for line in lines[2:6]] == [
        ["1", "0", "80% [49%, 94%]"], ["2", "0", "40% [17%, 69%]"], ["3", "0", "100% [72%, 100%]"],
        ["3", "1", "0% [0%, 28%]"],
    ]  # fmt: skip
    assert lines[6] == ["cube-double-play", "74%", "DSRL, chunks of 5", "released data of QAM, 12 seeds"]
    (folder / "cube-double-play.png").unlink()
    assert stored("tasks") == text == (folder / "table.md").read_text()
    assert (folder / "cube-double-play.png").is_file() and (folder / "calibration.png").is_file()
    stored("tasks", *runs[:2])
    for run in (*runs[2:], runs[2]):  # the last time in its own place
        again = stored("tasks", run, append=True)
    assert sorted(again.splitlines()) == sorted(text.splitlines())
    with pytest.raises(UserError, match="have the same settings, task and seed: name one of them"):
        stored("tasks", *runs, runs[0])
    paper = evor_value.Args(horizon=5, width=64, td_target="paper")  # on another axis: `std`
    both = stored("tasks", runs[0], make_run(here / "seven" / "cube-double-play", paper, solved=1, task=1))
    assert "| `shared-noise`, quantiles |" in both and "| `paper`, std |" in both
    narrow = make_run(here / "six" / "cube-double-play", evor_value.Args(horizon=5, width=8), solved=1, task=4)
    with pytest.raises(UserError, match=r"one/cube-double-play and .*six/cube-double-play differ in width"):
        stored("tasks", runs[0], narrow)
    longer = make_run(here / "five" / "cube-double-play", evor_value.Args(steps=2_000_000), solved=1)
    with pytest.raises(UserError, match="differ in steps"):
        stored("tasks", longer, append=True)
    with pytest.raises(UserError, match=r"no .*targets/runs\.csv: name run directories with --runs"):
        draw.main(draw.Args(("targets",)))
    with pytest.raises(UserError, match=r"there is no table 'nothing': choose among thirty-tasks, .*, tasks, "):
        draw.main(draw.Args(("nothing",)))
    for names in ((), ("tasks", "targets"), ("base_policy",)):
        with pytest.raises(UserError, match="--runs makes rows of one table"):
            draw.main(draw.Args(names, runs=(runs[0],)))


def test_calibration_over_the_tasks_that_all_models_share():
    """Task 1 alone was trained with both targets: the mean of its two seeds, beside the one of `paper`. Fails if a
    softmax backup, whose policy did not make the data, counts."""

    def row(task: str, below: float, **changes: str) -> dict[str, str]:
        settings = dict(td_target="shared-noise", next_action="base", critic="mlp", horizon="1", discount="0.99")
        return settings | {"task": task, "below_0.1": "0.1", "below_0.5": str(below)} | changes

    runs = rows.frame([
        row("1", 0.2), row("1", 0.4, seed="1"), row("2", 0.9), row("1", 0.7, td_target="paper"),
        row("1", 1.0, next_action="softmax"), row("1", 0.5, critic="trunk", **{"below_0.5": ""}),
    ])  # fmt: skip
    shared, found = tasks.reliability(runs)
    assert shared == ["1"] and found == {
        "shared-noise, mlp, horizon 1, discount 0.99": pytest.approx({0.1: 0.1, 0.5: 0.3}),
        "paper, mlp, horizon 1, discount 0.99": pytest.approx({0.1: 0.1, 0.5: 0.7}),
    }
    assert tasks.reliability(rows.frame([row("1", 0.2), row("2", 0.2, td_target="paper")])) == ([], {})


def test_temperatures_of_different_units_share_no_figure():
    """tau_Q was in standard deviations of the scores before the rows said what it is in units of return."""
    settings = dict.fromkeys((*sweeps.ALIKE, *sweeps.MODEL, "critic_sha256"), "1") | dict(absolute="False")
    old, new = settings, settings | dict(action_temperature_units="0.3")
    sweeps.refuse([rows.frame([old, old])])
    sweeps.refuse([rows.frame([new, new | dict(action_temperature_units="0.0")])])
    with pytest.raises(UserError, match="tau_Q have different units"):
        sweeps.refuse([rows.frame([old, new])])


def test_a_sweep_is_drawn_again_from_its_rows(here: Path):
    """Two targets at two temperatures: four lines of the table, which does not need the runs any more."""
    name = "action_noise"
    folders = []
    for target, solved in (("paper", 1), ("shared-noise", 3)):
        folder = here / target / "tau_r"
        header = dict(
            stage="value", env="cube-double-play", horizon=1, model={}, step=70, seeds=[0], replicas=[[2, 0]],
            policy_sha256="ab", data=dict(name="d", source="collected", sha256="cd"),
            args=dict(td_target=target, next_action="base", critic="mlp", steps=70, discount=0.99,
                      return_temperature=0.03),
        )  # fmt: skip
        model = folder.parent / "value" / "model.eqx"
        checkpoint.save(model, header, ())
        episodes = [
            dict(env="cube-double-play", data_source="collected", data_sha256="cd", task=2, seed=0, num_actions=16,
                 num_returns=8, return_temperature=temperature, action_temperature=0.0, action_noise=0.0, episode=i,
                 success=float(i < solved), length=10, flow_steps=10, solver="euler", eval_seed=0)
            for temperature in (0.1, float("inf")) for i in range(4)
        ]  # fmt: skip
        write_csv(folder / "episodes.csv", list(episodes[0]), episodes)
        config = dict(git_revision="12", critic_sha256=sha256(model), policy_sha256="ab", hardware="a GPU")
        config["versions"] = dict(python="3", jax="1", mujoco="2")
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(folder)
    text = stored(name, *folders)
    assert [line.split("|")[2:6] for line in text.splitlines()[2:]] == [
        [" `paper` ", " 2 ", " 0.1 ", " **25%** [5%, 70%] "], [" `paper` ", " 2 ", " inf ", " **25%** [5%, 70%] "],
        [" `shared-noise` ", " 2 ", " 0.1 ", " **75%** [30%, 95%] "],
        [" `shared-noise` ", " 2 ", " inf ", " **75%** [30%, 95%] "],
    ]  # fmt: skip
    with pytest.raises(UserError, match="made of all its runs at once"):
        stored(name, folders[0], append=True)
    with pytest.raises(UserError, match="two of the folders are of one target, task and seed"):
        stored(name, *folders, folders[0])
    assert ",a GPU," in (here / "results" / "action_noise" / "episodes.csv").read_text()
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | dict(critic_sha256="another")))
    with pytest.raises(UserError, match=r"is not what .* evaluated"):
        stored(name, *folders)
    (folders[0] / "config.json").write_text(json.dumps(config))
    header = checkpoint.read_header(folders[0].parent / "value" / "model.eqx", stage="value", remedy="")
    softmax = header | dict(args=header["args"] | dict(next_action="softmax"))
    checkpoint.save(folders[0].parent / "value" / "model.eqx", softmax, ())
    changed = dict(critic_sha256=sha256(folders[0].parent / "value" / "model.eqx"))
    (folders[0] / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match="differ in next_action"):
        stored(name, *folders)
    # With this backup tau_R is a setting of the training too.
    model = folders[1].parent / "value" / "model.eqx"
    other = checkpoint.read_header(model, stage="value", remedy="")
    changes = dict(next_action="softmax", return_temperature=0.1)
    checkpoint.save(model, other | dict(args=other["args"] | changes), ())
    (folders[1] / "config.json").write_text(json.dumps(config | dict(critic_sha256=sha256(model))))
    with pytest.raises(UserError, match="differ in backup_return_temperature"):
        stored(name, *folders)
    for folder in folders:
        shutil.rmtree(folder.parent)
    figure = here / "results" / "action_noise" / "figure.png"
    figure.unlink()
    assert stored(name) == text and figure.stat().st_size > 0
    with pytest.raises(UserError, match="holds no finished sweep"):
        stored(name, *folders)


def test_every_table_is_that_of_its_rows(here: Path, monkeypatch: pytest.MonkeyPatch):
    """All tables are drawn again from the stored rows: the same to the letter. The figures have the names of the stored
    ones, and no stored file is written. Fails if somebody edits a table or a row alone."""
    folder = ROOT / "results"
    monkeypatch.setattr(rows, "RESULTS", folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    draw.main(draw.Args())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    for name in draw.DRAWN:
        table = rows.Place(here / "tables", name, folder).path("table.md").read_text()
        page = (rows.Place(folder, name, folder).path("x").parent / "README.md").read_text()
        assert f"<!-- table {name} -->\n{table}<!-- end -->" in page, name
    assert (here / "tables" / "laws" / "axes.md").read_text() == (folder / "laws" / "axes.md").read_text()
    figures = {path.relative_to(here / "tables") for path in (here / "tables").rglob("*.png")}
    measured = {Path(name) for name in ("speed/speed.png", "soak/soak.png")}
    assert {
        path.relative_to(folder) for path in folder.rglob("*.png") if "revision" not in str(path)
    } == figures | measured


def test_every_question_has_its_folder_its_form_and_its_line_in_the_index():
    """A README says what was asked, what came out, by which command, and in how many minutes on which hardware."""
    index = (ROOT / "results" / "README.md").read_text()
    folders = {path.name for path in (ROOT / "results").iterdir() if path.is_dir()}
    assert {name.partition("/")[0] for name in draw.DRAWN} < folders
    for name in folders:
        text = (ROOT / "results" / name / "README.md").read_text()
        assert text.startswith("# ") and f"({name}/README.md)" in index, name
        if name not in ("laws", "revision-90dd10a"):
            assert text.splitlines()[0].endswith("?"), name
            assert all(f"**{part}**" in text for part in ("What it says.", "Command.", "Minutes.")), name
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / "results" / name / link).exists(), (name, link)


def test_drawing_writes_to_the_results_only_when_told(here: Path):
    """Rows, table and figure of a run go to `runs/tables/`; with --update into the README of the question."""
    run = make_run(here / "a", evor_value.Args(horizon=5, width=64), solved=8)
    text = draw.draw("targets", draw.Args(runs=(run,)))
    assert not (here / "results").exists() and (here / "tables" / "targets" / "table.md").read_text() == text
    readme = here / "results" / "targets" / "README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("# Which?\n\n<!-- table targets -->\nold\n<!-- end -->\nWords.\n")
    assert stored("targets", run) == text
    assert readme.read_text() == f"# Which?\n\n<!-- table targets -->\n{text}<!-- end -->\nWords.\n"
    assert sorted(path.name for path in readme.parent.iterdir()) == ["README.md", "episodes.csv", "runs.csv"]


def evaluated_run(path: Path, args: Any, *, solved: list[int]) -> Path:
    """A run that was evaluated every 10 steps, with ten episodes each."""
    make_run(path, args, solved=0)
    rows = [
        dict(task=2, seed=0, step=10 * (i + 1), num_actions=args.num_actions, num_returns=args.num_returns, episode=e,
             success=float(e < number), length=100)
        for i, number in enumerate(solved) for e in range(10)
    ]  # fmt: skip
    write_csv(path / "value" / "evaluation.csv", list(rows[0]), rows)
    metrics = [
        dict(task=2, seed=0, step=row["step"], metric=metric, value=row["step"] / divisor)
        for row in rows[::10] for metric, divisor in (("bias", -10), ("crps", 4), ("loss", 1))
    ]  # fmt: skip
    write_csv(path / "value" / "metrics.csv", list(metrics[0]), metrics)
    return path


def test_curves_over_training(here: Path):
    settings = dict(horizon=5, width=64, learning_rate=1e-3)
    runs = (
        evaluated_run(here / "a", evor_value.Args(schedule="cosine", steps=40, **settings), solved=[2, 4, 6, 9]),
        evaluated_run(here / "b", evor_value.Args(schedule="constant", steps=20, **settings), solved=[3, 5]),
    )
    text = stored("schedule", *runs)
    assert "| steps 40, schedule cosine | 40 | **90%** [60%, 98%] of 10 | 63% | -4.0 | 10.0 |" in text
    assert "| steps 20, schedule constant | 20 | **50%** [24%, 76%] of 10 |  | -2.0 | 5.0 |" in text
    for run in runs:
        shutil.rmtree(run)
    figure = here / "results" / "schedule" / "figure.png"
    figure.unlink()
    assert stored("schedule") == text and figure.is_file()
    twins = [evaluated_run(here / name, evor_value.Args(steps=10, run_dir=Path(name)), solved=[1]) for name in "cd"]
    narrow = evaluated_run(here / "f", evor_value.Args(steps=10, width=8), solved=[1])
    assert "| width 8 |" in stored("capacity", twins[0], narrow)
    assert not (here / "results" / "capacity" / "figure.png").exists()
    longer = evaluated_run(here / "e", evor_value.Args(steps=20), solved=[1])
    with pytest.raises(UserError, match="no evaluation of its last checkpoint"):
        stored("schedule", twins[0], longer)
    with pytest.raises(UserError, match="two of the runs have the same settings"):
        stored("schedule", *twins)
    other = json.loads((twins[0] / "value" / "config.json").read_text()) | dict(policy_sha256="xy")
    (twins[0] / "value" / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="differ in policy_sha256"):
        stored("schedule", *twins)
    config = twins[1] / "value" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(diverged=[[2, 0]])))
    with pytest.raises(UserError, match="diverged: its numbers are not those of all seeds"):
        stored("schedule", *twins)
    with pytest.raises(UserError, match=r"no .*missing/value/config.json"):
        stored("schedule", here / "missing")


def test_runs_of_other_rewards_and_base_policies_are_told_apart(here: Path):
    """The same task and seed with sparse rewards is a line of its own; another base policy is no line of the table."""
    runs = [
        make_run(here / name, evor_value.Args(reward=reward), solved=solved)
        for name, reward, solved in (("a", "default", 8), ("b", "sparse", 4))
    ]
    means = stored("tasks", *runs).split("Per task")[0]
    assert "| cube-double-play (collected) |" in means and "| **80% [49%, 94%]** |" in means
    assert "| cube-double-play, sparse (collected) |" in means and "| **40% [" in means
    other = make_run(here / "c", evor_value.Args(first_seed=1), solved=8, policy="other")
    with pytest.raises(UserError, match="differ in policy_sha256, which the table hides"):
        stored("tasks", runs[0], other)


def test_the_error_of_a_selection(here: Path):
    """Critics whose errors are independent and as large as what they agree on: half of what the chooser promises is
    error. The largest of two normals of variance 2 lies sqrt(2 / pi) above the mean."""
    rng = np.random.default_rng(0)
    states, most = 5_000, max(benchmark.NUMBERS)
    agreed, *errors = rng.normal(size=(3, states, most))
    agents = tuple(
        SimpleNamespace(
            sample_actions=lambda observations, number, key: np.zeros((states, number, 2)),
            q_value=lambda observations, actions, num_returns, key, error=error: (agreed + error).ravel(),
        )
        for error in errors
    )
    values = benchmark.values_of(agents, np.zeros((states, 3)), num_returns=8)
    gains = benchmark.rows_of(values, np.arange(states) // 10)
    assert len(gains) == 2 * (states // 10) * len(benchmark.NUMBERS)
    assert {row["states"] for row in gains} == {10}
    about = dict(env="toy", data_source="collected", td_target="shared-noise", task=2, steps=70, seeds="0 1")
    about |= dict(critic_sha256="12", return_temperature=0.1, num_returns=8)
    measured = rows.frame(about | row for row in gains)
    found = saturation.summary(measured)
    expected = np.sqrt(2) * np.array([1 / np.sqrt(np.pi), 1.02938, 1.42360])  # means of the largest of 2, 4, 8
    np.testing.assert_allclose(found["own"][1:4, 0], expected, atol=0.05)
    np.testing.assert_allclose(found["others"][1:4, 0], expected / 2, atol=0.05)
    np.testing.assert_allclose(found["error"][1:4, 0], expected / 2, atol=0.05)
    gains = [np.mean([max(v[:2]) - v[0] for c in range(2) for v in (agreed + errors[c])[10 * i : 10 * i + 10]])
             for i in range(states // 10)]  # fmt: skip
    half = 1.96 * np.std(gains, ddof=1) / np.sqrt(states // 10)
    np.testing.assert_allclose(found["own"][1], [np.mean(gains), half], rtol=1e-6)

    folder = here / "results" / "saturation"
    rows.write(folder / "rows.csv", measured)
    assert "Success:" not in stored("saturation")  # no sweep stands there
    one = dict(env="toy", task=2, num_actions=4, critic_sha256="12", success=1.0, length=10)
    one |= dict(num_returns=8, return_temperature=0.1, action_temperature=0.25)
    # Of another reward model, and at another tau_R: not what the selection was measured for.
    episodes = [one, one | dict(critic_sha256="34", success=0.0), one | dict(return_temperature=0.5, success=0.0)]
    sweep = here / "results" / "num_actions" / "episodes.csv"
    write_csv(sweep, list(one), episodes)
    text = stored("saturation")
    assert text.count("|\n") == 2 + len(benchmark.NUMBERS) and text.count("| 100% [21%, 100%] |") == 1
    assert "at tau_R = 0.1. Success: of the extracted policy at the same tau_R and tau_Q = 0.25." in text
    assert (folder / "figure.png").is_file()
    write_csv(sweep, list(one), [one, one | dict(action_temperature=0.0)])
    with pytest.raises(UserError, match="several tau_Q for this reward model"):
        stored("saturation")


def test_returns_of_roll_outs():
    """Rewards of -1 until the task is solved after two steps, of -1 and of -2 for ever where time runs out."""
    rewards = np.array([[-1.0, -1.0, -2.0], [-1.0, -1.0, -2.0], [0.0, -1.0, -2.0]])
    cut = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    np.testing.assert_allclose(candidates.discounted(rewards, cut, 0.9), [-1.9, -10.0, -20.0])


def test_a_branch_starts_where_its_actions_lead():
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    env = candidates.Branch("pointmaze-medium-singletask-task1-v0", 3, actions)
    first = env.reset()[0]
    whole = candidates.Branch("pointmaze-medium-singletask-task1-v0", 3, actions[:0])
    start = whole.reset()[0]
    for action in actions:
        *rest, info = whole.step(action)
    assert info == dict(counts=True, cut=False) and rest[1] == -1.0
    np.testing.assert_array_equal(rest[0], first)
    assert np.abs(first - start).max() > 0.1
    infos = [env.step(actions[0])[-1] for _ in range(1000 - 20 + 2)]
    assert [info["cut"] for info in infos[-4:]] == [False, True, False, False]
    assert [info["counts"] for info in infos[-4:]] == [True, True, False, False]
    np.testing.assert_array_equal(env.reset()[0], first)
    env.close(), whole.close()


def test_the_readmes_tables_are_those_of_the_results():
    """Each cell is one of the tables of results/, which are drawn from their rows."""
    readme = (ROOT / "README.md").read_text()

    def cells(name: str, *begins: str) -> list[str]:
        lines = (ROOT / "results" / name / "README.md").read_text().replace("*", "").splitlines()
        (line,) = [line for line in lines if all(begin in line for begin in begins)]
        return [cell.strip() for cell in line.split("|")[1:-1]]

    def shorter(cell: str) -> str:
        rate, low, high = re.fullmatch(r"(\d+%) \[(\d+)%, (\d+)%\]", cell).groups()
        return f"{rate} [{low}, {high}]"

    lines = (ROOT / "results" / "thirty-tasks" / "README.md").read_text().replace("*", "").splitlines()
    five_tasks = [line.split(" | ") for line in lines if re.match(r"\| [a-z].*\[.* \+ ", line)]
    for env, *_, extracted, alone, _, _, _ in five_tasks:
        assert f"{env} | {shorter(alone)} | {shorter(extracted)} |" in readme
    assert len(five_tasks) == 6
    (total,) = [line.split(" | ") for line in lines if line.startswith("| all 30 tasks |")]
    assert f"| all 30 tasks | {shorter(total[7])} | {shorter(total[6])} |" in readme
    for method, label in (
        ("`scalar` | base", "scalar critic"),
        ("`paper, trunk` | base", "published TD target"),
        ("`c51` | base", "C51"),
        ("`qr` | base", "QR"),
        ("`shared-noise, trunk` | base", "`shared-noise`, the default"),
        ("`QC, frozen policy` | best of 32", "QC, best of 32, frozen policy"),
    ):
        _, _, _, _, extracted, _, alone, *_ = cells("baselines", f"| {method} |")
        assert f"| {label} | {shorter(alone)} | {shorter(extracted)} |" in readme

    def rate(*where: str) -> str:
        return re.search(r"\d+%", next(cell for cell in cells(*where) if "[" in cell))[0]

    backup = {
        name: rate("baselines", f"| `{name}` | best of 4 |") for name in ("c51", "qr", "scalar", "shared-noise, trunk")
    }
    paper = [
        rate("tasks", f"| {env} (collected) | 2 | 1 | `paper` |") for env in ("cube-double-play", "cube-single-play")
    ]
    again = rows.read(ROOT / "results" / "backups" / "episodes.csv")
    again = again[(again["run"] == "runs/backups/shared-noise-softmax") & (again["num_actions"] == "16")]
    other = again["success"].astype(float).mean()
    flow = f"{backup['shared-noise, trunk']} ({other:.0%} on another base policy)"
    episodes = rows.read(ROOT / "results" / "baselines" / "episodes.csv")
    ours = episodes[(episodes["run"] == "runs/baselines/shared-noise-base") & (episodes["num_actions"] == "16")]
    seeds = ours.astype({"success": float}).groupby("seed")["success"].mean()
    assert backup["c51"] == backup["qr"]
    sentences = (
        f"Two seeds of `shared-noise` got {seeds['0']:.0%} and {seeds['1']:.0%}.",
        f"C51 and QR get {backup['qr']}, the scalar critic {backup['scalar']}, the flow {flow}.",
        f"The published target gets {paper[0]} on the same task after 50,000 steps, and {paper[1]} on cube-single",
    )
    assert [sentence for sentence in sentences if sentence not in " ".join(readme.split())] == []


def test_what_is_said_of_the_thirty_tasks_is_in_their_rows():
    runs = rows.numbers(rows.read(ROOT / "results" / "thirty-tasks" / "runs.csv"), real=["success"])
    ours = runs[[method == thirty.DEFAULT for method in thirty.methods_of(rows.complete(runs, thirty.SETTINGS))]]
    page = " ".join((ROOT / "results" / "thirty-tasks" / "README.md").read_text().split())
    mean = {env: f"{of_env['success'].mean():.0%}" for env, of_env in ours.groupby("env")}
    single, double, scene = (mean[f"{name}-play"] for name in ("cube-single", "cube-double", "scene"))
    puzzle = mean["puzzle-3x3-play"]
    assert f"On cube-single it gets {single}," in page and f"On cube-double it gets {double};" in page
    assert f"On puzzle-3x3 it gets {puzzle}." in page
    on_default = runs[(runs["env"] == "cube-double-play") & (runs["task"] == "2")]
    of_method = on_default.groupby(thirty.methods_of(rows.complete(on_default, thirty.SETTINGS)))["success"].mean()
    own, base, paper, scalar, qc = (
        f"{of_method[name]:.0%}"
        for name in (thirty.DEFAULT, thirty.BASE, "published target", "scalar critic", "QC, chunks of 5")
    )
    beside = f"{base} of the `base` backup, {paper} of the published target, {scalar} of the scalar critic and"
    assert f"its {own} stand beside {beside} {qc} of QC" in page
    assert f"On scene-play it gets {scene}." in page
    mazes = runs[runs["env"].str.startswith("pointmaze")]
    mazes = mazes.assign(method=thirty.methods_of(rows.complete(mazes, thirty.SETTINGS)))
    alike = mazes[mazes["method"].isin(["published target", "scalar critic"])]
    assert len(alike) == 8 and set(alike["success"]) == {1.0}
    assert "the scalar critic, with the backup of the recipe, get 100% on the default task of both" in page
    second = runs[(runs["env"] == "scene-play") & (runs["task"] == "2")]
    of_method = second.groupby(thirty.methods_of(rows.complete(second, thirty.SETTINGS)))["success"].mean()
    others = {f"{of_method[name]:.0%}" for name in ("published target", "scalar critic")}
    qc, own = (f"{of_method[name]:.0%}" for name in ("QC, chunks of 5", thirty.DEFAULT))
    assert f"get {others.pop()} each, QC {qc}, and EVOR {own}:" in page and not others
    of_single = runs[(runs["env"] == "cube-single-play") & (runs["task"] == "2")]
    of_method = of_single.groupby(thirty.methods_of(rows.complete(of_single, thirty.SETTINGS)))["success"].mean()
    assert of_method.idxmin() == "QC, chunks of 5" and of_method.max() == 1.0
    assert f"they get {of_method.min():.0%} (QC) to 100%" in page
    tuning = " ".join((ROOT / "docs" / "tuning.md").read_text().split())
    large = mean["pointmaze-large-navigate"]
    assert f"gets {large} with today's preview" in tuning and f"cube-single gets {single} with it" in tuning


def test_what_is_said_of_the_extraction_is_in_its_rows():
    page = " ".join((ROOT / "results" / "thirty-tasks" / "README.md").read_text().split())
    means = {}
    columns = dict(num_actions="num_actions", tau_q="action_temperature", tau_r="return_temperature")
    for name, column in columns.items():
        stored_rows = rows.read(ROOT / "results" / "thirty-tasks" / f"{name}_rows.csv")
        counts = rows.numbers(stored_rows, real=[column, "solved", "episodes"])
        of_envs = counts.groupby(["env", column])[["solved", "episodes"]].sum()
        rates = (of_envs["solved"] / of_envs["episodes"]).groupby(column).mean()
        assert len(of_envs) == 6 * len(rates) and (name != "tau_q" or rates[3.0] < 0.1)
        means[name] = {value: f"{rate:.0%}" for value, rate in rates.items()}
    n, q, r = means.values()
    assert f"With one it is {n[1]} (the base policy at the recipe's lambda;" in page
    assert f"with eight {n[8]}, and 64 candidates get {n[64]}" in page
    assert f"0.3 gets {q[0.3]}, and 3 loses nearly everything" in page
    assert f"{r[0]} with the largest of eight returns (0), {r[0.3]} with the default 0.3, and {r[np.inf]}" in page


def test_what_is_said_of_axes_backups_and_laws_is_in_their_rows():
    runs = rows.complete(rows.read(ROOT / "results" / "thirty-tasks" / "runs.csv"), thirty.SETTINGS)
    runs = rows.numbers(runs.assign(method=thirty.methods_of(runs)), real=["success"])
    means = runs.groupby(["env", "method", "task"])["success"].mean()
    base, softmax = means["scene-play"][thirty.BASE], means["scene-play"][thirty.DEFAULT]
    assert round(base["1"], 2) == 0.93 and base.drop("1").max() == pytest.approx(0.2)
    maze = means["pointmaze-medium-navigate"]
    pairs = (maze[thirty.DEFAULT], maze[thirty.BASE], softmax, base)
    said = "get {:.0%} and {:.0%} on pointmaze-medium, {:.0%} and {:.0%} on scene-play"
    tuning = " ".join((ROOT / "docs" / "tuning.md").read_text().split())
    assert said.format(*(of_method.mean() for of_method in pairs)) in tuning
    measured = runs[runs["method"].isin([thirty.BASE, thirty.BOUNDS])]
    crps = rows.numbers(measured[measured["crps"] != ""], real=["crps"])
    crps = crps.groupby(["env", "task", "method"])["crps"].mean().unstack().dropna()
    ratio = crps[thirty.BASE] / crps[thirty.BOUNDS]
    assert len(ratio) == 8 and ratio.max() < 1
    assert [round(ratio["scene-play"][task], 1) for task in ("2", "4")] == [0.4, 0.6]
    laws = rows.numbers(rows.read(ROOT / "results" / "laws" / "axes.csv"), real=["w1"])
    assert len(laws) == 16 and laws["w1"].max() < 0.009


@pytest.mark.parametrize("page", ["README.md", "docs/td-targets.md"])
def test_the_distances_of_the_targets_are_those_of_the_rows(page: str):
    """Every cell of the table of W1: a mean over three seeds."""
    measured = rows.read(ROOT / "results" / "revision-90dd10a" / "return_law.csv")
    text, number = (ROOT / page).read_text(), 0
    header = next(line for line in text.splitlines() if line.startswith("| probe |"))
    columns = [cell.strip() for cell in header.split("|")[2:-1]]
    for probe, of_probe in measured.groupby("probe"):
        lines = [line for line in text.splitlines() if line.startswith(f"| {probe} |")]
        for column, cell in zip(columns, lines[0].split("|")[2:-1] if lines else (), strict=bool(lines)):
            method, name = ("paper", "w1_to_normal") if "N(Q" in column else (column.strip("`"), "w1")
            of_method = of_probe[(of_probe["method"] == method) & (of_probe["noise_std"] == "1.0")]
            mean = of_method[name].astype(float).mean()
            assert len(of_method) == 3 and f"{mean:.3f}" == cell.strip(), (probe, column)
            number += 1
    assert number == {"README.md": 12, "docs/td-targets.md": 30}[page]


def test_a_run_is_compared_with_its_rows(here: Path):
    """Twelve episodes of which one changed, and other data; then another discount, which is no repetition."""
    run = make_run(here / "a", evor_value.Args(), solved=8)
    stored("tasks", run)
    stored("thirty-tasks", make_run(here / "other", evor_value.Args(next_action="softmax"), solved=1))
    text = check.main(check.Args(runs=(run,)))
    assert "| 2 | 0 | 80% [49%, 94%] | 80% [49%, 94%] | 12 of 12 | 3.0 | 3.0 |" in text
    assert text.endswith("Data, versions and hardware alike.")
    episodes = run / "value" / "evaluation.csv"
    episodes.write_text(episodes.read_text().replace(",9,0.0,100,", ",9,1.0,90,"))
    config = run / "value" / "config.json"
    config.write_text(config.read_text().replace('"sha256": "cd"', '"sha256": "xy"'))
    text = check.main(check.Args(runs=(run,)))
    assert "| 90% [60%, 98%] | 80% [49%, 94%] | 11 of 12 |" in text
    assert text.endswith("Not as it was: data_sha256: xy, then cd")
    config.write_text(config.read_text().replace('"discount": 0.99', '"discount": 0.9'))
    with pytest.raises(UserError, match=r"another discount than its row: 0\.9, not 0\.99"):
        check.main(check.Args(runs=(run,)))
    with pytest.raises(UserError, match="no table has a row of"):
        check.main(check.Args(runs=(make_run(here / "b", evor_value.Args(), solved=8),)))


def test_the_numbers_of_the_pages_are_those_of_the_rows():
    """Those of "What it says". Fails if a row or a sentence is changed alone."""
    folder = ROOT / "results"

    def rates(name: str, column: str, **values: str) -> dict[str, float]:
        """Mean success per value of a column, in the order in which they come."""
        frame = rows.read(folder / name)
        chosen = frame[(frame[list(values)] == pd.Series(values, dtype=str)).all(axis=1)]
        return dict(chosen.astype({"success": float}).groupby(column, sort=False)["success"].mean())

    gains = saturation.summary(rows.read(folder / "saturation" / "rows.csv"))
    own, others = (gains[name][-1, 0] for name in ("own", "others"))
    schedules = {}
    for row in read_csv(folder / "schedule/episodes.csv"):
        if int(row["step"]) > 20_000:
            schedules.setdefault(row["label"].rpartition(" ")[2], []).append(float(row["success"]))
    cosine, constant = (f"{np.mean(schedules[name]):.0%}" for name in ("cosine", "constant"))
    noise = rates("action_noise/episodes.csv", "action_noise", num_actions="16").values()
    sentences = {
        "saturation": f"confirms {others / own:.0%} of the value",
        "schedule": f"gets {cosine} over the last three evaluations, and a constant 3e-4 gets {constant}.",
        "capacity": f"64 gets {rates('capacity/episodes.csv', 'label', step='50000')['width 64, depth 4']:.0%}.",
        "action_noise": "task 2 gets {:.0%}, {:.0%}, {:.0%} and {:.0%}.".format(*noise),
    }
    for name, sentence in sentences.items():
        assert sentence in " ".join((folder / name / "README.md").read_text().split()), sentence


def test_tasks_of_different_seeds_have_no_interval():
    episodes = rows.frame(dict(task=task, seed=seed, success=1) for task, seed in ((1, 0), (1, 1), (2, 0)))
    with pytest.raises(UserError, match="some tasks have more seeds than others"):
        rows.rate(episodes)


def test_the_two_axes_stand_beside_each_other(here: Path):
    """Of the rows of the thirty tasks: a task that one of them did not run, and other methods, are left out."""
    axes = {"data": evor_value.Args(), "possible": evor_value.Args(return_axis="bounds")}
    axes["softmax"] = evor_value.Args(next_action="softmax")
    measured = [("data", 0, 6, 1.0), ("data", 1, 8, 2.0), ("possible", 0, 2, 4.0), ("possible", 1, 2, 5.0)]
    runs = []
    for name, seed, solved, crps in (*measured, ("softmax", 0, 0, 9.0)):
        args = dataclasses.replace(axes[name], first_seed=seed)
        runs.append(make_run(here / f"{name}-{seed}", args, solved=solved, task=2))
        errors = read_csv(runs[-1] / "value" / "calibration.csv")
        errors = [row | (dict(value=crps) if row["metric"] == "crps" else {}) for row in errors]
        write_csv(runs[-1] / "value" / "calibration.csv", list(errors[0]), errors)
    runs.append(make_run(here / "data-3", axes["data"], solved=1, task=3))
    text = stored("thirty-tasks", *runs)
    assert "| default task | `base` backup | `base` backup, axis of the possible returns | EVOR |" in text
    [line] = stored("axes").splitlines()[2:]
    assert line.startswith("| cube-double-play | 2 | 4.50 | 1.50 | 0.50 | 0.50 | 20% [") and "| 70% [" in line


def test_the_thirty_tasks_methods_stand_beside_each_other(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thirty.tasks, "PUBLISHED", ROOT / "results" / "tasks")
    made = {
        "default-2": (evor_value.Args(next_action="softmax"), 8, 2),
        "default-3": (evor_value.Args(next_action="softmax"), 4, 3),
        "base": (evor_value.Args(), 3, 2),
        "paper": (evor_value.Args(td_target="paper"), 2, 2),
        "scalar": (critics.Args(critic="scalar", next_action="softmax"), 5, 2),
        "qc": (qc.Args(horizon=5, num_actions=32, policy="frozen"), 1, 2),
    }
    runs = [make_run(here / name, args, solved=solved, task=task) for name, (args, solved, task) in made.items()]
    config = here / "default-2-base" / "bc" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(seconds=90)))
    text = stored("thirty-tasks", *runs)
    (runs[0] / "value" / "calibration.csv").unlink()  # of a discount at which no episode has a complete return
    assert stored("thirty-tasks", *runs) == text
    names = "EVOR | `base` backup | published target | scalar critic | QC, chunks of 5"
    assert f"| default task | {names} |" in text and "five tasks" not in text
    rates = re.search(r"\| cube-double-play \| (.*) \|$", text.splitlines()[-1])[1].split(" | ")
    assert [cell.split()[0] for cell in rates] == ["80%", "30%", "20%", "50%", "10%"]
    assert "| all 2 tasks |  |  |  |  |  | **60%" in text
    assert "|  | 80% | 40% |  |  | **60%" in text and "74% (DSRL, chunks of 5)" in text and "| 2 + ? |" in text
    for task, solved in ((1, 10), (4, 5), (5, 6)):  # both methods on all five
        runs.append(make_run(here / f"default-{task}", made["default-2"][0], solved=solved, task=task))
    runs += [make_run(here / f"base-{task}", made["base"][0], solved=task, task=task) for task in (1, 3, 4, 5)]
    text = stored("thirty-tasks", *runs)
    assert "| five tasks | EVOR | `base` backup |" in text
    last = re.search(r"\| cube-double-play \| (.*) \|$", text.splitlines()[-1])[1].split(" | ")
    assert [cell.split()[0] for cell in last] == ["66%", "32%"]
    other = make_run(here / "other", evor_value.Args(next_action="softmax", steps=7), solved=1)
    with pytest.raises(UserError, match="differ in steps"):
        stored("thirty-tasks", *runs, other)
    scaled = evor_value.Args(next_action="softmax", noise_scale=0.3, first_seed=1)
    with pytest.raises(UserError, match="differ in noise_scale, which the table hides"):
        stored("thirty-tasks", *runs, make_run(here / "scaled", scaled, solved=1))
    elsewhere = [here / "default-2", here / "base-3"]
    assert "five tasks" not in stored("thirty-tasks", *elsewhere)  # a method that did not run on the default task


def test_success_of_one_setting_in_all_environments(here: Path):
    counts = [("a", 1, 1, 1), ("a", 1, 16, 4), ("a", 2, 1, 0), ("a", 2, 16, 4), ("b", 1, 1, 3), ("b", 1, 16, 2)]
    frame = rows.frame(
        dict(env=env, task=task, num_actions=n, return_temperature=0.3, action_temperature=0.0, solved=k, episodes=4)
        for env, task, n, k in counts
    )
    place = rows.Place(here, "thirty-tasks/num_actions", here)
    text = relative.draw([frame], place)
    lines = ["| a | 12% | 100% |", "| b | 75% | 50% |", "| mean of all | 44% | 75% |"]
    assert text.splitlines()[2:] == lines
    assert place.path("figure.png").stat().st_size > 0
    of_environments = frame.assign(noise_scale=frame["env"])  # may have lambdas of their own
    assert relative.draw([of_environments], place).splitlines()[2:] == lines
    lambdas = frame.assign(noise_scale=["0.3", "1"] * 3)
    with pytest.raises(UserError, match="must be swept, not num_actions, noise_scale"):
        relative.draw([lambdas], place)
    with pytest.raises(UserError, match="must be swept, not none"):
        relative.draw([frame[frame["num_actions"] == "1"]], place)
