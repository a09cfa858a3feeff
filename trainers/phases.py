"""The timetable of a run: which steps belong to which phase, and when a pseudo-label store is refreshed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autossl.trainers.base import Phase, Progress, Refresh


@dataclass(frozen=True)
class Span:
    """A phase with its steps [start, end)."""

    phase: Phase
    start: int
    end: int


class Timetable:
    """Phases on whole steps. Shares are normalized; borders are the rounded cumulative shares.

    Raises:
        ValueError: no phase, a share that is not positive, or a phase that would get no step.
    """

    def __init__(self, phases: Sequence[Phase], total: int, seed: int = 0, rank: int = 0) -> None:
        if not phases or any(phase.share <= 0 for phase in phases):
            raise ValueError(f"a method needs phases with positive shares, got {[(p.name, p.share) for p in phases]}")
        self.total, self._seed, self._rank = total, seed, rank
        whole = sum(phase.share for phase in phases)
        borders, passed = [0], 0.0
        for phase in phases:
            passed += phase.share
            borders.append(round(total * passed / whole))
        self.spans = [Span(p, start, end) for p, start, end in zip(phases, borders[:-1], borders[1:], strict=True)]
        for span in self.spans:
            if span.end <= span.start:
                raise ValueError(f"phase '{span.phase.name}' gets no step of {total}: train for more steps")
        refreshes = [
            (span.start if refresh.at is None else round(refresh.at * total), refresh)
            for span in self.spans
            for refresh in span.phase.refreshes
        ]
        self.refreshes: list[tuple[int, Refresh]] = sorted(refreshes, key=lambda entry: entry[0])

    def index_at(self, step: int) -> int:
        """Index of the phase that the step belongs to; the last one from its end on."""
        for index, span in enumerate(self.spans):
            if step < span.end:
                return index
        return len(self.spans) - 1

    def next_border(self, step: int) -> int:
        """The first step after `step` at which a phase begins, a store is refreshed, or the run ends."""
        borders = [span.end for span in self.spans] + [at for at, _ in self.refreshes if at < self.total]
        return min(border for border in borders if border > step)

    def progress(self, step: int, pool_passes: float = 0.0) -> Progress:
        """The `Progress` of a step."""
        span = self.spans[self.index_at(step)]
        return Progress(
            step=step,
            total=self.total,
            phase=span.phase.name,
            phase_start=span.start,
            phase_end=span.end,
            pool_passes=pool_passes,
            seed=self._seed,
            rank=self._rank,
        )
