"""Every fault of a user becomes a message and an exit code, without a traceback."""

from __future__ import annotations

import argparse
import errno
import inspect
import logging
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from autossl.cli.options import add_workspace, non_negative
from autossl.cli.overview import COMMANDS
from autossl.cli.run_command import new_parser, run_command
from autossl.data.parallel import WorkerError
from autossl.data.problems import InvalidInput, Problem

INVALID = InvalidInput(Problem("found this", "that", "do so", case="c1"))


class LoadingError(RuntimeError):
    """Known by its name, as what comes from the training loop."""


@pytest.fixture(autouse=True)
def folder_of_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def run_that_raises(error: BaseException, *options: str) -> int:
    def action(arguments: argparse.Namespace) -> None:
        logging.getLogger("autossl.somewhere").debug("what came before")
        raise error

    parser = new_parser("autossl_evaluate")
    add_workspace(parser)
    return run_command(parser, action, list(options))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def noted(error: Exception, doing: str) -> Exception:
    error.add_note(doing)
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (noted(MemoryError("9 GiB"), "while reading case c7"), 1, "smaller preset. It happened while reading case c7."),
        (INVALID, 2, "autossl_evaluate: case c1: found this. Expected: that. What to do: do so."),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y.b2nd"), 1, "the disk is full while writing /x/y.b2nd"),
        (caused(RuntimeError("wrapped"), OSError(errno.EDQUOT, "quota")), 1, "the disk is full. Expected: space"),
        (WorkerError("case_7", "OSError: [Errno 28] No space left"), 1, "the disk is full in the work on case_7"),
        (WorkerError("case_7", "its worker process was killed by SIGKILL"), 1, "case_7: its worker process was killed"),
        (WorkerError("case_7", "its worker process was killed by SIGTERM"), 3, "case_7: its worker process was killed"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "the system refuses access to /x"),
        (MemoryError("32 GiB"), 1, "memory ran out (32 GiB)"),
        (RuntimeError("DefaultCPUAllocator: error 12 (Cannot allocate memory)"), 1, "a smaller preset."),  # torch's
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "memory ran out"),  # of a fork
        (WorkerError("case_7", "PermissionError: [Errno 13] Permission denied: '/x'"), 2, "Permission denied: '/x'"),
        (LoadingError("a loading worker died"), 1, "a loading worker died"),
        (KeyboardInterrupt(), 3, "interrupted"),
        (ZeroDivisionError("3 / 0"), 1, "internal error: ZeroDivisionError (3 / 0). This is a defect of autossl."),
    ],
)
def test_a_fault_becomes_its_exit_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str], folder_of_logs: Path
) -> None:
    assert run_that_raises(error) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    logs = list(folder_of_logs.iterdir())
    assert len(logs) == (code == 1)
    assert all(f"Log with the traceback: {log}\n" in captured.err for log in logs)
    run_that_raises(error, "--verbose")
    verbose = capsys.readouterr().err
    assert verbose.index("Traceback (most recent call last)") < verbose.index("autossl_evaluate: ")


def test_the_log_of_a_failure_holds_what_was_asked_done_and_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder_of_logs: Path
) -> None:
    workspace = tmp_path / "work space"
    workspace.mkdir()
    assert run_that_raises(ZeroDivisionError(), "-q", "--workspace", str(workspace)) == 1
    (log,) = (workspace / "logs").iterdir()
    assert str(log) in capsys.readouterr().err
    text = log.read_text()
    assert f"$ autossl_evaluate -q --workspace '{workspace}'\nautossl " in text
    assert "DEBUG autossl.somewhere: what came before" in text
    assert text.endswith("ZeroDivisionError\n")
    assert not list(folder_of_logs.iterdir())
    (workspace / "logs").rename(workspace / "before")
    (workspace / "logs").write_text("")  # as a place that cannot be written to
    run_that_raises(ZeroDivisionError(), "--workspace", str(workspace))
    assert len(list(folder_of_logs.iterdir())) == 1


