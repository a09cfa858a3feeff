"""NIfTI files: nibabel reads the header, numpy the voxels; a written file repeats the header's geometry bit by bit.

SimpleITK is not used here: it refuses sheared headers, it may choose the other form where qform and sform disagree
(nnU-Net's reorienting reader goes by nibabel), and the NIfTI files it writes do not come back with the same bits of
spacing and direction where the axes are oblique (196 of 200 random headers). This way is also faster for small files.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError

from autossl.data.geometry import FOREIGN_SLICE_SPACING, LPS_FROM_RAS, Geometry
from autossl.data.stored import StoredImage, not_one_image, unreadable

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


def read_nifti(path: Path) -> StoredImage:
    """The voxels as stored (a view of the file's bytes) and the geometry.

    Raises:
        InvalidInput: where the file is cut off, no NIfTI file, or holds no real-valued 3D image.
    """
    content = path.read_bytes()
    if content[:2] == GZIP_MAGIC:
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(path, f"the compressed data is cut off or damaged ({error})") from error
    header = _parse_header(path, content)
    geometry = _geometry(path, header)
    dtype, count = header.get_data_dtype(), math.prod(geometry.size_xyz)
    offset = int(header["vox_offset"]) or int(header["sizeof_hdr"]) + 4
    if len(content) < offset + count * dtype.itemsize:
        raise unreadable(path, f"the header asks for {count * dtype.itemsize} bytes, {len(content) - offset} are there")
    voxels = np.frombuffer(content, dtype, count, offset).reshape(1, *geometry.stored_shape_zyx)
    slope, intercept = header.get_slope_inter()
    return StoredImage(voxels, geometry, 1.0 if slope is None else slope, 0.0 if intercept is None else intercept)


def read_nifti_geometry(path: Path) -> Geometry:
    """The geometry from the first bytes of the file; the voxels are neither read nor checked."""
    with path.open("rb") as file:
        content = file.read(2048)
    if content[:2] == GZIP_MAGIC:
        try:
            content = zlib.decompressobj(wbits=31).decompress(content, 1024)
        except zlib.error as error:
            raise unreadable(path, f"the compressed data is damaged ({error})") from error
    return _geometry(path, _parse_header(path, content))


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


def _parse_header(path: Path, content: bytes) -> Any:
    sizes = {int.from_bytes(content[:4], "little"), int.from_bytes(content[:4], "big")}
    size = next((n for n in HEADER_CLASSES if n in sizes and len(content) >= n), None)
    if size is None:
        raise unreadable(path, "no NIfTI header")
    try:
        return HEADER_CLASSES[size](content[:size])
    except (HeaderDataError, ValueError) as error:
        raise unreadable(path, f"a damaged NIfTI header ({error})") from error


def _geometry(path: Path, header: Any) -> Geometry:
    """Geometry of the stored array, not yet reoriented; checks that the header describes one real-valued image."""
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    size_xyz = tuple(int(n) for n in shape[:3])
    if len(size_xyz) < 2 or min(size_xyz) < 1 or math.prod(shape[3:]) != 1:
        raise not_one_image(path, f"an image of {' x '.join(str(n) for n in shape) or 'no'} voxels")
    if dtype.kind not in "iuf":
        raise not_one_image(path, f"voxels of type {dtype}")
    affine = header.get_best_affine()
    spacing = np.sqrt(np.sum(affine[:3, :3] * affine[:3, :3], axis=0))
    if not np.all(np.isfinite(affine)) or np.any(spacing == 0):
        raise unreadable(path, f"a header whose axes span no volume: {affine[:3].tolist()}")
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
