"""autossl_benchmark: with a trainer that trains nothing, and once with the real one."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from autossl.cli import benchmark
from autossl.data.phantom import PhantomSettings, make_phantom_dataset
from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark import execute
from autossl.evaluation.benchmark.benchmark import BenchmarkOptions, BenchmarkRequest, run_benchmark, what_would_run
from autossl.evaluation.benchmark.request import plan_benchmark
from autossl.planners.plan_and_preprocess import PlanRequest, plan_and_preprocess
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers.methods.spcl import SelfPacedContrast

PHANTOM = PhantomSettings(n_labeled=12, n_unlabeled=1, n_test=0, shape_zyx=(12, 16, 16))
PLAN_OPTIONS = PlanOptions(configurations=("2d",), preset="nano")
FAKE = Path(__file__).resolve().parents[1] / "fake_train.py"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("benchmark"))
    make_phantom_dataset(workspace.raw, PHANTOM)
    plan_and_preprocess(PlanRequest(PHANTOM.name, workspace.root, PLAN_OPTIONS, n_workers=1))
    return workspace


@pytest.fixture
def workspace(planned: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(planned.root, tmp_path / "workspace")
    return Workspace(tmp_path / "workspace")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the stand-in trainer writes down its calls."""
    script = tmp_path / "autossl_train"
    script.write_text(f"#!{sys.executable} -SE\nimport runpy\nrunpy.run_path({str(FAKE)!r}, run_name='__main__')\n")
    script.chmod(0o755)
    monkeypatch.setattr(execute, "_executable", lambda: str(script))
    monkeypatch.setenv("FAKE_SPECS", str(tmp_path / "specs"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls.jsonl"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "specs").mkdir()
    return tmp_path / "calls.jsonl"


def request(workspace: Workspace, **changes: Any) -> BenchmarkRequest:
    base = BenchmarkRequest(
        PHANTOM.name, "2d", ("mean_teacher",), workspace.root, labeled=("4",), steps=5, device="cpu"
    )
    return replace(base, **changes)


def arguments(workspace: Workspace, *more: str) -> list[str]:
    fixed = "-m mean_teacher --labeled 4 --steps 5 --device cpu --workspace"
    return [PHANTOM.name, "2d", *fixed.split(), str(workspace.root), *more]


def lend_specs(asked: BenchmarkRequest, calls: Path) -> None:
    """The stand-in trainer writes the specification that the real one would."""
    for run in plan_benchmark(asked).runs:
        path = calls.parent / "specs" / f"{run.spec.split}__{run.folder.name}.json"
        path.write_text(run.spec.model_dump_json())


def made(calls: Path) -> list[dict[str, Any]]:
    """The calls of the stand-in trainer so far."""
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.is_file() else []


# -------------------------------------------------------------------------------------------------- with the stand-in


def test_what_is_missing_is_run_and_what_is_finished_is_reused(
    workspace: Workspace, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lend_specs(request(workspace, full_labels=True, seeds=(0, 1)), calls)
    output = calls.parent / "out"
    options = ["--full_labels", "--jobs", "2", "--no_cost", "-o", str(output)]
    assert benchmark.main(arguments(workspace, *options)) == 0
    assert [call["run"].split("__")[2] for call in made(calls)].count("supervised") == 2
    assert len(made(calls)) == 3
    assert {call["threads"] for call in made(calls)} == {"1"}
    assert all("--resume" in call["words"] for call in made(calls))
    assert benchmark.main(arguments(workspace, *options, "--seeds", "0", "1")) == 0
    assert len(made(calls)) == 6
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines()[-20:] if line.strip().startswith("mean_teacher"))
    assert row.split()[1:8] == ["4", "2/2", "0.7105", "0.5000", "0.6053", "+5.00", "+5.00"]
    assert "50%" in row  # +0.05 of the gap of 0.10
    assert "(3 new)" in printed.splitlines()[-1]
    assert {path.name for path in output.iterdir()} == {"logs", "table.csv", "table.json", "table.png", "table.txt"}


def test_the_files_say_where_each_figure_comes_from(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace)
    lend_specs(asked, calls)
    result = run_benchmark(asked, BenchmarkOptions(cost=False))
    folder = workspace.results_folder(PHANTOM.name) / "benchmarks"
    assert result.output == folder / "2d__nano__labeled-4_draw-0__fold-0__steps-5"
    content = json.loads((result.output / "table.json").read_text())
    assert [row["role"] for row in content["rows"]] == ["twin", "method"]
    run = content["rows"][1]["runs"][0]
    assert run["run"] == f"results/{PHANTOM.name}/benchmark-4_draw-0/2d__nano__mean_teacher__seed-0"
    assert run["plans_hash"] == result.table.plan.runs[0].spec.plans_hash
    assert len(run["commit"]) >= 10
    assert run["wall_seconds_from"] == "record"
    assert str(workspace.root) not in (result.output / "table.json").read_text()
    lines = list(csv.DictReader((result.output / "table.csv").read_text().splitlines()))
    assert [line["method"] for line in lines] == ["supervised", "mean_teacher"]
    assert float(lines[1]["to_twin estimate"]) == pytest.approx(0.05)
    assert lines[1]["run_folders"] == run["run"]
    assert run["run"] in (result.output / "table.txt").read_text()
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["commit"] for line in history] == [run["commit"]] * 2


def test_a_run_that_fails_stops_no_other_and_is_shown_with_its_end(
    workspace: Workspace, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lend_specs(request(workspace), calls)
    monkeypatch.setenv("FAKE_FAILS", "supervised")
    assert benchmark.main(arguments(workspace, "--no_cost")) == 1
    captured = capsys.readouterr()
    assert "the reason why it failed" in captured.out
    assert "supervised, 4 labels, draw 0, fold 0, seed 0 ended with exit code 1" in captured.out
    assert "Not finished, so not in the figures: supervised, 4 labels" in captured.out
    assert [call["run"] for call in made(calls)] == ["2d__nano__mean_teacher__seed-0"]
    monkeypatch.delenv("FAKE_FAILS")
    assert benchmark.main(arguments(workspace, "--no_cost")) == 0
    assert [call["run"] for call in made(calls)][1:] == ["2d__nano__supervised__seed-0"]


def test_folds_of_one_run_are_never_trained_side_by_side(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace, folds=("0", "1"), jobs=4)
    lend_specs(asked, calls)
    run_benchmark(asked, BenchmarkOptions(cost=False))
    done = made(calls)
    assert len(done) == 4
    for one in done:
        for other in done:
            if one["run"] == other["run"] and one["fold"] < other["fold"]:
                assert one["to"] < other["from"] or other["to"] < one["from"]


def test_trainings_run_side_by_side_and_save_when_stopped(
    workspace: Workspace, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = request(workspace, jobs=2)
    lend_specs(asked, calls)
    monkeypatch.setenv("FAKE_WAITS", "supervised")
    monkeypatch.setattr(execute, "LOG_EVERY_S", 0.0)

    def stop(what: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        assert (what, total) == ("steps", 10)
        if done == 2 + 5:  # those of the twin, which came first and waits, and all of the other one
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_benchmark(asked, BenchmarkOptions(cost=False), stop)
    twin, method = plan_benchmark(asked).runs
    assert method.is_finished
    assert not twin.is_finished
    log = workspace.results_folder(PHANTOM.name) / "benchmarks" / plan_benchmark(asked).name / "logs"
    assert "state saved" in next(log.glob("*supervised*")).read_text()
    assert json.loads((twin.fold_folder / "benchmark.json").read_text())["attempts"][0]["exit_code"] == 3
    outlook = what_would_run(asked)
    assert [(run.row.method, left) for run, left in outlook.steps_left.items()] == [("supervised", 3)]
    assert list(outlook.seconds.values()) == [pytest.approx(3 / 10)]
    assert outlook.total_seconds == pytest.approx(3 / 20)


def test_steps_are_timed_alone_once_and_again_on_demand(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace, jobs=2)
    lend_specs(asked, calls)
    result = run_benchmark(asked)
    timing = made(calls)[2:]
    assert [call["fold"] for call in timing] == ["all"] * 3
    assert [call["run"].split("__")[2] for call in timing] == ["supervised", "mean_teacher", "supervised"]
    assert all(one["to"] < other["from"] for one, other in itertools.pairwise(timing))
    assert {call["threads"] for call in timing} == {"1"}
    assert str(workspace.root) not in " ".join(timing[0]["words"])
    twin, method = result.table.rows
    assert (result.table.cost_factor(twin.key), result.table.cost_factor(method.key)) == (1.0, pytest.approx(2.5))
    assert len(plan_benchmark(asked).runs) == len(list(workspace.results.glob("*/*/*/run.json")))
    run_benchmark(asked)
    assert len(made(calls)) == 5
    run_benchmark(asked, BenchmarkOptions(cost_steps=7))
    assert len(made(calls)) == 8
    assert "7" in made(calls)[-1]["words"]


def test_a_table_of_what_is_there_trains_nothing(
    workspace: Workspace, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(arguments(workspace, "--table_only")) == 0
    assert made(calls) == []
    assert "0/1" in capsys.readouterr().out


def test_a_dry_run_says_what_is_left(workspace: Workspace, calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lend_specs(request(workspace), calls)
    run_benchmark(request(workspace, methods=("supervised",)), BenchmarkOptions(cost=False))
    assert benchmark.main(arguments(workspace, "--dry_run", "--seeds", "0", "1")) == 0
    printed = capsys.readouterr().out
    assert "1 of 4 runs are finished; 3 would be trained on cpu." in printed
    assert "and 2 runs of methods whose speed is not known yet" in printed
    assert len(made(calls)) == 1


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_all_wrong_names_are_reported_together_before_anything_runs(
    workspace: Workspace, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--preset plain --set mean_teacher.nois=1 supervised.x=1 fixmatsch.y=2 -m mean_teacher meen_teacher"
    assert benchmark.main([*arguments(workspace), *options.split()]) == 2
    said = capsys.readouterr().err
    for part in ("'meen_teacher' is unknown", "no setting 'nois'", "no setting 'x'", "names method 'fixmatsch'"):
        assert part in said
    assert "not planned for preset 'plain'" in said
    assert benchmark.main(arguments(workspace, "--folds", "0", "7", "all", "--draws", "0", "1")) == 2
    said = capsys.readouterr().err
    assert "fold '7' does not exist" in said
    assert "fold 'all' has no validation cases" in said
    assert benchmark.main(arguments(workspace, "--labeled", "4", "40", "50")) == 2
    said = capsys.readouterr().err
    assert "40" in said
    assert "50" in said
    assert made(calls) == []
    assert not workspace.results.exists()


def test_full_labels_need_a_budget_to_be_compared_with(workspace: Workspace) -> None:
    with pytest.raises(InvalidInput, match="--full_labels without --labeled"):
        plan_benchmark(request(workspace, labeled=(), full_labels=True))


def test_runs_with_another_specification_are_refused_with_their_names(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace)
    lend_specs(asked, calls)
    run_benchmark(asked, BenchmarkOptions(cost=False))
    for options in (BenchmarkOptions(), BenchmarkOptions(table_only=True)):
        with pytest.raises(InvalidInput) as caught:
            run_benchmark(request(workspace, steps=6), options)
        assert str(caught.value).count("total_steps is 5 in run.json, 6 was asked for") == 2
        for name in ("2d__nano__supervised__seed-0", "2d__nano__mean_teacher__seed-0"):
            assert name in str(caught.value)
    spec = plan_benchmark(asked).runs[0].folder / "run.json"
    spec.write_text(spec.read_text().replace(plan_benchmark(asked).runs[0].spec.plans_hash, "0123456789"))
    with pytest.raises(InvalidInput, match="plans_hash is '0123456789' in run.json"):
        run_benchmark(asked)
    assert len(made(calls)) == 2


def test_a_batch_that_was_fitted_to_the_memory_is_no_other_specification(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace)
    lend_specs(asked, calls)
    run_benchmark(asked, BenchmarkOptions(cost=False))
    path = plan_benchmark(asked).runs[1].folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unlabeled_batch_size": 1}))
    result = run_benchmark(asked, BenchmarkOptions(cost=False))
    content = json.loads((result.output / "table.json").read_text())
    assert [row["runs"][0]["unlabeled_batch_size"] for row in content["rows"]][1] == 1
    assert len(made(calls)) == 2


def test_a_run_whose_cases_have_changed_is_refused(workspace: Workspace, calls: Path) -> None:
    asked = request(workspace)
    lend_specs(asked, calls)
    run_benchmark(asked, BenchmarkOptions(cost=False))
    run = plan_benchmark(asked).runs[0]
    case = run.spec.folds["0"].validation[0]
    path = run.folder / "run.json"
    path.write_text(path.read_text().replace(f'"{case}"', '"other"', 1))
    with pytest.raises(InvalidInput, match=r"folds.0.(labeled|validation|unlabeled) has .* without other"):
        plan_benchmark(asked)


# ---------------------------------------------------------------------------------------------------------- the parser


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    options = (
        "4 2d -m a b --labeled 4 0.20 --full_labels --draws 0 1 --folds 0 all_folds --seeds 2 3 --steps 70 "
        "--preset nano --set a.x=1 --set a.y=2 b.z=u=v --jobs 3 --num_workers 0 -o OUT --history H --verify "
        "--cost_steps 9 --device cpu --workspace W"
    )
    parsed = benchmark._parser().parse_args(options.split())
    assert benchmark._request(parsed) == BenchmarkRequest(
        dataset="4",
        configuration="2d",
        methods=("a", "b"),
        workspace=Path("W"),
        labeled=("4", "0.2"),
        draws=(0, 1),
        folds=("0", "all_folds"),
        seeds=(2, 3),
        steps=70,
        preset="nano",
        device="cpu",
        settings={"a": {"x": "1", "y": "2"}, "b": {"z": "u=v"}},
        full_labels=True,
        jobs=3,
        num_workers=0,
    )
    assert benchmark._options(parsed) == BenchmarkOptions(Path("OUT"), Path("H"), False, True, 9, True)
    bare = benchmark._parser().parse_args(["4", "2d", "-m", "a", "--no_cost", "--table_only"])
    assert benchmark._request(bare) == BenchmarkRequest("4", "2d", ("a",))
    assert benchmark._options(bare) == BenchmarkOptions(table_only=True, cost=False)
    assert [action.dest for action in benchmark._parser()._actions if not action.help] == []


@pytest.mark.parametrize(
    "wrong", ["--set a=1", "--set a.=1", "--set .x=1", "--no_cost --cost_steps 3", "--table_only --dry_run", "--jobs 0"]
)
def test_options_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(SystemExit) as caught:
        benchmark._parser().parse_args(["4", "2d", "-m", "a", *wrong.split()])
    assert caught.value.code == 2


def test_settings_and_places_reach_the_training(workspace: Workspace) -> None:
    asked = request(workspace, settings={"mean_teacher": {"noise": "0.2"}}, draws=(1,), num_workers=0)
    plan = plan_benchmark(asked)
    twin, method = (execute.train_command(plan, run) for run in plan.runs)
    assert (
        twin[1:]
        == (
            f"{PHANTOM.name} 2d 0 -m supervised --resume --preset nano --steps 5 --seed 0 --device cpu --workspace "
            f"{workspace.root} --labeled 4 --draw 1 --num_workers 0"
        ).split()
    )
    assert method[-2:] == ["--set", "noise=0.2"]
    assert plan.runs[1].folder.name.startswith("2d__nano__mean_teacher__set-")


def test_rounds_that_get_all_steps_each_are_asked_for_by_the_steps_of_one(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"self_training:full": {"full_rounds": "1"}}
    asked = request(workspace, methods=("self_training", "self_training:full"), settings=full)
    plan = plan_benchmark(asked)
    steps = {run.row.method: run.spec.total_steps for run in plan.runs}
    assert steps == {"supervised": 5, "self_training": 5, "self_training:full": 15}
    words = execute.train_command(plan, next(run for run in plan.runs if run.row.method == "self_training:full"))
    assert words[words.index("--steps") + 1] == "5"
    more = ["-m", "self_training:full", "--set", "self_training:full.full_rounds=1", "--table_only"]
    assert benchmark.main(arguments(workspace, *more)) == 0
    assert "Other steps than the twin's 5: self_training:full (15)." in capsys.readouterr().out
    assert benchmark.main(arguments(workspace, "--table_only")) == 0
    assert "Other steps" not in capsys.readouterr().out


def test_a_variant_is_a_row_with_settings_of_its_own(workspace: Workspace) -> None:
    names = ("spcl", "spcl:ablation", "spcl:gentle", "supervised:long")
    settings = {
        "spcl": {"temperature": "0.2"},
        "spcl:gentle": {"lambda_contrast": "0.01"},
        "supervised:long": {},
    }
    with pytest.raises(InvalidInput, match="'supervised:long' has the settings of supervised"):
        plan_benchmark(request(workspace, methods=names, settings=settings))
    plan = plan_benchmark(request(workspace, methods=names[:3], settings={k: settings[k] for k in list(settings)[:2]}))
    given = {run.row.method: run.settings for run in plan.runs}
    assert given == {
        "supervised": {},
        "spcl": {"temperature": "0.2"},
        "spcl:ablation": {"temperature": "0.2", **SelfPacedContrast.ablation},
        "spcl:gentle": {"temperature": "0.2", "lambda_contrast": "0.01"},
    }
    assert {run.spec.method for run in plan.runs} == {"supervised", "spcl"}
    assert len({run.folder for run in plan.runs}) == 4
    command = execute.train_command(plan, plan.runs[2])
    assert command[command.index("-m") + 1] == "spcl"
    assert "self_pacing=off" in command
    with pytest.raises(InvalidInput, match="'mean_teacher:ablation' has the settings of mean_teacher"):
        plan_benchmark(request(workspace, methods=("mean_teacher:ablation",)))


# ---------------------------------------------------------------------------------------------------------- for real


def test_a_real_run_is_verified_from_its_label_maps(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = "2d -m supervised --labeled 4 --steps 2 --device cpu --num_workers 0 --verify --no_cost --workspace"
    command = [PHANTOM.name, *options.split(), str(workspace.root)]
    assert benchmark.main(command) == 0
    assert "3 label maps of 1 runs scored again, all agree" in capsys.readouterr().out
    path = next(workspace.results.glob("*/*/*/fold_0/validation/*.nii.gz"))
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, 1, np.uint8), image.affine, image.header), path)
    assert benchmark.main([*command, "--table_only"]) == 1
    printed = capsys.readouterr().out
    assert f"supervised, 4 labels, draw 0, fold 0, seed 0, {path.name.removesuffix('.nii.gz')}, capsule:" in printed
    assert "supervised, 4 labels, mean:" in printed
