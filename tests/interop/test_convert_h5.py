"""h5 files of the semi-supervised literature become raw datasets; their lists become splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from autossl.data.image_io import read_image, read_label
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import RawDataset
from autossl.data.splits import SplitCase, load_or_make_split, read_split, split_cases
from autossl.interop.convert.convert import Converted, convert
from autossl.interop.convert.h5_lists import patient_of
from autossl.interop.convert.published_splits import published_splits
from autossl.interop.convert.source import ConvertRequest, H5Options, PublishedLists

NAME = "Dataset022_Atrium"
SHAPE = (3, 5, 4)
Arrays = dict[str, np.ndarray[Any, Any]]


def arrays(seed: int, shape: tuple[int, ...] = SHAPE, high: int = 3) -> Arrays:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, high, shape).astype(np.uint8)
    label.flat[0] = high - 1
    return {"image": rng.random(shape).astype(np.float32), "label": label}


def write_h5(path: Path, content: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in content.items():
            file.create_dataset(name, data=array, compression="gzip")
    return path


def write_lists(folder: Path, **lists: Sequence[str]) -> None:
    for name, names in lists.items():
        (folder / f"{name}.list").write_text("".join(f"{entry}\n" for entry in names))


def converted(source: Path, **more: Any) -> Converted:
    """Options of h5 files and of the request, by their names."""
    own = {key: more.pop(key) for key in list(more) if key in H5Options.__dataclass_fields__}
    root = source.parent / "workspace"
    return convert(ConvertRequest("h5", source, NAME, root, h5=H5Options(**own), n_workers=1, **more))


def refused(source: Path, message: str, **more: Any) -> str:
    with pytest.raises(InvalidInput, match=message) as caught:
        converted(source, **more)
    assert [path for path in (source.parent / "workspace").rglob("*") if path.is_file()] == []
    return str(caught.value)


def acdc(folder: Path, n_patients: int = 4) -> Path:
    """As SSL4MIS lays ACDC out: volumes [z,y,x] and their slices, lists of both, two frames of each patient."""
    names = [f"patient{n:03d}_frame{f:02d}" for n in range(1, n_patients + 1) for f in (1, 12)]
    slices = []
    for seed, name in enumerate(names):
        content = arrays(seed)
        write_h5(folder / "data" / f"{name}.h5", content)
        for z in range(SHAPE[0]):
            one = {key: array[z] for key, array in content.items()} | {"scribble": content["label"][z]}
            write_h5(folder / "data" / "slices" / f"{name}_slice_{z}.h5", one)
            slices.append(f"{name}_slice_{z}")
    train = [entry for entry in slices if int(entry[7:10]) <= n_patients - 2]
    write_lists(folder, train_slices=train, val=names[-4:-2], test=names[-2:], all_slices=slices)
    return folder


def atrium(folder: Path) -> Path:
    """As UA-MT lays LA out: a folder per case, arrays [x,y,z]."""
    names = ["ZZ9", "AA1", "MM5", "BB2", "QQ7"]
    for seed, name in enumerate(names):
        write_h5(folder / "set" / name / "mri_norm2.h5", arrays(seed, high=2))
    write_lists(folder, train=names[:4], test=names[4:])
    return folder


def h5_again(raw: RawDataset, axes: str) -> dict[str, Arrays]:
    """The way back: case → image and label with the axes of the source."""
    found = {}
    for case in raw.cases:
        image = read_image(case.images).array[0]
        label = read_label(case.label or Path())[0]
        order = ["zyx".index(axis) for axis in axes]
        found[case.id] = {"image": image.transpose(order), "label": label.transpose(order)}
    return found


def same(first: Arrays, second: Arrays) -> bool:
    return all(first[key].dtype == second[key].dtype and np.array_equal(first[key], second[key]) for key in first)


def test_there_and_back_volumes_and_lists_are_the_same(tmp_path: Path) -> None:
    result = converted(atrium(tmp_path / "LA"), axes="xyz", spacing_zyx_mm=(1.25, 0.5, 0.75), labels={"atrium": 1})
    again = h5_again(result.raw, "xyz")
    for seed, name in enumerate(["ZZ9", "AA1", "MM5", "BB2", "QQ7"]):
        assert same(again[name], arrays(seed, high=2))
    assert {case.id for case in result.raw.labeled} == {"ZZ9", "AA1", "MM5", "BB2"}
    assert [(case.id, case.label is not None) for case in result.raw.test] == [("QQ7", True)]
    assert read_image(result.raw.cases[0].images).spacing_zyx_mm == (1.25, 0.5, 0.75)
    assert result.raw.description.labels == {"background": 0, "atrium": 1}
    assert result.splits == ()


def test_slices_stand_for_their_volumes_and_frames_for_their_patient(tmp_path: Path) -> None:
    result = converted(acdc(tmp_path / "ACDC"))
    again = h5_again(result.raw, "zyx")
    assert len(again) == 8
    assert all(same(again[f"patient{n:03d}_frame01"], arrays(2 * n - 2)) for n in range(1, 5))
    assert {case.patient for case in result.raw.cases} == {f"patient{n:03d}" for n in range(1, 5)}
    assert [case.id for case in result.raw.test] == ["patient004_frame01", "patient004_frame12"]
    assert result.raw.description.labels == {"background": 0, "class_1": 1, "class_2": 2}


def test_slices_without_their_volume_are_stacked(tmp_path: Path) -> None:
    source = acdc(tmp_path / "ACDC")
    for path in (source / "data").glob("*.h5"):
        if path.name < "patient003":
            path.unlink()
    again = h5_again(converted(source).raw, "zyx")
    assert same(again["patient001_frame12"], arrays(1))
    (source / "train_slices.list").write_text("patient001_frame01_slice_0\npatient001_frame01_slice_2\n")
    with pytest.raises(InvalidInput, match="slices 1 are not in the list"):
        converted(source, overwrite=True)


def test_channels_get_files_of_their_own(tmp_path: Path) -> None:
    content = arrays(0, (2, *SHAPE)) | {"label": arrays(1)["label"]}
    write_h5(tmp_path / "brats" / "case.h5", content)
    assert "axes zyx" in refused(tmp_path / "brats", r"shape \(2, 3, 5, 4\)")
    raw = converted(tmp_path / "brats", axes="czyx", channels=("FLAIR", "T1")).raw
    assert np.array_equal(read_image(raw.cases[0].images).array, content["image"])
    assert raw.description.channel_names == {0: "FLAIR", 1: "T1"}


def test_flat_images_have_one_slice(tmp_path: Path) -> None:
    write_h5(tmp_path / "flat" / "case.h5", arrays(0, (5, 4)))
    raw = converted(tmp_path / "flat").raw
    assert np.array_equal(read_image(raw.cases[0].images).array, arrays(0, (5, 4))["image"][None, None])


def test_cases_without_a_label_are_unlabeled(tmp_path: Path) -> None:
    source = atrium(tmp_path / "LA")
    write_h5(source / "set" / "AA1" / "mri_norm2.h5", {"image": arrays(1)["image"]})
    (source / "more.txt").write_text("MM5,\n\nset/BB2/mri_norm2.h5\n")
    (source / "train.list").write_text("ZZ9\nAA1\n")
    raw = converted(source, lists={"unlabeled": source / "more.txt"}).raw
    assert [case.id for case in raw.unlabeled] == ["AA1", "BB2", "MM5"]
    assert [case.id for case in raw.labeled] == ["ZZ9"]
    assert not (raw.folder / "labelsUn").exists()


def test_published_lists_become_splits(tmp_path: Path) -> None:
    source = acdc(tmp_path / "ACDC", 6)
    result = converted(source, budgets=(3,))
    folder = source.parent / "workspace" / "preprocessed" / NAME
    cases = split_cases(result.raw)
    default = load_or_make_split(folder, cases)
    train = [f"patient{n:03d}_frame{f:02d}" for n in range(1, 5) for f in (1, 12)]
    assert default.folds[0].validation == ("patient005_frame01", "patient005_frame12")
    assert default.folds[0].labeled == tuple(train)
    assert sorted(case for fold in default.folds for case in fold.validation) == sorted(default.assigned)
    assert default.n_folds == 5
    budget = load_or_make_split(folder, cases, 3)
    assert [path.name for path in result.splits] == ["default.json", "benchmark-3_draw-0.json"]
    assert budget.folds[0].labeled == ("patient001_frame01", "patient001_frame12", "patient002_frame01")
    assert budget.folds[0].validation == default.folds[0].validation
    assert set(budget.folds[0].unlabeled) == set(train) - set(budget.folds[0].labeled)
    assert budget.everything.labeled == budget.folds[0].labeled
    assert all(len(fold.labeled) == 3 for fold in budget.folds)
    assert read_split(folder / "splits" / "benchmark-3_draw-0.json") == budget


def test_without_a_validation_list_only_the_budget_is_published() -> None:
    cases = [SplitCase(f"c{n}", f"c{n}", "labeled") for n in range(10)]
    lists = PublishedLists(tuple(f"c{n}" for n in (7, 3, 9, 0, 1, 2, 4, 5, 6, 8)), budgets=(2, 4))
    default, two, four = published_splits(cases, lists)
    assert default.n_folds == 5
    assert two.drawn["all"] == ("c3", "c7")
    assert set(two.drawn["all"]) < set(four.drawn["all"]) == {"c0", "c3", "c7", "c9"}
    held_out = next(key for key, fold in enumerate(default.folds) if "c7" in fold.validation)
    assert "c7" not in two.drawn[str(held_out)]
    assert published_splits(cases, PublishedLists(("c0",))) == []


def test_splits_that_are_there_stay(tmp_path: Path) -> None:
    source = acdc(tmp_path / "ACDC")
    path = converted(source, budgets=(1,)).splits[1]
    before = path.read_bytes()
    assert converted(source, budgets=(1,), overwrite=True).splits[1].read_bytes() == before
    (source / "train_slices.list").write_text("patient002_frame01_slice_0\npatient001_frame01_slice_0\n")
    with pytest.raises(InvalidInput, match=r"split benchmark-1_draw-0 is there and differs"):
        converted(source, budgets=(1,), overwrite=True)
    assert path.read_bytes() == before


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    source = atrium(tmp_path / "LA")
    (source / "train.list").write_text("ZZ9\nAA1\nMM5\nBB2\nMM6\nQQ7\n")
    text = refused(source, "2 problems")
    assert "MM6: the train list names it, but there is no such file. Expected: one of MM5" in text
    assert "QQ7: it is in the lists train and test" in text
    atrium(source)
    write_h5(source / "set" / "AA1" / "mri_norm2.h5", {"picture": np.zeros(SHAPE)})
    write_h5(source / "set" / "MM5" / "mri_norm2.h5", arrays(0) | {"label": np.zeros((3, 5, 5))})
    (source / "set" / "BB2" / "mri_norm2.h5").write_bytes(b"no h5")
    text = refused(source, "3 problems")
    assert "no array 'image' in the file; it has picture" in text
    assert "image (3, 5, 4) and label (3, 5, 5)" in text
    assert "cannot be opened" in text


def test_labels_are_whole_numbers(tmp_path: Path) -> None:
    write_h5(tmp_path / "set" / "case.h5", arrays(0) | {"label": np.full(SHAPE, 0.5)})
    refused(tmp_path / "set", "fractions")
    refused(tmp_path / "set", "fractions", labels={"organ": 1})
    write_h5(tmp_path / "set" / "case.h5", arrays(0) | {"label": np.full(SHAPE, 300.0)})
    raw = converted(tmp_path / "set", labels={"organ": 300}).raw
    assert np.array_equal(read_label(raw.cases[0].label or Path())[0], np.full(SHAPE, 300))


def test_links_to_other_files_are_not_followed(tmp_path: Path) -> None:
    secret = write_h5(tmp_path / "secret.h5", arrays(0))
    with h5py.File(write_h5(tmp_path / "set" / "case.h5", {"label": arrays(0)["label"]}), "a") as file:
        file["image"] = h5py.ExternalLink(str(secret), "image")
    refused(tmp_path / "set", "no array 'image'")
    raw = tmp_path / "raw.bin"
    raw.write_bytes(arrays(0)["image"].tobytes())
    with h5py.File(write_h5(tmp_path / "set" / "case.h5", {"label": arrays(0)["label"]}), "a") as file:
        file.create_dataset("image", SHAPE, np.float32, external=[(str(raw), 0, h5py.h5f.UNLIMITED)])
    refused(tmp_path / "set", "no array 'image'")


@pytest.mark.parametrize("axes", ["xy z", "zyxx", "abc", "zz"])
def test_axes_are_named_once(tmp_path: Path, axes: str) -> None:
    write_h5(tmp_path / "set" / "case.h5", arrays(0))
    refused(tmp_path / "set", "each of z, y, x once", axes=axes)


def test_a_budget_is_at_most_the_training_list(tmp_path: Path) -> None:
    refused(atrium(tmp_path / "LA"), "9 labeled cases.*at most 4", budgets=(9,))


def test_patients_are_read_out_of_case_ids() -> None:
    assert patient_of("patient007_frame01", None) == "patient007"
    assert patient_of("AA1", None) == "AA1"
    assert patient_of("site2-007-b", r"\d-(\d+)") == "007"
    assert patient_of("site2-007-b", r"site\d-\d+") == "site2-007"
    with pytest.raises(InvalidInput, match="correct --patient"):
        patient_of("x", "(")
