"""Every command of the README, docs/ and the scripts' docstrings parses, so that none of their flags is made up."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from common.errors import parse_args

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


def unwrapped(text: str) -> str:
    """Markdown whose `code between backticks` stands on one line."""
    return re.sub(r"(?<!`)`[^`]+`(?!`)", lambda code: code[0].replace("\n", " "), text)


def all_commands() -> list[str]:
    pages = sorted(ROOT.glob("docs/*.md"))  # test_docs.py runs those of extending.md, whose flags are of its diffs
    texts = [unwrapped(page.read_text()) for page in (ROOT / "README.md", *pages) if page.name != "extending.md"]
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
    if not hasattr(script, "Args"):  # a script without flags
        assert argv == []
        return
    parse_args(script.Args, getattr(script, "PRESETS", {}), argv)


def test_the_commands_are_found():
    """The README names each script at least once; if this pattern finds none, the test above tests nothing."""
    found = " ".join(all_commands())
    for script in ("evor_bc.py", "evor_value.py", "evor_infer.py", "common.collect", "benchmarks.return_law", "--list"):
        assert script in found
