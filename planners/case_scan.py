"""One read of a case tells all: what is wrong with it, its numbers for the fingerprint, its hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from autossl.data.geometry import Geometry, Orientation
from autossl.data.hashes import robust_hash, voxel_hash
from autossl.data.image_io import LoadedImage, read_geometry, read_image, read_label
from autossl.data.integrity import (
    Findings,
    check_grids,
    check_image,
    check_label_map,
    check_shear,
    count_labels,
    remap_label_map,
)
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import Case, Pool
from autossl.planners.foreground import WeightedValues, draw_foreground, foreground_path, store_foreground
from autossl.planners.label_shapes import ClassShape, class_shapes, steps_for

QUANTILES = (0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995)
MAX_VOXELS_OF_QUANTILES = 2**18
"""Larger images are read on a regular grid of every second, fourth, … voxel for the quantiles."""
MAX_KEPT_VALUES = 2**18
"""Foreground values of a case (voxels × channels) that are kept even where no channel is CT."""

Box = tuple[slice, slice, slice]
LabelMap = npt.NDArray[np.integer[Any]]


class CaseFingerprint(BaseModel):
    """The numbers of one case. Spatial sequences are z,y,x as read (not transposed)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pool: Pool
    files: dict[str, tuple[int, int]]
    """File, relative to the dataset's folder → size in bytes and time of change in ns; tells whether it changed."""
    spacing_zyx_mm: tuple[float, float, float]
    shape_zyx: tuple[int, int, int]
    shape_after_crop_zyx: tuple[int, int, int]
    """After the crop to the box of the voxels that are not 0 in some channel."""
    relative_size_after_crop: float
    intensity_quantiles: tuple[tuple[float, ...], ...]
    """Per channel, inside the crop, at the levels `QUANTILES`; empty for test cases."""
    class_voxels: dict[str, int]
    """Per foreground class or region; empty where there is no label that may be used."""
    components: dict[str, tuple[int, float]]
    """Number of connected components, and the share of the largest in the voxels of the class."""
    ellipticity: dict[str, float | None]
    """Dice with the ellipse of the same moments (`label_shapes.ellipse_dice`)."""
    voxel_hash: str
    robust_hash: str
    warnings: tuple[str, ...] = ()
    """What is odd but readable."""


@dataclass(frozen=True)
class ScanSettings:
    """What a scan needs to know of the dataset."""

    folder: Path
    """Of the raw dataset."""
    schema: LabelSchema
    n_channels: int
    orientation: Orientation = "RAS"
    n_draws: int = 0
    """Foreground draws per labeled case and channel."""
    remap_labels: Mapping[int, int] = field(default_factory=dict)
    foreground_folder: Path | None = None
    """Where foreground intensities are kept; None: they are not."""
    keep_all_foreground: bool = False
    """Also that of large cases; CT needs it, since its normalization is recomputed for a run's labeled cases."""


@dataclass(frozen=True)
class CaseScan:
    """What one read of a case gave."""

    fingerprint: CaseFingerprint | None
    """None where the case has an error."""
    findings: Findings
    drawn: tuple[WeightedValues, ...] = ()
    """Foreground draws per channel; empty unless labeled."""


def scan_case(case: Case, settings: ScanSettings) -> CaseScan:
    """Reads a case's files once; problems are returned, not raised.

    Labels of test cases are checked and then forgotten: no statistic comes from them.
    """
    stamps = file_stamps(case, settings.folder)
    findings = Findings()
    image, geometry = _read_channels(case, settings, findings)
    label_map = _read_label_map(case, settings, geometry, findings)
    if findings.errors or image is None:
        return CaseScan(None, findings)
    box = nonzero_box(image.array)
    cropped_shape = image.array[(slice(None), *box)].shape[1:]
    shapes: dict[str, ClassShape] = {}
    drawn: tuple[WeightedValues, ...] = ()
    if case.pool == "labeled" and label_map is not None:
        shapes = class_shapes(label_map, settings.schema, image.spacing_zyx_mm)
        drawn = _draw(case, image.array[(slice(None), *box)], label_map[box], settings)
    fingerprint = CaseFingerprint(
        pool=case.pool,
        files=stamps,
        spacing_zyx_mm=image.spacing_zyx_mm,
        shape_zyx=image.array.shape[1:],
        shape_after_crop_zyx=cropped_shape,
        relative_size_after_crop=float(np.prod(cropped_shape) / np.prod(image.array.shape[1:])),
        intensity_quantiles=() if case.pool == "test" else intensity_quantiles(image.array[(slice(None), *box)]),
        class_voxels={name: shape.voxels for name, shape in shapes.items()},
        components={name: (shape.components, shape.largest_share) for name, shape in shapes.items()},
        ellipticity={name: shape.ellipse_dice for name, shape in shapes.items()},
        voxel_hash=voxel_hash(image.array),
        robust_hash=robust_hash(image.array),
        warnings=tuple(problem.found for problem in findings.warnings),
    )
    return CaseScan(fingerprint, findings, drawn)


