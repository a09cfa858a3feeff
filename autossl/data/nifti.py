"""NIfTI files: nibabel reads the header, numpy the voxels; a written file repeats the header's geometry bit by bit.

SimpleITK is not used here: it refuses sheared headers, it may choose the other form where qform and sform disagree
(nnU-Net's reorienting reader goes by nibabel), and the NIfTI files it writes do not come back with the same bits of
spacing and direction where the axes are oblique (196 of 200 random headers). This way is also faster for small files.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from autossl.data.geometry import FOREIGN_SLICE_SPACING, LPS_FROM_RAS, Geometry
from autossl.data.problems import InvalidInput
from autossl.data.stored import StoredImage, check_axes, check_claim, not_one_image, unreadable

HEADER_FIELDS = (
    "dim",
    "pixdim",
    "xyzt_units",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
)
HEADER_CLASSES = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}
GZIP_MAGIC = b"\x1f\x8b"
HEADER_BYTES = 540
MAX_BEHIND_IMAGE = 64 << 20
"""Bytes that may stand between header and voxels, and after them; more is no image."""
READ_AT_ONCE = 1 << 20
UNUSABLE_HEADER = (HeaderDataError, ValueError, OverflowError, ArithmeticError, TypeError, LookupError)
"""What nibabel raises for headers that make no sense."""
_SILENT = logging.getLogger(f"{__name__}.nibabel")
_SILENT.propagate = False
_SILENT.addHandler(logging.NullHandler())


def read_nifti(path: Path) -> StoredImage:
    """The voxels as stored (a view of the file's bytes) and the geometry.

    No more is unpacked than the header asks for, and that is compared with the file's size and the memory first.

    Raises:
        InvalidInput: where the file is cut off, no NIfTI file, or holds no real-valued 3D image.
    """
    with _opened(path) as file:
        content = file.read(HEADER_BYTES)
        header = _parse_header(path, content)
        geometry, (slope, intercept) = _described(path, header)
        dtype, count = header.get_data_dtype(), math.prod(geometry.size_xyz)
        check_claim(path, geometry.size_xyz, dtype.itemsize)
        offset = _offset(path, header)
        end = offset + count * dtype.itemsize
        file.seek(0)
        content = file.read(end)
        if len(content) < end:
            found = f"the header asks for {count * dtype.itemsize} bytes, {max(0, len(content) - offset)} are there"
            raise unreadable(path, found)
        _check_rest(path, file)
    voxels = np.frombuffer(content, dtype, count, offset).reshape(1, *geometry.stored_shape_zyx)
    return StoredImage(voxels, geometry, slope, intercept)


def read_nifti_geometry(path: Path) -> Geometry:
    """The geometry from the first bytes of the file; the voxels are neither read nor checked."""
    with _opened(path) as file:
        content = file.read(HEADER_BYTES)
    return _described(path, _parse_header(path, content))[0]


def write_nifti(path: Path, stored: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes an array [z,y,x] as stored, little-endian, compressed where the name ends with .gz."""
    header = _header_for(geometry)
    stored = np.ascontiguousarray(stored, dtype=stored.dtype.newbyteorder("<"))
    header.set_data_dtype(stored.dtype)
    header["vox_offset"] = int(header["sizeof_hdr"]) + 4
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["magic"] = b"n+1" if int(header["sizeof_hdr"]) == 348 else header["magic"]
    level = 6 if stored.dtype.kind in "iu" else 1  # label maps shrink much and fast, maps of floats hardly and slowly
    with path.open("wb") as raw:
        if path.name.endswith(".gz"):
            with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=raw, mtime=0) as file:
                file.write(header.binaryblock + b"\0\0\0\0")
                file.write(stored.data)
        else:
            raw.write(header.binaryblock + b"\0\0\0\0")
            raw.write(stored.data)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked as it is read where it is compressed, whatever its name says."""
    with path.open("rb") as raw:
        compressed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        try:
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if compressed else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(path, f"the compressed data is cut off or damaged ({error})") from error


def _check_rest(path: Path, file: BinaryIO) -> None:
    """Reads to the end, where the checksum of a compressed file stands; what lies behind the image does not count."""
    if not isinstance(file, gzip.GzipFile):
        return
    left = MAX_BEHIND_IMAGE
    while part := file.read(READ_AT_ONCE):
        left -= len(part)
        if left < 0:
            raise unreadable(path, f"the compressed data goes on for more than {MAX_BEHIND_IMAGE >> 20} MiB after it")


def _parse_header(path: Path, content: bytes) -> Any:
    sizes = {int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")}
    size = next((n for n in HEADER_CLASSES if n in sizes and len(content) >= n), None)
    if size is None:
        raise unreadable(path, "no NIfTI header")
    header = HEADER_CLASSES[size](content[:size], check=False)
    _check_pixdim(path, header)  # before nibabel replaces zero and negative spacings
    try:
        header.check_fix(logger=_SILENT)
    except UNUSABLE_HEADER as error:
        raise unreadable(path, f"a damaged NIfTI header ({error})") from error
    return header


def _check_pixdim(path: Path, header: Any) -> None:
    dims = min(max(int(header["dim"][0]), 0), 3)
    if 2 <= int(header["dim"][0]) <= 7:
        check_axes(path, [float(value) for value in header["pixdim"][1 : 1 + dims]], np.eye(3))


def _offset(path: Path, header: Any) -> int:
    first, given = int(header["sizeof_hdr"]) + 4, float(header["vox_offset"])
    if given and not int(header["sizeof_hdr"]) <= given <= MAX_BEHIND_IMAGE:
        raise unreadable(path, f"a damaged NIfTI header (its voxels begin at byte {given:g})")
    return int(given) or first


def _described(path: Path, header: Any) -> tuple[Geometry, tuple[float, float]]:
    """Geometry of the stored array, and slope and intercept of its numbers."""
    try:
        slope, intercept = header.get_slope_inter()
        return _geometry(path, header), (1.0 if slope is None else slope, 0.0 if intercept is None else intercept)
    except InvalidInput:
        raise
    except UNUSABLE_HEADER as error:
        raise unreadable(path, f"a damaged NIfTI header ({error})") from error


def _geometry(path: Path, header: Any) -> Geometry:
    """Geometry of the stored array, not yet reoriented; checks that the header describes one real-valued image."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    size_xyz = tuple(int(n) for n in shape[:3])
    if len(size_xyz) < 2 or min(size_xyz) < 1 or math.prod(int(n) for n in shape[3:]) != 1:
        raise not_one_image(path, f"an image of {' x '.join(str(n) for n in shape) or 'no'} voxels")
    if dtype.kind not in "iuf":
        raise not_one_image(path, f"voxels of type {dtype}")
    affine = header.get_best_affine()
    spacing = np.sqrt(np.sum(affine[:3, :3] * affine[:3, :3], axis=0))
    if not np.all(np.isfinite(affine)) or not np.all(np.isfinite(spacing)) or np.any(spacing == 0):
        raise unreadable(path, f"a header whose axes span no volume: {affine[:3].tolist()}")
    check_axes(path, spacing.tolist(), affine[:3, :3])
    zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
    x, y, z = zooms if len(zooms) == 3 else (*zooms, max(zooms) * FOREIGN_SLICE_SPACING)
    return Geometry(
        kind="nibabel",
        size_xyz=size_xyz,
        spacing_xyz=tuple(spacing.tolist()),
        origin_xyz=tuple((LPS_FROM_RAS @ affine[:3, 3]).tolist()),
        direction=tuple((LPS_FROM_RAS @ affine[:3, :3] / spacing).ravel().tolist()),
        spacing_zyx_mm=(z, y, x),
        stored_dtype=dtype.name,
        header={name: _plain(header[name]) for name in HEADER_FIELDS} | {"sizeof_hdr": int(header["sizeof_hdr"])},
    )


def _header_for(geometry: Geometry) -> Any:
    """A fresh header with the geometry of the file it was read from, or one made from spacing, origin, direction."""
    if geometry.kind == "nibabel":
        header = HEADER_CLASSES[geometry.header["sizeof_hdr"]]()
        for name in HEADER_FIELDS:
            header[name] = geometry.header[name]
        return header
    header = nibabel.Nifti1Header()
    header.set_data_shape(geometry.size_xyz)
    header.set_xyzt_units("mm")
    header.set_qform(geometry.affine, code="scanner")
    header.set_sform(geometry.affine, code="scanner")
    return header


def _plain(value: npt.NDArray[Any]) -> Any:
    """Numbers as JSON holds them; what is not finite (only unused entries can be) becomes 0."""
    return (np.nan_to_num(value, posinf=0, neginf=0) if value.dtype.kind == "f" else value).tolist()
