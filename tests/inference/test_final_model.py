"""Inference plans: their file, who uses them, and several runs that predict together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_model import DATASET, tiny_plans, write_tiny_images, write_tiny_run

from autossl.data.files import content_hash
from autossl.data.image_io import read_label
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import labels_of, mean_of, probabilities_file, quantize, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.runs import RunFilter
from autossl.data.workspace import Workspace
from autossl.inference.final_model import combine
from autossl.inference.inference_plan import (
    InferencePlan,
    LabelBudget,
    PlanMember,
    inference_plan_path,
    read_inference_plan,
    set_postprocessing,
    write_inference_plan,
)
from autossl.inference.model_folder import read_model
from autossl.inference.postprocess import Rule
from autossl.inference.predict import PredictResult, predict
from autossl.inference.request import PredictRequest
from autossl.inference.restore import Restored, Wanted

LABELS = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, (1, 2))


def written_plan(workspace: Workspace, runs: dict[str, tuple[str, ...]], split: str = "default", **more: Any) -> Path:
    """The plan of the runs' names → folds."""
    plan = InferencePlan(
        dataset=DATASET,
        split=split,
        members=tuple(PlanMember(run=f"{DATASET}/{split}/{name}", folds=folds) for name, folds in runs.items()),
        combine="single" if len(runs) == 1 else "mean_probabilities",
        why="because",
        labels=LabelBudget(n_cases=3, n_patients=3),
        written=Written.now(),
        **more,
    )
    path = inference_plan_path(workspace, DATASET, split)
    write_inference_plan(path, plan)
    return path


def tiny_workspace(tmp_path: Path, split: str = "default") -> Workspace:
    """Two runs `a` and `b` whose untrained networks differ, `b` of another spacing."""
    workspace = Workspace.locate(tmp_path / "workspace")
    folder = workspace.results_folder(DATASET) / split
    write_tiny_run(folder / "a", ("0", "1"), split=split)
    b = write_tiny_run(folder / "b", ("0", "1", "2"), tiny_plans(spacing=(1.4, 1.0, 0.9)), split=split, seed=1)
    (b / "fold_0" / "checkpoint_final.pth").unlink()  # what is left: networks that `a` does not have
    write_tiny_images(tmp_path / "images", ["p", "q"])
    return workspace


def predicted(tmp_path: Path, name: str, **more: Any) -> PredictResult:
    """With the dataset's name alone, unless said otherwise."""
    options = {"dataset": "999", "workspace": tmp_path / "workspace", "device": "cpu"} | more
    return predict(PredictRequest(tmp_path / "images", tmp_path / name, **options))


# --------------------------------------------------------------------------------------------------------------- plan


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    rule = Rule(kind="keep_largest", class_name="organ")
    path = written_plan(Workspace.locate(tmp_path), {"a": ("0",), "b": ("0", "1")}, postprocessing=(rule,))
    plan = read_inference_plan(path)
    assert [member.name for member in plan.members] == ["a", "b"]
    assert plan.postprocessing == (rule,)
    assert path == tmp_path / "results" / DATASET / "default" / "inference_plan.json"
    assert set_postprocessing(path, ()).postprocessing == ()
    assert read_inference_plan(path).postprocessing == ()


@pytest.mark.parametrize("run", ["/etc", "../other", f"{DATASET}/../../x", "a\\..\\b", "", "."])
def test_a_member_lies_below_the_results(tmp_path: Path, run: str) -> None:
    path = written_plan(Workspace.locate(tmp_path), {"a": ("0",)})
    content = json.loads(path.read_text())
    content["members"][0]["run"] = run
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=r"members\.0\.run.*autossl_find_best_configuration"):
        read_inference_plan(path)


def test_a_plan_of_two_members_says_how_they_are_combined(tmp_path: Path) -> None:
    path = written_plan(Workspace.locate(tmp_path), {"a": ("0",), "b": ("0",)})
    path.write_text(path.read_text().replace('"mean_probabilities"', '"single"'))
    with pytest.raises(InvalidInput, match="2 members cannot be combined as 'single'"):
        read_inference_plan(path)


# --------------------------------------------------------------------------------------------------------- predicting


def test_a_run_that_was_extended_after_it_was_chosen_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written_plan(tiny_workspace(tmp_path), {"a": ("0",)})
    plan = read_inference_plan(path)
    predicted(tmp_path, "unknown")
    for steps in (10, 6):
        members = (plan.members[0].model_copy(update={"total_steps": steps}),)
        write_inference_plan(path, plan.model_copy(update={"members": members}))
        predicted(tmp_path, f"after {steps}")
    told = [record.getMessage() for record in caplog.records if "extended" in record.getMessage()]
    assert [text.split(" after")[0] for text in told] == ["a was extended from 6 to 10 steps"]


