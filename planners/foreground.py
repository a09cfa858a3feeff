"""Intensities of the labeled foreground, with the numbers of nnU-Net v2, for all labeled cases or for some of them.

nnU-Net draws 1e8 / (number of labeled cases) foreground voxels of each case with replacement and pools them. Here the
draws are counted instead of collected: a case gives its distinct values and how often each was drawn, the pool is a
weighted set, and percentiles come from cumulative weights. The numbers are the same, the memory is a hundredth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import numpy as np
import numpy.typing as npt

from autossl.data.checksums import CHECKSUM, array_checksum
from autossl.data.problems import InvalidInput, Problem
from autossl.data.store import array_damage, open_array
from autossl.planners.plans import IntensityProperties

DRAWS_IN_ALL = 100_000_000
SEED = 1234
"""nnU-Net v2's, for every case."""
DRAWS_AT_ONCE = 2**18
LARGEST_POOL = 2**24
"""Distinct values of one channel's pool; beyond, values are rounded to 16 significant bits (a relative 8e-6)."""
PERCENTILES = (0.5, 50.0, 99.5)
FOLDER = "foreground"
EXACT_TYPES = (np.uint8, np.int16, np.uint16, np.int32)

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class WeightedValues:
    """Distinct values, ascending, and how often each was drawn."""

    values: Floats
    weights: npt.NDArray[np.int64]


def draws_per_case(n_labeled: int) -> int:
    """Foreground voxels that are drawn of each labeled case."""
    return DRAWS_IN_ALL // n_labeled


def draw_foreground(foreground: Floats, n_draws: int) -> list[WeightedValues]:
    """Draws of one case, counted, per channel.

    One generator serves the channels one after the other, and voxels are in array order (z,y,x): both decide which
    voxels nnU-Net draws.

    Args:
        foreground: [C, voxels].
        n_draws: per channel; see `draws_per_case`.
    """
    n_voxels = foreground.shape[1]
    if n_voxels == 0:
        empty = WeightedValues(np.empty(0, np.float32), np.empty(0, np.int64))
        return [empty] * len(foreground)
    generator = np.random.RandomState(SEED)  # nnU-Net's generator: another one draws other voxels
    drawn = []
    for channel in foreground:
        times = np.zeros(n_voxels, dtype=np.int64)
        for start in range(0, n_draws, DRAWS_AT_ONCE):
            n = min(DRAWS_AT_ONCE, n_draws - start)
            times += np.bincount(generator.randint(0, n_voxels, size=n, dtype=np.int32), minlength=n_voxels)
        drawn.append(_weighted(channel, times))
    return drawn


class IntensityPool:
    """The draws of many cases of one channel, as one weighted set of bounded size."""

    def __init__(self) -> None:
        self._parts: list[WeightedValues] = []
        self._pending = 0

    def add(self, drawn: WeightedValues) -> None:
        """Takes in the draws of one case."""
        if len(drawn.values) == 0:
            return
        self._parts.append(drawn)
        self._pending += len(drawn.values)
        if self._pending > LARGEST_POOL:
            self._merge()
            if self._pending > LARGEST_POOL // 2:
                merged = self._parts[0]
                self._parts = [_weighted(_rounded(merged.values), merged.weights)]
                self._pending = len(self._parts[0].values)

    def properties(self) -> IntensityProperties | None:
        """Statistics of the pool; None where nothing was added. Percentiles interpolate linearly between draws."""
        if not self._parts:
            return None
        self._merge()
        values, weights = self._parts[0].values, self._parts[0].weights
        last_rank = np.cumsum(weights) - 1
        total = int(last_rank[-1]) + 1
        exact = values.astype(np.float64)
        mean = float(exact @ weights / total)
        low, median, high = (_percentile(values, last_rank, q) for q in PERCENTILES)
        return IntensityProperties(
            mean=mean,
            std=float(np.sqrt((exact - mean) ** 2 @ weights / total)),
            min=float(values[0]),
            max=float(values[-1]),
            median=median,
            percentile_00_5=low,
            percentile_99_5=high,
        )

    def _merge(self) -> None:
        if len(self._parts) > 1:
            values = np.concatenate([part.values for part in self._parts])
            weights = np.concatenate([part.weights for part in self._parts])
            self._parts = [_weighted(values, weights)]
        self._pending = len(self._parts[0].values)


