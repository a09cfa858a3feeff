"""The fingerprint of small datasets on disk: pools, pooled figures, reuse, and all problems at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest

from autossl.data.hashes import DuplicatePair
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import read_raw_dataset
from autossl.planners import case_scan, fingerprint, foreground
from autossl.planners.fingerprint import (
    Fingerprint,
    ScanOptions,
    extract_fingerprint,
    foreground_intensities,
    previous_fingerprint,
    read_fingerprint,
    write_fingerprint,
)

DESCRIPTION = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii"}
FOLDERS = {"labeled": "imagesTr", "unlabeled": "imagesUn", "test": "imagesTs"}


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "DRAWS_IN_ALL", 4000)


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.eye(4)), path)


def _image(seed: int) -> npt.NDArray[np.int16]:
    return np.random.default_rng(seed).integers(-100, 300, size=(6, 7, 8)).astype(np.int16)


def _label(value: int = 1) -> npt.NDArray[np.uint8]:
    label = np.zeros((6, 7, 8), np.uint8)
    label[1:5, 2:6, 2:7] = value
    return label


def _add(root: Path, case: str, seed: int, pool: str = "labeled", value: int = 1) -> None:
    _save(root / FOLDERS[pool] / f"{case}_0000.nii", _image(seed))
    if pool == "labeled":
        _save(root / "labelsTr" / f"{case}.nii", _label(value))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "raw" / "Dataset001_Small"
    for number, (case, pool) in enumerate([("l1", "labeled"), ("l2", "labeled"), ("u1", "unlabeled"), ("t1", "test")]):
        _add(folder, case, number, pool)
    (folder / "dataset.json").write_text(json.dumps(DESCRIPTION))
    return folder


def _scan(
    root: Path,
    previous: Fingerprint | None = None,
    *,
    scanned: list[str] | None = None,
    verify: bool = False,
    n_workers: int = 1,
    **options: object,
) -> Fingerprint:
    def on_case(case: str, done: int, total: int) -> None:
        assert 1 <= done <= total
        if scanned is not None:
            scanned.append(case)

    chosen = ScanOptions(folder=root.parents[1] / "preprocessed" / root.name, on_case=on_case, **options)  # type: ignore[arg-type]
    return extract_fingerprint(read_raw_dataset(root), "RAS", n_workers, verify, previous, chosen)


def _read_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that are read from now on."""
    read: list[str] = []
    original = case_scan.read_image

    def spy(files: tuple[Path, ...], orientation: object) -> object:
        read.append(files[0].name.split("_")[0])
        return original(files, orientation)  # type: ignore[arg-type]

    monkeypatch.setattr(case_scan, "read_image", spy)
    return read


def test_pools_are_kept_apart_and_only_labeled_cases_are_pooled(root: Path) -> None:
    found = _scan(root)
    assert {name: case.pool for name, case in found.cases.items()} == {
        "l1": "labeled",
        "l2": "labeled",
        "u1": "unlabeled",
        "t1": "test",
    }
    assert list(found.of_pool("unlabeled")) == ["u1"]
    mask = _label() > 0
    pooled = np.concatenate(
        [np.random.RandomState(1234).choice(_image(i)[mask].astype(np.float32), 2000) for i in (0, 1)]
    )
    properties = found.foreground_intensity_properties_per_channel["0"]
    assert properties.percentile_99_5 == np.percentile(pooled, 99.5)
    assert properties.mean == pytest.approx(pooled.mean(dtype=np.float64))
    assert found.median_relative_size_after_cropping == 1.0
    assert found.duplicates == ()


def test_what_a_killed_scan_left_is_removed(root: Path, tmp_path: Path) -> None:
    left, other = (
        tmp_path / "preprocessed" / f".partial-scan-{name}-x" for name in (root.name, "Dataset002_Elsewhere")
    )
    for folder in (left, other):
        (folder / "foreground").mkdir(parents=True)
    _scan(root)
    assert not left.exists()
    assert other.exists()


def test_workers_give_the_same_fingerprint_as_this_process(root: Path) -> None:
    assert _scan(root, n_workers=2) == _scan(root)


def test_a_fingerprint_comes_back_from_its_file(root: Path, tmp_path: Path) -> None:
    found = _scan(root, remap_labels={7: 1})
    write_fingerprint(tmp_path / "fingerprint.json", found)
    assert read_fingerprint(tmp_path / "fingerprint.json") == found
    assert previous_fingerprint(tmp_path / "fingerprint.json") == found


