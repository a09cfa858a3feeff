"""M³HL: labeled and unlabeled images exchange random cells of a grid, and features agree at two depths."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from autossl.networks.features import forward_features
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    MethodSettings,
    Needs,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
    setting,
)
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.feature_agreement import high_distance, low_distance
from autossl.trainers.components.losses import at_level
from autossl.trainers.components.masks import grid_mask, half_size, halves
from autossl.trainers.components.mixing import CopyPaste, Exchange, pseudo_labels_of, single_component_channels

logger = logging.getLogger(__name__)

RELEASE = "Liu et al. 2025, released code"
LOW, HIGH = "dec:last", "bottleneck"
"""Taps: the values of the low level must agree, the direction of the high level."""
LARGE_FEATURES = 10.0
CHECKED_EVERY = 100
"""Steps between looks at the scale of the features."""


class MutualMaskMixSettings(MethodSettings):
    """What can be changed with --set."""

    alpha: float = setting(0.5, "weight of the pseudo-labeled part of a mixed image", RELEASE, ge=0)
    lambda_low: float = setting(0.5, "weight of the agreement of the last decoder features", RELEASE, ge=0)
    lambda_high: float = setting(0.5, "weight of the agreement of the bottleneck features", RELEASE, ge=0)
    cells: int = setting(4, "cells per axis; fewer through plane of anisotropic patches", f"{RELEASE}: ACDC, LA", gt=0)
    ratio: str = setting(
        "0.5", "share of the cells taken from the second image; low:high draws it for each pair", RELEASE
    )
    pairs: Literal["all", "matched"] = setting(
        "all",
        "all: each mixture agrees with both unlabeled halves; matched: with the one whose cells it holds",
        RELEASE,
    )
    largest_component: bool = setting(
        True, "clean pseudo-labels of classes that are one piece in the labeled cases", f"{RELEASE}: of all classes"
    )
    r_warm: float | None = setting(
        None,
        "fraction of the run with plain labeled images alone; None: the plan's",
        "ours: the release starts at once",
        ge=0,
        le=1,
    )
    ema_decay_max: float | None = setting(
        None, "the teacher's decay; None: the plan's horizon", "ours: 1 - 300 / T in 0.99..0.999", ge=0, lt=1
    )
    labeled_only: bool = setting(False, "without unlabeled cases: labeled images exchange cells", "ours")

    @field_validator("ratio", mode="before")
    @classmethod
    def _shares(cls, value: Any) -> str:
        parts = [float(part) for part in str(value).split(":")]  # a ValueError is pydantic's to report
        if len(parts) > 2 or parts != sorted(parts) or not 0 <= parts[0] <= parts[-1] <= 1:
            raise ValueError(f"ratio {value!r} must be a share in 0..1, or low:high with low at most high")
        return str(value)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """Smallest and largest share."""
        parts = [float(part) for part in self.ratio.split(":")]
        return parts[0], parts[-1]


class MutualMaskMix(SemiSupervisedTrainer):
    """Half of the cells of a random grid come from an unlabeled image and the others from a labeled one; a second pair
    is mixed with the roles exchanged. True labels judge labeled cells, a mean teacher's labels the others. The
    student's features of both mixtures are also drawn to the teacher's features of the unmixed unlabeled images: to
    their values at full resolution, to their direction at the bottleneck.

    Faithful to the released code: mixing, losses, all four pairings, constant weights. Ours: a short supervised start
    from which the teacher follows, the number of cells through plane, cleaning of single-component classes alone,
    deep supervision, voxels outside the images left out of the features' agreement.
    """

    name = "m3hl"
    title = "M³HL: mutual mask mix with high- and low-level feature consistency"
    citation = (
        "Y. Liu, Z. Zhang, J. Yue, W. Guo, D. Li. M3HL: Mutual Mask Mix with High-Low Level Feature Consistency for "
        "Semi-Supervised Medical Image Segmentation. MICCAI 2025. arXiv:2508.03752."
    )
    needs = Needs(teacher=True)
    Settings = MutualMaskMixSettings
    reduces_to_supervised = True
    unsupervised_weights = ("alpha", "lambda_low", "lambda_high")
    changes_supervised = True
    ablation = {"lambda_low": "0", "lambda_high": "0"}
    settings: MutualMaskMixSettings

    def build(self) -> Parts:
        job, decay = self.job, self.settings.ema_decay_max
        student = job.build_network()
        self.teacher = EMATeacher(student, job.ema_decay_max if decay is None else decay)
        self.single_component = single_component_channels(job) if self.settings.largest_component else ()
        self._warned = False
        return Parts(trained={"network": student}, followers={"teacher": self.teacher.network})

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if self._warms_up(at) else request

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if batch.unlabeled is not None and not self._warms_up(at):
            return self._exchange(labeled, batch.unlabeled, at)
        if self.settings.labeled_only and not self.job.has_unlabeled:
            return self._labeled_exchange(labeled, at)
        z = self.parts.trained["network"](labeled.image)  # the twin's step, bit for bit
        return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

    def after_step(self, at: Progress) -> None:
        self.teacher.update(self.parts.trained["network"], at.step)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        return {"teacher": self.job.single_network_prediction("teacher")}

    def _warms_up(self, at: Progress) -> bool:
        r_warm = self.settings.r_warm
        return at.fraction < (self.job.warm_up_fraction if r_warm is None else r_warm)

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """A grid for each pair, false in the cells that come from the second image."""
        settings, generator = self.settings, at.generator("grid")
        low, high = settings.ratio_range
        shape, spacing = image.shape[2:], self.job.configuration.spacing
        drawn = torch.rand(n, generator=generator).tolist()
        ratios = [low + (high - low) * u for u in drawn]
        masks = [grid_mask(1, shape, spacing, generator, settings.cells, ratio) for ratio in ratios]
        return torch.cat(masks).to(image.device)

    def _labeled_exchange(self, labeled: StreamBatch, at: Progress) -> StepOutput:
        mask = self._mask(half_size(len(labeled), 0), labeled.image, at)
        pasted = CopyPaste.of(labeled, mask, self.job.configuration.mirror_axes)
        z = self.parts.trained["network"](pasted.image)
        return StepOutput(
            {"supervised": pasted.loss(z, self.job.schema.has_regions)}, {"mixed_share": (~mask).float().mean()}
        )

    def _exchange(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        settings, regions = self.settings, self.job.schema.has_regions
        weights = {"low": settings.lambda_low, "high": settings.lambda_high}
        taps = [tap for tap, name in ((LOW, "low"), (HIGH, "high")) if weights[name] > 0]
        with torch.no_grad():
            z_teacher, wanted = forward_features(self.teacher.network, unlabeled.image, taps)
        labels = pseudo_labels_of(self.job.probabilities(z_teacher[0]), self.single_component, regions)
        mask = self._mask(half_size(len(labeled), len(unlabeled)), labeled.image, at)
        exchange = Exchange(labeled, unlabeled, labels, mask)
        z, features = forward_features(self.parts.trained["network"], exchange.image, taps)
        true, pseudo = exchange.loss(z, regions)

        terms = {"pseudo": pseudo}
        if LOW in taps:
            terms["low"] = self._agreement(low_distance, exchange, features[LOW], wanted[LOW])
            size = features[LOW].detach().float().abs().mean()
            self._watch_scale(size, at)
        if HIGH in taps:
            terms["high"] = self._agreement(high_distance, exchange, features[HIGH], wanted[HIGH])
        weights["pseudo"] = settings.alpha
        measures: dict[str, Tensor | float] = {
            "pseudo_share": exchange.pseudo_share,
            "pseudo_foreground_share": (labels.target > 0).float().mean(),
            "removed_share": labels.removed_share,
            "mixed_share": (~mask).float().mean(),
            "feature_share": unlabeled.valid.float().mean(),
        }
        if LOW in taps:
            measures["low_feature_size"] = size
        for name, term in terms.items():
            measures |= {name: term.detach(), f"{name}_weight": weights[name]}
        return StepOutput({"supervised": true} | {name: weights[name] * term for name, term in terms.items()}, measures)

    def _agreement(
        self, distance: Callable[[Tensor, Tensor, Tensor], Tensor], exchange: Exchange, mine: Tensor, wanted: Tensor
    ) -> Tensor:
        """Mean distance over the pairs of a mixture with an unlabeled half, where both lie inside their images.

        Args:
            distance: of features [n, c, *S'] to wanted ones, given the voxels that count [n, 1, *S'].
            exchange: the mixtures.
            mine: the student's features of the mixtures, [2n, c, *S'].
            wanted: the teacher's features of the unlabeled patches, [B_u, c, *S'].
        """
        n, shape = len(exchange.mask), mine.shape[2:]
        inside = at_level(exchange.inside, shape)
        valids, targets = halves(at_level(exchange.unlabeled.valid, shape), n), halves(wanted, n)
        distances = [
            distance(mine[rows], targets[j], inside[rows] & valids[j])
            for i, rows in enumerate((slice(0, n), slice(n, None)))
            for j in range(2)
            if i == j or self.settings.pairs == "all"
        ]
        return torch.stack(distances).mean()

    def _watch_scale(self, size: Tensor, at: Progress) -> None:
        """Warns once where the features' mean size is so large that the low term outweighs the others."""
        if self._warned or at.step % CHECKED_EVERY:
            return
        scale = float(size)
        if scale > LARGE_FEATURES:
            logger.warning(
                "m3hl: the last decoder features average %.1f in size, where about 1 was expected; lower lambda_low "
                "in proportion (--set lambda_low=%.2g)",
                scale,
                self.settings.lambda_low / scale,
            )
            self._warned = True
