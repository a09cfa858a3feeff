"""Scores, fits, refined labels and mirrored halves: closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autossl.trainers.components.augment import IntensityChange, StrongAugment
from autossl.trainers.components.ellipse_labels import (
    AcceptedFit,
    Mask,
    Values,
    accepted_fit,
    ellipse_label,
    goes_halfway_around,
    irregularity,
    outline_points,
    select_regular,
    selected_share,
    sharpened,
)
from autossl.trainers.components.ellipse_targets import ellipse_targets, score_measures
from autossl.trainers.components.shapes import Ellipsoid, MirrorPlanes, Points
from autossl.trainers.components.symmetric_halves import SymmetricHalves, half_change

SQUARE = (1.0, 1.0)


def ellipse(
    size: tuple[int, ...] = (224, 224),
    axes: tuple[float, ...] = (45.0, 70.0),
    center: tuple[float, ...] | None = None,
    angle: float = 0.0,
    spacing: tuple[float, ...] | None = None,
) -> Mask:
    """Semi-axes in mm along the axes of the array, turned in the plane of the last two."""
    spacing = spacing or (1.0,) * len(size)
    middle = np.array(center if center is not None else [(n - 1) / 2 * mm for n, mm in zip(size, spacing, strict=True)])
    directions = np.eye(len(size))
    directions[-2:, -2:] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    places = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), -1) * spacing
    found: Mask = Ellipsoid(middle, np.array(axes), directions).squared_radius(places) <= 1
    return found


def as_q(mask: Mask, inside: float = 1.0) -> Values:
    return mask.astype(np.float32) * np.float32(inside)


def everywhere(mask: Mask | Values) -> Mask:
    return np.ones(mask.shape, dtype=bool)


def fit_of(mask: Mask, spacing: tuple[float, ...] | None = None, valid: Mask | None = None) -> AcceptedFit | None:
    valid = everywhere(mask) if valid is None else valid
    return accepted_fit(as_q(mask), valid, spacing or (1.0,) * mask.ndim)


def ellipsoid_of(mask: Mask, spacing: tuple[float, ...] | None = None, valid: Mask | None = None) -> Ellipsoid:
    found = fit_of(mask, spacing, valid)
    assert found is not None
    return found.ellipse


# -------------------------------------------------------------------------------------------------------------- scores


def jagged() -> Mask:
    """An ellipse whose outline goes in and out by 12 % twelve times, of about the same area."""
    y, x = (axis - 111.5 for axis in np.mgrid[:224, :224])
    angle = np.arctan2(y / 45, x / 70)
    found: Mask = np.sqrt((y / 45) ** 2 + (x / 70) ** 2) <= 1 + 0.12 * np.cos(12 * angle)
    return found


def score(mask: Mask | Values, edge_share: float, spacing: tuple[float, ...] | None = None, **options: Any) -> float:
    return irregularity(mask.astype(np.float32), everywhere(mask), spacing or (1.0,) * mask.ndim, edge_share, **options)


def test_a_jagged_outline_scores_worse_than_a_smooth_one() -> None:
    smooth, rough = ellipse(), jagged()
    assert smooth.sum() == pytest.approx(rough.sum(), rel=0.01)
    assert score(smooth, 1.0) == pytest.approx(0.0084, abs=1e-4)
    assert score(smooth, 0.0) == pytest.approx(0.0635, rel=0.02)
    assert score(rough, 1.0) > 1.3 * score(smooth, 1.0)
    assert score(rough, 0.0) > 1.3 * score(smooth, 0.0)
    assert score(smooth, 0.3) == pytest.approx(0.3 * score(smooth, 1.0) + 0.7 * score(smooth, 0.0))


def test_score_of_a_straight_border() -> None:
    """One row of 2 · ½ per column, and a distance that bends once at the border and once at the edge of the patch."""
    mask = np.zeros((20, 10), dtype=bool)
    mask[8:] = True
    assert score(mask, 1.0) == pytest.approx((2 * math.sqrt(0.25 + 1e-6) + 18e-3) / 20)
    assert score(mask, 0.0) == pytest.approx(2 / 20), "0, 1, 2, …, 8, 8 upwards"
    assert score(mask, 0.0, (1.0, 5.0)) == pytest.approx(2 / 20)
    assert score(mask, 1.0, (3.0, 1.0)) == pytest.approx((2 * math.sqrt(0.25 / 9 + 1e-6) + 18e-3) / 20), "per mm"


def test_what_has_no_mask_scores_worst() -> None:
    assert score(np.full((16, 16), 0.5), 0.5) == math.inf
    q = as_q(ellipse((16, 16), (4.0, 6.0)))
    q[0, 0] = np.nan
    assert score(q, 0.5) == math.inf
    outside = irregularity(as_q(ellipse((16, 16), (4.0, 6.0))), np.zeros((16, 16), dtype=bool), SQUARE)
    assert outside == math.inf, "nothing valid"


def test_score_per_size() -> None:
    mask = ellipse()
    assert score(mask, 0.5, per_size=True) == pytest.approx(score(mask, 0.5) / math.sqrt(mask.sum()))


def test_invalid_voxels_have_no_score() -> None:
    mask, valid = ellipse((40, 40), (8.0, 12.0)), np.ones((40, 40), dtype=bool)
    valid[:, 30:] = False
    q = as_q(mask)
    clean = irregularity(q, valid, SQUARE, 1.0)
    q[:, 33:] = 0.9
    assert irregularity(q, valid, SQUARE, 1.0) == clean


def test_scores_of_volumes() -> None:
    """A slab of an isotropic volume, and planes one by one where slices are thick."""
    mask = np.zeros((20, 6, 6), dtype=bool)
    mask[8:] = True
    assert score(mask, 1.0) == pytest.approx((2 * math.sqrt(0.25 + 1e-6) + 18e-3) / 20)
    assert score(mask, 0.0) == pytest.approx(2 / 20)
    planes = np.zeros((5, 20, 10), dtype=bool)
    planes[1:3, 8:] = True
    flat = 2 * math.sqrt(0.25 + 1e-6) + 18e-3
    assert score(planes, 1.0, (4.0, 1.0, 1.0)) == pytest.approx((2 * flat / 20 + 3e-3) / 5)
    assert score(planes, 0.0, (4.0, 1.0, 1.0)) == pytest.approx(2 / 5 * 2 / 20), "an empty plane has no corners"


def test_share_of_selected_patches() -> None:
    assert selected_share(0) == pytest.approx(0.5034, abs=1e-4)
    assert selected_share(1) == 1


def test_the_best_of_the_pass_are_used() -> None:
    assert select_regular([3.0, 1.0, 2.0, 4.0], [], 1.0) == [True] * 4
    assert select_regular([3.0, 1.0, 2.0, 4.0, 5.0], [], 0.5) == [True, True, True, True, False], "topped up to 4 of 5"
    earlier = [1.0] * 20
    assert select_regular([0.5] * 5, earlier, 0.2) == [True] * 5, "all of them among the best 5 of 25"
    assert select_regular([2.0, 0.5], earlier, 0.2) == [False, True]
    assert select_regular([2.0], earlier, 0.1) == [True], "one is always used"
    # equal scores: those of earlier steps come first
    assert select_regular([1.0, 1.0], earlier, 20 / 22) == [True, False]


def test_empty_patches_are_never_used() -> None:
    assert select_regular([math.inf], [], 1.0) == [False]
    assert select_regular([math.inf, 2.0, math.inf], [math.inf], 1.0) == [False, True, False]


@pytest.mark.parametrize("n", [1, 2, 4, 5, 9, 24])
def test_never_fewer_than_four_fifths(n: int) -> None:
    scores = np.random.default_rng(n).uniform(size=n).tolist()
    for earlier in ([], [0.0] * 50):
        used = select_regular(scores, earlier, selected_share(0))
        assert sum(used) >= max(1, math.floor(0.8 * n))


# ------------------------------------------------------------------------------------------------------------- the fit


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2, math.pi / 2, 2.9])
def test_the_ellipse_of_a_mask(angle: float) -> None:
    mask = ellipse(axes=(70.0, 45.0), center=(111.3, 108.8), angle=angle)
    found = ellipsoid_of(mask)
    np.testing.assert_allclose(found.center, (111.3, 108.8), atol=0.1)
    np.testing.assert_allclose(found.semi_axes, (70, 45), atol=0.1)
    assert abs(found.directions[0] @ (math.cos(angle), math.sin(angle))) > math.cos(math.radians(0.5))


def test_a_head_that_the_patch_cuts_is_fitted_from_its_visible_arc() -> None:
    found = ellipsoid_of(ellipse((224, 150), (45.0, 70.0), center=(111.3, 120.4)))
    np.testing.assert_allclose(found.center, (111.3, 120.4), atol=1)
    np.testing.assert_allclose(found.semi_axes, (70, 45), atol=1)
    mask, valid = ellipse(center=(111.3, 120.4)), np.ones((224, 224), dtype=bool)
    valid[:, 150:] = False
    found = ellipsoid_of(mask, valid=valid)
    np.testing.assert_allclose(found.center, (111.3, 120.4), atol=1)
    assert fit_of(ellipse((224, 100), (45.0, 70.0), center=(111.3, 120.4))) is None, "less than half of it"


def test_outlines_lie_between_inside_and_outside() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[4, 4] = True
    points = outline_points(mask, everywhere(mask), (2.0, 1.0))
    assert sorted(map(tuple, points.tolist())) == [(7.0, 4.0), (8.0, 3.5), (8.0, 4.5), (9.0, 4.0)]
    top = np.zeros((9, 9), dtype=bool)
    top[:4] = True
    assert sorted(outline_points(top, everywhere(top), SQUARE)[:, 1]) == [1, 2, 3, 4, 5, 6, 7], "not at the border"
    assert set(outline_points(top, everywhere(top), SQUARE)[:, 0]) == {3.5}
    valid = everywhere(top)
    valid[:, 5:] = False
    assert sorted(outline_points(top & valid, valid, SQUARE)[:, 1]) == [1, 2, 3], "nor next to an invalid voxel"


def test_millimeters_decide() -> None:
    """Twice as long as wide in mm, four times in voxels."""
    spacing = (2.0, 1.0)
    mask = ellipse((60, 120), (20.0, 40.0), spacing=spacing)
    found = ellipsoid_of(mask, spacing)
    np.testing.assert_allclose(found.semi_axes, (40, 20), atol=0.3)
    assert fit_of(mask) is None


@pytest.mark.parametrize(("axes", "accepted"), [((13.0, 36.0), True), ((11.0, 36.0), False)])
def test_long_ellipses_are_not_believed(axes: tuple[float, float], accepted: bool) -> None:
    assert (fit_of(ellipse((100, 100), axes)) is not None) == accepted


def test_too_few_points_are_not_believed() -> None:
    square = np.zeros((16, 16), dtype=bool)
    square[6:10, 6:10] = True
    assert fit_of(square) is None, "16 points"
    square[6:11, 6:11] = True
    assert fit_of(square) is not None, "20 points"
    assert fit_of(np.zeros((16, 16), dtype=bool)) is None


def test_a_shape_that_is_no_ellipse_is_not_believed() -> None:
    cross = np.zeros((100, 100), dtype=bool)
    cross[48:53, 10:90] = cross[10:90, 48:53] = True
    assert fit_of(cross) is None


def arc(degrees: float) -> Points:
    t = np.radians(np.linspace(0, degrees, 200))
    return np.column_stack([5 + 3 * np.cos(t), 4 + 2 * np.sin(t)])


def test_halfway_around() -> None:
    found = Ellipsoid(np.array([5.0, 4.0]), np.array([3.0, 2.0]), np.eye(2))
    for degrees, enough in ((170, False), (181, True), (300, True), (360, True)):
        assert goes_halfway_around(arc(degrees), found) == enough
    far = Ellipsoid(np.array([50.0, 4.0]), np.array([3.0, 2.0]), np.eye(2))
    assert not goes_halfway_around(arc(360), far)
    sphere = Ellipsoid(np.zeros(3), np.ones(3), np.eye(3))
    points = np.random.default_rng(0).normal(size=(400, 3))
    assert goes_halfway_around(points, sphere)
    assert not goes_halfway_around(points[points.sum(1) > 0.5], sphere)


def test_the_largest_component_counts_with_its_holes_filled() -> None:
    mask = ellipse((100, 100), (20.0, 30.0))
    with_more = mask.copy()
    with_more[45:55, 40:60] = False
    with_more[4:10, 4:10] = True
    np.testing.assert_allclose(ellipsoid_of(with_more).semi_axes, ellipsoid_of(mask).semi_axes)


# ---------------------------------------------------------------------------------------------------------- the labels


def test_refined_values() -> None:
    """(q, ρ²) → value."""
    cases = [
        (0.0, 0.0, 1.0),
        (0.3, 0.5, 0.85),
        (0.0, 1.0, 0.6),
        (0.7, 1.0, 0.7),
        (0.95, 0.5, 0.95),
        (1.0, 2.0, 0.6065),
        (1.0, 2.05, 0.5916),
        (1.0, 2.0217, 0.6),
        (0.5, 3.0, 0.5 * math.exp(-1)),
    ]
    q, squared_radius, expected = (np.array(column) for column in zip(*cases, strict=True))
    np.testing.assert_allclose(sharpened(q, squared_radius), expected, atol=5e-5)


def spiked() -> tuple[Values, Mask]:
    """A sure ellipse with a hole and an unsure spike of 12 voxels on its long side; and the ellipse."""
    mask = ellipse(angle=0.0)
    q = as_q(mask)
    q[100:110, 90:120] = 0.1
    spike = np.zeros_like(mask)
    spike[157:169, 110:113] = True
    q[spike] = 0.62
    return q, mask


def test_a_refined_label_has_neither_spike_nor_hole() -> None:
    q, mask = spiked()
    made = ellipse_label(q, everywhere(q), SQUARE)
    assert made.fitted.all()
    assert made.label[100:110, 90:120].all(), "the hole"
    assert not made.label[161:].any(), "the spike, but for its foot, where nothing is damped"
    assert (made.label != mask).sum() / mask.sum() < 0.03
    plain = ellipse_label(q, everywhere(q), SQUARE, refine=False)
    assert np.array_equal(plain.label, q > 0.6)
    assert plain.mirror is not None
    assert made.mirror is not None
    np.testing.assert_array_equal(plain.mirror[0], made.mirror[0])


def test_the_mirror_is_the_long_axis() -> None:
    made = ellipse_label(as_q(ellipse(axes=(70.0, 45.0), angle=0.4)), np.ones((224, 224), dtype=bool), SQUARE)
    assert made.mirror is not None
    assert abs(made.mirror[1] @ (-math.sin(0.4), math.cos(0.4))) > 0.9999, "its normal is the short axis"


def test_without_a_fit_the_plain_label_stays() -> None:
    cross = np.zeros((100, 100), dtype=bool)
    cross[48:53, 10:90] = cross[10:90, 48:53] = True
    made = ellipse_label(as_q(cross), everywhere(cross), SQUARE)
    assert np.array_equal(made.label, cross)
    assert not made.fitted.any()
    assert made.mirror is None
    assert (made.n_fits, made.n_accepted) == (1, 0)


def test_labels_end_where_the_image_ends() -> None:
    mask, valid = ellipse((100, 100), (20.0, 30.0)), np.ones((100, 100), dtype=bool)
    valid[:, 60:] = False
    made = ellipse_label(as_q(mask), valid, SQUARE)
    assert made.fitted.all()
    assert not made.label[:, 60:].any()


def test_volumes_are_mirrored_where_they_are_most_symmetric() -> None:
    q = as_q(ellipse((40, 40, 40), (9.0, 12.0, 16.0)))
    q[:20, 10:20, :] *= 0.62  # less sure, but the same label: no difference
    q[4:10, 19:21, 19:21] = 1.0  # a knob on one side along the first axis
    made = ellipse_label(q, everywhere(q), (1.0,) * 3, refine=False)
    assert made.mirror is not None
    center, normal = made.mirror
    np.testing.assert_allclose(center, 19.5, atol=0.5)
    assert abs(normal[0]) < 0.1, "not across the axis with the knob"


def test_thick_slices_are_fitted_one_by_one() -> None:
    spacing = (4.0, 1.0, 1.0)
    q = np.zeros((4, 80, 80), dtype=np.float32)
    q[1] = as_q(ellipse((80, 80), (12.0, 20.0)))
    q[2] = as_q(ellipse((80, 80), (16.0, 28.0), angle=0.3))
    q[2, 38:42, 38:42] = 0
    q[3, 38:41, 30:50] = 1  # too long to be believed
    made = ellipse_label(q, everywhere(q), spacing)
    assert (made.n_fits, made.n_accepted) == (3, 2)
    assert [bool(plane.all()) for plane in made.fitted] == [False, True, True, False]
    assert made.label[2, 38:42, 38:42].all()
    assert np.array_equal(made.label[3], q[3] > 0.6)
    assert made.mirror is not None
    center, normal = made.mirror
    assert abs(normal @ (0, math.cos(0.3), math.sin(0.3))) > 0.999, "of the largest slice"
    np.testing.assert_allclose(center[1:], 39.5, atol=0.1)
    empty = ellipse_label(np.zeros_like(q), everywhere(q), spacing)
    assert (empty.n_fits, empty.mirror, empty.label.any()) == (0, None, False)


def two_classes() -> tuple[Tensor, Tensor]:
    """Patch 0: a large and a small ellipse; patch 1: nothing that is one; patch 2: the small one alone."""
    q = torch.zeros(3, 2, 100, 100)
    q[0, 0] = torch.from_numpy(as_q(ellipse((100, 100), (8.0, 12.0))))
    q[0, 1] = torch.from_numpy(as_q(ellipse((100, 100), (20.0, 30.0), angle=0.5)))
    q[1, :, 48:53, 10:90] = 1
    q[2, 0] = q[0, 0]
    return q, torch.ones(3, 1, 100, 100, dtype=torch.bool)


def test_targets_of_a_step() -> None:
    q, valid = two_classes()
    valid[0, 0, :, :20] = False
    used = np.array([[True, True], [True, False], [True, False]])
    made = ellipse_targets(q, valid, used, SQUARE, refine=True)
    assert made.weight[0, 0].unique().tolist() == [0, 1]
    assert not made.weight[0, :, :, :20].any()
    assert made.weight[:, :, 50, 50].tolist() == [[1, 1], [0.5, 0], [1, 0]]
    assert made.counted[:, :, 50, 50].tolist() == used.tolist()
    assert made.label[1, 1].sum() == 0, "it is not used"
    assert made.mirrored.tolist() == [True, False, True]
    assert made.largest.tolist() == [1, 0, 0]
    assert torch.equal(made.largest_label[0, 0], made.label[0, 1] > 0)
    assert made.shares["accepted_share"] == pytest.approx(3 / 4)
    assert made.shares["mirrored_share"] == pytest.approx(2 / 3)
    plain = ellipse_targets(q, valid, used, SQUARE, refine=False)
    assert torch.equal(plain.weight, made.weight), "without refinement the same voxels count as much"
    assert plain.shares["refined_share"] == 0
    none = ellipse_targets(q, valid, np.zeros((3, 2), dtype=bool), SQUARE, refine=True)
    assert none.shares == {"mirrored_share": 0}
    assert not none.weight.any()


def test_share_of_changed_voxels() -> None:
    q, _ = spiked()
    made = ellipse_label(q, everywhere(q), SQUARE)
    targets = ellipse_targets(
        torch.from_numpy(q)[None, None], torch.ones(1, 1, 224, 224) > 0, np.array([[True]]), SQUARE, refine=True
    )
    changed = int((made.label != (q > 0.6)).sum())
    assert targets.shares["refined_share"] == pytest.approx(changed / q.size)
    assert changed >= 300 + 3 * 8


def test_measures_of_scores() -> None:
    assert score_measures([[1.0, math.inf], [3.0, 2.0]]) == {"empty_share": 0.25, "irregularity": 2.0}
    assert score_measures([[math.inf]]) == {"empty_share": 1.0}


# --------------------------------------------------------------------------------------------------- mirrored halves


def halves_at(column: float, size: int = 12, n: int = 1, acting: bool = True) -> SymmetricHalves:
    """Mirrored at a column, so that the columns before it are the first half."""
    centers, normals = torch.tensor([[0.0, column]]).expand(n, -1), torch.tensor([[0.0, 1.0]]).expand(n, -1)
    planes = MirrorPlanes.through(centers, normals, (size, size))
    return SymmetricHalves(planes, torch.ones(n, 1, size, size) > 0, torch.full((n,), acting))


def columns(values: Tensor) -> list[float]:
    """The one value of each column."""
    assert (values == values[..., :1, :]).all()
    return values.reshape(-1, values.shape[-1])[0].tolist()


NEUTRAL = IntensityChange(torch.ones(2), torch.zeros(2), torch.ones(2), torch.ones(2), torch.zeros(2), torch.zeros(2))


@pytest.fixture
def unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves keep their intensities."""
    monkeypatch.setattr("autossl.trainers.components.symmetric_halves.half_change", lambda n, generator: NEUTRAL)


