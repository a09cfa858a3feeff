"""Ranked list loss: embeddings of one class lie within a margin of each other, those of other classes beyond it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autossl.trainers.components.contrast import Rows

SMALLEST_SQUARE = 1e-6
"""Of a distance: below it has no gradient, which the root's would make infinite."""


class Ranked(NamedTuple):
    """What each anchor pays, and how many of its pairs act."""

    losses: Tensor
    """Float32 [n]."""
    acting: Tensor
    """Boolean [n, m]: positives that are too far away and negatives that are too near."""


@dataclass(frozen=True)
class RankedListLoss:
    """½·(L_P + L_N) of each anchor, with the L2 distance d of unit vectors, in [0, 2].

    L_P: mean of d - (a - m) over candidates of the anchor's class that are further away than a - m. L_N: weighted mean
    of a - d over candidates of other classes nearer than a, with weights exp(s·(a - d)) that favor the nearest and
    have no gradient. An empty set costs 0. Source: Wang et al., Ranked List Loss, CVPR 2019, arXiv:1903.03238.
    """

    boundary: float = 1.2
    """a."""
    margin: float = 0.4
    """m."""
    sharpness: float = 10.0
    """s, an inverse temperature."""

    def __call__(self, anchors: Rows, candidates: Rows, counted: Tensor | None = None) -> Ranked:
        """Losses of the anchors [n, D] against the candidates [m, D]; float32 also under autocast.

        Args:
            anchors: unit vectors with classes.
            candidates: likewise.
            counted: boolean [n, m], pairs that count; None: all. For anchors that are among the candidates.
        """
        with torch.autocast(anchors.e.device.type, enabled=False):
            squares = 2 - 2 * anchors.e.float() @ candidates.e.float().T
            d = squares.clamp(min=SMALLEST_SQUARE).sqrt()
            same = anchors.labels[:, None] == candidates.labels
            counted = torch.ones_like(same) if counted is None else counted
            radius = self.boundary - self.margin
            far = same & counted & (d > radius)
            near = ~same & counted & (d < self.boundary)
            positive = torch.where(far, d - radius, 0).sum(1) / far.sum(1).clamp(min=1)
            missing = self.boundary - d
            # the smallest number, not -inf: an anchor without negatives stays finite
            logits = (self.sharpness * missing.detach()).masked_fill(~near, torch.finfo(torch.float32).min)
            weights = torch.where(near, torch.softmax(logits, 1), 0) if candidates.labels.numel() else missing.detach()
            negative = (weights * torch.where(near, missing, 0)).sum(1)
            # comparisons hide what is not finite
            losses = (positive + negative) / 2 + 0 * d.detach().sum(1)
        return Ranked(losses, far | near)
