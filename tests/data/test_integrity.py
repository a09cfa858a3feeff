"""Every fault of images and label maps has its words: what was found, what was expected, what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autossl.data.geometry import Geometry
from autossl.data.integrity import (
    Findings,
    check_grids,
    check_image,
    check_label_map,
    check_label_numbers,
    count_labels,
    grouped,
    parse_remap_labels,
    remap_label_map,
)
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem

SCHEMA = LabelSchema({"background": (0,), "liver": (1,), "tumor": (2,)})
GRID = Geometry(
    kind="nibabel",
    size_xyz=(4, 5, 6),
    spacing_xyz=(1.0, 2.0, 3.0),
    origin_xyz=(10.0, 20.0, 30.0),
    direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
    spacing_zyx_mm=(3.0, 2.0, 1.0),
)


def _compare(other: Geometry, reference: Geometry = GRID) -> Findings:
    return check_grids(reference, other, "c1", Path("label.nii"), Path("image.nii"))


def _only_error(findings: Findings) -> str:
    assert findings.warnings == []
    assert len(findings.errors) == 1
    return str(findings.errors[0])


def test_finite_varying_image_has_no_problem() -> None:
    assert check_image(np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2), [Path("a")], "c") == Findings()


def test_nan_and_infinity_are_counted_and_name_their_channel_and_file() -> None:
    image = np.arange(16, dtype=np.float32).reshape(2, 2, 2, 2)
    image[1, 0, 0, 0], image[1, 1, 1, 1] = np.nan, np.inf
    text = _only_error(check_image(image, [Path("a_0000.nii"), Path("a_0001.nii")], "a"))
    assert text.startswith("case a, a_0001.nii: channel 1: 2 of 8 voxels are NaN or infinite")
    assert "replace them" in text


def test_constant_image_is_an_error_one_constant_channel_of_two_a_warning() -> None:
    constant = np.full((2, 2, 2, 2), 5, np.float32)
    findings = check_image(constant, [Path("rgb.png")], "a")
    assert [p.found for p in findings.errors] == [f"channel {c}: every voxel is 5" for c in (0, 1)]
    constant[0, 0, 0, 0] = 1
    findings = check_image(constant, [Path("rgb.png")], "a")
    assert findings.errors == []
    assert [p.found for p in findings.warnings] == ["channel 1: every voxel is 5"]


def test_undeclared_values_name_the_option_that_maps_them() -> None:
    text = _only_error(check_label_map({0: 90, 1: 5, 4: 3, 255: 2}, SCHEMA, "uint8", "a", Path("a.nii")))
    assert "undeclared label values: 4 (3 voxels), 255 (2 voxels)" in text
    assert "Expected: only 0, 1, 2" in text
    assert "--remap_labels 4=NEW 255=NEW with NEW one of 0, 1, 2" in text


def test_labels_stored_as_float_and_empty_label_maps_are_warnings() -> None:
    findings = check_label_map({0: 8}, SCHEMA, "float32", "a", Path("a.nii"))
    assert findings.errors == []
    assert [p.found for p in findings.warnings] == [
        "labels stored as float32, all of them whole numbers",
        "the label map has no foreground",
    ]


def test_gap_in_the_label_numbers_shows_the_numbers_and_the_mapping() -> None:
    schema = LabelSchema({"background": (0,), "a": (1,), "b": (3,), "ignore": (4,)})
    text = _only_error(check_label_numbers(schema, Path("dataset.json")))
    assert "0, 1, 3, 4 are declared, 2 not" in text
    assert "number the labels 0, 1, 2, 3" in text
    assert "--remap_labels 3=2 4=3" in text
    assert check_label_numbers(SCHEMA, Path("dataset.json")) == Findings()


def test_equal_grids_and_rounded_headers_pass() -> None:
    assert _compare(GRID) == Findings()
    assert _compare(replace(GRID, spacing_xyz=(1.0005, 2.0, 3.0), origin_xyz=(10.01, 20.0, 30.0))) == Findings()


def test_the_same_volume_stored_along_other_axes_passes_after_reorientation() -> None:
    flipped = replace(GRID, origin_xyz=(13.0, 20.0, 30.0), direction=(-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    assert _only_error(_compare(flipped)).startswith("case c1, label.nii: direction turned by 180 degrees")
    assert _compare(flipped.oriented_to_ras(), GRID.oriented_to_ras()) == Findings()


@pytest.mark.parametrize(
    "other, text",
    [
        (replace(GRID, size_xyz=(4, 5, 7)), "shape (7, 5, 4) against (6, 5, 4) voxels (z,y,x)"),
        (replace(GRID, spacing_xyz=(1.0, 2.0, 3.3)), "spacing (3.3, 2, 1) against (3, 2, 1) mm (z,y,x)"),
        (
            replace(GRID, origin_xyz=(10.0, 20.0, 33.0)),
            "origin shifted by (3, 0, 0) mm, that is (1, 0, 0) voxels (z,y,x)",
        ),
        (replace(GRID, direction=(0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1.0)), "direction turned by 36.9 degrees"),
    ],
)
def test_other_grids_are_errors_with_both_values(other: Geometry, text: str) -> None:
    message = _only_error(_compare(other))
    assert text in message
    assert "Expected: the grid of image.nii" in message
    assert "copy the header" in message


def test_a_shift_below_half_a_voxel_is_a_warning() -> None:
    findings = _compare(replace(GRID, origin_xyz=(10.3, 20.0, 30.0)))
    assert findings.errors == []
    assert "(0, 0, 0.3) voxels" in findings.warnings[0].found


def test_count_labels_counts_small_negative_and_huge_values() -> None:
    assert count_labels(np.array([[[0, 1, 1]], [[2, 1, 0]]], np.uint8)) == {0: 2, 1: 3, 2: 1}
    assert count_labels(np.array([[[-1, 70000, 1]], [[70000, 1, 0]]], np.int32)) == {-1: 1, 0: 1, 1: 2, 70000: 2}


def test_remapping_is_simultaneous_and_leaves_its_input() -> None:
    label_map = np.array([[[0, 1, 2, 255]]], np.uint8)
    swapped = remap_label_map(label_map, {1: 2, 2: 1, 255: 0})
    assert swapped.tolist() == [[[0, 2, 1, 0]]]
    assert label_map.tolist() == [[[0, 1, 2, 255]]]
    assert remap_label_map(label_map, {9: 1, -1: 0}) is label_map
    assert remap_label_map(label_map, {255: 300}).tolist() == [[[0, 1, 2, 300]]]


def test_remap_option_is_parsed_and_all_its_faults_are_listed() -> None:
    assert parse_remap_labels(["4=2", "-1=0"], SCHEMA) == {4: 2, -1: 0}
    with pytest.raises(InvalidInput) as caught:
        parse_remap_labels(["4", "5=x", "6=1", "6=2", "7=9"], SCHEMA)
    assert [p.found for p in caught.value.problems] == [
        "--remap_labels 4",
        "--remap_labels 5=x",
        "--remap_labels 6=2: 6 is mapped twice",
        "--remap_labels 7=9: 9 is not declared",
    ]


def test_findings_raise_all_errors_under_one_title() -> None:
    problem = Problem("f", "e", "x", case="a")
    findings = Findings([problem, Problem("g", "e", "x", case="b")], [problem])
    with pytest.raises(InvalidInput, match="D has 2 problems in 2 cases; nothing was written:"):
        findings.raise_errors("D")
    Findings([], [problem]).raise_errors("D")


def test_warnings_that_differ_only_in_their_case_are_one_line() -> None:
    problems = [Problem("odd", "e", "mend it", case=name) for name in ("a", "b")] + [Problem("other", "e", "x", "c")]
    assert grouped(problems) == ["2 cases (a, b): odd. What to do: mend it.", "1 case (c): other. What to do: x."]
