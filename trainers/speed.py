"""How long a step takes, measured before a run that is given hours instead of steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from autossl.data.problems import InvalidInput, Problem
from autossl.trainers.base import Refresh, SemiSupervisedTrainer
from autossl.trainers.compiling import Trial, weights_of
from autossl.trainers.loop import BatchSource, LoopOptions, TrainingLoop

logger = logging.getLogger(__name__)

TRIAL_STEPS = 16
"""A run of so many steps is made and thrown away; enough for every phase of a method to get one."""
MEASURED_STEPS = 10
"""The last ones, which belong to the phase that lasts."""
TRAINING_SHARE = 0.93
"""Of the time given; the rest is for checkpoints and the final prediction of the validation cases."""


def seconds_per_step(
    method: SemiSupervisedTrainer,
    source: BatchSource,
    options: LoopOptions,
    refresh: Callable[[Refresh, int], bool | None],
) -> float:
    """Mean time of a step, on a method that is thrown away afterwards; `refresh` fills the stores that it asks for."""
    return trial_run(method, source, options, refresh).seconds_per_step


def trial_run(
    method: SemiSupervisedTrainer,
    source: BatchSource,
    options: LoopOptions,
    refresh: Callable[[Refresh, int], bool | None],
) -> Trial:
    """A run of `TRIAL_STEPS`; as `seconds_per_step`."""
    times = [time.perf_counter()]
    trial = replace(options, total_steps=TRIAL_STEPS, log_every=TRIAL_STEPS, checkpoint_every=TRIAL_STEPS)
    with TemporaryDirectory() as folder:
        loop = TrainingLoop(
            method,
            source,
            Path(folder),
            trial,
            refresh=refresh,
            on_progress=lambda step, total, losses: times.append(time.perf_counter()),
        )
        loop.run()
    seconds = (times[-1] - times[-1 - MEASURED_STEPS]) / MEASURED_STEPS
    before = max(0.0, times[-1] - times[0] - seconds * TRIAL_STEPS)
    return Trial(seconds, before, weights_of(method.parts.trained))


def steps_for_hours(hours: float, seconds: float, n_folds: int) -> int:
    """Steps per fold that fit into the hours given for all folds together.

    Raises:
        InvalidInput: not even a hundred steps fit.
    """
    steps = int(hours * 3600 * TRAINING_SHARE / n_folds / seconds)
    if steps < 100:
        raise InvalidInput(
            Problem(
                f"{hours:g} h for {n_folds} fold(s) are {steps} steps of {seconds:.2f} s each",
                "time for at least 100 steps",
                "give more hours, fewer folds, or a smaller preset such as nano",
            )
        )
    logger.info("%.3f s per step: %d steps in %g h for %d fold(s)", seconds, steps, hours, n_folds)
    return steps
