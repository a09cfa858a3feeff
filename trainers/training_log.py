"""The log of a fold: one JSON line per interval, a picture of it, and TensorBoard events where that is installed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.files import atomic_write

logger = logging.getLogger(__name__)


class IntervalMeans:
    """Sums of named values since the last line; its state is in the checkpoint, so that resumed logs are equal."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, value: float) -> None:
        """Adds one value; values that are not finite are left out (the loop counts them)."""
        if math.isfinite(value):
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Mean per name, in the order of their first value."""
        return {name: self.sums[name] / self.counts[name] for name in self.sums}

    def clear(self) -> None:
        """Starts the next interval."""
        self.sums, self.counts = {}, {}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])


class TrainingLog:
    """Appends to `log.jsonl`; lines past the step from which a run is resumed are dropped first."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        self.path = folder / "log.jsonl"
        self.picture = folder / "progress.png"
        kept = [line for line in self.read(self.path) if line["step"] <= resume_step] if resume_step else []
        with atomic_write(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._lines = kept
        self._tensorboard = _tensorboard_writer(folder)
        self._drawn_at = time.monotonic()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines; a last line that was cut off by a kill is left out."""
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                logger.warning("%s: a line is cut off and was left out", path)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and flushes it to disk."""
        self._lines.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            for group in ("losses", "measures", "learning_rate"):
                for name, value in line.get(group, {}).items():
                    self._tensorboard.add_scalar(f"{group}/{name}", value, line["step"])

    def draw(self, at_most_every_s: float = 0.0) -> None:
        """Writes `progress.png`: losses, measures, learning rate and speed over the steps; not again too soon."""
        if self._lines and time.monotonic() - self._drawn_at >= at_most_every_s:
            draw_progress(self.picture, self._lines)
            self._drawn_at = time.monotonic()

    def close(self) -> None:
        """Draws the final picture and closes the event file."""
        self.draw()
        if self._tensorboard is not None:
            self._tensorboard.close()


def draw_progress(path: Path, lines: list[dict[str, Any]]) -> None:
    """One picture of a training log: losses, measures, learning rate, speed and data wait."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).ravel()
    steps = [line["step"] for line in lines]
    panels = (("losses", "weighted loss terms"), ("measures", "measures"), ("learning_rate", "learning rate"))
    for axis, (group, title) in zip(axes, panels, strict=False):
        names = list(dict.fromkeys(name for line in lines for name in line[group]))
        for name in names:
            values = np.array([line[group].get(name, np.nan) for line in lines], dtype=float)
            axis.plot(steps, values, label=name, linewidth=1.4)
        axis.set_title(title)
        if names:
            axis.legend(fontsize=7)
    speed = axes[3]
    speed.plot(steps, [line["steps_per_second"] for line in lines], color="tab:blue", label="steps per second")
    speed.set_ylim(bottom=0)
    speed.set_title("speed, and share of the time spent waiting for data")
    wait = speed.twinx()
    wait.plot(steps, [100 * line["data_wait_share"] for line in lines], color="tab:orange", label="data wait (%)")
    wait.set_ylim(0, 100)
    speed.legend(loc="upper left", fontsize=7)
    wait.legend(loc="upper right", fontsize=7)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=90)


def _tensorboard_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
