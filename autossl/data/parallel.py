"""Work on many cases in several processes, so that a worker that dies is an error with its own words, never a hang.

Each worker has a pipe of its own: a shared queue keeps its lock when the worker that holds it is killed, and then
everybody waits for ever.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Generic, TypeVar

from autossl.data.memory import LOOK_EVERY_S, MemoryWatch, free_memory, memory_now
from autossl.data.problems import InvalidInput, Problem
from autossl.data.signals import end_with_parent

__all__ = ["WorkerError", "default_workers", "free_memory", "how_it_ended", "parallel_map", "usable_cpus"]

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARE_OF_FREE_MEMORY = 0.8
WORKER_BYTES = 2**28
"""What a worker takes beside its items, in round numbers."""
OUT_OF_MEMORY = ("MemoryError", "Unable to allocate", "Cannot allocate memory", "not enough memory")
SECONDS_TO_LEAVE = 5.0
START_METHOD = "fork" if sys.platform == "linux" else "spawn"

logger = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """A worker failed on an item.

    Args:
        item: its name, usually the case id.
        details: the worker's own traceback, or its signal.
        memory: of the worker and the machine at that time.
    """

    def __init__(self, item: str, details: str, memory: str = "") -> None:
        self.item = item
        self.details = details
        self.memory = memory
        seen = f"\nMemory at that time: {memory}." if memory else ""
        super().__init__(f"{item}: {details}{seen}\nWhat to do: {_advice(details)}.")


def _advice(details: str) -> str:
    if "SIGKILL" in details or any(name in details for name in OUT_OF_MEMORY):
        return "use fewer workers (-np; 0 needs none), free memory, or ask for more; then run the command again"
    if any(name in details for name in ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE")):
        return "a library crashed on this case: look at its files; -np 0 shows whether it happens without workers too"
    return "look at the files of this case; -np 0 works without processes; what is finished is kept"


def parallel_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    n_workers: int | None = None,
    *,
    name_of: Callable[[Item], str] = str,
    bytes_of: Callable[[Item], int] | None = None,
) -> Iterator[Result]:
    """Yields function(item) for all items, in the order of the items, each as soon as it and its predecessors are done.

    Workers are forked on Linux (no import is repeated, closures are fine) and spawned elsewhere (function and items
    must be picklable there); torch and BLAS use one thread in each. Leaving the iterator early ends the workers.

    Args:
        n_workers: processes; 0 or 1 works in this process, None takes one per usable CPU, fewer where memory is short.
        name_of: what an error calls an item, usually the case id.
        bytes_of: estimated peak memory of an item. Items start only while the sum of those under way fits into 80 %
            of the memory that was free at the start; an item that is larger than that runs alone.

    Raises:
        InvalidInput: as the function raised it, with the item's name as the case where none was given.
        WorkerError: any other exception, or a worker that was killed.
    """
    items = list(items)
    n_workers = min(default_workers() if n_workers is None else n_workers, len(items))
    if n_workers <= 1:
        return _map_here(function, items, name_of)
    return _map_in_workers(_Job(function, items, name_of, bytes_of), n_workers)


def default_workers() -> int:
    """One worker per usable CPU, fewer where their own memory would take more than 80 % of what is free."""
    cpus, free = usable_cpus(), free_memory()
    fitting = max(1, min(cpus, int(SHARE_OF_FREE_MEMORY * free / WORKER_BYTES)))
    if fitting < cpus:
        logger.info("%d workers instead of %d: %.2f GiB of memory are free", fitting, cpus, free / 2**30)
    return fitting


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity and its control group's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, int(quota) // int(period))
    return max(count, 1)


@dataclass(frozen=True)
class _Job(Generic[Item, Result]):
    function: Callable[[Item], Result]
    items: list[Item]
    name_of: Callable[[Item], str]
    bytes_of: Callable[[Item], int] | None


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    index: int | None = None
    """Position of the item that it works on; None: idle."""


def _map_here(
    function: Callable[[Item], Result], items: list[Item], name_of: Callable[[Item], str]
) -> Iterator[Result]:
    for item in items:
        try:
            result = function(item)
        except InvalidInput as error:
            raise _with_case(error.problems, name_of(item)) from error
        except Exception as error:
            details = "".join(traceback.format_exception(error)).strip()
            raise WorkerError(name_of(item), details, memory_now()) from error
        yield result


def _map_in_workers(job: _Job[Item, Result], n_workers: int) -> Iterator[Result]:
    waiting = list(range(len(job.items)))[::-1]
    sizes = [job.bytes_of(item) if job.bytes_of else 0 for item in job.items]
    budget = SHARE_OF_FREE_MEMORY * free_memory()
    finished: dict[int, Result] = {}
    watch = MemoryWatch()
    workers = _start(job, n_workers)
    try:
        for position in range(len(job.items)):
            while position not in finished:
                watch.look(worker.process.pid for worker in workers)
                _hand_out(job, workers, waiting, sizes, budget, watch)
                for worker in _ready(workers):
                    index = worker.index
                    result = _receive(job, worker, watch)
                    if index is not None:
                        finished[index] = result
                        worker.index = None
            yield finished.pop(position)
    finally:
        _stop(workers)


def _start(job: _Job[Item, Result], n_workers: int) -> list[_Worker]:
    context: Any = multiprocessing.get_context(START_METHOD)
    workers: list[_Worker] = []
    # the system tells workers of the end of the thread that started them, not of the process
    parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
    for _ in range(n_workers):
        ours, theirs = context.Pipe()
        # A forked worker would keep our ends of the earlier pipes open and then never notice that we are gone.
        inherited = [*(worker.connection for worker in workers), ours] if START_METHOD == "fork" else []
        arguments = (job.function, job.items, theirs, inherited, parent)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        theirs.close()
        workers.append(_Worker(process, ours))
    return workers


def _hand_out(
    job: _Job[Item, Result],
    workers: list[_Worker],
    waiting: list[int],
    sizes: list[int],
    budget: float,
    watch: MemoryWatch,
) -> None:
    for worker in workers:
        under_way = [other.index for other in workers if other.index is not None]
        if not waiting or worker.index is not None:
            continue
        if under_way and sum(sizes[i] for i in under_way) + sizes[waiting[-1]] > budget:
            return
        index = waiting.pop()
        try:
            worker.connection.send(index)
        except OSError:
            raise _death(worker, job.name_of(job.items[index]), watch) from None
        worker.index = index


def _ready(workers: list[_Worker]) -> list[_Worker]:
    # A worker that dies closes its end of the pipe, which makes the pipe readable too.
    readable = set(wait([worker.connection for worker in workers], LOOK_EVERY_S))
    return [worker for worker in workers if worker.connection in readable]


def _receive(job: _Job[Item, Result], worker: _Worker, watch: MemoryWatch) -> Result:
    name = "start of a worker" if worker.index is None else job.name_of(job.items[worker.index])
    try:
        kind, content = worker.connection.recv()
    except (EOFError, OSError):
        raise _death(worker, name, watch) from None
    if kind == "problems":
        raise _with_case(content, name)
    if kind == "error":
        raise WorkerError(name, *content)
    result: Result = content
    return result


def _death(worker: _Worker, name: str, watch: MemoryWatch) -> WorkerError:
    seen = watch.of(worker.process.pid)
    worker.process.join(SECONDS_TO_LEAVE)
    return WorkerError(name, f"its worker process {how_it_ended(worker.process.exitcode)}", seen)


def how_it_ended(exitcode: int | None) -> str:
    """Of a process that ended before its time, in words."""
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode} and without a result"
    name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else f"signal {-exitcode}"
    return f"was killed by {name}" + (
        ", which is how the system ends a process when memory runs out" if name == "SIGKILL" else ""
    )


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        if worker.index is not None:
            worker.process.terminate()
        worker.connection.close()
    for worker in workers:
        worker.process.join(SECONDS_TO_LEAVE)
        if worker.process.exitcode is None:
            logger.warning("worker %s did not end in time and was killed", worker.process.pid)
            worker.process.kill()
            worker.process.join()


def _work(
    function: Callable[[Any], Any],
    items: list[Any],
    connection: Connection,
    inherited: list[Connection],
    parent: int | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if parent is not None:
        end_with_parent(parent)
    for other in inherited:
        other.close()
    _use_one_thread()
    while True:
        try:
            index = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("result", function(items[index]))
        except InvalidInput as error:
            answer = ("problems", error.problems)
        except Exception:
            answer = ("error", (traceback.format_exc().strip(), memory_now()))
        try:
            connection.send(answer)
        except OSError:
            return
        except Exception:  # a result that cannot be pickled
            connection.send(("error", (traceback.format_exc().strip(), memory_now())))


def _use_one_thread() -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "BLOSC_NTHREADS"):
        os.environ[variable] = "1"
    for name, setter in (("torch", "set_num_threads"), ("blosc2", "set_nthreads")):
        if name in sys.modules:
            getattr(sys.modules[name], setter)(1)
    if "SimpleITK" in sys.modules:
        sys.modules["SimpleITK"].ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    if "numpy" in sys.modules:
        import threadpoolctl  # scikit-learn brings it

        threadpoolctl.threadpool_limits(1)


def _with_case(problems: Sequence[Problem], name: str) -> InvalidInput:
    return InvalidInput(
        [
            Problem(p.found, p.expected, p.fix, case=p.case if p.case is not None else name, file=p.file)
            for p in problems
        ]
    )
