"""Files appear whole or not at all, and a full disk is called a full disk."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from autossl.data.files import atomic_write

Usage = namedtuple("Usage", "total used free")


def fail_while_writing(path: Path) -> None:
    with atomic_write(path) as partial:
        partial.write_text("half")
        raise RuntimeError("Error while creating the NDArray")


def test_a_file_appears_with_its_whole_content(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "new" / "file.nii.gz") as partial:
        assert partial.name.endswith("file.nii.gz")
        partial.write_text("whole")
        assert not (tmp_path / "new" / "file.nii.gz").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.nii.gz"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match="NDArray"):
        fail_while_writing(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_writer_that_fails_on_a_full_disk_is_reported_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, 4096))
    with pytest.raises(OSError, match=str(tmp_path / "file")) as caught:
        fail_while_writing(tmp_path / "file")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