def completed_images(halves: SymmetricHalves, x: Tensor, label: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return halves.images(x, label, StrongAugment(SQUARE, (1.0,)), generator)


@pytest.mark.usefixtures("unchanged")
def test_an_object_is_completed_from_either_half() -> None:
    """Columns 2..8 are the object, mirrored at 5.5: the first half holds 2..5, the second 6..8."""
    x = torch.arange(12.0).expand(1, 1, 12, 12).clone()
    label = (x >= 2) & (x <= 8)
    first, second = completed_images(halves_at(5.5), x, label)
    assert columns(first) == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 10, 11], "8 and its mirror image 9"
    # of 2..5, the columns 3..5 mirror 6..8; what mirrors background is background, also where the object was
    assert columns(second) == [0, 1, 9, 8, 7, 6, 6, 7, 8, 9, 10, 11]


def test_the_surroundings_stay_and_the_halves_change_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([1.0, 2.0])

    def shifts(n: int, generator: torch.Generator) -> IntensityChange:
        return IntensityChange(**{**vars(NEUTRAL), "shift": torch.full((n,), next(drawn))})

    monkeypatch.setattr("autossl.trainers.components.symmetric_halves.half_change", shifts)
    x = 10 * torch.arange(12.0).expand(1, 1, 12, 12).clone()
    label = (x >= 30) & (x <= 80)
    first, second = completed_images(halves_at(5.5), x, label)
    assert columns(first - x[0]) == [0, 0, 0, 1, 1, 1, -8, -28, -48, 0, 0, 0], "own half + 1, mirror image + 2"
    assert columns(second - x[0]) == [0, 0, 0, 52, 32, 12, 1, 1, 1, 0, 0, 0]


