"""The training loop: steps, devices, mixed precision, clipping, checkpoints, resume and the log.

It knows nothing of any method beyond `autossl.trainers.base`, and never sees a validation case.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from autossl.data.runs import CHECKPOINT_LATEST
from autossl.networks.layers import to_channels_last
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Parts,
    Phase,
    Progress,
    Refresh,
    SemiSupervisedTrainer,
    derive_seed,
)
from autossl.trainers.checkpoints import load_parts_state, parts_state, write_final, write_latest
from autossl.trainers.compiling import compile_parts
from autossl.trainers.gradient_share import gradient_shares, measuring_interval
from autossl.trainers.optimization import (
    GroupOptimizer,
    PlannedOptimizer,
    group_optimizers,
    load_optimizer_states,
    optimizer_states,
)
from autossl.trainers.phases import Timetable
from autossl.trainers.training_log import IntervalMeans, TrainingLog

logger = logging.getLogger(__name__)

SUPERVISED = "supervised"
"""Loss terms whose name begins with this come from labels: where one is not finite, no optimizer step is taken."""
MAX_BAD_STREAK = 20
"""A term that is not finite so many times in a row stops the run (COMMON.md, rule 3)."""

DRAW_EVERY_S = 60.0


class ClosableBatches(Protocol):
    """Batches in the order of the steps; closing ends its workers."""

    def __iter__(self) -> Iterator[Batch]: ...

    def close(self) -> None:
        """Ends the workers."""


class BatchSource(Protocol):
    """Where batches come from."""

    def batches(self, steps: Sequence[tuple[int, BatchRequest]]) -> ClosableBatches:
        """One batch per step, a function of the step alone."""

    def reload_store(self, store: str, step: int) -> None:
        """From now on batches come with the version of the store that was made at `step`."""


@dataclass(frozen=True)
class LoopOptions:
    """When and where, not what."""

    total_steps: int
    device: str = "cpu"
    compile: bool = False
    log_every: int = 25
    checkpoint_every: int = 250
    seed: int = 0
    rank: int = 0
    gradient_share_every: int | None = None
    """Steps between measurements of the unsupervised terms' share; 0: none. None: about 50 in a run, for at most 2 %
    of its time. Compiled networks are not measured."""


class TrainingInterrupted(Exception):
    """The run was asked to stop; its state is in `checkpoint_latest.pth`."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step = step
        self.checkpoint = checkpoint
        super().__init__(f"stopped after step {step}; {checkpoint} holds the state, --resume goes on from there")


class RefreshStopped(Exception):
    """A refresh was asked to stop; the cases that it has predicted stay."""


class TrainingDiverged(RuntimeError):
    """A loss term stayed nan or infinite."""


