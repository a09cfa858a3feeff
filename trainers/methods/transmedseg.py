"""TransMedSeg: labeled features, imagined as they vary in unlabeled images, must still be classified right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from autossl.networks.features import forward_features, tap_channels
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    MethodSettings,
    Needs,
    Parts,
    Phase,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
    setting,
)
from autossl.trainers.components.banks import ClassMoments
from autossl.trainers.components.contrast import sample_voxels
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.masks import box_mask, half_size
from autossl.trainers.components.mixing import CopyPaste, Exchange, pseudo_labels_of, single_component_channels
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.transfer import class_balanced_ce, transferable_logits

TSA = "Li et al. 2021 (TSA), released code"
BCP = "Bai et al. 2023 (BCP), released code"
COPY_PASTE, TRANSFER = "labeled copy-paste", "transfer"
LARGEST_FULL_COVARIANCE = 64
"""Features up to which covariances are full matrices, else diagonals."""
Rows = tuple[Tensor, Tensor]
"""Features [n, A] of voxels, and their classes, int64 [n]."""


class TransMedSegSettings(MethodSettings):
    """What can be changed with --set."""

    base: Literal["bcp", "mean_teacher"] = setting(
        "bcp",
        "beside it: bcp (mixed patches, a labeled phase first) or mean_teacher (patches as they are)",
        "the paper's",
    )
    lambda_tsa: float = setting(0.1, "weight of the augmented cross-entropy", "ours: the paper's is not public", ge=0)
    strength_end: float = setting(0.25, "strength of the augmentation at the end; it grows linearly from 0", TSA, ge=0)
    direction: Literal["student", "teacher"] = setting(
        "student",
        "whose features are moved: labeled ones of the student towards the unlabeled, or the reverse of the teacher",
        "the equations; 'teacher' is what the abstract says",
    )
    confidence: float = setting(0.75, "an unlabeled voxel has a class where the teacher is this sure", "ours", ge=0)
    per_class: int = setting(512, "voxels that are drawn of each class and stream", "ours: TSA keeps all", ge=1)
    n_min: int = setting(64, "unlabeled voxels after which a class is augmented", "ours", ge=1)
    moments_decay: float = setting(0.99, "of the running means and covariances", "ours", ge=0, lt=1)
    detach_w_correction: bool = setting(False, "no gradient of the correction into the classifier's weights", "ours")
    r_pre: float = setting(0.2, "fraction of the run with labeled images alone", "ours, as bcp", gt=0, lt=1)
    alpha: float = setting(0.5, "weight of the pseudo-labeled part of a mixed image", BCP, ge=0)
    lambda_mean_teacher: float = setting(
        0.1, "with base=mean_teacher: weight of its consistency after a ramp over the run", "SSL4MIS benchmark", ge=0
    )
    box_fraction: float = setting(2 / 3, "side of the pasted box as a share of the patch", BCP, gt=0, lt=1)
    ema_decay_max: float | None = setting(
        None, "the teacher's decay; None: the plan's horizon", "ours: 1 - 300 / T in 0.99..0.999", ge=0, lt=1
    )
    labeled_only: bool = setting(False, "without unlabeled cases: labeled copy-paste for the whole run", "ours")
    infer: Literal["student", "teacher"] = setting("student", "which weights predict", BCP)


class TransMedSeg(SemiSupervisedTrainer):
    """Voxels of one class have other features in labeled than in unlabeled images. A memory keeps, for each class, the
    mean of the student's labeled features and mean and covariance of the teacher's unlabeled ones. Each labeled feature
    then stands for a Gaussian cloud, moved by the difference of the means and spread by that covariance, and the
    classifier must be right on the whole of it: the expected cross-entropy has a closed-form upper bound, so nothing
    is drawn. This is learned beside bidirectional copy-paste, or beside mean_teacher.

    The bound and the moments follow the paper's equations as others report them: neither its text nor code was
    found. Reconstructed: whose features are moved (the abstract says the reverse, see `direction`), the weight, how the
    strength grows, which voxels enter, the decay of the memory, and the last decoder features as its space. The graph
    term of its base method (GraphCL, arXiv:2411.13147) and TSA's mutual information are left out. The log tells the
    plain cross-entropy of the same voxels (`clean`) and what the augmentation adds to it (`tsa`) apart."""

    name = "transmedseg"
    title = "TransMedSeg: transferable semantic augmentation"
    citation = (
        "M. Wang, J. Li, S. Wang, L. Lan, H. Tan, L. Yang, G. Yang. TransMedSeg: A Transferable Semantic Framework for "
        "Semi-Supervised Medical Image Segmentation. 2025. arXiv:2505.14753."
    )
    needs = Needs(teacher=True, softmax_only=True)
    Settings = TransMedSegSettings
    reduces_to_supervised = True
    unsupervised_weights = ("alpha", "lambda_tsa", "lambda_mean_teacher")
    changes_supervised = True
    ablation = {"strength_end": "0"}
    settings: TransMedSegSettings

    def build(self) -> Parts:
        job, settings = self.job, self.settings
        student, decay = job.build_network(), settings.ema_decay_max
        self.teacher = EMATeacher(student, job.ema_decay_max if decay is None else decay)
        self.single_component = single_component_channels(job)
        size = job.schema.n_outputs, tap_channels(job.configuration.architecture, "dec:last")
        kind: Literal["full", "diag"] = "full" if size[1] <= LARGEST_FULL_COVARIANCE else "diag"
        spread_by_unlabeled = settings.direction == "student"
        self.labeled_moments = ClassMoments(*size, "none" if spread_by_unlabeled else kind, settings.moments_decay)
        self.unlabeled_moments = ClassMoments(*size, kind if spread_by_unlabeled else "none", settings.moments_decay)
        self._seen: list[Rows] = []  # of the step that is under way
        return Parts(
            trained={"network": student},
            followers={"teacher": self.teacher.network},
            memory={"labeled_moments": self.labeled_moments, "unlabeled_moments": self.unlabeled_moments},
        )

    def phases(self) -> list[Phase]:
        if self.job.has_unlabeled:
            r_pre = self.settings.r_pre
            return [Phase(COPY_PASTE, r_pre), Phase(TRANSFER, 1 - r_pre)] if self._mixes else [Phase(TRANSFER)]
        return [Phase(COPY_PASTE)] if self.settings.labeled_only and self._mixes else super().phases()

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if at.phase == COPY_PASTE else request

    def on_phase(self, phase: Phase, at: Progress) -> None:
        if phase.name == TRANSFER:
            self.teacher.copy_from(self.parts.trained["network"])

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled, network = batch.labeled, self.parts.trained["network"]
        self._seen = []
        if not self.job.has_unlabeled and not (self.settings.labeled_only and self._mixes):  # the twin, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        if batch.unlabeled is None or at.phase == COPY_PASTE:
            mask = self._mask(half_size(len(labeled), 0), labeled.image, at)
            pasted = CopyPaste.of(labeled, mask, self.job.configuration.mirror_axes)
            return StepOutput({"supervised": pasted.loss(network(pasted.image))})
        return self._transfer(labeled, batch.unlabeled, at)

    def after_step(self, at: Progress) -> None:
        if at.phase != TRANSFER:
            return
        self.teacher.update(self.parts.trained["network"], at.step, ramp_in=not self._mixes)
        # only now: a step sees the memory of the steps before
        for moments, rows in zip((self.labeled_moments, self.unlabeled_moments), self._seen, strict=False):
            moments.update(*rows)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("teacher" if self._teacher_predicts else "network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if not self.job.has_unlabeled:  # the teacher never moved
            return {}
        other = ("student", "network") if self._teacher_predicts else ("teacher", "teacher")
        return {other[0]: self.job.single_network_prediction(other[1])}

    @property
    def _mixes(self) -> bool:
        return self.settings.base == "bcp"

    @property
    def _teacher_predicts(self) -> bool:
        return self.settings.infer == "teacher" and self.job.has_unlabeled

    # ------------------------------------------------------------------------------------------------ the second phase

    def _transfer(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        """The base method; and, in the same pass, the labeled patches as they are, whose features are augmented."""
        weight = self.settings.lambda_tsa
        with torch.no_grad():
            z_teacher, taps = forward_features(self.teacher.network, unlabeled.image, ("dec:last",))
        q = self.job.probabilities(z_teacher[0])
        output, f = self._mixed(labeled, unlabeled, q, at) if self._mixes else self._averaged(labeled, unlabeled, q, at)
        if weight > 0:
            sure = (q.amax(1, keepdim=True) >= self.settings.confidence) & unlabeled.valid
            here = self._rows(f, labeled.target, labeled.valid, at, "labeled voxels")
            there = self._rows(taps["dec:last"], q.argmax(1, keepdim=True), sure, at, "unlabeled voxels")
            self._seen = [(rows.detach(), classes) for rows, classes in (here, there)]
            plain, bound, measures = self._augmented_ce(here, there, self.settings.strength_end * at.phase_fraction)
            output.losses |= {"clean": weight * plain, "tsa": weight * (bound - plain)}
            output.measures |= {
                **measures,
                "clean": plain.detach(),
                "tsa": (bound - plain).detach(),
                "tsa_weight": weight,
                "tsa_share": len(here[1]) / max(1, int(labeled.valid.sum())),
                "confident_share": sure.sum() / unlabeled.valid.sum().clamp(min=1),
            }
        return output

    def _mixed(
        self, labeled: StreamBatch, unlabeled: StreamBatch, q: Tensor, at: Progress
    ) -> tuple[StepOutput, Tensor]:
        """bcp's step, and the features [B, A, *S] of the labeled patches as they are."""
        alpha = self.settings.alpha
        mask = self._mask(half_size(len(labeled), len(unlabeled)), labeled.image, at)
        mixed = Exchange(labeled, unlabeled, pseudo_labels_of(q, self.single_component), mask)
        n_mixed = 2 * len(mask)
        x = torch.cat([mixed.image, labeled.image]) if self.settings.lambda_tsa > 0 else mixed.image
        z, features = forward_features(self.parts.trained["network"], x, ("dec:last",))
        true, guessed = mixed.loss([level[:n_mixed] for level in z])
        output = StepOutput(
            {"supervised": true, "pseudo": alpha * guessed},
            {"pseudo": guessed.detach(), "pseudo_weight": alpha, "pseudo_share": mixed.pseudo_share},
        )
        return output, features["dec:last"][n_mixed:]

    def _averaged(
        self, labeled: StreamBatch, unlabeled: StreamBatch, q: Tensor, at: Progress
    ) -> tuple[StepOutput, Tensor]:
        """mean_teacher's step without noise, and the features [B, A, *S] of the labeled patches."""
        n, weight = len(labeled), self.settings.lambda_mean_teacher * sigmoid_ramp(at.fraction, 1.0)
        image = torch.cat([labeled.image, unlabeled.image]) if weight > 0 else labeled.image
        z, features = forward_features(self.parts.trained["network"], image, ("dec:last",))
        supervised = self.job.supervised_loss([level[:n] for level in z], labeled.target, labeled.valid)
        output = StepOutput({"supervised": supervised})
        if weight > 0:
            consistency = probability_mse(self.job.probabilities(z[0][n:]), q, unlabeled.valid)
            output.losses["consistency"] = weight * consistency
            output.measures |= {"consistency": consistency.detach(), "consistency_weight": weight}
        return output, features["dec:last"][:n]

    def _augmented_ce(
        self, here: Rows, there: Rows, strength: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | float]]:
        """Cross-entropy and its bound, class-balanced, and what was measured; the classifier learns from both."""
        towards_unlabeled = self.settings.direction == "student"
        (f, y), moments = (here, self.unlabeled_moments) if towards_unlabeled else (there, self.labeled_moments)
        ready = (self.unlabeled_moments.count >= self.settings.n_min) & (self.labeled_moments.count > 0)
        shift = (self.unlabeled_moments.mean - self.labeled_moments.mean) * ready[:, None]
        cov = moments.cov * ready.view(-1, *[1] * (moments.cov.ndim - 1))
        head: Any = self.parts.trained["network"].decoder.seg_layers[-1]  # type: ignore[union-attr,index]
        with torch.autocast(f.device.type, enabled=False):
            weight = head.weight.float().flatten(1)  # of a 1×1 convolution
            z = functional.linear(f.float(), weight, head.bias)
            moving = weight.detach() if self.settings.detach_w_correction else weight
            direction = 1 if towards_unlabeled else -1
            bound = class_balanced_ce(transferable_logits(z, moving, y, direction * shift, cov, strength), y)
            plain = class_balanced_ce(z, y)
        return (
            plain,
            bound,
            {
                "tsa_strength": strength,
                "classes_ready_share": ready.float().mean(),
                "mean_shift": shift.norm(dim=1).sum() / ready.sum().clamp(min=1),
            },
        )

    def _rows(self, f: Tensor, classes: Tensor, valid: Tensor, at: Progress, stream: str) -> Rows:
        """So many voxels of each class, from the map [B, A, *S] in front of the last layer."""
        return sample_voxels(f, classes, self.settings.per_class, valid, at.generator(stream, f.device))

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """One box for all samples, false inside."""
        shape = image.shape[2:]
        return box_mask(n, shape, at.generator("box"), self.settings.box_fraction, device=image.device)
