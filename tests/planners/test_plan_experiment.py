"""Whole plans from the numbers of a data set."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.planners.budget import budget_statistics
from autossl.planners.case_scan import CaseFingerprint
from autossl.planners.facts import DatasetFacts
from autossl.planners.fingerprint import Fingerprint
from autossl.planners.plan_experiment import PlanOptions, plan_from_facts
from autossl.planners.plans import IntensityProperties, Plans, read_plans, write_plans
from autossl.planners.presets import PRESETS

INTENSITIES = IntensityProperties(mean=100, std=20, min=0, max=250, median=99, percentile_00_5=50, percentile_99_5=150)


def _facts(shape: tuple[int, ...], spacing: tuple[float, ...], n_cases: int = 10, **changes: Any) -> DatasetFacts:
    facts = DatasetFacts(
        dataset_name="Dataset001_Toy",
        channel_names=("MRI",),
        schema=LabelSchema({"background": (0,), "front": (1,), "back": (2,)}),
        orientation="RAS",
        file_ending=".nii.gz",
        spacings_zyx_mm=(spacing,) * n_cases,
        shapes_zyx=(shape,) * n_cases,
        n_unlabeled=0,
        n_labeled_patients=n_cases,
        median_relative_size_after_crop=1.0,
        intensities={"0": INTENSITIES},
    )
    return replace(facts, **changes)


HIPPOCAMPUS = _facts((36, 50, 35), (1, 1, 1), 260)
CT = _facts((400, 512, 512), (1, 0.8, 0.8), channel_names=("CT",))
PICTURES = _facts((1, 540, 780), (999, 1, 1), 100, orientation="native", file_ending=".png")


def _plans(facts: DatasetFacts, **options: Any) -> Plans:
    return plan_from_facts(facts, PlanOptions(**options))


def test_hippocampus_gets_the_published_plans() -> None:
    plans = _plans(HIPPOCAMPUS)
    assert set(plans.configurations) == {"2d", "3d_fullres"}
    volume, plane = plans.configurations["3d_fullres"], plans.configurations["2d"]
    assert (volume.patch_size, volume.batch_size) == ((40, 56, 40), 9)
    assert volume.architecture.arch_kwargs["features_per_stage"] == [32, 64, 128, 256]
    assert (plane.patch_size, plane.batch_size) == ((56, 40), 366)
    assert (plane.batch_dice, volume.batch_dice) == (True, False)
    assert plane.labeled_batch_size == plane.unlabeled_batch_size == 366


def test_the_batch_cap_counts_unlabeled_cases() -> None:
    plans = _plans(replace(HIPPOCAMPUS, n_unlabeled=260))
    assert plans.configurations["3d_fullres"].batch_size == round(0.05 * 36 * 50 * 35 * 520 / (40 * 56 * 40)) == 18
    assert "520 cases, labeled and unlabeled = 18" in plans.why["configurations.3d_fullres.batch_size"]


def test_a_large_volume_gets_a_low_resolution_and_batch_dice() -> None:
    plans = _plans(CT)
    low, full = plans.configurations["3d_lowres"], plans.configurations["3d_fullres"]
    assert (low.batch_dice, full.batch_dice) == (False, True)
    assert math.prod(low.patch_size) / math.prod(low.median_image_size_in_voxels) >= 0.245  # the shape is rounded
    assert max(low.spacing) / min(low.spacing) <= 2
    assert "planned: a patch of 3d_fullres covers" in plans.why["configurations.3d_lowres"]
    assert full.normalization_schemes == ("CTNormalization",)
    theirs = plans.to_nnunet_json()["configurations"]
    assert theirs["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    assert theirs["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    assert "mirror_axes" not in theirs["2d"]
    assert not {"learning_rate", "momentum", "labeled_batch_size"} & set(theirs["2d"])


def test_pictures_get_2d_only_and_keep_their_slice_spacing() -> None:
    plans = _plans(PICTURES, overwrite_target_spacing=(1.0, 2.0, 2.0))
    assert set(plans.configurations) == {"2d"}
    assert plans.configurations["2d"].spacing == (2, 2)
    assert plans.configurations["2d"].median_image_size_in_voxels == (270, 390)
    assert "one slice" in plans.why["configurations.3d_fullres"]
    assert (plans.image_reader_writer, plans.orientation) == ("NaturalImage2DIO", "native")


def test_sagittal_slices_come_first() -> None:
    plans = _plans(_facts((200, 200, 20), (1, 1, 5)))
    assert (plans.transpose_forward, plans.transpose_backward) == ((2, 0, 1), (1, 2, 0))
    assert plans.original_median_shape_after_transp == (20, 200, 200)
    assert plans.configurations["3d_fullres"].spacing == (5, 1, 1)
    assert plans.configurations["2d"].spacing == (1, 1)


def test_masks_are_used_only_for_z_scores_of_strongly_cropped_images() -> None:
    facts = replace(CT, channel_names=("ct", "T1", "rgb_to_0_1", "noNorm"), median_relative_size_after_crop=0.74)
    plan = _plans(facts).configurations["2d"]
    assert plan.normalization_schemes == (
        "CTNormalization",
        "ZScoreNormalization",
        "RGBTo01Normalization",
        "NoNormalization",
    )
    assert plan.use_mask_for_norm == (False, True, False, False)
    assert not any(_plans(replace(facts, median_relative_size_after_crop=0.75)).configurations["2d"].use_mask_for_norm)


def test_gpu_memory_scales_the_budget() -> None:
    small, large = (_plans(CT, gpu_memory_gb=gb).configurations["3d_fullres"] for gb in (4, 24))
    assert math.prod(small.patch_size) < math.prod(large.patch_size)


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("plain", ("nnUNetPlans", "nnUNetPlans_3d_fullres", "nnUNetPlans_3d_lowres")),
        ("resenc_m", ("nnUNetResEncUNetMPlans", "nnUNetPlans_3d_fullres", "nnUNetResEncUNetMPlans_3d_lowres")),
    ],
)
def test_residual_presets_name_the_plain_data_except_for_lowres(preset: str, names: tuple[str, ...]) -> None:
    plans = _plans(CT, preset=preset)
    full, low = plans.configurations["3d_fullres"], plans.configurations["3d_lowres"]
    assert (plans.plans_name, full.data_identifier, low.data_identifier) == names


# ------------------------------------------------------------------------------------------------------------- nano


@pytest.mark.parametrize("facts", [HIPPOCAMPUS, CT, PICTURES, _facts((23, 250, 200), (6, 1, 1))])
def test_nano_stays_small_and_sees_a_quarter_of_the_image_in_plane(facts: DatasetFacts) -> None:
    plans = _plans(facts, preset="nano")
    assert plans.semi_supervised.total_steps == 1500
    assert "3d_lowres" not in plans.configurations
    for name, plan in plans.configurations.items():
        voxels = math.prod(plan.patch_size)
        assert voxels <= (128**2 if name == "2d" else 48**3)
        assert plan.batch_size == (min(max(60_000 // voxels, 2), 24) if name == "2d" else 2)
        features = plan.architecture.arch_kwargs["features_per_stage"]
        assert features == [min(8 * 2**stage, 128) for stage in range(len(features))]
        assert math.prod(plan.patch_size[-2:]) >= 0.25 * math.prod(plan.median_image_size_in_voxels[-2:])


def test_nano_coarsens_only_where_it_has_to_and_says_why() -> None:
    assert _plans(HIPPOCAMPUS, preset="nano").configurations["3d_fullres"].spacing == (1, 1, 1)
    plans = _plans(PICTURES, preset="nano")
    spacing = plans.configurations["2d"].spacing
    steps = round(math.log(spacing[0], 1.03))
    assert spacing == pytest.approx((1.03**steps,) * 2)
    assert f"{steps} steps of 1.03" in plans.why["configurations.2d.spacing"]
    assert _plans(PICTURES, preset="nano", overwrite_target_spacing=(1.0, 1.0, 1.0)).configurations["2d"].spacing == (
        1,
        1,
    )


# ---------------------------------------------------------------------------------------------- reasons and validity


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("facts", [HIPPOCAMPUS, CT, PICTURES])
def test_every_decision_has_its_reason(facts: DatasetFacts, preset: str) -> None:
    plans = _plans(facts, preset=preset)
    content = plans.to_json()
    decided = {f"semi_supervised.{key}" for key in content["semi_supervised"]} | {"transpose_forward", "orientation"}
    for name in plans.configurations:
        fields: tuple[str, ...] = (
            "spacing",
            "patch_size",
            "batch_size",
            "labeled_batch_size",
            "unlabeled_batch_size",
            "batch_dice",
            "learning_rate",
            "momentum",
        )
        fields += ("normalization_schemes", "use_mask_for_norm", "mirror_axes", "median_image_size_in_voxels")
        fields += tuple(f"architecture.arch_kwargs.{k}" for k in ("strides", "kernel_sizes", "features_per_stage"))
        decided |= {f"configurations.{name}.{key}" for key in fields}
    assert decided <= set(plans.why)
    absent = {f"configurations.{name}" for name in ("3d_fullres", "3d_lowres") if name not in plans.configurations}
    assert absent <= set(plans.why)
    for path, reason in plans.why.items():
        if path not in absent:
            reduce(getitem, path.split("."), content)  # a reason names something that is there
        assert reason
        assert not reason.endswith(".")


def _case(front_pieces: tuple[int, float], back_fit: float) -> CaseFingerprint:
    return CaseFingerprint(
        pool="labeled",
        files={},
        spacing_zyx_mm=(1, 1, 1),
        shape_zyx=(36, 50, 35),
        shape_after_crop_zyx=(36, 50, 35),
        relative_size_after_crop=1,
        intensity_quantiles=(),
        class_voxels={"front": 500, "back": 500},
        components={"front": front_pieces, "back": (1, 1.0)},
        ellipticity={"front": 0.9, "back": back_fit},
        voxel_hash="",
        robust_hash="",
    )


def test_gated_classes_follow_the_labeled_cases() -> None:
    cases = {str(number): _case((2, 0.6), 0.97) for number in range(4)}
    fingerprint = Fingerprint.model_construct(cases=cases)
    statistics = budget_statistics(fingerprint, list(cases), HIPPOCAMPUS.schema)
    plans = _plans(replace(HIPPOCAMPUS, statistics=statistics))
    assert plans.semi_supervised.single_component_classes == (2,)
    assert plans.semi_supervised.elliptic_classes == (2,)
    assert "front: one component" in plans.why["semi_supervised.single_component_classes"]
    assert "0 of 4" in plans.why["semi_supervised.single_component_classes"]
    assert "0.970 over 4 of 4" in plans.why["semi_supervised.elliptic_classes"]


@pytest.mark.parametrize(
    ("facts", "options", "message"),
    [
        (HIPPOCAMPUS, {"preset": "plane"}, "preset 'plane' is unknown. Expected: one of plain"),
        (HIPPOCAMPUS, {"configurations": ("3d_lowres",)}, r"not planned: a patch of 3d_fullres covers 142\.2%"),
        (
            HIPPOCAMPUS,
            {"configurations": ("3d_ful",)},
            "configuration '3d_ful' is unknown. Expected: one of 3d_fullres",
        ),
        (HIPPOCAMPUS, {"configurations": ("3d_cascade_fullres",)}, "the cascade does not exist yet"),
        (
            PICTURES,
            {"configurations": ("2d", "3d_fullres")},
            "3d_fullres of Dataset001_Toy is not planned: .* one slice",
        ),
        (HIPPOCAMPUS, {"preset": "nano", "gpu_memory_gb": 8.0}, "sized for processors"),
        (HIPPOCAMPUS, {"gpu_memory_gb": 0.0}, "a positive number of gigabytes"),
        (_facts((5, 6, 7), (1, 1, 1)), {}, "too small to pool even once"),
    ],
)
def test_what_cannot_be_planned_is_refused(facts: DatasetFacts, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        _plans(facts, **options)


def test_two_wrong_configurations_are_reported_together() -> None:
    with pytest.raises(InvalidInput) as caught:
        _plans(HIPPOCAMPUS, configurations=("3d_lowres", "4d"))
    assert len(caught.value.problems) == 2


def test_no_labeled_case_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Dataset001_Toy has no labeled case"):
        replace(HIPPOCAMPUS, spacings_zyx_mm=(), shapes_zyx=())


# -------------------------------------------------------------------------------------------------- plans on disk


def test_plans_survive_the_disk(tmp_path: Path) -> None:
    plans = _plans(CT)
    write_plans(tmp_path / "plans_plain.json", plans)
    assert read_plans(tmp_path / "plans_plain.json") == plans
    assert read_plans(tmp_path / "plans_plain.json").hash() == plans.hash()


FULL = "configurations.3d_fullres"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{FULL}.batch_size", 0, r"configurations\.3d_fullres\.batch_size: .* greater than or equal to 1"),
        (
            f"{FULL}.patch_size",
            [100, 128, 128],
            r"3d_fullres: .*\(100, 128, 128\) is not divisible by .* \(16, 32, 32\)",
        ),
        (f"{FULL}.patch_size", [1024, 1024, 1024], r"3d_fullres\.patch_size: .* is no patch"),
        (f"{FULL}.spacing", [1, -1, 1], r"3d_fullres\.spacing: .* must be positive"),
        (f"{FULL}.spacing", [1, 1], "spacing has 2 axes, patch_size has 3"),
        (f"{FULL}.normalization_schemes", ["CtNormalization"], "CtNormalization is unknown; nearest: CTNormalization"),
        (f"{FULL}.mirror_axes", [3], r"mirror_axes \(3,\) must lie in 0\.\.2"),
        (f"{FULL}.patch", [1], r"3d_fullres\.patch: Extra inputs"),
        (f"{FULL}.architecture.network_class_name", "os.system", "os.system is not one of"),
        (f"{FULL}.architecture.arch_kwargs.n_stages", 7, "features_per_stage has 6 entries, expected 7"),
        (
            f"{FULL}.architecture.arch_kwargs.strides",
            [[0, 1, 1]] * 6,
            "strides holds .0, 1, 1., expected integers from 1",
        ),
        (f"{FULL}.architecture.arch_kwargs.strides", [1] * 6, "strides holds 1, expected 2 or 3 integers"),
        (f"{FULL}.architecture.arch_kwargs.norm_op", ["x"], r"norm_op is \['x'\], expected the name of a torch module"),
        (f"{FULL}.architecture._kw_requires_import", ["strides"], "strides is .*, expected the name of a torch module"),
        (f"{FULL}.architecture.arch_kwargs.norm_op", "torch.nn.InstanceNorm2d", "in a network of 3 dimensions"),
        (f"{FULL}.architecture.arch_kwargs.norm_op_kwargs", {"eps": "small"}, "holds eps: small, expected a number"),
        (f"{FULL}.architecture.arch_kwargs.norm_op_kwargs", {"eps": math.nan}, "holds eps: nan, expected a number"),
        (f"{FULL}.architecture.arch_kwargs.norm_op_kwargs", {"eps": True}, "holds eps: True, expected a number"),
        (f"{FULL}.architecture.arch_kwargs.nonlin_kwargs", {"inplace": 1}, "holds inplace: 1, expected true or false"),
        (f"{FULL}.architecture.arch_kwargs.nonlin_kwargs", {"device": "x"}, "holds device: x, expected one of eps"),
        (f"{FULL}.architecture.arch_kwargs.nonlin_kwargs", [1], r"nonlin_kwargs is \[1\], expected names with values"),
        ("transpose_backward", [1, 2, 0], "transpose_forward .* do not undo each other"),
        ("semi_supervised.ema_decay_max", 1.0, r"semi_supervised\.ema_decay_max: .* less than 1"),
        ("semi_supervised.recommended_configuration", "3d", "recommended_configuration '3d' is not in configurations"),
        ("foreground_intensity_properties_per_channel", {}, "channel 0 is CTNormalization"),
    ],
)
def test_a_hand_edit_that_makes_no_sense_is_refused_by_its_name(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    content = _plans(CT).to_json()
    *parents, last = path.split(".")
    reduce(getitem, parents, content)[last] = value
    (tmp_path / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=message) as caught:
        read_plans(tmp_path / "plans.json")
    assert "undo the edit of this field" in str(caught.value)
