"""Locks: one at a time, taken over from the dead at once, never stolen from another machine."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from autossl.data import locks
from autossl.data.locks import Holder, hold, holder_of
from autossl.data.problems import InvalidInput

HOLD = """
import sys, time
from pathlib import Path
from autossl.data.locks import hold
sys.argv[0] = "/usr/bin/autossl_train"
with hold(Path({path!r}), "fold 0"):
    print("held", flush=True)
    {then}
    time.sleep(60)
"""
WORKER = """import os
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)"""


@contextmanager
def another_process(path: Path, then: str = "") -> Iterator[subprocess.Popen[str]]:
    code = HOLD.format(path=str(path), then=then)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def problem_of(path: Path, **options: float) -> str:
    with pytest.raises(InvalidInput) as caught, hold(path, "fold 0", **options):
        pass
    return str(caught.value)


def test_a_live_process_keeps_its_lock_and_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    with another_process(path) as process:
        said = problem_of(path)
        assert f"autossl_train (process {process.pid} on {os.uname().nodename}, since {time.strftime('%Y')}" in said
        assert "works on fold 0" in said
        assert str(path) in said
        assert holder_of(path) == Holder(**json.loads(path.read_text()))
    assert holder_of(path) is None


def test_a_killed_process_frees_its_lock_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    with another_process(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert path.exists()
        with caplog.at_level(logging.INFO), hold(path, "fold 0") as descriptor:
            assert descriptor is not None
    assert f"taking over from autossl_train (process {process.pid}" in caplog.text
    assert not path.exists()


def test_a_worker_that_outlives_its_command_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another_process(path, WORKER) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
        process.wait()
        try:
            with hold(path, "fold 0"):
                os.kill(worker, 0)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_fork_that_leaves_the_block_takes_nothing_away(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def leave() -> None:
        block.__exit__(None, None, None)

    block = hold(path, "fold 0")
    with block:
        child = multiprocessing.get_context("fork").Process(target=leave)
        child.start()
        child.join()
        assert child.exitcode == 0
        assert path.exists()
        problem_of(path)


def test_released_locks_leave_no_file_and_no_folder(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with hold(tmp_path / "there" / "new" / "newer" / "lock", "fold 0"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_it_waits_for_as_long_as_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lock"
    with another_process(path, "time.sleep(0.3)\n    raise SystemExit"), caplog.at_level(logging.INFO):
        began = time.monotonic()
        with hold(path, "fold 0", wait_s=30):
            assert time.monotonic() - began < 10
    assert "waiting for autossl_train" in caplog.text


def elsewhere() -> Holder:
    return replace(Holder.this_process(), host="node17", boot="another", pid=1)


def test_a_lock_of_another_machine_is_named_and_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(elsewhere())))
    said = problem_of(path)
    assert "process 1 on node17" in said
    assert "delete the file" in said
    assert path.read_text() == json.dumps(asdict(elsewhere()))
    path.unlink()
    with hold(path, "fold 0"):
        pass


@pytest.mark.parametrize("change", [{"host": "container-before"}, {"boot": "before the power cut"}])
def test_containers_of_this_machine_and_its_last_boot_are_no_other_machines(
    tmp_path: Path, change: dict[str, str]
) -> None:
    if not Holder.this_process().boot:
        pytest.skip("this system does not say which boot it is")
    path = tmp_path / "lock"
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), **change))))
    with hold(path, "fold 0"):
        pass


def test_a_cut_off_record_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text('{"pid": 1, "ho')
    with hold(path, "fold 0"):
        assert Holder(**json.loads(path.read_text())).pid == os.getpid()


# ---------------------------------------------------------------------------------------------- drives without locks


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("no_flock")
def test_a_drive_without_locks_is_said_and_process_numbers_decide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    with hold(path, "fold 0"):
        assert "knows no locks (No locks available)" in caplog.text
        assert f"process {os.getpid()}" in problem_of(path)
    ended = subprocess.Popen([sys.executable, "-SEc", ""])
    ended.wait()
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), pid=ended.pid))))
    with hold(path, "fold 0"):
        pass
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), started="1"))))  # the number came again
    with hold(path, "fold 0"):
        pass
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), boot="before the power cut"))))
    with hold(path, "fold 0"):
        pass
    path.write_text(json.dumps(asdict(elsewhere())))
    assert "node17" in problem_of(path)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", refuse)
    said = problem_of(tmp_path / "lock")
    assert "cannot be made (Read-only file system)" in said
    assert "--workspace" in said


@pytest.mark.parametrize("name", ["file/lock", "file/folder/lock"])
def test_a_place_that_cannot_hold_a_folder_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "the lock cannot be made" in problem_of(tmp_path / name)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("data")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"), hold(tmp_path / "lock", "fold 0"):
        pass
    assert precious.read_text() == "data"
