"""Commands in processes that can be killed: forked from this one, which has imported everything, or as installed.

A fork starts in milliseconds where the installed command imports for seconds, so a campaign of hundreds of kills takes
minutes. The parent stays single-threaded, and nothing of it is used before the fork.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

MODULES = (
    "torch",
    "blosc2",
    "SimpleITK",
    "nibabel",
    "matplotlib.backends.backend_agg",
    "scipy.ndimage",
    "scipy.stats",
    "sklearn.model_selection",
    "autossl.planners.plan_and_preprocess",
    "autossl.trainers.train",
    "autossl.inference.predict",
    "autossl.pipeline.experiment",
)
COUNT = "0"
"""As AUTOSSL_KILL_AT: points are counted and none is the one."""
PR_SET_CHILD_SUBREAPER = 36
INTERRUPTED = 3
LOOK_EVERY_S = 0.005
LEAVE_S = 15.0
"""For workers whose parent was killed."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    """Negative: the signal."""
    seconds: float
    hung: bool = False
    left_behind: int = 0
    """Processes that were still there after their time to leave, and had to be killed."""


def preload() -> None:
    """Imports what the commands will need, and adopts what killed commands leave, so that nothing stays a zombie."""
    for name in MODULES:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    importlib.import_module("blosc2").set_nthreads(1)
    from autossl.trainers.registry import all_methods

    all_methods()
    for command in entry_points(group="console_scripts"):
        if command.value.startswith("autossl."):
            command.load()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(words: Sequence[str], log: Path, kill_at: int | None, installed: bool, count_in: Path | None = None) -> int:
    """Starts a command in a process group of its own.

    Args:
        words: the command and its arguments.
        log: gets its output.
        kill_at: the point at which it kills its group; None: at none.
        installed: as a user calls it, instead of in a fork.
        count_in: file that gets the number of points that were passed (forked only).

    Returns:
        Its process id.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        if count_in is not None:
            kill_at = int(COUNT)
        if kill_at is not None:
            os.environ["AUTOSSL_KILL_AT"] = str(kill_at)
        if installed:
            command = Path(sys.executable).with_name(words[0])
            os.execv(command, [str(command), *words[1:]])
        code = _call(words, count_in)
    finally:
        os._exit(code)


def _call(words: Sequence[str], count_in: Path | None) -> int:
    from autossl.data import files

    for number in (signal.SIGTERM, signal.SIGINT):  # before the command handles them it has begun nothing
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    sys.argv = list(words)
    (command,) = entry_points(group="console_scripts", name=words[0])
    try:
        code = int(command.load()(list(words[1:])) or 0)
    except SystemExit as end:
        code = int(end.code or 0)
    if count_in is not None:
        count_in.write_text(str(files._points_passed))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def wait(child: int, seconds: float, limit: float | None = None) -> Ended | None:
    """Waits for the end; None where it is still running after so many seconds.

    Args:
        child: process id.
        seconds: to wait.
        limit: after so many the command counts as hung, and is killed with its group.
    """
    began = time.monotonic()
    while True:
        passed = time.monotonic() - began
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code, passed, left_behind=_end_group(child, LEAVE_S))
        if limit is not None and passed > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended(-signal.SIGKILL, passed, hung=True, left_behind=_end_group(child, 0.0))
        if limit is None and passed > seconds:
            return None
        time.sleep(LOOK_EVERY_S)


def _end_group(group: int, patience_s: float) -> int:
    """Waits until no process of the group is left; how many had to be killed."""
    until, killed = time.monotonic() + patience_s, 0
    while True:
        _reap()
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return killed
        if time.monotonic() > until and not killed:
            killed = 1
            os.killpg(group, signal.SIGKILL)
        time.sleep(LOOK_EVERY_S)


def _reap() -> None:
    """Ends the zombies that were adopted."""
    while True:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not found:
            return
