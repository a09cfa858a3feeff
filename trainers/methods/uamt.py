"""UA-MT: Mean Teacher, where the teacher is sure."""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from autossl.networks.build import set_deep_supervision
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
    setting,
)
from autossl.trainers.components.augment import channel_dropout, clipped_noise
from autossl.trainers.components.ema import EMATeacher, ema_decay
from autossl.trainers.components.losses import entropy, probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp

logger = logging.getLogger(__name__)

RELEASE = "Yu et al. 2019, released code"
MAPS_LIMIT_BYTES = 1 << 30
"""Where probabilities and entropy of all unlabeled patches take more, their uncertainty is found one by one."""
QUANTILE, QUANTILE_DECAY = 0.99, 0.99
WARN_AFTER_STEPS = 100


class UncertaintyAwareMeanTeacherSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(
        1.0, "weight of the consistency term after its ramp", f"ours: at 0.1 ({RELEASE}) it hardly acts", ge=0
    )
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", RELEASE, ge=0)
    ema_decay_max: float | None = setting(
        None,
        "upper limit of the teacher's decay; None: the plan's horizon",
        "ours: 1 - 300 / T in 0.99..0.999",
        ge=0,
        lt=1,
    )
    noise: float = setting(0.1, "sigma of the teacher's input noise, in standard deviations", RELEASE, ge=0)
    passes: int = setting(8, "teacher passes with dropout that measure its uncertainty", RELEASE, ge=1, le=64)
    dropout: float = setting(
        0.5, "rate of channel dropout at the bottleneck and before the last layer in these passes", RELEASE, ge=0, lt=1
    )
    student_dropout: float = setting(0.0, "the same in the student, on unlabeled patches", "ours: off", ge=0, lt=1)
    umax: Literal["classes", "quantile"] = setting(
        "classes", "largest uncertainty: ln of the number of classes, or its running 99th percentile", RELEASE
    )
    labeled_only: bool = setting(False, "without unlabeled cases: consistency on the labeled ones", "ours")
    infer: Literal["student", "teacher"] = setting("student", "which weights predict", RELEASE)


class UncertaintyAwareMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher that learns from the teacher only where it is sure. Several passes with dropout and noise are
    averaged; where the entropy of the mean is below a threshold that rises over the run, the student must match the
    teacher. Learning goes from certain to uncertain regions, at the cost of the additional teacher passes."""

    name = "uamt"
    title = "UA-MT: Mean Teacher where the teacher is certain"
    citation = (
        "L. Yu, S. Wang, X. Li, C.-W. Fu, P.-A. Heng. Uncertainty-aware Self-ensembling Model for Semi-supervised 3D "
        "Left Atrium Segmentation. MICCAI 2019. arXiv:1907.07034."
    )
    needs = Needs(teacher=True)
    Settings = UncertaintyAwareMeanTeacherSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: UncertaintyAwareMeanTeacherSettings

    def build(self) -> Parts:
        student = self.job.build_network()
        decay_max = self.settings.ema_decay_max
        self.teacher = EMATeacher(student, self.job.ema_decay_max if decay_max is None else decay_max)
        set_deep_supervision(self.teacher.network, False)  # its lower levels are never looked at
        self._quantile: Tensor | None = None
        self._certain_share: Tensor | None = None
        memory: dict[str, Tensor | int] = {"steps_without_a_certain_voxel": 0}
        if self.settings.umax == "quantile":
            memory["u_max"] = torch.tensor(self._largest_entropy)
        return Parts({"network": student}, {"teacher": self.teacher.network}, memory)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        student, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        settings, n_labeled = self.settings, len(batch.labeled)
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        self._quantile = self._certain_share = None
        x, valid = labeled.image, labeled.valid
        if unlabeled is not None:
            x, valid = torch.cat([x, unlabeled.image]), torch.cat([valid, unlabeled.valid])
        judged = slice(0 if settings.labeled_only and not self.job.has_unlabeled else n_labeled, None)
        if weight == 0 or len(x[judged]) == 0:  # without the term the step is the twin's, bit for bit
            z = student(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        z = self._student_logits(x, judged.start, at)
        seen = x[judged]
        noise = clipped_noise(
            seen, at.generator("teacher noise", x.device), settings.noise, 2 * settings.noise, self.job.channel_std
        )
        q = self.job.probabilities(self.teacher.logits(seen + noise))
        uncertainty = self.uncertainty(seen, at)
        threshold = threshold_share(at.fraction) * self._u_max(uncertainty, valid[judged], at)
        certain = (uncertainty < threshold) & valid[judged]
        consistency = probability_mse(self.job.probabilities(z[0][judged]), q, certain)
        self._certain_share = certain.sum() / valid[judged].sum().clamp(min=1)
        z_labeled = [level[:n_labeled] for level in z]
        return StepOutput(
            {
                "supervised": self.job.supervised_loss(z_labeled, labeled.target, labeled.valid),
                "consistency": weight * consistency,
            },
            {
                "consistency": consistency.detach(),
                "consistency_weight": weight,
                "certain_share": self._certain_share,
                "uncertainty": (uncertainty * valid[judged]).sum() / valid[judged].sum().clamp(min=1),
                "threshold": threshold,
                "valid_share": valid[judged].float().mean(),
            },
        )

    @torch.no_grad()
    def uncertainty(self, x: Tensor, at: Progress) -> Tensor:
        """Entropy of the mean of the stochastic passes, [B, 1, *S]; only sums are kept, never the passes."""
        maps = 4 * (self.job.schema.n_outputs + 1) * x[:, :1].numel()
        noise, dropout = at.generator("uncertainty noise", x.device), at.generator("uncertainty dropout")
        parts = x.split(1 if maps > MAPS_LIMIT_BYTES else len(x))
        return torch.cat([self._entropy_of_mean(part, noise, dropout) for part in parts])

    def after_step(self, at: Progress) -> None:
        memory = self.parts.memory
        self.teacher.update(self.parts.trained["network"], at.step)
        if self._quantile is not None:
            memory["u_max"].copy_(self._quantile)
        if self._certain_share is not None:
            empty = memory["steps_without_a_certain_voxel"] + 1 if float(self._certain_share) == 0 else 0
            memory["steps_without_a_certain_voxel"] = empty
            if empty == WARN_AFTER_STEPS:
                logger.warning("uamt: the teacher was certain of no voxel in %d steps in a row", empty)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("teacher" if self.settings.infer == "teacher" else "network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        other = "student" if self.settings.infer == "teacher" else "teacher"
        return {other: self.job.single_network_prediction("network" if other == "student" else "teacher")}

    def _student_logits(self, x: Tensor, first: int, at: Progress) -> list[Tensor]:
        """Logits of all rows; with `student_dropout` the rows from `first` on go through dropout."""
        network, rate = self.parts.trained["network"], self.settings.student_dropout
        if rate == 0:
            return network(x)
        generator = at.generator("student dropout")

        def drop(features: Tensor) -> Tensor:
            return torch.cat([features[:first], channel_dropout(features[first:], rate, generator)])

        return forward_features(network, x, (), lambda skips: [*skips[:-1], drop(skips[-1])], drop)[0]

    def _entropy_of_mean(self, x: Tensor, noise: torch.Generator, dropout: torch.Generator) -> Tensor:
        settings = self.settings
        total = torch.zeros((len(x), self.job.schema.n_outputs, *x.shape[2:]), device=x.device)

        def drop(features: Tensor) -> Tensor:
            return channel_dropout(features, settings.dropout, dropout)

        for _ in range(settings.passes):
            seen = x + clipped_noise(x, noise, settings.noise, 2 * settings.noise, self.job.channel_std)
            (z,), _ = forward_features(
                self.teacher.network, seen, (), lambda skips: [*skips[:-1], drop(skips[-1])], drop
            )
            total += self.job.probabilities(z)
        return entropy(total.div_(settings.passes), self.job.schema.has_regions)

    @property
    def _largest_entropy(self) -> float:
        return math.log(2 if self.job.schema.has_regions else self.job.schema.n_outputs)

    def _u_max(self, uncertainty: Tensor, valid: Tensor, at: Progress) -> Tensor | float:
        """ln C (regions: ln 2), or the running percentile, to which this step belongs."""
        if self.settings.umax == "classes":
            return self._largest_entropy
        before, values = self.parts.memory["u_max"], uncertainty[valid]
        self._quantile = before
        if len(values):
            quantile = values.kthvalue(math.ceil(QUANTILE * len(values))).values
            self._quantile = torch.lerp(quantile, before, ema_decay(at.step, QUANTILE_DECAY))
        return self._quantile


def threshold_share(r: float) -> float:
    """Of the largest uncertainty: from 0.7517 at the start to 1."""
    return 0.75 + 0.25 * sigmoid_ramp(r, 1.0)
