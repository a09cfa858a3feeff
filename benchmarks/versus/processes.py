"""Runs a command and measures it: wall and processor time, and the memory of its whole tree of processes (Linux)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SHORTEST_PAUSE_S = 0.1
PAUSE_PER_COST = 30
"""The pause between two samples, in times of the processor time of one: watching costs at most some 3 % of a core."""
SAID_AT_MOST = 6000
"""Characters of a failed command's output that are shown."""


@dataclass(frozen=True)
class Measured:
    """One run of a command, from start to end, its start and imports included."""

    wall_s: float
    cpu_s: float
    """Of all its processes that were waited for."""
    others_cpu_s: float
    """Processor time that everything else on the machine used meanwhile: well above 0, the wall time is not worth
    much."""
    peak_pss_mb: float
    """Largest sum over its processes at one moment; memory that they share counts once."""
    samples: int
    """Of the memory."""

    def to_json(self) -> dict[str, float]:
        """Rounded to what is meant."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


class CommandFailed(Exception):
    """A command ended with another code than 0."""


def run_measured(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> Measured:
    """Runs a command to its end.

    Args:
        command: program and arguments.
        environment: all of it.
        folder: where it runs.

    Raises:
        CommandFailed: with the end of what it said.
    """
    with tempfile.TemporaryFile() as said:
        cpu, busy, own, start = _children_cpu_s(), _machine_busy_s(), time.process_time(), time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(environment), cwd=folder, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        with _MemoryWatch(process.pid) as watch:
            code = _wait(process)
            wall = time.perf_counter() - start
        cpu, busy = _children_cpu_s() - cpu, _machine_busy_s() - busy
        if code:
            said.seek(max(0, said.tell() - SAID_AT_MOST))
            raise CommandFailed(f"{' '.join(command)} ended with {code}:\n{said.read().decode(errors='replace')}")
    others = max(0.0, busy - cpu - (time.process_time() - own))
    return Measured(wall, cpu, others, watch.peak_mb, watch.samples)


def tree_of(root: int) -> list[int]:
    """A process, all that descend from it, and orphans of its session."""
    parents: dict[int, int] = {}
    tree = {root}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # the name in parentheses may hold anything
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        if int(fields[3]) == root:
            tree.add(pid)
    while found := {pid for pid, parent in parents.items() if parent in tree and pid not in tree}:
        tree |= found
    return sorted(tree)


def pss_mb(pid: int) -> float:
    """Proportional memory of a process: what it shares with n others counts 1/n. 0 where it is gone."""
    try:
        lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


class _MemoryWatch:
    """Samples the memory of a tree of processes in a thread while it is open."""

    def __init__(self, root: int) -> None:
        self.peak_mb = 0.0
        self.samples = 0
        self._root = root
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = 0.0
        while not self._over.wait(pause):
            used = time.thread_time()
            self.peak_mb = max(self.peak_mb, sum(map(pss_mb, tree_of(self._root))))
            self.samples += 1
            pause = max(SHORTEST_PAUSE_S, PAUSE_PER_COST * (time.thread_time() - used))


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit code; whatever ends this program ends the command and its workers too."""
    try:
        return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _machine_busy_s() -> float:
    """Processor seconds that were used, or taken by other virtual machines, since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
