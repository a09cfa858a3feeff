"""The log of a fold: one JSON line per interval, a picture of it, and TensorBoard events where that is installed."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.checksums import with_checksum, without_checksum
from autossl.data.files import append_text, atomic_write

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
    """Appends to `log.jsonl`, each line with its checksum; lines past the step where a run goes on are dropped first.

    Args:
        folder: of the fold.
        resume_step: where the run goes on; 0: it starts.
        n_lines: how many lines it had written up to there; where fewer are left, it says so.
    """

    def __init__(self, folder: Path, resume_step: int = 0, n_lines: int = 0) -> None:
        self.path = folder / "log.jsonl"
        self.picture = folder / "progress.png"
        kept = [line for line in self.read(self.path) if line["step"] <= resume_step] if resume_step else []
        if len(kept) < n_lines:
            lost = n_lines - len(kept)
            logger.warning("%s: %d of %d lines are lost; the training itself is as it was", self.path, lost, n_lines)
        with atomic_write(self.path) as partial:
            partial.write_text("".join(_text(line) for line in kept), encoding="utf-8")
        self._lines = kept
        self._tensorboard = _tensorboard_writer(folder)
        self._drawn_at = time.monotonic()
        self._n_drawn = 0

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All whole lines; damaged ones are named and left out, such as a last line that was cut off by a kill."""
        lines = []
        texts = path.read_bytes().decode("utf-8", errors="replace").splitlines() if path.is_file() else []
        for number, text in enumerate(texts, 1):
            try:
                content = json.loads(text)
                if not isinstance(content, dict) or "step" not in content:
                    raise ValueError("not a line of a log")
                lines.append(without_checksum(content))
            except ValueError:  # not JSON, or not what was written
                logger.warning("%s: line %d is damaged and was left out", path, number)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line and waits until it is on the disk."""
        self._lines.append(line)
        append_text(self.path, _text(line))
        if self._tensorboard is not None:
            for group in ("losses", "measures", "learning_rate"):
                for name, value in line.get(group, {}).items():
                    self._tensorboard.add_scalar(f"{group}/{name}", value, line["step"])

    def draw(self, at_most_every_s: float = 0.0) -> None:
        """Writes `progress.png`: losses, measures, learning rate and speed over the steps; not again too soon."""
        new = len(self._lines) > self._n_drawn
        if new and time.monotonic() - self._drawn_at >= at_most_every_s:
            draw_progress(self.picture, self._lines)
            self._drawn_at, self._n_drawn = time.monotonic(), len(self._lines)

    def close(self) -> None:
        """Draws the final picture and closes the event file."""
        self.draw()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _text(line: dict[str, Any]) -> str:
    return json.dumps(with_checksum(line)) + "\n"


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
