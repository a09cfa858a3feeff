"""Predicts preprocessed cases: to label maps in the geometry of the image that they came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.labels import LabelSchema
from autossl.data.prepared import CaseProperties
from autossl.data.problems import InvalidInput, Problem
from autossl.data.store import CaseStore
from autossl.inference.predictor import Predictor, Slab
from autossl.inference.restore import OriginalGrid, Restored, Wanted, decide_labels, restore
from autossl.planners.plans import Plans
from autossl.preprocessing.resample import find_coarse_axis

OnShare = Callable[[float], None]
"""Called with the share of a case that is done, 0 to 1."""


def predict_image(
    predictor: Predictor,
    image: npt.NDArray[np.floating[Any]],
    properties: CaseProperties,
    schema: LabelSchema,
    wanted: Wanted | None = None,
    on_share: OnShare | None = None,
) -> Restored:
    """Arrays in the oriented image's grid, of a preprocessed image [C,z,y,x]."""
    wanted = wanted or Wanted()
    slabs = predictor.slabs(image, per_fold=wanted.uncertainty and len(predictor.folds) > 1)
    reported = slabs if on_share is None else _reporting(slabs, image.shape[1], on_share)
    grid = original_grid(properties)
    return restore(reported, image.shape[1:], grid, schema, predictor.spec.output_activation, wanted)


def predict_preprocessed(
    predictor: Predictor, store: CaseStore, case: str, plans: Plans, schema: LabelSchema
) -> tuple[npt.NDArray[np.integer[Any]], Geometry]:
    """Label map [z,y,x] of a stored case in its image's oriented grid, and the geometry to write it with.

    Raises:
        InvalidInput: as `restore_preprocessed`.
    """
    restored, geometry = restore_preprocessed(predictor, store, case, plans, schema)
    return restored.label_map, geometry


def restore_preprocessed(
    predictor: Predictor, store: CaseStore, case: str, plans: Plans, schema: LabelSchema, wanted: Wanted | None = None
) -> tuple[Restored, Geometry]:
    """All that is wanted of a stored case in its image's oriented grid, and the geometry to write it with.

    Raises:
        InvalidInput: the stored case is damaged, or was preprocessed for other axes than the plan's.
    """
    properties = store.properties(case)
    if tuple(properties.transpose_forward) != tuple(plans.transpose_forward):
        raise InvalidInput(
            Problem(
                f"stored with axes {properties.transpose_forward}",
                f"{plans.transpose_forward}, as the plan says",
                "preprocess the case again with autossl_plan_and_preprocess",
                case=case,
                file=store.properties_path(case),
            )
        )
    restored = predict_image(predictor, np.asarray(store.image(case)[:]), properties, schema, wanted)
    return restored, properties.geometry


def predict_preprocessed_grid(
    predictor: Predictor, image: npt.NDArray[np.floating[Any]], schema: LabelSchema
) -> npt.NDArray[np.integer[Any]]:
    """Label map [z,y,x] of a preprocessed image in its own grid, without any resampling."""
    label_map = np.zeros(image.shape[1:], dtype=schema.dtype)
    for slab in predictor.slabs(image):
        rows = slice(slab.start, slab.start + slab.logits.shape[2])
        label_map[rows] = decide_labels(slab.logits[0], schema).cpu().numpy()
    return label_map


def original_grid(properties: CaseProperties) -> OriginalGrid:
    """Where a preprocessed case came from; the coarse axis by nnU-Net v2's rule, the prepared array as the source."""
    z, y, x = (slice(low, high) for low, high in properties.crop_box)
    return OriginalGrid(
        shape=properties.shape_before_crop,
        crop=(z, y, x),
        transpose_backward=properties.transpose_backward,
        coarse_axis=find_coarse_axis(properties.target_spacing_mm, properties.spacing_mm),
    )


def _reporting(slabs: Iterable[Slab], n_rows: int, on_share: OnShare) -> Iterator[Slab]:
    for slab in slabs:
        yield slab
        on_share((slab.start + slab.logits.shape[2]) / n_rows)