def test_changes_of_a_half() -> None:
    change = half_change(4000, torch.Generator().manual_seed(0))
    for values, neutral, low, high in (
        (change.shift, 0.0, -0.1, 0.1),
        (change.gamma, 1.0, 1.2, 1.8),
        (change.blur, 0.0, 0.5, 1.5),
        (change.noise, 0.0, 0.05, 0.05),
    ):
        moved = values[values != neutral]
        assert len(moved) / 4000 == pytest.approx(0.2, abs=0.03)
        assert low - 1e-6 <= float(moved.min()) <= float(moved.max()) <= high + 1e-6
        assert float(moved.max() - moved.min()) == pytest.approx(high - low, abs=0.02)
    assert (change.factor == 1).all()
    assert (change.contrast == 1).all()


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("column", [5.5, 5.0])
def test_what_is_symmetric_costs_nothing(column: float) -> None:
    halves = halves_at(column)
    p = (-0.1 * (torch.arange(12.0) - column) ** 2).exp().expand(1, 1, 12, 12)
    completed = halves.completed(p)
    if column == 5.5:
        assert torch.equal(completed, torch.cat([p, p]))
    torch.testing.assert_close(completed[..., :11], torch.cat([p, p])[..., :11])
    assert halves.asymmetry(torch.cat([p, p])).item() == 0
    assert halves.completion_loss(torch.cat([p, p]), completed).item() == pytest.approx(0, abs=1e-12)
    x, label = torch.cat([p, p])[:1], p > 0.5
    torch.testing.assert_close(completed_images(halves, x, label), torch.cat([p, p]))


