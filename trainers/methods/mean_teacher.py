"""Mean Teacher: the student must agree with the moving average of its own weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

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
from autossl.trainers.components.augment import clipped_noise
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp

BENCHMARK = "SSL4MIS benchmark trainers"


class MeanTeacherSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(
        1.0, "weight of the consistency term after its ramp", f"ours: at 0.1 ({BENCHMARK}) it hardly acts", ge=0
    )
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", BENCHMARK, ge=0)
    ema_decay_max: float | None = setting(
        None,
        "upper limit of the teacher's decay; None: the plan's horizon",
        "ours: 1 - 300 / T in 0.99..0.999",
        ge=0,
        lt=1,
    )
    noise: float = setting(0.1, "sigma of the teacher's input noise, in standard deviations", BENCHMARK, ge=0)
    student_noise: bool = setting(False, "independent noise on the student's input as well", "ours")
    consist_labeled: bool = setting(False, "consistency on labeled patches as well (the original paper does)", "ours")
    class_scale: bool = setting(False, "multiply the term by C / 2, against its shrinking with many classes", "ours")
    labeled_only: bool = setting(False, "without unlabeled cases: consistency on the labeled ones", "ours")
    infer: Literal["student", "teacher"] = setting("student", "which weights predict", BENCHMARK)


class MeanTeacher(SemiSupervisedTrainer):
    """A teacher, the moving average of the student, predicts slightly noisy versions of the unlabeled patches; the
    student must match its probabilities. Averaged weights give better targets than averaged predictions, and the
    weight of the term grows slowly so that early, poor targets do no harm."""

    name = "mean_teacher"
    title = "Mean Teacher: consistency with the moving average of the weights"
    citation = (
        "A. Tarvainen, H. Valpola. Mean teachers are better role models: Weight-averaged consistency targets improve "
        "semi-supervised deep learning results. NeurIPS 2017. arXiv:1703.01780."
    )
    needs = Needs(teacher=True)
    Settings = MeanTeacherSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: MeanTeacherSettings

    def build(self) -> Parts:
        student = self.job.build_network()
        decay_max = self.settings.ema_decay_max
        self.teacher = EMATeacher(student, self.job.ema_decay_max if decay_max is None else decay_max)
        return Parts(trained={"network": student}, followers={"teacher": self.teacher.network})

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        student, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        settings, n_labeled = self.settings, len(batch.labeled)
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        x, valid = labeled.image, labeled.valid
        if unlabeled is not None:
            x, valid = torch.cat([x, unlabeled.image]), torch.cat([valid, unlabeled.valid])
        judged = slice(0 if self._labeled_is_judged else n_labeled, None)
        if weight == 0 or len(x[judged]) == 0:  # without the term the step is the twin's, bit for bit
            z = student(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        z = student(x + self._noise(x, at, "student noise") if settings.student_noise else x)
        seen_by_teacher = x[judged] + self._noise(x[judged], at, "teacher noise")
        q = self.job.probabilities(self.teacher.logits(seen_by_teacher))
        p = self.job.probabilities(z[0][judged])
        consistency = probability_mse(p, q, valid[judged])
        if settings.class_scale:
            consistency = consistency * (p.shape[1] / 2)
        z_labeled = [level[:n_labeled] for level in z]
        return StepOutput(
            {
                "supervised": self.job.supervised_loss(z_labeled, labeled.target, labeled.valid),
                "consistency": weight * consistency,
            },
            {
                "consistency": consistency.detach(),
                "consistency_weight": weight,
                "valid_share": valid[judged].float().mean(),
            },
        )

    def after_step(self, at: Progress) -> None:
        self.teacher.update(self.parts.trained["network"], at.step)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("teacher" if self.settings.infer == "teacher" else "network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        other = "student" if self.settings.infer == "teacher" else "teacher"
        return {other: self.job.single_network_prediction("network" if other == "student" else "teacher")}

    @property
    def _labeled_is_judged(self) -> bool:
        return self.settings.consist_labeled or (self.settings.labeled_only and not self.job.has_unlabeled)

    def _noise(self, x: Tensor, at: Progress, stream: str) -> Tensor:
        sigma = self.settings.noise
        return clipped_noise(x, at.generator(stream, x.device), sigma, 2 * sigma, self.job.channel_std)
