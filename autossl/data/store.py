"""Preprocessed cases on disk: one folder per set of preprocessing parameters, one file per array.

    images/<case>.b2nd  nonzero/<case>.b2nd  properties/<case>.json      from the image alone
    labels/<case>.b2nd  locations/<case>.npz                             from the label; a loader of unlabeled cases
                                                                         is never given one of these paths

Arrays are chunked, compressed blosc2 files: reading a patch decompresses only the blocks that it touches. Each file
appears whole or not at all, and the one that makes a case valid (properties, label) is written last. Files are not
synced one by one, which took most of the time: `has` recognizes one that a power cut left incomplete, `damaged` one
whose content changed, by its checksum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import numpy.typing as npt

from autossl.data.checksums import CHECKSUM, array_checksum, with_checksum, without_checksum, zip_damage
from autossl.data.files import PARTIAL, atomic_write, read_json, write_json
from autossl.data.prepared import CaseProperties, PreparedCase
from autossl.data.problems import InvalidInput, Problem

SOURCE_META = "source"
BLOCK_BYTES = 64 * 1024  # fits the cache beside its compressed form
BLOCKS_PER_CHUNK = 32

__all__ = [
    "CaseStore",
    "array_damage",
    "open_array",
    "read_class_locations",
    "read_source",
    "storage_grid",
    "write_array",
]


def storage_grid(shape: tuple[int, ...], itemsize: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunk and block shapes for an array [..., z, y, x] that is read in boxes and in single planes.

    A block, the unit of reading, holds at most 64 KiB of one channel and few planes: a plane must not cost many times
    its size. A chunk, the unit of writing, holds up to 32 blocks, whole planes first.
    """
    *lead, z, y, x = shape
    planes = min(z, 4)
    edge = 2 ** int(math.log2(math.sqrt(BLOCK_BYTES / itemsize / planes)))
    block = (planes, min(y, edge), min(x, edge))
    left, chunk = BLOCKS_PER_CHUNK, [0, 0, 0]
    for axis in (2, 1, 0):
        blocks = min(left, math.ceil((z, y, x)[axis] / block[axis]))
        chunk[axis] = min((z, y, x)[axis], blocks * block[axis])
        left //= blocks
    ones = (1,) * len(lead)
    return (*ones, *chunk), (*ones, *block)


def write_array(path: Path, array: npt.NDArray[Any], source: Any = None, sync: bool = True) -> None:
    """Writes an array [..., z, y, x] atomically; `source` (plain values) is kept in the file for `read_source`.

    `sync` as in `atomic_write`.
    """
    array = np.ascontiguousarray(array)
    chunks, blocks = storage_grid(array.shape, array.dtype.itemsize)
    compression = _compression(_better_filter(array, blocks))
    with atomic_write(path, sync) as partial:
        stored = blosc2.asarray(array, urlpath=str(partial), chunks=chunks, blocks=blocks, cparams=compression)
        if source is not None:
            stored.schunk.vlmeta[SOURCE_META] = source
        stored.schunk.vlmeta[CHECKSUM] = array_checksum(stored, source)


def array_damage(path: Path) -> str | None:
    """What is wrong with an array file; None where it is whole, or was written before arrays had checksums.

    All of the file is read.
    """
    try:
        array = open_array(path)
        meta = array.schunk.vlmeta
        if CHECKSUM not in meta or array_checksum(array, meta.get(SOURCE_META)) == meta[CHECKSUM]:
            return None
    except InvalidInput as error:
        return error.problems[0].found
    except Exception as error:  # blosc2 throws many types for a damaged frame
        return f"not a whole array file ({error})"
    return "its checksum does not fit"


def open_array(path: Path) -> Any:
    """The array as a blosc2 NDArray (`.shape`, `.dtype`, slicing gives numpy); only what is sliced is read.

    Raises:
        InvalidInput: where the file is missing, cut off or no array.
    """
    # Memory mapping fails on Windows: https://github.com/MIC-DKFZ/nnUNet/issues/2723
    mapping = {} if os.name == "nt" else {"mmap_mode": "r"}
    try:
        array = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1), **mapping)
        if not isinstance(array, blosc2.NDArray):
            raise TypeError(f"it holds a {type(array).__name__}")
    except Exception as error:  # blosc2 throws many types, for a cut-off file RuntimeError
        found = f"not a complete array file ({error})" if Path(path).exists() else "the file does not exist"
        raise InvalidInput(
            Problem(
                found,
                "a preprocessed array (.b2nd)",
                "run autossl_plan_and_preprocess again: it makes what is missing or damaged",
                file=Path(path),
            )
        ) from error
    return array


