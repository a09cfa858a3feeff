"""Makes batches ahead of time in worker processes: torch's DataLoader with one step's whole batch per item."""

from __future__ import annotations

import multiprocessing.sharedctypes
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Protocol

import blosc2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from autossl.data.memory import MemoryWatch, memory_now
from autossl.data.parallel import how_it_ended
from autossl.data.problems import InvalidInput, Problem
from autossl.data.signals import end_with_parent
from autossl.trainers.base import Batch, BatchRequest

Item = tuple[int, BatchRequest]
SECONDS_TO_DIE = 3.0


class MakesBatches(Protocol):
    """What the workers call; must be picklable and depend on its arguments alone."""

    def make(self, step: int, request: BatchRequest) -> Batch:
        """The batch of a step."""

    def cases(self, step: int, request: BatchRequest) -> tuple[str, ...]:
        """Ids of the cases that the batch of a step is made of."""


class LoadingError(RuntimeError):
    """A batch could not be made, or a worker process died."""


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a worker, in a form that survives the way to the main process."""

    step: int
    text: str
    memory: str = ""
    problems: tuple[Problem, ...] = ()

    def error(self) -> Exception:
        if self.problems:
            return InvalidInput(self.problems, title=f"the batch of step {self.step} could not be made:")
        return LoadingError(
            f"the batch of step {self.step} could not be made in a worker process:\n{self.text}"
            f"Memory at that time: {self.memory}.\n"
            "What to do: look at the files of this case; where memory ran out, use fewer workers (--num_workers, 0 "
            "needs none). Then continue with --resume."
        )


class _Steps(Dataset[Any]):
    def __init__(self, maker: MakesBatches, pin: bool, at: Any) -> None:
        self.maker = maker
        self.pin = pin
        self.at = at
        """Worker → the step that it is at: shared memory, because a killed worker cannot tell."""

    def __getitem__(self, item: Item) -> Any:
        step, request = item
        worker = get_worker_info()
        if worker is not None:
            self.at[worker.id] = step
        try:
            batch = self.maker.make(step, request)
        except InvalidInput as error:
            return _Failure(step, str(error), problems=error.problems)
        except Exception as error:
            if worker is None:
                raise LoadingError(f"the batch of step {step} could not be made: {error}") from error
            return _Failure(step, traceback.format_exc(), memory_now())
        return _Pinnable(batch) if self.pin else batch


@dataclass(frozen=True)
class _Pinnable:
    """Torch's pinning thread calls `pin_memory` on what it does not know."""

    batch: Batch

    def pin_memory(self) -> Batch:
        pinned: Batch = _pinned(self.batch, {})
        return pinned


def _pinned(value: Any, done: dict[int, Tensor]) -> Any:
    """The value with pinned tensors; a tensor that occurs twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in done:
            done[id(value)] = value.pin_memory()
        return done[id(value)]
    if isinstance(value, tuple):
        return tuple(_pinned(entry, done) for entry in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _pinned(getattr(value, f.name), done) for f in fields(value)})
    return value


def _start_worker(_: int, parent: int | None) -> None:
    if parent is not None:
        end_with_parent(parent)
    torch.set_num_threads(1)
    blosc2.set_nthreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    """Takes back torch's SIGCHLD handler, which raises for a dead worker in the middle of whatever runs then.

    Torch also looks for dead workers while it waits for a batch, so the error comes there, within seconds.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


def _unchanged(item: Any) -> Any:
    return item


def _noting(steps: Iterable[Item], noted: list[Item]) -> Iterator[Item]:
    for item in steps:
        noted.append(item)
        yield item


class BatchIterator(Iterator[Batch]):
    """The batches of the given steps in their order. `close` (or leaving a `with` block) ends the workers.

    Raises:
        InvalidInput: a file of a case cannot be read.
        LoadingError: a batch cannot be made, or a worker died.
    """

    def __init__(self, maker: MakesBatches, steps: Iterable[Item], num_workers: int, pin_memory: bool) -> None:
        self._maker = maker
        self._waited_for: list[Item] = []
        self._at = multiprocessing.sharedctypes.RawArray("q", [-1] * max(1, num_workers))
        self._watch = MemoryWatch()
        # the system tells workers of the end of the thread that started them, not of the process
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else None
        loader = DataLoader(
            _Steps(maker, pin_memory, self._at),
            sampler=_noting(steps, self._waited_for),
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            pin_memory=pin_memory,
            worker_init_fn=partial(_start_worker, parent=parent),
            generator=torch.Generator().manual_seed(0),  # else starting workers would draw from the global generator
        )
        with _sigchld_kept():
            self._source: Iterator[Any] | None = iter(loader)

    def __next__(self) -> Batch:
        if self._source is None:
            raise StopIteration
        workers = list(getattr(self._source, "_workers", []))
        self._watch.look(worker.pid for worker in workers)
        if any(worker.exitcode is not None for worker in workers):  # torch looks only when its batch is due
            raise self._died(workers)
        try:
            result = next(self._source)
        except StopIteration:
            self.close()
            raise
        except LoadingError:
            self.close()
            raise
        except (RuntimeError, OSError, EOFError) as error:  # the latter two where a tensor's sender is gone
            raise self._died(workers, str(error)) from error
        if isinstance(result, _Failure):
            self.close()
            raise result.error()
        self._waited_for.pop(0)
        batch: Batch = result.batch if isinstance(result, _Pinnable) else result
        return batch

    def _died(self, workers: list[Any], said: str = "") -> LoadingError:
        """The error for dead workers: how each ended, at what, and with which memory. Ends the others."""
        found, requests = [], dict(self._waited_for)
        if said and workers:  # the connections of a dying worker break before it has ended, its sentinel does as well
            ending = wait([worker.sentinel for worker in workers], SECONDS_TO_DIE)
            for worker in workers:
                if worker.sentinel in ending:
                    worker.join(SECONDS_TO_DIE)
        for number, worker in enumerate(workers):
            if worker.exitcode in (None, 0):
                continue
            step = self._at[number]
            at = "before its first batch" if step < 0 else f"after the batch of step {step}"
            if step in requests:
                cases = ", ".join(dict.fromkeys(self._maker.cases(step, requests[step])))
                at = f"at the batch of step {step} (cases {cases})"
            seen = self._watch.of(worker.pid)
            found.append(f"a loading worker died {at}: it {how_it_ended(worker.exitcode)}. Memory then: {seen}")
        self.close()
        reason = "; ".join(found) or f"a loading worker died ({said.partition(chr(10))[0]})"
        return LoadingError(
            f"{reason}. Expected: workers that live as long as the training. What to do: most often memory (or "
            "/dev/shm) ran out: use fewer workers (--num_workers, 0 needs none), free memory, then continue with "
            "--resume."
        )

    def close(self) -> None:
        """Ends the workers; batches that are not yet taken are lost. May be called more than once."""
        source, self._source = self._source, None
        # torch does it when the iterator goes, but the traceback of an error keeps that
        getattr(source, "_shutdown_workers", lambda: None)()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def batch_iterator(
    maker: MakesBatches, steps: Iterable[Item], num_workers: int, pin_memory: bool = False
) -> BatchIterator:
    """Batches of the steps in order, the same bits for any number of workers; 0 makes each one when it is asked for.

    Args:
        maker: a `BatchMaker`.
        steps: (step, request) in the order wanted; read ahead by two items per worker.
        num_workers: processes.
        pin_memory: page-locked tensors for fast copies to CUDA devices.
    """
    return BatchIterator(maker, steps, num_workers, pin_memory)
