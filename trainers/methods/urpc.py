"""URPC: the resolutions of deep supervision must agree, least where they differ most."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autossl.data.problems import InvalidInput, Problem
from autossl.networks.features import forward_features
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Needs,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    setting,
)
from autossl.trainers.components.augment import Perturbation, perturb_features
from autossl.trainers.components.losses import EPS
from autossl.trainers.components.schedules import sigmoid_ramp

RELEASE = "SSL4MIS, urpc trainers"
MOST_SCALES = 4
FEWEST_LEVELS = 3
"""Two scales and the lowest level, whose head gets no supervised gradient and therefore stays out."""
SMALLEST_SIDE = 4
"""Voxels; a coarser map says too little about places (ours)."""
LOWEST_LOG = -100.0
CHECKPOINT_ABOVE = 1 << 28
"""Elements of a full-resolution map of the unlabeled patches above which maps are computed twice and not kept."""
BRANCHES: tuple[Perturbation, ...] = ("dropout", "attention", "noise")
"""Of the auxiliary heads' inputs, the coarsest first."""


class PyramidConsistencySettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(
        1.0, "weight of the pyramid's consistency after its ramp", f"ours: at 0.1 ({RELEASE}) it hardly acts", ge=0
    )
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", RELEASE, ge=0)
    detach_mean: bool = setting(False, "no gradient through the mean over the scales (ablation)", RELEASE)
    detach_weight: bool = setting(False, "no gradient through the weights of the voxels (ablation)", RELEASE)
    pyramid_sup: bool = setting(
        False, "supervise the up-sampled scales with equal weights, as the release does", "ours: deep supervision"
    )
    branch_perturb: bool = setting(
        False, "channel dropout, attention drop and noise before the auxiliary heads, as the 2D release does", "ours"
    )


