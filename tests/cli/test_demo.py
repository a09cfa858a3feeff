"""The whole way in small: made-up data, plan, two trainings, prediction, evaluation, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from autossl import demo
from autossl.cli import demo as demo_command
from autossl.data.phantom import PhantomSettings
from autossl.demo import DemoSettings, run_demo

TINY = DemoSettings(
    phantom=PhantomSettings(n_labeled=2, n_unlabeled=2, n_test=1, shape_zyx=(12, 16, 16)), steps=2, n_pictured=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    run_demo(folder, TINY)
    return folder


def test_each_method_is_trained_alike_and_scored_on_the_test_cases(folder: Path) -> None:
    runs = sorted((folder / "results" / TINY.phantom.name / "default").iterdir())
    specs = [json.loads((run / "run.json").read_text()) for run in runs]
    assert [spec["method"] for spec in specs] == ["mean_teacher", "supervised"]
    assert {spec["total_steps"] for spec in specs} == {2}
    assert specs[0]["folds"] == specs[1]["folds"]
    for method in TINY.methods:
        summary = json.loads((folder / "predictions" / method / "summary.json").read_text())
        assert list(summary["cases"]) == ["phantom_005"]
        assert list(summary["classes"]) == ["capsule", "core"]


def test_predictions_lie_on_the_grid_of_their_images(folder: Path) -> None:
    image = nibabel.load(folder / "raw" / TINY.phantom.name / "imagesTs" / "phantom_005_0000.nii.gz")
    prediction = nibabel.load(folder / "predictions" / "supervised" / "phantom_005.nii.gz")
    assert prediction.shape == image.shape
    assert np.array_equal(prediction.affine, image.affine)


def test_the_picture_has_a_panel_for_image_reference_and_each_method(folder: Path) -> None:
    width, height = Image.open(folder / "pictures.png").size
    assert width > 3 * height


def test_a_second_call_goes_on_and_the_command_prints_the_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint_final.pth")}
    assert len(checkpoints) == 2
    monkeypatch.setattr(demo, "DemoSettings", lambda device: TINY)
    assert demo_command.main([str(folder), "-q"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint_final.pth")} == checkpoints
    printed = capsys.readouterr().out
    assert "Dice on 1 test cases" in printed
    for text in ("supervised", "mean_teacher", "capsule", "core", "pictures.png"):
        assert text in printed


def test_a_folder_with_other_content_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "raw" / TINY.phantom.name
    other.mkdir(parents=True)
    (other / "mine.txt").write_text("mine")
    assert demo_command.main([str(tmp_path)]) == 2
    assert "something else than this phantom" in capsys.readouterr().err
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
