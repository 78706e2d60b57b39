"""Every command of README.md, CONTRIBUTING.md and the scripts' docstrings parses: no flag in them is made up.

The Python of the README runs.
"""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import evor_bc
import evor_value
from common.errors import parse_args
from tests.helpers import tiny_dataset

ROOT = Path(__file__).parent.parent
VARIABLES = {  # of results/*.sh
    "$target": "paper", "$backup": "base", "$velocities": "6 7 8", "$K": "2", "$width": "32", "$depth": "2",
    "$flags": "--next-action dataset", "$name": "dataset", "$size": "--width 16",
    "$critic": "qr", '"${probes[@]:0:2}"': "chain", '"${probes[@]}"': "chain",
}  # fmt: skip


def commands(text: str) -> list[str]:
    """Lines that run Python, continuation lines joined, comments and what follows a pipe or `&&` left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"python3? ((?:-m )?[\w./]+[^\n`|&#;]*)", joined)
    others = ("venv", "pytest", "-c ", "-m tests.fuzz")  # whose flags are not ours
    return [f.strip() for f in found if not any(other in f for other in others)]


def with_assignments(script: str) -> str:
    """A shell script with its `name="..."` put in where they are used."""
    values: dict[str, str] = {}
    lines = []
    for line in script.splitlines():
        if assigned := re.match(r'\s*(\w+)="(.*)"$', line):
            values[f"${assigned[1]}"] = assigned[2]
        for name, value in values.items():
            line = re.sub(rf"{re.escape(name)}\b", lambda _, value=value: value, line)
        lines.append(line)
    return "\n".join(lines)


def all_commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]
    texts += [with_assignments(path.read_text()) for path in sorted(ROOT.glob("results/*.sh"))]
    modules = [path.read_text() for path in sorted([*ROOT.glob("evor_*.py"), *ROOT.glob("*/*.py")])]
    texts += [re.match(r'"""(.*?)"""', text, re.S)[1] for text in modules if text.startswith('"""')]
    return sorted({c for text in texts for c in commands(text)})


@pytest.mark.parametrize("command", all_commands())
def test_command_parses(command):
    for variable, value in VARIABLES.items():
        command = command.replace(variable, value)
    assert "$" not in command
    words = shlex.split(command)
    module = words[1] if words[0] == "-m" else words[0].removesuffix(".py").replace("/", ".")
    argv = words[2:] if words[0] == "-m" else words[1:]
    script = importlib.import_module({"common.data": "common.report"}.get(module, module))
    parse_args(script.Args, getattr(script, "PRESETS", {}), argv)


def test_the_commands_are_found():
    """The README names each script at least once; if this pattern finds none, the test above tests nothing."""
    found = " ".join(all_commands())
    for script in ("evor_bc.py", "evor_value.py", "evor_infer.py", "common.collect", "benchmarks.return_law"):
        assert script in found


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On two steps of training, in the place that it names: fails if a name or an argument in it is made up."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    data = tiny_dataset(tmp_path / "data.npz", observation_dim=28, action_dim=5, rewards=False)
    with np.load(data) as arrays:
        np.savez(data, **arrays, qpos=np.zeros((len(arrays["actions"]), 21)))  # all states of the arm the same
    common = dict(env="cube-single-play", dataset=data, width=16, depth=2, batch_size=8, chunk=2, steps=2)
    evor_bc.main(evor_bc.Args(**common))
    evor_value.main(evor_value.Args(**common, tasks=(2,), num_next_actions=1, eval_episodes=0))
    names = dict(observations=np.zeros((3, 28), np.float32))
    for block in blocks:
        exec(block, names)
    assert names["actions"].shape == (3, 1, 5) and names["returns"].shape == (3, 64)
