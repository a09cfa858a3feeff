"""The methods page and the README's table say what the registry says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from autossl.trainers.registry import METHODS

ROOT = Path(__file__).resolve().parents[1]


def test_page_and_table_are_up_to_date() -> None:
    script = ROOT / "docs" / "methods_page.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run python docs/methods_page.py"


def test_every_method_has_a_line_in_the_readme_and_a_section_of_its_own() -> None:
    readme, page = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/methods.md"))
    for name in METHODS:
        assert readme.count(f"| `{name}` |") == 1
        assert page.count(f"\n## {name}\n") == 1
