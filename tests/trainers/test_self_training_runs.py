"""self_training through `autossl.trainers.train`: what lies on disk, killed refreshes, leaks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned_phantom import planned_phantom
from torch import Tensor

from autossl.data.phantom import PhantomSettings
from autossl.data.problems import InvalidInput
from autossl.data.store import open_array
from autossl.data.workspace import Workspace
from autossl.trainers.methods.self_training import SelfTraining
from autossl.trainers.pseudo_labels import PseudoLabelStore
from autossl.trainers.refresh import PoolPredictor, weights_digest
from autossl.trainers.setup import resolve
from autossl.trainers.train import TrainHooks, TrainRequest, TrainResult, _total_steps, train


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=1, n_test=0, shape_zyx=(12, 16, 16))


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return planned_phantom(tmp_path_factory.mktemp("self_training"), PHANTOM)


@pytest.fixture(scope="module")
def whole(planned: Workspace) -> TrainResult:
    """An unbroken run of three rounds of two steps."""
    return train(request(planned))


@pytest.fixture
def workspace(planned: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(planned.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def request(workspace: Workspace, **changes: Any) -> TrainRequest:
    """Untrained networks predict nothing plausible: the rules about cases are off where a test does not need them."""
    settings = {"plausibility": "0", "stop_agreement": "1", **changes.pop("settings", {})}
    base = TrainRequest(
        PHANTOM.name, "2d", ("0",), workspace=workspace.root, method="self_training", steps=6, device="cpu",
        num_workers=0, labeled="2", settings=settings, tag="test",
    )  # fmt: skip
    return replace(base, **changes)


def final_networks(folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = torch.load(folder / "checkpoint_final.pth", weights_only=True)["networks"]
    return found


class Killed(BaseException):
    """What ends a process that is killed."""


def test_a_refresh_that_is_killed_goes_on_after_its_last_case(workspace: Workspace, whole: TrainResult) -> None:
    broken = request(workspace, tag="broken")
    calls: list[tuple[int, str]] = []

    def kill(what: str, done: int, total: int, case: str) -> None:
        calls.append((done, case))
        if len(calls) == 2:
            raise Killed

    with pytest.raises(Killed):
        train(broken, TrainHooks(on_predict=kill))
    setup = resolve(broken)
    folder = setup.folder(setup.spec(6)) / "fold_0"
    store = PseudoLabelStore(folder / "pseudo_labels" / "pseudo")
    cases = [case for _, case in calls]
    assert [store.has(2, case) for case in cases] == [True, True]
    assert not store.is_complete(2)
    with pytest.raises(InvalidInput):
        store.cases(2)
    kept = {path: path.stat().st_mtime_ns for path in store.version(2).rglob("*.b2nd")}
    assert len(kept) == 4, "two label maps, two sets of confidences"
    labels = {path for path in kept if path.name.endswith("_label.b2nd")}
    resumed = train(replace(broken, resume=True)).folds[0].folder
    assert resumed == folder
    assert all(path.stat().st_mtime_ns == kept[path] for path in labels), "finished cases are not done again"
    unbroken = whole.folds[0].folder
    first, second = final_networks(unbroken), final_networks(resumed)
    assert first.keys() == second.keys() == {"network", "early", "middle", "previous"}
    assert all(same(first[part], second[part]) for part in first)
    reports = [
        [json.loads((f / "pseudo_labels" / "pseudo" / f"step_{at}" / "report.json").read_text()) for at in (2, 4)]
        for f in (unbroken, resumed)
    ]
    assert reports[0] == reports[1]


def test_the_store_holds_the_unlabeled_cases_of_the_fold_and_no_other(whole: TrainResult) -> None:
    cases = whole.spec.folds["0"]
    store = PseudoLabelStore(whole.folds[0].folder / "pseudo_labels" / "pseudo")
    for at in (2, 4):  # both rounds stay on disk
        report = json.loads((store.version(at) / "report.json").read_text())
        assert set(report["cases"]) == set(cases.unlabeled)
        files = {path.name.removesuffix(".b2nd").rsplit("_", 1)[0] for path in store.version(at).glob("*.b2nd")}
        assert files == set(cases.unlabeled)
        assert not files & {*cases.validation, *cases.labeled}
    first, second = (json.loads((store.version(at) / "report.json").read_text()) for at in (2, 4))
    assert sum(entry["accepted"] for entry in first["cases"].values()) == -(-len(cases.unlabeled) // 2)
    assert all(entry["accepted"] for entry in second["cases"].values())
    assert all(0 <= entry["kept_share"] <= 1 for entry in first["cases"].values())
    assert second["agreement_with_the_refresh_before"] is not None
    validation = whole.folds[0].validation
    assert validation is not None
    assert list(validation.alternatives) == ["previous_round"]


def test_planted_validation_labels_and_images_change_nothing(workspace: Workspace, whole: TrainResult) -> None:
    """Images and labels of validation cases, and labels of the unlabeled ones, are garbage once training begins."""
    setup = resolve(request(workspace))
    hidden = {*setup.folds["0"].validation, *setup.folds["0"].unlabeled}
    paths = [p for p in (setup.store.folder / "labels").iterdir() if p.name.split(".")[0] in hidden]
    paths += [p for p in (setup.store.folder / "locations").iterdir() if p.stem in hidden]
    paths += [setup.store.image_path(case) for case in setup.folds["0"].validation]
    kept = {path: path.read_bytes() for path in paths}

    def plant(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        for path, content in kept.items():
            path.write_bytes(b"planted" if done < total else content)

    planted = train(request(workspace, tag="planted"), TrainHooks(on_step=plant)).folds[0].folder
    for part, found in final_networks(whole.folds[0].folder).items():
        assert same(found, final_networks(planted)[part])


def test_the_rules_stop_a_run_whose_teacher_knows_nothing(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    """A network that always says background: every case lacks a class that all labels show, none has foreground."""

    def blind(method: SelfTraining) -> None:
        for layer in method.parts.trained["network"].decoder.seg_layers:  # type: ignore[union-attr]
            torch.nn.init.zeros_(layer.weight)
            layer.bias.data = torch.tensor([60.0, 0.0, 0.0])

    setup = resolve(request(workspace, settings={"plausibility": "1"}))
    method = SelfTraining(setup.job("0", 6), setup.settings)
    blind(method)
    predictor = PoolPredictor(setup, "0", method, workspace.root / "stores")
    refresh = method.phases()[1].refreshes[0]
    with caplog.at_level("WARNING"):
        assert predictor(refresh, 2)
    assert "no case can be used" in caplog.text
    report = json.loads((workspace.root / "stores" / "pseudo" / "step_2" / "report.json").read_text())
    assert "missing" in report["cases"][setup.folds["0"].unlabeled[0]]["reasons"][0]
    assert predictor(refresh, 2), "asked again, it decides the same"


def test_a_teacher_that_is_right_is_believed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden labels themselves as predictions: plausible in volume, stable, and without islands."""
    setup = resolve(request(workspace, labeled="3", settings={"plausibility": "1", "reliable_share": "1"}))
    hidden = [case for case in setup.folds["0"].unlabeled if setup.store.label_path(case).is_file()]
    truth = iter([case for case in hidden for _ in range(3)])  # by the teacher, the early and the middle copy

    def predicted(*_: Any) -> tuple[np.ndarray, np.ndarray]:
        label = setup.store.label(next(truth))[:].astype(np.uint8)
        return label, np.full((1, *label.shape), 255, dtype=np.uint8)

    monkeypatch.setattr("autossl.trainers.refresh.predicted_case", predicted)
    method = SelfTraining(setup.job("0", 6), setup.settings)
    predictor = PoolPredictor(setup, "0", method, workspace.root / "stores")
    predictor._cases = hidden
    assert not predictor(method.phases()[1].refreshes[0], 2)
    store = PseudoLabelStore(workspace.root / "stores" / "pseudo")
    assert store.weights(2) == dict.fromkeys(hidden, 1.0)
    assert len(hidden) >= 1
    for case in hidden:
        np.testing.assert_array_equal(store.label(2, case), setup.store.label(case)[:])
        assert (open_array(store.paths(2, case)[1])[:] == 255).all()


