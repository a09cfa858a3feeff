"""How far two feature maps [n, c, *S] are apart, by value or by direction alone.

Source: Liu et al., MICCAI 2025 (low- and high-level consistency of M3HL), arXiv:2508.03752.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def low_distance(f: Tensor, wanted: Tensor, w: Tensor) -> Tensor:
    """Mean of |f - wanted| over all channels of the voxels that count; none: 0 with a graph.

    Differences keep the type of the maps, which are the largest of a step; the sum is float32.
    """
    total = torch.where(w, f - wanted, 0).abs().sum(dtype=torch.float32)
    return total / (f.shape[1] * w.sum()).clamp(min=1)


def high_distance(f: Tensor, wanted: Tensor, w: Tensor) -> Tensor:
    """Mean over the samples of 1 - cosine, each sample's channels and counting voxels being one vector; in [0, 2].

    A vector of zeros has similarity 0. Samples without a voxel that counts are left out; none is left: 0 with a graph.
    """
    mine, theirs = (torch.where(w, values.float(), 0).flatten(1) for values in (f, wanted))
    counted = w.flatten(1).any(1)
    distances = 1 - functional.cosine_similarity(mine, theirs, dim=1, eps=1e-8)
    return (distances * counted).sum() / counted.sum().clamp(min=1)
