"""autossl_run from raw folder to report with a stand-in trainer: unbroken, killed again and again, changed, wrong."""

from __future__ import annotations

import gzip
import json
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from untrained_experiment import PHANTOM, base_request

from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.pipeline import final_steps
from autossl.pipeline.engine import Event, StepFailed
from autossl.pipeline.experiment import run_experiment, run_step
from autossl.pipeline.steps import Ledger, Step

SPLIT = "deployment-3_draw-0"
TWIN, METHOD = "2d__nano__supervised__seed-0", "2d__nano__mean_teacher__seed-0"
Calls = Callable[[], list[dict]]
Kill = tuple[str, str]
"""Step and moment: "started", "going on", "unnoted" (its files are there, its note is not) or "done"."""


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is tested elsewhere; here it is a file that says what there was."""

    def write(experiment: Any, report: Any) -> None:
        there = sorted(path.name for path in experiment.folder.glob("*.json"))
        (experiment.folder / "report.html").write_text("\n".join(there))

    monkeypatch.setattr(final_steps, "_write_report", write)


def events_of(run: Callable[..., Any], *arguments: Any) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []

    def tell(event: Event) -> None:
        if event.state != "going on":
            events.append((event.step.name, event.state))

    run(*arguments, tell)
    return events


def place(workspace: Workspace) -> Path:
    return workspace.results_folder(PHANTOM.name) / SPLIT


# ------------------------------------------------------------------------------------------------------------ unbroken


def test_all_steps_run_in_order_and_a_second_call_finds_them_done(workspace: Workspace, calls: Calls) -> None:
    events = events_of(run_experiment, base_request(workspace.root))
    assert [name for name, state in events if state in ("there", "done")] == [
        "plan",
        "split",
        "preprocess 2d",
        *(f"train 2d {method} fold {fold}" for method in ("supervised", "mean_teacher") for fold in range(3)),
        "collect out-of-fold",
        "verdict",
        "select",
        "postprocessing",
        "predict hidden test 2d supervised",
        "predict hidden test 2d mean_teacher",
        "predict hidden test final model",
        "hidden test",
        "label next",
        "report",
    ]
    folder = place(workspace)
    names = {"verdict", "selection", "inference_plan", "postprocessing", "hidden_test", "label_next", "experiment"}
    assert {path.stem for path in folder.glob("*.json")} == {*names, "out_of_fold"}
    assert len(calls()) == 6
    assert all({"--deployment", "--save_probabilities", "--resume"} <= set(call["words"]) for call in calls())
    written = (place(workspace) / "experiment.json").stat().st_mtime_ns
    again = events_of(run_experiment, base_request(workspace.root))
    assert (place(workspace) / "experiment.json").stat().st_mtime_ns == written  # the page shows its date
    assert {state for name, state in again if name != "split"} == {"there"}
    assert len(calls()) == 6


def test_the_files_say_what_they_should(workspace: Workspace, calls: Calls) -> None:
    result = run_experiment(base_request(workspace.root))
    folder = place(workspace)
    hidden = json.loads((folder / "hidden_test.json").read_text())
    assert set(hidden["models"]) == {TWIN, METHOD, "final"}
    assert hidden["n_cases"] == 1
    scores = {
        name: json.loads((folder / "hidden_test" / name / "summary.json").read_text())["foreground_mean"]["dice"]
        for name in (TWIN, METHOD)
    }
    found = hidden["to_twin"][METHOD]
    assert found["twin"] == TWIN
    assert found["estimate"] == pytest.approx(scores[METHOD] - scores[TWIN])
    assert found["wins"] + found["ties"] + found["losses"] == 1
    split = json.loads((workspace.preprocessed_folder(PHANTOM.name) / "splits" / f"{SPLIT}.json").read_text())
    predicted = {path.name for path in (folder / "hidden_test" / METHOD).glob("*.nii.gz")}
    assert predicted == {f"{case}.nii.gz" for case in split["hidden_test"]}
    experiment = json.loads((folder / "experiment.json").read_text())
    assert experiment["command"] == (
        f"autossl_run {PHANTOM.name} -c 2d -m mean_teacher --preset nano --labeled 3 --steps 4"
    )
    assert str(workspace.root) not in (folder / "experiment.json").read_text()
    verdict = json.loads((folder / "verdict.json").read_text())
    assert verdict["word"] == "too few to tell"
    assert result.lines()[0] == verdict["sentence"]
    assert result.lines()[-1] == f"report: {folder / 'report.html'}"


# -------------------------------------------------------------------------------------------------------------- killed

KILLS: tuple[Kill, ...] = (
    ("preprocess 2d", "going on"),
    ("train 2d supervised fold 0", "going on"),
    ("train 2d supervised fold 1", "done"),
    ("train 2d mean_teacher fold 0", "going on"),
    ("train 2d mean_teacher fold 2", "started"),
    ("collect out-of-fold", "unnoted"),
    ("verdict", "started"),
    ("select", "unnoted"),
    ("postprocessing", "unnoted"),
    ("predict hidden test 2d mean_teacher", "going on"),
    ("predict hidden test final model", "going on"),
    ("label next", "going on"),
    ("report", "unnoted"),
)


def run_until_killed(root: Path, kill: Kill | None = None) -> None:
    """The experiment in a process of its own, which dies of SIGKILL at the given moment where there is one."""
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code == (-signal.SIGKILL if kill else 0)
        return
    try:  # the child of the fork never returns into pytest
        close = Ledger.close

        def close_or_die(self: Ledger, step: Step, seconds: float, made_from: str) -> None:
            if kill == (step.name, "unnoted"):
                os.kill(os.getpid(), signal.SIGKILL)
            close(self, step, seconds, made_from)

        def die(event: Event) -> None:
            early = event.state == "going on" and event.step.command is not None and not event.done
            if kill == (event.step.name, event.state) and not early:
                os.kill(os.getpid(), signal.SIGKILL)

        Ledger.close = close_or_die  # type: ignore[method-assign]
        run_experiment(base_request(root), die)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def test_killed_again_and_again_it_ends_with_the_same_files(
    workspace: Workspace, calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = Workspace(tmp_path / "unbroken")
    os.system(f"cp -a {workspace.root} {unbroken.root}")
    run_until_killed(unbroken.root)  # all of them in forks: what predicts may be another program there
    for kill in KILLS:
        slow = kill[0].startswith("train") and kill[1] == "going on"
        monkeypatch.setenv("FAKE_SECONDS", "0.5" if slow else "0.001")
        run_until_killed(workspace.root, kill)
    run_until_killed(workspace.root)
    assert contents(workspace.root) == contents(unbroken.root)
    log = (place(workspace) / "logs" / "train_2d_supervised_fold_0.log").read_text()
    assert log.count("$ autossl_train") == 2
    assert "state saved" in log  # the training noticed that its experiment was gone
    assert [(call["run"], call["fold"]) for call in calls()[6:]] == [(r, f) for r in (TWIN, METHOD) for f in "012"]


def contents(root: Path) -> dict[str, Any]:
    """Every file of the results that says what was found, without dates and without where the workspace lies."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in (root / "results").rglob("*") if path.is_file()):
        name = str(path.relative_to(root))
        if {"steps", "logs"} & set(path.relative_to(root).parts) or path.name in ("benchmark.json", ".experiment.lock"):
            continue
        if path.suffix == ".json":
            found[name] = dateless(json.loads(path.read_text().replace(str(root), "ROOT")))
        else:
            found[name] = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert not [name for name in found if ".partial" in name]
    return found


