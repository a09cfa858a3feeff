"""What is recommended, and how measured figures become time, disk and steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_model import tiny_plans
from untrained_experiment import PHANTOM, base_request

from autossl.cli import run
from autossl.data.problems import InvalidInput
from autossl.data.workspace import Workspace
from autossl.pipeline import length, measure
from autossl.pipeline.arrange import arrange
from autossl.pipeline.estimate import seconds_per_case, steps_within, tiles_of
from autossl.pipeline.experiment import dry_run
from autossl.pipeline.measure import Speed, speed_key
from autossl.pipeline.recommend import RECOMMENDED_METHODS, recommended_configurations, recommended_methods
from autossl.pipeline.request import ExperimentRequest
from autossl.pipeline.trainings import Experiment
from autossl.planners.plans import Plans
from autossl.trainers import speed as speed_of_steps
from autossl.trainers.setup import RunSetup
from toys import toy_architecture, toy_configuration

# --------------------------------------------------------------------------------------------------------- recommended


def plans_with(recommended: str, spacing: tuple[float, ...], *names: str) -> Plans:
    """Plans of these configurations."""
    made = {}
    for name in names:
        dims = 2 if name == "2d" else 3
        changes: dict[str, Any] = {"patch_size": (8,) * dims, "architecture": toy_architecture(dims, (2, 4))}
        made[name] = toy_configuration(dims, 1, **changes, spacing=spacing[-dims:])
    plans = tiny_plans()
    semi = plans.semi_supervised.model_copy(update={"recommended_configuration": recommended})
    return plans.model_copy(update={"configurations": made, "semi_supervised": semi})


@pytest.mark.parametrize(
    ("recommended", "spacing", "names", "chosen"),
    [
        ("2d", (1.0, 1.0, 1.0), ("2d",), ("2d",)),
        ("2d", (5.0, 1.0, 1.0), ("2d", "3d_fullres"), ("2d",)),
        ("3d_fullres", (1.0, 1.0, 1.0), ("2d", "3d_fullres"), ("3d_fullres",)),
        ("3d_fullres", (2.9, 1.0, 1.0), ("2d", "3d_fullres"), ("3d_fullres",)),
        ("3d_fullres", (3.0, 1.0, 1.0), ("2d", "3d_fullres"), ("3d_fullres", "2d")),
        ("3d_fullres", (1.0, 1.0, 1.0), ("2d", "3d_fullres", "3d_lowres"), ("3d_fullres", "3d_lowres")),
    ],
)
def test_configurations_follow_from_the_plan(
    recommended: str, spacing: tuple[float, ...], names: tuple[str, ...], chosen: tuple[str, ...]
) -> None:
    found, why = recommended_configurations(plans_with(recommended, spacing, *names))
    assert found == chosen
    assert why
    assert ("as far apart" in why) == (len(chosen) == 2 and "2d" in chosen)


def test_without_unlabeled_cases_there_is_no_method() -> None:
    assert recommended_methods(3)[0] == RECOMMENDED_METHODS == ("mean_teacher", "cps")
    assert recommended_methods(0)[0] == ()


# ----------------------------------------------------------------------------------------------------------- estimates


def test_tiles_are_those_of_the_sliding_window() -> None:
    assert tiles_of((10, 8, 8), (8, 8)) == 10
    assert tiles_of((10, 16, 8), (8, 8)) == 30
    assert tiles_of((8, 8, 8), (8, 8, 8)) == 1
    assert tiles_of((12, 8, 4), (8, 8, 8)) == 2


def test_a_case_takes_the_forward_passes_of_its_tiles_and_mirrored_views() -> None:
    plan = toy_configuration(
        2, 1, patch_size=(8, 8), architecture=toy_architecture(2, (2, 4)), mirror_axes=(0, 1), labeled_batch_size=4
    )
    # a step of 4 patches takes 12 passes of a patch in 1.2 s; 10 slices, 4 views, 5 networks
    assert seconds_per_case(plan, (10, 8, 8), 1.2, 5) == pytest.approx(10 * 4 * 5 * 0.1)


def test_hours_are_divided_so_that_all_take_the_same_number_of_steps() -> None:
    per_step = [0.1] * 5 + [0.3] * 5  # five folds of the twin and of a method
    assert steps_within(1.0, per_step, 0.0) == int(3600 * 0.95 / 2)
    assert steps_within(1.0, per_step, 420.0) == 1500
    assert steps_within(1.0, per_step, 420.0, n_devices=2) == 3000
    with pytest.raises(InvalidInput, match="100 steps: 0.17 h"):
        steps_within(0.1, per_step, 380.0)


# ------------------------------------------------------------------------------------------------------------- measured


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Made-up speeds; gives the methods that were measured."""
    measured: list[str] = []

    def made_up(setups: list[RunSetup], path: Any, on_done: Any = None) -> list[Speed]:
        measured.extend(setup.method.name for setup in setups)
        seconds = {"supervised": 0.1, "mean_teacher": 0.25}
        found = [Speed("2d", s.method.name, speed_key(s), seconds[s.method.name], 2e9, 3e6, "cpu", 1) for s in setups]
        measure.write_speeds(path, found)
        return found

    monkeypatch.setattr(length, "measure_all", made_up)
    monkeypatch.setattr("autossl.pipeline.experiment.measure_all", made_up)
    return measured


