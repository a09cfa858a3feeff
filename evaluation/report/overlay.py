"""Pictures of cases: a slice of the image as PNG, and over it the outlines of reference and prediction as SVG paths.

Outlines follow the edges of the voxels, so that what is seen is what was scored. Reference and prediction differ in
color and in the kind of line.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from autossl.data.geometry import Orientation
from autossl.data.image_io import read_geometry, read_image, read_label
from autossl.data.integrity import remap_label_map
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import labels_of, mean_of, probabilities_file
from autossl.data.raw_dataset import Case
from autossl.data.runs import FoundRun
from autossl.evaluation.out_of_fold import VALIDATION_FOLDER

LabelMap = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Plane = npt.NDArray[np.floating[Any]]
CONTEXT = 0.6
"""Of the labeled box's edge that is shown around it."""
FEWEST_PIXELS = 40
"""Of an edge of the window, where the image has so many."""
WINDOW_PERCENTILES = (0.5, 99.5)
WIDEST = 420
"""Pixels of a picture's longer edge; larger slices are shown smaller."""


@dataclass(frozen=True)
class PicturedCase:
    """What a case's pictures are made of, in one orientation."""

    image: npt.NDArray[np.floating[Any]]
    """[z,y,x], the first channel."""
    reference: LabelMap
    prediction: LabelMap
    spacing_zyx_mm: tuple[float, float, float]
    upright: bool
    """Whether y grows upwards in the picture (volumes) or downwards (photographs)."""


@dataclass(frozen=True)
class Overlay:
    """A picture, ready for the page."""

    drawing: Markup
    z: int
    what: str
    """Why this slice."""


def read_pictured(
    case: Case, runs: Sequence[FoundRun], schema: LabelSchema, remap: dict[int, int], orientation: Orientation
) -> PicturedCase | None:
    """A case as the runs predicted it out of fold (the mean of their probabilities, where there are several).

    Returns:
        None where an image, a label or a prediction is missing.

    Raises:
        InvalidInput: a file that cannot be read.
    """
    found = [_prediction_of(run, case) for run in runs]
    label_maps = [path for path in found if path is not None]
    if case.label is None or not label_maps or len(label_maps) != len(runs):
        return None
    if not all(path.is_file() for path in (*case.images, case.label)):
        return None
    prediction, spacing, _ = read_label(label_maps[0], orientation)
    if len(runs) > 1:
        saved = [probabilities_file(path.parent, case.id) for path in label_maps]
        if not all(path.is_file() for path in saved):
            return None
        stored = np.concatenate([labels_of(slab, schema) for slab in mean_of(saved)])
        prediction = read_geometry(label_maps[0], orientation).orient(stored)
    reference = remap_label_map(read_label(case.label, orientation)[0], remap)
    image = read_image(case.images[:1], orientation).array[0]
    if not image.shape == prediction.shape == reference.shape:
        return None
    return PicturedCase(image, reference, prediction, spacing, upright=orientation == "RAS")


def overlays(case: PicturedCase, schema: LabelSchema) -> list[Overlay]:
    """The slice with the most foreground, and the one where reference and prediction differ most, if another."""
    shown = (case.reference > 0) | (case.prediction > 0)
    differs = (case.reference != case.prediction).sum(axis=(1, 2))
    largest = int(np.argmax(shown.sum(axis=(1, 2))))
    worst = int(np.argmax(differs))
    window = _window(shown, case.image.shape)
    wanted = {largest: "most foreground"}
    if worst != largest and differs[worst] > 0:
        wanted[worst] = "largest difference"
    return [Overlay(_draw(case, z, window, schema), z, what) for z, what in wanted.items()]


def outline(mask: Mask) -> str:
    """The edges of a mask [y,x] as an SVG path in pixel corners; runs of edges are joined."""
    padded = np.pad(mask, 1)
    across = padded[1:, 1:-1] != padded[:-1, 1:-1]  # [y edge, x]: between row y-1 and row y
    along = padded[1:-1, 1:] != padded[1:-1, :-1]  # [y, x edge]
    parts = [f"M{start} {y}H{end}" for y, start, end in _runs(across)]
    parts += [f"M{x} {start}V{end}" for x, start, end in _runs(along.T)]
    return "".join(parts)


def _runs(edges: Mask) -> list[tuple[int, int, int]]:
    """(row, start, end) of the runs of True in each row."""
    changes = np.diff(np.pad(edges, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, ends = np.argwhere(changes == 1), np.argwhere(changes == -1)
    return [(int(row), int(start), int(end)) for (row, start), (_, end) in zip(starts, ends, strict=True)]


def _prediction_of(run: FoundRun, case: Case) -> Path | None:
    for fold, cases in run.spec.folds.items():
        if case.id in cases.validation:
            folder = run.folder / f"fold_{fold}" / VALIDATION_FOLDER
            return next((path for path in sorted(folder.glob(f"{case.id}.*")) if path.is_file()), None)
    return None


def _window(shown: Mask, shape: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns around everything that is labeled in the case; all of them where nothing is."""
    plane: Mask = np.any(shown, axis=0)
    slices = []
    for axis, size in ((0, shape[1]), (1, shape[2])):
        where = np.flatnonzero(np.any(plane, axis=(1 - axis,)))
        if not len(where):
            slices.append(slice(0, size))
            continue
        low, high = int(where[0]), int(where[-1]) + 1
        margin = max(round(CONTEXT * (high - low)), (FEWEST_PIXELS - (high - low) + 1) // 2)
        slices.append(slice(max(0, low - margin), min(size, high + margin)))
    return slices[0], slices[1]


def _draw(case: PicturedCase, z: int, window: tuple[slice, slice], schema: LabelSchema) -> Markup:
    """PNG and outlines in one SVG, with the pixels' true proportions."""
    plane = case.image[z][window]
    maps = [case.reference[z][window], case.prediction[z][window]]
    if case.upright:
        plane, maps = plane[::-1], [own[::-1] for own in maps]
    height, width = plane.shape
    aspect = case.spacing_zyx_mm[1] / case.spacing_zyx_mm[2]
    paths = []
    for style, own in zip(("reference", "prediction"), maps, strict=True):
        drawn = "".join(outline(mask) for mask in schema.class_masks(own).values())
        paths += [Markup('<path class="{} {}" d="{}"/>').format(style, part, drawn) for part in ("halo", "ink")]
    what = f"slice {z} with the outlines of reference and prediction"
    return Markup(
        '<svg class="overlay" viewBox="0 0 {w} {shown}" role="img" aria-label="{what}" '
        'xmlns="http://www.w3.org/2000/svg" preserveAspectRatio="xMidYMid meet">'
        '<g transform="scale(1 {aspect})"><image width="{w}" height="{h}" preserveAspectRatio="none" href="{png}"/>'
        "{paths}</g></svg>"
    ).format(
        w=width,
        h=height,
        shown=f"{height * aspect:.3f}",
        aspect=f"{aspect:.5f}",
        what=what,
        png=_png(plane),
        paths=Markup("").join(paths),
    )


def _png(plane: Plane) -> str:
    """As a data address, 8 bits of gray."""
    low, high = np.percentile(plane, WINDOW_PERCENTILES)
    gray = np.clip((plane - low) / max(float(high - low), 1e-12), 0, 1) * 255
    picture = Image.fromarray(gray.round().astype(np.uint8))
    picture.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
