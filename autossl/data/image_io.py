"""Images and label maps from files and back, the one door for every format.

An image is float32 [C,z,y,x] with z = 1 for 2D files; a label map is an integer array [z,y,x]. The arrays equal those
of nnU-Net v2's readers: with orientation "RAS" NibabelIOWithReorient, with "native" SimpleITKIO and NaturalImage2DIO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.files import atomic_write
from autossl.data.geometry import Geometry, Orientation
from autossl.data.problems import InvalidInput, Problem
from autossl.data.stored import StoredImage, not_one_image

NIFTI_ENDINGS = (".nii.gz", ".nii")
ITK_ENDINGS = (".nrrd", ".mha")
PICTURE_ENDINGS = (".png", ".bmp", ".tif")
FILE_ENDINGS = (*NIFTI_ENDINGS, *ITK_ENDINGS, *PICTURE_ENDINGS)

__all__ = [
    "FILE_ENDINGS",
    "Geometry",
    "LoadedImage",
    "Orientation",
    "file_ending_of",
    "orientation_for",
    "read_geometry",
    "read_image",
    "read_label",
    "write_label_map",
    "write_scalar_map",
]


@dataclass(frozen=True)
class LoadedImage:
    """One case's image."""

    array: npt.NDArray[np.float32]
    """[C,z,y,x], oriented, contiguous."""
    geometries: tuple[Geometry, ...]
    """One per file, to be compared; pictures hold all their channels in one file."""

    @property
    def geometry(self) -> Geometry:
        """Of the first file; results are written with it."""
        return self.geometries[0]

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Spacing of the array."""
        return self.geometry.spacing_zyx_mm


def file_ending_of(path: Path) -> str:
    """The known ending of a file name, lower case; "" where it is none of `FILE_ENDINGS`."""
    name = path.name.lower()
    return next((ending for ending in FILE_ENDINGS if name.endswith(ending)), "")


def orientation_for(file_ending: str) -> Orientation:
    """ "native" for pictures, "RAS" for volumes."""
    return "native" if file_ending.lower() in PICTURE_ENDINGS else "RAS"


def read_image(files: Sequence[Path], orientation: Orientation = "RAS") -> LoadedImage:
    """Reads a case's channels, each file once.

    Args:
        files: one file per channel, in channel order; a color picture is one file of three channels.
        orientation: "RAS" or "native".

    Raises:
        InvalidInput: naming the file, where one cannot be read or where the channels differ in size.
    """
    paths = [Path(file) for file in files]
    geometries: list[Geometry] = []
    array = np.empty(0, dtype=np.float32)
    for number, path in enumerate(paths):
        stored = _existing(path).read(path)
        geometry = _oriented(path, stored.geometry, orientation)
        shape = (stored.voxels.shape[0], *geometry.shape_zyx)
        if number == 0:
            array = np.empty((len(paths), *shape), dtype=np.float32)
        if shape != array.shape[1:]:
            raise InvalidInput(
                Problem(
                    f"{shape} channels and voxels (z,y,x after reorientation), the first file has {array.shape[1:]}",
                    "all channels of a case on the same grid",
                    "resample the channels onto one grid",
                    file=path,
                )
            )
        stored.write_intensities(array[number], geometry)
        geometries.append(geometry)
    return LoadedImage(array.reshape(-1, *array.shape[2:]), tuple(geometries))


def read_label(
    file: Path, orientation: Orientation = "RAS"
) -> tuple[npt.NDArray[np.integer[Any]], tuple[float, float, float], Geometry]:
    """Reads a label map as integers [z,y,x]; `geometry.stored_dtype` tells how the file stores them.

    Whole numbers stored as float become int32. A palette picture gives the palette's indices.

    Raises:
        InvalidInput: where the file cannot be read, has several channels or values that are no whole numbers.
    """
    path = Path(file)
    stored = _existing(path).read_label(path)
    if stored.voxels.shape[0] != 1:
        raise not_one_image(path, f"a label map of {stored.voxels.shape[0]} channels")
    geometry = _oriented(path, stored.geometry, orientation)
    return _as_integers(path, stored.label_map(geometry)), geometry.spacing_zyx_mm, geometry


def read_geometry(file: Path, orientation: Orientation = "RAS") -> Geometry:
    """The geometry from the header alone; fast, finds no damage in the voxels.

    Raises:
        InvalidInput: where the header cannot be read.
    """
    path = Path(file)
    return _oriented(path, _existing(path).read_geometry(path), orientation)


def write_label_map(path: Path, label_map: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes an oriented label map [z,y,x] onto the grid of the input, atomically.

    Args:
        path: its ending decides the format.
        label_map: integers or booleans; kept in their type where the format has it, 64-bit ones become int32.
        geometry: of the input image (or label) that the map belongs to.

    Raises:
        ValueError: where the array's shape is not the geometry's.
        InvalidInput: where the format cannot hold the array.
    """
    if label_map.dtype.kind not in "iub":
        raise ValueError(f"a label map holds integers, this one {label_map.dtype}")
    narrow = {"bool": np.uint8, "int64": np.int32, "uint64": np.uint32}.get(label_map.dtype.name)
    _write(Path(path), label_map if narrow is None else label_map.astype(narrow), geometry)


