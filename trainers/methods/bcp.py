"""BCP: labeled and unlabeled images are pasted into each other, in both directions."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

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
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import region_mix_loss
from autossl.trainers.components.masks import box_mask, half_size, halves, mix
from autossl.trainers.components.pseudo import keep_largest, pseudo_label

logger = logging.getLogger(__name__)

RELEASE = "Bai et al. 2023, released code"
COPY_PASTE, BIDIRECTIONAL = "labeled copy-paste", "bidirectional"


class BidirectionalCopyPasteSettings(MethodSettings):
    """What can be changed with --set."""

    r_pre: float = setting(
        0.2, "fraction of the run with labeled images alone", "ours: between the release's 0.25 and 0.12", gt=0, lt=1
    )
    alpha: float = setting(0.5, "weight of the pseudo-labeled part of a mixed image", RELEASE, ge=0)
    box_fraction: float = setting(2 / 3, "side of the pasted box as a share of the patch", RELEASE, gt=0, lt=1)
    largest_component: bool = setting(
        True, "clean pseudo-labels of classes that are one piece in the labeled cases", f"{RELEASE}: of all classes"
    )
    ema_decay_max: float | None = setting(
        None, "the teacher's decay; None: the plan's horizon", "ours: 1 - 300 / T in 0.99..0.999", ge=0, lt=1
    )
    labeled_only: bool = setting(False, "without unlabeled cases: labeled copy-paste for the whole run", "ours")
    infer: Literal["student", "teacher"] = setting("student", "which weights predict", RELEASE)


class BidirectionalCopyPaste(SemiSupervisedTrainer):
    """A box of a labeled patch is pasted into an unlabeled one, and the reverse. The student segments both mixtures;
    true labels judge the voxels that were labeled, the teacher's cleaned pseudo-labels the others. The exchange makes
    both streams one distribution of inputs. Before that the student learns on labeled patches pasted into each other,
    and the teacher begins as its copy."""

    name = "bcp"
    title = "Bidirectional copy-paste between labeled and unlabeled patches"
    citation = (
        "Y. Bai, D. Chen, Q. Li, W. Shen, Y. Wang. Bidirectional Copy-Paste for Semi-Supervised Medical Image "
        "Segmentation. CVPR 2023. arXiv:2305.00673."
    )
    needs = Needs(teacher=True)
    Settings = BidirectionalCopyPasteSettings
    reduces_to_supervised = True
    unsupervised_weights = ("alpha",)
    changes_supervised = True
    settings: BidirectionalCopyPasteSettings

    def build(self) -> Parts:
        job, decay = self.job, self.settings.ema_decay_max
        student = job.build_network()
        self.teacher = EMATeacher(student, job.ema_decay_max if decay is None else decay)
        written = job.schema.written_values
        self.single_component = tuple(written.index(value) for value in job.single_component_classes)
        if any(job.configuration.use_mask_for_norm):
            logger.info("bcp: images are normalized within a mask, so the pasted boxes may have edges at its border")
        return Parts(trained={"network": student}, followers={"teacher": self.teacher.network})

    def phases(self) -> list[Phase]:
        if self.job.has_unlabeled:  # equal groups: optimizer state and learning rate go on over the border
            r_pre = self.settings.r_pre
            return [Phase(COPY_PASTE, share=r_pre), Phase(BIDIRECTIONAL, share=1 - r_pre)]
        return [Phase(COPY_PASTE)] if self.settings.labeled_only else super().phases()

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if at.phase == COPY_PASTE else request

    def on_phase(self, phase: Phase, at: Progress) -> None:
        if phase.name == BIDIRECTIONAL:
            self.teacher.copy_from(self.parts.trained["network"])

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if not self.job.has_unlabeled and not self.settings.labeled_only:  # the twin, bit for bit
            z = self.parts.trained["network"](labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        if batch.unlabeled is None or at.phase == COPY_PASTE:
            return self._copy_paste(labeled, at)
        return self._bidirectional(labeled, batch.unlabeled, at)

    def after_step(self, at: Progress) -> None:
        if at.phase == BIDIRECTIONAL:
            self.teacher.update(self.parts.trained["network"], at.step, ramp_in=False)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("teacher" if self._teacher_predicts else "network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if not self.job.has_unlabeled:  # the teacher never moved
            return {}
        other = ("student", "network") if self._teacher_predicts else ("teacher", "teacher")
        return {other[0]: self.job.single_network_prediction(other[1])}

    @property
    def _teacher_predicts(self) -> bool:
        return self.settings.infer == "teacher" and self.job.has_unlabeled

    # ------------------------------------------------------------------------------------------------ the two phases

    def _copy_paste(self, labeled: StreamBatch, at: Progress) -> StepOutput:
        """One half of the labeled patches is pasted into the other; a single patch into its mirror image."""
        n = half_size(len(labeled), 0)
        images, targets, valids = (halves(values, n) for values in (labeled.image, labeled.target, labeled.valid))
        if len(labeled) == 1:
            images, targets, valids = ((a, self._mirrored(b)) for a, b in (images, targets, valids))
        mask = self._mask(n, labeled.image, at)
        z = self.parts.trained["network"](mix(*images, mask))
        outer, inner = region_mix_loss(
            z, mask, *targets, valid_out=valids[0], valid_in=valids[1], regions=self.job.schema.has_regions
        )
        return StepOutput({"supervised": outer + inner}, {"box_share": (~mask).float().mean()})

    def _bidirectional(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        """Labeled boxes inside unlabeled patches (z_1), and unlabeled boxes inside labeled patches (z_2)."""
        pseudo_target, confidence, removed_share = self._pseudo_labels(unlabeled.image)
        n, regions = half_size(len(labeled), len(unlabeled)), self.job.schema.has_regions
        x_la, x_lb = halves(labeled.image, n)
        y_la, y_lb = halves(labeled.target, n)
        v_la, v_lb = halves(labeled.valid, n)
        x_ua, x_ub = halves(unlabeled.image, n)
        y_ua, y_ub = halves(pseudo_target, n)
        v_ua, v_ub = halves(unlabeled.valid, n)
        mask = self._mask(n, labeled.image, at)
        z = self.parts.trained["network"](torch.cat([mix(x_ua, x_la, mask), mix(x_lb, x_ub, mask)]))
        z_1, z_2 = [level[:n] for level in z], [level[n:] for level in z]
        pseudo_1, true_1 = region_mix_loss(z_1, mask, y_ua, y_la, valid_out=v_ua, valid_in=v_la, regions=regions)
        true_2, pseudo_2 = region_mix_loss(z_2, mask, y_lb, y_ub, valid_out=v_lb, valid_in=v_ub, regions=regions)
        # hard labels hide a teacher that is not finite; its confidence does not, and the loop then drops the term
        pseudo, alpha = pseudo_1 + pseudo_2 + 0 * confidence.mean(), self.settings.alpha
        acting = torch.cat([mask & v_ua, ~mask & v_ub])
        return StepOutput(
            {"supervised": true_1 + true_2, "pseudo": alpha * pseudo},
            {
                "pseudo": pseudo.detach(),
                "pseudo_weight": alpha,
                "pseudo_share": acting.float().mean(),
                "pseudo_foreground_share": (pseudo_target > 0).float().mean(),
                "removed_share": removed_share,
                "box_share": (~mask).float().mean(),
            },
        )

    def _pseudo_labels(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The teacher's labels without islands, its confidence, and the share of the voxels that were removed."""
        regions = self.job.schema.has_regions
        labels, confidence = pseudo_label(self.job.probabilities(self.teacher.logits(image)), regions)
        cleaned = keep_largest(labels, self.single_component) if self.settings.largest_component else labels
        return cleaned, confidence, (cleaned != labels).float().mean()

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """One box for all samples, false inside."""
        shape = image.shape[2:]
        return box_mask(n, shape, at.generator("box"), self.settings.box_fraction, device=image.device)

    def _mirrored(self, values: Tensor) -> Tensor:
        """Mirrored along those in-plane axes (the last two) along which the plan mirrors."""
        dims = values.ndim - 2
        return values.flip([axis - dims for axis in self.job.configuration.mirror_axes if axis >= dims - 2])
