"""One case: order of the steps, the way back to its own grid, labels, masks, class locations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from skimage.transform import resize

from autossl.data.labels import LabelSchema
from autossl.data.prepared import CaseProperties
from autossl.data.problems import InvalidInput
from autossl.preprocessing.prepare import ANNOTATED, prepare_case, sample_class_locations


def volume(seed: int = 0, shape: tuple[int, ...] = (1, 9, 10, 11)) -> np.ndarray:
    """Positive noise in a frame of zeros, different on each side."""
    image = np.zeros(shape, dtype=np.float32)
    inner = image[:, 2:-1, 1:-3, 3:-2]
    inner[...] = np.random.default_rng(seed).uniform(1, 100, inner.shape)
    return image


def test_a_case_goes_through_transpose_crop_normalize_resample_in_this_order(make_plans: Any, make_image: Any) -> None:
    image = volume()
    plans = make_plans(spacing=(1.5, 1.0, 2.0), transpose=(2, 0, 1))
    prepared = prepare_case(make_image(image, (2.0, 4.0, 3.0)), None, plans, "3d_fullres")
    cropped = image[0].transpose(2, 0, 1)[3:-2, 2:-1, 1:-3]
    normalized = (cropped - cropped.mean()) / cropped.std()
    assert prepared.properties.spacing_mm == (3.0, 2.0, 4.0)
    assert prepared.properties.crop_box == ((3, 9), (2, 8), (1, 7))
    assert prepared.properties.shape == (12, 12, 12)
    expected = resize(normalized.astype(float), (12, 12, 12), 3, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(prepared.image[0], expected, atol=1e-5)
    assert prepared.label is None
    assert prepared.nonzero is None


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)])
def test_properties_bring_every_voxel_back_to_its_place(make_plans: Any, make_image: Any, transpose: Any) -> None:
    image = volume()
    plans = make_plans(schemes=("NoNormalization",), transpose=transpose)
    prepared = prepare_case(make_image(image), None, plans, "3d_fullres")
    written = json.loads(json.dumps(prepared.properties.to_json()))
    properties = CaseProperties.from_json(written)
    assert properties == prepared.properties
    assert prepared.image.shape[1:] == properties.shape == properties.shape_after_crop
    restored = np.zeros(properties.shape_before_crop, dtype=np.float32)
    restored[tuple(slice(*side) for side in properties.crop_box)] = prepared.image[0]
    np.testing.assert_array_equal(restored.transpose(properties.transpose_backward), image[0])


def test_2d_keeps_the_spacing_of_the_slices(make_plans: Any, make_image: Any) -> None:
    plans = make_plans(spacing=(9.0, 0.5, 1.0))
    prepared = prepare_case(make_image(volume(), (4.0, 1.0, 1.0)), None, plans, "2d")
    assert prepared.properties.target_spacing_mm == (4.0, 0.5, 1.0)
    assert prepared.properties.shape == (6, 12, 6)


def test_cases_that_2d_and_3d_prepare_alike_have_the_same_values_hash(make_plans: Any, make_image: Any) -> None:
    plans = make_plans(spacing=(2.0, 1.0, 1.0))

    def hash_of(configuration: str, slice_spacing: float) -> str:
        image = make_image(volume(), (slice_spacing, 1.0, 1.0))
        return prepare_case(image, None, plans, configuration).properties.values_hash

    assert hash_of("2d", 2.0) == hash_of("3d_fullres", 2.0) == hash_of("3d_fullres", 3.0)
    assert hash_of("2d", 3.0) != hash_of("3d_fullres", 3.0)


def test_the_label_counts_background_outside_the_nonzero_region_as_a_class_of_its_own(
    make_plans: Any, make_image: Any
) -> None:
    rng = np.random.default_rng(5)
    image = volume()
    image[0, 4:6, 3:6, 4:8] = 0  # a hole: it is filled and counts as inside
    image[0, 2, 1:4, 3:9] = 0  # a dent: it stays outside
    label = rng.integers(0, 3, image.shape[1:]).astype(np.uint8)
    prepared = prepare_case(make_image(image), label, make_plans(spacing=(0.7, 1.3, 0.8)), "3d_fullres")
    signed = label[2:-1, 1:-3, 3:-2].astype(float)
    dent = np.zeros(signed.shape, dtype=bool)
    dent[0, 0:3] = True
    signed[dent & (signed == 0)] = -1
    expected = resize_segmentation(signed, prepared.properties.shape, 1).clip(0)
    np.testing.assert_array_equal(prepared.label, expected)
    assert prepared.label is not None
    assert prepared.label.dtype == np.int8


@pytest.mark.parametrize(("highest", "kind"), [(127, np.int8), (128, np.int16), (40_000, np.int32)])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 0.5)])
def test_labels_are_stored_as_narrow_as_their_values_allow(
    make_plans: Any, make_image: Any, highest: int, kind: type, spacing: Any
) -> None:
    label = np.zeros((9, 10, 11), dtype=np.int32)
    label[4:6, 4:6, 5:7] = highest
    prepared = prepare_case(make_image(volume()), label, make_plans(spacing=spacing), "3d_fullres")
    assert prepared.label is not None
    assert (prepared.label.dtype, prepared.label.max()) == (kind, highest)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 1.2, 0.9)])
def test_image_and_mask_do_not_depend_on_the_label(make_plans: Any, make_image: Any, spacing: Any) -> None:
    image = volume()
    image[0, 2, 1:4, 3:9] = 0
    plans = make_plans(spacing=spacing, masked=True)
    alone = prepare_case(make_image(image), None, plans, "3d_fullres")
    labeled = prepare_case(make_image(image), np.ones(image.shape[1:], dtype=np.uint8), plans, "3d_fullres")
    np.testing.assert_array_equal(alone.image, labeled.image)
    assert alone.nonzero is not None
    np.testing.assert_array_equal(alone.nonzero, labeled.nonzero)
    assert alone.properties == labeled.properties
    assert alone.properties.has_nonzero_mask


def test_within_a_mask_only_the_inside_is_normalized(make_plans: Any, make_image: Any) -> None:
    image = volume()
    image[0, 2, 1:4, 3:9] = 0
    prepared = prepare_case(make_image(image), None, make_plans(masked=True), "3d_fullres")
    assert prepared.nonzero is not None
    assert (prepared.image[0][~prepared.nonzero] == 0).all()
    assert prepared.image[0][prepared.nonzero].mean() == pytest.approx(0, abs=1e-5)
    assert (~prepared.nonzero).sum() == 18


def test_locations_are_voxels_of_their_class_and_at_most_ten_thousand() -> None:
    schema = LabelSchema({"background": (0,), "small": (1,), "large": (2,), "absent": (3,)})
    label = np.zeros((4, 60, 90), dtype=np.int8)
    label[:, :50] = 2
    label[1, 55, 7:9] = 1
    found = sample_class_locations(label, schema)
    assert {name: len(voxels) for name, voxels in found.items()} == {"small": 2, "large": 10_000, "absent": 0}
    assert (label[tuple(found["large"].T)] == 2).all()
    assert len(np.unique(found["large"], axis=0)) == 10_000
    assert found["small"].tolist() == [[1, 55, 7], [1, 55, 8]]
    again = sample_class_locations(label, schema)
    np.testing.assert_array_equal(found["large"], again["large"])


def test_regions_and_ignore_have_their_locations() -> None:
    names = {"background": (0,), "whole": (1, 2), "core": (2,), "ignore": (3,)}
    label = np.array([[[0, 1, 2, 3, 3, 2]]], dtype=np.int8)
    found = sample_class_locations(label, LabelSchema(names, regions_class_order=(1, 2)))
    assert {name: voxels[:, 2].tolist() for name, voxels in found.items()} == {
        "whole": [1, 2, 5],
        "core": [2, 5],
        ANNOTATED: [0, 1, 2, 5],
    }


def test_what_does_not_fit_the_plans_is_told_with_both_figures(make_plans: Any, make_image: Any) -> None:
    with pytest.raises(InvalidInput, match="image of 2 channels.*1 channels, as planned for Dataset900_Tiny"):
        prepare_case(make_image(volume(shape=(2, 9, 10, 11))), None, make_plans(), "3d_fullres")
    with pytest.raises(InvalidInput, match=r"label of \(9, 10, 10\) voxels.*\(9, 10, 11\)"):
        prepare_case(make_image(volume()), np.zeros((9, 10, 10), dtype=np.uint8), make_plans(), "3d_fullres")
    with pytest.raises(InvalidInput, match="no voxel left"):
        prepare_case(make_image(volume()), None, make_plans(spacing=(100.0, 1.0, 1.0)), "3d_fullres")


def test_a_resampling_that_does_not_exist_here_is_refused_by_name(make_plans: Any, make_image: Any) -> None:
    plans = make_plans()
    content = plans.to_json()
    content["configurations"]["3d_fullres"]["resampling_fn_data"] = "resample_torch_fornnunet"
    content["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"]["order_z"] = 1
    edited = type(plans).model_validate(content)
    with pytest.raises(InvalidInput, match="resampling_fn_data is resample_torch_fornnunet.*order_z is 1"):
        prepare_case(make_image(volume()), None, edited, "3d_fullres")