def test_a_command_that_wants_resume_to_go_on_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    parser = new_parser("autossl_predict")
    parser.add_argument("--resume", action="store_true")
    assert run_command(parser, interrupt, []) == 3
    assert capsys.readouterr().err.endswith("It goes on with --resume.\n")
    assert run_that_raises(KeyboardInterrupt()) == 3
    assert "--resume" not in capsys.readouterr().err


def test_a_log_that_no_place_takes_is_said_to_be_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)  # looked for anew, and not found: every drive is full
    monkeypatch.setattr("tempfile._get_default_tempdir", _no_place)
    assert run_that_raises(OSError(errno.ENOSPC, "No space left on device")) == 1
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "could not be written" in said


def _no_place(*arguments: object) -> str:
    raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_told_to_stop_ends_its_workers_and_exits_with_3(number: int, tmp_path: Path) -> None:
    script = f"""
import pathlib, signal, time, os
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have had it ignored
from autossl.cli.options import add_workspace, non_negative
from autossl.cli.overview import COMMANDS
from autossl.cli.run_command import new_parser, run_command
from autossl.data.locks import hold
from autossl.data.parallel import parallel_map
def work(n):
    pathlib.Path({str(tmp_path)!r}, "worker-" + str(os.getpid())).touch()
    time.sleep(60)
def action(arguments):
    with hold(pathlib.Path({str(tmp_path / "lock")!r}), "it"):
        list(parallel_map(work, range(4), 2))
raise SystemExit(run_command(new_parser("autossl_evaluate"), action, []))
"""
    command = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("worker-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    command.send_signal(number)
    assert command.wait(timeout=20) == 3
    assert command.stderr is not None
    assert command.stderr.read().startswith("autossl_evaluate: interrupted. What is finished is kept")
    assert not (tmp_path / "lock").exists()
    workers = [int(path.name.removeprefix("worker-")) for path in tmp_path.glob("worker-*")]
    assert len(workers) == 2
    for worker in workers:
        with pytest.raises(ProcessLookupError):  # not even a zombie
            os.kill(worker, 0)


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"autossl"}))
def test_every_command_ends_that_way(name: str) -> None:
    (entry,) = entry_points(group="console_scripts", name=name)
    assert "run_command(_parser()" in inspect.getsource(entry.load())


def test_success_returns_zero() -> None:
    assert run_command(new_parser("autossl_evaluate"), lambda arguments: None, []) == 0


@pytest.mark.parametrize(("options", "expected"), [([], ["told"]), (["-q"], []), (["-v"], ["hidden", "told"])])
def test_log_lines_go_to_standard_error_as_asked(
    options: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def action(arguments: argparse.Namespace) -> None:
        logging.getLogger("autossl.somewhere").debug("hidden")
        logging.getLogger("autossl.somewhere").info("told")
        logging.getLogger("autossl.somewhere").warning("odd")

    run_command(new_parser("autossl_evaluate"), action, options)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [*expected, "warning: odd"]
    assert captured.out == ""


def test_logging_is_afterwards_as_it_was() -> None:
    ours = logging.getLogger("autossl")
    before = (list(ours.handlers), ours.propagate, ours.level)
    run_that_raises(INVALID)
    assert (ours.handlers, ours.propagate, ours.level) == before


def test_a_reader_that_leaves_early_ends_the_command_quietly(tmp_path: Path) -> None:
    script = (
        "from autossl.cli.run_command import *\n"
        "def action(arguments):\n    print('x' * 1000000)\n"
        "raise SystemExit(run_command(new_parser('autossl_methods'), action, []))\n"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    if command.stdout is None or command.stderr is None:
        raise OSError("no pipes")
    command.stdout.read(10)
    command.stdout.close()
    assert command.wait(timeout=30) == 128 + signal.SIGPIPE
    assert command.stderr.read() == ""


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_with_workers_works_without(name: str) -> None:
    (entry,) = entry_points(group="console_scripts", name=name)
    module = sys.modules[entry.load().__module__]
    actions = module._parser()._actions if hasattr(module, "_parser") else []
    counts = [action for action in actions if "process" in (action.help or "") and action.type is non_negative]
    assert all(action.type("0") == 0 for action in counts)
    if counts:
        assert any("--num_workers" in action.option_strings for action in counts)
