"""NRRD and MetaImage files through SimpleITK."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from autossl.data.geometry import FOREIGN_SLICE_SPACING, Geometry
from autossl.data.problems import InvalidInput, Problem
from autossl.data.stored import MAX_INFLATION, StoredImage, check_axes, check_claim, not_one_image, unreadable

NRRD_GEOMETRY = ("space", "space dimension", "space directions", "space origin")
HEADER_BYTES = 65536
ELSEWHERE = {
    ".nrrd": re.compile(rb"^\s*data\s*file\s*:(?P<place>.*)$", re.IGNORECASE | re.MULTILINE),
    ".mha": re.compile(rb"^\s*ElementDataFile\s*[=:](?!\s*LOCAL\s*$)(?P<place>.*)$", re.IGNORECASE | re.MULTILINE),
}
"""Headers that name another file for the voxels: then a data set could read any file of the machine as an image."""
BZIP2 = re.compile(rb"^\s*encoding\s*:\s*(bz2|bzip2)\s*$", re.IGNORECASE | re.MULTILINE)
BZIP2_INFLATION = 50_000


def read_itk(path: Path) -> StoredImage:
    """The voxels as stored and the geometry.

    Raises:
        InvalidInput: where SimpleITK refuses the file, or it holds no real-valued 2D or 3D image.
    """
    reader = _reader(path)
    geometry = _read_header(path, reader)
    inflation = BZIP2_INFLATION if BZIP2.search(_head(path)) else MAX_INFLATION
    check_claim(path, geometry.size_xyz, np.dtype(geometry.stored_dtype).itemsize, inflation)
    try:
        image = reader.Execute()
    except (RuntimeError, MemoryError) as error:
        raise unreadable(path, f"SimpleITK cannot read it ({_reason(error)})") from error
    voxels = sitk.GetArrayFromImage(image)
    return StoredImage(voxels.reshape(1, *geometry.stored_shape_zyx), geometry)


def read_itk_geometry(path: Path) -> Geometry:
    """The geometry from the header; the voxels are neither read nor checked."""
    return _read_header(path, _reader(path))


def write_itk(path: Path, stored: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes an array [z,y,x] as stored, compressed, with the geometry's exact numbers."""
    dims = len(geometry.size_xyz)
    image = sitk.GetImageFromArray(np.ascontiguousarray(stored if dims == 3 else stored[0]))
    image.SetSpacing(geometry.spacing_xyz[:dims])
    image.SetOrigin(geometry.origin_xyz[:dims])
    image.SetDirection(np.reshape(geometry.direction, (3, 3))[:dims, :dims].ravel().tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
    except RuntimeError as error:
        raise OSError(f"{path} could not be written: {_reason(error)}") from error
    if path.suffix.lower() == ".nrrd" and geometry.header:
        _repeat_nrrd_geometry(path, geometry.header)


def _reader(path: Path) -> sitk.ImageFileReader:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO({".nrrd": "NrrdImageIO", ".mha": "MetaImageIO"}[path.suffix.lower()])
    return reader


def _read_header(path: Path, reader: sitk.ImageFileReader) -> Geometry:
    """The geometry; the voxels are not touched."""
    other = ELSEWHERE[path.suffix.lower()].search(_head(path))
    if other is not None:
        place = other["place"].strip().decode("ascii", "replace")[:200]
        raise InvalidInput(
            Problem(
                f"the header says that the voxels are in another file ({place!r})",
                "one file that holds header and voxels",
                "write the image into one file",
                file=path,
            )
        )
    try:
        reader.ReadImageInformation()
        return _geometry(path, reader)
    except (RuntimeError, MemoryError) as error:
        raise unreadable(path, f"SimpleITK cannot read its header ({_reason(error)})") from error


def _head(path: Path) -> bytes:
    """What can be the header: up to the empty line that ends that of an NRRD file."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES).replace(b"\r\n", b"\n")
    end = head.find(b"\n\n") if path.suffix.lower() == ".nrrd" else -1
    return head if end < 0 else head[: end + 1]


def _geometry(path: Path, reader: sitk.ImageFileReader) -> Geometry:
    size, dims = reader.GetSize(), reader.GetDimension()
    if dims not in (2, 3) or min(size) < 1 or reader.GetNumberOfComponents() != 1:
        components = reader.GetNumberOfComponents()
        raise not_one_image(path, f"an image of {' x '.join(str(n) for n in size)} voxels of {components} numbers each")
    pixel = _numpy_name(sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    if not pixel.startswith(("int", "uint", "float")):
        raise not_one_image(path, f"voxels of type {pixel}")
    spacing, direction = reader.GetSpacing(), np.eye(3)
    direction[:dims, :dims] = np.reshape(reader.GetDirection(), (dims, dims))
    check_axes(path, spacing, direction)
    flat = dims == 2
    z = max(spacing) * FOREIGN_SLICE_SPACING if flat else spacing[2]
    return Geometry(
        kind="sitk",
        size_xyz=tuple(size),
        spacing_xyz=(*spacing, 1.0) if flat else tuple(spacing),
        origin_xyz=(*reader.GetOrigin(), 0.0) if flat else tuple(reader.GetOrigin()),
        direction=tuple(direction.ravel().tolist()),
        spacing_zyx_mm=(z, spacing[1], spacing[0]),
        stored_dtype=pixel,
        header=_nrrd_geometry(path) if path.suffix.lower() == ".nrrd" else {},
    )


def _numpy_name(pixel: str) -> str:
    """ "16-bit signed integer" → "int16", "32-bit float" → "float32"."""
    bits, _, kind = pixel.partition("-bit ")
    return {"signed integer": "int", "unsigned integer": "uint", "float": "float"}.get(kind, kind) + bits


def _nrrd_header(path: Path) -> tuple[list[str], int]:
    """The lines of an NRRD header and the offset of what follows it (the empty line included)."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    end = head.find(b"\n\n")
    return head[:end].decode("ascii", "replace").split("\n"), end + 2


def _nrrd_geometry(path: Path) -> dict[str, str]:
    """The lines of the header that place the image. ITK divides directions by their lengths and multiplies them again
    when it writes, which does not give the same bits; repeating the lines does."""
    entries = (line.partition(": ") for line in _nrrd_header(path)[0] if not line.startswith("#"))
    return {key: value.strip() for key, _, value in entries if key in NRRD_GEOMETRY}


def _repeat_nrrd_geometry(path: Path, header: Any) -> None:
    lines, end = _nrrd_header(path)
    lines = [line for line in lines if line.partition(": ")[0] not in NRRD_GEOMETRY]
    lines += [f"{key}: {value}" for key, value in header.items()]
    data = path.read_bytes()[end:]
    path.write_bytes("\n".join(lines).encode("ascii") + b"\n\n" + data)


def _reason(error: BaseException) -> str:
    """The last line of an ITK error that says something (MetaImage errors end with "Reason: Success")."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if line not in ("Reason: Success", "File cannot be read:")]
    return re.sub(r"^ITK ERROR: \w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else "no reason given"
