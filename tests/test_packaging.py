"""The wheel holds exactly the modules of the tree, and the README's commands are what they claim to be."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
MAPPED = ("planners", "preprocessing", "trainers", "evaluation")
"""Top-level folders that install below `autossl`."""


def modules_in_tree() -> set[str]:
    files = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "autossl").rglob("*.py")}
    for folder in MAPPED:
        files |= {f"autossl/{path.relative_to(REPOSITORY).as_posix()}" for path in (REPOSITORY / folder).rglob("*.py")}
    return files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source") / "tree"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "dist")
    for folder in ("autossl", *MAPPED):
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignore)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / file, source / file)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(target.glob("*.whl"))


def test_the_wheel_holds_every_module_of_the_tree_and_no_other(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules_in_tree()
    assert "autossl/py.typed" in names
    templates = {path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("evaluation/**/templates/*")}
    assert len(templates) >= 3
    assert {f"autossl/{name}" for name in templates} <= names
    assert {name.split("/")[0] for name in names} == {
        "autossl",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }


def test_every_package_of_the_tree_is_listed() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    assert listed == {name.rpartition("/")[0].replace("/", ".") for name in modules_in_tree() if "/__init__" in name}


def readme_command(marker: str) -> str:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {marker} -->\n```\w*\n(.*?)\n```", text, flags=re.DOTALL)
    assert found is not None, marker
    return found[1]


@pytest.mark.parametrize(("marker", "last"), [("demo command", "autossl_demo"), ("test command", "pytest")])
def test_the_readme_commands_are_single_lines_that_start_from_nothing(marker: str, last: str) -> None:
    command = readme_command(marker)
    assert "\n" not in command
    steps = command.split(" && ")
    assert steps[0].endswith("-m venv .venv")
    assert "-c constraints.txt" in command
    assert steps[-1].split()[0] == f".venv/bin/{last}"


def test_the_constraints_pin_every_direct_dependency() -> None:
    config = ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    wanted = config["options"]["install_requires"].split() + config["options.extras_require"]["dev"].split()
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {re.split(r"[<>=]", name)[0].lower().replace("_", "-") for name in wanted} <= set(pins)
    assert pins["torch"] == "2.13.0"
    assert not any("+" in version for version in pins.values())
