"""What docs/ and examples/ show runs."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import evor_bc
import evor_infer
from common import checkpoint
from common.networks import CriticSpec, FlowPolicy, PolicySpec
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
FLAGS = {
    "A fifth TD target": "--td-target half-shared",
    "A critic of your own": "--critic squashed",
    "Another policy network": "",
}
TRAIN_AND_LOAD = """
import runpy
runpy.run_module("evor_value", run_name="__main__")
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
    assert DIFFS.keys() == FLAGS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("A fifth TD target", "FlowCritic trunk 0 True"),
        ("A critic of your own", "SquashedCritic squashed 0 True"),
        ("Another policy network", "FlowCritic trunk 4 True"),
    ],
)
def test_changes_that_the_docs_show(tmp_path: Path, change: str, says: str):
    """Applied to a copy, they train, and stage 3 loads what was trained."""
    for name in ("common", "evor_bc.py", "evor_value.py", "evor_infer.py", "recipes.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    apply(DIFFS[change], tmp_path)
    tiny_dataset(tmp_path / "data.npz")
    words = f"{SMALL} --policy-steps 20 --num-next-actions 2 {FLAGS[change]}".split()
    command = [sys.executable, "-c", TRAIN_AND_LOAD, *words]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == says


def test_a_program_elsewhere_with_a_package_common_of_its_own(tmp_path: Path):
    """The lines of docs/running.md: the agent acts, and `common` is the program's again."""
    spec = evor_infer.AgentSpec(PolicySpec(3, 2, 8, 2), CriticSpec(3, 2, "mlp", 8, 2), horizon=1, knots=5)
    agents = jax.tree.map(lambda x: x[None], evor_infer.init_agent(spec, key=jax.random.key(0)))
    header = dict(stage="value", env="robot", horizon=1, step=1, args=dict(steps=1), seeds=[0], replicas=[[0, 0]])
    header |= dict(data=dict(name="a", source="file", sha256="c"), model=spec, policy_sha256="")
    checkpoint.save(tmp_path / "run" / "value" / "model.eqx", header, agents)
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("NAME = 'mine'\n")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "running.md").read_text(), re.DOTALL)
    block = block.replace("/path/to/evor/runs/cube-single-play", str(tmp_path / "run"))
    program = f"import common\n{block.replace('/path/to/evor', str(ROOT))}" + (
        "import jax, numpy as np\nimport common as again\n"
        "print(again.NAME, again is common, agent.act(np.zeros((2, 3)), key=jax.random.key(0)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "mine True (2, 1, 2)"


def test_the_array_script_of_a_cluster(tmp_path: Path):
    """With a `python` that writes down what it is called with: the commands of the third environment, in order."""
    (script,) = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "running.md").read_text(), re.DOTALL)
    calls = tmp_path / "calls"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\ncase $2 in experiments.run) exec {sys.executable} "$@";; *) echo "$@" >> {calls};; esac\n'
    )
    python.chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_ARRAY_TASK_ID="2")
    subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, check=True)
    called = [line.split() for line in calls.read_text().splitlines()]
    assert [words[0] for words in called] == ["evor_bc.py", "evor_value.py"]
    assert all(words[-1] == "--resume" and "cube-double-play" in words for words in called)


