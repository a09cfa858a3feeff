"""Out-of-fold predictions: each labeled case as the fold predicted it that had not seen its label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autossl.data.runs import FoundRun
from autossl.data.workspace import Workspace


@dataclass(frozen=True)
class OutOfFoldCase:
    """A validation case of one fold."""

    case: str
    patient: str
    fold: str
    label_map: Path
    """As predicted, after training, on the grid of the reference."""
    probabilities: Path | None
    """For `read_probabilities`; None where they were not saved (`predict_out_of_fold` makes them)."""
    reference: Path
    """Raw label map; values as delivered (`remap_labels` of the fingerprint)."""


def collect(workspace: Workspace, dataset: str, run: FoundRun) -> list[OutOfFoldCase]:
    """The pooled validation cases of all folds of the run's split, by case id.

    Raises:
        InvalidInput: folds that are not finished, predictions or references that are missing, a case that validates
            in several folds; all together.
    """
    raise NotImplementedError


def predict_out_of_fold(run: FoundRun, workspace: Workspace, device: str = "auto") -> int:
    """Predicts what is missing of label maps and probabilities of the finished folds, without training.

    Returns:
        The number of cases that were predicted.
    """
    raise NotImplementedError
