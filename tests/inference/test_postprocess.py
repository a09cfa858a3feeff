"""Rules on made-up label maps whose results can be said in advance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput
from autossl.inference.postprocess import Kind, LabelMap, Rule, apply_rules, hole_mask, voxel_size_mm3

LABELS = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}, (1, 2, 3))
MILLIMETER = (1.0, 1.0, 1.0)


def empty(*shape: int) -> npt.NDArray[np.uint8]:
    return np.zeros(shape or (9, 11, 13), dtype=np.uint8)


def apply(label_map: LabelMap, *rules: Rule, schema: LabelSchema = LABELS) -> LabelMap:
    return apply_rules(label_map, rules, schema, MILLIMETER)


def test_only_the_largest_component_of_a_class_stays() -> None:
    label_map = empty()
    label_map[1:4, 1:4, 1:4] = 1
    label_map[6, 8, 9:12] = 1
    label_map[6, 1, 1] = 2
    cleaned = apply(label_map, Rule(kind="keep_largest", class_name="organ"))
    expected = label_map.copy()
    expected[6, 8, 9:12] = 0
    np.testing.assert_array_equal(cleaned, expected)
    assert cleaned.dtype == label_map.dtype
    assert label_map[6, 8, 9] == 1, "the input was changed"


def test_corners_connect() -> None:
    label_map = empty(5, 5, 5)
    label_map[0, 0, 0] = label_map[1, 1, 1] = label_map[2, 2, 2] = 1
    label_map[4, 4, 3:] = 1
    cleaned = apply(label_map, Rule(kind="keep_largest", class_name="organ"))
    assert np.flatnonzero(cleaned).tolist() == [0, 31, 62]


def test_components_that_tie_all_stay_however_the_array_is_turned() -> None:
    label_map = empty()
    label_map[1, 1, 1:3] = label_map[7, 9, 10:12] = 1
    label_map[4, 5, 6] = 1
    rule = Rule(kind="keep_largest", class_name="organ")
    cleaned = apply(label_map, rule)
    assert cleaned.sum() == 4
    turned = apply(label_map[::-1, :, ::-1].transpose(2, 0, 1), rule)
    np.testing.assert_array_equal(turned.transpose(1, 2, 0)[::-1, :, ::-1], cleaned)


def test_a_rule_without_class_goes_over_all_of_them() -> None:
    label_map = empty()
    label_map[1:3, 1, 1] = label_map[5, 5, 5] = 1
    label_map[1:3, 9, 9] = label_map[5, 9, 1] = 2
    cleaned = apply(label_map, Rule(kind="keep_largest"))
    assert np.count_nonzero(cleaned == 1) == np.count_nonzero(cleaned == 2) == 2


def test_the_largest_of_all_foreground_keeps_what_touches_it() -> None:
    label_map = empty()
    label_map[1:4, 1:4, 1:4] = 1
    label_map[4, 3, 3] = 2
    label_map[7, 8:, 9:] = 2
    cleaned = apply(label_map, Rule(kind="keep_largest_foreground"))
    assert np.count_nonzero(cleaned == 1) == 27
    assert np.argwhere(cleaned == 2).tolist() == [[4, 3, 3]]


@pytest.mark.parametrize(("value", "left"), [(11.9, 2), (12.0, 2), (12.1, 1)])
def test_components_below_a_size_in_mm3_go(value: float, left: int) -> None:
    label_map = empty()
    label_map[1:3, 1:4, 1] = 1  # 6 voxels of 2 mm³
    label_map[6:8, 6:10, 1] = 1  # 8 voxels
    rule = Rule(kind="min_size_mm3", class_name="organ", value=value)
    cleaned = apply_rules(label_map, [rule], LABELS, (4.0, 0.5, 1.0))
    assert np.count_nonzero(cleaned) == {1: 8, 2: 14}[left]


def test_an_exact_size_stays_whatever_rounding_does() -> None:
    label_map = empty()
    label_map[1, 1, 1:4] = 1
    rule = Rule(kind="min_size_mm3", class_name="organ", value=3 * 0.1)
    assert apply_rules(label_map, [rule], LABELS, (0.1, 1.0, 1.0)).sum() == 3


def test_an_image_without_slices_is_measured_by_its_area() -> None:
    assert voxel_size_mm3((1, 8, 8), (999.0 * 0.5, 0.5, 0.4)) == pytest.approx(0.2)
    assert voxel_size_mm3((1, 8, 8), (5.0, 0.5, 0.4)) == pytest.approx(1.0)


def test_holes_are_filled_but_other_classes_and_notches_stay() -> None:
    label_map = empty()
    label_map[1:8, 1:8, 1:8] = 1
    label_map[3:6, 3:6, 3:6] = 0
    label_map[4, 4, 4] = 2
    label_map[1, 4, 4] = 0  # a notch, open to the outside
    filled = apply(label_map, Rule(kind="fill_holes", class_name="organ"))
    expected = empty()
    expected[1:8, 1:8, 1:8] = 1
    expected[1, 4, 4], expected[4, 4, 4] = 0, 2
    np.testing.assert_array_equal(filled, expected)


def test_what_touches_the_border_of_the_image_is_no_hole() -> None:
    label_map = empty(5, 5, 5)
    label_map[:4, 1:4, 1:4] = 1
    label_map[:2, 2, 2] = 0
    np.testing.assert_array_equal(apply(label_map, Rule(kind="fill_holes", class_name="organ")), label_map)


def test_rings_in_images_of_one_slice_are_filled() -> None:
    label_map = empty(1, 7, 7)
    label_map[0, 1:6, 1:6] = 1
    label_map[0, 3, 3] = 0
    assert apply(label_map, Rule(kind="fill_holes", class_name="organ")).sum() == 25
    in_a_volume = np.pad(label_map, ((2, 2), (0, 0), (0, 0)))
    assert apply(in_a_volume, Rule(kind="fill_holes", class_name="organ")).sum() == 24


def test_cutting_to_the_tight_box_finds_the_same_holes() -> None:
    mask = np.random.default_rng(0).random((8, 9, 10)) < 0.7
    mask[0], mask[:, -1] = False, False
    cut = (slice(1, None), slice(0, -1), slice(None))
    assert hole_mask(mask).sum() > 5
    np.testing.assert_array_equal(hole_mask(mask)[cut], hole_mask(mask[cut]))


def test_a_voxel_that_leaves_a_region_stays_in_those_around_it() -> None:
    label_map = empty()
    label_map[1:8, 1:8, 1:8] = 1
    label_map[2:4, 2:4, 2:4] = 3
    label_map[6, 6, 6] = 3
    label_map[6, 6, 5] = 2
    only_core = apply(label_map, Rule(kind="keep_largest", class_name="core"), schema=REGIONS)
    assert (only_core[6, 6, 5:7] == 1).all()
    only_enhancing = apply(label_map, Rule(kind="keep_largest", class_name="enhancing"), schema=REGIONS)
    assert only_enhancing[6, 6, 5:7].tolist() == [2, 2]
    assert np.count_nonzero(only_enhancing == 3) == 8


def test_a_hole_in_a_region_joins_it_and_keeps_its_own_regions() -> None:
    label_map = empty()
    label_map[1:8, 1:8, 1:8] = 2
    label_map[4, 4, 3:6] = [0, 1, 3]
    filled = apply(label_map, Rule(kind="fill_holes", class_name="core"), schema=REGIONS)
    assert filled[4, 4, 3:6].tolist() == [2, 2, 3]
    whole = apply(label_map, Rule(kind="fill_holes", class_name="whole"), schema=REGIONS)
    assert whole[4, 4, 3:6].tolist() == [1, 1, 3]


def test_the_ignore_value_is_left_alone() -> None:
    schema = LabelSchema({"background": (0,), "organ": (1,), "ignore": (2,)})
    label_map = empty()
    label_map[1:6, 1:6, 1:6] = 1
    label_map[3, 3, 3] = label_map[8, 8, 8] = 2
    rules = (Rule(kind="keep_largest_foreground"), Rule(kind="fill_holes", class_name="organ"))
    np.testing.assert_array_equal(apply(label_map, *rules, schema=schema), label_map)


@pytest.mark.parametrize("kind", ["keep_largest", "keep_largest_foreground", "min_size_mm3", "fill_holes"])
def test_nothing_to_do_is_done(kind: Kind) -> None:
    rule = Rule(kind=kind, value=3.0 if kind == "min_size_mm3" else None)
    for full in (empty(), np.ones((3, 3, 3), dtype=np.int16)):
        np.testing.assert_array_equal(apply(full, rule), full)
    single = np.ones((1, 1, 1), dtype=np.uint8)
    assert apply(single, rule).sum() == (0 if kind == "min_size_mm3" else 1)


def test_rules_of_unknown_classes_are_all_named() -> None:
    rules = [Rule(kind="keep_largest", class_name="organs"), Rule(kind="fill_holes", class_name="liver")]
    with pytest.raises(InvalidInput, match="'organs'(?s:.*)one of organ(?s:.*)'liver'"):
        apply(empty(), *rules)


def test_rules_that_make_no_sense_are_refused() -> None:
    for content in (
        {"kind": "min_size_mm3", "class_name": "organ"},
        {"kind": "min_size_mm3", "value": 0},
        {"kind": "keep_largest", "value": 3},
        {"kind": "keep_largest_foreground", "class_name": "organ"},
        {"kind": "erode"},
    ):
        with pytest.raises(ValidationError):
            Rule.model_validate(content)
