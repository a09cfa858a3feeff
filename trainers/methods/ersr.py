"""ERSR: pseudo-labels of near-elliptical objects, refined by an ellipse, and symmetry about its long axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autossl.data.problems import Problem
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Job,
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
from autossl.trainers.components.augment import StrongAugment, clipped_noise
from autossl.trainers.components.ellipse_labels import irregularity, select_regular, selected_share
from autossl.trainers.components.ellipse_targets import EllipseTargets, ellipse_targets, score_measures
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.symmetric_halves import SymmetricHalves

RELEASE = "Zhou et al. 2025, released code"
SUPERVISED_PHASE, SEMI_SUPERVISED = "supervised", "semi-supervised"
SMALLEST_COVER = 0.8
"""Of the median image that a patch must cover along each axis: an outline that the patch cuts off tells no ellipse."""
TEACHER_NOISE = 0.1
"""Of the consistency of classes that are not elliptic, as in mean_teacher."""


class ERSRSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(1.0, "weight of the three special terms after their ramp", RELEASE, ge=0)
    lambda_plain: float = setting(
        0.1, "weight of the consistency of classes that are not elliptic", "SSL4MIS benchmark trainers", ge=0
    )
    ramp_end: float = setting(1.0, "fraction of the second phase at which the ramp ends", RELEASE, ge=0)
    r_pre: float = setting(
        0.2, "fraction of the run with labeled images alone", "ours: the release loads a trained model", gt=0, lt=1
    )
    edge_share: float = setting(
        0.5, "share of the border's softness in the score, against corners", RELEASE, ge=0, le=1
    )
    score_norm: bool = setting(
        False, "divide the scores by the root of the mask's area, for objects of many sizes", "ours"
    )
    refine: bool = setting(True, "refine pseudo-labels with the ellipse; off: the teacher's own", RELEASE)
    symmetry: bool = setting(True, "the two terms on mirrored halves", RELEASE)
    detach_sym: bool = setting(False, "no gradient through the mirrored halves of the prediction", RELEASE)
    force: bool = setting(
        False,
        "run although no class is elliptic (all of them are taken as if they were), or the patches are small",
        "ours",
    )
    ema_decay_max: float | None = setting(
        None,
        "upper limit of the teacher's decay; None: the plan's horizon",
        "ours: 1 - 300 / T in 0.99..0.999",
        ge=0,
        lt=1,
    )
    infer: Literal["student", "teacher"] = setting("student", "which weights predict", RELEASE)


class EllipseRefinement(SemiSupervisedTrainer):
    """A teacher, the moving average of the student, labels unlabeled patches. Of these labels the more regular ones are
    used, a share that grows; the best-fitting ellipse fills and completes them, and its long axis is a symmetry axis.
    The student must match the refined label, predict on images completed from either half what it says of that half,
    and predict symmetrically on them. For classes that are nearly ellipses, such as the fetal head in ultrasound;
    other classes get the consistency of mean_teacher.

    As the release: the two scores and the growing share, the refined values and their thresholds, the three terms and
    their ramp, gradient through both sides of the mirrored terms. Reconstructed: when a fit is believed and what its
    failure costs, empty labels, several classes, millimeters, 3D, padding, what completed images are surrounded by,
    scores as they are (the release may rescale them), patches that must cover most of the image (the release trains on
    whole images), and supervised training as a first phase in the place of loaded weights. The paper's words on the
    scores could not be compared with the code one by one."""

    name = "ersr"
    title = "ERSR: ellipse-refined pseudo-labels and symmetric halves"
    citation = (
        "L. Zhou, Z. Chen, Y. Shen, J. Xu, P. Xuan, Y. Zhu, Y. Fang, C. Cong, L. Wei, R. Su, J. Zhou, Q. Jin. ERSR: An "
        "Ellipse-constrained pseudo-label refinement and symmetric regularization framework for semi-supervised fetal "
        "head segmentation in ultrasound images. IEEE JBHI 2025. arXiv:2508.19815."
    )
    needs = Needs(teacher=True)
    Settings = ERSRSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max", "lambda_plain")
    ablation = {"refine": "false"}
    settings: ERSRSettings

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        if isinstance(settings, ERSRSettings) and settings.force:
            return []
        problems = []
        if not job.elliptic_classes:
            problems.append(
                Problem(
                    f"no class is elliptic in the {job.n_labeled} labeled cases of this run",
                    "a class whose labels have a mean Dice of 0.95 or more with their ellipses, in at least 3 cases",
                    "choose another method, or treat every class as elliptic with --set force=true",
                )
            )
        patch = job.configuration.patch_size
        image = [] if job.median_case_shape is None else [round(n) for n in job.median_case_shape[-len(patch) :]]
        if any(mine < SMALLEST_COVER * whole for mine, whole in zip(patch, image, strict=False)):
            sizes = (" x ".join(map(str, size)) for size in (patch, image))
            problems.append(
                Problem(
                    "patches of {} voxels in images of {}: outlines are cut off".format(*sizes),
                    f"patches that cover {SMALLEST_COVER:.0%} of the median image along each axis",
                    "plan with a coarser --overwrite_target_spacing or a larger preset, or take what is cut off for "
                    "no ellipse with --set force=true",
                )
            )
        return problems

    def build(self) -> Parts:
        job, decay, schema = self.job, self.settings.ema_decay_max, self.job.schema
        student = job.build_network()
        self.teacher = EMATeacher(student, job.ema_decay_max if decay is None else decay)
        foreground = range(0 if schema.has_regions else 1, schema.n_outputs)
        self.elliptic = [schema.written_values.index(value) for value in job.elliptic_classes] or list(foreground)
        self.plain = [channel for channel in foreground if channel not in self.elliptic]
        self.augment = StrongAugment(job.configuration.spacing, job.channel_std, job.configuration.use_mask_for_norm)
        self._scored: tuple[int, list[list[float]]] | None = None
        # scores of each class in this pass over the pool, so that patches compete with those of earlier steps
        memory = {"pass": 0, "scores": [[] for _ in self.elliptic]}
        return Parts(trained={"network": student}, followers={"teacher": self.teacher.network}, memory=memory)

    def phases(self) -> list[Phase]:
        if not self.job.has_unlabeled:
            return super().phases()
        r_pre = self.settings.r_pre  # equal groups: optimizer state and learning rate go on over the border
        return [Phase(SUPERVISED_PHASE, share=r_pre), Phase(SEMI_SUPERVISED, share=1 - r_pre)]

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if at.phase == SUPERVISED_PHASE else request

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        student, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        self._scored = None
        ramp = sigmoid_ramp(at.phase_fraction, self.settings.ramp_end)
        weight, plain_weight = self.settings.lambda_max * ramp, self.settings.lambda_plain * ramp if self.plain else 0.0
        if unlabeled is None or at.phase == SUPERVISED_PHASE or weight == plain_weight == 0:  # the twin's, bit for bit
            z = student(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        q = self.job.probabilities(self.teacher.logits(unlabeled.image))
        targets, measures = self._targets(q, unlabeled, at)
        halves, images = None, [labeled.image, unlabeled.image]
        if self.settings.symmetry:  # also patches without an accepted fit, so that every step costs what was planned
            halves = SymmetricHalves(targets.planes, unlabeled.valid, targets.mirrored)
            label, generator = targets.largest_label, at.generator("halves", q.device)
            images.append(halves.images(unlabeled.image, label, self.augment, generator))
        z = student(torch.cat(images))
        p = self.job.probabilities(z[0][len(labeled) :])
        terms = self._special_terms(p, targets, halves)
        weights = dict.fromkeys(terms, weight)
        if plain_weight > 0:
            terms["consistency"], weights["consistency"] = self._consistency(p[: len(q)], unlabeled, at), plain_weight
        doubt = 0 * q.mean()  # labels hide a teacher that is not finite; this does not, and the loop drops the terms
        supervised = self.job.supervised_loss([level[: len(labeled)] for level in z], labeled.target, labeled.valid)
        return StepOutput(
            {"supervised": supervised, **{name: weights[name] * (term + doubt) for name, term in terms.items()}},
            {
                **{name: term.detach() for name, term in terms.items()},
                **{f"{name}_weight": value for name, value in weights.items()},
                **measures,
            },
        )

    def after_step(self, at: Progress) -> None:
        self.teacher.update(self.parts.trained["network"], at.step)
        if self._scored is not None:
            self.parts.memory["pass"], self.parts.memory["scores"] = self._scored

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("teacher" if self.settings.infer == "teacher" else "network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        other = "student" if self.settings.infer == "teacher" else "teacher"
        return {other: self.job.single_network_prediction("network" if other == "student" else "teacher")}

    # ------------------------------------------------------------------------------------------------- what is taught

    def _targets(
        self, q: Tensor, unlabeled: StreamBatch, at: Progress
    ) -> tuple[EllipseTargets, dict[str, Tensor | float]]:
        """Which patches are regular enough for which class, and the labels of these."""
        spacing, settings = self.job.configuration.spacing, self.settings
        valid = unlabeled.valid[:, 0].cpu().numpy()
        scores = [
            [
                irregularity(values, inside, spacing, settings.edge_share, settings.score_norm)
                for values, inside in zip(of_class, valid, strict=True)
            ]
            for of_class in q[:, self.elliptic].transpose(0, 1).cpu().numpy()
        ]
        share = selected_share(at.phase_fraction)
        chosen = [select_regular(*pair, share) for pair in zip(scores, self._earlier(scores, at), strict=True)]
        if not torch.isfinite(q).all():  # a teacher that broke leaves no trace
            self._scored = None
        used = np.array(chosen).T
        targets = ellipse_targets(q[:, self.elliptic], unlabeled.valid, used, spacing, settings.refine)
        return targets, {
            "allowed_share": share,
            "selected_share": float(used.mean()),
            "valid_share": unlabeled.valid.float().mean(),
            **score_measures(scores),
            **targets.shares,
        }

    def _earlier(self, scores: Sequence[Sequence[float]], at: Progress) -> list[list[float]]:
        """Scores of each class in this pass over the pool, before this step; `after_step` adds those of the step."""
        steps = math.ceil(self.job.n_unlabeled / max(1, self.job.unlabeled_batch_size))
        now = (at.step - at.phase_start) // steps
        memory = self.parts.memory
        earlier: list[list[float]] = memory["scores"] if memory["pass"] == now else [[] for _ in scores]
        self._scored = now, [[*before, *new] for before, new in zip(earlier, scores, strict=True)]
        return earlier

    # ------------------------------------------------------------------------------------------------------- the terms

    def _special_terms(self, p: Tensor, targets: EllipseTargets, halves: SymmetricHalves | None) -> dict[str, Tensor]:
        """Unweighted. p [B + 2·B, C, *S]: of the patches, and where they are mirrored of what is made of each half."""
        n = len(targets.label)
        mine, theirs, w = (
            values.flatten(0, 1)[:, None] for values in (p[:n, self.elliptic], targets.label, targets.weight)
        )
        # a label of half the weight counts half, also where a step has no other
        reliance = w.sum() / targets.counted.sum().clamp(min=1)
        terms = {"refined": probability_mse(mine, theirs, w) * reliance}
        if halves is not None:
            channel = torch.tensor(self.elliptic, device=p.device)[targets.largest].repeat(3)
            largest = p[torch.arange(3 * n, device=p.device), channel][:, None]
            completed = halves.completed(largest[:n])
            if self.settings.detach_sym:
                completed = completed.detach()
            terms["completed"] = halves.completion_loss(largest[n:], completed)
            terms["symmetry"] = halves.asymmetry(largest[n:])
        return terms

    def _consistency(self, p: Tensor, unlabeled: StreamBatch, at: Progress) -> Tensor:
        """mean_teacher's term, of the classes that are not elliptic."""
        x = unlabeled.image
        generator = at.generator("teacher noise", x.device)
        noise = clipped_noise(x, generator, TEACHER_NOISE, 2 * TEACHER_NOISE, self.job.channel_std)
        q = self.job.probabilities(self.teacher.logits(x + noise))
        return probability_mse(p[:, self.plain], q[:, self.plain], unlabeled.valid)