def pool_properties(pools: Sequence[IntensityPool]) -> dict[str, IntensityProperties]:
    """By channel number as text; empty where no case had foreground."""
    properties = {str(channel): pool.properties() for channel, pool in enumerate(pools)}
    return {channel: found for channel, found in properties.items() if found is not None}


def foreground_path(folder: Path, case: str) -> Path:
    """Where the foreground intensities of a labeled case are kept, below a data set's preprocessed folder."""
    return Path(folder) / FOLDER / f"{case}.b2nd"


def store_foreground(path: Path, foreground: Floats) -> None:
    """Writes foreground intensities [C, voxels] with a checksum, compressed, in the smallest type that holds them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compact = np.ascontiguousarray(_smallest_type(foreground))
    parameters = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=1)
    stored = blosc2.asarray(compact, urlpath=str(path), mode="w", cparams=parameters)
    stored.schunk.vlmeta[CHECKSUM] = array_checksum(stored)


def load_foreground(path: Path) -> Floats:
    """The foreground intensities [C, voxels] that `store_foreground` wrote.

    Raises:
        InvalidInput: where the file is missing or damaged.
    """
    try:
        damage = array_damage(path)
        if damage is None:
            return np.asarray(open_array(path)[:], dtype=np.float32)
    except (OSError, RuntimeError, ValueError) as error:  # of a version that wrote no checksums
        damage = str(error)
    raise InvalidInput(
        Problem(
            f"no readable foreground intensities ({damage})",
            "the file that the scan of the data set writes",
            "run autossl_plan_and_preprocess with --verify_dataset_integrity, which scans every case again",
            file=path,
        )
    )


def foreground_intensities(folder: Path, case_ids: Sequence[str]) -> dict[str, IntensityProperties]:
    """Statistics that nnU-Net would compute if these were all the labeled cases; reads no image.

    Args:
        folder: the preprocessed folder of the data set.
        case_ids: labeled cases, in any order.

    Returns:
        By channel number as text.

    Raises:
        InvalidInput: where the intensities of a case were not kept.
    """
    pools: list[IntensityPool] = []
    for case in sorted(case_ids):
        drawn = draw_foreground(load_foreground(foreground_path(folder, case)), draws_per_case(len(case_ids)))
        pools = pools or [IntensityPool() for _ in drawn]
        for pool, part in zip(pools, drawn, strict=True):
            pool.add(part)
    return pool_properties(pools)


def _weighted(values: Floats, weights: npt.NDArray[np.int64]) -> WeightedValues:
    """Equal values merged, values of weight 0 left out."""
    compact = _smallest_type(values)
    if compact.dtype.kind in "iu" and compact.dtype.itemsize <= 2:  # counting is 5 times faster than sorting
        lowest = int(compact.min())
        counted = np.bincount(compact.astype(np.int64) - lowest, weights=weights)  # float64: exact up to 2**53
        present = np.flatnonzero(counted)
        return WeightedValues((present + lowest).astype(np.float32), counted[present].astype(np.int64))
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    summed = np.add.reduceat(weights[order], starts)
    return WeightedValues(ordered[starts][summed > 0], summed[summed > 0])


def _rounded(values: Floats) -> Floats:
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)


def _percentile(values: Floats, last_rank: npt.NDArray[np.int64], percent: float) -> float:
    """numpy's linear method on the draws in order: draw number r has the first value whose last rank is ≥ r."""
    position = percent / 100 * int(last_rank[-1])
    lower = int(position)
    part = position - lower
    upper = min(lower + 1, int(last_rank[-1]))
    below, above = (values[np.searchsorted(last_rank, rank)] for rank in (lower, upper))
    difference = above - below
    return float(below + difference * part if part < 0.5 else above - difference * (1 - part))


def _smallest_type(values: Floats) -> npt.NDArray[np.generic]:
    if values.size == 0 or not np.all(values == np.rint(values)):
        return values
    lowest, highest = values.min(), values.max()
    for dtype in EXACT_TYPES:
        if np.iinfo(dtype).min <= lowest and highest <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values
