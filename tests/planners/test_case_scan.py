"""One read of a case gives its numbers, or every fault it has."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import binary_fill_holes

from autossl.data.labels import LabelSchema
from autossl.data.raw_dataset import Case
from autossl.planners.case_scan import CaseScan, ScanSettings, intensity_quantiles, nonzero_box, scan_bytes, scan_case
from autossl.planners.foreground import foreground_path, load_foreground

SCHEMA = LabelSchema({"background": (0,), "a": (1,), "b": (2,)})
AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
RANDOM = np.random.default_rng(0)


def _write(path: Path, array_zyx: npt.NDArray[np.generic], affine: npt.NDArray[np.float64] = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(array_zyx.transpose(2, 1, 0), affine), path)
    return path


def _image() -> npt.NDArray[np.float32]:
    image = np.zeros((6, 8, 10), np.float32)
    image[1:5, 2:8, 0:10] = RANDOM.normal(100, 10, size=(4, 6, 10))
    return image


def _label() -> npt.NDArray[np.uint8]:
    label = np.zeros((6, 8, 10), np.uint8)
    label[2:4, 3:6, 2:8] = 1
    label[2, 3, 2] = 2
    return label


def _settings(folder: Path, n_channels: int = 1, **changed: object) -> ScanSettings:
    return ScanSettings(folder, SCHEMA, n_channels, n_draws=500, **changed)  # type: ignore[arg-type]


def _case(folder: Path, n_channels: int = 1, pool: str = "labeled") -> Case:
    """A healthy case; tests overwrite its files."""
    images = tuple(_write(folder / f"c_{i:04d}.nii.gz", _image()) for i in range(n_channels))
    label = _write(folder / "c.nii.gz", _label()) if pool == "labeled" else None
    return Case("c", images, label, pool, "c")  # type: ignore[arg-type]


def _errors(scan: CaseScan) -> list[str]:
    assert scan.fingerprint is None
    return [str(problem) for problem in scan.findings.errors]


def test_a_healthy_case_gives_its_numbers(tmp_path: Path) -> None:
    case = _case(tmp_path, n_channels=2)
    scan = scan_case(case, _settings(tmp_path, 2))
    found = scan.fingerprint
    assert found is not None
    assert scan.findings.errors == scan.findings.warnings == []
    assert found.spacing_zyx_mm == (3, 2, 1)
    assert (found.shape_zyx, found.shape_after_crop_zyx) == ((6, 8, 10), (4, 6, 10))
    assert found.relative_size_after_crop == pytest.approx(0.5)
    assert found.class_voxels == {"a": 35, "b": 1}
    assert found.components == {"a": (1, 1.0), "b": (1, 1.0)}
    assert found.ellipticity["b"] is None
    assert [len(quantiles) for quantiles in found.intensity_quantiles] == [7, 7]
    assert set(found.files) == {"c_0000.nii.gz", "c_0001.nii.gz", "c.nii.gz"}
    assert found.files["c.nii.gz"][0] == (tmp_path / "c.nii.gz").stat().st_size
    assert [int(drawn.weights.sum()) for drawn in scan.drawn] == [500, 500]


def test_unlabeled_cases_have_image_numbers_and_test_cases_hashes_only(tmp_path: Path) -> None:
    unlabeled = scan_case(_case(tmp_path, pool="unlabeled"), _settings(tmp_path)).fingerprint
    test = scan_case(_case(tmp_path, pool="test"), _settings(tmp_path)).fingerprint
    assert unlabeled is not None
    assert test is not None
    assert (len(unlabeled.intensity_quantiles), unlabeled.class_voxels) == (1, {})
    assert (test.intensity_quantiles, test.class_voxels) == ((), {})
    assert len(test.voxel_hash) == 32
    assert test.robust_hash


def test_labels_of_test_cases_are_checked_and_forgotten(tmp_path: Path) -> None:
    case = _case(tmp_path)
    hidden = Case(case.id, case.images, case.label, "test", case.patient)
    scan = scan_case(hidden, _settings(tmp_path))
    assert scan.fingerprint is not None
    assert scan.fingerprint.class_voxels == {}
    assert scan.drawn == ()
    _write(tmp_path / "c.nii.gz", _label() * 5)
    assert "undeclared label values: 5" in _errors(scan_case(hidden, _settings(tmp_path)))[0]


def test_all_faults_of_a_case_are_found_in_one_scan(tmp_path: Path) -> None:
    case = _case(tmp_path, n_channels=4)
    broken = _image()
    broken[3, 3, 3] = np.nan
    _write(case.images[1], broken)
    case.images[2].write_bytes(b"")
    case.images[3].write_bytes(case.images[3].read_bytes()[:-200])
    _write(tmp_path / "c.nii.gz", _label() * 3, np.diag([1.0, 2.0, 4.0, 1.0]))
    errors = _errors(scan_case(case, _settings(tmp_path, 4)))
    assert all(error.startswith(f"case c, {tmp_path}") for error in errors)
    for part in ("1 of 480 voxels are NaN", "empty", "cut off", "spacing (4, 2, 1)", "label values: 3 (35 voxels), 6"):
        assert sum(part in error for error in errors) == 1, part
    assert len(errors) == 5


def test_channels_and_labels_of_other_shapes_are_named_with_both_shapes(tmp_path: Path) -> None:
    case = _case(tmp_path, n_channels=2)
    _write(case.images[1], _image()[:5])
    _write(tmp_path / "c.nii.gz", _label()[:, :7])
    errors = _errors(scan_case(case, _settings(tmp_path, 2)))
    assert len(errors) == 2
    assert "c_0001.nii.gz: shape (5, 8, 10) against (6, 8, 10) voxels (z,y,x)" in errors[0]
    assert "c.nii.gz: shape (6, 7, 10) against (6, 8, 10)" in errors[1]


def test_whole_numbers_stored_as_float_are_read_and_fractions_refused(tmp_path: Path) -> None:
    case = _case(tmp_path)
    whole = scan_case(case, _settings(tmp_path)).fingerprint
    _write(tmp_path / "c.nii.gz", _label().astype(np.float32))
    scan = scan_case(case, _settings(tmp_path))
    assert scan.fingerprint is not None
    assert whole is not None
    assert scan.fingerprint.class_voxels == whole.class_voxels
    assert scan.fingerprint.warnings == ("labels stored as float32, all of them whole numbers",)
    _write(tmp_path / "c.nii.gz", _label() * np.float32(0.5))
    assert "no label numbers, 0.5 for one" in _errors(scan_case(case, _settings(tmp_path)))[0]


def test_remapped_labels_are_checked_and_counted_after_mapping(tmp_path: Path) -> None:
    case = _case(tmp_path)
    _write(tmp_path / "c.nii.gz", _label() * 100)
    scan = scan_case(case, _settings(tmp_path, remap_labels={100: 1, 200: 2}))
    assert scan.fingerprint is not None
    assert scan.fingerprint.class_voxels == {"a": 35, "b": 1}


def test_a_grey_picture_where_colors_are_declared_is_an_error(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "p.png")
    case = Case("p", (tmp_path / "p.png",), None, "unlabeled", "p")
    (error,) = _errors(scan_case(case, _settings(tmp_path, 3, orientation="native")))
    assert "1 channel in the file. Expected: 3 channels" in error


def test_foreground_is_kept_in_order_where_a_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autossl.planners import case_scan

    case, kept = _case(tmp_path), tmp_path / "kept"
    scan_case(case, _settings(tmp_path, foreground_folder=kept))
    image = nibabel.load(case.images[0]).get_fdata().transpose(2, 1, 0)
    assert np.allclose(load_foreground(foreground_path(kept, "c")), image[_label() > 0][None])
    monkeypatch.setattr(case_scan, "MAX_KEPT_VALUES", 10)
    for keep_all in (False, True):
        folder = tmp_path / str(keep_all)
        scan_case(case, _settings(tmp_path, foreground_folder=folder, keep_all_foreground=keep_all))
        assert foreground_path(folder, "c").exists() is keep_all


def test_box_of_non_zero_voxels_equals_that_of_the_filled_mask() -> None:
    image = np.zeros((2, 7, 8, 9), np.float32)
    image[0, 1, 2:6, 3:7] = 1
    image[1, 2:5, 3, 4] = -1
    image[0, 1, 3, 4] = 0  # a hole
    filled = np.argwhere(binary_fill_holes(image.any(0)))
    expected = tuple(slice(low, high + 1) for low, high in zip(filled.min(0), filled.max(0), strict=True))
    assert nonzero_box(image) == expected


def test_quantiles_of_a_ramp_and_of_a_large_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from autossl.planners import case_scan

    ramp = np.arange(1001, dtype=np.float32).reshape(1, 1, 1, 1001)
    assert intensity_quantiles(ramp)[0] == pytest.approx((5, 50, 250, 500, 750, 950, 995))
    monkeypatch.setattr(case_scan, "MAX_VOXELS_OF_QUANTILES", 300)
    assert intensity_quantiles(ramp)[0] == pytest.approx((5, 50, 250, 500, 750, 950, 995), abs=3)


def test_scan_memory_is_estimated_from_the_header(tmp_path: Path) -> None:
    case = _case(tmp_path, n_channels=2)
    assert scan_bytes(case) == 480 * (4 * 2 + 20)
    case.images[0].write_bytes(b"")
    assert scan_bytes(case) == 0
