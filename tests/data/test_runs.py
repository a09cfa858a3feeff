"""Runs: their folders, differing specifications, choosing one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from autossl.data.problems import InvalidInput
from autossl.data.runs import (
    CHECKPOINT_FINAL,
    RunFilter,
    RunSpec,
    choose_run,
    find_runs,
    fold_state,
    open_run,
    read_run,
    run_folder,
    spec_differences,
    tag_for,
)
from autossl.data.splits import Fold
from autossl.data.workspace import Workspace

FOLD = Fold(labeled=("a", "b"), validation=("c",))


def spec(**changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "dataset": "Dataset007_Toy",
        "split": "default",
        "configuration": "3d_fullres",
        "preset": "nano",
        "method": "mean_teacher",
        "seed": 0,
        "plans_hash": "abc",
        "total_steps": 100,
        "settings": {"weight": 0.1, "decay": 0.99},
        "folds": {"0": FOLD},
    }
    return RunSpec(**(values | changes))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def start(workspace: Workspace, wanted: RunSpec, finished: bool = True) -> Path:
    folder = run_folder(workspace, wanted)
    open_run(folder, wanted)
    for key in wanted.folds:
        (folder / f"fold_{key}").mkdir()
        (folder / f"fold_{key}" / (CHECKPOINT_FINAL if finished else "log.jsonl")).touch()
    return folder


def test_folder_names(workspace: Workspace) -> None:
    base = workspace.results / "Dataset007_Toy/default"
    assert run_folder(workspace, spec()) == base / "3d_fullres__nano__mean_teacher__seed-0"
    assert run_folder(workspace, spec(tag="wide", seed=3)) == base / "3d_fullres__nano__mean_teacher__wide__seed-3"
    for tag in ("a__b", "a/b", "..", "_a", "a_"):
        with pytest.raises(InvalidInput, match=r"the tag '.*'. Expected: letters, digits"):
            run_folder(workspace, spec(tag=tag))


def test_tags_of_settings() -> None:
    assert tag_for({}) is None
    assert tag_for({"a": 1, "b": 2}) == tag_for({"b": 2, "a": 1})
    assert tag_for({"a": 1}) != tag_for({"a": 2})


def test_a_new_run_and_one_more_fold(workspace: Workspace) -> None:
    folder = start(workspace, spec())
    assert read_run(folder) == spec()
    assert fold_state(folder / "fold_0") == "finished"
    assert fold_state(folder / "fold_1") == "absent"
    other = Fold(labeled=("c",), validation=("a",))
    merged = open_run(folder, spec(folds={"1": other}))
    assert merged.folds == {"0": FOLD, "1": other}
    assert read_run(folder) == merged


def test_what_a_killed_start_left_unfinished_is_removed(workspace: Workspace) -> None:
    folder = start(workspace, spec())
    (folder / ".removing-1-fold_1").mkdir()  # of --overwrite
    (folder / ".partial-1-run.json").touch()
    (folder / "fold_0" / ".partial-1-checkpoint_latest.pth").touch()  # of who trains it
    open_run(folder, spec())
    assert sorted(path.name for path in folder.iterdir()) == ["fold_0", "run.json"]
    assert (folder / "fold_0" / ".partial-1-checkpoint_latest.pth").exists()


def test_another_specification_names_every_field(workspace: Workspace) -> None:
    folder = start(workspace, spec())
    asked = spec(total_steps=200, settings={"weight": 0.3, "decay": 0.99}, folds={"0": Fold(labeled=("a",))})
    with pytest.raises(InvalidInput, match="holds a run with another specification") as caught:
        open_run(folder, asked)
    text = str(caught.value)
    assert "total_steps is 100 in run.json, 200 was asked for" in text
    assert "settings.weight is 0.1 in run.json, 0.3 was asked for" in text
    assert "folds.0.labeled has 2 cases, now 1 without b" in text
    assert "--tag NAME" in text
    assert "--overwrite" in text
    assert "decay" not in text
    assert read_run(folder) == spec(), "nothing was changed"
    assert (folder / "fold_0").exists()


def test_other_cases_in_several_folds_are_one_problem() -> None:
    stored = spec(folds={str(key): Fold(labeled=("a", "b")) for key in range(4)})
    asked = spec(folds={"0": stored.folds["0"], **{str(key): Fold(labeled=("a", "b", "c")) for key in (1, 2, 3)}})
    (problem,) = spec_differences(stored, asked, ["0", "1", "2", "3"])
    assert problem.found == "folds.1.labeled has 2 cases, now 3 with c besides; and the cases of folds 2, 3"
    (problem,) = spec_differences(stored, asked, ["0", "1"])
    assert problem.found == "folds.1.labeled has 2 cases, now 3 with c besides"


def test_unfinished_folds_ask_for_resume_and_keep_their_cases(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    folder = start(workspace, spec(threads=1), finished=False)
    with pytest.raises(InvalidInput, match=r"fold 0 of this run was started and not finished.*--resume.*--overwrite"):
        open_run(folder, spec(threads=1))
    grown = spec(folds={"0": Fold(labeled=("a", "b", "n"), validation=("c",))}, threads=2)
    with caplog.at_level(logging.WARNING):
        assert open_run(folder, grown, resume=True).folds == {"0": FOLD}
    assert "fold 0 goes on with the cases it was started with" in caplog.text
    assert "threads was 1 when the run began, now 2" in caplog.text
    with pytest.raises(InvalidInput, match="total_steps"):
        open_run(folder, spec(total_steps=7), resume=True)


def test_resume_without_a_run_starts_one(workspace: Workspace) -> None:
    folder = run_folder(workspace, spec())
    assert open_run(folder, spec(), resume=True) == spec()


def test_overwrite_takes_the_folds_asked_for_or_the_whole_run(workspace: Workspace) -> None:
    both = spec(folds={"0": FOLD, "1": FOLD})
    folder = start(workspace, both)
    open_run(folder, spec(), overwrite=True)
    assert [fold_state(folder / f"fold_{k}") for k in (0, 1)] == ["absent", "finished"]
    open_run(folder, spec(seed=0, total_steps=5), overwrite=True)
    assert [fold_state(folder / f"fold_{k}") for k in (0, 1)] == ["absent", "absent"]
    assert read_run(folder).total_steps == 5


def test_damaged_run_file(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    folder = start(workspace, spec())
    path = folder / "run.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(
        InvalidInput, match=r"run.json: the run's specification cannot be read: not valid JSON.*--overwrite"
    ):
        open_run(folder, spec())
    assert find_runs(workspace, "Dataset007_Toy") == []
    assert "cannot be read" in caplog.text
    assert open_run(folder, spec(), overwrite=True) == spec()
    path.write_text('{"dataset": "x"}')
    with pytest.raises(InvalidInput, match="split: Field required"):
        read_run(folder)
    path.unlink()
    (folder / "fold_0").mkdir()
    with pytest.raises(InvalidInput, match="the file does not exist"):
        open_run(folder, spec())


def test_choosing_a_run(workspace: Workspace) -> None:
    with pytest.raises(InvalidInput, match=r"no run of Dataset007_Toy fits \(no condition\).*train one"):
        choose_run(workspace, "Dataset007_Toy")
    start(workspace, spec())
    start(workspace, spec(tag="wide"))
    start(workspace, spec(method="supervised", split="benchmark-8_draw-1"), finished=False)
    name = "Dataset007_Toy"
    assert choose_run(workspace, name, RunFilter(labeled="8")).spec.method == "supervised"
    assert choose_run(workspace, name, RunFilter(draw=1)).states == {"0": "unfinished"}
    assert choose_run(workspace, name, RunFilter(tag="wide", labeled="all")).spec.tag == "wide"
    assert choose_run(workspace, name, RunFilter(tag="", method="mean_teacher")).spec.tag is None
    with pytest.raises(
        InvalidInput, match=r"(?s)2 runs of .* fit \(method 'mean_teacher'\).*wide__seed-0 \(0 finished\)"
    ):
        choose_run(workspace, name, RunFilter(method="mean_teacher"))
    with pytest.raises(InvalidInput, match=r"(?s)no run .*supervised__seed-0 \(0 unfinished\).*method: mean_teacher"):
        choose_run(workspace, name, RunFilter(method="mean_taecher"))
