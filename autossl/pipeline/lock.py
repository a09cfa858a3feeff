"""One process at a time works on an experiment, and the trainings that a killed one left behind are waited for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from autossl.data.locks import hold

WAIT_S = 120.0
"""A training that lost its experiment saves its state after the step that it is in."""


def experiment_lock(path: Path, wait_s: float = WAIT_S) -> AbstractContextManager[int | None]:
    """Held until this process and all trainings that inherited its descriptor have ended; see `hold`."""
    return hold(path, "this split", wait_s, inherited=True)
