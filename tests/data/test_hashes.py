"""The same image is found again: exactly, flipped, scaled or resized; different images are not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import gaussian_filter, zoom

from autossl.data import hashes
from autossl.data.hashes import SIMILAR, DuplicatePair, HashedCase, find_duplicates, robust_hash, voxel_hash

Image = npt.NDArray[np.float32]


def _smooth_image(seed: int, shape: tuple[int, ...] = (1, 20, 30, 26)) -> Image:
    noise = np.random.default_rng(seed).normal(size=shape)
    return np.stack([gaussian_filter(channel, 3) for channel in noise]).astype(np.float32)


def _hashed(name: str, image: Image) -> HashedCase:
    return HashedCase(name, voxel_hash(image), robust_hash(image))


def test_voxel_hash_depends_on_values_shape_and_type_only() -> None:
    image = _smooth_image(0)
    assert voxel_hash(image) == voxel_hash(np.asfortranarray(image))
    changed = image.copy()
    changed[0, 3, 4, 5] += 1e-3
    others = {voxel_hash(x) for x in (changed, image[:, ::-1], image.reshape(1, 20, 26, 30), image.astype(np.float64))}
    assert voxel_hash(image) not in others
    assert len(others) == 4


@pytest.mark.parametrize("shape", [(1, 20, 30, 26), (1, 1, 60, 50), (2, 9, 30, 26)])
def test_robust_hash_is_equal_for_flips_and_scaled_intensities(shape: tuple[int, ...]) -> None:
    image = _smooth_image(1, shape)
    expected = robust_hash(image)
    assert expected != ""
    for axes in ((1,), (2,), (3,), (1, 2, 3)):
        assert robust_hash(np.ascontiguousarray(np.flip(image, axes))) == expected
    assert robust_hash(image * 40 - 1000) == expected


def test_robust_hash_of_a_constant_image_is_empty_and_matches_nothing() -> None:
    flat = np.full((1, 8, 8, 8), 7, np.float32)
    assert robust_hash(flat) == ""
    assert find_duplicates([_hashed("a", flat), _hashed("b", flat + 1)]) == []


def test_find_duplicates_tells_identical_from_similar_and_keeps_the_order_of_ids() -> None:
    image = _smooth_image(2)
    resized = np.stack([zoom(np.flip(image[0], 1), 0.8, order=1, grid_mode=True, mode="nearest")])
    cases = [_hashed("twin", image), _hashed("other", _smooth_image(3)), _hashed("case", image)]
    cases.append(_hashed("small", resized))
    pairs = find_duplicates(cases)
    assert [(p.first, p.second, p.kind) for p in pairs] == [
        ("case", "small", "similar"),
        ("case", "twin", "identical"),
        ("small", "twin", "similar"),
    ]
    assert pairs[1] == DuplicatePair("case", "twin", "identical", 1.0)
    assert 0.96 <= pairs[0].similarity < 1


def test_find_duplicates_never_compares_volumes_with_pictures() -> None:
    volume, picture = _smooth_image(4), _smooth_image(4, (1, 1, 40, 40))
    assert find_duplicates([_hashed("volume", volume), _hashed("picture", picture)]) == []


def test_many_different_images_give_no_pair_and_one_copy_is_found_among_them() -> None:
    cases = [_hashed(f"case{i:03d}", _smooth_image(i, (1, 12, 14, 13))) for i in range(60)]
    assert find_duplicates(cases) == []
    copy = np.ascontiguousarray(_smooth_image(17, (1, 12, 14, 13))[:, ::-1]) * 3
    assert [(p.first, p.second) for p in find_duplicates([*cases, _hashed("copy", copy)])] == [("case017", "copy")]


def test_sorting_out_by_averaged_grids_loses_no_pair() -> None:
    random = np.random.default_rng(5)
    base = _smooth_image(5, (1, 24, 24, 24))
    cases = {"base": robust_hash(base)}
    for number, level in enumerate(np.linspace(0.05, 0.6, 12)):
        noisy = base + level * base.std() * gaussian_filter(random.normal(size=base.shape), (0, 2, 2, 2)) * 10
        cases[f"noisy{number:02d}"] = robust_hash(np.ascontiguousarray(np.flip(noisy, 2)).astype(np.float32))
    grids = np.stack([hashes._unit(hashes._decode(text)) for text in cases.values()])
    correlations = hashes._best_correlation(grids, grids)
    names = list(cases)
    expected = {(names[i], names[j]) for i, j in np.argwhere(correlations >= SIMILAR) if i < j}
    found = {(p.first, p.second) for p in find_duplicates([HashedCase(n, n, text) for n, text in cases.items()])}
    assert found == expected
    assert 3 < len(expected) < 40
    assert min(correlations[names.index(a), names.index(b)] for a, b in expected) < 0.975


def test_averaged_grids_are_as_far_apart_as_symmetric_grids_and_never_farther() -> None:
    grids = np.random.default_rng(0).normal(size=(2, 12, 12, 12)).astype(np.float32)
    symmetric = np.mean(hashes._flips(grids), axis=0, dtype=np.float32)
    for some, relation in ((symmetric, 1.0), (grids, 1 / 8)):
        averaged = hashes._averaged_over_flips(some)
        ratio = np.sum((averaged[0] - averaged[1]) ** 2) / np.sum((some[0] - some[1]) ** 2)
        assert ratio == pytest.approx(relation, rel=0.15 if relation < 1 else 1e-4)
