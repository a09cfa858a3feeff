"""Checkpoints are read back before they count; the one before stays; damage is named, and the run goes on or stops."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from autossl.data.problems import InvalidInput
from autossl.inference.checkpoint import read_checkpoint
from autossl.trainers import checkpoints
from autossl.trainers.checkpoints import read_newest, write_checkpoint, write_final, write_latest


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; waiting for a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def state(step: int) -> dict:
    return {"networks": {"network": {"weight": torch.full((50,), float(step))}}, "progress": {"step": step}}


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((2,), 2.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)


def step_of(folder: Path) -> int:
    newest = read_newest(folder)
    assert newest is not None
    return int(newest["progress"]["step"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_last_two_stay_until_the_fold_is_finished(tmp_path: Path) -> None:
    assert read_newest(tmp_path) is None
    for step in (1, 2, 3):
        write_latest(tmp_path, state(step))
    assert step_of(tmp_path) == 3
    assert read_checkpoint(tmp_path / "checkpoint_previous.pth")["progress"]["step"] == 2
    write_final(tmp_path, state(4))
    assert names(tmp_path) == {"checkpoint_final.pth"}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "zeroed", "directory", "gone"])
def test_a_run_goes_on_from_the_one_before_where_the_latest_is_damaged(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_latest(tmp_path, state(1))
    write_latest(tmp_path, state(2))
    latest = tmp_path / "checkpoint_latest.pth"
    content = latest.read_bytes()
    if damage == "flipped":
        flip_a_bit(latest)
    elif damage == "truncated":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "zeroed":
        latest.write_bytes(bytes(len(content)))
    elif damage == "directory":  # one bit of the size of an entry: several faults at once
        damaged = bytearray(content)
        damaged[content.index(b"PK\1\2") + 22] ^= 64
        latest.write_bytes(damaged)
    else:  # a kill between the two renames
        latest.unlink()
    assert step_of(tmp_path) == 1
    if damage != "gone":
        assert f"{latest}: " in caplog.text
        assert "going on from checkpoint_previous.pth" in caplog.text
    write_latest(tmp_path, state(3))  # the damaged one does not take the place of the good one
    flip = tmp_path / "checkpoint_latest.pth"
    flip.write_bytes(flip.read_bytes()[:-9])
    assert step_of(tmp_path) == 1
    write_final(tmp_path, state(4))
    assert names(tmp_path) == {"checkpoint_final.pth"}


def test_where_both_are_damaged_it_stops_with_what_to_do(tmp_path: Path) -> None:
    write_latest(tmp_path, state(2))
    write_latest(tmp_path, state(2))
    for name in ("latest", "previous"):
        flip_a_bit(tmp_path / f"checkpoint_{name}.pth")
    with pytest.raises(InvalidInput, match="--overwrite") as caught:
        read_newest(tmp_path)
    assert [problem.file for problem in caught.value.problems] == [
        tmp_path / "checkpoint_latest.pth",
        tmp_path / "checkpoint_previous.pth",
    ]
    assert all("checksum" in problem.found for problem in caught.value.problems)


def test_what_cannot_be_read_back_does_not_replace_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_latest(tmp_path, state(1))
    write_latest(tmp_path, state(2))
    monkeypatch.setattr(checkpoints, "sync_file", flip_a_bit)  # what came to the disk is not what was written
    with pytest.raises(OSError, match="cannot be read back") as caught:
        write_latest(tmp_path, state(2))
    assert caught.value.errno == errno.EIO
    assert names(tmp_path) == {"checkpoint_latest.pth", "checkpoint_previous.pth"}
    assert step_of(tmp_path) == 2


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one.pth", state(1))
    write_checkpoint(tmp_path / "other.pth", state(1))
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "other.pth").read_bytes()
