"""Memory: what is free, what processes hold, and whether the system ended processes for want of it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

GIB = 2**30
CONTROL_GROUP = Path("/sys/fs/cgroup")
LOOK_EVERY_S = 0.5


def free_memory() -> int:
    """Bytes that this process can take now without swapping, within its limits; 4 GiB where that is not known."""
    free = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(folder, limit_name).read_text())
            used = int(Path(folder, used_name).read_text()) - _reclaimable(Path(folder))
            free = min(free if free is not None else limit, max(limit - used, 0))
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource  # not on Windows

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            free = min(free if free is not None else limit, max(limit - taken, 0))
    return 4 * 2**30 if free is None else free


def _reclaimable(control_group: Path) -> int:
    for line in (control_group / "memory.stat").read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


def process_memory(pid: int) -> int | None:
    """Bytes that a process holds in memory; None where it has ended, or the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") or None
    return None


def memory_kills() -> int | None:
    """Processes that the system ended so far because memory ran out, in this control group; None where it says none."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (CONTROL_GROUP / "memory.events").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return None


def memory_now() -> str:
    """Memory of this process and of the machine, in words."""
    return _in_words(process_memory(os.getpid()), free_memory())


class MemoryWatch:
    """Remembers what workers held: a dead one cannot be asked."""

    def __init__(self) -> None:
        self._kills = memory_kills()
        self._held: dict[int, int] = {}
        self._free = free_memory()
        self._looked = time.monotonic()

    def look(self, pids: Iterable[int | None]) -> None:
        """Notes what these processes hold now; twice a second at most, unless one is new."""
        known = [pid for pid in pids if pid is not None]
        if time.monotonic() - self._looked < LOOK_EVERY_S and all(pid in self._held for pid in known):
            return
        self._looked, self._free = time.monotonic(), free_memory()
        self._held |= {pid: held for pid in known if (held := process_memory(pid)) is not None}

    def of(self, pid: int | None) -> str:
        """What was last seen of a worker, in words."""
        words = f"{_in_words(self._held.get(pid or 0), self._free)}, {time.monotonic() - self._looked:.1f} s before"
        kills = memory_kills()
        if kills is not None and self._kills is not None and kills > self._kills:
            words += f"; since the start the system ended {kills - self._kills} process(es) because memory ran out"
        return words


def _in_words(held: int | None, free: int) -> str:
    worker = "" if held is None else f"{held / GIB:.2f} GiB in the worker, "
    return f"{worker}{free / GIB:.2f} GiB free"
