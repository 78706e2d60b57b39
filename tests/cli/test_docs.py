"""What docs/ and examples/ show runs."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import one_page
from tests.helpers import tiny_dataset

ROOT = Path(__file__).parents[2]
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
DIFFS = {
    section.partition("\n")[0]: block
    for section in EXTENDING.split("\n## ")[1:]
    for block in re.findall(r"```diff\n(.*?)```", section, re.DOTALL)
}
SMALL = "--dataset data.npz --env mine --width 16 --depth 2 --batch-size 8 --steps 20 --steps-per-call 10"
COMMANDS = {
    "A fifth TD target": [f"evor_bc {SMALL}", f"evor_value {SMALL} --num-next-actions 2 --td-target half-shared"],
    "A critic of your own": [f"evor_bc {SMALL}", f"evor_value {SMALL} --num-next-actions 2 --critic squashed"],
    "Another policy network": [f"evor_bc {SMALL}", f"evor_value {SMALL} --num-next-actions 2"],
}
LOAD = """
import jax, numpy as np
from evor_infer import load_agent
agent = load_agent("runs/mine")
returns = agent.sample_returns(np.zeros((2, 3), np.float32), np.zeros((2, 2), np.float32), 4, key=jax.random.key(0))
print(type(agent.critic).__name__, agent.critic.spec.kind, len(agent.policy.mlp.norms), np.isfinite(returns).all())
"""


def apply(diff: str, tree: Path) -> None:
    """Makes the changes of a diff whose hunks have no line numbers: the old lines of each stand once in the file."""
    for name, hunks in re.findall(r"--- a/\S+\n\+\+\+ b/(\S+)\n(.*?)(?=--- a/|\Z)", diff, re.DOTALL):
        text = (tree / name).read_text()
        for hunk in hunks.split("@@\n")[1:]:
            lines = [line for line in hunk.splitlines() if line]
            old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
            new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
            assert text.count(old) == 1, f"{name}: this stands {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        (tree / name).write_text(text)


def test_each_change_has_a_command():
    assert DIFFS.keys() == COMMANDS.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("A fifth TD target", "FlowCritic mlp 0 True"),
        ("A critic of your own", "SquashedCritic squashed 0 True"),
        ("Another policy network", "FlowCritic mlp 2 True"),
    ],
)
def test_changes_that_the_docs_show(tmp_path: Path, change: str, says: str):
    """Applied to a copy, they train, and stage 3 loads what was trained."""
    for name in ("common", "evor_bc.py", "evor_value.py", "evor_infer.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    apply(DIFFS[change], tmp_path)
    tiny_dataset(tmp_path / "data.npz")
    for command in COMMANDS[change]:
        subprocess.run([sys.executable, "-m", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == says


def test_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a part of its steps: laws within 0.2 of the true ones, and the better bet chosen.

    Fails if the law of state 0 is that of one bet, or if the choice is that of the base policy.
    """
    for name, steps in (("BC", 500), ("VALUE", 1_500)):
        settings = dataclasses.replace(getattr(one_page, name), steps=steps, steps_per_call=500)
        monkeypatch.setattr(one_page, name, settings)
    numbers = one_page.draw(one_page.learn(), tmp_path / "one_page.png")
    assert (tmp_path / "one_page.png").stat().st_size > 10_000
    assert 0.35 < numbers["base policy"] < 0.65 and numbers["extracted, N_pi = 16"] > 0.9
    assert all(numbers[name] < 0.2 for name in one_page.LAWS)
