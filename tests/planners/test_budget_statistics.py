"""Class statistics of a run come from its labeled cases alone; gates follow their stated rules."""

from __future__ import annotations

from typing import Literal

import pytest

from autossl.data.labels import LabelSchema
from autossl.planners.budget import BudgetStatistics, budget_statistics
from autossl.planners.case_scan import CaseFingerprint
from autossl.planners.fingerprint import Fingerprint

SCHEMA = LabelSchema({"background": (0,), "liver": (1,), "tumor": (2,)})


def _case(
    voxels: tuple[int, int] = (100, 10),
    largest: tuple[float, float] = (1.0, 1.0),
    fit: tuple[float | None, float | None] = (0.97, 0.8),
    pool: Literal["labeled", "unlabeled"] = "labeled",
    shape: tuple[int, int, int] = (10, 10, 10),
) -> CaseFingerprint:
    names = ("liver", "tumor")
    return CaseFingerprint(
        pool=pool,
        files={},
        spacing_zyx_mm=(3.0, 1.0, 0.5),
        shape_zyx=shape,
        shape_after_crop_zyx=shape,
        relative_size_after_crop=1.0,
        intensity_quantiles=((0.0,) * 7,),
        class_voxels=dict(zip(names, voxels, strict=True)),
        components={name: (1 if n else 0, share) for name, n, share in zip(names, voxels, largest, strict=True)},
        ellipticity=dict(zip(names, fit, strict=True)),
        voxel_hash="",
        robust_hash="",
    )


def _statistics(cases: list[CaseFingerprint], schema: LabelSchema = SCHEMA) -> BudgetStatistics:
    named = {str(number): case for number, case in enumerate(cases)}
    fingerprint = Fingerprint(
        version=1,
        dataset_name="D",
        orientation="RAS",
        labels=dict(schema.names),
        channel_names={0: "CT"},
        remap_labels={},
        cases=named,
        foreground_intensity_properties_per_channel={},
        median_relative_size_after_cropping=1.0,
        duplicates=(),
        domain_shift=(),
    )
    return budget_statistics(fingerprint, [name for name, case in named.items() if case.pool == "labeled"], schema)


def test_volumes_presence_and_shares() -> None:
    found = _statistics([_case((100, 0)), _case((300, 20)), _case((200, 0)), _case((9, 9), pool="unlabeled")])
    liver, tumor = found.classes["liver"], found.classes["tumor"]
    assert found.n_cases == 3
    assert (liver.volume_min, liver.volume_median, liver.volume_max) == (150, 300, 450)  # 1.5 mm³ a voxel
    assert liver.voxel_share == pytest.approx(0.2)
    assert (tumor.n_cases, tumor.presence, tumor.volume_min) == (1, 1 / 3, 30)
    assert tumor.voxel_share == pytest.approx(0.02 / 3)


def test_an_absent_class_has_no_volume_and_passes_no_gate() -> None:
    tumor = _statistics([_case((5, 0), fit=(0.99, None))] * 4).classes["tumor"]
    assert (tumor.volume_min, tumor.volume_max, tumor.ellipse_dice) == (None, None, None)
    assert not tumor.is_single_component
    assert not tumor.is_elliptic


def test_pictures_are_measured_in_square_mm() -> None:
    found = _statistics([_case((100, 10), shape=(1, 20, 50))] * 3)
    assert found.classes["liver"].volume_median == 50


@pytest.mark.parametrize("faulty, expected", [(0, (1,)), (1, (1,)), (2, ())])
def test_single_component_needs_95_percent_of_the_cases(faulty: int, expected: tuple[int, ...]) -> None:
    cases = [_case(largest=(0.989, 0.5))] * faulty + [_case(largest=(0.99, 0.5))] * (20 - faulty)
    found = _statistics(cases)
    assert found.single_component_classes == expected
    assert found.classes["liver"].single_component_why == (
        f"one component holds at least 99% of the voxels in {20 - faulty} of 20 labeled cases that show it; needed: "
        "95% of them, and 3 cases"
    )


def test_two_cases_prove_no_shape() -> None:
    assert _statistics([_case()] * 2).single_component_classes == ()
    assert _statistics([_case()] * 2).elliptic_classes == ()
    assert _statistics([_case()] * 3).single_component_classes == (1, 2)
    assert _statistics([_case()] * 3).elliptic_classes == (1,)


def test_elliptic_is_a_mean_dice_of_095_measured_in_every_case() -> None:
    assert _statistics([_case(fit=(0.94, 0.96))] * 3 + [_case(fit=(0.99, None))]).elliptic_classes == (1,)
    found = _statistics([_case(fit=(0.94, None))] * 3).classes["liver"]
    assert not found.is_elliptic
    assert "mean Dice with the ellipse of the same moments 0.940 over 3 of 3 labeled cases" in found.elliptic_why


def test_regions_are_named_by_the_values_they_are_written_with() -> None:
    schema = LabelSchema({"background": (0,), "liver": (1, 2), "tumor": (2,)}, regions_class_order=(1, 2))
    assert _statistics([_case()] * 3, schema).single_component_classes == (1, 2)


def test_statistics_refuse_cases_that_are_not_labeled() -> None:
    case = _case(pool="unlabeled")
    fingerprint = Fingerprint.model_construct(cases={"u": case})
    with pytest.raises(ValueError, match="case u is unlabeled"):
        budget_statistics(fingerprint, ["u"], SCHEMA)
