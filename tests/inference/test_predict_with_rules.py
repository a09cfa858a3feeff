"""Predicting with postprocessing rules: on the case's own grid, recorded, and the same for all cases of a folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_model import write_tiny_images, write_tiny_run

from autossl.data.image_io import read_geometry, read_label
from autossl.data.problems import InvalidInput
from autossl.inference.postprocess import Rule
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest


def request(tmp_path: Path, *rules: Rule) -> PredictRequest:
    """Two images and a model that calls every voxel tumor (5)."""
    model, images = write_tiny_run(tmp_path / "run", {"0": 2}), tmp_path / "images"
    if not images.exists():
        write_tiny_images(images, ["a", "b"])
    return PredictRequest(images, tmp_path / "out", model=model, device="cpu", postprocessing=rules)


@pytest.mark.parametrize(("share", "value"), [(0.99, 5), (1.01, 0)])
def test_sizes_are_those_of_the_images_own_voxels(tmp_path: Path, share: float, value: int) -> None:
    asked = request(tmp_path)
    geometry = read_geometry(asked.input / "a_0000.nii.gz")
    volume = float(np.prod(geometry.spacing_zyx_mm) * np.prod(geometry.shape_zyx))
    rule = Rule(kind="min_size_mm3", class_name="tumor", value=share * volume)
    predict(replace(asked, postprocessing=(rule,)))
    assert (read_label(asked.output / "a.nii.gz")[0] == value).all()
    record = json.loads((asked.output / "prediction.json").read_text())
    assert record["postprocessing"] == [rule.model_dump()]


def test_rules_of_other_labels_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    asked = request(tmp_path, Rule(kind="keep_largest", class_name="liver"))
    with pytest.raises(InvalidInput, match="no class 'liver'"):
        predict(asked)
    assert not asked.output.exists()


def test_a_folder_is_not_continued_with_other_rules(tmp_path: Path) -> None:
    asked = request(tmp_path)
    predict(asked)
    changed = replace(asked, resume=True, postprocessing=(Rule(kind="keep_largest_foreground"),))
    with pytest.raises(InvalidInput, match="postprocessing was"):
        predict(changed)
    record = asked.output / "prediction.json"
    before = json.loads(record.read_text())
    del before["postprocessing"]  # as versions without rules wrote it
    record.write_text(json.dumps(before))
    with pytest.raises(InvalidInput, match="postprocessing was"):
        predict(changed)
    assert predict(replace(asked, resume=True)).skipped == ("a", "b")