def test_hours_are_decided_once(workspace: Workspace, speeds: list[str]) -> None:
    request = replace(base_request(workspace.root), steps=None, hours=0.1)
    first = arrange(request)
    assert speeds == ["supervised", "mean_teacher"]
    assert [training.role for training in first.trainings] == ["twin", "method"]
    assert 0.9 * 360 < seconds_of(first) <= 0.95 * 360
    again = arrange(request)
    assert [training.spec.total_steps for training in again.trainings] == [first.trainings[0].spec.total_steps] * 2
    assert len(speeds) == 2
    planned = first.trainings[0].setup.plans.semi_supervised.total_steps
    enough = arrange(replace(request, hours=planned * 2.5 / 3600))  # a step of all folds of all three takes 1.8 s
    assert [training.role for training in enough.trainings] == ["twin", "method", "equal time"]
    assert enough.trainings[0].spec.total_steps >= planned
    assert seconds_of(enough) <= 0.95 * planned * 2.5


def seconds_of(experiment: Experiment) -> float:
    """Three folds of every run, by the made-up speeds."""
    per_step = {"supervised": 0.1, "mean_teacher": 0.25}
    return sum(3 * training.spec.total_steps * per_step[training.method] for training in experiment.trainings)


def test_equal_time_is_a_longer_supervised_run(workspace: Workspace, speeds: list[str]) -> None:
    experiment = arrange(replace(base_request(workspace.root), equal_time=True))
    by_role = {training.role: training for training in experiment.trainings}
    assert by_role["equal time"].spec.total_steps == 10  # 4 steps of 0.25 s
    assert by_role["equal time"].folder.name == "2d__nano__supervised__equal-time__seed-0"
    assert by_role["twin"].spec.total_steps == by_role["method"].spec.total_steps == 4


def test_a_dry_run_says_what_every_step_takes(
    workspace: Workspace, speeds: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    outlook = dry_run(base_request(workspace.root))
    estimates = {step.name: estimate for step, _, estimate in outlook.steps}
    twin, method = estimates["train 2d supervised fold 0"], estimates["train 2d mean_teacher fold 0"]
    assert twin.seconds is not None
    assert method.seconds is not None
    assert method.seconds - twin.seconds == pytest.approx(4 * (0.25 - 0.1))
    assert method.memory_bytes == outlook.memory_bytes == 2e9
    assert outlook.seconds > 3 * 4 * (0.1 + 0.25)
    assert not list(workspace.results.glob("*/*/*/run.json"))
    words = f"{PHANTOM.name} -c 2d -m mean_teacher --preset nano --labeled 3 --steps 4 --device cpu --dry_run -np 1"
    assert run.main([*words.split(), "--workspace", str(workspace.root)]) == 0
    printed = capsys.readouterr().out
    assert "train 2d mean_teacher fold 2" in printed
    assert "2.0 GB of memory at most" in printed
    assert "methods: named by the user" in printed


def test_a_step_is_measured_on_made_up_images(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_of_steps, "TRIAL_STEPS", 2)
    monkeypatch.setattr(speed_of_steps, "MEASURED_STEPS", 1)
    setup = arrange(replace(base_request(workspace.root), num_workers=0)).trainings[1].setup
    speed = measure.measure(setup)
    assert (speed.configuration, speed.method, speed.key) == ("2d", "mean_teacher", speed_key(setup))
    assert speed.seconds_per_step > 0
    weights = sum(value.numel() for value in setup.job("0", 10).build_network().parameters())
    assert speed.state_bytes >= 4 * 4 * weights  # weights, gradients, momentum, and the teacher's
    assert speed_key(replace(setup, device="cuda")) != speed.key


# ----------------------------------------------------------------------------------------------------------- the parser


def test_every_option_arrives() -> None:
    options = (
        "4 -c 2d 3d_fullres -m a b --preset nano --hours 2.5 --labeled 0.20 --draw 1 --seed 2 --set a.x=1 --tag T "
        "--final a --equal_time -n 3 --num_workers 0 -np 2 --engine local --device cpu"
    )
    assert run._request(run._parser().parse_args(options.split())) == ExperimentRequest(
        dataset="4",
        configurations=("2d", "3d_fullres"),
        methods=("a", "b"),
        preset="nano",
        labeled="0.2",
        draw=1,
        hours=2.5,
        seed=2,
        device="cpu",
        settings={"a": {"x": "1"}},
        tag="T",
        final="a",
        equal_time=True,
        n_label_next=3,
        num_workers=0,
        num_processes=2,
    )
    assert run._request(run._parser().parse_args(["4"])) == ExperimentRequest("4")
    assert [action.dest for action in run._parser()._actions if not action.help] == []


@pytest.mark.parametrize("wrong", ["--steps 5 --hours 1", "--dry_run --step x", "--labeled 0", "--set a=1", "-n 0"])
def test_options_that_make_no_sense_are_refused(wrong: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run._parser().parse_args(["4", *wrong.split()])
    assert caught.value.code == 2
