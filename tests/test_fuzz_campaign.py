"""A sample of the fuzz campaign: spoiled inputs of every kind end in success or in a message and touch nothing more."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz_campaign.py"
INPUTS = 24
"""Two of each place in the cycle of kinds."""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


def load(name: str) -> ModuleType:
    path = SCRIPT.parent / "fuzzing" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"fuzzing_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def campaign(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder / "work"), *options]
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200, env=kept)


def test_a_sample_has_no_fault_and_most_of_it_comes_past_the_reader(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    done = campaign(tmp_path, "--inputs", str(INPUTS), "--seed", "1", "-o", str(summary))
    assert summary.is_file(), done.stdout + done.stderr
    content = json.loads(summary.read_text())
    assert content["faults"] == []
    assert done.returncode == 0
    assert content["sound files unchanged"]
    assert content["inputs"] == INPUTS
    assert content["share past the reader"] >= 0.5
    assert set(content["ends"]) <= {"done", "refused"}
    assert all(sum(stages.values()) for stages in content["by kind and stage"].values())
    assert len((tmp_path / "work" / "inputs.jsonl").read_text().splitlines()) == INPUTS


def test_mutations_can_be_made_again_and_change_what_they_are_given(tmp_path: Path) -> None:
    import numpy as np

    mutations = load("mutations")
    sound = json.dumps({"a": [1, 2, {"b": "text"}], "c": 0.5}).encode()
    made = [mutations.mutated_json(sound, np.random.default_rng([0, number]))[0] for number in range(50)]
    again = [mutations.mutated_json(sound, np.random.default_rng([0, number]))[0] for number in range(50)]
    assert made == again
    assert sum(content != sound for content in made) > 45
    assert len(set(made)) > 30


def test_the_watch_sees_what_is_written_elsewhere_and_what_is_called(tmp_path: Path) -> None:
    """In a process of its own: a watch is never taken off again."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    program = f"""
import os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from pathlib import Path
from fuzzing.trial import Watch
watch = Watch(Path({str(inside)!r}))
sys.addaudithook(watch)
Path({str(inside / "fine")!r}).write_text("x")
assert not watch.outside, watch.outside
Path({str(outside)!r}).write_text("x")
os.rename({str(inside / "fine")!r}, {str(tmp_path / "moved")!r})
os.system("true")
print(len(watch.outside), len(watch.executed))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=dict(os.environ), check=False
    )
    assert done.stdout.split() == ["2", "1"], done.stderr


def test_the_page_on_security_has_the_figures_of_the_campaign() -> None:
    page = load("page")
    results = SCRIPT.parent / "results" / "fuzz_campaign.json"
    block = page.BLOCK.search((SCRIPT.parents[1] / "SECURITY.md").read_text(encoding="utf-8"))
    assert block is not None
    made = results.exists()
    assert block[0] == (page.figures(json.loads(results.read_text(encoding="utf-8"))) if made else "")
