"""h5 files with the arrays `image` and `label`, as the semi-supervised literature ships ACDC, LA, Pancreas and BraTS.

The files hold arrays and nothing else: the order of their axes, the spacing and the names of the classes are for the
user to say. Lists of names say what is trained on, validated and tested, and by custom the first names of the training
list are the labeled ones. Written images are float32, with an identity orientation: what is read back is the array.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.image_io import write_label_map, write_scalar_map
from autossl.data.parallel import parallel_map
from autossl.data.problems import InvalidInput, Problem
from autossl.interop.convert.h5_lists import ListedCase, listed_cases, patient_of
from autossl.interop.convert.source import (
    CaseFiles,
    ConvertRequest,
    Progress,
    PublishedLists,
    SourceCase,
    SourceDataset,
    case_faults,
    renamed_channels,
    with_background,
)

logger = logging.getLogger(__name__)

IMAGE, LABEL = "image", "label"
EXTRA = "pip install h5py"
TO_RAS = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
"""Direction (LPS) of an array that already is RAS+: nothing is turned when it is read."""
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ArrayLayout:
    """How the arrays of a data set lie."""

    axes: str
    spacing_zyx_mm: tuple[float, float, float]

    def axes_for(self, n_axes: int, label: bool = False) -> str | None:
        """The axes of an array with so many, slowest first; None where they do not fit. 2D arrays have no z."""
        axes = self.axes.replace("c", "") if label else self.axes
        flat = axes.replace("z", "")
        return axes if len(axes) == n_axes else flat if len(flat) == n_axes else None

    def to_czyx(self, array: npt.NDArray[Any], label: bool = False) -> npt.NDArray[Any]:
        """A view [c,z,y,x]; a channel or slice that the array lacks is added."""
        axes = self.axes_for(array.ndim, label)
        if axes is None:
            raise ValueError(f"an array of {array.ndim} axes is not {self.axes}")
        for name in "zc":
            if name not in axes:
                axes, array = name + axes, array[None]
        return array.transpose([axes.index(name) for name in "czyx"])


def read_h5(request: ConvertRequest, progress: Progress | None = None) -> SourceDataset:
    """Reads the lists and the shapes of all arrays, and the values of the labels where they were not named.

    Raises:
        InvalidInput: with all problems: what `listed_cases` finds, files that cannot be read or lack an array, shapes
            that do not fit the axes or each other, too few cases for a budget; the extra h5 is not installed.
    """
    _h5py()
    folder, options = Path(request.source), request.h5
    layout = ArrayLayout(_checked_axes(options.axes), options.spacing_zyx_mm or (1.0, 1.0, 1.0))
    listed = listed_cases(folder, options.lists)
    shapes, problems = _all_shapes(listed, layout)
    channels = sorted({n for n, _ in shapes.values()})
    if len(channels) > 1:
        found = f"images of {' and '.join(map(str, channels))} channels"
        problems.append(Problem(found, "as many in every case", "check --axes", file=folder))
    labeled = [case for case in listed if case.pool != "unlabeled" and shapes.get(case.id, (0, False))[1]]
    cases = tuple(_case(case, case in labeled, layout, options.patient) for case in listed)
    train = tuple(case.id for case in labeled if case.role == "train")
    validation = tuple(case.id for case in labeled if case.role == "val")
    problems = problems or case_faults(cases, folder) or _budget_faults(options.budgets, len(train), folder)
    if problems:
        raise InvalidInput(problems)
    if options.spacing_zyx_mm is None:
        logger.warning("h5 files have no spacing: 1 mm is written. Name it with --spacing Z Y X")
    labels = request.labels or _found_labels(labeled, request.n_workers, progress)
    usual = ["image"] if channels[0] == 1 else [f"image_{number}" for number in range(channels[0])]
    names = renamed_channels(usual, request.channels, folder)
    lists = PublishedLists(train, validation, tuple(sorted(set(options.budgets))))
    return SourceDataset(names, with_background(labels), cases, {"name": folder.name}, lists)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        found, expected = "package h5py is not installed", "the extra `h5`, which has it"
        raise InvalidInput(Problem(found, expected, EXTRA)) from error
    return h5py


def _checked_axes(axes: str) -> str:
    if sorted(axes) not in (sorted("zyx"), sorted("czyx"), sorted("yx"), sorted("cyx")):
        fix = "correct --axes"
        raise InvalidInput(Problem(f"axes '{axes}'", "each of z, y, x once, as in zyx, xyz or czyx", fix))
    return axes


def _budget_faults(budgets: Sequence[int], n_train: int, folder: Path) -> list[Problem]:
    fix, expected = "lower --labeled", f"at most {n_train}, the labeled cases of the training list"
    return [Problem(f"{n} labeled cases", expected, fix, file=folder) for n in budgets if n > n_train]


def _all_shapes(listed: Sequence[ListedCase], layout: ArrayLayout) -> tuple[dict[str, tuple[int, bool]], list[Problem]]:
    """Case → number of channels and whether it has a label; and what is wrong with the files."""
    found: dict[str, tuple[int, bool]] = {}
    problems: list[Problem] = []
    for case in listed:
        try:
            shapes = [_shapes(path) for path in case.files]
        except InvalidInput as error:
            problems += error.problems
            continue
        faults = _shape_faults(case, shapes, layout)
        problems += faults
        if not faults:
            image = np.broadcast_to(np.bool_(False), shapes[0][0])  # takes no memory
            found[case.id] = layout.to_czyx(image).shape[0], shapes[0][1] is not None
    return found, problems


def _shapes(path: Path) -> tuple[Shape, Shape | None]:
    """Of image and label, without reading them."""
    with _opened(path) as file:
        label = _array(file, LABEL, path) if LABEL in file else None
        return _array(file, IMAGE, path).shape, None if label is None else label.shape


def _shape_faults(case: ListedCase, shapes: Sequence[tuple[Shape, Shape | None]], layout: ArrayLayout) -> list[Problem]:
    image, label = shapes[0]
    if len(set(shapes)) > 1:
        kinds = ", ".join(sorted({str(shape) for shape, _ in shapes}))
        fix = "list the volumes instead of the slices, or convert the slices as cases of their own"
        return [Problem(f"slices of different shapes or labels: {kinds}", "slices of one shape", fix, case=case.id)]
    axes = layout.axes_for(len(image))
    fits = axes is not None and min(image) > 0 and (not case.is_stack or "z" not in axes)
    if not fits:
        expected = f"axes {layout.axes}" + (", slices without z" if case.is_stack else "")
        fix = "name the order of the axes with --axes, with a c for the channels"
        return [Problem(f"an image of the shape {image}", expected, fix, case=case.id, file=case.files[0])]
    spatial = tuple(n for n, axis in zip(image, axes or "", strict=True) if axis != "c")
    if label is not None and label != spatial:
        found = f"image {image} and label {label}"
        return [Problem(found, "one shape, but for the channels", "check --axes", case=case.id, file=case.files[0])]
    return []


def _opened(path: Path) -> Any:
    try:
        return _h5py().File(path, "r")
    except OSError as error:
        fix = "copy or download the file again"
        raise InvalidInput(Problem(f"it cannot be opened ({error})", "a whole HDF5 file", fix, file=path)) from error


def _array(file: Any, name: str, path: Path) -> Any:
    """An array that lies in the file itself; links to other files, which h5py would follow, are refused."""
    h5py = _h5py()
    link = file.get(name, getlink=True)
    array = file.get(name) if isinstance(link, h5py.HardLink) else None
    if not isinstance(array, h5py.Dataset) or array.is_virtual or array.external:
        found = f"no array '{name}' in the file; it has {', '.join(file) or 'nothing'}"
        raise InvalidInput(Problem(found, "the arrays image and label", "export the file again", file=path))
    if array.dtype.kind not in "iufb":
        found = f"'{name}' is of type {array.dtype}"
        raise InvalidInput(Problem(found, "numbers", "export the file again", file=path))
    return array


def _read(path: Path, name: str) -> npt.NDArray[Any]:
    with _opened(path) as file:
        try:
            return np.asarray(_array(file, name, path)[...])
        except OSError as error:
            fix = "copy or download the file again"
            raise InvalidInput(Problem(f"'{name}' is damaged ({error})", "a whole array", fix, file=path)) from error


def _found_labels(cases: Sequence[ListedCase], n_workers: int | None, progress: Progress | None) -> dict[str, int]:
    """class_1, class_2, …: the values that occur in the labels."""
    values: set[int] = set()
    found = parallel_map(_values, cases, n_workers, name_of=lambda case: case.id)
    for done, there in enumerate(found, start=1):
        values |= there
        if progress:
            progress("labels", done, len(cases))
    named = {f"class_{value}": value for value in sorted(values) if value != 0}
    if not named:
        raise InvalidInput(Problem("all labels are 0 everywhere", "at least one class", "check the files"))
    logger.warning("the classes are called %s: name them with --label NAME=VALUE", ", ".join(named))
    return named


def _values(case: ListedCase) -> set[int]:
    return {int(value) for path in case.files for value in np.unique(_label(path))}


def _label(path: Path) -> npt.NDArray[np.integer[Any]]:
    """The label as whole numbers from 0 on, in the narrowest type."""
    array = _read(path, LABEL)
    if (array != np.floor(array)).any() or array.min() < 0 or array.max() >= 2**31:
        found = "labels that are negative, fractions or beyond 32 bits"
        raise InvalidInput(Problem(found, "whole numbers from 0 on", "export the labels again", file=path))
    return array.astype(np.uint8 if array.max() < 256 else np.int32)


def _case(case: ListedCase, has_label: bool, layout: ArrayLayout, pattern: str | None) -> SourceCase:
    patient = patient_of(case.id, pattern)
    pool = "unlabeled" if case.pool == "labeled" and not has_label else case.pool
    return SourceCase(case.id, pool, has_label, partial(_write, case.files, layout), patient)


def _write(sources: Sequence[Path], layout: ArrayLayout, files: CaseFiles) -> None:
    """The image as one float32 file per channel, and the label; slices are stacked along z."""
    image = np.concatenate([layout.to_czyx(_read(path, IMAGE)) for path in sources], axis=1)
    geometry = _geometry(image.shape[1:], layout)
    for channel, target in zip(image, files.images, strict=True):
        write_scalar_map(target, channel, geometry)
    if files.label is not None:
        label = np.concatenate([layout.to_czyx(_label(path), label=True)[0] for path in sources])
        write_label_map(files.label, label, geometry)


def _geometry(shape_zyx: Shape, layout: ArrayLayout) -> Geometry:
    z, y, x = layout.spacing_zyx_mm
    return Geometry(
        kind="sitk",
        size_xyz=tuple(int(n) for n in shape_zyx[::-1]),
        spacing_xyz=(x, y, z),
        origin_xyz=(0.0, 0.0, 0.0),
        direction=TO_RAS,
        spacing_zyx_mm=layout.spacing_zyx_mm,
    )
