"""Predicts the unlabeled pool of a fold into a pseudo-label store, in the preprocessed grid, when a phase asks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from autossl.data.labels import LabelSchema
from autossl.data.store import open_array
from autossl.inference.predictor import Predictor, Window
from autossl.planners.budget import voxel_volume
from autossl.trainers.base import Refresh, SemiSupervisedTrainer
from autossl.trainers.components.pseudo_filters import Decisions, Expected
from autossl.trainers.loop import RefreshStopped
from autossl.trainers.pseudo_labels import PseudoLabelStore, label_and_confidences
from autossl.trainers.pseudo_rounds import LabelKnowledge, PseudoLabelRound, knowledge_json
from autossl.trainers.setup import RunSetup
from autossl.trainers.source import FoldSource

BLANK_CASES = 4


class PoolPredictor:
    """Called by the loop with a refresh and its step; the weights are those of the moment, mirroring is on.

    A refresh that was killed goes on after its last finished case, if it comes back with the same weights.

    Args:
        setup: of the run.
        fold: whose unlabeled cases are predicted; no other case is opened.
        method: its parts hold the weights.
        folder: stores are its subfolders.
        on_case: called with (cases done, cases in all, case).
        should_stop: asked after each case; True raises `RefreshStopped`.
    """

    def __init__(
        self,
        setup: RunSetup,
        fold: str,
        method: SemiSupervisedTrainer,
        folder: Path,
        on_case: Callable[[int, int, str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self._setup = setup
        self._fold = fold
        self._cases = setup.folds[fold].unlabeled
        self._method = method
        self._folder = folder
        self._on_case = on_case
        self._should_stop = should_stop

    def __call__(self, refresh: Refresh, step: int) -> bool:
        """Makes the version of this step. True: by its rules the run ends here."""
        store = PseudoLabelStore(self._folder / refresh.store)
        knowledge = self._knowledge()
        store.begin(step, self._origin(refresh, knowledge))
        if not store.is_complete(step):
            self._fill(store, step, refresh, knowledge)
        store.tidy(step, keep_older=refresh.rules is not None)
        return store.ends_run(step)

    def _fill(self, store: PseudoLabelStore, step: int, refresh: Refresh, knowledge: LabelKnowledge) -> None:
        ruled = PseudoLabelRound(store, step, refresh, knowledge) if refresh.rules is not None else None
        teacher, others = self._predictors(refresh)
        for done, case in enumerate(self._cases, 1):
            if not store.has(step, case):
                image = np.asarray(self._setup.store.image(case)[:])
                label, confidences = predicted_case(teacher, image, knowledge.schema)
                if ruled is None:
                    store.write_confidence(step, case, confidences.min(0))
                    store.write_case(step, case, label, None, {})
                else:
                    labels = [predicted_case(other, image, knowledge.schema)[0] for other in others]
                    ruled.add(case, label, confidences, labels, self._voxel_volume(case))
            if self._on_case is not None:
                self._on_case(done, len(self._cases), case)
            if self._should_stop is not None and self._should_stop():
                raise RefreshStopped(f"after {done} of {len(self._cases)} cases")
        if ruled is None:
            store.complete(step, dict.fromkeys(self._cases, 1.0))
        else:
            ruled.finish(self._cases)

    def _predictors(self, refresh: Refresh) -> tuple[Predictor, list[Predictor]]:
        """The teacher's, and those whose label maps tell how stable a case is."""
        teacher = self._predictor(refresh.part, refresh.mirrored)
        if refresh.rules is None:
            return teacher, []
        others = [self._predictor(part, mirror=True) for part in refresh.stability_parts]
        return teacher, others or [self._predictor(refresh.part, mirror=False)]

    def _predictor(self, part: str, mirror: bool) -> Predictor:
        spec = self._method.job.single_network_prediction(part)
        plan = self._setup.configuration
        weights = [{part: self._module(part).state_dict()}]
        window = Window.of(plan, mirror)
        return Predictor.from_state_dicts(spec, weights, plan, self._setup.schema, window, self._setup.device)

    def _module(self, part: str) -> nn.Module:
        return {**self._method.parts.trained, **self._method.parts.followers}[part]

    def _origin(self, refresh: Refresh, knowledge: LabelKnowledge) -> dict[str, Any]:
        """Everything that decides what is written."""
        parts = (refresh.part, *refresh.stability_parts)
        return {
            "refresh": asdict(refresh),
            "weights": {part: weights_digest(self._module(part)) for part in parts},
            "cases": list(self._cases),
            "knowledge": knowledge_json(knowledge),
        }

    def _knowledge(self) -> LabelKnowledge:
        statistics = self._setup.statistics(self._fold)
        expected = {
            name: Expected(found.presence, found.volume_min, found.volume_max)
            for name, found in statistics.classes.items()
        }
        return LabelKnowledge(self._setup.schema, expected, statistics.single_component_classes)

    def _voxel_volume(self, case: str) -> float:
        """Of the preprocessed grid, in the unit of the class statistics."""
        properties = self._setup.store.properties(case)
        finer = math.prod(properties.shape) / math.prod(properties.shape_after_crop)
        return voxel_volume(self._setup.fingerprint.cases[case]) / finer


def predicted_case(
    predictor: Predictor, image: npt.NDArray[np.floating[Any]], schema: LabelSchema
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Label map [z, y, x] and confidences [K, z, y, x] of a preprocessed image, row by row to save memory."""
    label = np.zeros(image.shape[1:], dtype=np.uint8)
    confidences = np.zeros((Decisions(schema).n_maps, *image.shape[1:]), dtype=np.uint8)
    for slab in predictor.slabs(image):
        rows = slice(slab.start, slab.start + slab.logits.shape[2])
        found = label_and_confidences(slab.logits[0], predictor.spec.output_activation, schema)
        label[rows], confidences[:, rows] = found
    return label, confidences


def weights_digest(module: nn.Module) -> str:
    """Hash of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def blank_pseudo_labels(source: FoldSource) -> Callable[[Refresh, int], None]:
    """Fills stores with empty, certain maps of a few cases: for trial runs that only measure the time of a step."""
    cases: Sequence[Any] = source.streams.unlabeled[:BLANK_CASES]

    def fill(refresh: Refresh, step: int) -> None:
        store = PseudoLabelStore(source.store_folder / refresh.store)
        store.begin(step)
        for case in cases:
            blank = np.zeros(open_array(case.image).shape[1:], dtype=np.uint8)
            store.write_confidence(step, case.id, blank + np.uint8(255))
            store.write_case(step, case.id, blank, None, {})
        store.complete(step, {case.id: 1.0 for case in cases})

    return fill