@pytest.mark.slow
def test_what_is_to_be_copied_stands_alone():
    """The definitions that docs/extending.md lists, and the packages that their files import: fails if one is missing,
    or if one needs more of this repository. The step below the table learns the returns of two states: the first pays
    1 and leads, at a discount of 0.5, to the second, which pays -1 and ends. Without the bootstrap, or with that of
    the same state, they would not be 0.5 and -1."""
    table = EXTENDING.partition("## Copy")[2]
    parts = ["Width = Depth = int"]
    for name, take in re.findall(r"^\| `([\w/]+\.py)` \| (.*) \|$", table, re.MULTILINE):
        text, wanted = (ROOT / name).read_text(), re.findall(r"`(\w+)`", take)
        nodes = ast.parse(text).body
        lines = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        code = [line for line in lines if not re.match(r"(from|import) (common|evor_)", line)]
        named = [(ast.unparse(node), defined_names(node)) for node in nodes]
        assert set(wanted) <= {each for _, names in named for each in names}, name
        code += [line for line, names in named if (names if "whole file" in take else {*names} & {*wanted})]
        parts.append("\n".join(code))
    made: dict = dict(
        returns=np.linspace(-3.0, 1.0, 50), bounds=np.array([-4.0, 2.0]), num_observations=4, num_actions=2
    )
    exec("\n".join(parts[:5]), made)  # the first four rows are the reward model's
    (program,) = re.findall(r"```python\n(.*?)```", table, re.DOTALL)
    exec(program.replace("3e-4", "3e-3").replace("0.005", "0.1"), made)
    jax, jnp, axis = made["jax"], made["jnp"], made["axis"]
    first, last = jnp.tile(jnp.eye(4)[0], (64, 1)), jnp.tile(jnp.eye(4)[1], (64, 1))
    a, ones = jnp.zeros((128, 2)), jnp.ones(64)
    x, next_x = jnp.concatenate([first, last]), jnp.concatenate([last, first])
    batch = x, a, jnp.append(ones, -ones), jnp.append(0.5 * ones, 0 * ones), next_x, a
    state = made["critic"], made["target"], made["opt_state"]
    for i in range(600):
        *state, _ = made["step"](*state, batch, jax.random.key(i))
    drawn = [
        axis.to_environment(state[0].sample(x, a[0], jnp.linspace(-1.0, 1.0, 5), made["ode"])) for x in jnp.eye(4)[:2]
    ]
    np.testing.assert_allclose(np.mean(drawn, axis=1), [0.5, -1.0], atol=0.15)

    exec("\n".join(parts[5:]).replace("evor_infer.", ""), made)
    candidates, noise = jnp.array([[0.0, 0.0], [0.5, -0.5]]), made["stratified_normal"](4)
    of_action = dict(temperature=0.3 * axis.spread, ode=made["ode"])
    scores = [made["score_one"](state[0], axis, x[0], each, noise, **of_action) for each in candidates]
    chosen = made["choose_next_action"](
        state[0], axis, x[0], candidates, noise, return_temperature=0.3, action_temperature=0.0, ode=made["ode"],
        key=jax.random.key(0),
    )  # fmt: skip
    np.testing.assert_array_equal(chosen, candidates[int(np.argmax(scores))])
    policy = made["FlowPolicy"](4, 2, key=jax.random.key(0))
    ours = FlowPolicy(4, 2, key=jax.random.key(0))
    assert made["bc_loss"](policy, x, a, key=jax.random.key(1)) == evor_bc.bc_loss(ours, x, a, key=jax.random.key(1))


def defined_names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines; nothing for an import."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [
        each.id for target in getattr(node, "targets", []) for each in ast.walk(target) if isinstance(each, ast.Name)
    ]


def test_functions_are_short_and_scripts_are_about_the_algorithm():
    """At most 50 lines a function, definitions nested once, 40 lines a main of a script; and no script speaks of what a
    run is made of."""
    folders = "common", "baselines", "benchmarks", "experiments", "examples"
    for path in [*ROOT.glob("*.py"), *(path for name in folders for path in (ROOT / name).rglob("*.py"))]:
        text = path.read_text()
        for node, depth in functions(ast.parse(text)):
            lines = node.end_lineno - node.lineno + 1
            most = 40 if path.parent == ROOT and node.name == "main" else 50
            assert lines <= most and depth < 2, f"{path.name}: {node.name}"
        if path.parent == ROOT:
            assert not re.search(r"\block|\bhost|diverged|Rotation|nonlocal|baselines", text), path.name


def functions(node: ast.AST, depth: int = 0) -> Iterator[tuple[ast.FunctionDef, int]]:
    for child in ast.iter_child_nodes(node):
        inside = isinstance(child, ast.FunctionDef)
        if inside:
            yield child, depth
        yield from functions(child, depth + inside)


@pytest.mark.slow
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