def test_a_foreign_file_is_refused_with_the_command_and_counts_as_no_previous_one(tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text('{"version": 0}')
    with pytest.raises(InvalidInput, match=r"dataset_name.*autossl_plan_and_preprocess"):
        read_fingerprint(tmp_path / "fingerprint.json")
    assert previous_fingerprint(tmp_path / "fingerprint.json") is None
    assert previous_fingerprint(tmp_path / "missing.json") is None


def test_unchanged_cases_are_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _scan(root)
    read = _read_files(monkeypatch)
    assert _scan(root, first) == first
    assert read == []
    _add(root, "u2", 9, "unlabeled")
    grown = _scan(root, first)
    assert read == ["u2"]
    assert grown.cases["l1"] == first.cases["l1"]
    assert grown.foreground_intensity_properties_per_channel == first.foreground_intensity_properties_per_channel
    _scan(root, grown, verify=True)
    assert sorted(read) == sorted(["u2", "l1", "l2", "u1", "u2", "t1"])


def test_a_new_labeled_case_changes_the_pooled_figures_as_a_new_scan_would(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _scan(root)
    _add(root, "l0", 8)
    read = _read_files(monkeypatch)
    grown = _scan(root, first)
    assert read == ["l0"]
    assert grown == _scan(root, verify=True)
    assert grown != first
    (root / "labelsTr" / "l1.nii").unlink()  # l1 is unlabeled now
    read.clear()
    shrunk = _scan(root, grown)
    assert read == ["l1"]
    assert shrunk == _scan(root)
    assert not (root.parents[1] / "preprocessed" / root.name / "foreground" / "l1.b2nd").exists()


def test_a_changed_label_changes_the_pooled_figures_as_a_new_scan_would(root: Path) -> None:
    first = _scan(root)
    label = _label()
    label[1:5, 2:6, 2:5] = 0
    _save(root / "labelsTr" / "l1.nii", label)
    changed = _scan(root, first)
    assert changed == _scan(root)
    assert changed.foreground_intensity_properties_per_channel != first.foreground_intensity_properties_per_channel


def test_large_cases_whose_intensities_were_not_kept_are_read_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "dataset.json").write_text(json.dumps(DESCRIPTION | {"channel_names": {"0": "MR"}}))
    monkeypatch.setattr(case_scan, "MAX_KEPT_VALUES", 10)
    first = _scan(root)
    assert not (root.parents[1] / "preprocessed").exists()
    _add(root, "l0", 8)
    read = _read_files(monkeypatch)
    grown = _scan(root, first)
    assert read == ["l0", "l1", "l2"]
    assert grown == _scan(root)


def test_a_damaged_kept_file_is_made_anew(root: Path) -> None:
    first = _scan(root)
    kept = root.parents[1] / "preprocessed" / root.name / "foreground" / "l1.b2nd"
    kept.write_bytes(b"damaged")
    _add(root, "l0", 8)
    assert _scan(root, first) == _scan(root)
    assert foreground_intensities(kept.parents[1], ["l1"])["0"].max <= 300


def test_changed_files_labels_and_mappings_are_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _scan(root)
    read = _read_files(monkeypatch)
    os.utime(root / "imagesUn" / "u1_0000.nii", (1, 1))
    _scan(root, first)
    assert read == ["u1"]
    read.clear()
    _scan(root, first, remap_labels={5: 1})
    assert len(read) == 4


def test_a_mapping_is_recorded_and_kept_until_another_is_given(root: Path) -> None:
    _save(root / "labelsTr" / "l1.nii", _label(9))
    with pytest.raises(InvalidInput, match=r"case l1.*undeclared label values: 9 .*--remap_labels 9=NEW"):
        _scan(root)
    mapped = _scan(root, remap_labels={9: 1})
    assert mapped.remap_labels == {9: 1}
    assert mapped.cases["l1"].class_voxels == {"a": 80}
    assert _scan(root, mapped) == mapped
    with pytest.raises(InvalidInput, match="undeclared"):
        _scan(root, mapped, remap_labels={})


def test_all_problems_are_listed_together_and_nothing_is_written(root: Path) -> None:
    _save(root / "labelsTr" / "l1.nii", _label(3))
    (root / "imagesUn" / "u1_0000.nii").write_bytes(b"")
    _save(root / "imagesTs" / "t1_0000.nii", np.full((6, 7, 8), 4, np.int16))
    (root / "dataset.json").write_text(json.dumps(DESCRIPTION | {"labels": {"background": 0, "a": 1, "b": 4}}))
    before = sorted(root.parents[1].rglob("*"))
    with pytest.raises(InvalidInput) as caught:
        _scan(root, known_problems=[Problem("a missing channel", "two", "add it", case="x")], n_workers=2)
    text = str(caught.value)
    assert text.startswith("Dataset001_Small has 5 problems in 4 cases; nothing was written:")
    for part in ("a missing channel", "gaps in the label numbers", "values: 3 (80", "is empty", "every voxel is 4"):
        assert part in text
    assert sorted(root.parents[1].rglob("*")) == before


def test_copies_in_other_pools_are_found_and_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(root / "imagesTs" / "t1_0000.nii", _image(0))
    _save(root / "imagesUn" / "u1_0000.nii", _image(1)[:, ::-1] * 2 + 5)
    with caplog.at_level("WARNING"):
        found = _scan(root)
    assert found.duplicates == (
        DuplicatePair("l1", "t1", "identical", 1.0),
        DuplicatePair("l2", "u1", "similar", 1.0),
    )
    assert "l1 (labeled) and t1 (test) have the same voxels" in caplog.text
    assert "l2 (labeled) and u1 (unlabeled) look the same" in caplog.text


def test_differing_pools_are_noted_and_warnings_logged_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    _save(root / "imagesUn" / "u1_0000.nii", np.tile(_image(2), (2, 1, 1)))
    for case in ("l1", "l2"):
        _save(root / "labelsTr" / f"{case}.nii", _label().astype(np.float32))
    with caplog.at_level("WARNING"):
        found = _scan(root)
    (note,) = found.domain_shift
    assert note.startswith("size along z: median 6 mm labeled, 12 mm unlabeled")
    assert note in caplog.text
    assert "2 cases (l1, l2): labels stored as float32" in caplog.text


def test_the_module_offers_what_others_import() -> None:
    assert all(hasattr(fingerprint, name) for name in fingerprint.__all__)
