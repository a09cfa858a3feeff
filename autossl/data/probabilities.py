"""Probabilities of a case on disk: a byte per value, compressed, in chunks of few slices.

    FOLDER/CASE.nii.gz               the label map
    FOLDER/probabilities/CASE.b2nd   blosc2, uint8 [K,z,y,x]: 255 × probability, rounded, on the label map's own grid

Arrays are in stored order: they lie on `read_label(label_map, "native")` voxel by voxel, whatever orientation a model
works in. K are the outputs of `LabelSchema`: background and classes, or regions. The rounding error is at most 1/510,
and what `labels_of` decides from the bytes is what was decided before (see `quantize`).

Measured on four hippocampus cases: 0.08 to 0.11 bytes per value in 1.5 ms per 160 000 values; 16 bits take 0.67 bytes,
because the noise of probabilities near 0 is kept as well, and LZ4HC 2 takes 0.11 in 2 ms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt

from autossl.data.files import atomic_write
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.data.store import open_array, storage_grid

PROBABILITIES_FOLDER = "probabilities"
STEPS = 255
ROWS_AT_ONCE = 8
COMPRESSION = {"codec": blosc2.Codec.ZSTD, "clevel": 1, "filters": [blosc2.Filter.NOFILTER], "nthreads": 1}

Probabilities = npt.NDArray[np.float32]
Quantized = npt.NDArray[np.uint8]


def probabilities_file(folder: Path, case: str) -> Path:
    """Where the probabilities of a case lie whose label map is in `folder`."""
    return Path(folder) / PROBABILITIES_FOLDER / f"{case}.b2nd"


def quantize(probabilities: npt.NDArray[np.floating[Any]], keep_largest: bool = False) -> Quantized:
    """Probabilities [K, ...] as bytes.

    Halves are rounded down: a byte stands for more than 0.5 exactly where the probability is. So regions stay as they
    were decided.

    Args:
        probabilities: 0 to 1.
        keep_largest: for labels: where rounding makes the largest output equal to one before it, it gets a step more
            (an error of at most 3/510), so that the first of the largest bytes is the first of the largest outputs.
    """
    quantized = np.ceil(probabilities * np.float32(STEPS) - np.float32(0.5)).astype(np.uint8)
    if keep_largest:
        largest = probabilities.argmax(0)[None]
        lost = quantized.argmax(0)[None] != largest
        raised = np.take_along_axis(quantized, largest, 0) + lost
        np.put_along_axis(quantized, largest, raised.astype(np.uint8), 0)
    return quantized


def labels_of(probabilities: Probabilities, schema: LabelSchema) -> npt.NDArray[np.integer[Any]]:
    """Label map [...] of probabilities [K, ...]: the first largest output, or regions above 0.5 in their order."""
    if schema.has_regions:
        return schema.merge_outputs(list(probabilities > 0.5))
    return np.asarray(schema.written_values, dtype=schema.dtype)[probabilities.argmax(0)]


def write_probabilities_quantized(path: Path, probabilities: npt.NDArray[Any] | Iterable[npt.NDArray[Any]]) -> None:
    """Writes a case, atomically.

    Args:
        path: as `probabilities_file` says.
        probabilities: [K,z,y,x], or slabs [K,n,y,x] of it in ascending order; floats are quantized, bytes are taken as
            `quantize` made them.

    Raises:
        ValueError: there is no slab.
    """
    with atomic_write(path) as partial:
        stored: Any = None
        for slab in _slabs_of(probabilities):
            n_outputs, n_rows, *plane = slab.shape
            if stored is None:
                rows_in_all = probabilities.shape[1] if isinstance(probabilities, np.ndarray) else n_rows
                chunks, blocks = storage_grid((n_outputs, rows_in_all, *plane), 1)
                shape = (n_outputs, 0, *plane)
                layout = {"chunks": chunks, "blocks": blocks, "cparams": COMPRESSION, "urlpath": str(partial)}
                stored = blosc2.empty(shape, dtype=np.uint8, **layout)
            start = stored.shape[1]
            stored.resize((n_outputs, start + n_rows, *plane))
            stored[:, start:] = slab if slab.dtype == np.uint8 else quantize(slab)
        if stored is None:
            raise ValueError("no slab of probabilities to write")


def read_probabilities(path: Path, slices: slice | None = None) -> Probabilities:
    """Probabilities [K,z,y,x]; with `slices` only those of the stored z axis are read, as [K,n,y,x].

    Raises:
        InvalidInput: the file is missing, cut off or of another kind.
    """
    return _open(path)[:, slices or slice(None)] / np.float32(STEPS)


def mean_of(paths: Sequence[Path]) -> Iterator[Probabilities]:
    """Mean over several files of a case, in slabs [K,n,y,x] of few slices that together fill the grid, in order.

    Raises:
        InvalidInput: no file, one that cannot be read, or other shapes; before the first slab.
    """
    arrays = [_open(path) for path in paths]
    fix = "combine predictions of the same image by models with the same labels"
    problems = [
        Problem(f"probabilities of shape {array.shape}", f"{arrays[0].shape}, as {paths[0]} has", fix, file=path)
        for path, array in zip(paths, arrays, strict=True)
        if array.shape != arrays[0].shape
    ]
    if not arrays:
        problems.append(Problem("no probabilities to average", "one file or more", "name them"))
    if problems:
        raise InvalidInput(problems)
    return _means(arrays)


def _means(arrays: Sequence[Any]) -> Iterator[Probabilities]:
    for start in range(0, arrays[0].shape[1], ROWS_AT_ONCE):
        total = sum(array[:, start : start + ROWS_AT_ONCE].astype(np.float32) for array in arrays)
        yield total / np.float32(STEPS * len(arrays))


def _slabs_of(probabilities: npt.NDArray[Any] | Iterable[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """Few slices at a time, so that what is made on the way stays small."""
    if not isinstance(probabilities, np.ndarray):
        yield from probabilities
        return
    for start in range(0, probabilities.shape[1], ROWS_AT_ONCE):
        yield np.ascontiguousarray(probabilities[:, start : start + ROWS_AT_ONCE])


def _open(path: Path) -> Any:
    expected = "probabilities as --save_probabilities writes them"
    fix = "predict the case again with --save_probabilities"
    try:
        array = open_array(path)
    except InvalidInput as error:
        raise InvalidInput([replace(p, expected=expected, fix=fix) for p in error.problems]) from error
    if array.dtype != np.uint8 or array.ndim != 4:
        found = f"an array of {array.ndim} axes and {array.dtype}"
        raise InvalidInput(Problem(found, expected, fix, file=Path(path)))
    return array
