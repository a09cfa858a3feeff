"""BIDS datasets with masks in a derivative become raw datasets; sessions are cases, subjects patients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from autossl.data.image_io import read_image, read_label
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import RawDataset
from autossl.interop.convert.bids_names import Selector
from autossl.interop.convert.convert import convert
from autossl.interop.convert.source import BidsOptions, ConvertRequest

SHAPE = (4, 5, 3)
AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])
NAME = "Dataset021_Lesions"
Files = dict[str, np.ndarray[Any, Any]]


def scan(seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 900, SHAPE).astype(np.int16)


def mask(seed: int, high: int = 2) -> np.ndarray[Any, Any]:
    return np.random.default_rng(100 + seed).integers(0, high, SHAPE).astype(np.uint8)


def images() -> Files:
    """Two sessions of one subject, one of another; the last has no mask."""
    return {
        "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz": scan(0),
        "sub-01/ses-a/anat/sub-01_ses-a_acq-post_T1w.nii": scan(1),
        "sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz": scan(2),
        "sub-01/ses-b/anat/sub-01_ses-b_acq-post_T1w.nii.gz": scan(3),
        "sub-02/ses-a/anat/sub-02_ses-a_T1w.nii.gz": scan(4),
        "sub-02/ses-a/anat/sub-02_ses-a_acq-post_T1w.nii.gz": scan(5),
    }


def lesions() -> Files:
    return {
        "derivatives/manual/sub-01/ses-a/anat/sub-01_ses-a_desc-lesion_mask.nii.gz": mask(0),
        "derivatives/manual/sub-01/ses-b/anat/sub-01_ses-b_desc-lesion_mask.nii": mask(1),
    }


def write_bids(folder: Path, files: Mapping[str, np.ndarray[Any, Any]], texts: Mapping[str, str] | None = None) -> Path:
    for name, voxels in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), folder / name)
    for name, text in (texts or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def converted(source: Path, channels: tuple[str, ...] = ("T1w", "acq-post_T1w"), **more: Any) -> RawDataset:
    options = BidsOptions(**{key: more.pop(key) for key in ("masks", "mask", "skip_incomplete") if key in more})
    root = source.parent / "workspace"
    return convert(ConvertRequest("bids", source, NAME, root, channels=channels, bids=options, n_workers=1, **more)).raw


def refused(source: Path, message: str, channels: tuple[str, ...] = ("T1w", "acq-post_T1w"), **more: Any) -> str:
    with pytest.raises(InvalidInput, match=message) as caught:
        converted(source, channels, **more)
    assert list((source.parent / "workspace").rglob("*.nii.gz")) == []
    return str(caught.value)


def bids_again(raw: RawDataset) -> Files:
    """The way back: file names of BIDS and the stored voxels."""
    found: Files = {}
    for case in raw.cases:
        subject, session = case.id.split("_")
        for channel, path in zip(("T1w", "acq-post_T1w"), case.images, strict=True):
            found[f"{subject}/{session}/anat/{case.id}_{channel}"] = np.asarray(nibabel.load(path).dataobj)  # type: ignore[attr-defined]
        if case.label is not None:
            stored = np.asarray(nibabel.load(case.label).dataobj)  # type: ignore[attr-defined]
            found[f"derivatives/manual/{subject}/{session}/anat/{case.id}_desc-lesion_mask"] = stored
    return found


def test_there_and_back_the_files_are_the_same(tmp_path: Path) -> None:
    files = images() | lesions()
    raw = converted(write_bids(tmp_path / "bids", files))
    again = bids_again(raw)
    assert set(again) == {name.removesuffix(".gz").removesuffix(".nii") for name in files}
    for name, voxels in files.items():
        back = again[name.removesuffix(".gz").removesuffix(".nii")]
        assert back.dtype == voxels.dtype
        assert np.array_equal(back, voxels)
    assert all(np.array_equal(nibabel.load(path).affine, AFFINE) for path in raw.folder.rglob("*.nii.gz"))  # type: ignore[attr-defined]


def test_sessions_are_cases_and_subjects_patients(tmp_path: Path) -> None:
    people = "participant_id\tage\tsite\nsub-01\t44\tA\nsub-02\tn/a\tB, C\n"
    texts = {
        "participants.tsv": people,
        "dataset_description.json": '{"Name": "Lesions", "License": "CC0", "BIDSVersion": "1.8.0"}',
    }
    raw = converted(write_bids(tmp_path / "bids", images() | lesions(), texts))
    assert [(case.id, case.pool, case.patient) for case in raw.cases] == [
        ("sub-01_ses-a", "labeled", "sub-01"),
        ("sub-01_ses-b", "labeled", "sub-01"),
        ("sub-02_ses-a", "unlabeled", "sub-02"),
    ]
    assert raw.cases[0].attributes == {"age": "44", "session": "a", "site": "A"}
    assert raw.cases[2].attributes == {"age": "", "session": "a", "site": "B, C"}
    assert raw.description.channel_names == {0: "T1w", 1: "acq-post_T1w"}
    assert raw.description.labels == {"background": 0, "lesion": 1}
    read = read_image(raw.cases[0].images, "native").array
    assert np.array_equal(read, np.stack([scan(0).T, scan(1).T]).astype(np.float32))


def test_masks_of_several_classes_become_one_label_map(tmp_path: Path) -> None:
    values = mask(0, 4)
    masks = {
        f"derivatives/seg/sub-1/anat/sub-1_label-{name}_mask.nii.gz": (values == value).astype(np.uint8) * 255
        for name, value in {"GM": 1, "WM": 3, "brain": 2}.items()
    }
    source = write_bids(tmp_path / "bids", {"sub-1/anat/sub-1_T1w.nii.gz": scan(0)} | masks)
    assert "--label GM=1" in refused(source, "masks of 3 classes: GM, WM, brain", ())
    raw = converted(source, (), labels={"GM": 1, "WM": 3})
    found = read_label(raw.cases[0].label or Path(), "native")[0]
    assert np.array_equal(found.T, np.where(values == 2, 0, values))
    assert raw.description.labels == {"background": 0, "GM": 1, "WM": 3}


def test_discrete_segmentations_take_their_names_from_the_table(tmp_path: Path) -> None:
    values = mask(0, 3) * 2
    files = {
        "sub-1/anat/sub-1_T2w.nii.gz": scan(0),
        "derivatives/seg/sub-1/anat/sub-1_dseg.nii.gz": values,
        "derivatives/seg/sub-1/anat/sub-1_desc-brain_mask.nii.gz": mask(0),
    }
    table = {"derivatives/seg/dseg.tsv": "index\tname\n0\tnothing\n4\tcore\n2\tedema\n"}
    source = write_bids(tmp_path / "bids", files, table)
    refused(source, "masks of both kinds", ())
    raw = converted(source, (), mask="dseg")
    assert raw.description.labels == {"background": 0, "edema": 2, "core": 4}
    assert raw.description.channel_names == {0: "T2w"}
    assert np.array_equal(read_label(raw.cases[0].label or Path(), "native")[0].T, values)
    (source / "derivatives/seg/dseg.tsv").unlink()
    with pytest.raises(InvalidInput, match="no different tables|NAME=VALUE"):
        converted(source, (), mask="dseg", overwrite=True)


def test_masks_that_overlap_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    one = np.ones(SHAPE, np.uint8)
    masks = {f"derivatives/seg/sub-1/sub-1_label-{name}_mask.nii.gz": one for name in ("whole", "part")}
    source = write_bids(tmp_path / "bids", {"sub-1/sub-1_T1w.nii.gz": scan(0)} | masks)
    refused(source, "60 voxels belong to another class too", (), labels={"whole": 1, "part": 2})
    masks = {"derivatives/seg/sub-1/sub-1_label-whole_mask.nii.gz": mask(0, 3)}
    refused(write_bids(source, masks), "a mask with the values 1, 2", (), labels={"whole": 1}, mask="label-whole_mask")


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    files = images() | lesions()
    del files["sub-01/ses-a/anat/sub-01_ses-a_acq-post_T1w.nii"]
    files["sub-01/ses-b/anat/sub-01_ses-b_acq-post_run-1_T1w.nii.gz"] = scan(0)
    files["sub-01/ses-b/anat/sub-01_ses-b_acq-post_run-2_T1w.nii.gz"] = scan(0)
    del files["sub-01/ses-b/anat/sub-01_ses-b_acq-post_T1w.nii.gz"]
    files["sub-02/ses-a/anat/sub-02_ses-a_acq-post_T1w.nii.gz"] = scan(0)[:, :, :2]
    files["derivatives/manual/sub-03/sub-03_desc-lesion_mask.nii.gz"] = mask(0)
    text = refused(write_bids(tmp_path / "bids", files), "4 problems")
    assert "sub-01_ses-a: no acq-post_T1w. Expected: every channel in every session" in text
    assert "sub-01_ses-b: 2 files fit acq-post_T1w" in text
    assert "not on the grid of sub-02_ses-a_T1w.nii.gz: size (4, 5, 3) against (4, 5, 2)" in text
    assert "case sub-03" in text
    assert "masks without an image" in text


def test_incomplete_sessions_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = images() | lesions()
    del files["sub-01/ses-a/anat/sub-01_ses-a_acq-post_T1w.nii"]
    raw = converted(write_bids(tmp_path / "bids", files), skip_incomplete=True)
    assert [case.id for case in raw.cases] == ["sub-01_ses-b", "sub-02_ses-a"]
    assert "1 sessions lack a channel and are left out: sub-01_ses-a" in caplog.text


def test_what_is_not_clear_is_asked(tmp_path: Path) -> None:
    source = write_bids(
        tmp_path / "bids", images() | lesions() | {"sub-01/ses-a/anat/sub-01_ses-a_FLAIR.nii.gz": scan(0)}
    )
    refused(source, "images of several kinds: FLAIR, T1w", ())
    refused(source, "no mask that fits desc-tumor_mask", mask="desc-tumor_mask")
    refused(source, "no mask is named tumor", labels={"tumor": 1})
    write_bids(source, {"derivatives/model/sub-01/ses-a/anat/sub-01_ses-a_desc-lesion_mask.nii.gz": mask(0)})
    refused(source, "masks in several derivatives: manual, model")
    assert len(converted(source, masks=source / "derivatives" / "manual").labeled) == 2


def test_selectors_are_suffix_and_entities() -> None:
    assert str(Selector.parse("acq-post_run-1_T1w")) == "acq-post_run-1_T1w"
    with pytest.raises(InvalidInput, match="'T1w_acq-post' names no BIDS files"):
        Selector.parse("T1w_acq-post")