def file_stamps(case: Case, folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file of a case; a file that is missing has none."""
    stamps = {}
    for path in (*case.images, *([case.label] if case.label else [])):
        if path.exists():
            status = path.stat()
            name = path.relative_to(folder) if path.is_relative_to(folder) else path
            stamps[name.as_posix()] = (status.st_size, status.st_mtime_ns)
    return stamps


def scan_bytes(case: Case) -> int:
    """Estimated peak memory of a scan in bytes, from the header of the first channel; 0 where it cannot be read."""
    try:
        shape = read_geometry(case.images[0], "native").shape_zyx
    except (InvalidInput, OSError):
        return 0
    per_voxel = 4 * len(case.images) + 20  # float32 channels; one file, its mask, the label map and its copy
    return int(np.prod(shape, dtype=np.int64)) * per_voxel


def nonzero_box(image: npt.NDArray[np.floating]) -> Box:
    """The smallest box [z,y,x] around the voxels that are not 0 in some channel of [C,z,y,x].

    nnU-Net fills the holes of that mask first; holes lie inside, so the box is the same.
    """
    nonzero = image[0] != 0
    for channel in image[1:]:
        nonzero |= channel != 0
    first, second, third = (
        np.flatnonzero(nonzero.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)
    )
    z, y, x = (slice(int(hits[0]), int(hits[-1]) + 1) for hits in (first, second, third))
    return z, y, x


def intensity_quantiles(image: npt.NDArray[np.floating]) -> tuple[tuple[float, ...], ...]:
    """Per channel of [C,z,y,x] the intensities at the levels `QUANTILES`."""
    steps = steps_for(image.shape[1:], MAX_VOXELS_OF_QUANTILES)
    sparse = image[(slice(None), *(slice(None, None, step) for step in steps))]
    return tuple(tuple(np.quantile(channel, QUANTILES).astype(float).tolist()) for channel in sparse)


def _read_channels(
    case: Case, settings: ScanSettings, findings: Findings
) -> tuple[LoadedImage | None, Geometry | None]:
    """The image where all its channels can be read, and the geometry of the first channel that can."""
    image, refused = None, InvalidInput(())
    try:
        image = read_image(case.images, settings.orientation)
        geometries = list(zip(case.images, image.geometries, strict=True))
    except InvalidInput as error:
        refused = error
        geometries = _read_one_by_one(case, settings, findings)
    for path, geometry in geometries[1:]:
        findings.add(check_grids(geometries[0][1], geometry, case.id, path, geometries[0][0]))
    if image is None and not findings.errors:
        findings.errors += [_of_case(problem, case, case.images[0]) for problem in refused.problems]
    if image is not None:
        if len(image.array) != settings.n_channels:
            fix = "convert the image, or correct channel_names in dataset.json"
            expected = f"{settings.n_channels} channels, as in dataset.json"
            found = f"{len(image.array)} channel{'s'[: len(image.array) > 1]} in the file"
            findings.errors.append(Problem(found, expected, fix, case.id, case.images[0]))
        findings.add(check_image(image.array, case.images, case.id))
        findings.warnings += check_shear(image.geometry, case.id, case.images[0])
    return image, geometries[0][1] if geometries else None


def _read_one_by_one(case: Case, settings: ScanSettings, findings: Findings) -> list[tuple[Path, Geometry]]:
    """Reads the channels of a faulty case again, each by itself, so that every fault is listed."""
    readable = []
    for path in case.images:
        try:
            image = read_image([path], settings.orientation)
        except InvalidInput as error:
            findings.errors += [_of_case(problem, case, path) for problem in error.problems]
            continue
        readable.append((path, image.geometry))
        findings.add(check_image(image.array, [path], case.id))
    return readable


def _read_label_map(
    case: Case, settings: ScanSettings, geometry: Geometry | None, findings: Findings
) -> LabelMap | None:
    """The label map, mapped by `remap_labels`, after its checks; None where there is none or it cannot be read."""
    if case.label is None:
        return None
    try:
        label_map, _, label_geometry = read_label(case.label, settings.orientation)
    except InvalidInput as error:
        findings.errors += [_of_case(problem, case, case.label) for problem in error.problems]
        return None
    if geometry is not None:
        findings.add(check_grids(geometry, label_geometry, case.id, case.label, case.images[0]))
    label_map = remap_label_map(label_map, settings.remap_labels)
    counts = count_labels(label_map)
    findings.add(check_label_map(counts, settings.schema, label_geometry.stored_dtype, case.id, case.label))
    return label_map


def _of_case(problem: Problem, case: Case, file: Path) -> Problem:
    return Problem(problem.found, problem.expected, problem.fix, case.id, problem.file or file)


def _draw(
    case: Case, image: npt.NDArray[np.float32], label_map: LabelMap, settings: ScanSettings
) -> tuple[WeightedValues, ...]:
    """Draws of the labeled foreground (the ignore label included, as nnU-Net does); keeps the intensities for later."""
    foreground = image[:, label_map > 0]
    small = foreground.size <= MAX_KEPT_VALUES
    if settings.foreground_folder is not None and (small or settings.keep_all_foreground):
        store_foreground(foreground_path(settings.foreground_folder, case.id), foreground)
    return tuple(draw_foreground(foreground, settings.n_draws))
