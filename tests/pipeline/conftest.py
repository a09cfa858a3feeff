"""A planned phantom dataset, and a stand-in trainer that copies its folds from finished runs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from untrained_experiment import finish_runs, plan_phantom

from autossl.data.workspace import Workspace
from autossl.pipeline import child, engine

FAKE = Path(__file__).resolve().parents[1] / "fake_train.py"

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; waiting for a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Plans and split, nothing else."""
    return plan_phantom(tmp_path_factory.mktemp("experiment"))


@pytest.fixture
def workspace(planned: Workspace, tmp_path: Path) -> Workspace:
    """A copy to work in."""
    return Workspace(shutil.copytree(planned.root, tmp_path / "workspace"))


@pytest.fixture(scope="session")
def finished(planned: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the stand-in trainer."""
    return finish_runs(planned, tmp_path_factory.mktemp("finished") / "workspace")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: Path) -> Callable[[], list[dict]]:
    """Puts the stand-in in the place of `autossl_train`; gives its calls that came to their end."""
    script = tmp_path / "stand_in.py"
    script.write_text(
        "import runpy, sys, threading\n"
        f"watch = runpy.run_path({child.__file__!r})['end_with_parent']\n"
        "threading.Thread(target=watch, args=(int(sys.argv[1]),), daemon=True).start()\n"
        f"sys.argv = sys.argv[2:]\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(
        engine, "child_words", lambda pipe, words: [sys.executable, "-SE", str(script), str(pipe), *words]
    )
    monkeypatch.setattr(engine, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(engine, "REPORT_EVERY_S", 0.0)
    monkeypatch.setenv("FAKE_FINISHED", str(finished))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.setenv("FAKE_SECONDS", "0.001")
    path = tmp_path / "calls.jsonl"
    return lambda: [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
