"""The runs of an experiment and where their files lie."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from autossl.data.runs import RunSpec, run_folder
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark.results import median_steps_per_second
from autossl.pipeline.measure import FILE as SPEEDS
from autossl.pipeline.measure import Speed, read_speeds, speed_key
from autossl.pipeline.request import ExperimentRequest
from autossl.trainers.setup import RunSetup

Role = Literal["twin", "method", "equal time"]


@dataclass(frozen=True, eq=False)
class Training:
    """One run of the experiment, with all its folds."""

    role: Role
    setup: RunSetup
    spec: RunSpec
    asked_steps: int
    """Before the method made more of it."""

    @property
    def folder(self) -> Path:
        """Of the run."""
        return run_folder(self.setup.workspace, self.spec)

    @property
    def method(self) -> str:
        """Its name."""
        return self.spec.method

    @property
    def configuration(self) -> str:
        """Its name."""
        return self.spec.configuration

    @property
    def folds(self) -> list[str]:
        """Numbers as text."""
        return list(self.setup.folds)

    @property
    def name(self) -> str:
        """In words."""
        tag = f" {self.spec.tag}" if self.spec.tag else ""
        return f"{self.configuration} {self.method}{tag}"

    def fold_folder(self, fold: str) -> Path:
        """Where a fold is trained."""
        return self.folder / f"fold_{fold}"

    def summary(self, fold: str) -> Path:
        """Scores of a fold's validation cases, written last."""
        return self.fold_folder(fold) / "validation" / "summary.json"

    def measured_seconds_per_step(self, fold: str | None = None) -> float | None:
        """From the logs of its folds, finished or not; None where nothing was trained. A fold's own log comes first."""
        folders = [self.fold_folder(name) for name in ([fold] if fold is not None else self.folds)]
        speeds = [speed for folder in folders if (speed := median_steps_per_second(folder))]
        if not speeds and fold is not None:
            return self.measured_seconds_per_step()
        return 1 / statistics.median(speeds) if speeds else None


@dataclass(frozen=True)
class Experiment:
    """A checked request: what will be trained, and why."""

    request: ExperimentRequest
    workspace: Workspace
    trainings: tuple[Training, ...]
    """Per configuration the twin, then the methods."""
    why: Mapping[str, str]
    """Of configurations, methods and steps."""

    @property
    def dataset(self) -> str:
        """Full name."""
        return self.trainings[0].setup.raw.name

    @property
    def split(self) -> str:
        """Name."""
        return self.trainings[0].setup.split.name

    @property
    def folder(self) -> Path:
        """results/DATASET/SPLIT."""
        return self.workspace.results_folder(self.dataset) / self.split

    @property
    def preset(self) -> str:
        """Of the plans."""
        return self.trainings[0].spec.preset

    @property
    def device(self) -> str:
        """Resolved."""
        return self.trainings[0].setup.device

    @property
    def methods(self) -> list[str]:
        """Besides the twin."""
        return list(dict.fromkeys(training.method for training in self.trainings if training.role == "method"))

    @property
    def configurations(self) -> list[str]:
        """In their order."""
        return list(dict.fromkeys(training.configuration for training in self.trainings))

    def twin(self, configuration: str) -> Training:
        """The supervised run that the methods of a configuration are compared with."""
        return next(t for t in self.trainings if t.role == "twin" and t.configuration == configuration)

    @cached_property
    def _speeds(self) -> dict[str, Speed]:
        return {speed.key: speed for speed in read_speeds(self.folder / SPEEDS)}

    def speed(self, training: Training) -> Speed | None:
        """What was measured on made-up images; None where nothing was."""
        return self._speeds.get(speed_key(training.setup))

    def seconds_per_step(self, training: Training, fold: str | None = None) -> float | None:
        """From its logs, else as measured on made-up images; None where neither is there."""
        speed = self.speed(training)
        return training.measured_seconds_per_step(fold) or (speed.seconds_per_step if speed else None)
