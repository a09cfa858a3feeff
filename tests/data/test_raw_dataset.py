"""Raw datasets: pools, channels, patients, and all problems in one message."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import DatasetDescription, case_files, read_description, read_raw_dataset

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A dataset folder of empty files; reading it looks at names only."""

    def _make(*names: str, **changes: Any) -> Path:
        folder = tmp_path / "Dataset007_Toy"
        description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1}, "file_ending": ".nii.gz"}
        folder.mkdir()
        (folder / "imagesTr").mkdir()
        (folder / "dataset.json").write_text(json.dumps(description | changes))
        for name in names:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return folder

    return _make


def problems_of(folder: Path) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        read_raw_dataset(folder)
    return [str(problem) for problem in caught.value.problems]


def test_pools_patients_and_attributes(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(
        "imagesTr/b_0000.nii.gz",
        "imagesTr/a_0000.nii.gz",
        "imagesTr/c.nii.gz",
        "labelsTr/a.nii.gz",
        "labelsTr/b.nii.gz",
        "imagesUn/u_0000.nii.gz",
        "imagesTs/t_0000.nii.gz",
        "labelsTs/t.nii.gz",
        "imagesTr/notes.txt",
        "imagesTr/.hidden.nii.gz",
    )
    (folder / "cases.csv").write_text("case;patient;site\na;P1;north\nb;P1;south\nu;;\n")
    with caplog.at_level(logging.WARNING):
        raw = read_raw_dataset(folder)
    assert [case.id for case in raw.labeled] == ["a", "b"]
    assert [case.id for case in raw.unlabeled] == ["c", "u"]
    assert [case.id for case in raw.without_label_file] == ["c"]
    assert [(case.id, case.label) for case in raw.test] == [("t", folder / "labelsTs/t.nii.gz")]
    assert [case.patient for case in raw.cases] == ["P1", "P1", "c", "u", "t"]
    assert raw.labeled[0].attributes == {"site": "north"}
    assert raw.labeled[0].images == (folder / "imagesTr/a_0000.nii.gz",)
    assert "1 cases in imagesTr have no label file and count as unlabeled: c" in caplog.text
    assert "2 cases have no row in cases.csv and count as patients of their own: c, t" in caplog.text


def test_no_dataset_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInput, match=r"no dataset: dataset.json and imagesTr missing. Expected: dataset.json, im"
    ):
        read_raw_dataset(tmp_path)
    with pytest.raises(InvalidInput, match="the folder does not exist"):
        read_raw_dataset(tmp_path / "nowhere")


def test_all_problems_come_together(make: Make) -> None:
    folder = make(
        "imagesTr/a_0000.nii.gz",  # channel 1 is missing
        "imagesTr/b_0000.nii.gz",
        "imagesTr/b_0001.nii.gz",
        "imagesTr/b_0002.nii.gz",  # surplus
        "imagesTr/c_0000.nrrd",  # ending
        "imagesTr/d.nii.gz",  # no channel
        "imagesTr/site1/e_0000.nii.gz",  # folder
        "imagesTr/f\\g_0000.nii.gz",  # separator
        "imagesTr/f\\g_0001.nii.gz",
        "imagesTr/h_0000.nii.gz",
        "imagesTr/h_0001.nii.gz",
        "imagesTs/H_0000.nii.gz",  # twice
        "imagesTs/H_0001.nii.gz",
        "labelsTr/a.nii.gz",
        "labelsTr/x.nii.gz",  # no image
        channel_names={"0": "T1", "1": "T2"},
    )
    found = problems_of(folder)
    for expected in (
        "case a.*channels missing 0001",
        "case b.*channels surplus 0002",
        r"mixed file endings: c_0000.nrrd. Expected: only .nii.gz",
        r"d.nii.gz: no channel number.*CASE_0000.nii.gz to CASE_0001.nii.gz",
        "site1: a folder among the images",
        "holds a path separator",
        "case H.*occurs twice, in imagesTr and imagesTs",
        r"case x.*a label without an image. Expected: imagesTr/x_0000.nii.gz",
    ):
        assert any(re.search(expected, problem) for problem in found), expected
    assert len([p for p in found if "case a" in p]) == 1, "its label is not said to lack an image as well"


