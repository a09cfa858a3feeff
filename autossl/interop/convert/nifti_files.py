"""NIfTI files copied and split into channels byte by byte: numbers, their type and the geometry stay as they are."""

from __future__ import annotations

import gzip
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel

from autossl.data.problems import Problem
from autossl.data.stored import unreadable

ENDINGS = (".nii.gz", ".nii")
_DAMAGE = (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError, zlib.error, OSError, EOFError)


def stem(path: Path) -> str:
    """The name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def volume_fault(path: Path, n_volumes: int) -> Problem | None:
    """What keeps a file from being an image of so many 3D volumes, by its header; None where nothing does."""
    if not path.is_file():
        return Problem("the file does not exist", "an image file", "check the path, or copy it again", file=path)
    try:
        shape = _load(path).shape
    except ValueError as error:
        return Problem(f"no readable header ({error})", "a NIfTI image", "copy or export the file again", file=path)
    if len(shape) < 2 or math.prod(shape[3:]) != n_volumes:
        expected = "one 3D image" if n_volumes == 1 else f"{n_volumes} channels, as x, y, z, channel"
        found = f"an image of {' x '.join(str(n) for n in shape)} voxels"
        return Problem(found, expected, "correct the description of the dataset, or split the file", file=path)
    return None


def copy_nifti(source: Path, target: Path) -> None:
    """The file as it is, compressed where it was not."""
    if source.name.endswith(".gz"):
        shutil.copyfile(source, target)
        return
    with source.open("rb") as read, _compressed(target, 6) as written:
        shutil.copyfileobj(read, written, 1 << 20)


def split_channels(source: Path, targets: Sequence[Path]) -> None:
    """Writes each volume of a 4D file into a file of its own: the stored numbers, their scale, the header's geometry.

    Raises:
        InvalidInput: the file is cut off or damaged.
    """
    if len(targets) == 1:
        copy_nifti(source, targets[0])
        return
    try:
        image = _load(source)
        voxels = image.dataobj.get_unscaled()
    except (*_DAMAGE, ValueError) as error:
        raise unreadable(source, f"the image is cut off or damaged ({error})") from error
    voxels = voxels.reshape(*voxels.shape[:3], len(targets), order="F")
    header = image.header.copy()
    header.set_data_shape(voxels.shape[:3])
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    # nibabel takes the scale out of the header when it loads a file
    header["scl_slope"], header["scl_inter"] = image.dataobj.slope, image.dataobj.inter
    for channel, target in enumerate(targets):
        with _compressed(target, 6 if voxels.dtype.kind in "iu" else 1) as file:
            file.write(header.binaryblock + b"\0\0\0\0")
            file.write(voxels[..., channel].tobytes(order="F"))


def _load(path: Path) -> Any:
    """Raises ValueError where it is no single NIfTI file."""
    try:
        image: Any = nibabel.load(path)
    except _DAMAGE as error:
        raise ValueError(str(error)) from error
    if not isinstance(image, (nibabel.Nifti1Image, nibabel.Nifti2Image)):
        raise ValueError(f"a {type(image).__name__}")
    return image


@contextmanager
def _compressed(path: Path, level: int) -> Iterator[gzip.GzipFile]:
    """Without name and time, so that equal content gives equal files."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0) as file,
    ):
        yield file
