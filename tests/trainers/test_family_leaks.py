"""No method of the registry reads a label or image that its run may not see: all of them are replaced by garbage.

Whatever opens one of these files stops the run with an error. The comparison with a clean run, bit for bit, is
`test_train.test_labels_that_a_run_may_not_see_are_never_read`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.setup import RunSetup, resolve
from autossl.trainers.train import TrainRequest, train
from family import METHODS, NAMES, add_channel, configuration_name, make, needed_settings

PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=2, n_test=0, shape_zyx=(10, 40, 40))
CONFIGURATIONS = ("2d", "3d_fullres")
PLANTED = b"planted: nothing in training may open this file"


def request(
    workspace: Workspace, method: str = "supervised", steps: int = 3, configuration: str | None = None
) -> TrainRequest:
    return TrainRequest(
        PHANTOM.name,
        configuration or configuration_name(METHODS[method]),
        ("0",),
        method=method,
        workspace=workspace.root,
        steps=steps,
        labeled="2",
        device="cpu",
        num_workers=0,
        settings=needed_settings(method),
    )


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in which all that fold 0 of the budget may not see is garbage, raw and preprocessed."""
    workspace = Workspace(tmp_path_factory.mktemp("leaks"))
    add_channel(make_phantom_dataset(workspace.raw, PHANTOM))
    options = PlanOptions(preset="nano", configurations=CONFIGURATIONS)
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, options, n_workers=1))
    _make_it_small(workspace.preprocessed_folder(PHANTOM.name) / "plans_nano.json")
    found = [forbidden_files(resolve(request(workspace, configuration=name))) for name in CONFIGURATIONS]
    for paths in found:
        assert len(paths) == 18, [str(path) for path in paths]
    for path in {path for paths in found for path in paths}:
        path.write_bytes(PLANTED)
    return workspace


def _make_it_small(plans: Path) -> None:
    """Two patches of each stream and four features: the question is what is read."""
    content = json.loads(plans.read_text(encoding="utf-8"))
    for plan in content["configurations"].values():
        plan |= {"batch_size": 2, "labeled_batch_size": 2, "unlabeled_batch_size": 2}
        kwargs = plan["architecture"]["arch_kwargs"]
        kwargs |= {"features_per_stage": [4] * kwargs["n_stages"]}
    plans.write_text(json.dumps(content), encoding="utf-8")


def forbidden_files(setup: RunSetup) -> list[Path]:
    """Labels and locations of validation and hidden cases, and the validation cases' images."""
    fold, store, raw = setup.folds["0"], setup.store, setup.raw.folder
    labeled = {path.name.split(".")[0] for path in (store.folder / "labels").iterdir()}
    hidden = labeled & set(fold.unlabeled)
    assert len(hidden) == 2, "labeled training cases whose labels the budget hides"
    assert len(fold.validation) == 2
    paths = []
    for case in (*hidden, *fold.validation):
        paths += [store.label_path(case), store.locations_path(case), *(raw / "labelsTr").glob(f"{case}.*")]
    for case in fold.validation:
        paths += [store.image_path(case), *(raw / "imagesTr").glob(f"{case}_*")]
    return paths


@pytest.fixture(autouse=True)
def _training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check that all files are whole, which reads headers, the validation at the end, and the picture."""
    monkeypatch.setattr("autossl.trainers.train.provide_cases", lambda *_: None)
    monkeypatch.setattr("autossl.trainers.train.validate_fold", lambda *_: None)
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_that_may_not_be_seen(name: str, poisoned: Workspace) -> None:
    steps = make(METHODS[name]).job.total_steps
    result = train(request(poisoned, name, steps))
    state = torch.load(result.folds[0].folder / "checkpoint_final.pth", weights_only=True)
    assert state["progress"]["step"] == steps
    assert state["progress"]["skipped_steps"] == 0


def test_the_garbage_would_be_noticed(poisoned: Workspace) -> None:
    setup = resolve(request(poisoned))
    for case in setup.folds["0"].validation:
        with pytest.raises((InvalidInput, RuntimeError, ValueError)):
            setup.store.label(case)[:]
        with pytest.raises((InvalidInput, RuntimeError, ValueError)):
            setup.store.image(case)[:]
