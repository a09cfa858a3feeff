"""Every fault of the corpus in `bad_datasets` gives one message and code 2, and leaves the workspace as it was."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest
from bad_datasets import ENDING, FAULTS, NAME, NOISE, ORGAN, SIZE, image_of, label_of, write_dataset, write_image

from autossl.cli.plan_and_preprocess import main
from autossl.data.files import read_json


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.planners.foreground.DRAWS_IN_ALL", 10_000)


def content_of(folder: Path) -> dict[str, str]:
    """Every entry below a folder, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        small = path.is_file() and path.stat().st_size < 2**24
        found[os.fsencode(path).hex()] = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
    return found


def plan(workspace: Path, *options: str) -> int:
    return main(["-d", "1", "--workspace", str(workspace), "-np", "0", *options])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_and_nothing_is_written(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fault, workspace = FAULTS[name], tmp_path / "workspace"
    fault.put_into(write_dataset(workspace / "raw" / NAME))
    before = content_of(workspace)
    assert plan(workspace) == 2
    told = capsys.readouterr().err
    assert re.search(fault.message, told), told
    assert fault.file in told
    assert "Expected: " in told
    assert "What to do: " in told
    assert "Traceback" not in told
    assert not re.search("What to do: .*Expected: ", told), "a message inside of a message"
    assert all(sign.isprintable() or sign == "\n" for sign in told)
    assert content_of(workspace) == before


def test_what_is_odd_but_clear_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_dataset(tmp_path / "raw" / NAME)
    sheared = np.eye(4)
    sheared[0, 1] = 0.1
    for kind, case in ((np.int64, "int64"), (np.uint64, "uint64"), (np.float64, "float64"), (np.uint8, "Ünïcode 图")):
        write_image(image_of(folder, case), NOISE, sheared if case == "int64" else None)
        write_image(label_of(folder, case), ORGAN.astype(kind), sheared if case == "int64" else None)
    image_of(folder, "a").write_bytes(nibabel.load(image_of(folder, "a")).to_bytes())  # no gzip in spite of the name
    write_image(image_of(folder, "slice"), NOISE[:1])
    write_image(label_of(folder, "slice"), ORGAN[:1])
    linked = folder / "imagesUn" / f"inner_0000{ENDING}"
    linked.symlink_to(image_of(folder, "b"))
    assert plan(tmp_path, "--no_preprocessing") == 0
    cases = read_json(tmp_path / "preprocessed" / NAME / "fingerprint.json")["cases"]
    assert "sheared axes, 5.7 degrees off" in str(cases["int64"]["warnings"])
    assert "labels stored as float64" in str(cases["float64"]["warnings"])
    assert cases["slice"]["shape_zyx"] == [1, SIZE, SIZE]
    assert {"uint64", "inner", unicodedata.normalize("NFC", "Ünïcode 图")} <= set(cases)
    assert "Traceback" not in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "raw" / NAME)
    before = content_of(tmp_path)

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions would not stop the superuser
    assert plan(tmp_path) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "preprocessed") in told
    assert os.strerror(errno.EROFS) in told
    assert "What to do: " in told
    assert content_of(tmp_path) == before


def test_a_disk_without_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "raw" / NAME)
    before = content_of(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert plan(tmp_path) != 0
    assert "the disk is full" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "preprocessed").rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert content_of(tmp_path / "raw") == {key: before[key] for key in content_of(tmp_path / "raw")}
    assert plan(tmp_path, "--no_preprocessing") == 0
