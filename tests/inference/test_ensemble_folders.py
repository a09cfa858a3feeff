"""Averaging the probabilities of folders that were predicted elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from tiny_model import write_tiny_images, write_tiny_run

from autossl.cli import ensemble as command
from autossl.data.files import write_json
from autossl.data.image_io import read_label
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import labels_of, probabilities_file, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.inference.ensemble_folders import EnsembleRequest, ensemble_folders
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest

SCHEMA = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})


@pytest.fixture
def request_of(tmp_path: Path) -> EnsembleRequest:
    """Two images predicted by two runs of untrained networks."""
    write_tiny_images(tmp_path / "images", ["p", "q"])
    for number, name in enumerate("ab"):
        run = write_tiny_run(tmp_path / "runs" / name, [str(k) for k in range(number + 1)])
        if number:
            (run / "fold_0" / "checkpoint_final.pth").unlink()
        model = PredictRequest(tmp_path / "images", tmp_path / name, model=run, save_probabilities=True, device="cpu")
        predict(model)
    return EnsembleRequest((tmp_path / "a", tmp_path / "b"), tmp_path / "out")


def test_the_mean_of_the_probabilities_decides(request_of: EnsembleRequest) -> None:
    told: list[tuple[int, int]] = []
    cases = ensemble_folders(replace(request_of, save_probabilities=True), lambda *at: told.append(at))
    assert cases == ["p", "q"]
    assert told == [(1, 2), (2, 2)]
    changed = 0
    for case in cases:
        members = [read_probabilities(probabilities_file(folder, case)) for folder in request_of.folders]
        mean = np.rint(255 * (members[0] + members[1])).astype(np.float32) / 510  # ties of bytes stay ties
        label_map, _, geometry = read_label(request_of.output / f"{case}.nii.gz", "native")
        first, _, first_geometry = read_label(request_of.folders[0] / f"{case}.nii.gz", "native")
        np.testing.assert_array_equal(label_map, labels_of(mean, SCHEMA))
        assert geometry.differences(first_geometry) == []
        stored = read_probabilities(probabilities_file(request_of.output, case))
        np.testing.assert_allclose(stored, mean, atol=3 / 510)
        changed += np.count_nonzero(label_map != first)
    assert changed > 0
    assert json.loads((request_of.output / "dataset.json").read_text())["labels"]["tumor"] == 5
    record = json.loads((request_of.output / "ensemble.json").read_text())
    assert record["folders"] == [str(folder) for folder in request_of.folders]


def test_label_maps_are_the_same_without_saving_probabilities(request_of: EnsembleRequest, tmp_path: Path) -> None:
    ensemble_folders(replace(request_of, save_probabilities=True))
    words = [str(folder) for folder in request_of.folders]
    assert command.main(["-i", *words, "-o", str(tmp_path / "other"), "-q"]) == 0
    for case in ("p", "q"):
        maps = [read_label(tmp_path / name / f"{case}.nii.gz")[0] for name in ("out", "other")]
        np.testing.assert_array_equal(*maps)
    assert not (tmp_path / "other" / "probabilities").exists()


def _one_folder(request: EnsembleRequest) -> EnsembleRequest:
    return replace(request, folders=request.folders[:1])


def _missing_case(request: EnsembleRequest) -> EnsembleRequest:
    probabilities_file(request.folders[1], "q").unlink()
    return request


def _other_labels(request: EnsembleRequest) -> EnsembleRequest:
    path = request.folders[1] / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"]["organ"] = 3
    write_json(path, content)
    return request


def _other_grid(request: EnsembleRequest) -> EnsembleRequest:
    path = request.folders[1] / "p.nii.gz"
    image = sitk.ReadImage(str(path))
    image.SetSpacing((2.0, 1.0, 1.5))
    sitk.WriteImage(image, str(path))
    return request


def _into_itself(request: EnsembleRequest) -> EnsembleRequest:
    return replace(request, output=request.folders[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_one_folder, "two or more different ones"),
        (_missing_case, "case q.*missing in one of the folders"),
        (_other_labels, "other labels"),
        (_other_grid, "another grid than in"),
        (_into_itself, "it is also the output folder"),
    ],
)
def test_faults_are_found_before_anything_is_written(
    request_of: EnsembleRequest, spoil: Callable[[EnsembleRequest], EnsembleRequest], message: str
) -> None:
    before = sorted(request_of.folders[0].rglob("*"))
    with pytest.raises(InvalidInput, match=message):
        ensemble_folders(spoil(request_of))
    assert not request_of.output.exists()
    assert sorted(request_of.folders[0].rglob("*")) == before


def test_results_are_replaced_only_when_asked(request_of: EnsembleRequest) -> None:
    ensemble_folders(request_of)
    with pytest.raises(InvalidInput, match="results of p, q"):
        ensemble_folders(request_of)
    assert ensemble_folders(replace(request_of, overwrite=True)) == ["p", "q"]
