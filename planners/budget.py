"""What some of the labeled cases say about the classes: recomputed for each run from the labels that it may see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict

from autossl.data.labels import LabelSchema
from autossl.planners.case_scan import CaseFingerprint

if TYPE_CHECKING:
    from autossl.planners.fingerprint import Fingerprint

MIN_CASES = 3
"""Fewer cases that show a class prove nothing about its shape."""
ONE_COMPONENT_SHARE = 0.99
ONE_COMPONENT_CASES = 0.95
ELLIPSE_DICE = 0.95
"""Mean over the cases; squares reach 0.905 and half ellipses 0.93 (`label_shapes.ellipse_dice`)."""


class ClassStatistics(BaseModel):
    """Of one class (or region) over the labeled cases of a run. Volumes are mm³ (mm² in 2D) where it is present."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_cases: int
    """Cases that show the class."""
    presence: float
    """Share of the labeled cases that show it."""
    voxel_share: float
    """Voxels of the class / voxels of the cropped image, mean over all labeled cases."""
    volume_min: float | None
    volume_median: float | None
    volume_max: float | None
    one_component_share: float
    """Share of the cases (with the class) in which one component holds at least 99 % of its voxels."""
    ellipse_dice: float | None
    """Mean over the cases with the class."""
    is_single_component: bool
    is_elliptic: bool
    single_component_why: str
    elliptic_why: str


class BudgetStatistics(BaseModel):
    """Class statistics of a set of labeled cases."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_cases: int
    classes: dict[str, ClassStatistics]
    """By name, in the order of the network's outputs."""
    single_component_classes: tuple[int, ...]
    """The label values that these classes (or regions) are written with, as in the plans."""
    elliptic_classes: tuple[int, ...]
    """Likewise."""


def budget_statistics(fingerprint: Fingerprint, labeled_ids: Sequence[str], schema: LabelSchema) -> BudgetStatistics:
    """Statistics of the named labeled cases; a pure function of their fingerprints.

    Raises:
        KeyError: for a case that was not scanned.
        ValueError: for a case that is not labeled.
    """
    chosen = [fingerprint.cases[name] for name in labeled_ids]
    for name, case in zip(labeled_ids, chosen, strict=True):
        if case.pool != "labeled":
            raise ValueError(f"case {name} is {case.pool}: class statistics come from labeled cases only")
    classes = {name: _statistics(name, chosen) for name in schema.foreground}
    written = schema.written_values if schema.has_regions else schema.written_values[1:]
    by_value = dict(zip(written, classes.values(), strict=True))
    return BudgetStatistics(
        n_cases=len(chosen),
        classes=classes,
        single_component_classes=tuple(value for value, found in by_value.items() if found.is_single_component),
        elliptic_classes=tuple(value for value, found in by_value.items() if found.is_elliptic),
    )


def _statistics(name: str, cases: Sequence[CaseFingerprint]) -> ClassStatistics:
    present = [case for case in cases if case.class_voxels[name] > 0]
    volumes = [case.class_voxels[name] * voxel_volume(case) for case in present]
    one = sum(case.components[name][1] >= ONE_COMPONENT_SHARE for case in present)
    fits = [fit for fit in (case.ellipticity[name] for case in present) if fit is not None]
    is_single = len(present) >= MIN_CASES and one >= ONE_COMPONENT_CASES * len(present)
    is_elliptic = len(fits) >= MIN_CASES and len(fits) == len(present) and float(np.mean(fits)) >= ELLIPSE_DICE
    shares = [case.class_voxels[name] / math.prod(case.shape_after_crop_zyx) for case in cases]
    return ClassStatistics(
        n_cases=len(present),
        presence=len(present) / len(cases) if cases else 0.0,
        voxel_share=float(np.mean(shares)) if shares else 0.0,
        volume_min=min(volumes, default=None),
        volume_median=float(np.median(volumes)) if volumes else None,
        volume_max=max(volumes, default=None),
        one_component_share=one / len(present) if present else 0.0,
        ellipse_dice=float(np.mean(fits)) if fits else None,
        is_single_component=is_single,
        is_elliptic=is_elliptic,
        single_component_why=(
            f"one component holds at least {ONE_COMPONENT_SHARE:.0%} of the voxels in {one} of {len(present)} "
            f"labeled cases that show it; needed: {ONE_COMPONENT_CASES:.0%} of them, and {MIN_CASES} cases"
        ),
        elliptic_why=(
            f"mean Dice with the ellipse of the same moments "
            f"{f'{np.mean(fits):.3f}' if fits else 'not measurable'} over {len(fits)} of {len(present)} labeled cases "
            f"that show it; needed: {ELLIPSE_DICE:g} over all of them, and {MIN_CASES} cases"
        ),
    )


def voxel_volume(case: CaseFingerprint) -> float:
    """In mm³; the pixel's area in mm² where there is one slice."""
    spacing = case.spacing_zyx_mm
    return math.prod(spacing[1:] if case.shape_zyx[0] == 1 else spacing)
