"""Pooling the folds' validation cases, and predicting what is missing of them without training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_model import DATASET, tiny_plans, write_tiny_images, write_tiny_run

from autossl.data.files import write_json
from autossl.data.image_io import read_image, read_label
from autossl.data.labels import LabelSchema
from autossl.data.locks import hold
from autossl.data.probabilities import labels_of, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import FoundRun, find_runs, fold_lock, read_run
from autossl.data.splits import load_or_make_split, split_cases
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.evaluation.out_of_fold import collect, predict_out_of_fold
from autossl.preprocessing.prepare import prepare_case

LABELS = {"background": 0, "organ": 1, "tumor": 5}
SCHEMA = LabelSchema({name: (value,) for name, value in LABELS.items()})
CASES = ["a1", "a2", "b", "c", "d"]
"""Two scans of the patient a."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A raw dataset, preprocessed, and a run of four folds with untrained weights that predicted nothing yet."""
    workspace = Workspace(tmp_path_factory.mktemp("made"))
    raw_folder, preprocessed = workspace.raw / DATASET, workspace.preprocessed / DATASET
    write_tiny_images(raw_folder / "imagesTr", CASES)
    (raw_folder / "labelsTr").mkdir()
    plans = tiny_plans()
    store = CaseStore(preprocessed / "data" / plans.data_hash("3d_fullres"))
    for case in CASES:
        file = raw_folder / "imagesTr" / f"{case}_0000.nii.gz"
        label = sitk.Cast(sitk.ReadImage(str(file)) > 100, sitk.sitkUInt8)
        sitk.WriteImage(label, str(raw_folder / "labelsTr" / f"{case}.nii.gz"))
        store.write(case, prepare_case(read_image([file], "RAS"), None, plans, "3d_fullres"))
    (raw_folder / "cases.csv").write_text("case,patient\na1,a\na2,a\nb,b\nc,c\nd,d\n")
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": 5, "file_ending": ".nii.gz"}
    write_json(raw_folder / "dataset.json", description)
    split = load_or_make_split(preprocessed, split_cases(read_raw_dataset(raw_folder)))
    folds = {str(number): fold for number, fold in enumerate(split.folds)}
    folder = workspace.results_folder(DATASET) / "default" / "3d_fullres__tiny__supervised__seed-0"
    write_tiny_run(folder, list(folds), plans)
    write_json(folder / "run.json", read_run(folder).model_copy(update={"folds": folds}).model_dump(mode="json"))
    return workspace


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(made.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def the_run(workspace: Workspace) -> FoundRun:
    (run,) = find_runs(workspace, DATASET)
    return run


def test_missing_predictions_are_made_and_every_case_is_pooled_once(workspace: Workspace) -> None:
    run = the_run(workspace)
    with pytest.raises(InvalidInput, match="was not predicted when its fold ended") as caught:
        collect(workspace, DATASET, run)
    assert sorted(problem.case or "" for problem in caught.value.problems) == CASES
    told: list[tuple[int, int, str]] = []
    predicted = predict_out_of_fold(run, workspace, "cpu", on_case=lambda *at: told.append(at))
    assert sorted(predicted) == CASES
    assert [at[:2] for at in told] == [(n, 5) for n in range(1, 6)]
    pooled = collect(workspace, DATASET, run)
    assert [case.case for case in pooled] == CASES
    assert [case.patient for case in pooled] == ["a", "a", "b", "c", "d"]
    assert pooled[0].fold == pooled[1].fold
    for case in pooled:
        assert case.case in run.spec.folds[case.fold].validation
        label_map, _, geometry = read_label(case.label_map, "native")
        reference, _, reference_geometry = read_label(case.reference, "native")
        assert geometry.differences(reference_geometry) == []
        assert case.probabilities is not None
        probabilities = read_probabilities(case.probabilities)
        assert probabilities.shape == (3, *reference.shape)
        np.testing.assert_array_equal(labels_of(probabilities, SCHEMA), label_map)
    assert predict_out_of_fold(run, workspace, "cpu") == []


def test_scored_label_maps_stay_and_a_difference_is_told(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    run = the_run(workspace)
    predict_out_of_fold(run, workspace, "cpu")
    first, second, *_ = collect(workspace, DATASET, run)
    image = sitk.ReadImage(str(first.label_map))
    image[0, 0, 0] = 5 if image[0, 0, 0] != 5 else 1
    sitk.WriteImage(image, str(first.label_map))
    before = first.label_map.read_bytes()
    for case in (first, second):
        assert case.probabilities is not None
        case.probabilities.unlink()
    assert collect(workspace, DATASET, run)[0].probabilities is None
    assert sorted(predict_out_of_fold(run, workspace, "cpu")) == ["a1", "a2"]
    assert first.label_map.read_bytes() == before
    assert [record.getMessage()[:12] for record in caplog.records if "today" in record.getMessage()] == ["a1: 1 voxels"]


def test_a_fold_that_another_process_works_on_is_left_alone(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.evaluation.out_of_fold.FOLD_WAIT_S", 0.0)
    run = the_run(workspace)
    with hold(fold_lock(run.folder, "0"), "fold 0"), pytest.raises(InvalidInput, match="fold 0 of"):
        predict_out_of_fold(run, workspace, "cpu")
    assert not (run.folder / "fold_0" / "validation").exists()
    assert sorted(predict_out_of_fold(run, workspace, "cpu")) == CASES


def test_all_that_is_missing_is_named_together(workspace: Workspace) -> None:
    run = the_run(workspace)
    predict_out_of_fold(run, workspace, "cpu")
    fold_of = {case.case: case.fold for case in collect(workspace, DATASET, run)}
    (run.folder / f"fold_{fold_of['b']}" / "checkpoint_final.pth").unlink()
    shutil.rmtree(run.folder / f"fold_{fold_of['c']}")
    (workspace.raw / DATASET / "labelsTr" / "d.nii.gz").unlink()
    with pytest.raises(InvalidInput) as caught:
        collect(workspace, DATASET, run)
    folds, case = caught.value.problems
    states = {fold_of["b"]: "unfinished", fold_of["c"]: "absent"}
    assert folds.found == ", ".join(f"fold {fold} is {states[fold]}" for fold in sorted(states))
    assert (case.case, case.found) == ("d", "has no label any more")


def test_cases_that_are_not_preprocessed_are_named_before_anything_is_predicted(workspace: Workspace) -> None:
    run = the_run(workspace)
    for path in (workspace.preprocessed / DATASET / "data").rglob("b.b2nd"):
        path.unlink()
    with pytest.raises(InvalidInput, match="b: is not preprocessed"):
        predict_out_of_fold(run, workspace, "cpu")
    assert not list(run.folder.rglob("*.b2nd"))
