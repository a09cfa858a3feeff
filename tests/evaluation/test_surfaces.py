"""Closed forms of surface areas and distances, anisotropic spacing, empty masks and ignored voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autossl.data.labels import LabelSchema
from autossl.evaluation.case_scores import Scoring, Voxel, score_all
from autossl.evaluation.class_masks import ClassMasks, box_around, class_masks
from autossl.evaluation.surface_elements import cell_patterns, element_sizes
from autossl.evaluation.surfaces import (
    CONVENTIONS,
    Convention,
    assd,
    hd95,
    nsd,
    surface_distances,
    surface_metrics,
    weighted_percentile,
)

SPACING = (0.7, 1.1, 2.3)
ONE_CLASS = LabelSchema({"background": (0,), "organ": (1,)})
WITH_IGNORE = LabelSchema({"background": (0,), "organ": (1,), "ignore": (2,)})


def box(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(first, first + n) for first, n in zip(start, size, strict=True))] = True
    return mask


def ball(shape: tuple[int, ...], radius: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Voxels whose centers are within the radius (mm) of the middle of the grid."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing, strict=True)]
    return sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij")) <= radius**2


def total_size(mask: np.ndarray, spacing: tuple[float, ...]) -> float:
    return float(element_sizes(spacing)[cell_patterns(mask)].sum())


def masks_of(prediction: np.ndarray, reference: np.ndarray, ignored: np.ndarray | None = None) -> ClassMasks:
    return ClassMasks(prediction, reference, ignored, box_around(np.ones(prediction.shape)))


def metrics_of(masks: ClassMasks, convention: Convention = "surface_elements", tolerance: float = 1.0) -> tuple:
    return tuple(surface_metrics(masks, SPACING, tolerance, convention, "mm").values())


def test_the_area_of_a_box_is_its_faces_with_edges_and_corners_cut_off() -> None:
    (z, y, x), (nz, ny, nx) = SPACING, (5, 4, 3)
    faces = 2 * ((ny - 1) * (nx - 1) * y * x + (nz - 1) * (nx - 1) * z * x + (nz - 1) * (ny - 1) * z * y)
    edges = 2 * ((nz - 1) * z * math.hypot(y, x) + (ny - 1) * y * math.hypot(z, x) + (nx - 1) * x * math.hypot(z, y))
    corners = math.sqrt((z * y) ** 2 + (z * x) ** 2 + (y * x) ** 2)
    assert total_size(box((9, 9, 9), (2, 3, 4), (nz, ny, nx)), SPACING) == pytest.approx(faces + edges + corners)


def test_the_length_of_a_rectangle_is_its_sides_with_corners_cut_off() -> None:
    expected = 2 * (4 * 0.7 + 2 * 1.1) + 2 * math.hypot(0.7, 1.1)
    assert total_size(box((9, 9), (1, 1), (5, 3)), (0.7, 1.1)) == pytest.approx(expected)


def test_pixels_that_touch_diagonally_are_two_outlines() -> None:
    mask = np.array([[True, False], [False, True]])
    assert total_size(mask, (3.0, 4.0)) == pytest.approx(8 * 2.5)


def test_a_mask_and_its_complement_have_the_same_surface() -> None:
    sizes = element_sizes(SPACING)
    np.testing.assert_allclose(sizes, sizes[::-1])
    assert sizes[0] == sizes[255] == 0
    assert (sizes[1:255] > 0).all()


def test_the_area_of_a_ball_is_a_little_more_than_that_of_the_smooth_one() -> None:
    spacing = (1.0, 0.5, 0.8)
    share = total_size(ball((46, 90, 58), 20.0, spacing), spacing) / (4 * math.pi * 20.0**2)
    assert 1.0 < share < 1.12  # steps between voxels are longer than the slope that they stand for


def test_a_cube_shifted_by_one_voxel_has_its_closed_form() -> None:
    (z, y, x), n = SPACING, 6  # the shift is along z, the shortest step
    distances = surface_distances(box((9, 9, 9), (1, 1, 1), (n,) * 3), box((9, 9, 9), (2, 1, 1), (n,) * 3), SPACING)
    face = (n - 1) ** 2 * y * x
    corner = math.sqrt((z * y) ** 2 + (z * x) ** 2 + (y * x) ** 2) / 8
    rim = (n - 1) * (y * math.hypot(z, x) + x * math.hypot(z, y)) + 4 * corner
    sides = 2 * (n - 1) ** 2 * z * (y + x) + 2 * (n - 1) * z * math.hypot(y, x)
    # of each cube: the face at the outer end with its rim, and the face at the inner end, whose rim is in the other one
    moved, total = 2 * face + rim, 2 * face + 2 * rim + sides
    assert hd95(distances) == z
    assert assd(distances) == pytest.approx(z * moved / total)
    assert nsd(distances, 0.0) == pytest.approx(1 - moved / total)
    assert nsd(distances, z) == 1.0


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_single_voxels_are_as_far_apart_as_their_axis_says(axis: int, convention: Convention) -> None:
    masks = [np.zeros((9, 9, 9), dtype=bool) for _ in range(2)]
    masks[0][4, 4, 4] = True
    masks[1][tuple(7 if other == axis else 4 for other in range(3))] = True
    hausdorff, average, _ = metrics_of(masks_of(*masks), convention)
    assert hausdorff == pytest.approx(3 * SPACING[axis])
    # corners of voxels: half of them lie towards the other voxel, one step nearer
    steps = 3.0 if convention == "border_voxels" else 2.5
    assert average == pytest.approx(steps * SPACING[axis])


def test_a_box_inside_a_box_is_the_gap_away_whatever_the_spacing_of_an_axis() -> None:
    spacing, gap = (1.0, 2.0, 4.0), (4, 2, 1)
    inner, outer = box((24, 16, 9), (7, 5, 3), (10, 6, 3)), box((24, 16, 9), (3, 3, 2), (18, 10, 5))
    assert all(2 * g + n == m for g, n, m in zip(gap, (10, 6, 3), (18, 10, 5), strict=True))
    distances = surface_distances(inner, outer, spacing)
    np.testing.assert_array_equal(distances.of_prediction, 4.0)
    assert distances.of_reference.min() == 4.0
    assert distances.of_reference.max() == pytest.approx(4.0 * math.sqrt(3))


def test_balls_around_one_center_are_apart_by_the_difference_of_their_radii() -> None:
    spacing, shape = (1.0, 0.5, 0.8), (46, 90, 58)
    distances = surface_distances(ball(shape, 16.0, spacing), ball(shape, 20.0, spacing), spacing)
    # within half of the longest step: the nearest place of a stepped surface is one of its inner steps
    assert assd(distances) == pytest.approx(4.0, abs=0.5)
    assert hd95(distances) == pytest.approx(4.0, abs=0.5)
    assert nsd(distances, 3.0) < 0.05
    assert nsd(distances, 5.0) == 1.0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_axes_may_change_places_with_their_spacing(convention: Convention) -> None:
    generator = np.random.default_rng(0)
    one, other = generator.random((2, 7, 8, 9)) > 0.7
    here = surface_distances(one, other, SPACING, convention)
    there = surface_distances(one.transpose(2, 0, 1), other.transpose(2, 0, 1), np.roll(SPACING, 1), convention)
    twice = surface_distances(one, other, [2 * step for step in SPACING], convention)
    assert assd(there) == pytest.approx(assd(here))
    assert hd95(there) == pytest.approx(hd95(here))
    assert assd(twice) == pytest.approx(2 * assd(here))
    back = surface_distances(other, one, SPACING, convention)
    assert (hd95(back), nsd(back, 1.0)) == (pytest.approx(hd95(here)), pytest.approx(nsd(here, 1.0)))


def test_a_tolerance_of_as_many_steps_includes_them_despite_rounding() -> None:
    mask, shifted = box((12, 3, 3), (1, 1, 1), (4, 1, 1)), box((12, 3, 3), (4, 1, 1), (4, 1, 1))
    spacing = (float(np.float32(0.1)), 5.0, 5.0)  # 0.10000000149, as a header holds it
    assert nsd(surface_distances(mask, shifted, spacing), 0.3) == 1.0


def test_the_percentile_counts_weights() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([1.0, 90.0, 9.0])
    assert [weighted_percentile(values, weights, share) for share in (0.5, 0.95, 1.0)] == [1.0, 2.0, 3.0]
    assert math.isnan(weighted_percentile(values[:0], weights[:0], 0.95))


def test_masks_that_are_equal_have_no_distance() -> None:
    mask = box((6, 6, 6), (0, 2, 3), (6, 2, 3))
    assert metrics_of(masks_of(mask, mask), tolerance=0.0) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_empty_masks_have_no_distance_and_a_missing_structure_no_surface_dice(convention: Convention) -> None:
    mask, empty = box((4, 4, 4), (1, 1, 1), (2, 2, 2)), np.zeros((4, 4, 4), dtype=bool)
    for one, other in ((mask, empty), (empty, mask)):
        hausdorff, average, surface_dice = metrics_of(masks_of(one, other), convention)
        assert (math.isnan(hausdorff), math.isnan(average), surface_dice) == (True, True, 0.0)
    assert all(math.isnan(value) for value in metrics_of(masks_of(empty, empty), convention))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_is_predicted_in_ignored_voxels_changes_nothing(convention: Convention) -> None:
    reference = box((12, 12, 12), (2, 2, 2), (4, 4, 4))
    ignored = box((12, 12, 12), (0, 0, 8), (12, 12, 4))
    prediction = box((12, 12, 12), (2, 2, 3), (4, 4, 4))
    plain = metrics_of(masks_of(prediction, reference, ignored), convention)
    assert plain == pytest.approx(metrics_of(masks_of(prediction, reference), convention))
    more = prediction | box((12, 12, 12), (7, 7, 9), (3, 3, 2))
    assert metrics_of(masks_of(more, reference, ignored), convention) == pytest.approx(plain)
    less = metrics_of(masks_of(more, reference), convention)
    assert less[0] > plain[0]


def test_the_reference_reaches_through_ignored_voxels_as_far_as_was_predicted() -> None:
    shape = (16, 3, 3)
    prediction, reference = box(shape, (2, 1, 1), (11, 1, 1)), box(shape, (2, 1, 1), (3, 1, 1))
    hausdorff, _, _ = metrics_of(masks_of(prediction, reference, box(shape, (5, 0, 0), (4, 3, 3))))
    assert hausdorff == pytest.approx(4 * SPACING[0])  # from the end at 13 to the last ignored voxel's end at 9


def test_a_class_that_is_only_predicted_in_ignored_voxels_is_empty() -> None:
    ignored = box((6, 6, 6), (0, 0, 3), (6, 6, 3))
    prediction, reference = box((6, 6, 6), (1, 1, 4), (2, 2, 2)), np.zeros((6, 6, 6), dtype=bool)
    assert all(math.isnan(value) for value in metrics_of(masks_of(prediction, reference, ignored)))


def test_a_surface_that_nothing_but_ignored_voxels_border_on_is_not_counted() -> None:
    mask, around = box((6, 6, 6), (2, 2, 2), (2, 2, 2)), box((6, 6, 6), (1, 1, 1), (4, 4, 4))
    assert all(math.isnan(value) for value in metrics_of(masks_of(mask, mask, around & ~mask)))


def test_a_single_slice_is_measured_in_its_plane() -> None:
    one, other = box((1, 9, 9), (0, 2, 2), (1, 4, 3)), box((1, 9, 9), (0, 2, 4), (1, 4, 3))
    flat = surface_distances(one[0], other[0], SPACING[1:])
    assert metrics_of(masks_of(one, other)) == pytest.approx((hd95(flat), assd(flat), nsd(flat, 1.0)))
    assert metrics_of(masks_of(one, other))[0] == pytest.approx(2 * SPACING[2])


def test_wrong_numbers_of_axes_are_refused() -> None:
    mask = box((4, 4, 4), (1, 1, 1), (2, 2, 2))
    for other, spacing in ((mask[0], SPACING), (mask, SPACING[1:])):
        with pytest.raises(ValueError, match="masks of shape"):
            surface_distances(mask, other, spacing)


@pytest.mark.parametrize("schema", [ONE_CLASS, WITH_IGNORE])
def test_the_box_of_a_class_changes_no_figure(schema: LabelSchema) -> None:
    generator = np.random.default_rng(1)
    prediction, reference = generator.integers(0, len(schema.values), size=(2, 6, 7, 8)).astype(np.uint8)
    voxel, scoring = Voxel(SPACING, 1.0), Scoring(lesions=True)
    small = score_all(prediction, reference, schema, voxel, scoring)["organ"]
    padded = [np.pad(label_map, ((3, 9), (5, 2), (0, 4))) for label_map in (prediction, reference)]
    large = score_all(*padded, schema, voxel, scoring)["organ"]
    assert large.confusion == small.confusion
    assert large.metrics == pytest.approx(small.metrics)


def test_boxes_hold_both_masks_and_a_voxel_more() -> None:
    prediction, reference = np.zeros((2, 9, 9, 9), dtype=np.uint8)
    prediction[4, 4, 4], reference[0, 5, 8] = 1, 1
    ((name, masks),) = class_masks(prediction, reference, ONE_CLASS)
    assert (name, masks.box) == ("organ", (slice(0, 6), slice(3, 7), slice(3, 9)))
    assert (masks.prediction.sum(), masks.reference.sum(), masks.ignored) == (1, 1, None)
    ((_, nothing),) = class_masks(prediction * 0, reference * 0, ONE_CLASS)
    assert nothing.prediction.size == 0
