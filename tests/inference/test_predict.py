"""Predicting folders: exact geometry, all outputs, resuming, parts, and every fault before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from PIL import Image
from tiny_model import DATASET, tiny_plans, write_tiny_images, write_tiny_pictures, write_tiny_run

from autossl.data.image_io import read_image, read_label
from autossl.data.labels import LabelSchema
from autossl.data.locks import Holder, hold
from autossl.data.probabilities import labels_of, probabilities_file, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.data.runs import RunFilter, fold_lock
from autossl.data.store import CaseStore
from autossl.inference.final_model import LoadedModel
from autossl.inference.model_folder import read_model
from autossl.inference.outputs import OutputFolder
from autossl.inference.predict import PredictProgress, predict
from autossl.inference.predictor import Window
from autossl.inference.preprocessed import original_grid, predict_preprocessed, predict_preprocessed_grid
from autossl.inference.request import PredictRequest
from autossl.planners.plans import write_plans
from autossl.preprocessing.prepare import prepare_case

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})


@pytest.fixture
def request_of(tmp_path: Path) -> Callable[..., PredictRequest]:
    """A request for two images and a run with one fold of constant label 5; folds and options can be changed."""

    def make(folds: Any = None, run: dict[str, Any] | None = None, **options: Any) -> PredictRequest:
        model = write_tiny_run(tmp_path / "run", folds or {"0": 2}, **(run or {}))
        images = tmp_path / "images"
        if not images.exists():
            write_tiny_images(images, ["a", "b"])
        return PredictRequest(
            **({"input": images, "output": tmp_path / "out", "model": model, "device": "cpu"} | options)
        )

    return make


def test_label_maps_have_the_images_own_geometry(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of()
    result = predict(request)
    assert result.predicted == ("a", "b")
    for case in result.predicted:
        image = sitk.ReadImage(str(request.input / f"{case}_0000.nii.gz"))
        label = sitk.ReadImage(str(request.output / f"{case}.nii.gz"))
        for name in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(label, name)() == getattr(image, name)()
        array = sitk.GetArrayFromImage(label)
        assert array.dtype == np.uint8
        assert np.all(array == 5)  # output 2 is the label 5
    record = json.loads((request.output / "prediction.json").read_text())
    assert [run["folds"] for run in record["members"]] == [["0"]]
    assert record["members"][0]["mirror_axes"] == [0]
    assert {path.name for path in request.output.iterdir()} == {
        "a.nii.gz", "b.nii.gz", "prediction.json", "plans.json", "dataset.json",
    }  # fmt: skip


def test_folder_prediction_equals_preprocessing_and_predicting_by_hand(
    request_of: Callable[..., PredictRequest], tmp_path: Path
) -> None:
    request = request_of(("0", "1"), run={"plans": tiny_plans(spacing=(1.0, 1.3, 0.7))}, step_size=0.6)
    predict(request)
    model = read_model(request.model or Path())
    store = CaseStore(tmp_path / "store")
    image = read_image([request.input / "b_0000.nii.gz"], "RAS")
    prepared = prepare_case(image, None, model.plans, "3d_fullres")
    store.write("b", prepared)
    predictor = model.load_predictor(Window.of(model.plan, step_size=0.6))
    label_map, geometry = predict_preprocessed(predictor, store, "b", model.plans, SCHEMA)
    written, _, _ = read_label(request.output / "b.nii.gz", "RAS")
    np.testing.assert_array_equal(written, label_map)
    assert geometry == image.geometry
    assert len(np.unique(label_map)) > 1
    turned = model.plans.model_copy(update={"transpose_forward": (1, 0, 2), "transpose_backward": (1, 0, 2)})
    with pytest.raises(InvalidInput, match="stored with axes"):
        predict_preprocessed(predictor, store, "b", turned, SCHEMA)
    assert predict_preprocessed_grid(predictor, prepared.image, SCHEMA).shape == prepared.image.shape[1:]


@pytest.mark.parametrize(
    "spacing, target, axis",
    [
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), None),
        ((5.0, 1.0, 1.0), (1.5, 1.5, 1.5), 0),  # coarse before preprocessing
        ((5.0, 1.0, 1.0), (1.0, 4.0, 1.0), 1),  # both: the prepared grid is where the way back begins
        ((1.0, 4.0, 1.0), (4.0, 4.0, 1.0), None),  # two equally coarse axes
        ((1.0, 1.0, 1.0), (1.0, 1.0, 3.5), 2),  # coarse after it
        ((1.0, 3.0, 1.0), (1.0, 2.0, 1.0), None),
    ],
)
def test_the_coarse_axis_is_looked_for_on_the_way_back(
    spacing: tuple[float, float, float], target: tuple[float, float, float], axis: int | None, tmp_path: Path
) -> None:
    image = read_image(sorted(write_tiny_images(tmp_path, ["a"]).iterdir()), "RAS")
    properties = prepare_case(image, None, tiny_plans(), "3d_fullres").properties
    grid = original_grid(replace(properties, spacing_mm=spacing, target_spacing_mm=target))
    assert grid.coarse_axis == axis
    assert grid.cropped_shape == properties.shape_after_crop


def test_probabilities_and_uncertainty_are_written_beside(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of({"0": 0, "1": 1}, save_probabilities=True, save_uncertainty=True)
    predict(request)
    probabilities = read_probabilities(probabilities_file(request.output, "a"))
    shape = read_label(request.output / "a.nii.gz", "native")[0].shape
    assert probabilities.shape == (3, *shape)
    assert probabilities.dtype == np.float32
    expected = torch.tensor([10.0, 10.0, 0.0]).softmax(0).numpy()  # of the mean logits
    np.testing.assert_allclose(probabilities, expected[:, None, None, None] * np.ones(shape), atol=1.1 / 510)
    entropy = sitk.ReadImage(str(request.output / "a_entropy.nii.gz"))
    assert sitk.GetArrayFromImage(entropy).ravel() == pytest.approx(np.log(2) / np.log(3), abs=1e-4)
    assert entropy.GetDirection() == sitk.ReadImage(str(request.input / "a_0000.nii.gz")).GetDirection()
    disagreement = sitk.GetArrayFromImage(sitk.ReadImage(str(request.output / "a_disagreement.nii.gz")))
    assert np.all(disagreement == 1)


def test_probabilities_lie_on_the_label_map_voxel_by_voxel(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of(("0",), save_probabilities=True)  # untrained weights; the images' axes are turned
    predict(request)
    label_map, _, _ = read_label(request.output / "a.nii.gz", "native")
    assert len(np.unique(label_map)) > 1
    probabilities = read_probabilities(probabilities_file(request.output, "a"))
    np.testing.assert_array_equal(labels_of(probabilities, SCHEMA), label_map)


def test_pictures_are_predicted_by_2d_networks(tmp_path: Path) -> None:
    plans = tiny_plans(dims=2, orientation="native")
    model = write_tiny_run(tmp_path / "run", {"0": 1}, plans, ".png")
    images = write_tiny_pictures(tmp_path / "images", ["p", "q"])
    predict(PredictRequest(input=images, output=tmp_path / "out", model=model, save_uncertainty=True))
    pixels = np.asarray(Image.open(tmp_path / "out" / "q.png"))
    assert pixels.shape == (20, 13)
    assert np.all(pixels == 1)
    assert np.squeeze(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "q_entropy.nii.gz")))).shape == (
        20,
        13,
    )


def test_a_run_is_found_by_its_dataset(tmp_path: Path) -> None:
    folder = tmp_path / "workspace" / "results" / DATASET / "default"
    write_tiny_run(folder / "3d_fullres__tiny__supervised__seed-0")
    write_tiny_run(folder / "3d_fullres__tiny__supervised__seed-1", seed=1)
    images = write_tiny_images(tmp_path / "images", ["a"])
    request = PredictRequest(images, tmp_path / "out", dataset="999", workspace=tmp_path / "workspace")
    with pytest.raises(InvalidInput, match="2 runs"):
        predict(request)
    assert predict(replace(request, run=RunFilter(seed=1))).model.name.endswith("seed-1")


def test_no_label_map_takes_the_place_of_a_map_of_uncertainty(
    request_of: Callable[..., PredictRequest], tmp_path: Path
) -> None:
    images = write_tiny_images(tmp_path / "two", ["a", "a_entropy"])
    request = request_of(input=images, save_uncertainty=True)
    with pytest.raises(InvalidInput, match=r"case a: a_entropy\.nii\.gz would be the label map of a_entropy"):
        predict(request)
    assert not request.output.exists()
    assert predict(replace(request, save_uncertainty=False)).predicted == ("a", "a_entropy")


def test_resume_predicts_only_what_is_missing(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of(save_probabilities=True)
    predict(request)
    with pytest.raises(InvalidInput, match="results of 2 cases are there: a, b"):
        predict(request)
    probabilities_file(request.output, "b").unlink()
    before = (request.output / "a.nii.gz").stat().st_mtime_ns
    (request.output / ".partial-1-b.nii.gz").write_bytes(b"half")
    result = predict(replace(request, resume=True))
    assert not (request.output / ".partial-1-b.nii.gz").exists()
    assert (result.predicted, result.skipped) == (("b",), ("a",))
    assert (request.output / "a.nii.gz").stat().st_mtime_ns == before
    assert predict(replace(request, resume=True)).predicted == ()
    with pytest.raises(InvalidInput, match="mirroring was True, now it is False"):
        predict(replace(request, resume=True, mirroring=False))
    for damaged in ("{}", "[]", '{"members": [3]}'):
        (request.output / "prediction.json").write_text(damaged)
        with pytest.raises(InvalidInput, match="a record that says nothing of what predicted"):
            predict(replace(request, resume=True))
    (request.output / "prediction.json").unlink()
    with pytest.raises(InvalidInput, match="nothing that says what predicted them"):
        predict(replace(request, resume=True))
    assert predict(replace(request, overwrite=True, mirroring=False)).predicted == ("a", "b")


def test_a_killed_overwrite_leaves_no_result_of_the_model_before(
    request_of: Callable[..., PredictRequest], tmp_path: Path
) -> None:
    request = request_of()
    predict(request)
    other = replace(request, model=write_tiny_run(tmp_path / "other", {"0": 1}))

    def stop(progress: PredictProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(replace(other, overwrite=True), stop)
    assert predict(replace(other, resume=True)).predicted == ("a", "b")
    assert np.all(read_label(request.output / "b.nii.gz", "native")[0] == 1)


def test_a_part_is_not_predicted_beside_another_share_of_the_cases(
    request_of: Callable[..., PredictRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.inference.predict.OTHER_WAIT_S", 0.0)
    request = request_of(num_parts=2)
    unfinished = request.output / "probabilities" / ".partial-1-b.b2nd"
    others = request.output / "of_another_command" / ".partial-1-b.nii.gz"
    for path in (unfinished, others):
        path.parent.mkdir(parents=True)
        path.touch()

    def meanwhile(progress: PredictProgress) -> None:
        if progress.share == 0:
            with pytest.raises(InvalidInput, match=f"process {os.getpid()} .* works on predictions into"):
                predict(replace(request, num_parts=1, resume=True))
            assert unfinished.exists()

    assert predict(request, meanwhile).predicted == ("a",)
    (request.output / ".prediction-1-of-2.lock").touch()  # of a killed part
    assert predict(replace(request, num_parts=1, resume=True)).predicted == ("b",)
    assert not unfinished.exists()
    assert others.exists()
    assert not list(request.output.glob("*.lock"))


def test_parts_share_the_cases_out(request_of: Callable[..., PredictRequest], tmp_path: Path) -> None:
    write_tiny_images(tmp_path / "images", list("abcde"))
    request = request_of(num_parts=2)
    first = predict(request)
    second = predict(replace(request, part_id=1))
    assert (first.predicted, second.predicted) == (("a", "c", "e"), ("b", "d"))


def test_progress_is_told_up_to_the_last_case(request_of: Callable[..., PredictRequest]) -> None:
    told: list[PredictProgress] = []
    predict(request_of(), told.append)
    assert told[0] == PredictProgress("a", 0, 2, 0.0)
    assert told[-1] == PredictProgress("b", 1, 2, 1.0)


def test_an_unreadable_image_is_named_and_the_others_are_predicted(
    request_of: Callable[..., PredictRequest], tmp_path: Path
) -> None:
    write_tiny_images(tmp_path / "images", ["a", "b", "c"])
    broken = tmp_path / "images" / "b_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    request = request_of()
    with pytest.raises(InvalidInput, match="1 of 3 cases") as caught:
        predict(request)
    assert caught.value.problems[0].case == "b"
    assert {path.name for path in request.output.glob("*.nii.gz")} == {"a.nii.gz", "c.nii.gz"}


def _no_images(request: PredictRequest) -> None:
    for path in request.input.iterdir():
        path.unlink()


def _two_channels(request: PredictRequest) -> None:
    write_tiny_images(request.input, ["a"], n_channels=2)


def _no_folder(request: PredictRequest) -> None:
    _no_images(request)
    request.input.rmdir()


def _cut_checkpoint(request: PredictRequest) -> None:
    path = (request.model or Path()) / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:500])


def _other_weights(request: PredictRequest) -> None:
    other = write_tiny_run(request.output.parent / "other", plans=tiny_plans(n_channels=2))
    path = (request.model or Path()) / "fold_0" / "checkpoint_final.pth"
    path.write_bytes((other / "fold_0" / "checkpoint_final.pth").read_bytes())


def _other_plan(request: PredictRequest) -> None:
    plans = tiny_plans().model_copy(update={"dataset_name": "Dataset001_Other"})
    write_plans((request.model or Path()) / "plans.json", plans)


def _unfinished(request: PredictRequest) -> None:
    folder = (request.model or Path()) / "fold_0"
    (folder / "checkpoint_final.pth").rename(folder / "checkpoint_latest.pth")


def _not_a_model(request: PredictRequest) -> None:
    (request.model or Path()).rename((request.model or Path()).with_name("gone"))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_no_images, "no file ends with"),
        (_no_folder, "does not exist"),
        (_two_channels, "surplus 0001"),
        (_cut_checkpoint, "cannot be read"),
        (_other_weights, "weights of 'student' do not fit"),
        (_other_plan, "the plan is for Dataset001_Other"),
        (_unfinished, "no fold is finished"),
        (_not_a_model, "no such folder"),
    ],
)
def test_faults_are_found_before_anything_is_written(
    request_of: Callable[..., PredictRequest], spoil: Callable[[PredictRequest], None], message: str
) -> None:
    request = request_of()
    spoil(request)
    with pytest.raises(InvalidInput, match=message):
        predict(request)
    assert not request.output.exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"folds": ("3",)}, "fold 3 is absent"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dataset": "4"}, "both a dataset and a model folder"),
        ({"model": None}, "neither a dataset nor a model folder"),
        ({"num_parts": 2, "part_id": 2}, "part 2 of 2"),
        ({"step_size": 0.0}, r"step size 0\.0"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
        ({"run": RunFilter(seed=1)}, "--model alone"),
    ],
)
def test_requests_that_make_no_sense_are_refused(
    request_of: Callable[..., PredictRequest], options: dict[str, Any], message: str
) -> None:
    request = replace(request_of(), **options)
    with pytest.raises(InvalidInput, match=message):
        predict(request)
    assert not request.output.exists()


def test_results_never_land_among_the_images(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of()
    with pytest.raises(InvalidInput, match="among the images"):
        predict(replace(request, output=request.input))


def test_folds_of_a_benchmark_budget_are_not_ensembled(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of({"0": 1, "1": 1}, run={"split": "benchmark-8_draw-0"})
    with pytest.raises(InvalidInput, match="different labels"):
        predict(request)
    assert not request.output.exists()
    assert predict(replace(request, folds=("1",))).folds == ("1",)


def test_the_fold_all_is_used_only_where_it_is_alone_or_named(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of({"0": 1, "all": 1})
    assert predict(request).folds == ("0",)
    assert predict(replace(request, folds=("all",), overwrite=True)).folds == ("all",)


def test_two_processes_do_not_predict_into_one_folder(request_of: Callable[..., PredictRequest]) -> None:
    request = request_of(num_parts=2)

    def meet(at: PredictProgress) -> None:
        with pytest.raises(InvalidInput, match=rf"process {os.getpid()} .* works on predictions into .*out"):
            predict(replace(request, resume=True))
        if at.case == "a" and at.share == 0:
            assert predict(replace(request, part_id=1)).predicted == ("b",)

    assert predict(request, meet).predicted == ("a",)


def test_a_fold_in_training_is_named_with_who_trains_it(
    request_of: Callable[..., PredictRequest], caplog: pytest.LogCaptureFixture
) -> None:
    request = request_of(("0", "1"))
    folder = request.model or Path()
    (folder / "fold_1" / "checkpoint_final.pth").rename(folder / "fold_1" / "checkpoint_latest.pth")
    with hold(fold_lock(folder, "1"), "fold 1"):
        predict(request)
        assert f"fold 1 is unfinished, {Holder.this_process().command} (process {os.getpid()} on" in caplog.text
        with pytest.raises(InvalidInput, match=rf"fold 1 is unfinished, .*process {os.getpid()} .* works on it"):
            predict(replace(request, folds=("1",)))
    with pytest.raises(InvalidInput, match=r"fold 1 is unfinished\. Expected"):
        predict(replace(request, folds=("1",)))


@pytest.mark.parametrize(
    "owner, name, doing",
    [(LoadedModel, "prepare", "reading"), (LoadedModel, "predict", "predicting"), (OutputFolder, "write", "writing")],
)
def test_a_fault_beside_the_main_thread_names_its_case(
    request_of: Callable[..., PredictRequest], owner: type, name: str, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(owner, name), []

    def failing(*arguments: Any) -> Any:
        calls.append(name)
        if len(calls) == 2:
            raise ZeroDivisionError("made up")
        return original(*arguments)

    request = request_of()
    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(ZeroDivisionError) as caught:
        predict(request)
    assert caught.value.__notes__ == [f"while {doing} case b"]
    assert not list(request.output.glob("b.*"))
