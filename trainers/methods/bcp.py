"""BCP: labeled and unlabeled images are pasted into each other, in both directions."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal

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
from autossl.trainers.components.masks import box_mask, half_size
from autossl.trainers.components.mixing import CopyPaste, Exchange, pseudo_labels_of, single_component_channels

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
        self.single_component = single_component_channels(job)
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
        mask = self._mask(half_size(len(labeled), 0), labeled.image, at)
        pasted = CopyPaste.of(labeled, mask, self.job.configuration.mirror_axes)
        z = self.parts.trained["network"](pasted.image)
        loss = pasted.loss(z, self.job.schema.has_regions)
        return StepOutput({"supervised": loss}, {"box_share": (~mask).float().mean()})

    def _bidirectional(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        """Labeled boxes inside unlabeled patches, and unlabeled boxes inside labeled patches."""
        regions, alpha = self.job.schema.has_regions, self.settings.alpha
        q = self.job.probabilities(self.teacher.logits(unlabeled.image))
        labels = pseudo_labels_of(q, self.single_component if self.settings.largest_component else (), regions)
        mask = self._mask(half_size(len(labeled), len(unlabeled)), labeled.image, at)
        exchange = Exchange(labeled, unlabeled, labels, mask)
        true, pseudo = exchange.loss(self.parts.trained["network"](exchange.image), regions)
        return StepOutput(
            {"supervised": true, "pseudo": alpha * pseudo},
            {
                "pseudo": pseudo.detach(),
                "pseudo_weight": alpha,
                "pseudo_share": exchange.pseudo_share,
                "pseudo_foreground_share": (labels.target > 0).float().mean(),
                "removed_share": labels.removed_share,
                "box_share": (~mask).float().mean(),
            },
        )

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """One box for all samples, false inside."""
        shape = image.shape[2:]
        return box_mask(n, shape, at.generator("box"), self.settings.box_fraction, device=image.device)
