"""Files appear whole or not at all, and a full disk is called a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from autossl.data.files import KILL_AT, PARTIAL, REMOVING, atomic_write, remove_folder, remove_remnants, replace_folder

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


def test_at_the_point_that_is_asked_for_the_process_ends_and_nothing_is_half(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nfrom autossl.data.files import append_text, write_json\n"
        "write_json(Path(sys.argv[1]) / 'a.json', 1)\nappend_text(Path(sys.argv[1]) / 'log', 'line')\n"
    )
    found = []
    for point in range(1, 10):
        folder = tmp_path / str(point)
        folder.mkdir()
        call = [sys.executable, "-P", "-c", script, str(folder)]
        ended = subprocess.run(call, env=os.environ | {KILL_AT: str(point)}, start_new_session=True, check=False)
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(PARTIAL))
        found.append((ended.returncode, names))
    killed = -signal.SIGKILL
    json_only, both = ["a.json"], ["a.json", "log"]
    assert found == [(killed, [])] * 3 + [(killed, json_only)] * 3 + [(killed, both)] * 2 + [(0, both)]


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    staged, target, aside = (tmp_path / name for name in ("staged", "deep/target", "aside"))
    (staged / "new").mkdir(parents=True)
    (target / "old").mkdir(parents=True)
    original = Path.rename

    def failing(self: Path, to: Path) -> Path:
        if self == staged:
            raise kind
        return original(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(kind):
            replace_folder(staged, target, aside)
    assert (target / "old").is_dir()
    replace_folder(staged, target, aside)
    assert ([p.name for p in target.iterdir()], [p.name for p in aside.iterdir()]) == (["new"], ["old"])


def test_a_removed_folder_is_gone_and_remnants_too(tmp_path: Path) -> None:
    (tmp_path / "run" / "fold_0").mkdir(parents=True)
    (tmp_path / "run" / "fold_0" / "weights").write_text("")
    (tmp_path / "run" / f"{REMOVING}1-fold_1" / "deep").mkdir(parents=True)
    (tmp_path / "run" / f"{PARTIAL}7-weights").write_text("")
    (tmp_path / "run" / "run.json").write_text("{}")
    remove_folder(tmp_path / "run" / "fold_0")
    remove_folder(tmp_path / "run" / "fold_5")
    assert not (tmp_path / "run" / "fold_0").exists()
    remove_remnants(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
