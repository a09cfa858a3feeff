"""One process at a time works on an experiment, and the trainings that a killed one left behind are waited for."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem

logger = logging.getLogger(__name__)

WAIT_S = 120.0
"""A training that lost its experiment saves its state after the step that it is in."""
LOOK_EVERY_S = 0.2


@contextmanager
def experiment_lock(path: Path, wait_s: float = WAIT_S) -> Iterator[int | None]:
    """Holds the lock while the block runs; yields its descriptor, for trainings to inherit.

    The lock belongs to the open file: it is held until this process and all that inherited it have ended, however they
    end. Where the system knows no such locks (Windows), None is yielded and nothing is locked.

    Raises:
        InvalidInput: somebody else still holds it after `wait_s` seconds.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        until, said = time.monotonic() + wait_s, False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise _taken(path) from None
                if not said:
                    logger.info("waiting for another autossl_run, or a training that a stopped one left: %s", path)
                    said = True
                time.sleep(LOOK_EVERY_S)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(path: Path) -> InvalidInput:
    return InvalidInput(
        Problem(
            "another autossl_run works on this split, or a training of one that was stopped",
            "one at a time: they would write to the same files",
            "wait for it, or end it; then run the command again",
            file=path,
        )
    )