def test_an_ensemble_predicts_the_mean_of_its_members_probabilities(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    plan = written_plan(workspace, {"a": ("0", "1"), "b": ("1", "2")})
    result = predicted(tmp_path, "both", save_probabilities=True, save_uncertainty=True)
    assert result.plan == plan
    assert [(folder.name, folds) for folder, folds in result.members] == [("a", ("0", "1")), ("b", ("1", "2"))]
    for name in ("a", "b"):
        model = workspace.results_folder(DATASET) / "default" / name
        predicted(tmp_path, name, dataset=None, model=model, save_probabilities=True)
    for case in ("p", "q"):
        members = [probabilities_file(tmp_path / name, case) for name in ("a", "b")]
        mean = np.concatenate(list(mean_of(members)), axis=1)
        maps = {name: read_label(tmp_path / name / f"{case}.nii.gz", "native")[0] for name in ("both", "a", "b")}
        np.testing.assert_array_equal(maps["both"], labels_of(mean, LABELS))
        assert any((maps["both"] != maps[name]).any() for name in ("a", "b"))
        np.testing.assert_allclose(read_probabilities(probabilities_file(tmp_path / "both", case)), mean, atol=3 / 510)
        disagreement = read_scalar(tmp_path / "both" / f"{case}_disagreement.nii.gz")
        np.testing.assert_array_equal(disagreement, maps["a"] != maps["b"])
    record = json.loads((tmp_path / "both" / "prediction.json").read_text())
    assert [run["folds"] for run in record["members"]] == [["0", "1"], ["1", "2"]]
    assert record["inference_plan"] == str(plan)


def read_scalar(path: Path) -> Any:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_a_plan_of_one_run_predicts_as_the_run_itself_and_applies_its_rules(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    written_plan(workspace, {"a": ("1",)})
    predicted(tmp_path, "planned")
    predicted(tmp_path, "named", run=RunFilter(seed=0), folds=("1",))
    maps = [read_label(tmp_path / name / "p.nii.gz")[0] for name in ("planned", "named")]
    np.testing.assert_array_equal(*maps)
    everything = Rule(kind="min_size_mm3", value=1e9)
    written_plan(workspace, {"a": ("1",)}, postprocessing=(everything,))
    predicted(tmp_path, "ruled")
    assert not read_label(tmp_path / "ruled" / "p.nii.gz")[0].any()
    assert maps[0].any()


def test_several_plans_are_listed_and_the_budget_chooses(tmp_path: Path) -> None:
    budget = "deployment-3_draw-0"
    for split in ("default", budget):
        written_plan(tiny_workspace(tmp_path, split), {"a": ("0",)}, split)
    with pytest.raises(InvalidInput, match=r"2 inference plans(.|\n)*default(.|\n)*--labeled"):
        predicted(tmp_path, "out")
    chosen = predicted(tmp_path, "out", run=RunFilter(labeled="3"))
    assert chosen.plan is not None
    assert chosen.plan.parent.name == budget
    all_labels = predicted(tmp_path, "all", run=RunFilter(labeled="all"))
    assert all_labels.model.parent.name == "default"


def test_without_a_plan_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    tiny_workspace(tmp_path)
    with pytest.raises(InvalidInput, match=r"2 runs(.|\n)*make a plan of a split with autossl_find_best_configuration"):
        predicted(tmp_path, "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_whose_runs_do_not_fit_together_is_refused(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    written_plan(workspace, {"a": ("0",), "b": ("1",)})
    description = workspace.results_folder(DATASET) / "default" / "b" / "dataset.json"
    content = json.loads(description.read_text())
    content["labels"]["cyst"] = 7
    description.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match="b has another labels than a"):
        predicted(tmp_path, "out")


# ---------------------------------------------------------------------------------------------------------- combining


@pytest.mark.parametrize(("schema", "keep_largest"), [(LABELS, True), (REGIONS, False)])
def test_combining_is_the_mean_whatever_the_number_of_slices(schema: LabelSchema, keep_largest: bool) -> None:
    generator = np.random.default_rng(0)
    arrays = [generator.random((schema.n_outputs, 19, 5, 4), dtype=np.float32) for _ in range(3)]
    stored = [quantize(array / array.sum(0) if keep_largest else array, keep_largest) for array in arrays]
    members = [Restored(np.zeros(array.shape[1:], dtype=np.uint8), array) for array in stored]
    result = combine(members, schema, Wanted(probabilities=True, uncertainty=True))
    mean = np.mean([array / np.float32(255) for array in stored], axis=0)
    np.testing.assert_array_equal(result.label_map, labels_of(mean, schema))
    assert result.probabilities is not None
    assert result.entropy is not None
    np.testing.assert_allclose(result.probabilities / 255, mean, atol=3 / 510)
    assert result.disagreement is not None
    assert not result.disagreement.any()  # the members' own label maps agree
    assert combine(members, schema, Wanted()).probabilities is None


def test_a_run_whose_plan_is_not_the_one_of_its_training_does_not_predict(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    whole = (run / "plans.json").read_text()
    content = json.loads(whole)
    content["transpose_forward"] = content["transpose_backward"] = [0, 2, 1]
    (run / "plans.json").write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=r"plans\.json: not the plan that the run was trained with.*--resume"):
        read_model(run)
    (run / "plans.json").write_text(whole.replace('"why": {', '"unknown": NaN, "why": {', 1))
    with pytest.raises(InvalidInput, match=r"plans\.json"):
        read_model(run)
    (run / "plans.json").write_text(whole)
    assert read_model(run).plans == tiny_plans()


def test_a_plan_from_before_all_its_fields_were_there_is_still_the_one_of_its_training(tmp_path: Path) -> None:
    run = write_tiny_run(tmp_path / "run")
    content = json.loads((run / "plans.json").read_text())
    del content["label_manager"]
    (run / "plans.json").write_text(json.dumps(content))
    spec = json.loads((run / "run.json").read_text())
    decisions = {key: value for key, value in content.items() if key != "why"}
    (run / "run.json").write_text(json.dumps(spec | {"plans_hash": content_hash(decisions)}))
    assert read_model(run).plans == tiny_plans()
