"""How a process ends when it is told to, or when the one that started it is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PR_SET_PDEATHSIG = 1


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM becomes KeyboardInterrupt, so that workers, trainings and locks are ended as with Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a worker that was forked a moment ago
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """SIGTERM and SIGINT are handled after the block: for short calls of foreign code that swallows exceptions."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: foreign code's own
        for received in dict.fromkeys(came):
            signal.raise_signal(received)


def end_with_parent(parent: int) -> None:
    """In a worker: the system kills this process when its parent ends, however that happens (Linux).

    Args:
        parent: its process number, taken before the worker was started.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this was set
        os.kill(os.getpid(), signal.SIGKILL)
