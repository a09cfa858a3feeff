"""Overlap and volume metrics of one label map against its reference: pure functions of arrays and numbers.

Rules, for every metric here and for the means over cases:

- Both masks empty: there is nothing to measure, the metric is NaN. NaN is left out of means and counted beside them.
- Only the reference empty (a false alarm): Dice and IoU are 0; the relative volume error is NaN (nothing to relate to).
- Only the prediction empty (a miss): Dice and IoU are 0, the relative volume error is -1.
- Voxels that carry the ignore label in the reference count nowhere, whatever was predicted there.
- Regions are scored as the union of their label values. The ignore value in a prediction counts as background.

Other metrics have modules beside this one that say their own rules: `surfaces`, `lesions`, `calibration`. `case_scores`
adds them to `ClassScores.metrics`; everything after that takes the names as they come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autossl.data.integrity import count_labels
from autossl.data.labels import LabelSchema
from autossl.evaluation.class_masks import box_around, union_of

METRICS = ("dice", "iou", "volume_error_relative", "volume_difference_ml")
"""Names of the metrics of `ClassScores`, in the order in which they are printed."""

SLAB_VOXELS = 2**22
LabelMap = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Confusion:
    """Voxels of one class: found, found wrongly, missed. Ignored voxels are in none of them."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def n_prediction(self) -> int:
        """Voxels predicted as the class."""
        return self.true_positive + self.false_positive

    @property
    def n_reference(self) -> int:
        """Voxels of the class in the reference."""
        return self.true_positive + self.false_negative


@dataclass(frozen=True)
class ClassScores:
    """What one class of one case reached; NaN where the rules of this module leave a metric undefined."""

    confusion: Confusion
    metrics: Mapping[str, float]
    """Metric name → value: `METRICS`, and what `case_scores` adds. Dice and IoU lie in 0..1; volume_error_relative is
    (V - V_ref) / V_ref; volume_difference_ml is V - V_ref in mL, NaN where the images have no physical voxel size."""


def confusion_per_class(prediction: LabelMap, reference: LabelMap, schema: LabelSchema) -> dict[str, Confusion]:
    """Voxel counts per foreground class or region.

    Args:
        prediction: Label map of any shape.
        reference: Label map of the same shape.
        schema: What the values mean; decides classes, regions and the ignore label.

    Raises:
        ValueError: The shapes differ, or a map holds a value that the schema does not declare.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference has {reference.shape}")
    values = np.array(schema.values)
    if prediction.size and 0 in schema.values and not any(0 in own for own in schema.foreground.values()):
        # what is background in both maps is counted nowhere: most of a volume need not be looked at
        boxes = [box_around(prediction), box_around(reference)]
        box = union_of([found for found in boxes if found[0].stop] or boxes)
        prediction, reference = prediction[box], reference[box]
    joint = _joint_histogram(prediction.ravel(), reference.ravel(), values)
    if schema.ignore_label is not None:
        joint[:, values == schema.ignore_label] = 0
    result = {}
    for name, class_values in schema.foreground.items():
        inside = np.isin(values, class_values)
        result[name] = Confusion(
            true_positive=int(joint[np.ix_(inside, inside)].sum()),
            false_positive=int(joint[np.ix_(inside, ~inside)].sum()),
            false_negative=int(joint[np.ix_(~inside, inside)].sum()),
        )
    return result


def dice(confusion: Confusion) -> float:
    """2 TP / (2 TP + FP + FN); NaN where both masks are empty."""
    size = confusion.n_prediction + confusion.n_reference
    return 2 * confusion.true_positive / size if size else math.nan


def iou(confusion: Confusion) -> float:
    """TP / (TP + FP + FN); NaN where both masks are empty."""
    union = confusion.true_positive + confusion.false_positive + confusion.false_negative
    return confusion.true_positive / union if union else math.nan


def volume_error_relative(confusion: Confusion) -> float:
    """(predicted - reference volume) / reference volume; NaN where the reference is empty."""
    if confusion.n_reference == 0:
        return math.nan
    return (confusion.n_prediction - confusion.n_reference) / confusion.n_reference


def volume_difference_ml(confusion: Confusion, voxel_volume_mm3: float | None) -> float:
    """Predicted minus reference volume in mL; NaN where both are empty or the voxel has no physical size."""
    if voxel_volume_mm3 is None or confusion.n_prediction + confusion.n_reference == 0:
        return math.nan
    return (confusion.n_prediction - confusion.n_reference) * voxel_volume_mm3 / 1000.0


def score_case(
    prediction: LabelMap, reference: LabelMap, schema: LabelSchema, voxel_volume_mm3: float | None
) -> dict[str, ClassScores]:
    """All metrics per foreground class or region of one case.

    Args:
        prediction: Label map [z,y,x].
        reference: Label map [z,y,x].
        schema: What the values mean.
        voxel_volume_mm3: Volume of one voxel in mm³; None for images without a physical size (png, bmp, tif).

    Raises:
        ValueError: As `confusion_per_class`.
    """
    return {
        name: ClassScores(
            confusion=confusion,
            metrics={
                "dice": dice(confusion),
                "iou": iou(confusion),
                "volume_error_relative": volume_error_relative(confusion),
                "volume_difference_ml": volume_difference_ml(confusion, voxel_volume_mm3),
            },
        )
        for name, confusion in confusion_per_class(prediction, reference, schema).items()
    }


def dice_per_class(prediction: LabelMap, reference: LabelMap, schema: LabelSchema) -> dict[str, float]:
    """Dice per foreground class or region, NaN where both masks are empty.

    Raises:
        ValueError: As `confusion_per_class`.
    """
    return {name: dice(counts) for name, counts in confusion_per_class(prediction, reference, schema).items()}


def mean_of_defined(values: Iterable[float]) -> tuple[float, int]:
    """Mean of the values that are not NaN, and their number; (NaN, 0) where there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return (math.fsum(defined) / len(defined) if defined else math.nan), len(defined)


def undeclared_values(label_map: LabelMap, schema: LabelSchema) -> list[int]:
    """Values of the map that the schema does not declare, ascending."""
    return sorted(set(count_labels(label_map)) - set(schema.values))


def _joint_histogram(
    prediction: LabelMap, reference: LabelMap, values: npt.NDArray[np.integer]
) -> npt.NDArray[np.integer]:
    """Counts [predicted value, reference value] over flat maps, in slabs so that memory stays that of one slab."""
    n_values = len(values)
    joint = np.zeros(n_values**2, dtype=np.int64)
    for start in range(0, prediction.size, SLAB_VOXELS):
        slab = slice(start, start + SLAB_VOXELS)
        pairs = _indices(prediction[slab], values, "prediction") * n_values
        pairs += _indices(reference[slab], values, "reference")
        joint += np.bincount(pairs, minlength=n_values**2)
    return joint.reshape(n_values, n_values)


def _indices(flat: LabelMap, values: npt.NDArray[np.integer], role: str) -> npt.NDArray[np.intp]:
    """Position of each voxel's value in the ascending `values`; raises ValueError for an undeclared value."""
    position = np.full(int(values[-1]) + 2, -1, dtype=np.intp)
    position[values] = np.arange(len(values))
    indices = position[np.clip(flat, -1, int(values[-1]) + 1)]  # -1 and one past the end both hit the spare last entry
    if (indices < 0).any():
        found = np.unique(flat[indices < 0])[:5].tolist()
        raise ValueError(f"the {role} holds {found}, declared are {values.tolist()}")
    return indices
