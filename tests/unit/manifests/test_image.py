"""The image recipe: a linter's opinion, and that what it copies is there and nothing else is sent to the builder."""

import glob
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from tests.unit.manifests.rendered import ROOT

DOCKERFILE = ROOT / "cluster" / "image" / "Dockerfile"


def hadolint(text: str) -> list[str]:
    """Codes of the rules that a Dockerfile breaks."""
    linter = Path(sys.executable).with_name("hadolint")
    said = subprocess.run(
        [linter, "--format", "json", "-"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return [problem["code"] for problem in json.loads(said.stdout)]


def test_the_linter_finds_nothing() -> None:
    text = DOCKERFILE.read_text()
    assert hadolint(text) == []
    assert hadolint(text.replace("COPY pyproject", "CPY pyproject")) == ["DL1000"]
    assert "DL3006" in hadolint(re.sub(r"(?m)^FROM python:\S+", "FROM python", text))


def test_the_base_is_pinned_and_nothing_runs_as_root() -> None:
    text = DOCKERFILE.read_text()
    version = re.search(r"(?m)^FROM python:(\d+\.\d+)\.\d+-slim-bookworm$", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version[1])
    assert text.index("\nUSER 1000:1000\n") > text.rindex("\nRUN ")
    assert not re.search(r"(?i)NVIDIA_VISIBLE_DEVICES", text)  # it would show every card of a node to pods without one


def test_torch_and_ray_are_versions_that_the_project_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {(r := Requirement(text)).name: r.specifier for text in project["dependencies"]}
    for name in ("torch", "ray"):
        version = re.search(rf"(?m)^ARG {name.upper()}_VERSION=(\S+)$", DOCKERFILE.read_text())
        assert version
        assert version[1] in wanted[name]


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    copied = {source for line in re.findall(r"(?m)^COPY (.+) \S+$", DOCKERFILE.read_text()) for source in line.split()}
    everything, *lines = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert everything == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_the_packages_hold_every_file_that_the_code_reads() -> None:
    """What is not Python goes into an installed package only where pyproject.toml says so."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for room in ("serve_app", "deployments"):
        folder = ROOT / room
        held = {
            name
            for pattern in setup["package-data"].get(room, [])
            for name in glob.glob(pattern, root_dir=folder, recursive=True)  # as setuptools does
        }
        others = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc"))
        assert {str(path.relative_to(folder)) for path in others} <= held
