"""Lines of a training log: whole ones stay, damaged ones are named, lost ones are counted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from autossl.trainers.training_log import TrainingLog


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; waiting for a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def write_lines(folder: Path, steps: range) -> Path:
    log = TrainingLog(folder)
    for step in steps:
        log.write({"step": step, "losses": {"supervised": step / 7}})
    return log.path


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = write_lines(tmp_path, range(1, 4))
    assert TrainingLog.read(path) == [{"step": step, "losses": {"supervised": step / 7}} for step in (1, 2, 3)]
    assert all("checksum" in json.loads(line) for line in path.read_text().splitlines())


def test_what_lies_beyond_the_step_of_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    path = write_lines(tmp_path, range(1, 6))
    before = path.read_text().splitlines()
    TrainingLog(tmp_path, resume_step=3, n_lines=3)
    assert path.read_text().splitlines() == before[:3]


@pytest.mark.parametrize("damage", ["flipped", "zeroed", "cut off"])
def test_a_damaged_line_is_named_and_counted(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path, range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    spoiled = {
        "flipped": lines[1].replace(b"0.28", b"0.29"),
        "zeroed": bytes(len(lines[1]) - 1) + b"\n",
        "cut off": lines[1][:20] + b"\n",
    }[damage]
    assert spoiled != lines[1]
    path.write_bytes(lines[0] + spoiled + lines[2])
    TrainingLog(tmp_path, resume_step=3, n_lines=3)
    assert f"{path}: line 2 is damaged" in caplog.text
    assert f"{path}: 1 of 3 lines are lost" in caplog.text
    assert path.read_bytes() == lines[0] + lines[2]


def test_lines_without_checksum_of_earlier_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"no step": 1}\n')
    assert TrainingLog.read(tmp_path / "log.jsonl") == [{"step": 1}]
