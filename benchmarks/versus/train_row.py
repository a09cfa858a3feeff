"""A supervised training step: same network, patch and batch; each tool's own loader and augmentation beside it."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bench import DEFAULTS, OURS, Bench, Call, worker_counts
from .prepare_row import PLANS, PrepareRow

DATASET = "Dataset004_Hippocampus"
STEPS, WARM_UP = 6, 2
MUST_AGREE = ("patch_size", "input_shape", "parameters", "n_outputs")


@dataclass(frozen=True)
class TrainRow:
    """Steps in the training loop of each, until as many as asked are done; a process of its own for each repetition."""

    bench: Bench
    configuration: str
    steps: int = STEPS
    warm_up: int = WARM_UP
    """Steps before the first that counts; the loaders fill their queues meanwhile."""
    target: dict[str, float] = field(default_factory=lambda: {"time": 0.8})
    time: str = "step_s"
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each tool said of its last run; for `same_work`."""

    @property
    def name(self) -> str:
        """`train_step_` and the configuration."""
        return f"train_step_{self.configuration}"

    @property
    def what(self) -> str:
        """A sentence."""
        return f"supervised training step, {DATASET} {self.configuration}, data included, mean of {self.steps}"

    @property
    def folder(self) -> Path:
        """Raw and preprocessed data, shared by the configurations."""
        return self.bench.work / "train_step"

    def settings(self) -> dict[str, Any]:
        """What is trained, and how long."""
        return {
            "dataset": DATASET,
            "configuration": self.configuration,
            "cases": self.bench.cases or "all",
            "steps": self.steps,
            "warm_up": self.warm_up,
            "device": self.bench.device,
        }

    def prepare(self) -> None:
        """Preprocessed data of both, unless there."""
        done = self.folder / f"prepared_{self.bench.cases or 'all'}"
        if done.is_file():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        row = PrepareRow(self.bench, "train_step", DATASET)
        row.prepare()
        row.run_ours()
        row.run_theirs(1)
        done.touch()

    def variants(self) -> dict[str, Call]:
        """nnU-Net: its defaults (12 augmenting processes, or as many as cores), one, and none."""
        counts = worker_counts(self.bench, (0, 1), default=min(12, os.cpu_count() or 1))
        theirs = {f"nnunet {count} workers": self._their_call(count) for count in counts}
        return {OURS: self.run_ours, DEFAULTS: self._their_call(None), **theirs}

    def run_ours(self) -> dict[str, float]:
        """`autossl_train`'s function with its defaults, stopped after the steps."""
        task = {"dataset": DATASET, "configuration": self.configuration, "workspace": str(self.folder)}
        answer = self.bench.in_autossl("train", task | self._length, self.folder)
        return self._measured(OURS, answer.measured.to_json(), answer.content)

    def run_theirs(self, workers: int | None) -> dict[str, float]:
        """nnUNetTrainer's own methods in the order of its `run_training`."""
        task = {"dataset": DATASET, "configuration": self.configuration, "plans": PLANS}
        more = {} if workers is None else {"nnUNet_n_proc_DA": str(workers)}
        answer = self.bench.in_nnunet("train", task | self._length, self.folder, more)
        return self._measured("nnunet", answer.measured.to_json(), answer.content)

    def same_work(self) -> dict[str, Any]:
        """Network, patch and batch, as the networks saw them."""
        ours, theirs = self.last[OURS], self.last["nnunet"]
        same = all(ours[key] == theirs[key] for key in MUST_AGREE)
        facts = {name: {key: said[key] for key in (*MUST_AGREE, "threads")} for name, said in self.last.items()}
        return {"same": same, **facts}

    @property
    def _length(self) -> dict[str, int]:
        return {"steps": self.steps, "warm_up": self.warm_up}

    def _their_call(self, workers: int | None) -> Call:
        return lambda: self.run_theirs(workers)

    def _measured(self, tool: str, measured: dict[str, float], said: dict[str, Any]) -> dict[str, float]:
        self.last[tool] = said
        ends = said["ends"]
        step = (ends[-1] - ends[self.warm_up - 1]) / self.steps
        return {"step_s": round(step, 4), "until_first_step_s": round(ends[0] - said["started"], 2)} | measured


def train_rows(bench: Bench) -> list[TrainRow]:
    """3D and 2D."""
    return [TrainRow(bench, "3d_fullres"), TrainRow(bench, "2d")]
