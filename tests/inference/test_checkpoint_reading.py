"""Checkpoints that are not whole, not ours or not harmless are refused with a reason."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import write_tiny_run

from autossl.data.problems import InvalidInput
from autossl.inference.checkpoint import FORMAT, read_checkpoint, read_trained_networks


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny_run(tmp_path / "run") / "fold_0" / "checkpoint_final.pth"


def test_a_whole_checkpoint_gives_its_networks_and_prediction(checkpoint: Path) -> None:
    trained = read_trained_networks(checkpoint)
    assert trained.spec.members[0].name == "student"
    assert isinstance(trained.networks["student"], dict | OrderedDict)
    assert "training" not in read_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(checkpoint: Path, share: float) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InvalidInput, match="cannot be read") as caught:
        read_trained_networks(checkpoint)
    assert caught.value.problems[0].file == checkpoint


def test_objects_that_would_be_executed_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pth"
    torch.save({"format": FORMAT, "networks": {}, "surprise": Fraction(1, 2)}, path)
    with pytest.raises(InvalidInput, match="have to be executed"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{"network_weights": {}}, {"format": "autossl-checkpoint-9"}, [1, 2]])
def test_other_formats_are_named(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(InvalidInput, match="format is"):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps({"format": FORMAT}))
    with pytest.raises(InvalidInput, match=r"plain\.pth"):
        read_checkpoint(path)
    with pytest.raises(InvalidInput, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")


@pytest.mark.parametrize(
    "changes, message",
    [({"prediction": {}}, "members"), ({"networks": {"teacher": {}}}, "no weights for network student")],
)
def test_a_checkpoint_without_what_predicts_is_refused(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(read_checkpoint(checkpoint) | changes, checkpoint.with_name("changed.pth"))
    with pytest.raises(InvalidInput, match=message):
        read_trained_networks(checkpoint.with_name("changed.pth"))