def test_completed_predictions_and_their_loss() -> None:
    halves = halves_at(5.5)
    p = torch.arange(12.0).expand(1, 1, 12, 12)
    first, second = halves.completed(p)
    assert columns(first) == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    assert columns(second) == [11, 10, 9, 8, 7, 6, 6, 7, 8, 9, 10, 11]
    sides = torch.cat([first[None], second[None] + 2])
    assert halves.completion_loss(sides, halves.completed(p)).item() == pytest.approx((0 + 4) / 2)


def test_asymmetry_is_counted_in_one_half() -> None:
    halves = halves_at(5.5)
    p = torch.zeros(2, 1, 12, 12)
    p[0, ..., :6] = 0.5
    p[1, ..., 6:] = 0.3
    assert halves.asymmetry(p).item() == pytest.approx((0.25 + 0.09) / 2 / 2)


def test_voxels_without_a_mirror_image_do_not_count() -> None:
    """Mirrored at column 8.5 of 12: the columns 6..11 have a partner, 0..5 have none."""
    halves = halves_at(8.5)
    p = torch.zeros(2, 1, 12, 12)
    p[..., 6:9] = 0.5
    assert halves.asymmetry(p).item() == pytest.approx(0.25 / 2), "3 of 6 columns"
    p[..., :6] = 0.9
    assert halves.asymmetry(p).item() == pytest.approx(0.25 / 2)
    sides, m = torch.zeros(2, 1, 12, 12), torch.ones(2, 1, 12, 12)
    sides[0] = 1  # of the first side all voxels are seen or mirrored, of the second 6 of 12 columns
    assert halves.completion_loss(sides, m).item() == pytest.approx(6 / 18)