def write_scalar_map(path: Path, scalar_map: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes an oriented map of real numbers [z,y,x] onto the input's grid as float32, atomically.

    Raises:
        ValueError: where the array's shape is not the geometry's.
        InvalidInput: where the format holds no real numbers (PNG, BMP).
    """
    _write(Path(path), scalar_map.astype(np.float32, copy=False), geometry)


@dataclass(frozen=True)
class _Format:
    """What a family of formats can do; `write` takes the array as stored."""

    read: Callable[[Path], StoredImage]
    read_label: Callable[[Path], StoredImage]
    read_geometry: Callable[[Path], Geometry]
    write: Callable[[Path, npt.NDArray[Any], Geometry], None]


def _format_of(path: Path) -> _Format:
    """By the file's ending; imported on demand, because SimpleITK alone takes longer than reading a small case."""
    ending = file_ending_of(path)
    if ending in NIFTI_ENDINGS:
        from autossl.data import nifti

        return _Format(nifti.read_nifti, nifti.read_nifti, nifti.read_nifti_geometry, nifti.write_nifti)
    if ending in ITK_ENDINGS:
        from autossl.data import itk_images as itk

        return _Format(itk.read_itk, itk.read_itk, itk.read_itk_geometry, itk.write_itk)
    if ending in PICTURE_ENDINGS:
        from autossl.data import pictures

        read_label = partial(pictures.read_picture, keep_palette=True)
        return _Format(pictures.read_picture, read_label, pictures.read_picture_geometry, pictures.write_picture)
    raise _unknown_ending(path)


def _existing(path: Path) -> _Format:
    """The format of a file that is there and not empty."""
    image_format = _format_of(path)
    if not path.is_file():
        raise InvalidInput(Problem("the file does not exist", "an image file", "check the path", file=path))
    if path.stat().st_size == 0:
        raise InvalidInput(Problem("the file is empty (0 bytes)", "an image", "copy or export it again", file=path))
    return image_format


def _write(path: Path, oriented: npt.NDArray[Any], geometry: Geometry) -> None:
    image_format = _format_of(path)
    stored = geometry.restore(oriented)
    with atomic_write(path) as unfinished:
        image_format.write(unfinished, stored, geometry)


def _unknown_ending(path: Path) -> InvalidInput:
    return InvalidInput(
        Problem("an unknown file ending", f"one of {', '.join(FILE_ENDINGS)}", "convert or rename the file", file=path)
    )


def _oriented(path: Path, geometry: Geometry, orientation: Orientation) -> Geometry:
    if orientation == "native" or geometry.kind == "natural":
        return geometry
    try:
        return geometry.oriented_to_ras()
    except InvalidInput as error:
        problem = error.problems[0]
        raise InvalidInput(Problem(problem.found, problem.expected, problem.fix, file=path)) from error


def _as_integers(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[np.integer[Any]]:
    """The label map in at most 32 bits; refuses fractions and numbers beyond."""
    if (values.dtype.kind in "iu" and values.dtype.itemsize < 4) or values.dtype == np.int32:
        return values
    limits = np.iinfo(np.int32)
    fits = (values >= limits.min) & (values <= limits.max)
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            fits &= values == np.rint(values)
    if not fits.all():
        odd = values[~fits]
        raise InvalidInput(
            Problem(
                f"{odd.size} voxels of a label map are no label numbers, {odd.flat[0]!s} for one",
                "whole numbers",
                "write the labels as integers, without interpolation",
                file=path,
            )
        )
    return values.astype(np.int32)
