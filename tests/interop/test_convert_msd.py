"""Decathlon tasks become raw datasets: there and back the voxels, their types, scales and headers are the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from autossl.data.image_io import read_image, read_label
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import RawDataset, read_raw_dataset
from autossl.interop.convert.convert import convert
from autossl.interop.convert.source import BidsOptions, ConvertRequest

SHAPE = (5, 4, 3)
AFFINE = np.array([[-0.7, 0.1, 0, 12], [0.1, 0.8, 0, -7], [0, 0, 2.5, 3], [0, 0, 0, 1]])
DESCRIPTION = {
    "name": "Prostate",
    "licence": "CC-BY-SA 4.0",
    "tensorImageSize": "4D",
    "modality": {"0": "T2", "1": "ADC"},
    "labels": {"0": "Background", "2": "TZ", "1": "PZ"},
    "numTraining": 2,
    "numTest": 1,
}


def image(seed: int, channels: int = 2, dtype: Any = np.int16) -> nibabel.Nifti1Image:
    """[x,y,z,c] with a scale in the header, on an oblique grid whose qform and sform differ in their codes."""
    rng = np.random.default_rng(seed)
    shape = SHAPE if channels == 1 else (*SHAPE, channels)
    made = nibabel.Nifti1Image(rng.integers(-500, 500, shape).astype(dtype), AFFINE)
    made.header.set_slope_inter(0.5, 10)
    made.header.set_sform(AFFINE, code="aligned")
    made.header.set_qform(AFFINE, code="scanner")
    made.header["descrip"] = b"made up"
    return made


def label(seed: int) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image(np.random.default_rng(seed).integers(0, 3, SHAPE).astype(np.uint8), AFFINE)


def write_task(folder: Path, channels: int = 2, **changes: Any) -> Path:
    """Two training cases and a test case."""
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (folder / name).mkdir(parents=True)
    for number, case in enumerate(("p_00", "p_01")):
        nibabel.save(image(number, channels), folder / "imagesTr" / f"{case}.nii.gz")
        nibabel.save(label(number), folder / "labelsTr" / f"{case}.nii.gz")
        (folder / "imagesTr" / f"._{case}.nii.gz").write_bytes(b"what macOS leaves behind")
    nibabel.save(image(7, channels), folder / "imagesTs" / "p_07.nii.gz")
    pairs = [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in ("p_00", "p_01")]
    content = DESCRIPTION | {"training": pairs, "test": ["./imagesTs/p_07.nii.gz"]} | changes
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def task_again(raw: RawDataset, folder: Path) -> Path:
    """The way back: a raw dataset as a Decathlon task, by nibabel alone."""
    for case in raw.cases:
        channels = [nibabel.load(path) for path in case.images]
        stored = np.stack([channel.dataobj.get_unscaled() for channel in channels], axis=3)  # type: ignore[union-attr]
        header = channels[0].header.copy()
        header.set_data_shape(stored.shape)
        again = nibabel.Nifti1Image(stored, None, header)
        proxy: Any = channels[0].dataobj
        again.header.set_slope_inter(proxy.slope, proxy.inter)
        target = folder / case.images[0].parent.name / f"{case.id}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(again, target)
    return folder


def converted(source: Path, root: Path, **more: Any) -> RawDataset:
    return convert(ConvertRequest("msd", source, workspace=root, n_workers=1, **more)).raw


def refused(source: Path, root: Path, message: str, **more: Any) -> Sequence[Any]:
    """Converting says so, and nothing has appeared."""
    with pytest.raises(InvalidInput, match=message) as caught:
        converted(source, root, **more)
    assert [path for path in root.rglob("*") if path.is_file()] == []
    return caught.value.problems


def test_there_and_back_the_task_is_the_same(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task05_Prostate")
    raw = converted(task, tmp_path / "w")
    assert raw.folder == tmp_path / "w" / "raw" / "Dataset005_Prostate"
    again = task_again(raw, tmp_path / "again")
    for path in (*task.glob("imagesT*/p*"),):
        before: Any = nibabel.load(path)
        after: Any = nibabel.load(again / path.relative_to(task))
        assert after.header.get_data_dtype() == before.header.get_data_dtype()
        assert np.array_equal(after.dataobj.get_unscaled(), before.dataobj.get_unscaled())
        assert (after.dataobj.slope, after.dataobj.inter) == (before.dataobj.slope, before.dataobj.inter) == (0.5, 10)
        assert after.header.binaryblock == before.header.binaryblock
    for path in task.glob("labelsTr/*"):
        assert (raw.folder / "labelsTr" / path.name).read_bytes() == path.read_bytes()


def test_our_reader_sees_what_the_task_holds(tmp_path: Path) -> None:
    raw = converted(write_task(tmp_path / "Task05_Prostate"), tmp_path / "w")
    assert [(case.id, case.pool, case.label is not None) for case in raw.cases] == [
        ("p_00", "labeled", True),
        ("p_01", "labeled", True),
        ("p_07", "test", False),
    ]
    expected = np.asarray(image(0).dataobj) * 0.5 + 10
    read = read_image(raw.cases[0].images, "native").array
    assert read.dtype == np.float32
    assert np.array_equal(read, expected.transpose(3, 2, 1, 0).astype(np.float32))
    assert np.array_equal(read_label(raw.cases[0].label or Path(), "native")[0].T, np.asarray(label(0).dataobj))
    assert raw.description.channel_names == {0: "T2", 1: "ADC"}
    assert raw.description.labels == {"background": 0, "PZ": 1, "TZ": 2}
    content = json.loads((raw.folder / "dataset.json").read_text())
    assert (content["numTraining"], content["file_ending"], content["licence"]) == (2, ".nii.gz", "CC-BY-SA 4.0")
    assert not (raw.folder / "cases.csv").exists()


def test_one_channel_is_copied_and_uncompressed_files_are_compressed(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task02_Heart", 1, modality={"0": "MRI"})
    plain = task / "imagesTs" / "p_08.nii"
    nibabel.save(image(8, 1), plain)
    content = json.loads((task / "dataset.json").read_text())
    content["test"].append("./imagesTs/p_08.nii")
    (task / "dataset.json").write_text(json.dumps(content))
    raw = converted(task, tmp_path / "w")
    assert (raw.folder / "imagesTr/p_00_0000.nii.gz").read_bytes() == (task / "imagesTr/p_00.nii.gz").read_bytes()
    before, after = nibabel.load(plain), nibabel.load(raw.folder / "imagesTs/p_08_0000.nii.gz")
    assert np.array_equal(np.asarray(before.dataobj), np.asarray(after.dataobj))


def test_test_images_can_join_the_unlabeled_ones(tmp_path: Path) -> None:
    raw = converted(write_task(tmp_path / "Task05_Prostate"), tmp_path / "w", test_as_unlabeled=True)
    assert [case.id for case in raw.unlabeled] == ["p_07"]
    assert raw.unlabeled[0].images[0].parent.name == "imagesUn"
    assert raw.test == ()


def test_names_of_channels_and_labels_can_be_replaced(tmp_path: Path) -> None:
    task = write_task(tmp_path / "t")
    more = {"dataset": "Dataset009_Gland", "channels": ("T2w", "diffusion"), "labels": {"outer": 1, "inner": 2}}
    raw = converted(task, tmp_path / "w", **more)
    assert raw.name == "Dataset009_Gland"
    assert raw.description.channel_names == {0: "T2w", 1: "diffusion"}
    assert raw.description.labels == {"background": 0, "outer": 1, "inner": 2}


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task05_Prostate", labels={"0": "background", "1": "PZ", "2": "PZ"})
    (task / "labelsTr" / "p_01.nii.gz").unlink()
    nibabel.save(image(0, 3), task / "imagesTr" / "p_00.nii.gz")
    (task / "imagesTs" / "p_07.nii.gz").write_bytes(b"\x1f\x8bnothing")
    problems = refused(task, tmp_path / "w", "4 problems", dataset=None)
    text = "\n".join(map(str, problems))
    assert "5 x 4 x 3 x 3 voxels. Expected: 2 channels" in text
    assert "p_01.nii.gz: the file does not exist" in text
    assert "no readable header" in text
    assert "a name of its own for each value" in text


def test_paths_do_not_leave_the_task(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task05_Prostate", test=["../../secret.nii.gz"])
    refused(task, tmp_path / "w", "'../../secret.nii.gz' lies outside")


def test_raw_folders_need_no_converting(tmp_path: Path) -> None:
    raw = converted(write_task(tmp_path / "Task05_Prostate"), tmp_path / "w")
    refused(raw.folder, tmp_path / "other", "needs no converting", dataset="Dataset006_Again")


def test_a_cut_file_leaves_nothing_behind(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task05_Prostate")
    path = task / "imagesTr" / "p_01.nii.gz"
    nibabel.save(image(1).__class__(np.zeros((40, 40, 30, 2), np.int16), AFFINE), path)
    path.write_bytes(path.read_bytes()[:-30])
    refused(task, tmp_path / "w", "cut off or damaged")
    assert list((tmp_path / "w" / "raw").iterdir()) == []


@pytest.mark.parametrize("name", [None, "Dataset5_Prostate", "Prostate", "Dataset005_../../x"])
def test_the_name_must_be_a_whole_one(tmp_path: Path, name: str | None) -> None:
    refused(write_task(tmp_path / "task"), tmp_path / "w", "dataset name", dataset=name)


def test_a_dataset_that_is_there_is_replaced_only_on_request(tmp_path: Path) -> None:
    task, root = write_task(tmp_path / "Task05_Prostate"), tmp_path / "w"
    converted(task, root)
    with pytest.raises(InvalidInput, match="is there already"):
        converted(task, root)
    with pytest.raises(InvalidInput, match="number 005 belongs to Dataset005_Prostate"):
        converted(task, root, dataset="Dataset005_Other")
    raw = converted(task, root, overwrite=True, test_as_unlabeled=True)
    assert len(read_raw_dataset(raw.folder).unlabeled) == 1
    assert [path.name for path in (root / "raw").iterdir()] == ["Dataset005_Prostate"]


def test_options_of_another_layout_are_refused(tmp_path: Path) -> None:
    task = write_task(tmp_path / "Task05_Prostate")
    refused(task, tmp_path / "w", "options of the layout bids", bids=BidsOptions(mask="dseg"))
