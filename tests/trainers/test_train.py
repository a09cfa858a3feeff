"""Training from a planned phantom dataset: run folders, resume, what is refused, and what is never read."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import autossl.trainers.train as behind_training
from autossl.data.image_io import read_label
from autossl.data.labels import LabelSchema
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.probabilities import labels_of, probabilities_file, read_probabilities
from autossl.data.problems import InvalidInput
from autossl.data.runs import fold_state, read_run
from autossl.data.workspace import Workspace
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers import loop, speed
from autossl.trainers.base import Phase, Refresh
from autossl.trainers.loop import TrainingInterrupted
from autossl.trainers.methods.mean_teacher import MeanTeacher
from autossl.trainers.pseudo_labels import PseudoLabelStore
from autossl.trainers.registry import METHODS
from autossl.trainers.setup import resolve
from autossl.trainers.speed import steps_for_hours
from autossl.trainers.train import TrainHooks, TrainRequest, share_cores, train

PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=2, n_test=0, shape_zyx=(12, 16, 16))
PLAN_OPTIONS = PlanOptions(preset="nano", configurations=("2d",))

torch.set_num_threads(1)  # runs that are compared bit by bit take the same number


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("train"))
    make_phantom_dataset(workspace.raw, PHANTOM)
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, PLAN_OPTIONS, n_workers=1))
    return workspace


@pytest.fixture
def workspace(planned: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(planned.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


def request(workspace: Workspace, **changes: Any) -> TrainRequest:
    base = TrainRequest(PHANTOM.name, "2d", ("0",), workspace=workspace.root, steps=4, device="cpu", num_workers=0)
    return replace(base, **changes)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_holds_what_prediction_needs(workspace: Workspace) -> None:
    result = train(request(workspace, method="mean_teacher"))
    assert result.folder == workspace.results_folder(PHANTOM.name) / "default" / "2d__nano__mean_teacher__seed-0"
    names = files_below(result.folder)
    fold = {"checkpoint_final.pth", "log.jsonl", "progress.png", "validation/summary.json"}
    assert {"plans.json", "dataset.json", "run.json"} | {f"fold_0/{name}" for name in fold} <= names
    assert not any("latest" in name or "partial" in name for name in names)
    spec = json.loads((result.folder / "run.json").read_text())
    assert spec["total_steps"] == 4
    assert spec["settings"]["lambda_max"] == 1.0
    assert len(spec["folds"]["0"]["labeled"]) + len(spec["folds"]["0"]["validation"]) == 6
    validation = result.folds[0].validation
    assert validation is not None
    assert list(validation.dice) == ["capsule", "core"]
    assert list(validation.alternatives) == ["teacher"]
    summary = json.loads(validation.summary.read_text())
    assert summary["what"].startswith("full-volume")
    assert set(summary["cases"]) == set(spec["folds"]["0"]["validation"])


def test_a_finished_run_is_not_trained_again(workspace: Workspace) -> None:
    first = train(request(workspace))
    weights = (first.folds[0].folder / "checkpoint_final.pth").stat().st_mtime_ns
    second = train(request(workspace))
    assert (first.folds[0].trained_now, second.folds[0].trained_now) == (True, False)
    assert (second.folds[0].folder / "checkpoint_final.pth").stat().st_mtime_ns == weights
    assert second.folds[0].validation == first.folds[0].validation


def test_a_finished_fold_gets_its_probabilities_without_training(workspace: Workspace) -> None:
    first = train(request(workspace))
    (fold,) = first.folds
    assert not any((fold.folder / "validation").glob("probabilities/*"))
    before = {path: path.stat().st_mtime_ns for path in fold.folder.rglob("*") if path.is_file()}
    second = train(request(workspace, save_probabilities=True))
    assert not second.folds[0].trained_now
    assert {path: path.stat().st_mtime_ns for path in before} == before
    cases = first.spec.folds["0"].validation
    schema = LabelSchema({"background": (0,), "capsule": (1,), "core": (2,)})
    for case in cases:
        label_map, _, _ = read_label(fold.folder / "validation" / f"{case}.nii.gz", "native")
        probabilities = read_probabilities(probabilities_file(fold.folder / "validation", case))
        np.testing.assert_array_equal(labels_of(probabilities, schema), label_map)
    assert train(request(workspace, save_probabilities=True)).folds[0].validation == second.folds[0].validation


def test_seed_decides_all_bits_whatever_the_number_of_workers(workspace: Workspace) -> None:
    def weights(**changes: Any) -> dict[str, torch.Tensor]:
        result = train(request(workspace, method="mean_teacher", labeled="2", **changes))
        content = torch.load(result.folds[0].folder / "checkpoint_final.pth", weights_only=True)
        return content["networks"]["network"]  # type: ignore[no-any-return]

    one, two, other = weights(tag="a"), weights(tag="b", num_workers=2), weights(seed=1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_interrupted_and_resumed_equals_unbroken(workspace: Workspace) -> None:
    whole = train(request(workspace, method="mean_teacher", tag="whole", steps=6))
    broken = request(workspace, method="mean_teacher", tag="broken", steps=6)

    def stop(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, TrainHooks(on_step=stop))
    with pytest.raises(InvalidInput, match="continue with --resume, or start again with --overwrite"):
        train(broken)
    resumed = train(replace(broken, resume=True))
    states = [torch.load(r.folds[0].folder / "checkpoint_final.pth", weights_only=True) for r in (whole, resumed)]
    for part in ("network", "teacher"):
        first, second = (state["networks"][part] for state in states)
        assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [[json.loads(x) for x in (r.folds[0].folder / "log.jsonl").open()] for r in (whole, resumed)]
    assert [line["losses"] for line in lines[0]] == [line["losses"] for line in lines[1]]


def test_a_run_keeps_the_compiling_that_it_began_with(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(loop, "compile_parts", lambda parts: compiled.extend(parts))
    result = train(request(workspace, compile="on"))
    assert compiled == ["network"]
    assert result.spec.compile == {"on": True, "why": "asked for"}
    assert read_run(result.folder).compile == result.spec.compile
    fold = result.folder / "fold_0"
    (fold / "checkpoint_final.pth").rename(fold / "checkpoint_latest.pth")
    for again in ("auto", "off"):
        caplog.clear()
        assert train(request(workspace, compile=again, resume=True)).spec.compile["on"]
        assert ("the networks stay compiled" in caplog.text) == (again == "off")
    assert compiled == ["network"] * 2, "the unfinished fold went on compiled"


def test_another_specification_is_refused_by_its_field(workspace: Workspace) -> None:
    train(request(workspace))
    with pytest.raises(InvalidInput, match="total_steps is 4 in run.json, 5 was asked for.*--tag") as caught:
        train(request(workspace, steps=5))
    assert "--overwrite" in str(caught.value)
    assert train(request(workspace, steps=5, overwrite=True)).spec.total_steps == 5
    changed = train(request(workspace, method="mean_teacher", settings={"lambda_max": "2"}))
    assert "__mean_teacher__set-" in changed.folder.name, "an ablation never lands in its method's folder"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folds": ("7",)}, "fold '7' is not in split default"),
        ({"configuration": "3d_fulres"}, "configuration '3d_fulres'"),
        ({"method": "mean_techer"}, "mean_teacher"),
        ({"settings": {"lamda": "1"}, "method": "mean_teacher"}, "lambda_max"),
        ({"dataset": "Phantm"}, "Phantom"),
        ({"preset": "resenc"}, "nano"),
        ({"labeled": "99"}, "99"),
        ({"device": "cuda:7"}, "cpu"),
        ({"steps": None, "hours": -1.0}, "more than 0"),
        ({"initial_weights": Path("nowhere.pth")}, "--init names no file"),
    ],
)
def test_wrong_requests_are_explained_and_leave_no_run(
    workspace: Workspace, changes: dict[str, Any], message: str
) -> None:
    before = files_below(workspace.root)
    with pytest.raises(InvalidInput) as caught:
        train(request(workspace, **changes))
    assert message in str(caught.value)
    assert files_below(workspace.root) == before


def test_labels_that_a_run_may_not_see_are_never_read(workspace: Workspace) -> None:
    """Stored labels and locations of validation and hidden cases are replaced by garbage: nothing notices."""
    setup = resolve(request(workspace, labeled="2"))
    seen = setup.folds["0"].labeled
    assert len(seen) == 2
    others = {*setup.folds["0"].validation, *setup.folds["0"].unlabeled}
    labels = [path for path in (setup.store.folder / "labels").iterdir() if path.name.split(".")[0] in others]
    locations = [path for path in (setup.store.folder / "locations").iterdir() if path.stem in others]
    assert len(labels) == len(locations) == 4
    clean = train(request(workspace, labeled="2", method="mean_teacher", tag="clean"))
    kept = {path: path.read_bytes() for path in labels + locations}
    opened: list[Path] = []

    def plant(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        opened.append(Path(fold))
        for path in kept:
            path.write_bytes(b"planted")

    planted = train(request(workspace, labeled="2", method="mean_teacher", tag="planted"), TrainHooks(on_step=plant))
    assert opened, "the labels were planted after the first step, all later steps ran on them"
    results = [torch.load(r.folds[0].folder / "checkpoint_final.pth", weights_only=True) for r in (clean, planted)]
    first, second = (result["networks"]["network"] for result in results)
    assert all(torch.equal(first[name], second[name]) for name in first)
    streams = setup.streams("0")
    assert {case.id for case in streams.labeled} == set(seen)
    paths = [value for case in streams.unlabeled for value in vars(case).values() if isinstance(value, Path)]
    assert {path.parent.name for path in paths} == {"images"}, "no path of a label leads out of the unlabeled stream"


def test_initial_weights_are_taken_over_and_reported(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    first = train(request(workspace))
    path = first.folds[0].folder / "checkpoint_final.pth"
    with caplog.at_level("INFO"):
        second = train(request(workspace, method="mean_teacher", initial_weights=path, steps=1, tag="init"))
    assert "weights taken over" in caplog.text
    assert second.spec.initial_weights
    stored = json.loads((second.folder / "run.json").read_text())["initial"]["0"]
    assert stored["run"] == "default/2d__nano__supervised__seed-0"
    assert stored["matched"]["network"]["loaded"] > 10
    damaged = path.with_name("damaged.pth")
    damaged.write_bytes(path.read_bytes()[:2000])
    before = files_below(workspace.results)
    with pytest.raises(InvalidInput, match=r"damaged\.pth"):
        train(request(workspace, initial_weights=damaged, tag="damaged"))
    assert files_below(workspace.results) == before


def test_a_refresh_fills_the_store_and_its_labels_arrive_in_batches(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refreshing(MeanTeacher):
        name = "refreshing"
        arrived: list[tuple[int, float]] = []

        def phases(self) -> list[Phase]:
            return [Phase("train", refreshes=(Refresh(0.5, "teacher", "maps"),))]

        def request(self, at: Any) -> Any:
            asked = super().request(at)
            store = "maps" if at.fraction >= 0.5 else None
            return replace(asked, unlabeled=replace(asked.unlabeled, store=store))

        def losses(self, batch: Any, at: Any) -> Any:
            if batch.unlabeled.pseudo_labels is not None:
                assert batch.unlabeled.pseudo_labels[0].shape == batch.unlabeled.valid.shape
                self.arrived.append((at.step, float(batch.unlabeled.pseudo_confidences[0].max())))
            return super().losses(batch, at)

    monkeypatch.setitem(METHODS, "refreshing", Refreshing)
    result = train(request(workspace, method="refreshing", labeled="2"))
    assert [step for step, _ in Refreshing.arrived] == [2, 3]
    assert all(0.3 < confidence <= 1 for _, confidence in Refreshing.arrived)
    store = PseudoLabelStore(result.folds[0].folder / "pseudo_labels" / "maps")
    cases = json.loads((result.folder / "run.json").read_text())["folds"]["0"]
    assert store.cases(2) == cases["unlabeled"]
    assert not set(store.cases(2)) & set(cases["validation"]), "no validation case in the store"


def test_a_signal_saves_the_state(workspace: Workspace) -> None:
    import os
    import signal

    def send(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="after step 2"):
        train(request(workspace), TrainHooks(on_step=send, handle_signals=True))
    assert train(request(workspace, resume=True)).folds[0].trained_now
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_fold_all_trains_on_everything_and_has_no_validation(workspace: Workspace) -> None:
    result = train(request(workspace, folds=("all",), steps=1))
    assert result.folds[0].validation is None
    assert len(result.spec.folds["all"].labeled) == 6


def test_hours_become_steps(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps_for_hours(1.0, seconds=0.5, n_folds=2) == int(3600 * 0.93 / 2 / 0.5)
    with pytest.raises(InvalidInput, match="time for at least 100 steps"):
        steps_for_hours(0.01, seconds=1.0, n_folds=1)
    ticks = count()  # a clock by which each step of the trial takes a quarter of a second
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    with pytest.raises(TrainingInterrupted) as caught:
        train(request(workspace, steps=None, hours=0.01, tag="hours"), TrainHooks(on_step=_stop_at_once))
    assert caught.value.step >= 100
    assert caught.value.step == steps_for_hours(0.01, seconds=0.25, n_folds=1)


def test_two_processes_do_not_train_one_fold(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind_training, "FOLD_WAIT_S", 0.1)
    met: list[str] = []

    def meet(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        if done != 1:
            return
        for changes in ({"resume": True}, {"folds": ("1",), "overwrite": True, "steps": 5}):
            with pytest.raises(InvalidInput) as caught:  # the latter would remove the run, and this fold with it
                train(request(workspace, **changes))
            met.append(str(caught.value))
        train(request(workspace, folds=("1",)))

    result = train(request(workspace), TrainHooks(on_step=meet))
    assert len(met) == 2
    assert all(f"process {os.getpid()} on" in said and "works on fold 0 of 2d__nano" in said for said in met)
    assert fold_state(result.folder / "fold_0") == fold_state(result.folder / "fold_1") == "finished"
    assert set(read_run(result.folder).folds) == {"0", "1"}
    assert [path.name for path in result.folder.parent.iterdir()] == [result.folder.name]


def _stop_at_once(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
    raise TrainingInterrupted(total, Path())


def test_ct_of_a_budget_is_normalized_by_its_own_labels(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    folder = make_phantom_dataset(workspace.raw, PHANTOM)
    description = json.loads((folder / "dataset.json").read_text())
    description["channel_names"] = {"0": "CT"}
    (folder / "dataset.json").write_text(json.dumps(description))
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, PLAN_OPTIONS, n_workers=1))
    whole, budget = resolve(request(workspace)), resolve(request(workspace, labeled="2", folds=("0",)))
    labeled = sorted({case for fold in budget.split.folds for case in fold.labeled})
    values = []
    for case in labeled:
        image = nibabel.load(folder / "imagesTr" / f"{case}_0000.nii.gz").get_fdata()
        label = nibabel.load(folder / "labelsTr" / f"{case}.nii.gz").get_fdata()
        values.append(image[label > 0].mean())
    found = budget.plans.foreground_intensity_properties_per_channel["0"]
    assert found.mean == pytest.approx(np.mean(values), rel=1e-2)
    if set(labeled) != {case.id for case in budget.raw.labeled}:
        assert budget.plans.hash() != whole.plans.hash()
        assert budget.store.folder != whole.store.folder
    train(request(workspace, labeled="2", steps=1))
    assert budget.store.has(labeled[0], labeled=True)


def test_loader_processes_but_one_get_cores_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr("autossl.trainers.train.usable_cpus", lambda: 2)
    try:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        share_cores("cpu", 1)
        assert torch.get_num_threads() == 2, "what the user set stays"
        monkeypatch.delenv("OMP_NUM_THREADS")
        share_cores("cuda", 2)
        assert torch.get_num_threads() == 2
        share_cores("cpu", 1)
        assert torch.get_num_threads() == 2
        share_cores("cpu", 2)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_the_second_wish_to_stop_ends_at_once_but_not_one_that_a_launcher_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(behind_training.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with behind_training._stop_signals(True) as stopped:
        signal.raise_signal(signal.SIGINT)
        now[0] = 0.5
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        now[0] = 1.5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_each_fold_begins_with_weights_of_its_own_and_methods_with_the_same(workspace: Workspace) -> None:
    def first_weights(method: str, fold: str) -> torch.Tensor:
        setup = resolve(request(workspace, method=method, folds=("0", "1")))
        return next(setup.job(fold, 10).build_network().parameters()).detach()

    assert torch.equal(first_weights("supervised", "0"), first_weights("mean_teacher", "0"))
    assert not torch.equal(first_weights("supervised", "0"), first_weights("supervised", "1"))
