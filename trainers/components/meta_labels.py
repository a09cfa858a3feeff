"""Labels that scans carry for free: where a patch lies in the body, whose it is, which phase or series.

Each comes with a flag per patch that says whether it is known. An unknown label is not a class of its own: two patches
of unknown phase need not share it, so such a row is nobody's positive (it may serve as a negative).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autossl.trainers.base import StreamBatch, derive_seed

COVERED = 0.6
"""An axis of which a patch covers this share or more tells no position (Peng et al. 2021 use slices; ours in 3D)."""
N_BINS = (3, 8)
"""Fewest and most bins per axis: 3 for ACDC, up to 8 for other sets in the release of Peng et al. 2021."""


class MetaLabel(NamedTuple):
    """One kind of label for B patches, on the device of the batch's centers."""

    values: Tensor
    """Int64 [B]; equal numbers mean the same. 0 where unknown."""
    known: Tensor
    """Boolean [B]."""


@dataclass(frozen=True)
class PositionBins:
    """How the axes of a stored case (z, y, x) are cut."""

    counts: tuple[int, int, int]
    """Bins per axis; 1: the axis tells no position."""

    @property
    def tells_position(self) -> bool:
        """False: the patch covers too much of every axis; the label is unknown for all patches."""
        return max(self.counts) > 1

    def axes_in_patch(self, dims: int) -> tuple[int, ...]:
        """Axes of the patch (0 = its first) that tell position. They must not be mirrored: a mirrored patch looks as
        if it came from the other side of the body. A 2D patch has none: it is a slice, and tells which one."""
        return tuple(axis + dims - 3 for axis, count in enumerate(self.counts) if count > 1 and axis + dims >= 3)


def position_bins(patch_size: Sequence[int], case_size: Sequence[float]) -> PositionBins:
    """Bins from the sizes of patch and median case.

    Per axis of which the patch covers less than 60 %: clip(2·round(extent / (2·patch extent)), 3, 8) bins. A 2D patch
    is one slice thick and tells the slice alone: its own axes count as covered.

    Args:
        patch_size: 2 or 3 axes, in voxels.
        case_size: 3 axes (z, y, x), median over cases, in voxels of the same spacing.

    Raises:
        ValueError: `case_size` has not 3 axes.
    """
    if len(case_size) != 3:
        raise ValueError(f"case_size {tuple(case_size)} has {len(case_size)} axes: expected z, y, x (slices first)")
    flat = len(patch_size) == 2
    patch = (1, *case_size[1:]) if flat else tuple(patch_size)
    slices, rows, columns = (_bins(p, n) for p, n in zip(patch, case_size, strict=True))
    return PositionBins((slices, rows, columns))


def meta_labels(batch: StreamBatch, bins: PositionBins, phase_key: str = "phase") -> dict[str, MetaLabel]:
    """`position`, `patient` and `phase` of B patches.

    position: the tuple of bins of the patch center over the axes that tell it, as one number; unknown for all patches
        where no axis does.
    patient: of the subject, not of the file, so that two phases of a patient share it; the same number in every step
        and process. Unknown where the attributes do not name one.
    phase: the attribute `phase_key` (phase, sequence, scanner, site, …) in the same manner.

    An attribute that is missing or blank is unknown.
    """
    centers = batch.centers
    return {
        "position": _position(centers, bins),
        "patient": _attribute(batch, "patient", centers.device),
        "phase": _attribute(batch, phase_key, centers.device),
    }


def _bins(patch: float, extent: float) -> int:
    if patch >= COVERED * extent:
        return 1
    fewest, most = N_BINS
    return min(max(2 * int(extent / (2 * patch) + 0.5), fewest), most)


def _position(centers: Tensor, bins: PositionBins) -> MetaLabel:
    values = torch.zeros(len(centers), dtype=torch.long, device=centers.device)
    for axis, count in enumerate(bins.counts):
        place = (centers[:, axis] * count).long().clamp(0, count - 1)
        values = values * count + place
    return MetaLabel(values, torch.full_like(values, bins.tells_position, dtype=torch.bool))


def _attribute(batch: StreamBatch, key: str, device: torch.device) -> MetaLabel:
    attributes = batch.attributes or ({},) * len(batch)
    names = [entry.get(key, "").strip() for entry in attributes]
    values = [derive_seed("meta-label", key, name) if name else 0 for name in names]
    known = [bool(name) for name in names]
    return MetaLabel(
        torch.tensor(values, dtype=torch.long, device=device), torch.tensor(known, dtype=torch.bool, device=device)
    )
