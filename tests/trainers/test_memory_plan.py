"""Memory of a step: what is counted, what is decided from it, and that a run keeps to it."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.base import Parts, Progress
from autossl.trainers.memory_plan import (
    MemoryPlan,
    candidates,
    choose_unlabeled_batch,
    scale_up,
    small_patch,
    supervised_step_gb,
)
from autossl.trainers.memory_trial import KeptForBackward, MemoryTrial, fit_to_memory, state_bytes, step_bytes
from autossl.trainers.methods.mean_teacher import MeanTeacher
from autossl.trainers.registry import METHODS
from autossl.trainers.setup import RunSetup, resolve
from autossl.trainers.train import TrainRequest, train
from family import add_channel, configuration_name, family_batch, make, needed_settings
from toys import toy_architecture, toy_configuration

PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=2, n_test=0, shape_zyx=(8, 32, 32))


# --------------------------------------------------------------------------------------------------- what is counted


def test_each_storage_counts_once_and_only_while_it_is_kept() -> None:
    weight = nn.Parameter(torch.ones(()))
    with KeptForBackward([weight]) as counter:
        x = weight * torch.ones(1000)  # keeps the vector of ones: 4000 bytes (and the weight, which is known)
        assert counter.peak == 4000
        y = x * x  # x, twice
        assert counter.peak == 8000
        z = x.exp()  # its own result
        assert counter.peak == 12000
    del y, z, x
    gc.collect()
    with KeptForBackward([weight]) as counter:
        for _ in range(3):
            x = (weight * torch.ones(1000)).sum()
            x.backward()
        assert counter.peak == 4000, "each graph was gone before the next"


def test_weights_in_another_precision_are_no_activations() -> None:
    layer = nn.Linear(30, 20, bias=False)
    image = torch.ones(5, 30)
    with torch.autocast("cpu", torch.bfloat16), KeptForBackward([layer.weight, image]) as counter:
        layer(image)
    assert counter.peak == 5 * 30 * 2, "the image in bfloat16 alone"


def test_state_is_weights_gradients_momentum_and_followers() -> None:
    parts = Parts({"net": nn.Linear(10, 10, bias=False)}, {"copy": nn.Linear(10, 10, bias=False)}, {"n": 1})
    parts.memory["bank"] = torch.zeros(50)
    assert state_bytes(parts) == 4 * (3 * 100 + 100 + 50)


def test_activations_grow_with_the_patch() -> None:
    """What a small patch takes, times the voxels, is what the large one takes (within the borders of pooling)."""
    kept = {}
    for edge in (32, 64):
        method = MeanTeacher(make(MeanTeacher).job, MeanTeacher.Settings())
        plan = method.job.configuration.model_copy(update={"patch_size": (edge, edge)})
        method.job = replace(method.job, configuration=plan)
        at = Progress(2, 3)
        kept[edge] = step_bytes(method, family_batch(method, method.request(at), 2), at).kept
    assert kept[64] == pytest.approx(4 * kept[32], rel=0.02)


# --------------------------------------------------------------------------------------------------- what is decided


def test_what_fits_is_left_as_planned() -> None:
    plan = choose_unlabeled_batch(2, 8.0, {2: 2.1}, 24.0)
    assert (plan.unlabeled_batch_size, plan.planned_unlabeled_batch_size, plan.accumulation) == (2, 2, 1)
    assert plan.estimated_gb == pytest.approx(16.8)
    assert "8.0 GB" in plan.why
    assert "24.0 GB" in plan.why


def test_the_largest_batch_that_fits_is_taken() -> None:
    plan = choose_unlabeled_batch(12, 8.0, {12: 4.0, 6: 2.9, 3: 2.2, 1: 1.9}, 24.0)
    assert plan.unlabeled_batch_size == 6
    assert plan.factor == 2.9
    assert "with the planned 12 it would be 32.0 GB" in plan.why


def test_where_nothing_fits_it_says_so() -> None:
    plan = choose_unlabeled_batch(2, 8.0, {2: 4.0, 1: 3.5}, 16.0)
    assert plan.unlabeled_batch_size == 1
    assert "more than there is" in plan.why


def test_candidates_are_halves() -> None:
    assert candidates(12) == [12, 6, 3, 1]
    assert candidates(2) == [2, 1]
    assert candidates(1) == [1]


def test_the_decision_survives_a_file() -> None:
    plan = choose_unlabeled_batch(2, 8.0, {2: 2.1}, 24.0)
    content = json.loads(json.dumps({**plan.to_json(), "of a later version": 1}))
    assert MemoryPlan.from_json(content) == plan


def test_a_step_is_priced_by_the_budget_of_the_preset() -> None:
    """One stage without a decoder writes features × voxels elements; 85 million of a batch of 12 stand for 8 GB."""
    plan = toy_configuration(architecture=toy_architecture(2, (64,)), patch_size=(32, 48), batch_size=12)
    assert supervised_step_gb(plan, "plain", 3) == pytest.approx(64 * 32 * 48 / 85e6 * 8)
    double = plan.model_copy(update={"batch_size": 24})
    assert supervised_step_gb(double, "plain", 3) == pytest.approx(2 * supervised_step_gb(plan, "plain", 3))


def test_presets_without_a_budget_are_priced_like_the_same_kind_of_network() -> None:
    plan = toy_configuration()
    assert supervised_step_gb(plan, "nano", 3) == supervised_step_gb(plan, "plain", 3)
    assert supervised_step_gb(plan, "imported", 3) == supervised_step_gb(plan, "plain", 3)


def test_the_small_patch_keeps_the_shape_of_the_network() -> None:
    strides = ((1, 2, 2), (2, 2, 2))
    plan = toy_configuration(
        3, architecture=toy_architecture(3, (4, 8, 8), True, strides), patch_size=(16, 64, 4), spacing=(4.0, 1.0, 1.0)
    )
    assert small_patch(plan) == (4, 8, 4), "two cells of the deepest map per axis, at most the patch"
    assert scale_up(plan, (4, 8, 4)) == 4 * 8


# --------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("memory"))
    add_channel(make_phantom_dataset(workspace.raw, PHANTOM))
    options = PlanOptions(preset="nano", configurations=("2d", "3d_fullres"))
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, options, n_workers=1))
    return workspace


@pytest.fixture(autouse=True)
def _training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.train.validate_fold", lambda *_: None)
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


def request(workspace: Workspace, **changes: object) -> TrainRequest:
    base = TrainRequest(
        PHANTOM.name, "2d", ("0",), method="mean_teacher", workspace=workspace.root, steps=2, device="cpu"
    )
    return replace(base, num_workers=0, **changes)  # type: ignore[arg-type]


def planned_batch(setup: RunSetup) -> int:
    return setup.configuration.unlabeled_batch_size


def test_processors_are_not_planned_for(workspace: Workspace) -> None:
    setup = fit_to_memory(resolve(request(workspace)))
    assert setup.memory is not None
    assert setup.unlabeled_batch_size == planned_batch(setup)
    assert "not for cpu" in setup.memory.why
    twin = fit_to_memory(resolve(request(workspace, method="supervised")))
    assert twin.memory is not None
    assert "no unlabeled patch" in twin.memory.why


def test_a_small_card_gets_fewer_unlabeled_patches_and_run_json_says_why(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = resolve(request(workspace))
    planned = planned_batch(setup)
    price = supervised_step_gb(setup.configuration, "nano", setup.schema.n_outputs)
    trial = MemoryTrial(setup, "0")
    whole, half = trial.factor(planned), trial.factor(planned // 2)
    assert 1 < half < whole < 4
    monkeypatch.setattr("autossl.trainers.memory_trial.device_memory_gb", lambda device: price * (half + whole) / 2)
    result = train(request(workspace, tag="small"))
    assert result.spec.unlabeled_batch_size == planned // 2
    assert result.spec.labeled_batch_size == setup.configuration.labeled_batch_size
    memory = json.loads((result.folder / "run.json").read_text())["memory"]
    assert memory["unlabeled_batch_size"] == planned // 2
    assert memory["planned_unlabeled_batch_size"] == planned
    assert memory["factor"] == pytest.approx(half, abs=1e-3)
    assert "the device has" in memory["why"]
    monkeypatch.setattr("autossl.trainers.memory_trial.device_memory_gb", lambda device: 1000.0)
    again = train(request(workspace, tag="small", resume=True))
    assert again.spec.unlabeled_batch_size == planned // 2, "a run keeps what it began with, on whatever device"
    anew = train(request(workspace, tag="small", overwrite=True))
    assert anew.spec.unlabeled_batch_size == planned


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_tried(name: str, workspace: Workspace) -> None:
    asked = replace(request(workspace, method=name), settings=needed_settings(name))
    setup = resolve(replace(asked, configuration=configuration_name(METHODS[name])))
    factor = MemoryTrial(setup, "0").factor(2)
    assert 0.5 < factor < 12
    if name == "supervised":
        assert factor == pytest.approx(1)
