"""A finished run goes on with more steps: what it says, keeps and refuses; what a run that goes on holds to."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planned_phantom import planned_phantom

import autossl.trainers.train as behind
from autossl.data.locks import hold
from autossl.data.phantom import PhantomSettings
from autossl.data.problems import InvalidInput
from autossl.data.runs import FoundRun, RunFilter, find_runs, fold_lock, read_run
from autossl.data.workspace import Workspace
from autossl.inference.checkpoint import read_checkpoint
from autossl.planners.plans import read_plans
from autossl.trainers.loop import TrainingInterrupted
from autossl.trainers.train import TrainHooks, TrainRequest, train

PHANTOM = PhantomSettings(n_labeled=6, n_unlabeled=2, n_test=0, shape_zyx=(12, 16, 16))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it wrote; waiting for a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A finished run of four steps."""
    workspace = planned_phantom(tmp_path_factory.mktemp("extend"), PHANTOM)
    train(request(workspace))
    return workspace


@pytest.fixture
def workspace(trained: Workspace, tmp_path: Path) -> Workspace:
    return Workspace(shutil.copytree(trained.root, tmp_path / "workspace"))


def request(workspace: Workspace, **changes: Any) -> TrainRequest:
    base = TrainRequest(PHANTOM.name, "2d", ("0",), workspace=workspace.root, steps=4, device="cpu", num_workers=0)
    return replace(base, **changes)


def run_of(workspace: Workspace) -> Path:
    (found,) = find_runs(workspace, PHANTOM.name, RunFilter(method="supervised"))
    return found.folder


def log_steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "fold_0" / "log.jsonl").read_text().splitlines()]


def test_a_finished_run_is_extended_and_says_what_that_does(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(workspace)
    before = json.loads((run / "fold_0" / "validation" / "summary.json").read_text())
    result = train(request(workspace, steps=6, resume=True))
    assert (result.folder, result.spec.total_steps, result.spec.extended_at) == (run, 6, (4,))
    start = read_plans(run / "plans.json").configuration("2d").learning_rate
    rates = (start * (1 - 3 / 4) ** 0.9, start * (1 - 4 / 6) ** 0.9)  # nnU-Net's schedule in the last and the next step
    said = f"learning rate, which had come to {rates[0]:.3g}, goes on with {rates[1]:.3g}"
    assert said in caplog.text
    assert "67% of the run" in caplog.text
    assert log_steps(run) == [1, 2, 3, 4, 5, 6]
    assert read_checkpoint(run / "fold_0" / "checkpoint_final.pth")["progress"]["step"] == 6
    assert json.loads((run / "fold_0" / "validation" / "summary.json").read_text()) != before
    assert not train(request(workspace, steps=6, resume=True)).folds[0].trained_now
    assert json.loads((run / "run.json").read_text())["extended_at"] == [4]


def test_an_extension_that_is_stopped_goes_on(workspace: Workspace) -> None:
    other = Workspace(shutil.copytree(workspace.root, workspace.root.with_name("unbroken")))

    def stop(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(request(workspace, steps=7, resume=True), TrainHooks(on_step=stop))
    states = []
    for place in (workspace, other):
        folder = train(request(place, steps=7, resume=True)).folds[0].folder
        states.append(read_checkpoint(folder / "checkpoint_final.pth")["networks"]["network"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_all_folds_of_an_extended_run_are_open_at_once(workspace: Workspace) -> None:
    train(request(workspace, folds=("0", "1")))
    run = run_of(workspace)

    def kill(fold: str, done: int, total: int, losses: dict[str, float]) -> None:
        states.update(FoundRun(run, read_run(run)).states)
        raise KeyboardInterrupt

    states: dict[str, str] = {}
    with pytest.raises(KeyboardInterrupt):
        train(request(workspace, folds=("0", "1"), steps=6, resume=True), TrainHooks(on_step=kill))
    assert states == {"0": "unfinished", "1": "unfinished"}  # fold 1 still has the weights of four steps
    with pytest.raises(InvalidInput, match="fold 2 was not trained when this run was extended"):
        train(request(workspace, folds=("2",), steps=6, resume=True))
    assert not (run / "fold_2").exists()


def test_a_fold_that_began_meanwhile_is_not_overwritten(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(workspace)
    monkeypatch.setattr(behind, "FOLD_WAIT_S", 0.0)
    with ExitStack() as other:
        began = lambda setup, on_progress: other.enter_context(hold(fold_lock(run, "3"), "fold 3"))  # noqa: E731
        monkeypatch.setattr(behind, "provide_cases", began)
        with pytest.raises(InvalidInput, match=f"process {os.getpid()} .* works on a fold of"):
            train(request(workspace, steps=3, overwrite=True))
    assert read_run(run).total_steps == 4
    assert (run / "fold_0" / "checkpoint_final.pth").exists()


def test_fewer_steps_no_resume_or_other_folds_extend_nothing(workspace: Workspace) -> None:
    run = run_of(workspace)
    content = (run / "run.json").read_text()
    for changes, match in (
        ({"steps": 6}, "total_steps is 4 in run.json, 6 was asked for"),
        ({"steps": 3, "resume": True}, "total_steps is 4 in run.json, 3 was asked for"),
        ({"steps": 6, "resume": True, "folds": ("0", "1")}, "name the folds 0"),
    ):
        with pytest.raises(InvalidInput, match=match):
            train(request(workspace, **changes))
    assert (run / "run.json").read_text() == content


def test_a_method_of_rounds_is_not_extended(workspace: Workspace) -> None:
    rounds = request(workspace, method="self_training", steps=8)
    train(rounds)
    with pytest.raises(InvalidInput, match="phases or rounds over the whole length"):
        train(replace(rounds, steps=12, resume=True))


@pytest.mark.parametrize("more", [{"resume": True}, {"folds": ("1",)}])
def test_a_run_goes_on_with_the_threads_that_it_began_with(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    run = run_of(workspace)
    spec = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(spec | {"threads": 3}))
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    train(request(workspace, **more))
    assert taken[-1] == 3


def test_a_damaged_case_stops_the_start_by_its_name(workspace: Workspace) -> None:
    (path,) = workspace.preprocessed_folder(PHANTOM.name).glob("data/*/images/phantom_001.b2nd")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="checksum.*autossl_plan_and_preprocess -d") as caught:
        train(request(workspace, tag="new"))
    assert caught.value.problems[0].file == path


def test_a_stop_while_pseudo_labels_are_made_ends_the_run_after_the_case(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked:
        """A stop that comes with the first predicted case."""

        asked = False

        def is_set(self) -> bool:
            return Asked.asked

    def note(what: str, done: int, total: int, case: str) -> None:
        assert what == "pseudo-labels"
        Asked.asked = True

    @contextmanager
    def stop_signals(enabled: bool) -> Any:
        yield Asked()

    rounds = request(workspace, method="self_training", steps=8)
    unbroken = train(replace(rounds, tag="unbroken"))
    with monkeypatch.context() as patched:
        patched.setattr(behind, "_stop_signals", stop_signals)
        with pytest.raises(TrainingInterrupted):
            train(rounds, TrainHooks(on_predict=note))
    resumed = train(replace(rounds, resume=True))
    states = [read_checkpoint(r.folds[0].folder / "checkpoint_final.pth")["networks"] for r in (unbroken, resumed)]
    for part in states[0]:
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part])
