"""The decisions that unlabeled cases and few labels ask for."""

from __future__ import annotations

import pytest

from autossl.planners.presets import PRESETS
from autossl.planners.semi_supervised import (
    METHODS_FOR_FEW,
    METHODS_FOR_MANY,
    WITHOUT_UNLABELED,
    ema_decay_max,
    left_right_pairs,
    mirror_axes,
    recommend_method,
    total_steps,
)
from autossl.trainers.registry import METHODS


@pytest.mark.parametrize(
    ("preset", "patients", "steps"),
    [("nano", 5, 1500), ("nano", 500, 1500), ("plain", 5, 50_000), ("plain", 24, 60_000), ("resenc_m", 260, 250_000)],
)
def test_total_steps_by_labeled_patients(preset: str, patients: int, steps: int) -> None:
    decided, why = total_steps(PRESETS[preset], patients)
    assert decided == steps
    assert preset in why or f"{patients} labeled patients" in why


@pytest.mark.parametrize(("steps", "decay"), [(1500, 0.99), (30_000, 0.99), (60_000, 0.995), (10**6, 0.999)])
def test_the_teacher_averages_a_three_hundredth_of_the_run(steps: int, decay: float) -> None:
    assert ema_decay_max(steps) == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize(
    "names",
    [
        ("kidney_left", "kidney_right"),
        ("Left Lung", "Right Lung"),
        ("LeftVentricle", "RightVentricle"),
        ("hippocampus-L", "hippocampus-R"),
        ("lh_cortex", "rh_cortex"),
        ("leftlung", "rightlung"),
    ],
)
def test_names_that_differ_in_their_side_are_a_pair(names: tuple[str, str]) -> None:
    assert left_right_pairs(["liver", names[1], names[0]]) == [names]


@pytest.mark.parametrize(
    "names",
    [("Anterior", "Posterior"), ("kidney_left", "lung_right"), ("left atrium", "LV"), ("L1", "L2"), ("LV", "RV")],
)
def test_other_names_are_no_pair(names: tuple[str, str]) -> None:
    assert left_right_pairs(names) == []


SIDES = [("kidney_left", "kidney_right")]


@pytest.mark.parametrize(
    ("dims", "forward", "pairs", "axes"),
    [
        (3, (0, 1, 2), [], (0, 1, 2)),
        (3, (0, 1, 2), SIDES, (0, 1)),
        (3, (2, 0, 1), SIDES, (1, 2)),  # sagittal slices: x comes first
        (3, (1, 0, 2), SIDES, (0, 1)),
        (2, (0, 1, 2), SIDES, (0,)),
        (2, (2, 0, 1), SIDES, (0, 1)),  # x is the slice axis, which no 2d patch has
        (2, (0, 1, 2), [], (0, 1)),
    ],
)
def test_the_left_right_axis_is_not_mirrored(
    dims: int, forward: tuple[int, ...], pairs: list[tuple[str, str]], axes: tuple[int, ...]
) -> None:
    decided, why = mirror_axes(dims, forward, pairs)
    assert decided == axes
    assert ("kidney_left / kidney_right" in why) is bool(pairs)


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "method"),
    [(5, 0, "supervised"), (5, 50, "fixmatch"), (9, 50, "fixmatch"), (10, 50, "self_training"), (50, 0, "supervised")],
)
def test_the_recommended_method(labeled: int, unlabeled: int, method: str) -> None:
    decided, why = recommend_method(labeled, unlabeled)
    assert decided == method
    assert str(unlabeled) in why or why == "no unlabeled case"


def test_recommended_methods_are_registered() -> None:
    assert {*METHODS_FOR_FEW, *METHODS_FOR_MANY, WITHOUT_UNLABELED} <= set(METHODS)