@pytest.mark.usefixtures("unchanged")
def test_an_object_that_the_patch_cuts_is_completed_as_far_as_it_is_seen() -> None:
    x = torch.arange(12.0).expand(1, 1, 12, 12).clone()
    first, second = completed_images(halves_at(8.5), x, x >= 2)
    assert columns(first) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 7, 6]
    assert columns(second) == [0, 1, 2, 3, 4, 5, 11, 10, 9, 9, 10, 11], "2..5 have nothing to be mirrored from"


def test_invalid_voxels_and_idle_patches_do_not_count() -> None:
    planes = MirrorPlanes.through(torch.tensor([[0.0, 5.5]] * 2), torch.tensor([[0.0, 1.0]] * 2), (12, 12))
    valid = torch.ones(2, 1, 12, 12) > 0
    valid[0, ..., :2] = False
    halves = SymmetricHalves(planes, valid, torch.tensor([True, False]))
    p = torch.zeros(4, 1, 12, 12)
    p[1], p[3] = torch.nan, torch.nan
    p[0, ..., :2], p[0, ..., 10:] = 7.0, 9.0
    p[0, ..., 2:4] = 0.5
    assert halves.asymmetry(p).item() == pytest.approx(2 * 0.25 / 16), "2 of 8 columns, in one side of two"
    idle = SymmetricHalves(planes, valid, torch.tensor([False, False]))
    p = torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for term in (idle.asymmetry(p), idle.completion_loss(p, idle.completed(p[:2]))):
        assert term.item() == 0
        assert term.requires_grad


def test_gradients_flow_through_both_sides() -> None:
    halves = halves_at(5.5)
    p = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    sides = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    halves.completion_loss(sides, halves.completed(p)).backward()
    assert p.grad is not None
    assert (p.grad != 0).all()
    halves.asymmetry(sides).backward()
    assert sides.grad is not None
    assert (sides.grad != 0).all(), "each voxel and its mirror image"
