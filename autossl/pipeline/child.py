"""Runs one command in a process that ends with the process that started it.

An experiment that is killed with SIGKILL cannot end its trainings. They hold the reading end of a pipe whose writing
end only the experiment has: when it is gone, the pipe closes, and the training gets the SIGTERM on which it saves its
state. Without that it would go on beside the one that the resumed experiment starts, in the same folder.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import entry_points


def main(words: Sequence[str]) -> int:
    """Runs an installed command.

    Args:
        words: Descriptor of the pipe, the command's name, its arguments.
    """
    threading.Thread(target=end_with_parent, args=(int(words[0]),), daemon=True).start()
    (command,) = entry_points(group="console_scripts", name=words[1])
    return int(command.load()(list(words[2:])) or 0)


def end_with_parent(pipe: int) -> None:
    """Waits until the other end of the pipe is closed, then asks this process to end."""
    while True:
        try:
            if not os.read(pipe, 1):
                break
        except InterruptedError:
            continue
        except OSError:
            return
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
