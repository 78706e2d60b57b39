"""Every command of the pages and of the scripts' docstrings parses, so that none of their flags is made up, and none of
them changes a stored row. The Python of the README runs."""

import importlib
import re
import shlex
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evor_bc
import evor_value
from common.cli import parse_args
from common.data.files import load_trajectories
from experiments.run import shell
from experiments.table import EXPERIMENTS
from tests.helpers import tiny_dataset

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    """Lines that run Python, continuation lines joined, comments and what follows a pipe or `&&` left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"python3? ((?:-m )?[\w./]+[^\n`|&#;]*)", joined)
    others = ("venv", "pytest", "-c ", "-m tests.fuzz")  # whose flags are not ours
    return [f.strip() for f in found if "$" not in f and not any(other in f for other in others)]


def all_commands() -> list[str]:
    docs = sorted(set(ROOT.glob("docs/*.md")) - {ROOT / "docs" / "extending.md"})  # whose commands test_docs.py runs
    pages = ROOT / "README.md", ROOT / "CONTRIBUTING.md", *docs
    texts = [path.read_text() for path in (*pages, *sorted(ROOT.glob("results/**/*.md")))]
    modules = [
        path.read_text()
        for path in sorted([*ROOT.glob("evor_*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("common/*/*.py")])
    ]
    texts += [re.match(r'"""(.*?)"""', text, re.S)[1] for text in modules if text.startswith('"""')]
    return sorted({c for text in texts for c in commands(text)})


def parse(command: str) -> Any:
    words = shlex.split(command)
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    argv = words[2:] if words[0] == "-m" else words[1:]
    script = importlib.import_module({"common.data": "common.data.describe"}.get(module, module))
    if module.startswith("examples."):
        assert not argv  # it takes none
        return None
    return parse_args(script.Args, getattr(script, "PRESETS", {}), argv)


def changes_rows(args: Any) -> bool:
    """Whether a command writes rows or films to `results/`. (Tables drawn from the stored rows change no row.)"""
    paths = [Path(getattr(args, name, None) or "elsewhere") for name in ("out", "video", "run_dir")]
    rows_anew = getattr(args, "update", False) and getattr(args, "runs", True)
    return bool(rows_anew) or any((ROOT / path).is_relative_to(ROOT / "results") for path in paths)


@pytest.mark.parametrize("command", all_commands())
def test_command_parses_and_changes_no_stored_row(command: str):
    assert not changes_rows(parse(command))


def test_no_experiment_changes_a_stored_row():
    table = [command for commands in EXPERIMENTS.values() for command in commands]
    assert len(table) > 100
    assert [command for command in table if changes_rows(parse(shell(command).removeprefix("python ")))] == []


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("-m experiments.draw --update", False),
        ("-m experiments.draw tasks --runs runs/a", False),
        ("-m experiments.draw tasks --runs runs/a --update", True),
        ("-m benchmarks.candidates --run-dir runs/a", False),
        ("-m benchmarks.candidates --run-dir runs/a --out results/candidates/rows.csv", True),
        ("-m benchmarks.base_policy --env cube-double-play --out results/base_policy/schedule.csv", True),
        ("-m benchmarks.speed", False),
        ("-m benchmarks.speed --out results/speed", True),
        ("evor_infer.py --env cube-double-play --video results/candidates/film.gif", True),
    ],
)
def test_what_changes_a_stored_row(command: str, changes: bool):
    assert changes_rows(parse(command)) == changes


def test_the_commands_are_found():
    """The README names each script at least once; if this pattern finds none, the test above tests nothing."""
    found = " ".join(all_commands())
    for script in ("evor_bc.py", "evor_value.py", "evor_infer.py", "common.data.collect", "benchmarks.return_law"):
        assert script in found


def test_links_lead_to_files():
    links = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("results/**/*.md"), *ROOT.glob("docs/*.md")):
        text = page.read_text()
        links += [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)]
        links += [ROOT / link for link in re.findall(r"`(results/[^`*]+)`", text)]
    assert len(links) > 40 and [link for link in links if not link.exists()] == []


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On two steps of training, in the place that it names: fails if a name or an argument in it is made up."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    data = tiny_dataset(tmp_path / "data.npz", observation_dim=28, action_dim=5, rewards=False)
    with np.load(data) as arrays:
        np.savez(data, **arrays, qpos=np.zeros((len(arrays["actions"]), 21)))  # all states of the arm the same
    common = dict(env="cube-single-play", dataset=data, width=16, depth=2, batch_size=8, steps_per_call=2, steps=2)
    evor_bc.main(evor_bc.Args(**common))
    evor_value.main(evor_value.Args(**common, tasks=(2,), num_next_actions=1, eval_episodes=0))
    names = dict(observations=np.zeros((3, 28), np.float32))
    for block in blocks:
        exec(block, names)
    assert names["actions"].shape == (3, 1, 5) and names["returns"].shape == (3, 64)


@pytest.mark.slow
def test_ones_own_data_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The two programs of docs/data.md: one writes two episodes, of six and four steps, as their table says; the other
    acts, in an episode that ends within a chunk, with actions in the environment's units."""
    convert, act = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    low, high, rng = np.array([0.0, -4.0]), np.array([2.0, 4.0]), np.random.default_rng(0)
    episodes = [
        dict(observations=rng.normal(size=(n + 1, 3)), actions=rng.uniform(low, high, (n, 2)), rewards=rng.random(n))
        for n in (6, 4)
    ]
    for episode, reached in zip(episodes, (True, False), strict=True):
        episode["terminated"] = reached
    exec(convert, dict(episodes=episodes, low=low, high=high))
    data = load_trajectories(Path("my.npz"), env="my-robot", tasks=(0,))
    assert np.flatnonzero(data.terminals).tolist() == [6, 11] and np.flatnonzero(data.masks[0] == 0).tolist() == [5, 6]
    np.testing.assert_allclose(data.rewards[0, :6], episodes[0]["rewards"], rtol=1e-6)
    np.testing.assert_allclose(low + (data.actions[7:11] + 1) / 2 * (high - low), episodes[1]["actions"], rtol=1e-5)
    common = dict(env="my-robot", dataset=Path("my.npz"), width=16, depth=2, batch_size=8)
    common |= dict(steps_per_call=2, steps=2, horizon=3)
    evor_bc.main(evor_bc.Args(**common))
    evor_value.main(evor_value.Args(**common, num_next_actions=1, eval_episodes=0))
    actions = []

    def step(action: np.ndarray) -> tuple:
        actions.append(np.asarray(action))
        return np.zeros(3, np.float32), 0.0, len(actions) == 7, False, {}

    env = types.SimpleNamespace(reset=lambda seed: (np.zeros(3, np.float32), {}), step=step)
    exec(act, dict(env=env, low=low, high=high))
    assert [action.shape for action in actions] == [(2,)] * 7
    assert (low <= actions).all() and (actions <= high).all() and np.ptp(actions, axis=0).min() > 0