def test_teachers_predict_with_mirroring_and_are_compared_without_where_there_are_no_copies(planned: Workspace) -> None:
    axes = []
    for stability in ("checkpoints", "mirroring"):
        setup = resolve(request(planned, settings={"stability": stability}))
        method = SelfTraining(setup.job("0", 6), setup.settings)
        predictor = PoolPredictor(setup, "0", method, planned.root / "stores")
        teacher, others = predictor._predictors(method.phases()[1].refreshes[0])
        axes.append([found.window.mirror_axes for found in (teacher, *others)])
    assert axes == [[(0, 1)] * 3, [(0, 1), ()]]


def test_volumes_are_measured_like_those_of_the_labels(workspace: Workspace) -> None:
    """The label of a training case, as a pseudo-label of it, has the volume that the fingerprint says."""
    setup = resolve(request(workspace, labeled=None))
    case = setup.folds["0"].labeled[0]
    predictor = PoolPredictor(setup, "0", SelfTraining(setup.job("0", 6), setup.settings), workspace.root / "stores")
    label = setup.store.label(case)[:]
    known = setup.fingerprint.cases[case]
    voxel = float(np.prod(known.spacing_zyx_mm))
    for name, values in setup.schema.foreground.items():
        found = float(np.isin(label, values).sum()) * predictor._voxel_volume(case)
        assert found == pytest.approx(known.class_voxels[name] * voxel, rel=0.1)


