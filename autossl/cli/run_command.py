"""What all commands share: their parser, logging, and how a fault becomes a message and an exit code.

Exit codes: 0 done, 1 failed (a defect of ours, disk full, memory, a worker that died), 2 the user's input is wrong,
3 interrupted, and the same command goes on. A failure leaves a log with its traceback; --verbose shows it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from autossl.cli.fault_log import KeptLines, traceback_text, write_fault_log
from autossl.cli.overview import COMMANDS
from autossl.data.signals import terminated_as_interrupted
from autossl.version import __version__

DONE, FAILED, INVALID, INTERRUPTED = 0, 1, 2, 3
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_PERMITTED = (errno.EACCES, errno.EPERM, errno.EROFS)


def new_parser(command: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """The parser of a command, with the options that all commands have."""
    parser = argparse.ArgumentParser(
        prog=command,
        description=COMMANDS[command],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"autossl {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="say more while working, and show the traceback of a fault"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="say warnings and results only")
    return parser


def run_command(
    parser: argparse.ArgumentParser, action: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parses, runs the action and returns the exit code; says why where it is not 0.

    Args:
        parser: From `new_parser`.
        action: Calls the function behind the command and prints what it returns.
        argv: Arguments without the program's name; None takes the command line's.
    """
    arguments = parser.parse_args(argv)
    # PyTorch's idle threads sleep instead of spinning: beside other work on the machine spinning costs more than it
    # saves. It is read when PyTorch is imported, which no command has done yet; the user's own choice stays.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    kept = KeptLines()
    try:
        with _log_lines(arguments.verbose, arguments.quiet, kept), terminated_as_interrupted():
            action(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output has seen enough (autossl_methods | head); keep the interpreter from flushing again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, Exception) as error:
        code, message = _explain(error)
        if code == INTERRUPTED and "resume" in arguments and "--resume" not in message:
            message += " It goes on with --resume."
        if arguments.verbose:
            _say(traceback_text(error).rstrip())
        _say(f"{parser.prog}: {message}")
        if code == FAILED:
            log = write_fault_log(parser.prog, argv, error, kept, _workspace(arguments))
            _say(f"Log with the traceback: {log or 'could not be written; --verbose shows it'}")
        return code
    return DONE


def _workspace(arguments: argparse.Namespace) -> Path | None:
    """Root of the workspace of a command that has one."""
    from autossl.data.workspace import Workspace

    return Workspace.locate(arguments.workspace).root if "workspace" in arguments else None


class _StandardError(logging.Handler):
    """Writes to whatever sys.stderr is at that moment, so that lines go above a live progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
            sys.stderr.write(f"{prefix}{self.format(record)}\n")
        except Exception:
            self.handleError(record)


@contextlib.contextmanager
def _log_lines(verbose: bool, quiet: bool, kept: logging.Handler) -> Iterator[None]:
    """Log lines go to standard error while the block runs, and all of them to `kept`.

    Afterwards logging is as it was (for callers in Python).
    """
    shown = _StandardError(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
    ours = logging.getLogger("autossl")
    before = ours.handlers, ours.propagate, ours.level
    ours.handlers, ours.propagate = [shown, kept], False
    ours.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")  # those of libraries; ours are log lines
            yield
    finally:
        ours.handlers, ours.propagate = before[:2]
        ours.setLevel(before[2])


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message, with what was being done where that is known."""
    code, message = _reason(error)
    doing = [note for note in getattr(error, "__notes__", ()) if code == FAILED and note not in message]
    return code, f"{message} It happened {', '.join(doing)}." if doing else message


def _reason(error: BaseException) -> tuple[int, str]:
    """Exit code, and what went wrong."""
    from autossl.data.parallel import WorkerError
    from autossl.data.problems import InvalidInput

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted. What is finished is kept; run the command again to go on."
    if isinstance(error, InvalidInput):
        return INVALID, str(error)
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return FAILED, _disk_full(cause.filename)
        if isinstance(cause, PermissionError) or (isinstance(cause, OSError) and cause.errno in NOT_PERMITTED):
            return INVALID, _not_permitted(cause)
        if _is_out_of_memory(cause) and not isinstance(error, WorkerError):
            return FAILED, f"memory ran out ({cause}). What to do: use fewer workers (-np) or a smaller preset."
    if isinstance(error, WorkerError):
        if any(f"[Errno {number}]" in error.details for number in DISK_FULL):
            return FAILED, _disk_full(None, error.item)
        if any(f"[Errno {number}]" in error.details for number in NOT_PERMITTED):
            return INVALID, _not_permitted(OSError(0, error.details.splitlines()[-1]))
        if "was killed by SIGTERM" in error.details:  # clusters end the workers by the signal that ends us
            return INTERRUPTED, str(error)
        return FAILED, str(error)
    return _explain_training(error)


def _explain_training(error: BaseException) -> tuple[int, str]:
    """Ends of a training run that are no defects; by name, because importing the loop imports torch."""
    name = type(error).__name__
    if name == "TrainingInterrupted":
        return INTERRUPTED, str(error)
    if name in ("TrainingDiverged", "StepFailed", "LoadingError"):
        return FAILED, str(error)
    said = f" ({error})" if str(error) else ""
    return FAILED, f"internal error: {name}{said}. This is a defect of autossl. What to do: report it with the log."


def _is_out_of_memory(error: BaseException) -> bool:
    """Also torch's errors: of CUDA by name, because importing takes long, and of the CPU, which have no type."""
    return type(error).__name__ in ("MemoryError", "OutOfMemoryError") or "Cannot allocate memory" in str(error)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _disk_full(file: object, case: str | None = None) -> str:
    place = f" while writing {file}" if file else f" in the work on {case}" if case else ""
    return (
        f"the disk is full{place}. Expected: space for the files of this step. "
        "What to do: free space or choose another --workspace, then run the command again; what is finished is kept."
    )


def _not_permitted(error: OSError) -> str:
    place = f" {error.filename}" if error.filename else ""
    return (
        f"the system refuses access to{place} ({error.strerror}). Expected: a place that this user may read and write. "
        "What to do: change its permissions, or choose another folder."
    )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
