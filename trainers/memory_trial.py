"""Measures the memory of a method's step against a supervised one, on a small patch, and lets the plan decide with it.

What counts is what lives until the backward pass: everything that autograd keeps (each storage once), weights, their
gradients and momentum, followers and memories. The first grows with the patch, the rest does not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from autossl.data.runs import RUN_FILE, read_run
from autossl.trainers.base import Batch, Job, MethodSettings, Parts, Progress, SemiSupervisedTrainer
from autossl.trainers.loop import place_parts
from autossl.trainers.memory_plan import (
    MemoryPlan,
    candidates,
    choose_unlabeled_batch,
    scale_up,
    small_patch,
    supervised_step_gb,
)
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.phases import Span, Timetable
from autossl.trainers.refresh import blank_pseudo_labels
from autossl.trainers.setup import RunSetup
from autossl.trainers.source import FoldSource

logger = logging.getLogger(__name__)

TRIAL_STEPS = 1000
"""Length of the run whose phases are tried; no step is taken."""


@dataclass(frozen=True)
class StepBytes:
    """Memory of one step."""

    kept: int
    """By autograd, for the backward pass."""
    state: int
    """Weights, gradients and momentum; followers and memories."""

    def at(self, scale: float) -> float:
        """On a patch with so many times the voxels."""
        return self.kept * scale + self.state


class KeptForBackward:
    """While open, counts the bytes that autograd keeps: `peak` is the most at any time, each storage counted once.

    Args:
        known: tensors that exist anyway, such as weights and the batch; copies of weights in another precision have
            their shapes and are left out too.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        known = list(known)
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._shapes = {tensor.shape for tensor in known if isinstance(tensor, nn.Parameter) and tensor.ndim > 1}
        self._users: dict[int, int] = {}
        self._now = 0
        self.peak = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> KeptForBackward:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> Any:
        if tensor.untyped_storage().data_ptr() in self._known or tensor.shape in self._shapes:
            return tensor
        return _Kept(self, tensor)

    def add(self, tensor: Tensor) -> int:
        """Counts a tensor; returns the key of its storage."""
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        self._users[key] = self._users.get(key, 0) + 1
        if self._users[key] == 1:
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
        return key

    def remove(self, key: int, n_bytes: int) -> None:
        """Autograd let go of it."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self._now -= n_bytes


class _Kept:
    """A tensor in the graph's keeping."""

    def __init__(self, counter: KeptForBackward, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._counter = counter
        self._key = counter.add(tensor)

    def __del__(self) -> None:
        self._counter.remove(self._key, self.tensor.untyped_storage().nbytes())


def _unpack(kept: Any) -> Tensor:
    return kept.tensor if isinstance(kept, _Kept) else kept


def state_bytes(parts: Parts) -> int:
    """Trained weights with gradient and momentum; followers and memories once."""

    def of(module: nn.Module) -> int:
        return sum(value.nbytes for value in (*module.parameters(), *module.buffers()))

    memories = sum(
        of(value) if isinstance(value, nn.Module) else value.nbytes
        for value in parts.memory.values()
        if isinstance(value, nn.Module | Tensor)
    )
    return 3 * sum(map(of, parts.trained.values())) + sum(map(of, parts.followers.values())) + memories


def step_bytes(method: SemiSupervisedTrainer, batch: Batch, at: Progress, device: str = "cpu") -> StepBytes:
    """Memory of one step, with the loop's precision; parts and batch lie on the device."""
    modules = (*method.parts.trained.values(), *method.parts.followers.values())
    known = [value for module in modules for value in (*module.parameters(), *module.buffers())]
    known += [tensor for s in (batch.labeled, batch.unlabeled) if s is not None for tensor in (*s.views, *s.valids)]
    counter = KeptForBackward(known)
    with torch.autocast("cuda", torch.float16, enabled=device.startswith("cuda")), counter:
        output = method.losses(batch, at)
    peak = counter.peak
    del output
    return StepBytes(peak, state_bytes(method.parts))


# --------------------------------------------------------------------------------------------------------- the trial


class MemoryTrial:
    """Steps of the run's method and of supervised training on a small patch of the fold's own cases."""

    def __init__(self, setup: RunSetup, fold: str) -> None:
        plan = setup.configuration
        self._setup, self._fold = setup, fold
        self._patch = small_patch(plan)
        self._scale = scale_up(plan, self._patch)
        self._supervised = self._bytes(Supervised, Supervised.Settings(), plan.unlabeled_batch_size)

    def factor(self, unlabeled_batch_size: int) -> float:
        """Memory of a step of the method / of a supervised step, on the plan's patch."""
        setup = self._setup
        return self._bytes(setup.method, setup.settings, unlabeled_batch_size) / self._supervised

    def _bytes(self, kind: type[SemiSupervisedTrainer], settings: MethodSettings, unlabeled: int) -> float:
        """The most that any phase takes."""
        setup = self._setup
        whole = setup.job(self._fold, TRIAL_STEPS)
        small = whole.configuration.model_copy(update={"patch_size": self._patch})
        job: Job = replace(whole, configuration=small, unlabeled_batch_size=unlabeled)
        method = kind(job, settings)
        place_parts(method.parts, setup.device)
        with TemporaryDirectory() as scratch:
            source = FoldSource(
                setup.streams(self._fold),
                small,
                setup.schema,
                setup.request.seed,
                Path(scratch),
                signed_distance=kind.needs.signed_distance,
            )
            return max(self._phase(method, source, span) for span in self._enter(method, source))

    def _enter(self, method: SemiSupervisedTrainer, source: FoldSource) -> Iterable[Span]:
        """Each phase, with the stores filled that were refreshed before its end."""
        table = Timetable(method.phases(), TRIAL_STEPS)
        fill = blank_pseudo_labels(source)
        for span in table.spans:
            for at, refresh in table.refreshes:
                if span.start <= at < span.end:
                    fill(refresh, at)
                    source.reload_store(refresh.store, at)
            method.on_phase(span.phase, table.progress(span.start))
            yield span

    def _phase(self, method: SemiSupervisedTrainer, source: FoldSource, span: Span) -> float:
        at = Timetable(method.phases(), TRIAL_STEPS).progress(span.end - 1)
        device = self._setup.device
        with closing(source.batches([(at.step, method.request(at))])) as batches:
            batch = next(iter(batches)).to(device)
        return step_bytes(method, batch, at, device).at(self._scale)


def device_memory_gb(device: str) -> float | None:
    """Memory of a graphics card in 1e9 bytes; None elsewhere, where nothing is planned for."""
    if not device.startswith("cuda"):
        return None
    return torch.cuda.get_device_properties(torch.device(device)).total_memory / 1e9


def fit_to_memory(setup: RunSetup) -> RunSetup:
    """The setup with its decision on the unlabeled batch; a run that exists keeps its own."""
    setup = replace(setup, memory=_stored(setup) or _decide(setup))
    plan = setup.memory
    if plan is not None and plan.unlabeled_batch_size < plan.planned_unlabeled_batch_size:
        logger.warning("%d unlabeled patches per step: %s", plan.unlabeled_batch_size, plan.why)
    return setup


def _decide(setup: RunSetup) -> MemoryPlan:
    planned = setup.configuration.unlabeled_batch_size
    available = device_memory_gb(setup.device)
    if setup.method is Supervised or not any(cases.unlabeled for cases in setup.folds.values()):
        return MemoryPlan(planned, planned, "no unlabeled patch takes part")
    if available is None:
        return MemoryPlan(planned, planned, f"as planned: memory is planned for graphics cards, not for {setup.device}")
    price = supervised_step_gb(setup.configuration, setup.plans.preset, setup.schema.n_outputs)
    fold = next(name for name, cases in setup.folds.items() if cases.unlabeled)
    trial, factors = MemoryTrial(setup, fold), {}
    for size in candidates(planned):
        factors[size] = trial.factor(size)
        if price * factors[size] <= available:
            break
    return choose_unlabeled_batch(planned, price, factors, available)


def _stored(setup: RunSetup) -> MemoryPlan | None:
    """The decision of a run that was started, unless it is about to be overwritten."""
    path = setup.folder(setup.spec(1)) / RUN_FILE
    if setup.request.overwrite or not path.is_file():
        return None
    found = read_run(path.parent).memory
    return MemoryPlan.from_json(found) if found else None
