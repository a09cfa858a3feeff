"""50 random pairs of shapes with anisotropic spacing, scored here, by MedPy and by DeepMind's surface-distance."""

from __future__ import annotations

import numpy as np
import pytest
import surface_distance
from medpy.metric import binary
from scipy import ndimage

from autossl.data.labels import LabelSchema
from autossl.evaluation.case_scores import Scoring, Voxel, score_all
from autossl.evaluation.metrics import ClassScores
from autossl.evaluation.surface_elements import element_sizes
from autossl.evaluation.surfaces import Convention

SCHEMA = LabelSchema({"background": (0,), "organ": (1,)})
CLOSE = {"rel": 1e-9, "abs": 1e-12}


def smooth(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Blobs with holes and necks that reach the border."""
    first, change = (ndimage.gaussian_filter(generator.normal(size=shape), 2) for _ in range(2))
    second = first + generator.uniform(0.1, 1) * change
    return first > np.quantile(first, 0.8), second > np.quantile(second, generator.uniform(0.7, 0.9))


def rough(generator: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Voxels at random: every pattern of neighbors occurs."""
    first = generator.random(shape) > 0.5
    return first, first ^ (generator.random(shape) > 0.9)


def ellipsoid(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    centers = [generator.uniform(0.35, 0.65) * n for n in shape]
    radii = [generator.uniform(0.15, 0.45) * n for n in shape]
    return sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centers, radii, strict=True)) <= 1


def cuboid(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    ends = [sorted(generator.choice(n + 1, 2, replace=False)) for n in shape]
    mask[tuple(slice(first, last) for first, last in ends)] = True
    return mask


def make_pair(number: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Prediction, reference and spacing of a pair; each fifth pair of another kind."""
    generator = np.random.default_rng(number)
    shape = tuple(int(n) for n in generator.integers(9, 26, 3))
    spacing = tuple(float(step) for step in generator.uniform(0.3, 5.0, 3))
    pair = (
        lambda: smooth(generator, shape),
        lambda: rough(generator, shape),
        lambda: (ellipsoid(generator, shape), ellipsoid(generator, shape)),
        lambda: (cuboid(generator, shape), cuboid(generator, shape)),
        lambda: (ellipsoid(generator, shape), cuboid(generator, shape)),
    )[number % 5]()
    return *pair, spacing


def score(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: tuple[float, ...],
    tolerance: float,
    convention: Convention = "surface_elements",
) -> ClassScores:
    """As a case is scored, in a grid with room around the shapes."""
    label_maps = [np.pad(mask.astype(np.uint8), ((2, 0), (0, 3), (1, 1))) for mask in (prediction, reference)]
    scoring = Scoring(tolerances={"organ": tolerance}, surface_convention=convention)
    return score_all(*label_maps, SCHEMA, Voxel(spacing, float(np.prod(spacing))), scoring)["organ"]


@pytest.mark.parametrize("number", range(50))
def test_figures_of_surface_elements_are_those_of_surface_distance(number: int) -> None:
    prediction, reference, spacing = make_pair(number)
    found = surface_distance.compute_surface_distances(reference, prediction, spacing)
    means = surface_distance.compute_average_surface_distance(found)
    areas = [found[name].sum() for name in ("surfel_areas_gt", "surfel_areas_pred")]
    for tolerance in (0.5, 1.7):
        metrics = score(prediction, reference, spacing, tolerance).metrics
        assert metrics["nsd"] == pytest.approx(
            surface_distance.compute_surface_dice_at_tolerance(found, tolerance), **CLOSE
        )
    assert metrics["hd95_mm"] == pytest.approx(surface_distance.compute_robust_hausdorff(found, 95), **CLOSE)
    assert metrics["assd_mm"] == pytest.approx(np.average(means, weights=areas), **CLOSE)
    assert metrics["dice"] == pytest.approx(surface_distance.compute_dice_coefficient(reference, prediction), **CLOSE)


@pytest.mark.parametrize("number", range(50))
def test_figures_of_border_voxels_are_those_of_medpy(number: int) -> None:
    prediction, reference, spacing = make_pair(number)
    metrics = score(prediction, reference, spacing, 1.0, "border_voxels").metrics
    assert metrics["hd95_mm"] == pytest.approx(binary.hd95(prediction, reference, spacing), **CLOSE)
    assert metrics["assd_mm"] == pytest.approx(binary.assd(prediction, reference, spacing), **CLOSE)
    assert metrics["dice"] == pytest.approx(binary.dc(prediction, reference), **CLOSE)
    assert metrics["iou"] == pytest.approx(binary.jc(prediction, reference), **CLOSE)
    assert metrics["volume_error_relative"] == pytest.approx(binary.ravd(prediction, reference), **CLOSE)


@pytest.mark.parametrize("number", [n for n in range(16) if n % 5 < 3])  # kinds that share slices
def test_slices_agree_with_both(number: int) -> None:
    prediction, reference, spacing = make_pair(number)
    middle = int((prediction & reference).sum((1, 2)).argmax())
    one, other = prediction[middle], reference[middle]
    label_maps = [mask[None].astype(np.uint8) for mask in (one, other)]
    voxel = Voxel((99.0, *spacing[1:]), None)
    found = surface_distance.compute_surface_distances(other, one, spacing[1:])
    metrics = score_all(*label_maps, SCHEMA, voxel)["organ"].metrics
    assert metrics["hd95_mm"] == pytest.approx(surface_distance.compute_robust_hausdorff(found, 95), **CLOSE)
    assert metrics["nsd"] == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(found, 1.0), **CLOSE)
    metrics = score_all(*label_maps, SCHEMA, voxel, Scoring(surface_convention="border_voxels"))["organ"].metrics
    assert metrics["hd95_mm"] == pytest.approx(binary.hd95(one, other, spacing[1:]), **CLOSE)
    assert metrics["assd_mm"] == pytest.approx(binary.assd(one, other, spacing[1:]), **CLOSE)


def test_areas_of_all_patterns_agree_with_surface_distance() -> None:
    """Its number of a pattern has the bits in the other order."""
    table = surface_distance.metrics.lookup_tables
    for spacing in ((1.0, 1.0, 1.0), (0.4, 1.3, 4.9), (3.0, 0.7, 0.8)):
        theirs = table.create_table_neighbour_code_to_surface_area(spacing)
        order = [int(f"{code:08b}"[::-1], 2) for code in range(256)]
        np.testing.assert_allclose(element_sizes(spacing)[order], theirs, atol=1e-12)
