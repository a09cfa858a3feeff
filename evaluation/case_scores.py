"""All metrics of one case: overlap and volume, and as wanted surfaces, lesions and calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from autossl.data.labels import LabelSchema
from autossl.data.probabilities import ROWS_AT_ONCE, Probabilities, read_probabilities
from autossl.data.problems import InvalidInput, Problem
from autossl.evaluation.calibration import calibration_per_class
from autossl.evaluation.class_masks import Box, class_masks
from autossl.evaluation.lesions import lesion_metrics
from autossl.evaluation.metrics import ClassScores, LabelMap, score_case
from autossl.evaluation.surfaces import DEFAULT_TOLERANCE, Convention, surface_metrics


@dataclass(frozen=True)
class Scoring:
    """What is measured beside overlap and volume."""

    surfaces: bool = True
    """HD95, ASSD and NSD."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Of NSD, class → mm (pixels where their size is unknown)."""
    surface_convention: Convention = "surface_elements"
    """What a surface is; see `surfaces`."""
    lesions: bool = False
    """Lesion-wise F1."""

    def tolerance_of(self, name: str) -> float:
        """Of a class; the default where none was given."""
        return self.tolerances.get(name, DEFAULT_TOLERANCE)


@dataclass(frozen=True)
class Voxel:
    """The size of a voxel, as far as the files know it."""

    spacing_zyx_mm: tuple[float, float, float] | None
    """None for pictures: distances are in pixels then."""
    volume_mm3: float | None
    """None for pictures, and for images with two axes."""

    @property
    def unit(self) -> str:
        """Of distances: "mm" or "px"."""
        return "px" if self.spacing_zyx_mm is None else "mm"


def score_all(
    prediction: LabelMap,
    reference: LabelMap,
    schema: LabelSchema,
    voxel: Voxel,
    scoring: Scoring | None = None,
    probabilities: Path | None = None,
) -> dict[str, ClassScores]:
    """All wanted metrics per foreground class or region.

    Args:
        prediction: Label map [z,y,x].
        reference: Label map [z,y,x].
        schema: What the values mean.
        voxel: Its size.
        scoring: What is measured beside overlap and volume.
        probabilities: File of the case's stored probabilities; None leaves out the calibration.

    Raises:
        ValueError: As `score_case`.
        InvalidInput: The probabilities cannot be read, or belong to other labels or another grid.
    """
    scoring = scoring or Scoring()
    scores = score_case(prediction, reference, schema, voxel.volume_mm3)
    more: dict[str, dict[str, float]] = {name: {} for name in scores}
    boxes: dict[str, Box] = {}
    for name, masks in class_masks(prediction, reference, schema):
        boxes[name] = masks.box
        if scoring.surfaces:
            spacing = voxel.spacing_zyx_mm or (1.0, 1.0, 1.0)
            tolerance = scoring.tolerance_of(name)
            more[name] |= surface_metrics(masks, spacing, tolerance, scoring.surface_convention, voxel.unit)
        if scoring.lesions:
            more[name] |= lesion_metrics(masks)
    if probabilities is not None:
        slabs = _slabs(probabilities, (schema.n_outputs, *reference.shape), boxes)
        for name, error in calibration_per_class(slabs, reference, schema, boxes).items():
            more[name]["ece"] = error
    return {name: replace(own, metrics={**own.metrics, **more[name]}) for name, own in scores.items()}


def _slabs(path: Path, shape: tuple[int, ...], boxes: Mapping[str, Box]) -> Iterator[tuple[int, Probabilities]]:
    """First slice and probabilities of a few slices at a time, of those slices that a box needs.

    Raises:
        InvalidInput: The stored shape is another one.
    """
    first = min((box[0].start for box in boxes.values() if box[0].stop), default=0)
    last = max(box[0].stop for box in boxes.values())
    beyond = read_probabilities(path, slice(shape[1] - 1, shape[1] + 1))
    if beyond.shape != (shape[0], 1, *shape[2:]):
        expected = f"{shape[0]} outputs for a label map of {shape[1:]} voxels (z,y,x)"
        fix = "predict the case again with --save_probabilities"
        raise InvalidInput(Problem("probabilities of another shape than the label map", expected, fix, file=path))
    for start in range(first, last, ROWS_AT_ONCE):
        yield start, read_probabilities(path, slice(start, min(start + ROWS_AT_ONCE, last)))
