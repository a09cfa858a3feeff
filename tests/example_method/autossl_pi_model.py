"""Π-model: a network must answer alike for two noisy versions of the same unlabeled patch."""

from __future__ import annotations

import torch
from torch import Tensor

from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import Batch, MethodSettings, Parts, Progress, SemiSupervisedTrainer, StepOutput, setting
from autossl.trainers.components.augment import clipped_noise
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp


class PiModelSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(0.1, "weight of the consistency term after its ramp", "ours", ge=0)
    noise: float = setting(0.1, "sigma of the input noise, in standard deviations", "ours", ge=0)


class PiModel(SemiSupervisedTrainer):
    """Two noisy versions of each unlabeled patch must be segmented alike: what changes under noise is not anatomy."""

    name = "pi_model"
    title = "Π-model: consistency under noise"
    citation = "S. Laine, T. Aila. Temporal Ensembling for Semi-Supervised Learning. ICLR 2017. arXiv:1610.02242."
    Settings = PiModelSettings
    settings: PiModelSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)

    def build(self) -> Parts:
        return Parts(trained={"network": self.job.build_network()})

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        weight = self.settings.lambda_max * sigmoid_ramp(at.fraction)
        if unlabeled is None or weight == 0:
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        noisy = [self._noisy(unlabeled.image, at, name) for name in ("first", "second")]
        z = network(torch.cat([labeled.image, *noisy]))
        first, second = self.job.probabilities(z[0][len(labeled) :]).chunk(2)
        consistency = probability_mse(first, second.detach(), unlabeled.valid)
        supervised = self.job.supervised_loss([level[: len(labeled)] for level in z], labeled.target, labeled.valid)
        return StepOutput(
            {"supervised": supervised, "consistency": weight * consistency},
            {"consistency": consistency.detach(), "consistency_weight": weight},
        )

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    def _noisy(self, image: Tensor, at: Progress, name: str) -> Tensor:
        sigma, generator = self.settings.noise, at.generator(name, image.device)
        return image + clipped_noise(image, generator, sigma, 2 * sigma, self.job.channel_std)
