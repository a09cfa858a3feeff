"""The phantom is reproducible, laid out as a raw dataset, and neither trivial nor noise."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from autossl.data.phantom import LABELS, PhantomSettings, make_phantom_case, make_phantom_dataset
from autossl.data.problems import InvalidInput

SMALL = PhantomSettings(n_labeled=2, n_unlabeled=3, n_test=1, shape_zyx=(16, 20, 20))


def test_the_raw_layout_holds_every_pool(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path, SMALL)
    names = {part.name: sorted(file.name for file in part.iterdir()) for part in folder.iterdir() if part.is_dir()}
    assert names == {
        "imagesTr": ["phantom_001_0000.nii.gz", "phantom_002_0000.nii.gz"],
        "labelsTr": ["phantom_001.nii.gz", "phantom_002.nii.gz"],
        "imagesUn": [f"phantom_00{n}_0000.nii.gz" for n in (3, 4, 5)],
        "imagesTs": ["phantom_006_0000.nii.gz"],
        "labelsTs": ["phantom_006.nii.gz"],
    }
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == LABELS
    assert description["numTraining"] == 2


def test_image_and_label_share_their_grid_and_hold_the_made_arrays(tmp_path: Path) -> None:
    folder = make_phantom_dataset(tmp_path, SMALL)
    image = nibabel.load(folder / "imagesTr/phantom_001_0000.nii.gz")
    label = nibabel.load(folder / "labelsTr/phantom_001.nii.gz")
    made = make_phantom_case(SMALL, 1)
    assert np.array_equal(image.affine, label.affine)
    assert image.header.get_zooms() == pytest.approx(made.spacing_zyx_mm[::-1])
    assert np.array_equal(np.asarray(label.dataobj).transpose(2, 1, 0), made.label)
    assert np.array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), made.image)


def test_a_case_follows_from_seed_and_number() -> None:
    first, again = make_phantom_case(SMALL, 1), make_phantom_case(SMALL, 1)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.label, again.label)
    other_seed = make_phantom_case(PhantomSettings(shape_zyx=(16, 20, 20), seed=1), 1)
    assert first.image.shape != other_seed.image.shape or not np.array_equal(first.image, other_seed.image)


@pytest.mark.parametrize("number", range(1, 9))
def test_the_capsule_encloses_a_core_and_stands_out_from_the_body(number: int) -> None:
    made = make_phantom_case(PhantomSettings(), number)
    capsule, core = made.label == LABELS["capsule"], made.label == LABELS["core"]
    assert capsule.sum() > 150
    assert core.sum() > 50
    assert not (binary_dilation(core) & ~core & ~capsule).sum() > 0.2 * core.sum()
    body = (made.label == 0) & (made.image > 0.3 * np.median(made.image[capsule]))
    assert made.image[capsule].mean() - made.image[body].mean() > 0.5 * made.image[body].std()


def test_even_the_best_threshold_of_each_case_does_not_find_the_organ() -> None:
    best = []
    for number in range(1, 9):
        made = make_phantom_case(PhantomSettings(), number)
        organ = made.label > 0
        levels = np.quantile(made.image, np.linspace(0.5, 0.99, 50))
        found = [made.image > level for level in levels]
        best.append(max(2 * (organ & mask).sum() / (organ.sum() + mask.sum()) for mask in found))
    assert np.mean(best) < 0.8


def test_making_the_same_phantom_again_is_allowed_another_one_not(tmp_path: Path) -> None:
    make_phantom_dataset(tmp_path, SMALL)
    make_phantom_dataset(tmp_path, SMALL)
    with pytest.raises(InvalidInput, match="something else than this phantom"):
        make_phantom_dataset(tmp_path, PhantomSettings(seed=5))