def read_source(path: Path) -> Any:
    """What `write_array` was given as source; None where it was given none."""
    array = open_array(path)  # its metadata does not outlive it
    return array.schunk.vlmeta.get(SOURCE_META)


def read_class_locations(path: Path) -> dict[str, npt.NDArray[np.integer[Any]]]:
    """Class or region name → sampled voxels [n,3] (z,y,x) of a label; empty [0,3] where the class does not occur.

    Raises:
        InvalidInput: where the file is missing or cut off.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {str(name): content[f"voxels_{i}"] for i, name in enumerate(content["names"])}
    except Exception as error:  # zipfile, numpy and zlib each throw their own
        found = f"not a complete file of locations ({error})" if Path(path).exists() else "the file does not exist"
        raise InvalidInput(
            Problem(found, "the locations of a labeled case", "run autossl_plan_and_preprocess again", file=Path(path))
        ) from error


class CaseStore:
    """The folder `data/<hash>/` of one set of preprocessing parameters.

    Args:
        folder: made when the first case is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def image_path(self, case: str) -> Path:
        """float32 [C,z,y,x]."""
        return self.folder / "images" / f"{case}.b2nd"

    def nonzero_path(self, case: str) -> Path:
        """bool [z,y,x]; exists where a channel was normalized within the nonzero region."""
        return self.folder / "nonzero" / f"{case}.b2nd"

    def properties_path(self, case: str) -> Path:
        """JSON of `CaseProperties`."""
        return self.folder / "properties" / f"{case}.json"

    def label_path(self, case: str) -> Path:
        """int8 or int16 [z,y,x]."""
        return self.folder / "labels" / f"{case}.b2nd"

    def locations_path(self, case: str) -> Path:
        """For `read_class_locations`."""
        return self.folder / "locations" / f"{case}.npz"

    def image(self, case: str) -> Any:
        """Lazy float32 [C,z,y,x]: slice it."""
        return open_array(self.image_path(case))

    def label(self, case: str) -> Any:
        """Lazy integer [z,y,x]: slice it."""
        return open_array(self.label_path(case))

    def nonzero(self, case: str) -> Any:
        """Lazy bool [z,y,x]: slice it."""
        return open_array(self.nonzero_path(case))

    def class_locations(self, case: str) -> dict[str, npt.NDArray[np.integer[Any]]]:
        """Class or region name → sampled voxels [n,3]."""
        return read_class_locations(self.locations_path(case))

    def properties(self, case: str) -> CaseProperties:
        """How the case lies in its image; raises `InvalidInput` where the file is missing or damaged."""
        path = self.properties_path(case)
        content = read_json(path)
        try:
            return CaseProperties.from_json(without_checksum(content))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                Problem(
                    f"not the properties that were written ({error})",
                    "the properties of a preprocessed case",
                    "run autossl_plan_and_preprocess again: it makes what is missing or damaged",
                    file=path,
                )
            ) from error

    def cases(self) -> list[str]:
        """Ids of all cases whose image part was finished, sorted."""
        return sorted(path.name.removesuffix(".json") for path in self._finished("properties", ".json"))

    def has(self, case: str, labeled: bool) -> bool:
        """Whether all files of a case are there and whole (their headers are read, not their voxels)."""
        try:
            properties = self.properties(case)
            arrays = [(self.image_path(case), 1)]
            arrays += [(self.nonzero_path(case), 0)] if properties.has_nonzero_mask else []
            arrays += [(self.label_path(case), 0)] if labeled else []
            whole = all(tuple(open_array(path).shape[lead:]) == properties.shape for path, lead in arrays)
        except InvalidInput:
            return False
        return whole and (not labeled or _is_zip(self.locations_path(case)))

    def damaged(self, case: str, labeled: bool) -> dict[Path, str]:
        """Files of a finished case whose content does not fit its checksum, and what is wrong; reads all of them."""
        arrays = [self.image_path(case)]
        arrays += [self.nonzero_path(case)] if self.properties(case).has_nonzero_mask else []
        arrays += [self.label_path(case)] if labeled else []
        found = {path: array_damage(path) for path in arrays}
        if labeled:
            found[self.locations_path(case)] = zip_damage(self.locations_path(case))
        return {path: damage for path, damage in found.items() if damage is not None}

    def write(self, case: str, prepared: PreparedCase, image_source: Any = None, label_source: Any = None) -> None:
        """Writes all that `prepared` holds; a label of before is removed first, because it may not fit any more."""
        self.properties_path(case).unlink(missing_ok=True)
        self.label_path(case).unlink(missing_ok=True)
        write_array(self.image_path(case), prepared.image, image_source, sync=False)
        if prepared.nonzero is not None:
            write_array(self.nonzero_path(case), prepared.nonzero, sync=False)
        write_json(self.properties_path(case), with_checksum(prepared.properties.to_json()), sync=False)
        if prepared.label is not None:
            self.write_label(case, prepared.label, prepared.locations or {}, label_source)

    def write_label(
        self,
        case: str,
        label: npt.NDArray[np.integer[Any]],
        locations: Mapping[str, npt.NDArray[np.integer[Any]]],
        source: Any = None,
    ) -> None:
        """Writes only the label and its locations; the image stays untouched."""
        self.label_path(case).unlink(missing_ok=True)
        with atomic_write(self.locations_path(case), sync=False) as partial:
            voxels: dict[str, Any] = {f"voxels_{i}": v for i, v in enumerate(locations.values())}
            np.savez(partial, names=np.array(list(locations), dtype=np.str_), **voxels)
        write_array(self.label_path(case), label, source, sync=False)

    def share(self, case: str, other: CaseStore, labeled: bool) -> None:
        """Takes a finished case over from another store: hard links, copies where the file system has none."""
        self.properties_path(case).unlink(missing_ok=True)
        self.label_path(case).unlink(missing_ok=True)
        pairs = [(other.image_path(case), self.image_path(case))]
        if other.properties(case).has_nonzero_mask:
            pairs.append((other.nonzero_path(case), self.nonzero_path(case)))
        pairs.append((other.properties_path(case), self.properties_path(case)))
        if labeled:
            pairs.append((other.locations_path(case), self.locations_path(case)))
            pairs.append((other.label_path(case), self.label_path(case)))
        for theirs, ours in pairs:
            _link_or_copy(theirs, ours)

    def _finished(self, part: str, ending: str) -> Iterator[Path]:
        return (path for path in (self.folder / part).glob(f"*{ending}") if not path.name.startswith(PARTIAL))


