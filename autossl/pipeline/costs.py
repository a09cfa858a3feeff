"""What the parts of an experiment take, by the plans, the measured cases and the measured speeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

from autossl.data.parallel import usable_cpus
from autossl.pipeline.estimate import (
    preprocessed_bytes,
    preprocessing_seconds,
    probability_bytes,
    seconds_per_case,
)
from autossl.pipeline.measure import Speed
from autossl.pipeline.recommend import TWIN
from autossl.pipeline.steps import Estimate
from autossl.trainers.setup import RunSetup, median_case_shape


def training_devices(device: str) -> tuple[str, ...]:
    """Where trainings run side by side: every GPU where "cuda" was not narrowed down to one, else the one device."""
    if device != "cuda" or torch.cuda.device_count() < 2:
        return (device,)
    return tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))


def stored_voxels(setup: RunSetup, cases: Iterable[str]) -> float:
    """Voxels of preprocessed cases: cropped and at the plan's spacing; slices of 2D are not resampled."""
    target = setup.configuration.spacing
    total = 0.0
    for name in cases:
        case = setup.fingerprint.cases[name]
        order = setup.plans.transpose_forward
        spacing = [case.spacing_zyx_mm[axis] for axis in order][-len(target) :]
        factors = (own / wanted for own, wanted in zip(spacing, target, strict=True))
        total += math.prod(case.shape_after_crop_zyx) * math.prod(factors)
    return total


def original_voxels(setup: RunSetup, cases: Iterable[str]) -> float:
    """Voxels of cases as they were delivered."""
    return float(sum(math.prod(setup.fingerprint.cases[name].shape_zyx) for name in cases))


def preprocessing(setup: RunSetup, n_processes: int | None) -> Estimate:
    """Of the cases of one configuration that are not there yet."""
    missing = [
        name
        for name, case in setup.fingerprint.cases.items()
        if case.pool != "test" and not setup.store.has(name, case.pool == "labeled")
    ]
    voxels, channels = stored_voxels(setup, missing), setup.configuration.n_channels
    seconds = preprocessing_seconds(voxels, channels, n_processes or usable_cpus())
    return Estimate(seconds, preprocessed_bytes(voxels, channels), None)


def prediction(setup: RunSetup, n_cases: int, seconds_per_step: float | None, n_networks: int = 1) -> float | None:
    """Seconds for so many cases of median size; None where the speed of a supervised step is not known."""
    if seconds_per_step is None:
        return None
    shape = median_case_shape(setup.plans, setup.configuration)
    return n_cases * seconds_per_case(setup.configuration, shape, seconds_per_step, n_networks)


def training(
    setup: RunSetup, fold: str, steps_left: int, speed: Speed | None, seconds: Sequence[float | None]
) -> Estimate:
    """Of a fold: its steps, and the prediction of its validation cases.

    Args:
        setup: Of the run.
        fold: Which one.
        steps_left: Steps to go.
        speed: Measured on made-up images; None where nothing was.
        seconds: Per step of this run, and of the supervised one; None where it is not known.
    """
    cases = setup.folds[fold].validation
    own, twin = seconds
    predicting = prediction(setup, len(cases), twin if twin is not None else own)
    time = None if own is None else steps_left * own + (predicting or 0.0)
    disk = probability_bytes(original_voxels(setup, cases), setup.schema.n_outputs)
    if speed is None:
        return Estimate(time, disk, None)
    return Estimate(time, disk + speed.state_bytes, speed.memory_bytes)


def seconds_besides_training(setups: Sequence[RunSetup], speeds: Sequence[Speed]) -> float:
    """Of all that does not depend on the number of steps: preprocessing, validation, hidden test, ranking the pool."""
    twins = {speed.configuration: speed.seconds_per_step for speed in speeds if speed.method == TWIN}
    total = 0.0
    for setup in setups:
        folds, twin = setup.folds, twins[setup.request.configuration]
        if setup.method.name == TWIN:
            total += preprocessing(setup, None).seconds or 0.0
            n_unlabeled = max(len(fold.unlabeled) for fold in folds.values())
            total += prediction(setup, n_unlabeled, twin, len(folds)) or 0.0
        total += prediction(setup, sum(len(fold.validation) for fold in folds.values()), twin) or 0.0
        total += prediction(setup, len(setup.split.hidden_test), twin, len(folds)) or 0.0
    return total
