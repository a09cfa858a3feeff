"""Rules between files: found for runs and inference plans, applied to folders, each with its command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from autossl.cli import apply_postprocessing, find_postprocessing
from autossl.data.files import write_json
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import probabilities_file, write_probabilities_quantized
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunFilter, RunSpec
from autossl.data.splits import load_or_make_split, split_cases
from autossl.data.workspace import Workspace
from autossl.evaluation.postprocessing_folder import ApplyRequest, apply_to_folder, find_plan_and_labels
from autossl.evaluation.postprocessing_runs import find_and_write, find_postprocessing_of_plan, pool
from autossl.inference.inference_plan import (
    InferencePlan,
    LabelBudget,
    PlanMember,
    read_inference_plan,
    write_inference_plan,
)
from autossl.inference.postprocess import Rule
from autossl.inference.postprocessing_plan import PostprocessingPlan, read_postprocessing, write_postprocessing

DATASET = "Dataset009_Boxes"
CASES = [f"case{number}" for number in range(10)]
SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})
SHAPE_XYZ = (14, 12, 10)
SHEARED = np.array([[0.0, -0.7, 0.0, 5.0], [0.6, 0.0, 0.02, -3.0], [0.0, 0.0, 2.5, 8.0], [0.0, 0.0, 0.0, 1.0]])
LARGEST = Rule(kind="keep_largest", class_name="organ")


def box() -> npt.NDArray[np.uint8]:
    array = np.zeros(SHAPE_XYZ, dtype=np.uint8)
    array[2:8, 2:8, 2:8] = 1
    array[3, 3, 3] = 2
    return array


def with_island() -> npt.NDArray[np.uint8]:
    array = box()
    array[11:13, 10, 8] = 1
    return array


def save(path: Path, array: npt.NDArray[np.generic]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, SHEARED), path)


def add_run(workspace: Workspace, method: str, probability: float | None = None) -> Path:
    """A run whose folds predicted each case with an island; `probability` of it is saved where it is given."""
    split = load_or_make_split(workspace.preprocessed / DATASET, split_cases(read_raw_dataset(workspace.raw / DATASET)))
    folds = {str(number): fold for number, fold in enumerate(split.folds)}
    numbers = {"configuration": "3d_fullres", "preset": "tiny", "seed": 0, "plans_hash": "x", "total_steps": 1}
    spec = RunSpec(dataset=DATASET, split="default", method=method, folds=folds, **numbers)
    folder = workspace.results / DATASET / "default" / f"3d_fullres__tiny__{method}__seed-0"
    write_json(folder / RUN_FILE, spec.model_dump(mode="json"))
    for key, fold in folds.items():
        for case in fold.validation:
            validation = folder / f"fold_{key}" / "validation"
            save(validation / f"{case}.nii.gz", with_island())
            if probability is not None:
                of_class = np.stack([box() == value for value in (0, 1, 2)]).astype(np.float32)
                island = with_island() != box()
                of_class[:, island] = np.array([[1 - probability], [probability], [0]])
                write_probabilities_quantized(probabilities_file(validation, case), of_class.transpose(0, 3, 2, 1))
        (folder / f"fold_{key}" / CHECKPOINT_FINAL).write_bytes(b"")
    return folder


def add_plan(workspace: Workspace, methods: Sequence[str]) -> Path:
    path = workspace.results / DATASET / "default" / "inference_plan.json"
    names = [f"{DATASET}/default/3d_fullres__tiny__{method}__seed-0" for method in methods]
    plan = InferencePlan(
        dataset=DATASET,
        split="default",
        members=tuple(PlanMember(run=name, folds=tuple("01234")) for name in names),
        combine="single" if len(names) == 1 else "mean_probabilities",
        why="asked for",
        labels=LabelBudget(n_cases=10, n_patients=10),
        written=Written.now(),
    )
    write_inference_plan(path, plan)
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    place = Workspace(tmp_path / "workspace")
    for case in CASES:
        save(place.raw / DATASET / "imagesTr" / f"{case}_0000.nii.gz", np.zeros(SHAPE_XYZ, dtype=np.float32))
        save(place.raw / DATASET / "labelsTr" / f"{case}.nii.gz", box())
    labels = {"background": 0, "organ": 1, "tumor": 2}
    description = {"channel_names": {"0": "MR"}, "labels": labels, "numTraining": 10, "file_ending": ".nii.gz"}
    write_json(place.raw / DATASET / "dataset.json", description)
    return place


def test_rules_of_a_final_model_are_found_and_put_into_its_plan(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    run = add_run(workspace, "supervised")
    plan = add_plan(workspace, ["supervised"])
    assert find_postprocessing.main(["-q", "-d", "9", "--workspace", str(workspace.root), "-np", "1"]) == 0
    printed = capsys.readouterr().out
    assert "keep the largest component of organ" in printed
    found = read_postprocessing(plan.parent / "postprocessing.json")
    assert read_inference_plan(plan).postprocessing == found.rules == (Rule(kind="keep_largest_foreground"),)
    assert found.found_on == {
        "dataset": DATASET,
        "split": "default",
        "runs": [f"{DATASET}/default/{run.name}"],
        "n_cases": 10,
        "n_patients": 10,
    }
    assert found.cases["case3"]["organ"].before == pytest.approx(2 * 215 / (215 + 217))
    assert found.cases["case3"]["organ"].after == 1.0


@pytest.mark.parametrize(("other", "n_rules"), [(0.3, 1), (0.1, 0)])
def test_of_several_runs_the_mean_of_the_probabilities_is_tidied(
    workspace: Workspace, other: float, n_rules: int
) -> None:
    """0.8 and 0.3 make an island, 0.8 and 0.1 none."""
    add_run(workspace, "supervised", 0.8)
    add_run(workspace, "mean_teacher", other)
    found = find_postprocessing_of_plan(workspace, add_plan(workspace, ["supervised", "mean_teacher"]))
    assert len(found.rules) == n_rules
    assert len(found.found_on["runs"]) == 2


def test_what_is_missing_for_an_ensemble_is_named(workspace: Workspace) -> None:
    add_run(workspace, "supervised", 0.8)
    add_run(workspace, "mean_teacher")
    with pytest.raises(InvalidInput, match="no probabilities of 3d_fullres__tiny__mean_teacher__seed-0"):
        find_postprocessing_of_plan(workspace, add_plan(workspace, ["supervised", "mean_teacher"]))
    with pytest.raises(InvalidInput, match="no run"):
        pool(workspace, DATASET, [])


def test_rules_of_a_run_are_written_where_it_is_said(workspace: Workspace, tmp_path: Path) -> None:
    add_run(workspace, "supervised")
    add_run(workspace, "mean_teacher")
    wanted = RunFilter(method="mean_teacher")
    with pytest.raises(InvalidInput, match="no file for the rules"):
        find_and_write(workspace, DATASET, wanted)
    found, path = find_and_write(workspace, DATASET, wanted, tmp_path / "rules.json")
    assert read_postprocessing(path).rules == found.rules != ()
    assert not list(workspace.results.glob("*/*/postprocessing.json"))
    add_plan(workspace, ["supervised"])
    with pytest.raises(InvalidInput, match="-o for the rules of an inference plan"):
        find_and_write(workspace, DATASET, RunFilter(), tmp_path / "rules.json")


def test_a_prediction_on_another_grid_is_named_with_all_others(workspace: Workspace) -> None:
    run = add_run(workspace, "supervised")
    for number in (0, 1):
        moved = next(iter(sorted((run / f"fold_{number}" / "validation").glob("*.nii.gz"))))
        nibabel.save(nibabel.Nifti1Image(with_island(), np.eye(4)), moved)
    with pytest.raises(InvalidInput, match="another grid") as caught:
        find_and_write(workspace, DATASET, RunFilter(method="supervised"), run / "rules.json")
    assert len(caught.value.problems) == 2


# ------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def segmentations(tmp_path: Path) -> Path:
    """Two cases on a sheared grid, one of them with an island; what predicting writes beside."""
    folder = tmp_path / "segmentations"
    save(folder / "a.nii.gz", with_island())
    save(folder / "a_entropy.nii.gz", np.zeros(SHAPE_XYZ, dtype=np.float32))
    save(folder / "b.nii.gz", box().astype(np.int16))
    (folder / "probabilities").mkdir()
    labels = {"background": 0, "organ": 1, "tumor": 2}
    write_json(folder / "dataset.json", {"channel_names": {"0": "MR"}, "labels": labels, "file_ending": ".nii.gz"})
    return folder


def asked(folder: Path, *rules: Rule) -> ApplyRequest:
    return ApplyRequest(folder, folder.parent / "tidied", PostprocessingPlan(rules=rules or (LARGEST,)), SCHEMA)


def test_a_folder_is_tidied_with_geometry_and_types_kept_exactly(segmentations: Path) -> None:
    request = asked(segmentations)
    result = apply_to_folder(request)
    assert result.cases == ("a", "b")
    assert result.changed == {"a": 2}
    names = {path.name for path in request.output.iterdir()}
    assert names == {"a.nii.gz", "b.nii.gz", "dataset.json", "postprocessing.json"}
    for name in ("a.nii.gz", "b.nii.gz"):
        before, after = nibabel.load(segmentations / name), nibabel.load(request.output / name)
        assert before.header.get_data_dtype() == after.header.get_data_dtype()
        assert before.header.binaryblock[40:] == after.header.binaryblock[40:]
        np.testing.assert_array_equal(before.affine, after.affine)
        np.testing.assert_array_equal(np.asarray(after.dataobj), box())
    written = json.loads((request.output / "postprocessing.json").read_text())
    assert written["rules"] == [LARGEST.model_dump()]
    assert written["applied_to"] == str(segmentations)


def test_pictures_are_measured_in_pixels(tmp_path: Path) -> None:
    pixels = np.zeros((12, 15), dtype=np.uint8)
    pixels[2:5, 2:5] = 1
    pixels[8, 8:11] = 1
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pixels).save(tmp_path / "pictures" / "a.png")
    request = asked(tmp_path / "pictures", Rule(kind="min_size_mm3", class_name="organ", value=4))
    assert apply_to_folder(request).changed == {"a": 3}
    assert np.asarray(Image.open(request.output / "a.png")).sum() == 9


def test_the_command_finds_rules_and_labels_by_the_dataset(
    workspace: Workspace, segmentations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = workspace.results / DATASET / "default" / "postprocessing.json"
    write_postprocessing(rules, PostprocessingPlan(rules=(LARGEST,)))
    output = segmentations.parent / "out"
    place = ["-np", "1", "--workspace", str(workspace.root)]
    arguments = ["-q", "-i", str(segmentations), "-o", str(output), "-d", "Boxes", *place]
    assert apply_postprocessing.main(arguments) == 0
    assert f"1 of 2 label maps changed: {output}" in capsys.readouterr().out
    assert apply_postprocessing.main(arguments) == 2
    assert "results of 2 cases are there: a.nii.gz, b.nii.gz" in capsys.readouterr().err
    assert apply_postprocessing.main([*arguments, "--overwrite"]) == 0
    write_postprocessing(rules.parents[1] / "other" / rules.name, PostprocessingPlan(rules=()))
    assert apply_postprocessing.main([*arguments, "--overwrite"]) == 2
    assert "2 postprocessing.json" in capsys.readouterr().err


def test_the_labels_come_from_the_folder_or_from_the_rules(segmentations: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    write_postprocessing(rules, PostprocessingPlan(rules=(LARGEST,), labels={"background": (0,), "organ": (2,)}))
    assert find_plan_and_labels(segmentations, rules)[1] == SCHEMA
    (segmentations / "dataset.json").unlink()
    assert find_plan_and_labels(segmentations, rules)[1].foreground == {"organ": (2,)}
    write_postprocessing(rules, PostprocessingPlan(rules=(LARGEST,)))
    with pytest.raises(InvalidInput, match="nothing says what the label values mean"):
        find_plan_and_labels(segmentations, rules)
    with pytest.raises(InvalidInput, match="nothing says which rules"):
        find_plan_and_labels(segmentations)


def test_nothing_is_written_where_the_request_makes_no_sense(segmentations: Path) -> None:
    wrong = asked(segmentations, Rule(kind="keep_largest", class_name="liver"), LARGEST)
    with pytest.raises(InvalidInput, match="no class 'liver'"):
        apply_to_folder(wrong)
    assert not wrong.output.exists()
    same = ApplyRequest(segmentations, segmentations, wrong.plan, SCHEMA, overwrite=True)
    with pytest.raises(InvalidInput, match=r"two folders(?s:.*)no class 'liver'"):
        apply_to_folder(same)


def test_cases_that_cannot_be_tidied_are_named_and_the_others_are_done(segmentations: Path) -> None:
    save(segmentations / "c.nii.gz", np.full(SHAPE_XYZ, 7, dtype=np.uint8))
    (segmentations / "d.nii.gz").write_bytes(b"cut off")
    request = asked(segmentations)
    with pytest.raises(InvalidInput, match=r"2 of 4(?s:.*)case c(?s:.*)label values \[7\](?s:.*)case d"):
        apply_to_folder(request)
    assert sorted(path.name for path in request.output.glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
