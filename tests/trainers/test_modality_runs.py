"""From training two modalities to predicting from one: what the weights decided outlives the process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autossl.data.image_io import read_label
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.runs import RunFilter
from autossl.data.workspace import Workspace
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.networks.prediction import PredictionSpec
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.train import TrainRequest, train
from family import add_channel

PHANTOM = PhantomSettings(n_labeled=5, n_unlabeled=2, n_test=0, shape_zyx=(6, 24, 24))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("modalities"))
    add_channel(make_phantom_dataset(workspace.raw, PHANTOM))
    options = PlanOptions(preset="nano", configurations=("2d",))
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, options, n_workers=1))
    _make_it_small(workspace.preprocessed_folder(PHANTOM.name) / "plans_nano.json")
    return workspace


def _make_it_small(plans: Path) -> None:
    """Two patches of each stream and four features: nothing is to be learned."""
    content = json.loads(plans.read_text(encoding="utf-8"))
    plan = content["configurations"]["2d"]
    plan |= {"batch_size": 2, "labeled_batch_size": 2, "unlabeled_batch_size": 2, "mirror_axes": []}
    kwargs = plan["architecture"]["arch_kwargs"]
    kwargs |= {"features_per_stage": [4] * kwargs["n_stages"]}
    plans.write_text(json.dumps(content), encoding="utf-8")


def request(workspace: Workspace, method: str, **settings: str) -> TrainRequest:
    return TrainRequest(
        PHANTOM.name, "2d", ("0",), method, workspace.root, steps=4, device="cpu", num_workers=0, settings=settings
    )


def images(workspace: Workspace, folder: Path, channel: int) -> Path:
    """One case of the dataset, with the file of one channel."""
    folder.mkdir()
    source = workspace.raw_folder(PHANTOM.name) / "imagesTr" / f"phantom_001_{channel:04d}.nii.gz"
    shutil.copy(source, folder)
    return folder


def test_two_modalities_are_trained_and_each_predicts_alone(workspace: Workspace, tmp_path: Path) -> None:
    first = train(request(workspace, "semi_cml", groups="MR,MR turned"))
    (fold,) = first.folds
    assert fold.validation is not None
    assert list(fold.validation.alternatives) == ["modality_1", "modality_2", "mean"]
    path = fold.folder / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    decided = PredictionSpec.from_json(content["prediction"])
    # the other one: as if that had been decided. A method that is built again does not know of it
    other = next(spec for spec in content["alternatives"].values() if spec != content["prediction"])
    torch.save(content | {"prediction": other}, path)
    deployed = fold.folder / "validation"
    before = {p.name: read_label(p, "RAS")[0] for p in deployed.glob("*.nii.gz")}
    shutil.rmtree(deployed)
    again = train(request(workspace, "semi_cml", groups="MR,MR turned"))
    assert not again.folds[0].trained_now
    assert PredictionSpec.from_json(other) != decided
    after = {p.name: read_label(p, "RAS")[0] for p in deployed.glob("*.nii.gz")}
    assert any(not np.array_equal(before[name], after[name]) for name in before)

    written = {}
    for channel, name in enumerate(("MR", "MR turned")):
        asked = PredictRequest(
            images(workspace, tmp_path / f"in {channel}", channel),
            tmp_path / f"out {channel}",
            PHANTOM.name,
            RunFilter(method="semi_cml"),
            workspace.root,
            modality=name,
            device="cpu",
        )
        predict(asked)
        written[name] = read_label(asked.output / "phantom_001.nii.gz", "RAS")[0]
        with pytest.raises(InvalidInput, match="not all of"):
            predict(replace(asked, modality="1" if channel == 0 else "0", overwrite=True))
    assert not np.array_equal(written["MR"], written["MR turned"])


def test_the_twin_of_one_channel_predicts_from_it(workspace: Workspace, tmp_path: Path) -> None:
    result = train(request(workspace, "supervised", channels="MR turned"))
    assert result.spec.changed_settings == {"channels": "MR turned"}
    assert "__supervised__set-" in result.folder.name
    asked = PredictRequest(
        images(workspace, tmp_path / "in", 1), tmp_path / "out", model=result.folder, modality="MR turned", device="cpu"
    )
    assert predict(asked).predicted == ("phantom_001",)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("supervised", {"channels": "T2"}, "'T2' is unknown"),
        ("semi_cml", {"groups": "MR,MR"}, "share a channel"),
        ("semi_cml", {"groups": "MR"}, "give two"),
    ],
)
def test_channels_that_make_no_sense_are_refused_before_any_work(
    method: str, settings: dict[str, str], message: str, workspace: Workspace
) -> None:
    with pytest.raises(InvalidInput, match=message):
        train(request(workspace, method, **settings))
