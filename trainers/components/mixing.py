"""Labeled and unlabeled patches mixed into each other in both directions, and the loss of such mixtures.

The streams are split into halves a and b of n patches each. With a boolean mask M [n, 1, *S] the first n mixtures are
u_a where M is true and l_a elsewhere, the next n are l_b where M is true and u_b elsewhere: together they hold every
place of both streams once. True labels judge what is labeled, pseudo-labels the rest.
Source: Bai et al., CVPR 2023 (bidirectional copy-paste).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autossl.trainers.base import Job, StreamBatch
from autossl.trainers.components.losses import Levels, at_level, region_mix_loss
from autossl.trainers.components.masks import half_size, halves, mix
from autossl.trainers.components.pseudo import keep_largest, pseudo_label

# ------------------------------------------------------------------------------------------------------- pseudo-labels


class PseudoLabels(NamedTuple):
    """What a teacher believes about B patches; nothing in here has a gradient."""

    target: Tensor
    """Int64 [B, 1, *S]; regions: float 0/1 [B, C, *S]."""
    confidence: Tensor
    """Of the teacher, before anything was removed: as `pseudo_label` gives it."""
    removed_share: Tensor
    """Share of the voxels that were removed as islands."""


def single_component_channels(job: Job) -> tuple[int, ...]:
    """The plan's single-component classes as the numbers that labels have in training."""
    written = job.schema.written_values
    return tuple(written.index(value) for value in job.single_component_classes)


def pseudo_labels_of(q: Tensor, single_component: Sequence[int] = (), regions: bool = False) -> PseudoLabels:
    """Hard labels of probabilities q [B, C, *S]; islands of the given classes become background (`keep_largest`)."""
    labels, confidence = pseudo_label(q, regions)
    cleaned = keep_largest(labels, single_component)
    return PseudoLabels(cleaned, confidence, (cleaned != labels).float().mean())


# ------------------------------------------------------------------------------------------------------------ mixtures


@dataclass(frozen=True)
class Exchange:
    """Mixtures of labeled with unlabeled patches in both directions, as the module describes them."""

    labeled: StreamBatch
    unlabeled: StreamBatch
    pseudo: PseudoLabels
    """Of the unlabeled patches."""
    mask: Tensor
    """M, boolean [n, 1, *S] with n = half_size(B_l, B_u); its rows may differ."""

    @property
    def image(self) -> Tensor:
        """The mixed first views, [2n, Ci, *S]."""
        return self.mixed(self.labeled.image, self.unlabeled.image)

    def mixed(self, labeled: Tensor, unlabeled: Tensor) -> Tensor:
        """[2n, c, *S'] from values of both streams, [B_l, c, *S'] and [B_u, c, *S'], such as other views or features.

        Where S' is not the patch, the mask is brought to S' by nearest neighbor.
        """
        n, mask = len(self.mask), at_level(self.mask, labeled.shape[2:])
        l_a, l_b = halves(labeled, n)
        u_a, u_b = halves(unlabeled, n)
        return torch.cat([mix(u_a, l_a, mask), mix(l_b, u_b, mask)])

    def loss(self, z: Levels, regions: bool = False) -> tuple[Tensor, Tensor]:
        """`region_mix_loss` of both directions, as (judged by true labels, by pseudo-labels).

        Hard labels would hide a teacher that is not finite; the second term is not finite then, so that it is dropped.

        Args:
            z: logits of `image` [2n, C, *S], or of all deep-supervision levels.
            regions: z are logits of sigmoids.
        """
        n, mask = len(self.mask), self.mask
        levels = [z] if isinstance(z, Tensor) else z
        z_1, z_2 = [level[:n] for level in levels], [level[n:] for level in levels]
        y_la, y_lb = halves(self.labeled.target, n)
        v_la, v_lb = halves(self.labeled.valid, n)
        y_ua, y_ub = halves(self.pseudo.target, n)
        v_ua, v_ub = halves(self.unlabeled.valid, n)
        pseudo_1, true_1 = region_mix_loss(z_1, mask, y_ua, y_la, valid_out=v_ua, valid_in=v_la, regions=regions)
        true_2, pseudo_2 = region_mix_loss(z_2, mask, y_lb, y_ub, valid_out=v_lb, valid_in=v_ub, regions=regions)
        return true_1 + true_2, pseudo_1 + pseudo_2 + 0 * self.pseudo.confidence.mean()

    @property
    def inside(self) -> Tensor:
        """Boolean [2n, 1, *S]: what is not from outside an unlabeled image; without a label nothing is ignored."""
        return self.mixed(torch.ones_like(self.labeled.valid), self.unlabeled.valid)

    @property
    def pseudo_share(self) -> Tensor:
        """Share of the mixtures' voxels that pseudo-labels judge."""
        v_ua, v_ub = halves(self.unlabeled.valid, len(self.mask))
        return torch.cat([self.mask & v_ua, ~self.mask & v_ub]).float().mean()


@dataclass(frozen=True)
class CopyPaste:
    """Mixtures of labeled patches with each other: half a where the mask is true, half b elsewhere."""

    images: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    valids: tuple[Tensor, Tensor]
    mask: Tensor
    """Boolean [n, 1, *S]."""

    @classmethod
    def of(cls, labeled: StreamBatch, mask: Tensor, mirror_axes: Sequence[int]) -> CopyPaste:
        """Pairs the halves of the labeled patches; a single patch is paired with its mirror image.

        Args:
            labeled: B patches.
            mask: n = half_size(B, 0) rows.
            mirror_axes: the plan's; in-plane ones are used.
        """
        n = half_size(len(labeled), 0)
        images, targets, valids = (halves(values, n) for values in (labeled.image, labeled.target, labeled.valid))
        if len(labeled) == 1:
            images, targets, valids = ((a, mirrored_in_plane(b, mirror_axes)) for a, b in (images, targets, valids))
        return cls(images, targets, valids, mask)

    @property
    def image(self) -> Tensor:
        """[n, Ci, *S]."""
        return mix(*self.images, self.mask)

    def mixed(self, a: Tensor, b: Tensor) -> Tensor:
        """[n, c, *S'] from values of both halves, such as features; the mask is brought to S' by nearest neighbor."""
        return mix(a, b, at_level(self.mask, a.shape[2:]))

    def loss(self, z: Levels, regions: bool = False) -> Tensor:
        """The sum of both parts of `region_mix_loss`, from logits of `image`."""
        outer, inner = region_mix_loss(
            z, self.mask, *self.targets, valid_out=self.valids[0], valid_in=self.valids[1], regions=regions
        )
        return outer + inner


def mirrored_in_plane(values: Tensor, mirror_axes: Sequence[int]) -> Tensor:
    """[N, c, *S] mirrored along those in-plane axes (the last two) along which the plan mirrors."""
    dims = values.ndim - 2
    return values.flip([axis - dims for axis in mirror_axes if axis >= dims - 2])
