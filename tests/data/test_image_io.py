"""Reading gives nnU-Net's arrays, writing gives the input's own geometry, damage gives a message of three parts."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from autossl.data.image_io import (
    Geometry,
    file_ending_of,
    orientation_for,
    read_geometry,
    read_image,
    read_label,
    write_label_map,
    write_scalar_map,
)
from autossl.data.problems import InvalidInput

SIZE_XYZ = (3, 4, 5)
RNG = np.random.default_rng(0)
FLIPS = list(itertools.product((1, -1), repeat=3))
SIGNED_AXES = [(order, signs) for order in itertools.permutations(range(3)) for signs in FLIPS]


def rotation(seed: int, angle: float) -> np.ndarray:
    axis = np.random.default_rng(seed).normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def affine_of(case: int) -> np.ndarray:
    """All 48 signed axis orders, straight, oblique, then oblique and sheared."""
    order, signs = SIGNED_AXES[case % 48]
    axes = np.eye(3)[list(order)] * signs
    matrix = axes if case < 48 else rotation(case, 0.3) @ axes
    matrix = matrix * (0.7, 1.3, 3.1)
    affine = np.eye(4)
    affine[:3, :3] = matrix @ (np.eye(3) + 0.05 * np.eye(3, k=1)) if case >= 96 else matrix
    affine[:3, 3] = (-12.5, 40.25, 7.1)
    return affine


def save_nifti(path: Path, affine: np.ndarray, dtype: type = np.int16) -> np.ndarray:
    voxels = RNG.integers(0, 100, SIZE_XYZ).astype(dtype)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
    return voxels


def itk_geometry(path: Path) -> tuple[object, ...]:
    image = sitk.ReadImage(str(path))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


@pytest.mark.parametrize("case", range(144))
def test_nifti_equals_nibabels_reoriented_image_and_goes_back_exactly(tmp_path: Path, case: int) -> None:
    path = tmp_path / ("image.nii" if case % 2 else "image.nii.gz")
    save_nifti(path, affine_of(case))
    original = nibabel.load(path)
    reference = nibabel.as_closest_canonical(original)

    loaded = read_image([path], "RAS")

    np.testing.assert_array_equal(loaded.array[0], reference.get_fdata().T)
    assert loaded.array.dtype == np.float32
    assert loaded.array.flags.c_contiguous
    assert list(loaded.spacing_zyx_mm) == [float(zoom) for zoom in reference.header.get_zooms()[::-1]]
    assert read_geometry(path) == loaded.geometry

    label = (loaded.array[0] > 50).astype(np.uint8)
    written = tmp_path / "label.nii.gz"
    write_label_map(written, label, Geometry.from_json(json.loads(json.dumps(loaded.geometry.to_json()))))
    result = nibabel.load(written)
    np.testing.assert_array_equal(result.affine, original.affine)
    assert result.header.get_zooms() == original.header.get_zooms()
    np.testing.assert_array_equal(result.get_fdata() > 0, original.get_fdata() > 50)
    np.testing.assert_array_equal(read_label(written)[0], label)
    if case < 96:  # SimpleITK refuses the sheared ones
        assert itk_geometry(written) == itk_geometry(path)


def test_nifti_native_keeps_the_stored_order(tmp_path: Path) -> None:
    voxels = save_nifti(tmp_path / "a.nii.gz", affine_of(20))
    loaded = read_image([tmp_path / "a.nii.gz"], "native")
    np.testing.assert_array_equal(loaded.array[0], voxels.T)
    np.testing.assert_allclose(loaded.spacing_zyx_mm, (3.1, 1.3, 0.7), rtol=1e-6)


def test_nifti_intensities_are_scaled_by_the_header(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(60, dtype=np.int16).reshape(SIZE_XYZ), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii")
    with (tmp_path / "a.nii").open("r+b") as file:  # nibabel rescales when it saves: put the slope in afterwards
        header = nibabel.Nifti1Header(file.read(348))
        header["scl_slope"], header["scl_inter"] = 0.5, -3
        file.seek(0)
        file.write(header.binaryblock)
    stored = np.asarray(nibabel.load(tmp_path / "a.nii").dataobj.get_unscaled())
    loaded = read_image([tmp_path / "a.nii"])
    np.testing.assert_array_equal(loaded.array[0], (stored * 0.5 - 3).T)


def test_nifti_where_the_two_forms_disagree_goes_by_nibabel(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(RNG.integers(0, 9, SIZE_XYZ).astype(np.uint8), np.eye(4))
    image.set_sform(np.diag([1.0, 1, 1, 1]), 2)
    image.set_qform(np.diag([-1.0, -1, 1, 1]), 1)
    nibabel.save(image, tmp_path / "a.nii.gz")
    loaded = read_image([tmp_path / "a.nii.gz"])
    np.testing.assert_array_equal(loaded.array[0], image.get_fdata().T)
    write_label_map(tmp_path / "b.nii.gz", loaded.array[0].astype(np.uint8), loaded.geometry)
    back = nibabel.load(tmp_path / "b.nii.gz").header
    for name in ("qform_code", "sform_code", "quatern_d", "srow_x"):
        np.testing.assert_array_equal(back[name], image.header[name])


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
@pytest.mark.parametrize("case", [0, 5, 23, 50, 61, 77, 90])
def test_itk_formats_are_reoriented_and_go_back_exactly(tmp_path: Path, ending: str, case: int) -> None:
    affine = affine_of(case)
    image = sitk.GetImageFromArray(RNG.integers(0, 100, SIZE_XYZ[::-1]).astype(np.int16))
    image.SetSpacing((0.7, 1.3, 3.1))
    image.SetOrigin((1.1, -2.2, 1 / 3))
    image.SetDirection((np.diag([-1, -1, 1]) @ affine[:3, :3] / (0.7, 1.3, 3.1)).ravel().tolist())
    path = tmp_path / f"image{ending}"
    sitk.WriteImage(image, str(path))

    loaded = read_image([path], "RAS")
    reference = sitk.DICOMOrient(image, "RAS")
    np.testing.assert_array_equal(loaded.array[0], sitk.GetArrayFromImage(reference))
    np.testing.assert_allclose(loaded.spacing_zyx_mm, reference.GetSpacing()[::-1], rtol=1e-12)

    write_label_map(tmp_path / f"label{ending}", (loaded.array[0] > 50), loaded.geometry)
    assert itk_geometry(tmp_path / f"label{ending}") == itk_geometry(path)
    assert loaded.geometry.stored_dtype == "int16"


def test_channels_stack_and_must_agree_in_size(tmp_path: Path) -> None:
    first = save_nifti(tmp_path / "c_0000.nii.gz", np.eye(4))
    second = save_nifti(tmp_path / "c_0001.nii.gz", np.eye(4), np.float32)
    loaded = read_image([tmp_path / "c_0000.nii.gz", tmp_path / "c_0001.nii.gz"])
    np.testing.assert_array_equal(loaded.array, np.stack([first.T, second.T]).astype(np.float32))
    assert [geometry.stored_dtype for geometry in loaded.geometries] == ["int16", "float32"]

    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 6), np.uint8), np.eye(4)), tmp_path / "c_0001.nii.gz")
    with pytest.raises(InvalidInput, match=r"c_0001.nii.gz: \(1, 6, 4, 3\) .* the first file has \(1, 5, 4, 3\)"):
        read_image([tmp_path / "c_0000.nii.gz", tmp_path / "c_0001.nii.gz"])


def test_pictures(tmp_path: Path) -> None:
    grey = RNG.integers(0, 255, (6, 7), dtype=np.uint8)
    color = RNG.integers(0, 255, (6, 7, 3), dtype=np.uint8)
    deep = grey.astype(np.uint16) * 200
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(color).save(tmp_path / "color.bmp")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    tifffile.imwrite(tmp_path / "planes.tif", np.moveaxis(color, -1, 0), photometric="rgb", planarconfig="separate")
    for name, expected in {
        "grey.png": grey[None, None],
        "color.bmp": np.moveaxis(color, -1, 0)[:, None],
        "deep.png": deep[None, None],
        "planes.tif": np.moveaxis(color, -1, 0)[:, None],
    }.items():
        loaded = read_image([tmp_path / name], orientation_for(Path(name).suffix))
        np.testing.assert_array_equal(loaded.array, expected, err_msg=name)
        assert loaded.spacing_zyx_mm == (999, 1, 1)
        assert read_geometry(tmp_path / name).shape_zyx == (1, 6, 7)


def test_label_pictures_keep_palette_indices_and_bits(tmp_path: Path) -> None:
    labels = RNG.integers(0, 3, (6, 7), dtype=np.uint8)
    palette = Image.fromarray(labels, mode="P")
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png")
    Image.fromarray(labels > 0).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_label(tmp_path / "palette.png", "native")[0][0], labels)
    np.testing.assert_array_equal(read_label(tmp_path / "bits.png", "native")[0][0], labels > 0)
    write_label_map(tmp_path / "again.png", labels[None], read_geometry(tmp_path / "palette.png"))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again.png")), labels)


def test_labels_stored_as_float_become_integers_unless_they_have_fractions(tmp_path: Path) -> None:
    path = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.full(SIZE_XYZ, 2, np.float32), np.eye(4)), path)
    label, _, geometry = read_label(path)
    assert label.dtype == np.int32
    assert set(np.unique(label)) == {2}
    assert geometry.stored_dtype == "float32"
    nibabel.save(nibabel.Nifti1Image(np.full(SIZE_XYZ, 0.5, np.float32), np.eye(4)), path)
    with pytest.raises(
        InvalidInput, match=r"60 voxels of a label map are no label numbers, 0.5 for one.*whole numbers"
    ):
        read_label(path)


def test_scalar_maps_keep_float32_beside_any_input(tmp_path: Path) -> None:
    values = RNG.random((5, 4, 3)).astype(np.float32)
    save_nifti(tmp_path / "a.nii.gz", np.eye(4))
    write_scalar_map(tmp_path / "u.nii.gz", values, read_geometry(tmp_path / "a.nii.gz"))
    np.testing.assert_array_equal(read_image([tmp_path / "u.nii.gz"]).array[0], values)
    Image.fromarray(np.zeros((6, 7), np.uint8)).save(tmp_path / "p.png")
    flat = RNG.random((1, 6, 7)).astype(np.float32)
    write_scalar_map(tmp_path / "p.nii.gz", flat, read_geometry(tmp_path / "p.png"))
    np.testing.assert_array_equal(nibabel.load(tmp_path / "p.nii.gz").get_fdata(), flat[0].T)
    with pytest.raises(InvalidInput, match=r"float32 for a .png file.*write .tif or .nii.gz"):
        write_scalar_map(tmp_path / "p_out.png", flat, read_geometry(tmp_path / "p.png"))
    assert not list(tmp_path.glob("*p_out*")), "nothing half-written stays"


def test_written_maps_must_have_the_images_shape(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", np.eye(4))
    with pytest.raises(ValueError, match=r"the array is \(3, 4, 5\), the image it belongs to is \(5, 4, 3\)"):
        write_label_map(tmp_path / "b.nii.gz", np.zeros(SIZE_XYZ, np.uint8), read_geometry(tmp_path / "a.nii.gz"))


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha", "a.png", "a.bmp", "a.tif"])
@pytest.mark.parametrize("left", [0.9, 0.6, 20])
def test_cut_off_files_are_refused(tmp_path: Path, name: str, left: float) -> None:
    path = tmp_path / name
    if name.startswith("a.nii"):
        save_nifti(path, np.eye(4))
    elif name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(sitk.GetImageFromArray(RNG.integers(0, 9, (5, 40, 30)).astype(np.uint8)), str(path))
    else:
        Image.fromarray(RNG.integers(0, 255, (60, 70), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if left < 1 else int(left)])
    with pytest.raises(InvalidInput, match=r"(?s)a\.\w+.*Expected: a complete, readable image.*copy or export"):
        read_image([path])


def test_other_unusable_files(tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").touch()
    with pytest.raises(InvalidInput, match=r"the file is empty \(0 bytes\)"):
        read_image([tmp_path / "empty.nii.gz"])
    with pytest.raises(InvalidInput, match="does not exist"):
        read_image([tmp_path / "missing.nii.gz"])
    with pytest.raises(InvalidInput, match=r"unknown file ending. Expected: one of .nii.gz, .nii, .nrrd"):
        read_image([tmp_path / "image.jpg"])
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no header" * 100))
    with pytest.raises(InvalidInput, match="no NIfTI header"):
        read_image([tmp_path / "text.nii.gz"])
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5, 2), np.uint8), np.eye(4)), tmp_path / "time.nii.gz")
    with pytest.raises(InvalidInput, match="an image of 3 x 4 x 5 x 2 voxels"):
        read_image([tmp_path / "time.nii.gz"])
    Image.fromarray(np.zeros((6, 7, 3), np.uint8)).save(tmp_path / "color.png")
    with pytest.raises(InvalidInput, match="a label map of 3 channels"):
        read_label(tmp_path / "color.png", "native")


def test_differences_name_both_values(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", np.diag([1.0, 1, 3, 1]))
    save_nifti(tmp_path / "b.nii.gz", np.diag([1.0, 1, 2.5, 1]))
    a, b = read_geometry(tmp_path / "a.nii.gz"), read_geometry(tmp_path / "b.nii.gz")
    assert a.differences(a) == []
    assert a.differences(b) == ["spacing (1, 1, 3) against (1, 1, 2.5)"]


def test_geometry_json_with_other_keys_is_refused(tmp_path: Path) -> None:
    save_nifti(tmp_path / "a.nii.gz", np.eye(4))
    content = read_geometry(tmp_path / "a.nii.gz").to_json()
    del content["axes"]
    with pytest.raises(InvalidInput, match="preprocess the case again"):
        Geometry.from_json(content)


def test_file_endings() -> None:
    assert [file_ending_of(Path(name)) for name in ("a.NII.GZ", "a.nii", "a.b.png", "a.jpg")] == [
        ".nii.gz",
        ".nii",
        ".png",
        "",
    ]
    assert [orientation_for(ending) for ending in (".nii.gz", ".mha", ".png")] == ["RAS", "RAS", "native"]
