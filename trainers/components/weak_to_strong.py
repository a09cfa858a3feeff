"""Weak-to-strong supervision: confident hard labels of the weak view teach strongly augmented, mixed views.

Source: FixMatch (Sohn et al., NeurIPS 2020) in the form for segmentation of UniMatch (Yang et al., CVPR 2023). Partners
from the same batch, boxes in 3D, cross-entropy and Dice together, and the warm-up are reconstructions of ours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from autossl.trainers.base import Job, MethodSettings, Progress, StreamBatch, setting
from autossl.trainers.components.augment import StrongAugment
from autossl.trainers.components.losses import hard_label_ce, hard_label_dice, hard_label_loss
from autossl.trainers.components.masks import cutmix_box, derangement, mix, through_plane_axis
from autossl.trainers.components.pseudo import pseudo_label
from autossl.trainers.components.schedules import linear_ramp

logger = logging.getLogger(__name__)

WATCHED = (0.5, 0.6)
"""Part of the run over which the confidence of each class is looked at."""
LOW_CONFIDENCE = 0.01


class WeakToStrongSettings(MethodSettings):
    """What the methods that learn this way share."""

    threshold: float = setting(0.95, "a pseudo-label counts where its confidence reaches this", "UniMatch, ACDC", ge=0)
    lambda_max: float = setting(1.0, "weight of the unlabeled terms after their ramp", "UniMatch without its ½", ge=0)
    r_warm: float | None = setting(
        None, "fraction of the run up to which the unlabeled terms are off; None: the plan's", "ours: 0.02", ge=0, le=1
    )
    ramp_end: float = setting(0.1, "fraction of the run at which the weight has grown to its full value", "ours", ge=0)
    u_loss: Literal["both", "ce", "dice"] = setting(
        "both",
        "loss of the strong views; dice: V-Net's form with squares, as UniMatch on medical images",
        "ours: the pair of the supervised loss",
    )
    cutmix_p: float = setting(0.5, "probability that a strong view gets a box of another patch", "UniMatch", ge=0, le=1)
    partner: Literal["labeled", "none"] = setting(
        "labeled", "where a step has one unlabeled patch: its box comes from a labeled patch, or there is none", "ours"
    )


@dataclass(frozen=True)
class PseudoLabeled:
    """B patches with the labels they are believed to have. Nothing in here has a gradient."""

    image: Tensor
    """[B, Ci, *S]."""
    labels: Tensor
    """Int64 [B, 1, *S]; regions: float 0/1 [B, C, *S]."""
    confidence: Tensor
    """Float32 in 0..1: [B, 1, *S]; regions: [B, C, *S]."""
    valid: Tensor
    """Boolean [B, 1, *S]: inside the image and, where the labels are true ones, not the ignore label."""

    def rows(self, index: slice | Tensor) -> PseudoLabeled:
        """Some of the patches."""
        return PseudoLabeled(*(value[index] for value in vars(self).values()))

    def mixed(self, other: PseudoLabeled, mask: Tensor) -> PseudoLabeled:
        """Everything from `other` where the mask is False."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return PseudoLabeled(*(mix(mine, theirs, mask) for mine, theirs in pairs))

    def joined(self, other: PseudoLabeled) -> PseudoLabeled:
        """These patches, then the others."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return PseudoLabeled(*(torch.cat([mine, theirs]) for mine, theirs in pairs))


class WeakToStrong:
    """The pieces of a step: weight, pseudo-labels of the weak view, strong views, and their loss."""

    def __init__(self, job: Job, settings: WeakToStrongSettings) -> None:
        plan = job.configuration
        self.job = job
        self.settings = settings
        self.augment = StrongAugment(plan.spacing, job.channel_std, plan.use_mask_for_norm)

    def weight(self, at: Progress) -> float:
        """λ(r) = lambda_max · linear_ramp(r, r_warm, ramp_end)."""
        settings = self.settings
        r_warm = self.job.warm_up_fraction if settings.r_warm is None else settings.r_warm
        return settings.lambda_max * linear_ramp(at.fraction, r_warm, max(r_warm, settings.ramp_end))

    def weak_view(self, unlabeled: StreamBatch, z: Tensor) -> PseudoLabeled:
        """The weak view with what the logits z [B, C, *S] say about it; no gradient goes through them."""
        q = self.job.probabilities(z.detach())
        labels, confidence = pseudo_label(q, self.job.schema.has_regions)
        return PseudoLabeled(unlabeled.weak, labels, confidence, unlabeled.valid)

    def strong_view(self, weak: PseudoLabeled, labeled: StreamBatch, at: Progress, stream: str) -> PseudoLabeled:
        """Strongly augmented patches with boxes of other patches; labels, confidence and validity are mixed alike.

        Partners are the other patches of the step, the same for every stream. A single patch has the step's first
        labeled one as partner, with its true label and confidence 1, or none.

        Args:
            weak: as `weak_view` gives it.
            labeled: the labeled part of the batch.
            at: decides all draws, together with
            stream: a name per strong view.
        """
        n, device = len(weak.image), weak.image.device
        source, partner, inside = weak, derangement(n, at.generator("partner")).to(device), weak.valid
        if n == 1 and self.settings.partner == "labeled":
            source, partner = weak.joined(_with_true_label(labeled, weak)), torch.ones_like(partner)
            inside = torch.cat([inside, torch.ones_like(inside)])  # ignore voxels lie inside their image
        image = self.augment(source.image, at.generator(f"{stream} intensity", device), inside)
        strong = replace(source, image=image)
        mask = cutmix_box(
            n,
            image.shape[2:],
            at.generator(f"{stream} box"),
            self.settings.cutmix_p,
            through_plane_free=through_plane_axis(self.job.configuration.spacing) == 0,
            device=device,
        )
        return strong.rows(slice(n)).mixed(strong.rows(partner), mask)

    def loss(self, z: Sequence[Tensor], view: PseudoLabeled) -> Tensor:
        """L_u of the logits (all levels) against the labels that are confident enough.

        Cross-entropy is divided by all valid voxels, so that little confidence lowers it; Dice counts the confident
        voxels alone, over the batch.
        """
        w, regions = self._weights(view).float(), self.job.schema.has_regions
        if self.settings.u_loss == "ce":
            return hard_label_ce(z, view.labels, w, view.valid, regions)
        if self.settings.u_loss == "dice":
            return hard_label_dice(z, view.labels, w, regions, square=True)
        return hard_label_loss(z, view.labels, w, view.valid, regions)

    def watch(
        self, weak: PseudoLabeled, at: Progress, memory: dict[str, Any], method: str
    ) -> dict[str, Tensor | float]:
        """Measures of the confidence: its share over all valid voxels and among those of each foreground class.

        Counts over a part of the run are kept in `memory` (see `confidence_memory`); at its end a warning names the
        classes that hardly any voxel is confident in. It comes once.
        """
        confident = self._weights(weak)
        counts = self._class_counts(weak, confident)
        if at.fraction >= WATCHED[0] and not memory["confidence_judged"]:
            for key, found in (("confident_voxels", 0), ("class_voxels", 1)):
                memory[key] = [total + count[found] for total, count in zip(memory[key], counts.values(), strict=True)]
            if at.fraction >= WATCHED[1]:
                memory["confidence_judged"] = True
                _warn_of_low_confidence(method, dict(zip(counts, _shares(memory), strict=True)))
        by_class = {f"confident_share {name}": sure / all_ for name, (sure, all_) in counts.items() if all_}
        n_valid = (weak.valid.sum() * confident.shape[1]).clamp(min=1)
        return {"confident_share": confident.sum() / n_valid, **by_class}

    def _weights(self, view: PseudoLabeled) -> Tensor:
        """Boolean, shaped like the confidence."""
        return (view.confidence >= self.settings.threshold) & view.valid

    def _class_counts(self, weak: PseudoLabeled, confident: Tensor) -> dict[str, tuple[int, int]]:
        """Foreground class or region → its confident voxels, all of its voxels."""
        names = self.job.schema.foreground
        if self.job.schema.has_regions:
            positive = (weak.labels > 0.5) & weak.valid
            axes = (0, *range(2, positive.ndim))
            table = torch.stack([(positive & confident).sum(axes), positive.sum(axes)], 1)
        else:
            code = (2 * weak.labels + confident)[weak.valid]
            pairs = torch.bincount(code, minlength=2 * (len(names) + 1)).view(-1, 2)[1:]
            table = torch.stack([pairs[:, 1], pairs.sum(1)], 1)
        return {name: (sure, all_) for name, (sure, all_) in zip(names, table.tolist(), strict=True)}


def confidence_memory(job: Job) -> dict[str, Any]:
    """Empty entries of `Parts.memory` for `WeakToStrong.watch`."""
    n = len(job.schema.foreground)
    return {"confident_voxels": [0] * n, "class_voxels": [0] * n, "confidence_judged": False}


def _with_true_label(labeled: StreamBatch, like: PseudoLabeled) -> PseudoLabeled:
    """The first labeled patch, fully believed."""
    label = labeled.target[:1]
    return PseudoLabeled(labeled.image[:1], label, torch.ones_like(like.confidence), labeled.valid[:1])


def _shares(memory: Mapping[str, Any]) -> list[float]:
    pairs = zip(memory["confident_voxels"], memory["class_voxels"], strict=True)
    return [sure / all_ if all_ else 0.0 for sure, all_ in pairs]


def _warn_of_low_confidence(method: str, shares: Mapping[str, float]) -> None:
    low = [f"{name} ({share:.2%})" for name, share in shares.items() if share < LOW_CONFIDENCE]
    if low:
        logger.warning(
            "%s: between %.0f %% and %.0f %% of the run, fewer than %.0f %% of the unlabeled voxels given to %s were "
            "confident. Expected: more, or the unlabeled cases teach nothing about it. What to do: lower --set "
            "threshold, or choose a method without one",
            method,
            100 * WATCHED[0],
            100 * WATCHED[1],
            100 * LOW_CONFIDENCE,
            ", ".join(low),
        )