def _compression(byte_filter: Any) -> dict[str, Any]:
    # Measured on hippocampus and LGG, one thread: read three times as fast as ZSTD 1, half as large as LZ4 5; level 5
    # makes files 3 to 16 % smaller in four times the time.
    return {"codec": blosc2.Codec.LZ4HC, "clevel": 2, "filters": [byte_filter], "nthreads": 1}


def _better_filter(array: npt.NDArray[Any], blocks: tuple[int, ...]) -> Any:
    """The filter that makes a block from the middle smaller. Shuffling bytes helps interpolated values and harms the
    few distinct ones of an image as it was taken."""
    if array.dtype.itemsize == 1:
        return blosc2.Filter.NOFILTER
    corner = tuple(slice((n - b) // 2, (n - b) // 2 + b) for n, b in zip(array.shape, blocks, strict=True))
    sample = array[corner].tobytes()

    def size(byte_filter: Any) -> int:
        return len(blosc2.compress2(sample, typesize=array.dtype.itemsize, **_compression(byte_filter)))

    return min((blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE), key=size)


def _is_zip(path: Path) -> bool:
    """Whether a zip's end is there: what a cut-off file lacks."""
    try:
        with path.open("rb") as file:
            file.seek(-22, os.SEEK_END)
            return file.read(4) == b"PK\x05\x06"
    except OSError:
        return False


def _link_or_copy(theirs: Path, ours: Path) -> None:
    with atomic_write(ours, sync=False) as partial:
        try:
            partial.hardlink_to(theirs)
        except OSError:
            partial.write_bytes(theirs.read_bytes())