def dateless(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: dateless(value) for key, value in content.items() if key != "written"}
    return [dateless(value) for value in content] if isinstance(content, list) else content


# ------------------------------------------------------------------------------------------------------------- changed


def test_another_wish_redoes_what_depends_on_it_and_nothing_else(workspace: Workspace, calls: Calls) -> None:
    run_experiment(base_request(workspace.root))
    plan = place(workspace) / "inference_plan.json"
    wished = replace(base_request(workspace.root), final="mean_teacher")
    events = events_of(run_experiment, wished)
    members = json.loads(plan.read_text())["members"]
    assert [Path(member["run"]).name for member in members] == [METHOD]
    done = {name for name, state in events if state == "done" and name != "split"}
    assert "select" in done
    assert done <= {"select", "postprocessing", "predict hidden test final model", "hidden test", "report"}
    assert len(calls()) == 6


def test_rules_that_were_lost_are_put_back(workspace: Workspace, calls: Calls) -> None:
    run_experiment(base_request(workspace.root))
    plan = place(workspace) / "inference_plan.json"
    content = json.loads(plan.read_text())
    rules = content["postprocessing"]
    content["postprocessing"] = [{"kind": "fill_holes", "class_name": "core", "value": None}]
    plan.write_text(json.dumps(content))
    events = dict(events_of(run_experiment, base_request(workspace.root)))
    assert events["postprocessing"] == "done"
    assert json.loads(plan.read_text())["postprocessing"] == rules


