"""Reads patches of preprocessed cases; keeps a bounded number of files open per process.

Arrays are blosc2 files in memory-mapped mode, so only the chunks under a patch are decompressed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem
from autossl.data.store import open_array, read_class_locations
from autossl.trainers.sampling import Locations

MAX_OPEN = 128
"""Arrays that one process keeps open; beyond it the least recently used one is closed."""
SAME = 1e-5
"""Values of a channel that differ by less, relative to their size, are one value that was resampled."""
MAX_LOCATIONS = 10_000
"""Voxels per class that are kept of a pseudo-label map."""


class CaseReader:
    """Opens files on first use. A file that is replaced later is not noticed: make a new reader after a refresh.

    Args:
        max_open: bound on open arrays, and on cached voxel lists.
    """

    def __init__(self, max_open: int = MAX_OPEN) -> None:
        self.max_open = max_open
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_open,)

    def shape(self, path: Path) -> tuple[int, ...]:
        """Shape of a stored array, channels included."""
        return tuple(self._opened(path).shape)

    def read(self, path: Path, start: Sequence[int], size: Sequence[int]) -> npt.NDArray[Any]:
        """Box of an array [..., z, y, x], zero outside the array; the box may leave it or miss it.

        Raises:
            InvalidInput: the file is missing, cut off or no array.
        """
        array = self._opened(path)
        lead = array.shape[:-3]
        begin = [max(0, s) for s in start]
        end = [min(n, s + k) for s, k, n in zip(start, size, array.shape[-3:], strict=True)]
        if any(b >= e for b, e in zip(begin, end, strict=True)):
            return np.zeros((*lead, *size), dtype=array.dtype)
        found = np.empty((*lead, *(e - b for b, e in zip(begin, end, strict=True))), dtype=array.dtype)
        # What slicing the array calls in the end; for a small patch, working out the slices takes longer than reading.
        box = ([0] * len(lead) + begin, list(lead) + end)
        _explained(path, lambda: array.get_slice_numpy(found, box))
        if found.shape[len(lead) :] == tuple(size):
            return found
        padded = np.zeros((*lead, *size), dtype=array.dtype)
        z, y, x = (slice(b - s, e - s) for b, e, s in zip(begin, end, start, strict=True))
        padded[..., z, y, x] = found
        return padded

    def has_channel(self, path: Path) -> tuple[bool, ...]:
        """Which channels of a stored image hold anything: one that has a single value throughout is missing.

        Looked up once per case and process: a plane from the middle of each channel, all of it only where that tells
        nothing.
        """
        self._renew_after_fork()
        if path not in self._has_channel:
            array = self._opened(path)
            self._has_channel[path] = _explained(path, lambda: _channels_with_content(array))
        return self._has_channel[path]

    def locations(self, path: Path) -> Locations:
        """Voxel coordinates per class, as preprocessing stored them."""
        self._renew_after_fork()
        return _explained(path, lambda: self._load_locations(path))

    def locations_in_map(self, path: Path, confidence: Path, schema: LabelSchema) -> Locations:
        """Voxel coordinates per foreground class of a stored pseudo-label, where its confidence is above 0.

        Reads all of both maps once.
        """
        self._renew_after_fork()
        names = tuple((name, tuple(values)) for name, values in schema.foreground.items())
        return _explained(path, lambda: self._scan(path, confidence, names))

    def _opened(self, path: Path) -> Any:
        self._renew_after_fork()
        return _explained(path, lambda: self._open(path))

    def _renew_after_fork(self) -> None:
        if self._process != os.getpid():
            self._forget()

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open = lru_cache(self.max_open)(open_array)
        self._load_locations = lru_cache(self.max_open)(read_class_locations)
        self._scan = lru_cache(self.max_open)(_scan_map)
        self._has_channel: dict[Path, tuple[bool, ...]] = {}


def _scan_map(path: Path, confidence: Path, names: tuple[tuple[str, tuple[int, ...]], ...]) -> Locations:
    label_map, kept = open_array(path)[:], open_array(confidence)[:] > 0
    found = {}
    for name, values in names:
        voxels = np.argwhere(np.isin(label_map, values) & kept)
        if len(voxels) > MAX_LOCATIONS:
            voxels = np.random.default_rng(0).choice(voxels, MAX_LOCATIONS, replace=False)
        found[name] = voxels.astype(np.int32)
    return found


def _channels_with_content(array: Any) -> tuple[bool, ...]:
    """Per channel of [C, z, y, x] whether its values differ."""
    n_channels, n_planes = array.shape[:2]
    middle = slice(n_planes // 2, n_planes // 2 + 1)
    return tuple(_differ(array[c : c + 1, middle]) or _differ(array[c : c + 1]) for c in range(n_channels))


def _differ(values: npt.NDArray[Any]) -> bool:
    low, high = float(values.min()), float(values.max())
    return high - low > SAME * max(abs(low), abs(high))


def _explained(path: Path, action: Callable[[], Any]) -> Any:
    """The action's result; what the array library throws becomes `InvalidInput` with the file."""
    try:
        return action()
    except InvalidInput:
        raise
    except Exception as error:  # blosc2 throws RuntimeError, ValueError, OSError, KeyError… on damaged files
        raise InvalidInput(
            Problem(
                f"its voxels could not be read ({type(error).__name__}: {error})",
                "a complete preprocessed array (.b2nd)",
                "delete the file and run autossl_plan_and_preprocess again: it makes what is missing",
                case=path.stem,
                file=path,
            )
        ) from error
