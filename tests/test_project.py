"""What holds the project together: one version, pins inside the ranges, files that a host reads."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from localization_heads.options.compose import default_choices, option_names
from localization_heads.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0] not in "#-"]
    return {canonical(one.name): one for one in found}


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_the_version_is_the_same_everywhere() -> None:
    """The newest heading of the changelog is this version, or what comes after it."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == __version__


def test_a_user_installs_what_the_package_needs_and_no_more() -> None:
    """Beside the dependencies, two that transformers needs are pinned, since their versions decide what it does."""
    needed = {canonical(Requirement(one).name) for one in PROJECT["dependencies"]}
    assert set(pins("requirements.txt")) - needed == {"tokenizers", "huggingface-hub"}
    assert needed <= set(pins("requirements.txt"))


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_the_pins_lie_in_the_ranges(file: str) -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    ranges = [Requirement(one) for group in groups for one in group]
    for name, pin in pins(file).items():
        (exact,) = pin.specifier
        for one in ranges:
            if canonical(one.name) == name:
                assert one.specifier.contains(exact.version), f"{pin} of {file} lies outside {one}"


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_files_for_the_host_can_be_read(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text()), dict)


def test_the_container_can_be_read() -> None:
    said = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert (ROOT / ".devcontainer" / said["build"]["dockerfile"]).is_file()
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line


def test_the_script_that_reproduces_the_paper() -> None:
    """It needs weights; here, that it can be read, says how it is used, and names options that exist."""
    script = ROOT / "examples" / "reproduce_llava.sh"
    assert subprocess.run(["bash", script], capture_output=True, text=True, check=False).returncode == 2
    calls = re.sub(r"\\\n", " ", script.read_text())
    named = {
        name
        for line in calls.splitlines()
        if "locheads" in line or line.startswith("prepare=")
        for name in re.findall(r"\b([a-z_.]+)=", line.replace("prepare=(", ""))
    }
    assert named <= {*option_names("finder"), *default_choices("finder")}
    assert {"data_file", "num_trials", "dataset_path"} <= named
