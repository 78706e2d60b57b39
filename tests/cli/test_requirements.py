"""The lists of packages agree with each other."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def requirements(name: str) -> list[Requirement]:
    """The packages in a list, without its comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-test.txt"])
def test_the_lock_has_each_package_in_its_range(name: str):
    """Fails if a package is not in requirements.lock, or stands there with a version that is not allowed."""
    locked = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in requirements("requirements.lock")}
    wanted = {canonicalize_name(r.name): r.specifier for r in requirements(name)}
    assert wanted
    missing = [package for package, allowed in wanted.items() if locked.get(package, "0") not in allowed]
    assert missing == []
