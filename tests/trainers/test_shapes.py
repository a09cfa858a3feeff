"""Ellipsoids, mirror images, boundary bands: closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autossl.trainers.components.shapes import (
    Ellipsoid,
    MirrorPlanes,
    Points,
    boundary_band,
    fit_ellipsoid,
    mirror_image,
    reflect,
)


def arc(semi_axes: tuple[float, float], angle: float, center: tuple[float, float], degrees: float = 360) -> Points:
    """Points on an ellipse whose first semi-axis has the angle (radians) to the first axis."""
    t = np.linspace(0, math.radians(degrees), 60, endpoint=False)
    local = np.column_stack([semi_axes[0] * np.cos(t), semi_axes[1] * np.sin(t)])
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return local @ rotation + np.array(center)


def boundary_points(mask: np.ndarray) -> Points:
    """Midpoints between an inside and an outside 4-neighbor."""
    found = []
    for axis in (0, 1):
        changes = np.argwhere(np.diff(mask.astype(int), axis=axis) != 0).astype(float)
        changes[:, axis] += 0.5
        found.append(changes)
    return np.concatenate(found)


def fitted(points: Points) -> Ellipsoid:
    found = fit_ellipsoid(points)
    assert found is not None
    return found


@pytest.mark.parametrize("degrees", [360, 180, 120])
@pytest.mark.parametrize(("semi_axes", "angle"), [((70, 45), 0.4), ((45, 70), 0.0), ((70, 20), 2.9), ((30, 30), 0.0)])
def test_points_on_an_ellipse(semi_axes: tuple[float, float], angle: float, degrees: float) -> None:
    found = fitted(arc(semi_axes, angle, (100.3, -20.7), degrees))
    np.testing.assert_allclose(found.center, (100.3, -20.7), atol=1e-5)
    np.testing.assert_allclose(found.semi_axes, sorted(semi_axes, reverse=True), atol=1e-5)
    if semi_axes[0] != semi_axes[1]:
        long_angle = angle + (0 if semi_axes[0] > semi_axes[1] else math.pi / 2)
        direction = np.array([math.cos(long_angle), math.sin(long_angle)])
        assert abs(found.directions[0] @ direction) == pytest.approx(1)


@pytest.mark.parametrize("angle", [0.0, 0.3, 0.8, math.pi / 2, 2.5])
def test_a_rasterized_ellipse(angle: float) -> None:
    """A mask of 224 by 224: center and axes within 0.1 voxels, and within 1 voxel from half of it."""
    exact = Ellipsoid(
        np.array([111.3, 108.8]),
        np.array([70.0, 45.0]),
        np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]),
    )
    mask = exact.squared_radius(np.moveaxis(np.mgrid[:224, :224], 0, -1)) <= 1
    points = boundary_points(mask)
    half = points[(points - exact.center) @ exact.directions[1] > 0]
    for seen, tolerance in ((points, 0.1), (half, 1.0)):
        found = fitted(seen)
        np.testing.assert_allclose(found.center, exact.center, atol=tolerance)
        np.testing.assert_allclose(found.semi_axes, exact.semi_axes, atol=tolerance)
        assert abs(found.directions[0] @ exact.directions[0]) > math.cos(math.radians(1))


def sphere_points() -> Points:
    """200 points spread over the unit sphere."""
    index = np.arange(200) + 0.5
    z, t = 1 - index / 100, math.pi * (1 + 5**0.5) * index
    return np.column_stack([np.sqrt(1 - z**2) * np.cos(t), np.sqrt(1 - z**2) * np.sin(t), z])


@pytest.mark.parametrize("semi_axes", [(30, 20, 10), (20, 20, 20), (40, 10, 10), (40, 40, 8)])
def test_points_on_an_ellipsoid(semi_axes: tuple[float, float, float]) -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    for points in (sphere_points(), sphere_points()[:120]):
        found = fitted(points * semi_axes @ rotation + (5, -6, 70))
        np.testing.assert_allclose(found.center, (5, -6, 70), atol=1e-4)
        np.testing.assert_allclose(found.semi_axes, semi_axes, rtol=1e-4)
        if len(set(semi_axes)) == 3:
            np.testing.assert_allclose(np.abs(found.directions @ rotation.T), np.eye(3), atol=1e-4)


def test_noisy_arcs_give_ellipses() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = fitted(arc((70, 20), rng.uniform(0, 3), (0, 0), 100) + rng.normal(size=(60, 2)))
        assert (found.semi_axes > 0).all()


def test_even_a_hyperboloid_is_answered_with_an_ellipsoid() -> None:
    rng = np.random.default_rng(0)
    angle, height = rng.uniform(0, 2 * math.pi, 300), rng.uniform(-2, 2, 300)
    radius = np.sqrt(1 + height**2)
    found = fitted(np.column_stack([radius * np.cos(angle), radius * np.sin(angle), height]))
    assert (found.semi_axes > 0).all()
    assert abs(found.directions[0, 2]) > 0.99, "long along its axis"
    u = np.linspace(-1, 1, 40)
    hyperbola = np.concatenate([np.column_stack([side * np.cosh(u), np.sinh(u)]) for side in (-1, 1)])
    assert (fitted(hyperbola).semi_axes > 0).all()


def test_points_that_define_no_ellipse() -> None:
    line = np.column_stack([np.arange(10.0), 2 * np.arange(10.0)])
    assert fit_ellipsoid(line) is None
    assert fit_ellipsoid(np.zeros((10, 2))) is None
    assert fit_ellipsoid(arc((3, 2), 0, (0, 0))[:4]) is None
    assert fit_ellipsoid(np.column_stack([arc((3, 2), 0, (0, 0)), np.zeros(60)])) is None
    assert fit_ellipsoid(np.empty((0, 3))) is None
    with pytest.raises(ValueError, match=r"points of shape \(5, 4\)"):
        fit_ellipsoid(np.zeros((5, 4)))


def test_squared_radius() -> None:
    found = Ellipsoid(np.array([1.0, 2.0]), np.array([4.0, 2.0]), np.eye(2))
    np.testing.assert_allclose(
        found.squared_radius(np.array([[1, 2], [5, 2], [1, 4], [5, 4], [1, 6]])), [0, 1, 1, 2, 4]
    )


# ------------------------------------------------------------------------------------------------------ mirror images


def test_points_are_mirrored() -> None:
    center, normal = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
    assert reflect(torch.tensor([[4.0, 7.0], [1.0, -3.0]]), center, normal).tolist() == [[-2, 7], [1, -3]]
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    center, normal = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.3, -2.0, 1.0])
    twice = reflect(reflect(points, center, normal), center, normal)
    torch.testing.assert_close(twice, points)
    torch.testing.assert_close((reflect(points, center, normal) - center).norm(dim=1), (points - center).norm(dim=1))


def numbers(*size: int) -> Tensor:
    return torch.arange(math.prod(size)).reshape(1, *size)


def test_an_image_mirrored_at_its_middle_is_flipped() -> None:
    x = numbers(4, 6, 8)
    center = torch.tensor([1.5, 2.5, 3.5])
    for axis in range(3):
        assert torch.equal(mirror_image(x, center, torch.eye(3)[axis]), x.flip(axis + 1))
    millimeters = mirror_image(x, center * torch.tensor([3.0, 1.0, 2.0]), torch.eye(3)[0], (3.0, 1.0, 2.0))
    assert torch.equal(millimeters, x.flip(1))


def test_spacing_bends_an_oblique_mirror() -> None:
    """Normal (1, -1) exchanges the axes in mm: 2 voxels of 1 mm for 1 voxel of 2 mm."""
    x = numbers(8, 4)
    mirrored = mirror_image(x, torch.zeros(2), torch.tensor([1.0, -1.0]), (1.0, 2.0))
    assert mirrored[0, 4, 1] == x[0, 2, 2]
    assert mirrored[0, 6, 3] == x[0, 6, 3]


def test_twice_mirrored_is_almost_the_image() -> None:
    place = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij"))
    center, normal = torch.tensor([19.3, 20.1]), torch.tensor([1.0, 0.4])
    twice = mirror_image(mirror_image(place, center, normal), center, normal)
    inner = (place - center[:, None, None]).norm(dim=0) < 18
    assert (twice - place).abs().amax(0)[inner].max() <= 1
    n = normal / normal.norm()
    on_the_line = ((place - center[:, None, None]) * n[:, None, None]).sum(0).abs() < 0.2
    assert (mirror_image(place, center, normal) - place).abs().amax(0)[on_the_line].max() <= 1


def test_outside_the_border_the_edge_is_repeated() -> None:
    x = numbers(4, 1)
    assert mirror_image(x, torch.zeros(2), torch.tensor([1.0, 0.0])).flatten().tolist() == [0, 0, 0, 0]


def test_a_mirror_image_passes_the_gradient_on() -> None:
    x = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.arange(16.0).reshape(1, 4, 4)
    (mirror_image(x, torch.tensor([1.5, 1.5]), torch.tensor([0.0, 1.0])) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight.flip(2))


def test_each_patch_has_a_mirror_of_its_own() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3, 2, 6, 7, generator=generator)
    centers, normals = torch.tensor([[2.5, 3.0], [0.0, 0.0], [2.0, 9.0]]), torch.tensor([[1.0, 0.0], [2.0, 1], [0, 1]])
    planes = MirrorPlanes.through(centers, normals, (6, 7), (1.0, 2.0))
    alone = [mirror_image(*of, (1.0, 2.0)) for of in zip(x, centers, normals, strict=True)]
    assert torch.equal(planes.mirror(x), torch.stack(alone))


def test_halves_of_a_mirrored_patch() -> None:
    """The line itself belongs to the second half; what is mirrored from beyond the border is not inside."""
    planes = MirrorPlanes.through(torch.tensor([[4.0, 0.0]]), torch.tensor([[1.0, 0.0]]), (7, 3))
    assert planes.first_half[0, 0, :, 1].tolist() == [True] * 4 + [False] * 3
    assert planes.inside[0, 0, :, 1].tolist() == [False] * 2 + [True] * 5
    at = torch.tensor([[8.0, 0.0]])
    in_mm = MirrorPlanes.through(at, torch.tensor([[1.0, 0.0]]), (7, 3), (2.0, 1.0))
    assert torch.equal(in_mm.first_half, planes.first_half)
    assert torch.equal(in_mm.source, planes.source)


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.0, 2.2])
def test_a_voxel_and_its_mirror_image_lie_in_different_halves(angle: float) -> None:
    normal = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    center = torch.tensor([[20.3, 18.9]], dtype=torch.float64)
    planes = MirrorPlanes.through(center, normal, (40, 40))
    place = torch.stack(torch.meshgrid(torch.arange(40.0), torch.arange(40.0), indexing="ij"), -1).double()
    far = (((place - center) @ normal[0]).abs() > 1)[None, None]  # nearer, rounding may bring it back
    other = planes.mirror(planes.first_half)
    assert torch.equal(other[far & planes.inside], ~planes.first_half[far & planes.inside])


# --------------------------------------------------------------------------------------------------------------- band


def square(size: int = 40, side: int = 20) -> Tensor:
    y = torch.zeros(1, 1, size, size, dtype=torch.long)
    y[..., 10 : 10 + side, 10 : 10 + side] = 1
    return y


def test_the_band_of_a_square() -> None:
    band = boundary_band(square(), 2, (1.0, 1.0))
    inside, outside = band & (square() == 1), band & (square() == 0)
    assert int(inside.sum()) == 20**2 - 16**2
    assert int(outside.sum()) == 4 * 2 * 20 + 4, "two rows on each side, and one voxel at each corner"
    assert not band[..., :8, :].any()
    assert band.dtype == torch.bool


def test_the_edge_of_the_patch_is_no_border() -> None:
    assert not boundary_band(torch.ones(2, 1, 8, 8, dtype=torch.long), 2, (1.0, 1.0)).any()


def test_distances_count_in_units_of_the_smallest_spacing() -> None:
    y = torch.zeros(1, 1, 9, 9, 9, dtype=torch.long)
    y[..., 4, 4, 4] = 1
    band = boundary_band(y, 2, (2.0, 1.0, 1.0))
    assert band[0, 0, :, 4, 4].int().tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert band[0, 0, 4, 4].int().tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]
    assert int(boundary_band(y, 2, (1.0, 1.0, 1.0)).sum()) == 33, "a ball of radius 2"
    assert int(boundary_band(y, 2, (0.7, 0.7, 0.7)).sum()) == 33


@pytest.mark.parametrize(("through", "reaches"), [(3.0, True), (3.1, False)])
def test_thick_slices_have_bands_in_plane(through: float, reaches: bool) -> None:
    y = torch.zeros(1, 1, 5, 9, 9, dtype=torch.long)
    y[..., 2, 4, 4] = 1
    band = boundary_band(y, 4, (through, 1.0, 1.0))
    assert bool(band[0, 0, 1].any()) == reaches
    assert int(band[0, 0, 2].sum()) == 49, "a disk of radius 4"


def test_borders_between_any_two_classes_and_regions() -> None:
    y = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]).expand(1, 1, 9, 9)
    band = boundary_band(y, 1, (1.0, 1.0))
    assert band[0, 0, 0].int().tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0]
    regions = torch.cat([y > 0, y > 1], 1).float()
    assert torch.equal(boundary_band(regions, 1, (1.0, 1.0)), band)


def test_invalid_voxels_make_no_band() -> None:
    y, valid = square(), torch.ones(1, 1, 40, 40, dtype=torch.bool)
    valid[..., 10:30, 8:12] = False
    band = boundary_band(y, 2, (1.0, 1.0), valid)
    assert not (band & ~valid).any()
    assert not band[..., 14:26, :14].any(), "the voxels behind know of no border"
    assert band[..., 14:26, 28:32].all()
