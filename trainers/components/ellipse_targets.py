"""What a student learns of a step's unlabeled patches from the ellipses in them. No gradient goes through any of it.

B patches, K elliptic classes. The work on single patches is that of `ellipse_labels`, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autossl.trainers.components.ellipse_labels import LABELED_AT, EllipseLabel, Mask, Values, ellipse_label
from autossl.trainers.components.shapes import MirrorPlanes

UNFITTED_WEIGHT = 0.5
"""Of a label that no ellipse was accepted for; ours, the release leaves such a label empty."""

Found = Mapping[tuple[int, int], EllipseLabel]
"""By patch and class."""


@dataclass(frozen=True)
class EllipseTargets:
    """Labels, and the symmetry axis of the largest object of each patch."""

    label: Tensor
    """Float32 0/1 [B, K, *S]."""
    weight: Tensor
    """Float32 [B, K, *S]: 0 where the patch is not used or not valid, or nothing of it is labeled without a fit; 0.5
    where no fit was accepted; else 1."""
    counted: Tensor
    """Boolean [B, K, *S]: used and valid."""
    largest: Tensor
    """Int64 [B]: the class with the largest label that a fit was accepted for; 0 where there is none."""
    mirrored: Tensor
    """Boolean [B]: there is one."""
    planes: MirrorPlanes
    """Its symmetry axis; where there is none, the middle of the patch."""
    shares: dict[str, float]
    """For the log; a share of nothing is left out."""

    @property
    def largest_label(self) -> Tensor:
        """Boolean [B, 1, *S]."""
        rows = torch.arange(len(self.label), device=self.label.device)
        return self.label[rows, self.largest][:, None] > 0


def ellipse_targets(q: Tensor, valid: Tensor, used: Mask, spacing: Sequence[float], refine: bool) -> EllipseTargets:
    """Refines the labels of what is used.

    Args:
        q: the teacher's probabilities of the elliptic classes, float32 [B, K, *S].
        valid: boolean [B, 1, *S].
        used: [B, K].
        spacing: mm per axis of S.
        refine: False keeps plain labels; weights and symmetry axes are the same.
    """
    values, inside = q.cpu().numpy(), valid[:, 0].cpu().numpy()
    found = {
        (row, k): ellipse_label(values[row, k], inside[row], spacing, refine) for row, k in np.argwhere(used).tolist()
    }
    label, weight = np.zeros(values.shape, dtype=np.float32), np.zeros(values.shape, dtype=np.float32)
    for place, made in found.items():
        label[place] = made.label
        trusted = np.where(made.fitted, 1.0, UNFITTED_WEIGHT if made.label.any() else 0.0)
        weight[place] = trusted * inside[place[0]]
    largest = _largest(found, len(values))
    middle = np.array([(n - 1) / 2 * mm for n, mm in zip(inside.shape[1:], spacing, strict=True)])
    anywhere = (middle, np.eye(len(spacing))[-1])
    axes = [found[row, k].mirror or anywhere if k is not None else anywhere for row, k in enumerate(largest)]
    centers, normals = (torch.from_numpy(np.stack(of)).to(q.device) for of in zip(*axes, strict=True))
    return EllipseTargets(
        label=torch.from_numpy(label).to(q.device),
        weight=torch.from_numpy(weight).to(q.device),
        counted=torch.from_numpy(used).to(q.device).view(*used.shape, *[1] * len(spacing)) & valid,
        largest=torch.tensor([k or 0 for k in largest], device=q.device),
        mirrored=torch.tensor([k is not None for k in largest], device=q.device),
        planes=MirrorPlanes.through(centers, normals, inside.shape[1:], spacing),
        shares=_shares(values, inside, found) | {"mirrored_share": sum(k is not None for k in largest) / len(largest)},
    )


def _largest(found: Found, n: int) -> list[int | None]:
    """For each patch the class with the largest label among those whose symmetry axis is known."""
    sizes = {place: int(made.label.sum()) for place, made in found.items() if made.mirror is not None}
    rows = [[(size, -k) for (row, k), size in sizes.items() if row == wanted] for wanted in range(n)]
    return [-max(row)[1] if row else None for row in rows]


def _shares(values: Values, inside: Mask, found: Found) -> dict[str, float]:
    """Of the tried fits those that were accepted; of the voxels that they judged those whose label they changed."""
    shares = {}
    if tried := sum(made.n_fits for made in found.values()):
        shares["accepted_share"] = sum(made.n_accepted for made in found.values()) / tried
    judged = changed = 0
    for place, made in found.items():
        plain = (values[place] > LABELED_AT) & inside[place[0]]
        judged += int(made.fitted.sum())
        changed += int(((made.label != plain) & made.fitted).sum())
    return shares | ({"refined_share": changed / judged} if judged else {})


def score_measures(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean score, and the share of patches that have none because they are empty."""
    flat = [score for of_class in scores for score in of_class]
    finite = [score for score in flat if math.isfinite(score)]
    measures = {"empty_share": 1 - len(finite) / len(flat)}
    return measures | ({"irregularity": sum(finite) / len(finite)} if finite else {})
