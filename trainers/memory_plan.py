"""Whether a method fits the memory that its plan was made for, and how many unlabeled patches a step may have.

A plan is priced for supervised training on B_l patches. What a method needs beyond that is a factor, measured on a
small patch (`autossl.trainers.memory_trial`); here it becomes a decision, by pure functions. B_l and the patch stay.
Gradients are not accumulated over parts of a batch: batch Dice, means over the confident voxels and terms between
patches are no sums over patches, so that the parts would train something else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from autossl.planners.memory import NetworkShape, feature_map_elements
from autossl.planners.plans import NETWORK_CLASSES, ConfigurationPlan
from autossl.planners.presets import PRESETS, REFERENCE_BATCH, MemoryBudget

FALLBACK_BUDGET = {"plain": "plain", "resenc": "resenc_m"}
"""Where the preset has no budget in gigabytes, the one whose network is of the same kind is the measure."""


@dataclass(frozen=True)
class MemoryPlan:
    """The decision, as run.json holds it. GB are 1e9 bytes."""

    unlabeled_batch_size: int
    planned_unlabeled_batch_size: int
    why: str
    accumulation: int = 1
    """Parts of a batch whose gradients are added up: always 1."""
    factor: float | None = None
    """Memory of a step of the method with this batch / of a supervised step on B_l; None where it was not measured."""
    estimated_gb: float | None = None
    available_gb: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MemoryPlan:
        """From `to_json`; keys of later versions are left out."""
        return cls(**{entry.name: content[entry.name] for entry in fields(cls) if entry.name in content})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def candidates(planned: int) -> list[int]:
    """Unlabeled batch sizes that are tried: the planned one, then halves, down to 1."""
    return [planned] if planned <= 1 else [planned, *candidates(planned // 2)]


def choose_unlabeled_batch(
    planned: int, supervised_gb: float, factors: Mapping[int, float], available_gb: float
) -> MemoryPlan:
    """The largest of the measured batch sizes whose step fits; the smallest where none does.

    Args:
        planned: B_u of the plan.
        supervised_gb: what the plan's supervised step takes.
        factors: unlabeled batch size → memory relative to that step.
        available_gb: memory of the device.
    """
    sizes = sorted(factors, reverse=True)
    fitting = [size for size in sizes if supervised_gb * factors[size] <= available_gb]
    chosen = fitting[0] if fitting else sizes[-1]
    estimated = supervised_gb * factors[chosen]
    price = (
        f"a supervised step of this plan takes {supervised_gb:.1f} GB, one of this method with {chosen} unlabeled "
        f"patches {factors[chosen]:.2f} times that, {estimated:.1f} GB; the device has {available_gb:.1f} GB"
    )
    if not fitting:
        price += ": more than there is, and no smaller batch can be had; expect it to run out of memory"
    elif chosen < planned:
        price += f"; with the planned {planned} it would be {supervised_gb * factors[planned]:.1f} GB"
    return MemoryPlan(
        unlabeled_batch_size=chosen,
        planned_unlabeled_batch_size=planned,
        why=price,
        factor=round(factors[chosen], 4),
        estimated_gb=round(estimated, 3),
        available_gb=round(available_gb, 3),
    )


def supervised_step_gb(plan: ConfigurationPlan, preset: str, n_outputs: int) -> float:
    """Memory of the plan's supervised step by nnU-Net's rule of three: a budget's feature-map elements."""
    kind = _network_kind(plan)
    known = PRESETS.get(preset)
    budget = known.budget if known is not None else None
    if not isinstance(budget, MemoryBudget):
        budget = PRESETS[FALLBACK_BUDGET[kind]].budget
    if not isinstance(budget, MemoryBudget):
        raise TypeError(f"preset {FALLBACK_BUDGET[kind]} has no budget in gigabytes")
    kwargs = plan.architecture.arch_kwargs
    shape = NetworkShape(
        kind="resenc" if kind == "resenc" else "plain",
        features=tuple(kwargs["features_per_stage"]),
        strides=tuple(tuple(stride) for stride in kwargs["strides"]),
        encoder_blocks=tuple(kwargs["n_blocks_per_stage" if kind == "resenc" else "n_conv_per_stage"]),
        decoder_convolutions=tuple(kwargs["n_conv_per_stage_decoder"]),
        n_outputs=n_outputs,
    )
    elements = feature_map_elements(shape, plan.patch_size) * plan.batch_size / REFERENCE_BATCH[plan.dims]
    return elements / budget.elements[plan.dims] * budget.gpu_memory_gb


def small_patch(plan: ConfigurationPlan, cells: int = 2) -> tuple[int, ...]:
    """The patch at which the deepest feature map has so many cells per axis, at most the plan's own."""
    return tuple(
        min(edge, stride * cells)
        for edge, stride in zip(plan.patch_size, plan.architecture.cumulative_strides[-1], strict=True)
    )


def scale_up(plan: ConfigurationPlan, patch: tuple[int, ...]) -> float:
    """Voxels of the plan's patch / of the given one; activations grow in proportion."""
    return math.prod(plan.patch_size) / math.prod(patch)


def _network_kind(plan: ConfigurationPlan) -> str:
    names = {name: kind for kind, name in NETWORK_CLASSES.items()}
    return names[plan.architecture.network_class_name]
