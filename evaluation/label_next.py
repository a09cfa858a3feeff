"""Which unlabeled cases are worth labeling next: a ranking with its reasons, a pure function of what was measured.

A case is worth labeling for what it tells about the pool: it should resemble many cases on which the trained networks
disagree and in which there is much to outline, and which resemble nothing that is labeled or chosen already. The list
is made greedily; the next case c is the one with the largest

    gain(c) = Σᵢ needᵢ · max(0, k(i, c) - kᵢ) / Σᵢ needᵢ,    k(i, c) = exp(-(d(i, c) / h)²)

over all candidates i, where kᵢ is the largest k(i, ·) of a labeled or earlier case, d the distance of two scans by
appearance and predicted volumes, h its median, and needᵢ the mean of two terms from 0 to 1:

- *disagreement*: the case's place among all candidates (mid-rank) by 1 - Dice between the folds of a run and between
  runs. Disagreement of members is the sort of score that did best among plain ones for segmentation (nnActive, arXiv
  2511.19183).
- *volume*: mean over the classes of predicted volume / median labeled volume, at most 1. Choosing among cases that show
  much foreground is what is hard to beat by any score (same study).

This is facility location, whose greedy choice reaches at least 63 % of the best gain (Nemhauser, Wolsey and Fisher,
1978). Shift from the labeled pool and diversity of the list need no weights of their own: near what is labeled or
chosen nothing is gained. Scans of one patient and duplicates count as the same case.

The sum over the pool is what matters with few labels. The first version of this ranking took the cases with the largest
disagreement and shift themselves, as one would with many labels; with 8 of them these were the odd ones of the pool,
and a short training with 8 more such cases was worse than with 8 at random, and than without (docs/labeling.md). That
few labels ask for typical cases is known (Hacohen et al., arXiv 2202.02794). benchmarks/label_next_simulation.py
measures what the ranking is worth.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from autossl.data.labels import LabelSchema

FloatArray = npt.NDArray[np.float64]
LabelMap = npt.NDArray[np.integer[Any]]
VOXELS_AT_ONCE = 2**22
MAX_DEVIATION = 5.0
"""Standardized features are cut here, so that one odd number does not decide a distance."""
ROUNDING = 1e-6
"""Of a distance between equal scans."""
NOTEWORTHY = 0.5
"""Terms from here on are given as reasons; the largest one always is."""


@dataclass(frozen=True)
class Weights:
    """Of the terms in the need of a case."""

    disagreement: float = 0.5
    volume: float = 0.5


@dataclass(frozen=True)
class CaseEvidence:
    """What was measured of a candidate."""

    case: str
    patient: str
    fold_disagreement: float | None
    """Mean of 1 - Dice over pairs of folds, classes and runs; None: no run with two folds, or nothing predicted."""
    run_disagreement: float | None
    """The same between the majority votes of the runs; None: one run, or nothing predicted."""
    volumes: Mapping[str, float]
    """Class → predicted volume in mm³ (mm² in 2D), by the vote of all networks."""
    features: Mapping[str, Sequence[float]]
    """Group ("spacing", "size", …) → numbers that describe the scan, as many for every case."""


@dataclass(frozen=True)
class LabeledPool:
    """The labeled cases, to compare with."""

    cases: tuple[str, ...]
    patients: frozenset[str]
    features: tuple[Mapping[str, Sequence[float]], ...]
    """Per case, in the groups of the candidates."""
    median_volumes: Mapping[str, float | None]
    """Class → median where it is present; None where no labeled case shows it."""


@dataclass(frozen=True)
class RankedCase:
    """A candidate with its place, the terms of its score and the reasons in words."""

    case: str
    rank: int | None
    """From 1; None: not among those asked for."""
    score: float
    """Its gain when it was chosen; for the others, after all that were chosen."""
    terms: Mapping[str, float]
    """disagreement, volume; shift: 1 - 1 / the measured ratio; closeness: to the nearest labeled or earlier case."""
    measured: Mapping[str, Any]
    reasons: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "reasons": list(self.reasons)}


def class_disagreement(label_maps: Sequence[LabelMap], schema: LabelSchema) -> dict[str, float]:
    """Class → mean of 1 - Dice over the pairs of label maps [z,y,x] of which one or both show it; NaN where none does.

    Raises:
        ValueError: fewer than two label maps, or of different shapes.
    """
    if len(label_maps) < 2 or len({label_map.shape for label_map in label_maps}) != 1:
        raise ValueError(f"{len(label_maps)} label maps of shapes {sorted({m.shape for m in label_maps})}")
    flat = [label_map.reshape(-1) for label_map in label_maps]
    shared = {name: np.zeros((len(flat), len(flat))) for name in schema.foreground}
    for start in range(0, flat[0].size, VOXELS_AT_ONCE):
        part = np.stack([values[start : start + VOXELS_AT_ONCE] for values in flat])
        part = part[:, part.any(axis=0)]
        for name, values in schema.foreground.items():
            masks = np.isin(part, values).astype(np.float32)
            shared[name] += masks @ masks.T
    return {name: _mean_loss(overlap) for name, overlap in shared.items()}


def disagreement(label_maps: Sequence[LabelMap], schema: LabelSchema) -> float | None:
    """Mean over the classes of `class_disagreement`; None where no map shows any class."""
    defined = [value for value in class_disagreement(label_maps, schema).values() if not math.isnan(value)]
    return float(np.mean(defined)) if defined else None


def majority_vote(label_maps: Sequence[LabelMap]) -> LabelMap:
    """The most frequent value of each voxel; of equally frequent ones the smallest."""
    if len(label_maps) == 1:
        return label_maps[0]
    best = np.zeros(label_maps[0].shape, dtype=np.int16)
    result = np.zeros_like(label_maps[0])
    for value in np.unique(np.concatenate([np.unique(label_map) for label_map in label_maps])):
        votes = np.stack([label_map == value for label_map in label_maps]).sum(axis=0, dtype=np.int16)
        more = votes > best
        best[more], result[more] = votes[more], value
    return result


def rank_cases(
    candidates: Sequence[CaseEvidence],
    labeled: LabeledPool,
    n: int,
    weights: Weights | None = None,
    alike: Collection[frozenset[str]] = (),
) -> list[RankedCase]:
    """The `n` cases to label next in this order, then all others by their score.

    Args:
        candidates: unlabeled cases.
        labeled: what is labeled already.
        n: how many to choose.
        weights: of the terms.
        alike: pairs of ids that show the same image.
    """
    if not candidates:
        return []
    weights = weights or Weights()
    distances = _Distances(candidates, labeled)
    terms = {
        "disagreement": _places([_disagreement_of(case) for case in candidates]),
        "volume": np.array([_volume_term(case, candidates, labeled) for case in candidates]),
    }
    need = np.sum([getattr(weights, name) * term for name, term in terms.items()], axis=0)
    terms["shift"] = np.clip(1 - 1 / np.maximum(distances.shift_ratio, 1), 0, 1)
    known = np.array([_is_known(case, labeled, alike) for case in candidates])
    middle = _medians(candidates)
    result = []
    for place, choice in enumerate(_choose(candidates, need, known, distances, n, alike), 1):
        case, index = candidates[choice.index], choice.index
        own = {name: float(term[index]) for name, term in terms.items()} | {"closeness": choice.closeness}
        measured = _measured(case, distances, index) | {"represents": choice.represents}
        result.append(
            RankedCase(
                case=case.case,
                rank=place if place <= n else None,
                score=round(choice.gain, 4),
                terms={name: round(term, 4) for name, term in own.items()},
                measured=measured,
                reasons=_reasons(case, own, measured, middle, labeled),
            )
        )
    return result


@dataclass(frozen=True)
class _Choice:
    index: int
    gain: float
    closeness: float
    """To the nearest labeled or earlier case."""
    represents: int
    """Candidates that resemble it more than any labeled or earlier case."""


def _choose(
    candidates: Sequence[CaseEvidence],
    need: FloatArray,
    known: npt.NDArray[np.bool_],
    distances: _Distances,
    n: int,
    alike: Collection[frozenset[str]],
) -> list[_Choice]:
    """The `n` best one after the other, then the others; of cases that gain the same, the needier one."""
    alike_to, covered = distances.closeness(), np.where(known, 1.0, distances.closeness_to_labeled())
    alike_to[known] = 0.0  # what they show is known
    left = set(range(len(candidates)))
    chosen: list[_Choice] = []
    total = float(need.sum()) or 1.0

    def choices() -> list[_Choice]:
        more = np.maximum(alike_to - covered, 0.0)
        gains = np.round(more @ need / total, 12)  # so that sums of equal numbers tie
        found = [_Choice(i, float(gains[i]), float(covered[i]), int((more[i] > 0).sum())) for i in left]
        return sorted(found, key=lambda c: (-c.gain, -need[c.index], candidates[c.index].case))

    while left and len(chosen) < n:
        best = choices()[0]
        chosen.append(best)
        left.remove(best.index)
        for index, other in enumerate(candidates):
            if _belong_together(candidates[best.index], other, alike):
                alike_to[index] = np.minimum(alike_to[index], alike_to[best.index])
                covered[index] = 1.0
        covered = np.maximum(covered, alike_to[best.index])
    return chosen + choices()


# ------------------------------------------------------------------------------------------------------------- terms


def _mean_loss(overlap: FloatArray) -> float:
    """Mean 1 - Dice of the pairs, of a matrix with sizes on its diagonal and intersections beside it."""
    size = overlap.diagonal()
    pairs = [(i, j) for i, j in combinations(range(len(size)), 2) if size[i] + size[j] > 0]
    losses = [1 - 2 * overlap[i, j] / (size[i] + size[j]) for i, j in pairs]
    return float(np.mean(losses)) if losses else math.nan


def _disagreement_of(case: CaseEvidence) -> float:
    known = [value for value in (case.fold_disagreement, case.run_disagreement) if value is not None]
    return float(np.mean(known)) if known else 0.0


def _places(values: Sequence[float]) -> FloatArray:
    """Mid-ranks as shares: (rank - 1/2) / n; equal values share theirs."""
    return (np.asarray(rankdata(values), dtype=np.float64) - 0.5) / len(values)


def _volume_term(case: CaseEvidence, candidates: Sequence[CaseEvidence], labeled: LabeledPool) -> float:
    shares = []
    for name, volume in case.volumes.items():
        usual = labeled.median_volumes.get(name)
        if not usual:
            shown = [other.volumes[name] for other in candidates if other.volumes[name] > 0]
            usual = float(np.median(shown)) if shown else 0.0
        if usual > 0:
            shares.append(min(1.0, volume / usual))
    return float(np.mean(shares)) if shares else 0.0


def _is_known(case: CaseEvidence, labeled: LabeledPool, alike: Collection[frozenset[str]]) -> bool:
    return case.patient in labeled.patients or any(frozenset((case.case, other)) in alike for other in labeled.cases)


def _belong_together(one: CaseEvidence, other: CaseEvidence, alike: Collection[frozenset[str]]) -> bool:
    return one.patient == other.patient or frozenset((one.case, other.case)) in alike


class _Distances:
    """Euclidean distances between cases in standardized features, each group of them with the same weight."""

    def __init__(self, candidates: Sequence[CaseEvidence], labeled: LabeledPool) -> None:
        everyone = [case.features for case in candidates] + list(labeled.features)
        self.groups = list(everyone[0])
        blocks = [_standardized(np.array([features[group] for features in everyone])) for group in self.groups]
        self._blocks = [block[: len(candidates)] for block in blocks]
        known = [block[len(candidates) :] for block in blocks]
        points = np.concatenate(self._blocks, axis=1)
        self._between = _pairwise(points, points)
        others = self._between[np.triu_indices(len(points), 1)]
        self._usual = float(np.median(others)) if len(others) else 0.0
        anchors = np.concatenate(known, axis=1)
        self._to_labeled = _pairwise(points, anchors)
        self.nearest = [int(index) for index in self._to_labeled.argmin(1)] if len(anchors) else []
        self.shift_ratio = _ratio(self._to_labeled, _pairwise(anchors, anchors))
        self._known = known

    def closeness(self) -> FloatArray:
        """[candidates, candidates] exp(-(d/h)²)."""
        return self._kernel(self._between)

    def closeness_to_labeled(self) -> FloatArray:
        """[candidates] the same to the nearest labeled case; 0 where none is labeled."""
        if not self.nearest:
            return np.zeros(len(self._between))
        return self._kernel(self._to_labeled.min(axis=1))

    def _kernel(self, distance: FloatArray) -> FloatArray:
        if self._usual == 0:
            return np.asarray(distance < ROUNDING, dtype=np.float64)
        return np.asarray(np.exp(-((distance / self._usual) ** 2)), dtype=np.float64)

    def odd_group(self, index: int) -> str | None:
        """The group of features in which a candidate differs most from its nearest labeled case."""
        if not self.nearest:
            return None
        nearest = self.nearest[index]
        parts = [
            float(np.sum((own[index] - known[nearest]) ** 2))
            for own, known in zip(self._blocks, self._known, strict=True)
        ]
        return self.groups[int(np.argmax(parts))] if max(parts, default=0) > 0 else None


def _standardized(values: FloatArray) -> FloatArray:
    """[cases, features] about their medians in standard deviations, cut, and weighted by 1/√features."""
    deviation = values.std(axis=0)
    safe = np.where(deviation > 0, deviation, 1)
    scaled = np.clip((values - np.median(values, axis=0)) / safe, -MAX_DEVIATION, MAX_DEVIATION)
    return np.asarray(scaled / math.sqrt(max(1, values.shape[1])), dtype=np.float64)


def _pairwise(ours: FloatArray, theirs: FloatArray) -> FloatArray:
    squares = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    return np.sqrt(np.maximum(squares, 0))


def _ratio(to_labeled: FloatArray, among_labeled: FloatArray) -> FloatArray:
    """Distance to the nearest labeled case over the median of the same among these; 1 where none is known."""
    if not to_labeled.shape[1]:
        return np.ones(len(to_labeled))
    nearest = to_labeled.min(axis=1)
    usual = 0.0
    if len(among_labeled) > 1:
        usual = float(np.median((among_labeled + np.diag(np.full(len(among_labeled), np.inf))).min(axis=1)))
    usual = usual or float(np.median(nearest))
    return nearest / usual if usual > 0 else np.ones(len(nearest))


# ----------------------------------------------------------------------------------------------------------- reasons


def _measured(case: CaseEvidence, distances: _Distances, index: int) -> dict[str, Any]:
    return {
        "fold_dice": None if case.fold_disagreement is None else round(1 - case.fold_disagreement, 4),
        "run_dice": None if case.run_disagreement is None else round(1 - case.run_disagreement, 4),
        "volumes": {name: round(volume, 1) for name, volume in case.volumes.items()},
        "shift_ratio": round(float(distances.shift_ratio[index]), 3),
        "differs_most_in": distances.odd_group(index),
    }


def _medians(candidates: Sequence[CaseEvidence]) -> dict[str, float]:
    """Of the Dice between folds and between runs, over the candidates where it is known."""
    known = {
        "fold_dice": [1 - case.fold_disagreement for case in candidates if case.fold_disagreement is not None],
        "run_dice": [1 - case.run_disagreement for case in candidates if case.run_disagreement is not None],
    }
    return {name: float(np.median(values)) for name, values in known.items() if values}


def _reasons(
    case: CaseEvidence,
    terms: Mapping[str, float],
    measured: Mapping[str, Any],
    middle: Mapping[str, float],
    labeled: LabeledPool,
) -> tuple[str, ...]:
    """Sentences with the figures: what it stands for, then the strongest term first; empty where nothing speaks so."""
    volumes = _volumes(case, labeled)
    texts = {
        "disagreement": "; ".join(
            f"{who} agree to a Dice of {measured[key]:.2f} (median of all candidates {middle[key]:.2f})"
            for key, who in (("fold_dice", "folds"), ("run_dice", "runs"))
            if measured[key] is not None and measured[key] < middle[key]
        ),
        "volume": f"much to outline: {volumes}" if volumes else "",
        "shift": (
            f"{measured['shift_ratio']:.1f} times as far from the nearest labeled case as these are from each other, "
            f"most in {measured['differs_most_in']}"
        ),
    }
    usable = [name for name in sorted(texts, key=lambda name: -terms[name]) if texts[name]]
    said = [texts[name] for name in usable if terms[name] >= NOTEWORTHY] or [texts[name] for name in usable[:1]]
    if measured["represents"] > 1:
        number = measured["represents"]
        said.insert(0, f"stands for {number} candidates: nearer to them than anything labeled or higher on the list")
    if terms["closeness"] >= NOTEWORTHY:
        said.append("although it resembles one that is labeled or higher on the list")
    return tuple(said)


def _volumes(case: CaseEvidence, labeled: LabeledPool) -> str:
    """Of the classes that are predicted with at least half of the labeled median."""
    parts = []
    for name, volume in case.volumes.items():
        usual = labeled.median_volumes.get(name)
        if usual and volume >= NOTEWORTHY * usual:
            parts.append(f"{name} {volume / usual:.1f} × the labeled median")
        elif volume > 0 and not usual:
            parts.append(f"{name}, which no label shows")
    return ", ".join(parts)
