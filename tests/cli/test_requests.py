"""Every option of a command reaches the function behind it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from autossl.cli import plan_and_preprocess, predict, train
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import RunFilter
from autossl.inference.postprocess import Rule
from autossl.inference.postprocessing_plan import PostprocessingPlan, write_postprocessing
from autossl.inference.request import PredictRequest
from autossl.planners import plan_and_preprocess as behind_planning
from autossl.planners.plan_and_preprocess import PlanRequest
from autossl.planners.plan_experiment import PlanOptions
from autossl.trainers import train as behind_training
from autossl.trainers.train import TrainRequest


def train_request(*arguments: str) -> TrainRequest:
    return train._request(train._parser().parse_args(arguments))


def predict_request(*arguments: str) -> PredictRequest:
    return predict._request(predict._parser().parse_args(arguments))


def test_training_without_options_leaves_every_decision_to_the_plan() -> None:
    assert train_request("4", "2d", "0") == TrainRequest(dataset="4", configuration="2d", folds=("0",))


def test_every_training_option_arrives() -> None:
    options = (
        "Hippocampus 3d_fullres 0 3 -m mean_teacher --preset nano --steps 70 --labeled 0.20 --draw 2 --seed 5 "
        "--device cpu --set noise=0.2 ramp_end=0.5 --set infer=teacher --tag T --init w.pth --resume --num_workers 0 "
        "--compile auto --save_probabilities --workspace W"
    )
    assert train_request(*options.split()) == TrainRequest(
        dataset="Hippocampus",
        configuration="3d_fullres",
        folds=("0", "3"),
        method="mean_teacher",
        workspace=Path("W"),
        preset="nano",
        steps=70,
        labeled="0.2",
        draw=2,
        seed=5,
        device="cpu",
        settings={"noise": "0.2", "ramp_end": "0.5", "infer": "teacher"},
        tag="T",
        initial_weights=Path("w.pth"),
        resume=True,
        num_workers=0,
        compile="auto",
        save_probabilities=True,
    )
    hours = train_request("4", "2d", "all_folds", "--hours", "1.5", "--overwrite")
    assert (hours.hours, hours.overwrite, hours.folds) == (1.5, True, ("all_folds",))
    deployed = train_request("4", "2d", "0", "--labeled", "20", "--deployment")
    assert (deployed.labeled, deployed.budget_kind) == ("20", "deployment")


def test_every_prediction_option_arrives(tmp_path: Path) -> None:
    options = (
        "-i IN -o OUT -d 4 -c 2d -m supervised --preset nano --labeled 8 --draw 1 --seed 3 --tag T -f 0 1 "
        "--save_probabilities --save_uncertainty --no_mirroring --step_size 0.7 --resume --num_parts 3 --part_id 2 "
        "--device cpu --backend torch --workspace W"
    )
    assert predict_request(*options.split()) == PredictRequest(
        input=Path("IN"),
        output=Path("OUT"),
        dataset="4",
        run=RunFilter(configuration="2d", preset="nano", method="supervised", labeled="8", draw=1, seed=3, tag="T"),
        workspace=Path("W"),
        folds=("0", "1"),
        save_probabilities=True,
        save_uncertainty=True,
        mirroring=False,
        step_size=0.7,
        resume=True,
        num_parts=3,
        part_id=2,
        device="cpu",
        backend="torch",
    )
    rule = Rule(kind="keep_largest", class_name="organ")
    write_postprocessing(tmp_path / "rules.json", PostprocessingPlan(rules=(rule,)))
    tidied = predict_request("-i", "IN", "-o", "OUT", "-d", "4", "--postprocessing", str(tmp_path / "rules.json"))
    assert tidied.postprocessing == (rule,)
    plain = predict_request("-i", "IN", "-o", "OUT", "--model", "RUN", "--overwrite")
    assert plain == PredictRequest(input=Path("IN"), output=Path("OUT"), model=Path("RUN"), overwrite=True)


def test_every_planning_option_arrives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[PlanRequest] = []

    def stand_in(request: PlanRequest, on_progress: Any) -> None:
        given.append(request)
        raise InvalidInput(Problem("far enough", "that", "nothing"))

    monkeypatch.setattr(behind_planning, "plan_and_preprocess", stand_in)
    options = (
        "-d 4 -c 2d 3d_fullres --preset nano --no_preprocessing --gpu_memory_gb 11 --overwrite_target_spacing 3 1 0.5 "
        "-np 2 --verify_dataset_integrity --remap_labels 255=1 4=3 --workspace /W -q"
    )
    assert plan_and_preprocess.main(options.split()) == 2
    assert "far enough" in capsys.readouterr().err
    expected = PlanRequest(
        dataset="4",
        workspace=Path("/W"),
        options=PlanOptions(
            preset="nano",
            gpu_memory_gb=11.0,
            overwrite_target_spacing=(3.0, 1.0, 0.5),
            configurations=("2d", "3d_fullres"),
        ),
        preprocess=False,
        n_workers=2,
        verify_dataset_integrity=True,
        remap_labels=("255=1", "4=3"),
    )
    assert given == [expected]


def test_a_stopped_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from autossl.trainers.loop import TrainingInterrupted

    def stand_in(request: TrainRequest, hooks: Any) -> None:
        raise TrainingInterrupted(12, Path("fold_0/checkpoint_latest.pth"))

    monkeypatch.setattr(behind_training, "train", stand_in)
    assert train.main(["4", "2d", "0"]) == 3
    captured = capsys.readouterr().err
    assert "stopped after step 12" in captured
    assert "--resume" in captured


@pytest.mark.parametrize(
    "arguments",
    [
        ["4", "2d"],
        ["4", "2d", "first"],
        ["4", "2d", "0", "--steps", "5", "--hours", "1"],
        ["4", "2d", "0", "--resume", "--overwrite"],
        ["4", "2d", "0", "--labeled", "0"],
        ["4", "2d", "0", "--set", "noise"],
    ],
)
def test_training_options_that_contradict_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train._parser().parse_args(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "IN", "-o", "OUT"],
        ["-i", "IN", "-o", "OUT", "-d", "4", "--model", "RUN"],
        ["-i", "IN", "-o", "OUT", "-d", "4", "--step_size", "0"],
        ["-i", "IN", "-o", "OUT", "-d", "4", "--num_parts", "0"],
    ],
)
def test_prediction_options_that_make_no_sense_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        predict._parser().parse_args(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize("command", [train, predict, plan_and_preprocess])
def test_no_option_is_left_without_a_help_text(command: Any) -> None:
    parser: argparse.ArgumentParser = command._parser()
    assert [action.dest for action in parser._actions if not action.help] == []