def test_channel_numbers_may_be_left_out(make: Make) -> None:
    folder = make("imagesTr/p_0001.nii.gz", "imagesTr/p_0002.nii.gz", "labelsTr/p_0001.nii.gz")
    raw = read_raw_dataset(folder)
    assert ([case.id for case in raw.labeled], [case.id for case in raw.unlabeled]) == (["p_0001"], ["p_0002"])


def test_numbers_from_zero_are_ambiguous_unless_labels_decide(make: Make) -> None:
    folder = make("imagesTr/p_0000.nii.gz", "imagesTr/p_0001.nii.gz")
    (problem,) = problems_of(folder)
    assert "channels surplus 0001" in problem
    assert "name the file p_0000_0000.nii.gz" in problem
    (folder / "labelsTr").mkdir()
    (folder / "labelsTr/p_0000.nii.gz").touch()
    assert [case.id for case in read_raw_dataset(folder).cases] == ["p_0000", "p_0001"]


def test_color_pictures_hold_three_channels(make: Make) -> None:
    rgb = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    folder = make("imagesTr/a_0000.png", "imagesTr/b.png", "labelsTr/a.png", "imagesUn/c_0000.png", **rgb)
    assert [len(case.images) for case in read_raw_dataset(folder).cases] == [1, 1, 1]


def test_no_label_at_all(make: Make) -> None:
    assert "no labeled case" in problems_of(make("imagesTr/a_0000.nii.gz"))[0]


def test_cases_csv_with_a_wrong_name(make: Make) -> None:
    folder = make("imagesTr/a1_0000.nii.gz", "labelsTr/a1.nii.gz")
    (folder / "cases.csv").write_text("case,patient\nal,P\nb/c,P\n")
    found = problems_of(folder)
    assert any(
        "a row for 'al', but there is no such case. Expected: one of the cases without a row: a1" in p for p in found
    )
    assert any("line 3: the case id 'b/c' holds a path separator" in p for p in found)
    (folder / "cases.csv").write_text("id,patient\na1,P\n")
    assert "the first line is 'id,patient'" in problems_of(folder)[0]
    (folder / "cases.csv").write_text("case,patient\na1,P\na1,Q\n")
    assert "case 'a1' has two rows" in problems_of(folder)[0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": {"0": "background", "1": "a"}}, r"expected names to numbers: \{'background': 0, 'a': 1\}"),
        ({"labels": {"a": 1}}, '"background" is missing or not 0'),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "two names share a value"),
        ({"labels": {"background": 0, "a": 2, "ignore": 1}}, '"ignore" must be one value, higher than all others'),
        ({"labels": {"background": 0, "a": [1, 2]}}, "regions_class_order: missing"),
        ({"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1, 2]}, "2 values for the 1 regions"),
        ({"channel_names": {"0": "a", "2": "b"}}, r"channels are numbered \[0, 2\], expected 0 to 1"),
        ({"file_ending": ".jpg"}, "'.jpg' cannot be read"),
        ({"channel_groups": {"T1": [1]}}, "'T1' names channel 1, there are 0 to 0"),
    ],
)
def test_faults_in_dataset_json(make: Make, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        read_description(make(**change))


def test_regions_and_unknown_keys_are_kept(make: Make) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    description = read_description(make(labels=labels, regions_class_order=[1, 2], license="CC0"))
    schema = description.label_schema()
    assert schema.foreground == {"whole": (1, 2), "core": (2,)}
    assert (schema.has_regions, schema.ignore_label, schema.n_outputs) == (True, 3, 2)
    assert description.to_json()["license"] == "CC0"
    assert DatasetDescription.model_validate(description.to_json()) == description


def test_case_files_of_a_folder_to_predict(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"no file ends with .nii.gz. Expected: images named CASE_0000.nii.gz"):
        case_files(tmp_path, ".nii.gz", 1)
    for name in ("b_0000.nii.gz", "b_0001.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz"):
        (tmp_path / name).touch()
    found = case_files(tmp_path, ".nii.gz", 2)
    assert {case: [path.name for path in paths] for case, paths in found.items()} == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }
    with pytest.raises(InvalidInput, match=r"case a, .*channels surplus 0001. Expected: 1 channels"):
        case_files(tmp_path, ".nii.gz", 1)