def test_other_weights_are_predicted_anew(workspace: Workspace) -> None:
    setup = resolve(request(workspace))
    method = SelfTraining(setup.job("0", 6), setup.settings)
    refresh = method.phases()[1].refreshes[0]
    predictor = PoolPredictor(setup, "0", method, workspace.root / "stores")
    predictor(refresh, 2)
    path = PseudoLabelStore(workspace.root / "stores" / "pseudo").paths(2, setup.folds["0"].unlabeled[0])[0]
    made = path.stat().st_mtime_ns
    predictor(refresh, 2)
    assert path.stat().st_mtime_ns == made
    before = weights_digest(method.parts.trained["network"])
    with torch.no_grad():
        next(method.parts.trained["network"].parameters()).add_(1.0)
    assert weights_digest(method.parts.trained["network"]) != before
    predictor(refresh, 2)
    assert path.stat().st_mtime_ns != made


def test_online_mode_mirroring_soft_weights_and_workers_run(workspace: Workspace) -> None:
    settings = {"mode": "online", "stability": "mirroring", "filter": "weight", "finetune": "0.2"}
    result = train(request(workspace, settings=settings, steps=5, num_workers=1, tag="online")).folds[0]
    store = PseudoLabelStore(result.folder / "pseudo_labels" / "pseudo")
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_2", "step_3", "step_4"]
    case = store.cases(2)[0]
    assert open_array(store.paths(2, case)[1])[:].max() > 0
    report = json.loads((store.version(2) / "report.json").read_text())
    assert report["cases"][case]["stability"] > 0
    validation = result.validation
    assert validation is not None
    assert list(validation.alternatives) == ["teacher"]


def test_full_rounds_multiply_steps_but_not_hours(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autossl.trainers.train.steps_for_hours", lambda hours, seconds, n_folds: round(hours))
    full = {"full_rounds": "1"}
    assert _total_steps(resolve(request(workspace, settings=full))) == 18
    assert _total_steps(resolve(request(workspace))) == 6
    planned = resolve(request(workspace, steps=None, settings=full))
    assert _total_steps(planned) == 3 * planned.plans.semi_supervised.total_steps
    assert _total_steps(resolve(request(workspace, steps=None, hours=5.0, settings=full))) == 5


def test_a_given_teacher_is_round_0(planned: Workspace, whole: TrainResult) -> None:
    given = {"settings": {"round_0": "init"}, "tag": "given", "steps": 4}
    with pytest.raises(InvalidInput, match="begin with a trained network"):
        train(request(planned, **given))
    result = train(request(planned, initial_weights=whole.folder, **given))
    store = PseudoLabelStore(result.folds[0].folder / "pseudo_labels" / "pseudo")
    origin = json.loads((store.version(0) / "origin.json").read_text())
    teacher = resolve(request(planned)).job("0", 4).build_network()
    teacher.load_state_dict(final_networks(whole.folds[0].folder)["network"])
    assert origin["weights"] == {"network": weights_digest(teacher)}, "no checkpoint of it is known: mirroring decides"
    lines = [json.loads(line) for line in (result.folds[0].folder / "log.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["round_1", "round_1", "round_2", "round_2"]
    assert all("pseudo" in line["losses"] for line in lines)


def test_a_given_teacher_must_fit_with_all_weights(planned: Workspace, whole: TrainResult, tmp_path: Path) -> None:
    content = torch.load(whole.folds[0].folder / "checkpoint_final.pth", weights_only=True)
    del content["networks"]["network"]["decoder.seg_layers.0.bias"]
    torch.save(content, tmp_path / "partial.pth")
    given = {"settings": {"round_0": "init"}, "tag": "partial", "steps": 4}
    with pytest.raises(InvalidInput, match=r"1 not in the file \(decoder\.seg_layers\.0\.bias\)"):
        train(request(planned, initial_weights=tmp_path / "partial.pth", **given))