class PyramidConsistency(SemiSupervisedTrainer):
    """The predictions at the resolutions of deep supervision must agree with their mean on unlabeled patches. Where a
    resolution deviates much (a high Kullback-Leibler divergence) it counts less, and the divergence itself is
    minimized as well. Uncertainty thus comes from a single forward pass."""

    name = "urpc"
    title = "URPC: uncertainty rectified pyramid consistency"
    citation = (
        "X. Luo, G. Wang, W. Liao, J. Chen, T. Song, Y. Chen, S. Zhang, D. N. Metaxas, S. Zhang. Semi-supervised "
        "medical image segmentation via uncertainty rectified pyramid consistency. Medical Image Analysis 80, 2022. "
        "arXiv:2012.07042."
    )
    needs = Needs(levels=FEWEST_LEVELS)
    Settings = PyramidConsistencySettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: PyramidConsistencySettings

    def build(self) -> Parts:
        """Raises `InvalidInput` where the plan's network has too few levels."""
        n_levels = len(self.job.configuration.architecture.cumulative_strides) - 1
        if n_levels < FEWEST_LEVELS:
            raise InvalidInput(
                Problem(
                    f"the plan's network has {n_levels} level(s) of deep supervision",
                    f"at least {FEWEST_LEVELS}, which urpc needs",
                    "choose another method, or a plan with a larger patch",
                )
            )
        return Parts(trained={"network": self.job.build_network()})

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled, unlabeled, settings = batch.labeled, batch.unlabeled, self.settings
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        if unlabeled is None or weight == 0:  # the twin's step, bit for bit, unless the supervision is another one
            z = self.parts.trained["network"](labeled.image)
            loss = self._supervised(z, labeled) if self.job.has_unlabeled else self._supervised_by_level(z, labeled)
            return StepOutput({"supervised": loss})

        z = self._logits(torch.cat([labeled.image, unlabeled.image]), at)
        z_unlabeled = [level[len(labeled) :] for level in z[: self.n_scales]]
        consistency, measures = pyramid_consistency(
            z_unlabeled, unlabeled.valid, self.job.schema.has_regions, settings.detach_mean, settings.detach_weight
        )
        return StepOutput(
            {
                "supervised": self._supervised([level[: len(labeled)] for level in z], labeled),
                "consistency": weight * consistency,
            },
            {
                "consistency": consistency.detach(),
                "consistency_weight": weight,
                "valid_share": unlabeled.valid.float().mean(),
                "scales": self.n_scales,
                **measures,
            },
        )

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    @property
    def n_scales(self) -> int:
        """Scales of the pyramid: at most four, at least two, none but those with a side below four voxels."""
        plan = self.job.configuration
        factors = plan.architecture.cumulative_strides
        n = min(MOST_SCALES, len(factors) - 2)
        while n > 2 and min(side // f for side, f in zip(plan.patch_size, factors[n - 1], strict=True)) < SMALLEST_SIDE:
            n -= 1
        return n

    def _logits(self, x: Tensor, at: Progress) -> list[Tensor]:
        """Of all levels; with `branch_perturb` the auxiliary heads of the pyramid see perturbed features."""
        network: Any = self.parts.trained["network"]
        if not self.settings.branch_perturb:
            return network(x)
        scales = range(self.n_scales - 1, 0, -1)
        z, maps = forward_features(network, x, [f"dec:{-(scale + 1)}" for scale in scales])
        generator = at.generator("branches", x.device)
        for scale, features, kind in zip(scales, maps.values(), BRANCHES, strict=False):
            (changed,) = perturb_features([features], kind, generator)
            z[scale] = network.decoder.seg_layers[-(scale + 1)](changed)
        return z

    def _supervised(self, z: Sequence[Tensor], labeled: StreamBatch) -> Tensor:
        loss = self.job.supervised_loss
        if not self.settings.pyramid_sup:
            return self._supervised_by_level(z, labeled)
        w = labeled.valid if loss.has_ignore else None
        scales = [up_sampled(level, z[0].shape[2:]) for level in z[: self.n_scales]]
        return torch.stack([loss.at_one_level(scale, labeled.target, w) for scale in scales]).mean() / 2

    def _supervised_by_level(self, z: Sequence[Tensor], labeled: StreamBatch) -> Tensor:
        return self.job.supervised_loss(z, labeled.target, labeled.valid)


def pyramid_consistency(
    z: Sequence[Tensor], valid: Tensor, regions: bool = False, detach_mean: bool = False, detach_weight: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the scales of [Σ w·(p̄ - p)² / Σ w + mean KL(p̄ ‖ p)] with w = exp(-KL), and means of KL and w.

    p̄ is the mean over the scales. Everything is computed at full resolution, and gradients flow through all of it.
    Source: Luo et al. 2022, equations 3 to 6; regions (the mean of their binary divergences) are ours.

    Args:
        z: logits of the scales [B, C, *S_s], full resolution first.
        valid: boolean [B, 1, *S], voxels that count.
        regions: z are logits of sigmoids.
        detach_mean, detach_weight: no gradient through p̄, through w.
    """
    large = z[0].numel() > CHECKPOINT_ABOVE
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if large else _call
    log_p = [run(_log_outcomes, level, z[0].shape[2:], regions) for level in z]
    log_mean = run(_log_of_mean, *log_p)
    if detach_mean:
        log_mean = log_mean.detach()
    mean, counted = log_mean.exp(), valid[:, 0].to(log_mean.dtype)
    terms = [run(_scale_term, mean, log_mean, log, counted, detach_weight) for log in log_p]
    loss, divergence, weight = (torch.stack(values).mean() for values in zip(*terms, strict=True))
    return loss, {"divergence": divergence.detach(), "mean_weight": weight.detach()}


def up_sampled(z: Tensor, shape: Sequence[int]) -> Tensor:
    """Logits at a larger spatial shape by linear interpolation, at least float32."""
    z = z if z.dtype == torch.float64 else z.float()
    if tuple(z.shape[2:]) == tuple(shape):
        return z
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    return functional.interpolate(z, tuple(shape), mode=mode, align_corners=False)


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _log_outcomes(z: Tensor, shape: Sequence[int], regions: bool) -> Tensor:
    """Log-probabilities [B, G, K, *S] of G decisions with K outcomes: one with C, or for each region yes and no."""
    z = up_sampled(z, shape)
    logs = (
        torch.stack((functional.logsigmoid(z), functional.logsigmoid(-z)), 2)
        if regions
        else torch.log_softmax(z, 1).unsqueeze(1)
    )
    return logs.clamp(min=LOWEST_LOG)


def _log_of_mean(*log_p: Tensor) -> Tensor:
    total = log_p[0]
    for log in log_p[1:]:
        total = torch.logaddexp(total, log)
    return total - math.log(len(log_p))


def _scale_term(
    mean: Tensor, log_mean: Tensor, log_p: Tensor, counted: Tensor, detach_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The term of one scale, its mean divergence and its mean weight, over the counted voxels [B, *S]."""
    divergence = (mean * (log_mean - log_p)).sum(2).mean(1)
    weight = torch.exp(-divergence)
    if detach_weight:
        weight = weight.detach()
    weight = weight * counted
    squares = (mean - log_p.exp()).square().mean((1, 2))
    n = counted.sum().clamp(min=EPS)
    mean_divergence, mean_weight = (divergence * counted).sum() / n, weight.sum() / n
    return (squares * weight).sum() / n / (mean_weight + 1e-8) + mean_divergence, mean_divergence, mean_weight
