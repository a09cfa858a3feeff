"""Pictures as 2D images: PNG and BMP through Pillow, TIFF through tifffile; grey, or colors as channels."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, UnidentifiedImageError

from autossl.data.geometry import FOREIGN_SLICE_SPACING, Geometry
from autossl.data.problems import InvalidInput, Problem
from autossl.data.stored import StoredImage, check_claim, not_one_image, unreadable

READ_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    UnidentifiedImageError,
    Image.DecompressionBombError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    struct.error,
    zlib.error,
)
"""What Pillow and tifffile raise for damaged files: whatever the damage provokes in them."""
INFLATION = 20_000
"""Numbers per byte of a file: a byte of it can hold eight pixels of one bit, and TIFF has denser codes than deflate."""
PILLOW_FORMATS = ("PNG", "BMP", "DIB", "TIFF")
"""Of the many that Pillow knows, so that a renamed file reaches no other reader."""


def read_picture(path: Path, keep_palette: bool = False) -> StoredImage:
    """The pixels [C,1,y,x] and the geometry; colors become channels.

    Args:
        path: a PNG, BMP or TIFF file.
        keep_palette: for label maps: the palette's indices are the labels, not its colors.

    Raises:
        InvalidInput: where the file is damaged, or holds several pages.
    """
    is_tiff = path.suffix.lower() in (".tif", ".tiff")
    pixels = _read_tiff(path) if is_tiff else _read_pillow(path, keep_palette)
    if pixels.ndim == 3 and pixels.shape[-1] in (3, 4):
        pixels = pixels.transpose(2, 0, 1)
    elif pixels.ndim == 2:
        pixels = pixels[None]
    else:
        raise not_one_image(path, f"an image of {' x '.join(str(n) for n in pixels.shape)} pixels")
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8)  # not a view: Pillow's True is stored as 255
    if pixels.dtype.kind not in "iuf":
        raise not_one_image(path, f"pixels of type {pixels.dtype}")
    return StoredImage(pixels[:, None], _geometry(pixels.shape[2], pixels.shape[1], pixels.dtype.name))


def read_picture_geometry(path: Path) -> Geometry:
    """The geometry from the header; the pixels are neither read nor checked."""
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            return _geometry(*image.size, "")
    except READ_ERRORS:
        return read_picture(path).geometry  # TIFF variants that only tifffile knows


def write_picture(path: Path, stored: npt.NDArray[Any], geometry: Geometry) -> None:
    """Writes an array [z=1,y,x]: PNG holds 8 or 16 bit, BMP 8 bit, TIFF any number."""
    if stored.shape[0] != 1:
        raise InvalidInput(
            Problem(f"a volume of {stored.shape[0]} slices", "a 2D image", "choose a volume format", file=path)
        )
    ending, pixels = path.suffix.lower(), np.ascontiguousarray(stored[0])
    if ending in (".tif", ".tiff"):
        tifffile.imwrite(path, pixels, compression="zlib")
        return
    if pixels.dtype not in ((np.uint8, np.uint16) if ending == ".png" else (np.uint8,)):
        raise InvalidInput(
            Problem(
                f"numbers of type {pixels.dtype} for a {ending} file",
                "8 bit, for .png also 16 bit, unsigned",
                "write .tif or .nii.gz",
                file=path,
            )
        )
    Image.fromarray(pixels).save(path)


def _read_pillow(path: Path, keep_palette: bool) -> npt.NDArray[Any]:
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as image:
            check_claim(path, image.size, len(image.getbands()), INFLATION)
            if image.mode == "P" and image.palette is not None and not keep_palette:
                return np.asarray(image.convert(image.palette.mode))
            return np.asarray(image)
    except InvalidInput:
        raise
    except READ_ERRORS as error:
        raise unreadable(path, f"Pillow cannot read it ({error})") from error


def _read_tiff(path: Path) -> npt.NDArray[Any]:
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            check_claim(path, series.shape, series.dtype.itemsize if series.dtype else 1, INFLATION)
            pixels, axes = np.asarray(series.asarray()), series.axes
    except InvalidInput:
        raise
    except READ_ERRORS as error:
        raise unreadable(path, f"tifffile cannot read it ({error})") from error
    if pixels.ndim == 3 and axes.startswith("S"):
        return np.moveaxis(pixels, 0, -1)
    return pixels


def _geometry(width: int, height: int, dtype: str) -> Geometry:
    return Geometry(
        kind="natural",
        size_xyz=(int(width), int(height)),
        spacing_xyz=(1.0, 1.0, 1.0),
        origin_xyz=(0.0, 0.0, 0.0),
        direction=tuple(np.eye(3).ravel().tolist()),
        spacing_zyx_mm=(FOREIGN_SLICE_SPACING, 1.0, 1.0),
        stored_dtype=dtype,
    )
