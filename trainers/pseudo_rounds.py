"""From the predictions of a refresh to a version that batches can use: thresholds, accepted cases, and the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.files import write_json
from autossl.data.labels import LabelSchema
from autossl.trainers.base import PseudoLabelRules, Refresh
from autossl.trainers.components.pseudo_filters import (
    TOP,
    Decisions,
    Expected,
    Selection,
    class_thresholds,
    class_volumes,
    confidence_histogram,
    foreground_dice,
    kept_confidence,
    never_predicted,
    oddities,
    select_cases,
    soft_confidence,
    without_islands,
)
from autossl.trainers.pseudo_labels import PseudoLabelStore

logger = logging.getLogger(__name__)

INCOMPLETE_WEIGHT = 0.5
"""What a patch counts where a class that labeled cases show is never predicted: its absence is no evidence."""

Map = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class LabelKnowledge:
    """What the fold's labeled training cases, and no others, say of the classes."""

    schema: LabelSchema
    expected: Mapping[str, Expected]
    single_component: tuple[int, ...]
    """Label values that the single-component classes are written with."""


class PseudoLabelRound:
    """One version of a store under rules: cases are added one by one, then it is decided over all of them.

    Args:
        store: where all of it lies; begun for `step`.
        step: of the refresh.
        refresh: with rules.
        knowledge: of the fold.
    """

    def __init__(self, store: PseudoLabelStore, step: int, refresh: Refresh, knowledge: LabelKnowledge) -> None:
        if refresh.rules is None:
            raise ValueError(f"the refresh of '{refresh.store}' has no rules")
        self._store = store
        self._step = step
        self._refresh = refresh
        self._rules: PseudoLabelRules = refresh.rules
        self._knowledge = knowledge
        self._schema = knowledge.schema
        self._decisions = Decisions(knowledge.schema)
        self._before = store.previous(step)

    def add(self, case: str, label: Map, confidences: Map, others: Sequence[Map], voxel_volume: float) -> None:
        """Cleans one predicted case, measures it and writes it.

        Args:
            case: its id.
            label: [z, y, x], label values.
            confidences: levels [K, z, y, x].
            others: label maps by the parts whose agreement makes the case stable.
            voxel_volume: of the preprocessed case, in the unit of the expected volumes.
        """
        classes = self._schema.foreground
        stability = float(np.mean([foreground_dice(other, label, classes) for other in others]))
        if self._rules.plausibility:
            cleaned = without_islands(label, self._schema, self._knowledge.single_component)
            # A removed voxel's confidence was that of the class it lost.
            label, confidences = cleaned, np.where(cleaned == label, confidences, 0).astype(np.uint8)
        histogram = confidence_histogram(self._decisions.of(label), confidences, len(self._decisions.names))
        agreement = None
        if self._before is not None and self._store.has(self._before, case):
            agreement = foreground_dice(self._store.label(self._before, case), label, classes)
        facts = {
            "stability": stability,
            "agreement": agreement,
            "volumes": class_volumes(label, classes, voxel_volume),
            "histogram": histogram.tolist(),
        }
        self._store.write_case(self._step, case, label, confidences, facts)

    def finish(self, cases: Sequence[str]) -> None:
        """Decides, writes the confidences that batches come with, the report, and completes the version."""
        facts = {case: self._store.facts(self._step, case) for case in cases}
        volumes = {case: facts[case]["volumes"] for case in cases}
        odd = {case: oddities(volumes[case], self._knowledge.expected) for case in cases}
        selection = select_cases(
            stability={case: facts[case]["stability"] for case in cases},
            odd=odd if self._rules.plausibility else {},
            reliable_share=self._rules.reliable_share,
            has_foreground={case: any(volumes[case].values()) for case in cases},
        )
        histogram = sum(np.array(facts[case]["histogram"], dtype=np.int64) for case in cases)
        thresholds = class_thresholds(np.asarray(histogram), self._rules.kept_share, self._rules.smallest_threshold)
        kept = {case: self._write_confidence(case, thresholds) for case in cases}
        missing = never_predicted(list(volumes.values()), self._knowledge.expected)
        weight = INCOMPLETE_WEIGHT if missing else 1.0
        agreements = [facts[case]["agreement"] for case in cases if facts[case]["agreement"] is not None]
        agreement = float(np.mean(agreements)) if agreements else None
        ends = self._why_it_ends(selection, agreement)
        report = {
            "step": self._step,
            "refresh": asdict(self._refresh),
            "thresholds": self._readable(thresholds),
            "agreement_with_the_refresh_before": agreement,
            "classes_never_predicted": missing,
            "fallback": selection.fallback,
            "ends_run": ends,
            "cases": {
                case: {
                    "accepted": case in selection.accepted,
                    "reasons": selection.reasons[case],
                    "stability": facts[case]["stability"],
                    "agreement": facts[case]["agreement"],
                    "kept_share": kept[case],
                    "volumes": volumes[case],
                    "weight": weight if case in selection.accepted else 0.0,
                }
                for case in cases
            },
        }
        self._tell(selection, missing, ends)
        write_json(self._store.version(self._step) / "report.json", report)
        used = dict.fromkeys(selection.accepted, weight)
        self._store.complete(self._step, used, ends_run=ends is not None)

    def _write_confidence(self, case: str, thresholds: npt.NDArray[np.integer]) -> float:
        """Writes what is kept of a case and gives its share (weights count as parts of a voxel)."""
        label, confidences = self._store.predicted(self._step, case)
        if self._rules.voxel_filter == "weight":
            confidence = soft_confidence(confidences, self._decisions.n_outcomes)
            share = float(confidence.mean(dtype=np.float64)) / TOP
        else:
            confidence = kept_confidence(self._decisions.of(label), confidences, thresholds)
            share = float((confidence > 0).mean())
        self._store.write_confidence(self._step, case, confidence)
        return share

    def _why_it_ends(self, selection: Selection, agreement: float | None) -> str | None:
        limit = self._rules.stop_agreement
        if limit is None:
            return None
        if not selection.accepted:
            return "no case can be used: the model stays as it is"
        if agreement is not None and agreement > limit:
            return f"these pseudo-labels agree with those before by {agreement:.4f}, more than {limit:g}"
        return None

    def _readable(self, thresholds: npt.NDArray[np.integer]) -> dict[str, float] | None:
        if self._rules.voxel_filter == "weight":
            return None
        return {name: float(level) / TOP for name, level in zip(self._decisions.names, thresholds, strict=True)}

    def _tell(self, selection: Selection, missing: Sequence[str], ends: str | None) -> None:
        where = f"pseudo-labels of step {self._step}"
        logger.info("%s: %d of %d cases are used", where, len(selection.accepted), len(selection.reasons))
        if selection.fallback:
            logger.warning("%s: the rules rejected all cases; the most stable ones are used all the same", where)
        elif not selection.accepted:
            logger.warning("%s: no case can be used", where)
        if missing:
            logger.warning("%s: never predicted: %s; it is learned from labels only", where, ", ".join(missing))
        if ends is not None:
            logger.warning("%s: %s", where, ends)


def knowledge_json(knowledge: LabelKnowledge) -> dict[str, Any]:
    """Plain values of all that decides over cases, for a version's origin."""
    expected = {name: asdict(known) for name, known in knowledge.expected.items()}
    return {"expected": expected, "single_component": list(knowledge.single_component)}
