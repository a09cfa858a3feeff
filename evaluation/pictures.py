"""Pictures of segmentations: slices of an image with the outlines of several label maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.files import atomic_write

COLORS = ("tab:red", "tab:cyan", "tab:orange", "tab:green", "tab:purple", "tab:olive")
"""One per label value, repeated where there are more."""


@dataclass(frozen=True)
class PicturedCase:
    """One row of a picture."""

    name: str
    image: npt.NDArray[np.floating[Any]]
    """[z,y,x]."""
    spacing_zyx_mm: tuple[float, float, float]
    label_maps: Mapping[str, npt.NDArray[np.integer[Any]]]
    """What it is → [z,y,x] on the image's grid; the first one chooses the slice."""
    notes: Mapping[str, str]
    """What it is → text below its name, such as its Dice."""


def draw_outlines(path: Path, cases: Sequence[PicturedCase]) -> None:
    """Writes one PNG: per case a row with the bare slice and one panel per label map, outlines over the image.

    The slice along z is the one where the first label map has most foreground.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + max(len(case.label_maps) for case in cases)
    figure = Figure(figsize=(2.6 * columns, 2.9 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), columns, squeeze=False)
    for row, case in zip(axes, cases, strict=True):
        _draw_case(row, case)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110)


def _draw_case(row: npt.NDArray[Any], case: PicturedCase) -> None:
    reference = next(iter(case.label_maps.values()))
    z = int(np.argmax((reference > 0).sum(axis=(1, 2))))
    low, high = np.percentile(case.image, (0.5, 99.5))
    aspect = case.spacing_zyx_mm[1] / case.spacing_zyx_mm[2]
    titles = [f"{case.name}, slice {z}", *(f"{k}\n{case.notes.get(k, '')}".strip() for k in case.label_maps)]
    maps = [None, *case.label_maps.values()]
    for axis, title, label_map in zip(row, titles, maps, strict=False):
        # y of an oriented volume grows to the front: drawn upwards, as in radiology
        axis.imshow(case.image[z], cmap="gray", vmin=low, vmax=high, aspect=aspect, origin="lower")
        axis.set_title(title, fontsize=8)
        if label_map is not None:
            _draw_labels(axis, label_map[z])
    for axis in row:
        axis.set_axis_off()


def _draw_labels(axis: Any, label_slice: npt.NDArray[np.integer[Any]]) -> None:
    for value in np.unique(label_slice[label_slice > 0]):
        color = COLORS[(int(value) - 1) % len(COLORS)]
        mask = (label_slice == value).astype(float)
        axis.contourf(mask, levels=[0.5, 1.5], colors=[color], alpha=0.25)
        axis.contour(mask, levels=[0.5], colors=[color], linewidths=1.1)
