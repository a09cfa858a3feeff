"""What is kept of a command that failed: its log lines at full length and the traceback, in a file of their own."""

from __future__ import annotations

import logging
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from autossl.version import __version__

FOLDER = "logs"
KEPT_LINES = 2000


class KeptLines(logging.Handler):
    """Holds the last lines, those that are not shown as well."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def text(self) -> str:
        """All that is kept."""
        return "".join(f"{line}\n" for line in self._lines)


def write_fault_log(
    command: str, words: Sequence[str] | None, error: BaseException, kept: KeptLines, workspace: Path | None
) -> Path | None:
    """Writes WORKSPACE/logs/COMMAND_TIME_PROCESS.log, or to the system's folder for temporary files.

    Args:
        command: its name.
        words: its arguments; None: those of the command line.
        error: what ended it.
        kept: log lines.
        workspace: root of a workspace; None or not there: the other folder.

    Returns:
        The file; None where none could be written (a full disk).
    """
    words = sys.argv[1:] if words is None else words
    text = (
        f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} $ {shlex.join([command, *words])}\n"
        f"autossl {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{kept.text()}{traceback_text(error)}"
    )
    name = f"{command}_{time.strftime('%Y%m%d-%H%M%S')}"
    places = [workspace / FOLDER] if workspace is not None and workspace.is_dir() else []
    for place in (*places, None):
        try:
            folder = place or Path(tempfile.gettempdir())  # which raises where all of them are full
            folder.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", dir=folder, prefix=f"{name}_", suffix=".log", delete=False
            ) as file:
                file.write(text)
            return Path(file.name)
        except OSError:
            continue
    return None


def traceback_text(error: BaseException) -> str:
    """As Python prints it."""
    return "".join(traceback.format_exception(error))
