"""Training folds of a run: the function behind `autossl_train`."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from autossl.data.files import remove_remnants, write_json
from autossl.data.locks import hold, lock_beside
from autossl.data.parallel import usable_cpus
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunSpec, fold_lock, fold_state, open_run, read_run
from autossl.planners.plans import write_plans
from autossl.trainers.base import SemiSupervisedTrainer, derive_seed
from autossl.trainers.checkpoints import read_newest, remove_earlier
from autossl.trainers.compiling import CompileChoice, Trial, choose_compile, weights_of
from autossl.trainers.determinism import deterministic_operations
from autossl.trainers.extend import extend_run, reopen_fold
from autossl.trainers.initial_weights import initial_checkpoint, initial_record, load_initial_weights
from autossl.trainers.loop import LoopOptions, TrainingInterrupted, TrainingLoop
from autossl.trainers.memory_trial import fit_to_memory
from autossl.trainers.provide import provide_cases
from autossl.trainers.refresh import PoolPredictor, blank_pseudo_labels
from autossl.trainers.setup import RunSetup, TrainRequest, resolve
from autossl.trainers.source import FoldSource
from autossl.trainers.speed import steps_for_hours, trial_run
from autossl.trainers.validation import ValidationResult, validate_fold

logger = logging.getLogger(__name__)

FOLD_WAIT_S = 5.0
"""For another training of the fold: one that was told to stop saves its state first."""
RUN_WAIT_S = 60.0
"""For a training of another fold that writes run.json."""

__all__ = ["FoldResult", "TrainHooks", "TrainRequest", "TrainResult", "train"]


@dataclass(frozen=True)
class TrainHooks:
    """Callbacks of a command; all may be None."""

    on_start: Callable[[str, RunSetup, RunSpec, Path], None] | None = None
    """(fold, setup, specification, run folder), before a fold is trained."""
    on_step: Callable[[str, int, int, dict[str, float]], None] | None = None
    """(fold, steps done, total, weighted loss terms)."""
    on_predict: Callable[[str, int, int, str], None] | None = None
    """(what, cases done, cases in all, case): pseudo-labels, and validation at the end."""
    on_preprocess: Callable[[str, str, int, int], None] | None = None
    """(configuration, case, done, total), where a budget on CT needs data of its own."""
    handle_signals: bool = False
    """SIGTERM and SIGINT save the state and raise `TrainingInterrupted`."""


@dataclass(frozen=True)
class FoldResult:
    """What became of one fold."""

    fold: str
    folder: Path
    steps: int
    trained_now: bool
    """False: it was finished before."""
    validation: ValidationResult | None
    """None for the fold that trains on everything."""


@dataclass(frozen=True)
class TrainResult:
    """What became of a call."""

    folder: Path
    spec: RunSpec
    folds: tuple[FoldResult, ...]


def train(request: TrainRequest, hooks: TrainHooks | None = None) -> TrainResult:
    """Trains the folds that are not finished yet, and predicts their validation cases.

    Raises:
        InvalidInput: the request cannot be met, or another process trains a fold of it; nothing was written.
        TrainingInterrupted: asked to stop; the state was saved.
        TrainingDiverged: a loss term stayed non-finite.
    """
    setup = resolve(request)
    with _folds_held(setup) as held, deterministic_operations(request.deterministic):
        return _train(setup, hooks or TrainHooks(), held)


def _train(setup: RunSetup, hooks: TrainHooks, held: Collection[Path]) -> TrainResult:
    request = setup.request
    share_cores(setup.device, _workers(setup))
    provide_cases(setup, hooks.on_preprocess)
    setup = fit_to_memory(setup)
    steps = _total_steps(setup)
    folder = setup.folder(setup.spec(steps))
    if not request.overwrite:
        _use_threads_of(folder, setup.device)
    setup = replace(setup, compile=_compile_choice(setup, folder, steps))
    asked = setup.spec(steps)
    if request.initial_weights is not None:
        asked = asked.model_copy(update={"initial": _initial_records(setup, request.initial_weights, steps)})
    with hold(lock_beside(folder), f"the files of {folder.name}", RUN_WAIT_S):
        if request.overwrite:
            _check_alone(folder, held)
        if request.resume:
            extend_run(folder, asked, setup.method(setup.job(next(iter(setup.folds)), steps), setup.settings))
        spec = open_run(folder, asked, request.resume, request.overwrite)
        setup = replace(setup.with_cases_of(spec), compile=CompileChoice.from_json(spec.compile))
        write_plans(folder / "plans.json", setup.plans)
        write_json(folder / "dataset.json", setup.description.to_json())
        if spec.extended_at:  # all folds at once: nobody may take those of two lengths
            for fold in setup.folds:
                reopen_fold(folder / f"fold_{fold}", spec.total_steps)
    results = []
    for fold in setup.folds:
        if hooks.on_start is not None:
            hooks.on_start(fold, setup, spec, folder)
        results.append(_train_fold(setup, fold, spec, folder / f"fold_{fold}", hooks))
    return TrainResult(folder, spec, tuple(results))


@contextmanager
def _folds_held(setup: RunSetup) -> Iterator[list[Path]]:
    """Holds the locks of the folds, which it yields; with `overwrite` of all, because the whole run may be removed."""
    folder = setup.folder(setup.spec(1))
    names = set(setup.folds)
    if setup.request.overwrite:
        names |= {path.name.removeprefix("fold_") for path in folder.glob("fold_*")}
    paths = [fold_lock(folder, fold) for fold in sorted(names)]
    with ExitStack() as held:
        for fold, path in zip(sorted(names), paths, strict=True):
            held.enter_context(hold(path, f"fold {fold} of {folder.name}", FOLD_WAIT_S))
        yield paths


def _check_alone(folder: Path, held: Collection[Path]) -> None:
    """Refuses to overwrite a run of which another process began a fold after our locks were taken."""
    for path in sorted(fold_lock(folder, "").parent.glob(fold_lock(folder, "*").name)):
        if path not in held:
            with hold(path, f"a fold of {folder.name}", FOLD_WAIT_S):
                pass


def _train_fold(setup: RunSetup, fold: str, spec: RunSpec, folder: Path, hooks: TrainHooks) -> FoldResult:
    finished = fold_state(folder) == "finished"
    if finished:
        remove_earlier(folder)
    job = setup.job(fold, spec.total_steps)
    method = setup.method(job, setup.settings)
    if not job.has_unlabeled and setup.method.name != "supervised":
        logger.warning("fold %s has no unlabeled case: %s trains its labeled-only objective", fold, setup.method.name)
    if not finished:
        folder.mkdir(parents=True, exist_ok=True)
        remove_remnants(folder)
        _train_to_the_end(setup, fold, method, spec.total_steps, folder, hooks)
    validation = None
    if setup.folds[fold].validation:
        on_case = _bound(hooks.on_predict, "validation")
        validation = validate_fold(setup, fold, method, folder, on_case)
    return FoldResult(fold, folder, spec.total_steps, not finished, validation)


def _train_to_the_end(
    setup: RunSetup, fold: str, method: SemiSupervisedTrainer, steps: int, folder: Path, hooks: TrainHooks
) -> None:
    request = setup.request
    if request.initial_weights is not None:
        for report in load_initial_weights(method.parts, initial_checkpoint(request.initial_weights, fold)):
            logger.info("--init: %s", report)
    source = _source(setup, fold, folder)
    with _stop_signals(hooks.handle_signals) as stopped:
        loop = TrainingLoop(
            method,
            source,
            folder,
            loop_options(setup, fold, steps),
            refresh=PoolPredictor(
                setup, fold, method, source.store_folder, _bound(hooks.on_predict, "pseudo-labels"), stopped.is_set
            ),
            on_progress=_bound(hooks.on_step, fold),
            should_stop=stopped.is_set,
        )
        state = read_newest(folder)
        if state is not None:
            loop.load_state(state)
            logger.info("fold %s goes on after step %d of %d", fold, loop.step, steps)
        loop.run()
        if stopped.is_set():  # in its last step: what comes after it would take long
            raise TrainingInterrupted(loop.step, folder / CHECKPOINT_FINAL)


def loop_options(setup: RunSetup, fold: str, steps: int) -> LoopOptions:
    """A line of log about 60 times a run, a checkpoint about 12 times, at most 250 and 2500 steps apart."""
    log_every = max(1, min(250, steps // 60))
    checkpoint_every = log_every * max(1, min(2500, steps // 12) // log_every)
    return LoopOptions(
        total_steps=steps,
        device=setup.device,
        compile=setup.compile.on if setup.compile else setup.request.compile == "on",
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        seed=derive_seed(setup.request.seed, "fold", fold),
    )


def default_workers(device: str) -> int:
    """Loader processes: on a GPU up to 12 of the cores; on a CPU one beside the training, none on a single core."""
    cores = usable_cpus()
    return min(1, cores - 1) if device == "cpu" else min(12, cores)


def share_cores(device: str, num_workers: int) -> None:
    """On a CPU, leaves a core to each loader process but one: PyTorch's threads wait for the slowest of them.

    A single loader needs little of its core. Measured on two cores that did nothing else, with one loader: a step of
    nnU-Net's 3D network for hippocampus takes 11.9 s with two threads and 21.5 s with one, of the nano one 0.40 s and
    0.58 s. Beside another job that is the other way round (docs/speed.md). OMP_NUM_THREADS, where it is set, is the
    user's own decision and stays.
    """
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cpus() - max(0, num_workers - 1))))


def _use_threads_of(folder: Path, device: str) -> None:
    """On a CPU, a run goes on, and gets further folds, with as many threads as it began with: others give other bits.

    OMP_NUM_THREADS, where it is set, is the user's own decision and stays.
    """
    if device != "cpu" or "OMP_NUM_THREADS" in os.environ or not (folder / RUN_FILE).is_file():
        return
    threads = read_run(folder).threads
    if threads is not None and threads != torch.get_num_threads():
        logger.info("%d threads, as when the run began", threads)
        torch.set_num_threads(threads)


def _workers(setup: RunSetup) -> int:
    asked = setup.request.num_workers
    return default_workers(setup.device) if asked is None else asked


def _source(setup: RunSetup, fold: str, folder: Path) -> FoldSource:
    return FoldSource(
        streams=setup.streams(fold),
        configuration=setup.configuration,
        schema=setup.schema,
        seed=derive_seed(setup.request.seed, "fold", fold),
        store_folder=folder / "pseudo_labels",
        num_workers=_workers(setup),
        pin_memory=setup.device.startswith("cuda"),
        signed_distance=setup.method.needs.signed_distance,
    )


def _total_steps(setup: RunSetup) -> int:
    """As asked; by measured speed with --hours (a run that exists keeps its own number); else the plan's.

    The method may make more of it, but not of the hours: those are for everything.
    """
    request = setup.request
    if request.hours is None:
        asked = setup.plans.semi_supervised.total_steps if request.steps is None else request.steps
        return setup.method.total_steps(asked, setup.settings)
    started = setup.folder(setup.spec(1)) / "run.json"
    if request.resume and started.is_file():
        return read_run(started.parent).total_steps
    return steps_for_hours(request.hours, _trial(setup, request.compile == "on").seconds_per_step, len(setup.folds))


def _trial_method(setup: RunSetup) -> SemiSupervisedTrainer:
    return setup.method(setup.job(next(iter(setup.folds)), 1000), setup.settings)


def _trial(setup: RunSetup, compiled: bool) -> Trial:
    """A few steps of the first fold, from its initial weights, thrown away."""
    fold = next(iter(setup.folds))
    with TemporaryDirectory() as scratch:
        source = _source(setup, fold, Path(scratch))
        options = replace(loop_options(setup, fold, 1000), compile=compiled)
        return trial_run(_trial_method(setup), source, options, blank_pseudo_labels(source))


def _compile_choice(setup: RunSetup, folder: Path, steps: int) -> CompileChoice:
    """That of the run where it exists, else what is asked for."""
    request = setup.request
    if (folder / RUN_FILE).is_file() and not request.overwrite:
        kept = CompileChoice.from_json(read_run(folder).compile)
        if request.compile == ("off" if kept.on else "on"):
            state = "compiled" if kept.on else "not compiled"
            logger.warning("the networks stay %s, as when the run began (%s)", state, kept.why or "without a choice")
        return kept
    return choose_compile(
        request.compile or "off",
        setup.device,
        steps,
        lambda: weights_of(_trial_method(setup).parts.trained),
        lambda compiled: _trial(setup, compiled),
    )


def _initial_records(setup: RunSetup, source: Path, steps: int) -> dict[str, dict[str, Any]]:
    """Fold → what run.json says of its starting point.

    Raises before anything is written where a file is not ours, nothing in it fits or it knows validation cases.
    """
    whole = setup.method.needs_initial_weights(setup.settings)
    return {
        fold: initial_record(
            setup.method(setup.job(fold, steps), setup.settings).parts, source, fold, cases, setup.raw.name, whole
        )
        for fold, cases in setup.folds.items()
    }


def _bound(callback: Callable[..., None] | None, *first: Any) -> Callable[..., None] | None:
    return None if callback is None else lambda *rest: callback(*first, *rest)


@contextmanager
def _stop_signals(enabled: bool) -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, instead of ending the process, while the block runs.

    A second one, a second later or more (launchers pass one on twice), ends it at once: the steps since the last
    checkpoint are lost, no more, because files appear whole.
    """
    stopped = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    asked: list[float] = []
    owner = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a worker inherits this: it stays until the state is saved
            return
        asked.append(time.monotonic())
        if asked[-1] - asked[0] >= 1:
            raise KeyboardInterrupt
        if stopped.is_set():
            return
        stopped.set()
        logger.warning("stopping after this step; once more stops at once and loses the steps since the checkpoint")

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
