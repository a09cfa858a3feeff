"""Predicts the unlabeled pool of a fold into a pseudo-label store, in the preprocessed grid, when a phase asks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from autossl.inference.predictor import Predictor, Window
from autossl.trainers.base import Refresh, SemiSupervisedTrainer
from autossl.trainers.pseudo_labels import PseudoLabelStore, label_and_confidence
from autossl.trainers.setup import RunSetup


class PoolPredictor:
    """Called by the loop with a refresh and its step; the weights are those of the moment, mirroring is on.

    Args:
        setup: of the run.
        fold: whose unlabeled cases are predicted; no other case is opened.
        method: its parts hold the weights.
        folder: stores are its subfolders.
        on_case: called with (cases done, cases in all, case).
    """

    def __init__(
        self,
        setup: RunSetup,
        fold: str,
        method: SemiSupervisedTrainer,
        folder: Path,
        on_case: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self._setup = setup
        self._cases = setup.folds[fold].unlabeled
        self._method = method
        self._folder = folder
        self._on_case = on_case

    def __call__(self, refresh: Refresh, step: int) -> None:
        parts = self._method.parts
        module = {**parts.trained, **parts.followers}[refresh.part]
        spec = self._method.job.single_network_prediction(refresh.part)
        plan, schema = self._setup.configuration, self._setup.schema
        weights = [{refresh.part: module.state_dict()}]
        predictor = Predictor.from_state_dicts(spec, weights, plan, schema, Window.of(plan), self._setup.device)
        versions = PseudoLabelStore(self._folder / refresh.store)
        versions.begin(step)
        for done, case in enumerate(self._cases, 1):
            image = np.asarray(self._setup.store.image(case)[:])
            logits = predictor.logits(image)
            label, confidence = label_and_confidence(logits, spec.output_activation, schema.written_values)
            versions.write(step, case, label, confidence)
            if self._on_case is not None:
                self._on_case(done, len(self._cases), case)
        versions.complete(step, list(self._cases))
