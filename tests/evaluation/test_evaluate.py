"""Folders of label maps are matched, checked as a whole, scored and summarized."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from autossl.data.labels import LabelSchema
from autossl.data.probabilities import probabilities_file, write_probabilities_quantized
from autossl.data.problems import InvalidInput
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "core": (2,)})
SPACING_XYZ = (2.0, 5.0, 10.0)  # 100 mm³: ten voxels are 1 mL
CORNER = math.hypot(2.0, 5.0) / 2  # length of an outline that cuts off a corner between pixels


def write(path: Path, values: list[int], spacing: tuple[float, float, float] = SPACING_XYZ) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.array(values, dtype=np.uint8).reshape(-1, 1, 1)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([*spacing, 1.0])), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    write(predictions / "a.nii.gz", [1, 1, 0, 0])
    write(references / "a.nii.gz", [1, 0, 0, 0])
    write(predictions / "b.nii.gz", [1, 0, 2, 0])
    write(references / "b.nii.gz", [1, 0, 0, 0])
    write(predictions / "c.nii.gz", [1, 0, 0, 0])
    write(references / "c.nii", [1, 0, 2, 2])
    return predictions, references


def problems_of(folders: tuple[Path, Path]) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        evaluate_folder(*folders, SCHEMA)
    return [f"{problem.case}: {problem.found}" for problem in caught.value.problems]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_means_leave_out_undefined_cases_and_count_all_kinds_of_empty(
    folders: tuple[Path, Path], n_workers: int
) -> None:
    evaluation = evaluate_folder(*folders, SCHEMA, EvaluationOptions(n_workers=n_workers))
    organ, core = evaluation.class_summary("organ"), evaluation.class_summary("core")
    assert organ.means["dice"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert core.means["dice"] == 0.0
    overlap = {"dice": 2, "iou": 2, "volume_error_relative": 1, "volume_difference_ml": 2}
    assert core.n_defined == overlap | {"hd95_mm": 0, "assd_mm": 0, "nsd": 2}
    assert core.means["volume_error_relative"] == -1.0
    assert core.means["volume_difference_ml"] == pytest.approx((0.1 - 0.2) / 2)
    assert (core.n_both_empty, core.n_false_alarm, core.n_missed) == (1, 1, 1)
    assert evaluation.foreground_mean["dice"] == pytest.approx((2 / 3 + 1 + 1) / 6)


def test_summary_json_holds_the_same_figures_with_null_for_undefined(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    evaluation = evaluate_folder(*folders, SCHEMA, output=tmp_path / "out" / "summary.json")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == evaluation.to_json()
    assert summary["cases"]["a"]["core"]["dice"] is None
    assert summary["cases"]["a"]["organ"] == {
        "dice": pytest.approx(2 / 3),
        "iou": 0.5,
        "volume_error_relative": 1.0,
        "volume_difference_ml": pytest.approx(0.1),
        "hd95_mm": 2.0,
        # 4 x 5 mm against 2 x 5 mm: of both outlines' 8 corners and 2 sides of 2 mm, 2 corners are 2 mm apart
        "assd_mm": pytest.approx(2 * CORNER * 2.0 / (8 * CORNER + 2 * 2.0)),
        "nsd": pytest.approx(1 - 2 * CORNER / (8 * CORNER + 2 * 2.0)),
        "n_prediction": 2,
        "n_reference": 1,
        "true_positive": 1,
        "false_positive": 1,
        "false_negative": 0,
    }
    assert summary["n_cases"] == 3
    assert "both empty" in summary["empty_mask_rule"]


def test_cases_without_a_partner_are_all_named(folders: tuple[Path, Path]) -> None:
    predictions = folders[0]
    write(predictions / "only_predicted.nii.gz", [0, 0, 0, 0])
    (predictions / "b.nii.gz").unlink()
    (predictions / "c.nii.gz").unlink()
    assert problems_of(folders) == [
        "only_predicted: predicted, but has no reference",
        "b: has a reference, but was not predicted",
        "c: has a reference, but was not predicted",
    ]


def test_missing_predictions_can_be_left_out_and_are_named(folders: tuple[Path, Path]) -> None:
    (folders[0] / "b.nii.gz").unlink()
    evaluation = evaluate_folder(*folders, SCHEMA, EvaluationOptions(only_predicted=True))
    assert list(evaluation.cases) == ["a", "c"]
    assert evaluation.to_json()["references_without_prediction"] == ["b"]


def test_everything_that_is_wrong_inside_files_is_told_at_once(folders: tuple[Path, Path]) -> None:
    predictions, references = folders
    write(predictions / "a.nii.gz", [1, 1, 0, 0], spacing=(2.0, 5.0, 11.0))
    write(predictions / "b.nii.gz", [1, 0, 9, 0, 0])
    (references / "c.nii").write_bytes(b"")
    found = problems_of(folders)
    assert [line.split(":")[0] for line in found] == ["a", "b", "b", "c"]
    assert "spacing (2, 5, 11) against (2, 5, 10)" in found[0]
    assert "label values [9]" in found[1]
    assert "size (5, 1, 1) against (4, 1, 1)" in found[2]
    assert "empty" in found[3]


def test_nothing_is_written_when_something_is_wrong(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[0] / "b.nii.gz").unlink()
    with pytest.raises(InvalidInput):
        evaluate_folder(*folders, SCHEMA, output=tmp_path / "summary.json")
    assert not (tmp_path / "summary.json").exists()


def test_uncertainty_maps_beside_the_label_maps_are_no_cases(folders: tuple[Path, Path]) -> None:
    for name in ("a_entropy", "a_disagreement"):
        write(folders[0] / f"{name}.nii.gz", [0, 0, 0, 0])
    assert list(evaluate_folder(*folders, SCHEMA).cases) == ["a", "b", "c"]


def test_a_case_whose_own_name_ends_like_an_uncertainty_map_is_scored(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        write(folder / "low_entropy.nii.gz", [1, 0, 0, 0])
    assert "low_entropy" in evaluate_folder(*folders, SCHEMA).cases


def test_a_case_in_two_formats_is_refused(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "a.nii", [1, 1, 0, 0])
    assert problems_of(folders) == ["a: also there as a.nii"]


@pytest.mark.parametrize("present", [True, False])
def test_a_folder_without_label_maps_is_refused(folders: tuple[Path, Path], tmp_path: Path, present: bool) -> None:
    empty = tmp_path / "empty"
    if present:
        empty.mkdir()
    with pytest.raises(InvalidInput, match="no label map in the folder" if present else "does not exist"):
        evaluate_folder(empty, folders[1], SCHEMA)


def test_pictures_have_no_volume_in_ml(tmp_path: Path) -> None:
    for name in ("predictions", "references"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8)).save(tmp_path / name / "a.png")
    scores = evaluate_folder(tmp_path / "predictions", tmp_path / "references", SCHEMA).cases["a"]["organ"]
    assert scores.metrics["dice"] == 1.0
    assert math.isnan(scores.metrics["volume_difference_ml"])


def test_distances_of_pictures_are_in_pixels_and_those_of_single_slices_in_mm(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, column in (("predictions", 1), ("references", 4)):
        (tmp_path / name).mkdir(exist_ok=True)
        pixels = np.zeros((9, 9), dtype=np.uint8)
        pixels[2:7, column : column + 3] = 1
        Image.fromarray(pixels).save(tmp_path / name / "p.png")
    evaluation = evaluate_folder(*folders, SCHEMA, EvaluationOptions(cases=["p"]))
    assert evaluation.cases["p"]["organ"].metrics["hd95_px"] == 3.0
    assert evaluation.surface_settings["unit"] == "px"
    assert "hd95_mm" not in evaluation.foreground_mean
    assert evaluate_folder(*folders, SCHEMA, EvaluationOptions(cases=["a"])).surface_settings["unit"] == "mm"


def test_a_folder_with_pictures_and_volumes_keeps_both_units_apart(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        Image.fromarray(np.array([[0, 1], [1, 2]], dtype=np.uint8)).save(folder / "p.png")
    organ = evaluate_folder(*folders, SCHEMA).class_summary("organ")
    assert (organ.n_defined["dice"], organ.n_defined["hd95_mm"], organ.n_defined["hd95_px"]) == (4, 3, 1)


def test_surfaces_can_be_left_out_and_lesions_added(folders: tuple[Path, Path]) -> None:
    options = EvaluationOptions(surfaces=False, lesions=True)
    evaluation = evaluate_folder(*folders, SCHEMA, options)
    overlap = ["dice", "iou", "volume_error_relative", "volume_difference_ml"]
    assert list(evaluation.foreground_mean) == [*overlap, "lesion_f1"]
    assert evaluation.class_summary("core").means["lesion_f1"] == 0.0
    assert evaluation.to_json()["surfaces"] is None


def test_the_tolerance_of_a_class_is_used_and_stated(folders: tuple[Path, Path]) -> None:
    evaluation = evaluate_folder(*folders, SCHEMA, EvaluationOptions(tolerance_mm={"organ": 2.0}))
    assert evaluation.cases["a"]["organ"].metrics["nsd"] == 1.0
    assert evaluation.to_json()["surfaces"] == {
        "convention": "surface_elements",
        "unit": "mm",
        "nsd_tolerance": {"organ": 2.0, "core": 1.0},
    }


def test_tolerances_that_cannot_be_used_are_all_named(folders: tuple[Path, Path]) -> None:
    tolerances = {"organ": -1.0, "liver": 2.0, "core": math.nan}
    with pytest.raises(InvalidInput) as caught:
        evaluate_folder(*folders, SCHEMA, EvaluationOptions(tolerance_mm=tolerances))
    assert len(caught.value.problems) == 3


def test_calibration_is_scored_where_probabilities_lie(folders: tuple[Path, Path]) -> None:
    stored = np.zeros((3, 1, 1, 4), dtype=np.uint8)  # organ at 1, 1, 0, 0 where the reference has 1, 0, 0, 0
    stored[:, 0, 0] = np.array([[0, 0, 255, 255], [255, 255, 0, 0], [0, 0, 0, 0]])
    write_probabilities_quantized(probabilities_file(folders[0], "a"), stored)
    evaluation = evaluate_folder(*folders, SCHEMA)
    assert evaluation.cases["a"]["organ"].metrics["ece"] == pytest.approx(1 / 3)  # box: two voxels and one more
    assert math.isnan(evaluation.cases["a"]["core"].metrics["ece"])
    assert evaluation.class_summary("organ").n_defined["ece"] == 1


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (3, 1, 1, 5), (3, 2, 1, 4)])
def test_probabilities_of_other_labels_or_another_grid_are_refused(
    folders: tuple[Path, Path], shape: tuple[int, ...]
) -> None:
    write_probabilities_quantized(probabilities_file(folders[0], "a"), np.zeros(shape, dtype=np.uint8))
    assert problems_of(folders) == ["a: probabilities of another shape than the label map"]


def test_progress_counts_every_case(folders: tuple[Path, Path]) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_folder(*folders, SCHEMA, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_references_are_read_with_the_mapping_of_the_dataset(folders: tuple[Path, Path]) -> None:
    write(folders[1] / "a.nii.gz", [255, 0, 0, 0])
    assert problems_of(folders) == ["a: label values [255]"]
    evaluation = evaluate_folder(*folders, SCHEMA, EvaluationOptions(remap_references={255: 1}))
    assert evaluation.cases["a"]["organ"].metrics["dice"] == pytest.approx(2 / 3)


def test_named_cases_are_scored_and_no_others(folders: tuple[Path, Path]) -> None:
    write(folders[0] / "only_predicted.nii.gz", [0, 0, 0, 0])
    assert list(evaluate_folder(*folders, SCHEMA, EvaluationOptions(cases=["c", "a"])).cases) == ["a", "c"]


@pytest.mark.parametrize(("side", "fault"), [(0, "was not predicted"), (1, "no reference of c")])
def test_a_named_case_that_is_missing_is_refused(folders: tuple[Path, Path], side: int, fault: str) -> None:
    next(folders[side].glob("c.*")).unlink()
    with pytest.raises(InvalidInput, match=fault):
        evaluate_folder(*folders, SCHEMA, EvaluationOptions(cases=["a", "c"]))
