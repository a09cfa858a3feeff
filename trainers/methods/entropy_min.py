"""Entropy minimization: predictions on unlabeled patches should be certain."""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    setting,
)
from autossl.trainers.components.certainty import class_balanced_mean, prior_divergence, uncertainty
from autossl.trainers.components.losses import EPS, one_hot
from autossl.trainers.components.schedules import sigmoid_ramp

logger = logging.getLogger(__name__)

PORT = "SSL4MIS benchmark trainers"
LABEL_DECAY = 0.99
"""Of the running voxel counts of the labeled patches."""
COLLAPSE_SHARE = 0.1
COLLAPSE_FRACTION, COLLAPSE_STEPS = 0.02, 50
"""Foreground below this share of the labels' is reported after this fraction of the run, and not before so many steps:
a short run begins with background alone."""


class EntropyMinimizationSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(
        1.0, "weight of the entropy term after its ramp", f"ours: at 0.1 ({PORT}) it hardly acts", ge=0
    )
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends; 0: constant weight", PORT, ge=0)
    rows: Literal["unlabeled", "all"] = setting(
        "unlabeled", "patches whose entropy counts", "ours: the benchmark takes all, which sharpens labeled errors too"
    )
    class_balanced: bool = setting(False, "mean within each predicted class first, then over the classes", "ours")
    max_squares: bool = setting(
        False, "1 - sum of squared probabilities instead of the entropy", "ours: off (Chen et al., ICCV 2019)"
    )
    prior_weight: float = setting(
        0.0, "weight of the divergence of the mean prediction from the labeled patches' class shares", "ours: off", ge=0
    )
    labeled_only: bool = setting(False, "without unlabeled cases, with rows=all: entropy of the labeled ones", "ours")


class EntropyMinimization(SemiSupervisedTrainer):
    """A decision boundary should not run through dense regions of the data, hence the network should be certain on
    unlabeled voxels. The mean normalized entropy of its prediction is added to the supervised loss, with a weight
    that grows slowly: early on, certainty would commit to what a random network prefers, which is background."""

    name = "entropy_min"
    title = "Entropy minimization: certain predictions on unlabeled patches"
    citation = (
        "Y. Grandvalet, Y. Bengio. Semi-supervised Learning by Entropy Minimization. NeurIPS 2004; as a segmentation "
        "loss: T.-H. Vu, H. Jain, M. Bucher, M. Cord, P. Perez. ADVENT: Adversarial Entropy Minimization for Domain "
        "Adaptation in Semantic Segmentation. CVPR 2019. arXiv:1811.12833."
    )
    Settings = EntropyMinimizationSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max", "prior_weight")
    settings: EntropyMinimizationSettings

    def build(self) -> Parts:
        # Shares of the labeled patches as they are drawn, so with the foreground oversampling of that stream.
        memory = {"class_voxels": torch.zeros(self.job.schema.n_outputs), "voxels": torch.zeros(()), "collapsed": 0}
        return Parts(trained={"network": self.job.build_network()}, memory=memory)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        settings, n_labeled = self.settings, len(batch.labeled)
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        x, valid = labeled.image, labeled.valid
        if unlabeled is not None:
            x, valid = torch.cat([x, unlabeled.image]), torch.cat([valid, unlabeled.valid])
        judged = slice(0 if self._labeled_is_judged else n_labeled, None)
        if (weight == 0 and settings.prior_weight == 0) or len(x[judged]) == 0:  # the twin's step, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        z = network(x)
        entropy = self._entropy(z[0][judged], valid[judged])
        output = StepOutput(
            {
                "supervised": self.job.supervised_loss([v[:n_labeled] for v in z], labeled.target, labeled.valid),
                "entropy": weight * entropy,
            },
            {
                "entropy": entropy.detach(),
                "entropy_weight": weight,
                "valid_share": valid[judged].float().mean(),
            },
        )
        self._count_labels(labeled)
        if unlabeled is not None:
            self._compare_with_labels(z[0][n_labeled:], unlabeled.valid, output)
            self._watch_collapse(output, at)
        return output

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    @property
    def _labeled_is_judged(self) -> bool:
        return self.settings.rows == "all" and (self.job.has_unlabeled or self.settings.labeled_only)

    def _entropy(self, z: Tensor, valid: Tensor) -> Tensor:
        """Mean uncertainty of the valid voxels, all alike or class by class; 0 where there are none."""
        z = torch.where(valid, z.float(), 0)  # nothing of an invalid voxel reaches a gradient
        regions = self.job.schema.has_regions
        values = uncertainty(z, regions, self.settings.max_squares)
        if self.settings.class_balanced:
            return class_balanced_mean(values, z, valid, regions)
        counted = valid.expand_as(values)
        return torch.where(counted, values, 0).sum() / counted.sum().clamp(min=1)

    # ------------------------------------------------------------------------------------ what the labels look like

    @torch.no_grad()
    def _count_labels(self, labeled: StreamBatch) -> None:
        """Running voxel counts of the labeled patches; both decay alike, so that their ratio is right at once."""
        memory, target, valid = self.parts.memory, labeled.target, labeled.valid
        classes = target if self.job.schema.has_regions else one_hot(target, self.job.schema.n_outputs)
        counts = (classes * valid).sum((0, *range(2, classes.ndim)))
        memory["class_voxels"] = memory["class_voxels"].lerp(counts, 1 - LABEL_DECAY)
        memory["voxels"] = memory["voxels"].lerp(valid.sum().float(), 1 - LABEL_DECAY)

    def _compare_with_labels(self, z: Tensor, valid: Tensor, output: StepOutput) -> None:
        """The prior's term and the shares of the foreground, of the unlabeled patches against the labeled ones."""
        regions, memory = self.job.schema.has_regions, self.parts.memory
        z = torch.where(valid, z.float(), 0)
        shares = memory["class_voxels"] / memory["voxels"].clamp(min=EPS)
        is_foreground = z > 0 if regions else z.argmax(1, keepdim=True) > 0
        counted = valid.expand_as(is_foreground)
        output.measures["foreground_share"] = (is_foreground & counted).sum() / counted.sum().clamp(min=1)
        output.measures["labeled_foreground_share"] = shares.mean() if regions else 1 - shares[0]
        if self.settings.prior_weight > 0:
            p = self.job.probabilities(z)
            mean = torch.where(valid, p, 0).sum((0, *range(2, p.ndim))) / valid.sum().clamp(min=1)
            prior = prior_divergence(mean, shares, regions)
            output.losses["prior"] = self.settings.prior_weight * prior
            output.measures |= {"prior": prior.detach(), "prior_weight": self.settings.prior_weight}

    def _watch_collapse(self, output: StepOutput, at: Progress) -> None:
        """Warns once when the foreground has been vanishing for a while."""
        predicted, labeled = (output.measures[name] for name in ("foreground_share", "labeled_foreground_share"))
        low = bool(predicted < COLLAPSE_SHARE * labeled)
        self.parts.memory["collapsed"] = self.parts.memory["collapsed"] + 1 if low else 0
        if self.parts.memory["collapsed"] == max(COLLAPSE_STEPS, math.ceil(COLLAPSE_FRACTION * at.total)):
            logger.warning(
                "step %d: foreground is %.2g of the unlabeled voxels, but %.2g of the labeled ones (whose patches are "
                "drawn around foreground more often), for %d steps. The prediction may be collapsing to "
                "background; if it stays so, lower lambda_max, or set prior_weight or class_balanced",
                at.step,
                float(predicted),
                float(labeled),
                self.parts.memory["collapsed"],
            )
