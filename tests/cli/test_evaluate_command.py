"""autossl_evaluate and autossl_methods from the command line to the printed figures."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from autossl.cli import evaluate, methods
from autossl.data.problems import InvalidInput
from autossl.evaluation.label_schemas import find_label_schema, schema_of_labels
from autossl.trainers.describe import describe_method, describe_methods
from autossl.trainers.registry import METHODS


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name, values in (("predictions", [1, 1, 2, 0]), ("references", [1, 0, 2, 0])):
        (tmp_path / name).mkdir()
        array = np.array(values, dtype=np.uint8).reshape(-1, 1, 1)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name / "a.nii.gz")
    return tmp_path / "predictions", tmp_path / "references"


def arguments(folders: tuple[Path, Path], *more: str) -> list[str]:
    return ["--predictions", str(folders[0]), "--references", str(folders[1]), *more]


def test_labels_on_the_command_line_give_a_table_and_a_summary(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(arguments(folders, "--labels", "organ=1", "core=2")) == 0
    printed = capsys.readouterr().out
    organ = next(line for line in printed.splitlines() if line.strip().startswith("organ"))
    assert organ.split()[1:] == ["0.6667", "0.5000", "1.0000", "0.0010", "1.0000", "0.1847", "1.0000", "0", "0", "0"]
    assert "NSD tolerance in mm: organ 1, core 1; distances between surface_elements" in printed
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["classes"]["core"]["mean"]["dice"] == 1.0
    assert summary["foreground_mean"]["dice"] == pytest.approx(5 / 6)


def test_regions_and_the_named_output(folders: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "elsewhere" / "scores.json"
    options = ["--labels", "whole=1,2", "core=2", "-o", str(output)]
    assert evaluate.main(arguments(folders, *options)) == 0
    assert json.loads(output.read_text())["classes"]["whole"]["mean"]["dice"] == pytest.approx(4 / 5)


def test_tolerances_conventions_and_lesions_are_options(folders: tuple[Path, Path]) -> None:
    options = ["--labels", "organ=1", "core=2", "--tolerance_mm", "organ=0.5", "--surface_convention", "border_voxels"]
    assert evaluate.main(arguments(folders, *options, "--lesions")) == 0
    summary = json.loads((folders[0] / "summary.json").read_text())
    assert summary["surfaces"]["convention"] == "border_voxels"
    organ = summary["classes"]["organ"]["mean"]
    assert organ["nsd"] == pytest.approx(2 / 3)  # of 2 + 1 border voxels one is a voxel away
    assert organ["assd_mm"] == pytest.approx(1 / 3)
    assert organ["lesion_f1"] == 1.0


def test_a_tolerance_that_is_no_number_is_refused(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(arguments(folders, "--labels", "organ=1", "--tolerance_mm", "organ=wide"))
    assert "expected a number of millimeters" in capsys.readouterr().err


def test_the_description_beside_the_references_is_found(folders: tuple[Path, Path], tmp_path: Path) -> None:
    labels = {"background": 0, "organ": 1, "core": 2}
    content = {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz", "numTraining": 1}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert list(find_label_schema(*folders).foreground) == ["organ", "core"]
    assert evaluate.main(arguments(folders)) == 0


def test_without_any_labels_the_command_asks_for_them(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(arguments(folders)) == 2
    captured = capsys.readouterr()
    assert "name the dataset with -d, or the labels with --labels" in captured.err
    assert "Traceback" not in captured.err
    assert not (folders[0] / "summary.json").exists()


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ([("organ", (1,)), ("organ", (2,))], "organ is given twice"),
        ([("ignore", (3,))], "no class besides"),
        ([("organ", (1,)), ("core", (1,))], "share a value"),
        ([("organ", (0,))], "share a value"),
        ([("whole", (1, 2)), ("ignore", (3, 4))], "ignore has several values"),
    ],
)
def test_labels_that_make_no_schema_are_refused(labels: list[tuple[str, tuple[int, ...]]], fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault):
        schema_of_labels(labels)


def test_every_method_is_listed_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)


def test_a_method_is_shown_with_idea_citation_needs_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["mean_teacher"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in ("student must match", "arXiv:1703.01780", "a teacher", "lambda_max = 1.0", "SSL4MIS"):
        assert text in printed


def test_an_unknown_method_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["mean_techer"]) == 2
    assert "one of mean_teacher" in capsys.readouterr().err


def test_descriptions_leave_out_nothing_of_a_setting() -> None:
    for method in describe_methods():
        assert method == describe_method(method.name)
        assert method.title
        assert method.idea
        assert method.citation
        for setting in method.settings:
            assert setting.meaning, (method.name, setting.name)
            assert setting.source, (method.name, setting.name)
