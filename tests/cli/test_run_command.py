"""Every fault of a user becomes a message and an exit code, without a traceback."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from autossl.cli.run_command import new_parser, run_command
from autossl.data.parallel import WorkerError
from autossl.data.problems import InvalidInput, Problem

INVALID = InvalidInput(Problem("found this", "that", "do so", case="c1"))


def run_that_raises(error: BaseException) -> int:
    def action(arguments: argparse.Namespace) -> None:
        raise error

    return run_command(new_parser("autossl_evaluate"), action, [])


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (INVALID, 2, "autossl_evaluate: case c1: found this. Expected: that. What to do: do so."),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y.b2nd"), 1, "the disk is full while writing /x/y.b2nd"),
        (caused(RuntimeError("wrapped"), OSError(errno.EDQUOT, "quota")), 1, "the disk is full. Expected: space"),
        (WorkerError("case_7", "OSError: [Errno 28] No space left"), 1, "the disk is full in the work on case_7"),
        (WorkerError("case_7", "its worker process was killed by SIGKILL"), 1, "case_7: its worker process was killed"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "the system refuses access to /x"),
        (MemoryError("32 GiB"), 1, "memory ran out (32 GiB)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_foreseen_fault_becomes_its_exit_code_and_message(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_that_raises(error) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_that_raises(ZeroDivisionError())


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
