"""From measured figures to time, disk and memory: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable

from autossl.data.problems import InvalidInput, Problem
from autossl.inference.tiles import tile_starts
from autossl.planners.plans import ConfigurationPlan

TRAINING_SHARE = 0.95
"""Of the hours given; the rest is for checkpoints, starting processes, and what the estimates miss."""
MIN_STEPS = 100
PASSES_PER_STEP = 3.0
"""A training step is a forward pass and a backward pass that costs about two of them."""
PREPROCESSED_PER_SECOND = 1e6
"""Voxels per channel, process and second; measured 1.5e6 (hippocampus) to 6e6 (resampled LGG) on 2 cores."""
STORED_SHARE = 0.7
"""Preprocessed float32 images compressed, in bytes / uncompressed; measured 0.5 to 0.8."""
PROBABILITY_SHARE = 0.3
"""Quantized probabilities compressed / one byte per voxel and class: most voxels are certain."""


def tiles_of(shape: Iterable[float], patch: tuple[int, ...], step: float = 0.5) -> int:
    """Tiles of a sliding window over a case.

    Args:
        shape: Voxels [z, y, x].
        patch: Two entries (slice by slice) or three.
        step: Share of the patch between tiles.
    """
    sizes = [max(1, round(size)) for size in shape]
    edges = (1, *patch)[-3:]
    starts = [
        size if edge == 1 else len(tile_starts(max(size, edge), edge, step))
        for size, edge in zip(sizes, edges, strict=True)
    ]
    return math.prod(starts)


def seconds_per_case(
    plan: ConfigurationPlan, shape: Iterable[float], seconds_per_step: float, n_networks: int = 1
) -> float:
    """To predict a case with mirroring.

    Args:
        plan: Patch and mirror axes.
        shape: Voxels of the stored case, [z, y, x].
        seconds_per_step: Of a supervised training step on the plan's labeled batch.
        n_networks: Whose predictions are averaged.
    """
    forward = seconds_per_step / PASSES_PER_STEP / plan.labeled_batch_size
    return tiles_of(shape, plan.patch_size) * 2 ** len(plan.mirror_axes) * n_networks * forward


def preprocessing_seconds(voxels: float, n_channels: int, n_processes: int) -> float:
    """Of cases with so many voxels in all."""
    return voxels * n_channels / PREPROCESSED_PER_SECOND / max(1, n_processes)


def preprocessed_bytes(voxels: float, n_channels: int) -> float:
    """On disk, labels not counted: they compress to next to nothing."""
    return voxels * n_channels * 4 * STORED_SHARE


def probability_bytes(voxels: float, n_outputs: int) -> float:
    """On disk, of cases with so many voxels in all."""
    return voxels * n_outputs * PROBABILITY_SHARE


def steps_within(hours: float, seconds_per_step: Iterable[float], other_seconds: float, n_devices: int = 1) -> int:
    """Steps per fold so that all trainings and everything else fit into the hours; the same for all of them.

    A method and its twin take the same number of steps, so the slower method gets more of the time, not fewer steps.

    Args:
        hours: For everything.
        seconds_per_step: Of each fold of each run.
        other_seconds: Of what does not depend on the number of steps.
        n_devices: That train side by side.

    Raises:
        InvalidInput: not even a hundred steps fit.
    """
    slowest = math.fsum(seconds_per_step)
    seconds = (hours * 3600 * TRAINING_SHARE - other_seconds) * n_devices
    steps = int(seconds / slowest)
    if steps >= MIN_STEPS:
        return steps
    needed = (MIN_STEPS * slowest / n_devices + other_seconds) / TRAINING_SHARE / 3600
    raise InvalidInput(
        Problem(
            f"{hours:g} h are {max(0, steps)} steps per fold, after {other_seconds / 3600:.2f} h for all but training",
            f"time for at least {MIN_STEPS} steps: {needed:.2g} h",
            "give more hours, fewer methods (-m) or configurations (-c), or a smaller preset such as nano",
        )
    )