class TrainingLoop:
    """Runs a method from its current step to the end.

    Args:
        method: freshly built, on the CPU.
        source: gives the batches.
        folder: the fold's folder, for checkpoints and log.
        options: device, lengths and intervals.
        refresh: predicts the unlabeled pool with a trained part into a store; needed by methods that declare it. True
            ends the run there, with the weights as they are; `RefreshStopped` where it was asked to stop.
        on_progress: called after each step with (steps done, total, latest losses).
        should_stop: asked after each step; True saves and raises `TrainingInterrupted`.
    """

    def __init__(
        self,
        method: SemiSupervisedTrainer,
        source: BatchSource,
        folder: Path,
        options: LoopOptions,
        *,
        refresh: Callable[[Refresh, int], bool | None] | None = None,
        on_progress: Callable[[int, int, dict[str, float]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.method = method
        self.source = source
        self.folder = folder
        self.options = options
        self.timetable = Timetable(method.phases(), options.total_steps, options.seed, options.rank)
        self.step = 0
        self.skipped_steps = 0
        self._refresh = refresh
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._drawn = 0
        self._entered = -1
        self._refreshes_done = 0
        self._bad_streaks: dict[str, int] = {}
        self._dropped_terms: dict[str, int] = {}
        self._means = IntervalMeans()
        self._log_lines = 0
        self._optimizers: list[GroupOptimizer] = []
        plan = method.job.configuration
        self._planned = PlannedOptimizer(plan.learning_rate, plan.momentum)
        self._rates: dict[str, float] = {}
        self._scaler = torch.amp.GradScaler("cuda", enabled=self._on_cuda)
        if self.timetable.refreshes and refresh is None:
            raise ValueError(f"{method.name} refreshes pseudo-labels, but the loop was given no way to predict")
        self._place()

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> None:
        """Trains to the last step and writes `checkpoint_final.pth`.

        Raises:
            TrainingInterrupted: asked to stop; the state was saved.
            TrainingDiverged: a term stayed non-finite.
        """
        log = TrainingLog(self.folder, self.step, self._log_lines)
        try:
            while self.step < self.options.total_steps:
                if self._refresh_and_enter_phase():
                    break
                self._run_until(self.timetable.next_border(self.step), log)
            log.draw()
            write_final(self.folder, self.state())  # last: it says that the fold is finished
        finally:
            log.close()

    def _run_until(self, border: int, log: TrainingLog) -> None:
        steps = list(self._walk(self.step, border))
        interval_start, waited = time.perf_counter(), 0.0
        first = self.step
        with closing(self.source.batches([(at.step, request) for at, request in steps])) as batches:
            stream = iter(batches)
            for at, request in steps:
                asked = time.perf_counter()
                try:
                    batch = next(stream)
                except Exception:
                    self._stop_instead()
                    raise
                waited += time.perf_counter() - asked
                latest = self._train_step(batch, at)
                self._drawn += request.unlabeled.count
                self.step = at.step + 1
                if self._on_progress is not None:
                    self._on_progress(self.step, self.options.total_steps, latest)
                if self.step % self.options.log_every == 0 or self.step == self.options.total_steps:
                    seconds = time.perf_counter() - interval_start
                    log.write(self._log_line(at, self.step - first, seconds, waited))
                    self._log_lines += 1
                    interval_start, waited, first = time.perf_counter(), 0.0, self.step
                self._save_when_due(log)

    def _save_when_due(self, log: TrainingLog) -> None:
        stopping = self._should_stop is not None and self._should_stop()
        finished = self.step == self.options.total_steps
        if finished or not (stopping or self.step % self.options.checkpoint_every == 0):
            return
        write_latest(self.folder, self.state())
        if stopping:
            raise self._interrupted()
        log.draw(at_most_every_s=DRAW_EVERY_S)

    def _stop_instead(self) -> None:
        """Where the run was asked to stop, a missing batch is no fault: clusters end the workers by the same signal."""
        if self._should_stop is not None and self._should_stop():
            write_latest(self.folder, self.state())
            raise self._interrupted()

    def _interrupted(self) -> TrainingInterrupted:
        return TrainingInterrupted(self.step, self.folder / CHECKPOINT_LATEST)

    def _walk(self, start: int, stop: int) -> Iterator[tuple[Progress, BatchRequest]]:
        drawn = self._drawn
        for step in range(start, stop):
            at = self.timetable.progress(step, drawn / max(1, self.method.job.n_unlabeled))
            request = self.method.request(at)
            drawn += request.unlabeled.count
            yield at, request

    def _refresh_and_enter_phase(self) -> bool:
        """What is due before the step. True: a refresh ends the run; then no phase is entered any more."""
        for at, refresh in self.timetable.refreshes[self._refreshes_done :]:
            if at > self.step:
                break
            if self._refresh is not None:
                # Predicting takes long: a killed refresh goes on from these very weights.
                write_latest(self.folder, self.state())
                try:
                    ends = self._refresh(refresh, at)
                except RefreshStopped as stop:
                    raise self._interrupted() from stop
                if ends:
                    logger.warning("the run ends after step %d of %d", self.step, self.options.total_steps)
                    return True
                self.source.reload_store(refresh.store, at)
            self._refreshes_done += 1
        index = self.timetable.index_at(self.step)
        if index != self._entered:
            phase = self.timetable.spans[index].phase
            self._reinitialize(phase)
            self._optimizers = group_optimizers(self.method.parts, phase, self._optimizers, self._planned)
            self.method.on_phase(phase, self.timetable.progress(self.step))
            self._entered = index
        return False

    def _reinitialize(self, phase: Phase) -> None:
        if not phase.reinitialize:
            return
        job = replace(self.method.job, seed=derive_seed(self.method.job.seed, "reinitialize", phase.name))
        fresh = type(self.method)(job, self.method.settings)
        for name in phase.reinitialize:
            self.method.parts.trained[name].load_state_dict(fresh.parts.trained[name].state_dict())

    # ----------------------------------------------------------------------------------------------------- one step

    def _train_step(self, batch: Batch, at: Progress) -> dict[str, float]:
        torch.manual_seed(derive_seed(self.options.seed, self.options.rank, "step", at.step))
        batch = batch.to(self.options.device, non_blocking=self._on_cuda)
        self._rates = {entry.group.prefix: entry.set_rate(at) for entry in self._optimizers}
        for entry in self._optimizers:
            entry.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.float16, enabled=self._on_cuda):
            output = self.method.losses(batch, at)
        values = _floats({**output.losses, **{f"measure:{k}": v for k, v in output.measures.items()}})
        finite = self._finite_terms(output.losses, values)
        if finite is not None:
            self._measure_shares(finite, output.trains, at)
        taken = finite is not None and self._optimize(list(finite.values()), output.trains)
        if taken:
            self.method.after_step(at)
        else:
            self.skipped_steps += 1
        for name, value in values.items():
            self._means.add(name, value)
        return {name: value for name, value in values.items() if not name.startswith("measure:")}

    def _finite_terms(self, losses: dict[str, Tensor], values: dict[str, float]) -> dict[str, Tensor] | None:
        """The finite terms; None where a supervised one is not finite, so that no step may be taken."""
        kept, supervised_is_finite = {}, True
        for name, term in losses.items():
            if values[name] - values[name] == 0:  # neither nan nor infinite
                self._bad_streaks.pop(name, None)
                kept[name] = term
                continue
            self._bad_streaks[name] = self._bad_streaks.get(name, 0) + 1
            self._dropped_terms[name] = self._dropped_terms.get(name, 0) + 1
            supervised_is_finite &= not name.startswith(SUPERVISED)
            if self._bad_streaks[name] >= MAX_BAD_STREAK:
                raise TrainingDiverged(
                    f"{self.method.name}: loss term '{name}' was {values[name]} in {MAX_BAD_STREAK} steps in a row, up "
                    f"to step {self.step}. Expected: finite values. What to do: look at {self.folder / 'log.jsonl'}, "
                    "check the images for extreme values, or lower the method's weights with --set"
                )
        return kept if supervised_is_finite else None

    def _measure_shares(self, terms: dict[str, Tensor], trains: tuple[str, ...] | None, at: Progress) -> None:
        """Logs the unsupervised terms' share of the gradient, now and then; changes nothing."""
        every = self.options.gradient_share_every
        if every == 0 or self.options.compile:  # a compiled backward pass frees its graph
            return
        terms = {name: term for name, term in terms.items() if term.requires_grad}
        beyond = {name: term for name, term in terms.items() if not name.startswith(SUPERVISED)}
        every = every or measuring_interval(self.options.total_steps, len(beyond))
        if (at.step + 1) % every:
            return
        supervised = [term for name, term in terms.items() if name not in beyond]
        moving = [entry for entry in self._optimizers if trains is None or entry.part in trains]
        parameters = [parameter for entry in moving for parameter in entry.parameters if parameter.requires_grad]
        shares = gradient_shares(supervised, beyond, parameters, self._scaler.scale)
        for name, share in _floats(shares).items():
            self._means.add(f"gradient_share:{name}", share)

    def _optimize(self, terms: list[Tensor], trains: tuple[str, ...] | None) -> bool:
        """Backward, clip, step. False where nothing was trained or a gradient was not finite."""
        terms = [term for term in terms if term.requires_grad]
        if not terms:
            return False
        self._scaler.scale(torch.stack([term.float() for term in terms]).sum()).backward()
        moving = [o for o in self._optimizers if o.has_gradient and (trains is None or o.part in trains)]
        norms = {}
        for entry in moving:
            self._scaler.unscale_(entry.optimizer)
            norms[entry.group.prefix] = entry.clip()
        finite = all(value - value == 0 for value in _floats(norms).values())
        for name, norm in _floats(norms).items():
            self._means.add(f"gradient_norm:{name}", norm)
        for entry in moving:
            if self._scaler.is_enabled():
                self._scaler.step(entry.optimizer)
            elif finite:
                entry.optimizer.step()
        if moving:
            self._scaler.update()
        return finite and bool(moving)

    # ------------------------------------------------------------------------------------------------ log and state

    def _log_line(self, at: Progress, steps: int, seconds: float, waited: float) -> dict[str, Any]:
        means = self._means.means()
        line = {
            "step": self.step,
            "phase": at.phase,
            "losses": {k: v for k, v in means.items() if ":" not in k},
            "measures": {k.split(":", 1)[1]: v for k, v in means.items() if k.startswith("measure:")},
            "gradient_norm": {k.split(":", 1)[1]: v for k, v in means.items() if k.startswith("gradient_norm:")},
            "gradient_share": {k.split(":", 1)[1]: v for k, v in means.items() if k.startswith("gradient_share:")},
            "learning_rate": dict(self._rates),
            "skipped_steps": self.skipped_steps,
            "dropped_terms": dict(self._dropped_terms),
            "steps_per_second": steps / seconds,
            "data_wait_share": waited / seconds,
            "memory_mb": peak_memory_mb(self.options.device),
        }
        self._means.clear()
        return line

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, and what prediction needs."""
        return {
            **parts_state(self.method.parts),
            "prediction": self.method.prediction().to_json(),
            "alternatives": {name: spec.to_json() for name, spec in self.method.alternative_predictions().items()},
            "optimizers": optimizer_states(self._optimizers),
            "scaler": self._scaler.state_dict(),
            "log": self._means.state(),
            "progress": {
                "method": self.method.name,
                "step": self.step,
                "total": self.options.total_steps,
                "drawn": self._drawn,
                "entered_phase": self._entered,
                "refreshes_done": self._refreshes_done,
                "log_lines": self._log_lines,
                "skipped_steps": self.skipped_steps,
                "bad_streaks": dict(self._bad_streaks),
                "dropped_terms": dict(self._dropped_terms),
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave; the next step is the one after it."""
        progress = state["progress"]
        load_parts_state(self.method.parts, state)
        self._entered = progress["entered_phase"]
        if self._entered >= 0:
            phase = self.timetable.spans[self._entered].phase
            self._optimizers = group_optimizers(self.method.parts, phase, planned=self._planned)
            load_optimizer_states(self._optimizers, state["optimizers"])
        self._scaler.load_state_dict(state["scaler"])
        self._means.load(state["log"])
        self.step = progress["step"]
        self._drawn = progress["drawn"]
        self._refreshes_done = progress["refreshes_done"]
        self._log_lines = progress.get("log_lines", 0)
        self.skipped_steps = progress["skipped_steps"]
        self._bad_streaks = dict(progress["bad_streaks"])
        self._dropped_terms = dict(progress["dropped_terms"])
        latest = {refresh.store: at for at, refresh in self.timetable.refreshes[: self._refreshes_done]}
        for store, at in latest.items():
            self.source.reload_store(store, at)

    # ------------------------------------------------------------------------------------------------------- device

    @property
    def _on_cuda(self) -> bool:
        return self.options.device.startswith("cuda")

    def _place(self) -> None:
        place_parts(self.method.parts, self.options.device)
        if self.options.compile:
            compile_parts(self.method.parts.trained)


def place_parts(parts: Parts, device: str) -> None:
    """Moves everything to the device; trained parts are in training mode, followers in evaluation mode."""
    for module in parts.trained.values():
        module.to(device).train()
    for module in parts.followers.values():
        module.to(device).eval()
    if device == "cpu":
        for module in (*parts.trained.values(), *parts.followers.values()):
            to_channels_last(module)
    for name, value in parts.memory.items():
        if isinstance(value, Tensor | torch.nn.Module):
            parts.memory[name] = value.to(device)


def _floats(values: dict[str, Any]) -> dict[str, float]:
    """Python floats of scalar tensors and numbers, with one transfer from the device."""
    tensors = {name: value.detach().float().reshape(()) for name, value in values.items() if isinstance(value, Tensor)}
    moved = torch.stack(list(tensors.values())).tolist() if tensors else []
    by_name = dict(zip(tensors, moved, strict=True))
    return {name: by_name[name] if name in by_name else float(value) for name, value in values.items()}


def peak_memory_mb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