def test_another_seed_is_trained_beside_and_judged_with_the_first(
    workspace: Workspace, calls: Calls, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_experiment(base_request(workspace.root))
    other = tmp_path / "other"
    os.system(f"cp -a {finished} {other}")
    for folder in list((other / SPLIT).iterdir()):
        if folder.is_dir():
            text = (folder / "run.json").read_text().replace('"seed": 0', '"seed": 1')
            (folder / "run.json").write_text(text)
            folder.rename(folder.with_name(folder.name.replace("seed-0", "seed-1")))
    monkeypatch.setenv("FAKE_FINISHED", str(other))
    run_experiment(replace(base_request(workspace.root), seed=1))
    verdict = json.loads((place(workspace) / "verdict.json").read_text())
    assert verdict["n_seeds"] == 2


# --------------------------------------------------------------------------------------------------------------- wrong


def test_all_that_is_wrong_is_said_before_anything_is_written(workspace: Workspace, calls: Calls) -> None:
    wrong = replace(
        base_request(workspace.root),
        methods=("meen_teacher",),
        settings={"mean_teacher": {"nois": "1"}},
        engine="cloud",
        preset="nanno",
        device="cuda:9",
    )
    with pytest.raises(InvalidInput) as caught:
        run_experiment(wrong)
    for part in ("meen_teacher", "no setting 'nois'", "engine 'cloud'", "preset 'nanno'", "'cuda:9'"):
        assert part in str(caught.value)
    with pytest.raises(InvalidInput, match=r"-final cps.*supervised, mean_teacher"):
        run_experiment(replace(base_request(workspace.root), final="cps"))
    with pytest.raises(InvalidInput, match="one of them"):
        run_experiment(replace(base_request(workspace.root), hours=1.0))
    with pytest.raises(InvalidInput, match="4d"):
        run_experiment(replace(base_request(workspace.root), configurations=("4d",)))
    assert not workspace.results.exists()


def test_runs_that_were_made_otherwise_are_refused_by_name(workspace: Workspace, calls: Calls) -> None:
    run_experiment(base_request(workspace.root))
    with pytest.raises(InvalidInput) as caught:
        run_experiment(replace(base_request(workspace.root), steps=5))
    assert str(caught.value).count("total_steps is 4 in run.json, 5 was asked for") == 2
    assert "--tag" in str(caught.value)
    assert len(calls()) == 6


def test_a_training_that_fails_is_shown_and_the_others_go_on(
    workspace: Workspace, calls: Calls, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = tmp_path / "lacking"
    os.system(f"cp -a {finished} {lacking} && rm -r {lacking}/{SPLIT}/{TWIN}")
    monkeypatch.setenv("FAKE_FINISHED", str(lacking))
    with pytest.raises(StepFailed, match=r"train 2d supervised fold 0 ended with exit code 1(.*\n)*.*FileNotFound"):
        run_experiment(base_request(workspace.root))
    assert [call["run"] for call in calls()] == [METHOD] * 3
    monkeypatch.setenv("FAKE_FINISHED", str(finished))
    run_experiment(base_request(workspace.root))
    assert len(calls()) == 6


def test_one_step_alone_is_run_by_its_name(workspace: Workspace, calls: Calls) -> None:
    request = base_request(workspace.root)
    assert events_of(run_step, request, "preprocess 2d")[-1] == ("preprocess 2d", "done")
    assert events_of(run_step, request, "train 2d supervised fold 1")[-1] == ("train 2d supervised fold 1", "done")
    assert [call["fold"] for call in calls()] == ["1"]
    with pytest.raises(InvalidInput, match="no step 'trian'.*one of: preprocess 2d, train 2d supervised fold 0"):
        run_step(request, "trian")
    with pytest.raises(RuntimeError, match="needs .*summary.json, which is not there"):
        run_step(request, "collect out-of-fold")
