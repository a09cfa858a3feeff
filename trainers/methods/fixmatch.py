"""FixMatch: confident predictions of the weak view are the labels of a strongly augmented view."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import Batch, Needs, Parts, Progress, SemiSupervisedTrainer, StepOutput, setting
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.weak_to_strong import WeakToStrong, WeakToStrongSettings, confidence_memory


class FixMatchSettings(WeakToStrongSettings):
    """What can be changed with --set."""

    teacher: Literal["none", "ema"] = setting(
        "none", "who predicts the weak view: the network itself, or the moving average of its weights", "FixMatch"
    )
    ema_decay_max: float | None = setting(
        None,
        "with teacher=ema: upper limit of its decay; None: the plan's horizon",
        "ours: 1 - 300 / T in 0.99..0.999",
        ge=0,
        lt=1,
    )


class FixMatch(SemiSupervisedTrainer):
    """The network predicts the weakly augmented view of an unlabeled patch. Where it is confident, its decision is the
    label of a strongly augmented version of the same patch that has a box of another patch pasted in. What is easy to
    see teaches what is hard to see, and only labels that are likely to be right take part."""

    name = "fixmatch"
    title = "FixMatch: confident labels of the weak view for a strong, cut-mixed view"
    citation = (
        "K. Sohn et al. FixMatch: Simplifying Semi-Supervised Learning with Consistency and Confidence. NeurIPS 2020. "
        "arXiv:2001.07685. For segmentation: L. Yang et al. Revisiting Weak-to-Strong Consistency in Semi-Supervised "
        "Semantic Segmentation. CVPR 2023. arXiv:2208.09910."
    )
    needs = Needs(strong_view=True)
    Settings = FixMatchSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: FixMatchSettings

    def build(self) -> Parts:
        network = self.job.build_network()
        self.weak_to_strong = WeakToStrong(self.job, self.settings)
        parts = Parts(trained={"network": network}, memory=confidence_memory(self.job))
        self.teacher: EMATeacher | None = None
        if self.settings.teacher == "ema":
            decay_max = self.settings.ema_decay_max
            self.teacher = EMATeacher(network, self.job.ema_decay_max if decay_max is None else decay_max)
            parts.followers["teacher"] = self.teacher.network
        return parts

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        weight = self.weak_to_strong.weight(at)
        if weight == 0 or unlabeled is None:  # without the term the step is the twin's, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        z_labeled, z_weak = self._weak_pass(labeled.image, unlabeled.weak)
        weak = self.weak_to_strong.weak_view(unlabeled, z_weak)
        view = self.weak_to_strong.strong_view(weak, labeled, at, "strong 1")
        strong = self.weak_to_strong.loss(network(view.image), view)
        return StepOutput(
            {
                "supervised": self.job.supervised_loss(z_labeled, labeled.target, labeled.valid),
                "strong": weight * strong,
            },
            {
                "strong": strong.detach(),
                "unlabeled_weight": weight,
                **self.weak_to_strong.watch(weak, at, self.parts.memory, self.name),
            },
        )

    def _weak_pass(self, labeled: Tensor, unlabeled: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of the labeled patches on all levels, and full-resolution ones of the unlabeled patches."""
        network = self.parts.trained["network"]
        if self.teacher is not None:
            return network(labeled), self.teacher.logits(unlabeled)
        z = network(torch.cat([labeled, unlabeled]))  # instance norm: as good as two passes
        return [level[: len(labeled)] for level in z], z[0][len(labeled) :]

    def after_step(self, at: Progress) -> None:
        if self.teacher is not None:
            self.teacher.update(self.parts.trained["network"], at.step)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network" if self.teacher is None else "teacher")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if self.teacher is None:
            return {}
        return {"student": self.job.single_network_prediction("network")}
