"""The plan of an imported model as a preset: its own network is trained on, from its own weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_phantom import planned_phantom

from autossl.data.phantom import PhantomSettings
from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.inference.model_folder import TrainedModel
from autossl.interop.nnunet_import import ImportRequest, import_nnunet
from autossl.interop.nnunet_preset import plan_training
from autossl.networks.build import build_network
from autossl.planners.plans import ConfigurationPlan, read_plans
from autossl.trainers.train import TrainRequest, train

PHANTOM = PhantomSettings(n_labeled=5, n_unlabeled=2, n_test=0, shape_zyx=(4, 16, 16))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return planned_phantom(tmp_path_factory.mktemp("preset"), PHANTOM)


def own_plans(workspace: Workspace) -> Path:
    return workspace.preprocessed_folder(PHANTOM.name) / "plans_nano.json"


def imported(workspace: Workspace, folder: Path, **changes: Any) -> TrainedModel:
    """A model of nnU-Net with half of the features and another patch than the dataset's plan has."""
    plans = read_plans(own_plans(workspace)).to_nnunet_json() | {"plans_name": "nnUNetPlans"}
    configuration = plans["configurations"]["2d"]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * kwargs["n_stages"]
    configuration |= {"patch_size": [8, 8], "batch_size": 2}
    model = folder / "nnUNetTrainer__nnUNetPlans__2d"
    (model / "fold_0").mkdir(parents=True)
    description = json.loads((workspace.raw_folder(PHANTOM.name) / "dataset.json").read_text()) | changes
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(description))
    own = read_plans(own_plans(workspace)).configurations["2d"].model_dump()
    architecture = ConfigurationPlan.model_validate(own | {"architecture": configuration["architecture"]}).architecture
    network = build_network(architecture, 1, len(description["labels"]), seed=3)
    content = {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer", "current_epoch": 1}
    content |= {"init_args": {"configuration": "2d", "fold": 0}, "inference_allowed_mirroring_axes": (0,)}
    torch.save(content, model / "fold_0" / "checkpoint_final.pth")
    return import_nnunet(ImportRequest(model, PHANTOM.name, workspace.root, tag=folder.name.replace("_", "-"))).model


def test_the_models_network_is_trained_on_from_its_weights(planned: Workspace, tmp_path: Path) -> None:
    model, own = imported(planned, tmp_path / "first"), read_plans(own_plans(planned))
    path = plan_training(model, planned.root, n_workers=1)
    made = read_plans(path)
    assert path.name == "plans_nnUNetPlans.json"
    assert made.configurations["2d"].patch_size == (8, 8)
    assert made.configurations["2d"].architecture == model.plan.architecture != own.configurations["2d"].architecture
    assert made.semi_supervised == own.semi_supervised.model_copy(update={"recommended_configuration": "2d"})
    assert "nano" in made.why["semi_supervised"]
    assert plan_training(model, planned.root, n_workers=1) == path

    request = TrainRequest(
        PHANTOM.name,
        "2d",
        ("0",),
        workspace=planned.root,
        preset="nnUNetPlans",
        steps=1,
        device="cpu",
        num_workers=0,
        initial_weights=model.folder,
    )
    result = train(request)
    record = result.spec.initial["0"]
    n_entries = len(torch.load(model.checkpoint("0"), weights_only=True)["networks"]["network"])
    assert record["matched"]["network"] == {"loaded": n_entries, "other_shape": [], "not_in_file": []}


def test_plans_of_that_name_are_not_replaced_unasked(planned: Workspace, tmp_path: Path) -> None:
    model = imported(planned, tmp_path / "second")
    path = plan_training(model, planned.root, n_workers=1)
    content = json.loads(path.read_text())
    content["configurations"]["2d"]["patch_size"] = [16, 8]
    path.write_text(json.dumps(content))
    with pytest.raises(InvalidInput, match=r"other plans of that name.*--overwrite"):
        plan_training(model, planned.root, n_workers=1)
    plan_training(model, planned.root, n_workers=1, overwrite=True)
    assert read_plans(path).configurations["2d"].patch_size == (8, 8)


def test_a_dataset_that_does_not_fit_is_refused(planned: Workspace, tmp_path: Path) -> None:
    other = imported(planned, tmp_path / "other", labels={"background": 0, "something": 1})
    with pytest.raises(InvalidInput, match="the model's labels: .*something.*train without --plan_training"):
        plan_training(other, planned.root, n_workers=1)
    with pytest.raises(InvalidInput, match="not planned.*autossl_plan_and_preprocess"):
        plan_training(imported(planned, tmp_path / "third"), tmp_path, n_workers=1)
