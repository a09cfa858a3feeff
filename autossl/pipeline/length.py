"""How many steps each run takes: as asked, as planned, or as many as the hours allow by measured speeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autossl.data.files import read_json, write_json
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.pipeline.costs import seconds_besides_training, training_devices
from autossl.pipeline.estimate import steps_within
from autossl.pipeline.measure import FILE as SPEEDS
from autossl.pipeline.measure import OnMeasured, Speed, measure_all
from autossl.pipeline.recommend import TWIN
from autossl.pipeline.request import ExperimentRequest
from autossl.pipeline.trainings import Role
from autossl.trainers.setup import RunSetup

HOURS_FILE = "hours.json"
"""What was decided by measured speeds: the same command finds it again and trains the same number of steps."""
EQUAL_TIME = "equal-time"
"""Tag of the supervised run that takes as long as the slowest method."""


@dataclass(frozen=True)
class Length:
    """Of the runs of an experiment."""

    steps: int
    why: str
    equal_time: tuple[tuple[RunSetup, int], ...] = ()
    """Supervised runs that take as long as the slowest method of their configuration, with their steps."""


def decide_length(
    request: ExperimentRequest, setups: Sequence[tuple[Role, RunSetup]], folder: Path, on_measure: OnMeasured | None
) -> Length:
    """The length, and the runs of equal time.

    With hours, equal time is trained where all runs together still get the plan's number of steps.

    Raises:
        InvalidInput: the hours are too few.
    """
    planned = setups[0][1].plans.semi_supervised.total_steps
    if request.hours is None and not request.equal_time:
        return Length(request.steps or planned, "as asked" if request.steps else "the plan's")
    asked = {
        "hours": request.hours,
        "steps": request.steps,
        "equal_time": request.equal_time,
        "runs": [[setup.request.configuration, setup.plans.hash(), setup.method.name] for _, setup in setups],
        "settings": {name: dict(values) for name, values in request.settings.items()},
        "seed": request.seed,
        "tag": request.tag,
    }
    path = folder / HOURS_FILE
    known = read_json(path)["decisions"] if path.is_file() else []
    decision = next((entry for entry in known if entry["asked"] == asked), None)
    if decision is None:
        speeds = measure_all([setup for _, setup in setups], folder / SPEEDS, on_measure)
        decision = {"asked": asked, **_decide(request, [setup for _, setup in setups], speeds)}
        written = Written.now().model_dump(mode="json")
        write_json(path, {"decisions": [*known, decision], "written": written})
    twins = {setup.request.configuration: setup for role, setup in setups if role == "twin"}
    tag = f"{request.tag}-{EQUAL_TIME}" if request.tag else EQUAL_TIME
    equal = [
        (replace(twins[name], request=replace(twins[name].request, tag=tag)), int(steps))
        for name, steps in decision["equal_time_steps"].items()
    ]
    return Length(int(decision["steps"]), str(decision["why"]), tuple(equal))


def _decide(request: ExperimentRequest, setups: Sequence[RunSetup], speeds: Sequence[Speed]) -> dict[str, Any]:
    """The same number of steps for all runs, and longer supervised runs where they fit in."""
    planned, n_folds = setups[0].plans.semi_supervised.total_steps, len(setups[0].folds)
    seconds: dict[tuple[str, str], float] = {}
    for setup, speed in zip(setups, speeds, strict=True):
        factor = setup.method.total_steps(planned, setup.settings) / planned
        seconds[setup.request.configuration, setup.method.name] = speed.seconds_per_step * factor
    slowest: dict[str, float] = {}
    for (configuration, _), value in seconds.items():
        slowest[configuration] = max(slowest.get(configuration, 0.0), value)
    shares = {name: value / seconds[name, TWIN] for name, value in slowest.items() if value > seconds[name, TWIN]}
    steps, why, with_equal = request.steps or planned, "as asked", request.equal_time
    if request.hours is not None:
        other, devices = seconds_besides_training(setups, speeds), len(training_devices(setups[0].device))
        alone = [value for value in seconds.values() for _ in range(n_folds)]
        more = [*alone, *(slowest[name] for name in shares for _ in range(n_folds))]
        with_equal = with_equal or _fits(request.hours, more, other, devices, planned)
        steps = steps_within(request.hours, more if with_equal else alone, other, devices)
        why = f"{request.hours:g} h for {len(seconds)} runs of {n_folds} folds, by measured speeds"
    equal = {name: round(steps * share) for name, share in shares.items()} if with_equal else {}
    measured = {f"{name} {method}": round(value, 4) for (name, method), value in seconds.items()}
    return {"steps": steps, "why": why, "equal_time_steps": equal, "seconds_per_step": measured}


def _fits(hours: float, seconds_per_step: Sequence[float], other: float, n_devices: int, wanted: int) -> bool:
    try:
        return steps_within(hours, seconds_per_step, other, n_devices) >= wanted
    except InvalidInput:
        return False
