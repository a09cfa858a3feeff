"""Self-training: predict the unlabeled cases, keep what can be trusted, train again."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from autossl.data.problems import Problem
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Job,
    MethodSettings,
    ParameterGroup,
    Parts,
    Phase,
    Progress,
    PseudoLabelRules,
    Refresh,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
    poly_over_phase,
    setting,
)
from autossl.trainers.components.augment import StrongAugment
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.kept_labels import judged_classes, kept_label_loss

OURS = "ours"
STORE = "pseudo"
ONLINE_REFRESHES = (0.4, 0.6, 0.8)
CHECKPOINTS = {"early": 1 / 3, "middle": 2 / 3}
"""Copies that tell how stable a case is for round 1, and after which share of the steps before it they are made."""
LAST_STEPS = 20
"""The copy at the end of a round is renewed after each of so many: the very last one may be skipped."""


class SelfTrainingSettings(MethodSettings):
    """What can be changed with --set."""

    mode: Literal["rounds", "online"] = setting(
        "rounds", "trainings one after another, or one training with refreshes at 0.4, 0.6 and 0.8", OURS
    )
    rounds: int = setting(2, "rounds on pseudo-labels after the supervised one (mode rounds)", "1 to 3 in papers", ge=1)
    full_rounds: bool = setting(False, "every round gets all steps: the run is as many times longer", OURS)
    round_0: Literal["train", "init"] = setting(
        "train", "round 0 is trained on the labels, or is the network of --init, which then teaches round 1", OURS
    )
    init: Literal["scratch", "teacher"] = setting("scratch", "where the weights of a round begin", "Xie et al. 2020")
    rho: tuple[float, ...] = setting(
        (0.7, 0.8, 0.9), "share of each class's voxels that keeps its label, per round; the last goes on", OURS
    )
    theta_min: float = setting(0.5, "no confidence below this keeps its label", OURS, ge=0, le=1)
    filter: Literal["ignore", "weight"] = setting("ignore", "threshold per class, or a soft weight per voxel", OURS)
    reliable_share: float = setting(0.5, "share of the cases used in round 1, the most stable ones", "ST++", gt=0, le=1)
    stability: Literal["checkpoints", "mirroring"] = setting(
        "checkpoints", "a case is stable over checkpoints of the round, or under mirroring (cheaper)", "ST++"
    )
    plausibility: bool = setting(True, "reject cases with missing classes or odd volumes, remove islands", OURS)
    lambda_pseudo: float = setting(1.0, "weight of the loss on pseudo-labels", "Xie et al. 2020", ge=0)
    intensity_scale: float = setting(
        1.5, "strength of the pseudo half's intensity augmentation; 1: as the labeled half", OURS, ge=1, le=2
    )
    finetune: float = setting(0.0, "last share of a round that sees labels only", OURS, ge=0, lt=1)
    stop_agreement: float = setting(
        0.98, "the run ends where two rounds' pseudo-labels agree better (mean Dice; mode rounds)", OURS, ge=0, le=1
    )

    @field_validator("rho", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("rho")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < share <= 1 for share in value):
            raise ValueError(f"{value} must be shares above 0 and at most 1, at least one")
        return value


class SelfTraining(SemiSupervisedTrainer):
    """A network trained on the labels predicts whole unlabeled cases, with mirroring. Voxels that it is sure of, in
    cases that stayed the same during its training and look plausible, become labels for the next network, which is
    trained from scratch under stronger augmentation; and again."""

    name = "self_training"
    title = "Self-training: rounds of pseudo-labels from whole-case predictions"
    citation = (
        "D.-H. Lee. Pseudo-Label: The simple and efficient semi-supervised learning method for deep neural networks. "
        "ICML Workshop on Challenges in Representation Learning, 2013. "
        "Q. Xie, M.-T. Luong, E. Hovy, Q. V. Le. Self-training with Noisy Student improves ImageNet classification. "
        "CVPR 2020. arXiv:1911.04252. "
        "L. Yang, W. Zhuo, L. Qi, Y. Shi, Y. Gao. ST++: Make self-training work better for semi-supervised semantic "
        "segmentation. CVPR 2022. arXiv:2106.05095. "
        "W. Bai et al. Semi-supervised learning for network-based cardiac MR image segmentation. MICCAI 2017."
    )
    Settings = SelfTrainingSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_pseudo",)
    settings: SelfTrainingSettings

    @classmethod
    def total_steps(cls, steps: int, settings: MethodSettings) -> int:
        """All rounds share the steps that were asked for, unless each is to have them."""
        if isinstance(settings, SelfTrainingSettings) and settings.full_rounds and settings.mode == "rounds":
            return steps * (settings.rounds + (settings.round_0 == "train"))
        return steps

    @classmethod
    def needs_initial_weights(cls, settings: MethodSettings) -> bool:
        """Of a run whose first teacher is given."""
        return isinstance(settings, SelfTrainingSettings) and settings.round_0 == "init"

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        """A given teacher needs rounds, and unlabeled cases to predict."""
        if not cls.needs_initial_weights(settings) or not isinstance(settings, SelfTrainingSettings):
            return []
        if settings.mode == "online":
            return [Problem("round_0=init with mode=online", "mode=rounds", "leave one of them out")]
        if not job.has_unlabeled or settings.lambda_pseudo == 0:
            found = "round_0=init, and nothing to learn from pseudo-labels"
            return [Problem(found, "unlabeled cases, and lambda_pseudo above 0", "leave out round_0=init")]
        return []

    def build(self) -> Parts:
        network, plan = self.job.build_network(), self.job.configuration
        self.teacher: EMATeacher | None = None
        self._strong = StrongAugment(plan.spacing, self.job.channel_std, plan.use_mask_for_norm)
        if not self._learns_from_unlabeled:
            return Parts(trained={"network": network})
        followers = {name: _copy_of(network) for name in self._checkpoints}
        if self.settings.mode == "online":
            self.teacher = EMATeacher(network, self.job.ema_decay_max)
            followers["teacher"] = self.teacher.network
        else:
            followers["previous"] = _copy_of(network)
        return Parts({"network": network}, followers, memory={"copied": []})

    # ------------------------------------------------------------------------------------------------------- timetable

    def phases(self) -> list[Phase]:
        if not self._learns_from_unlabeled:
            return [Phase("train")]
        if self.settings.mode == "online":
            refreshes = (self._refresh(j, at, "teacher") for j, at in enumerate(ONLINE_REFRESHES, 1))
            return [Phase("train", refreshes=tuple(refreshes))]
        groups = (ParameterGroup("network", factor=poly_over_phase),)
        fresh = ("network",) if self.settings.init == "scratch" else ()
        later = [
            Phase(f"round_{j}", groups=groups, reinitialize=fresh, refreshes=(self._refresh(j, None, "network"),))
            for j in range(1, self.settings.rounds + 1)
        ]
        return later if self.settings.round_0 == "init" else [Phase("round_0", groups=groups), *later]

    def _refresh(self, j: int, at: float | None, part: str) -> Refresh:
        """The refresh before round j = 1, 2, …; only round 1 chooses by stability and pays for the checkpoints."""
        settings = self.settings
        return Refresh(
            at,
            part,
            STORE,
            stability_parts=tuple(self._checkpoints) if j == 1 else (),
            rules=PseudoLabelRules(
                kept_share=settings.rho[min(j, len(settings.rho)) - 1],
                smallest_threshold=settings.theta_min,
                reliable_share=settings.reliable_share if j == 1 else 1.0,
                plausibility=settings.plausibility,
                voxel_filter=settings.filter,
                stop_agreement=settings.stop_agreement if settings.mode == "rounds" else None,
            ),
        )

    def _round(self, at: Progress) -> tuple[int, int, int]:
        """Number, first step and end of the round that the step belongs to."""
        if not self._learns_from_unlabeled:
            return 0, 0, at.total
        if self.settings.mode == "rounds":
            return int(at.phase.removeprefix("round_")), at.phase_start, at.phase_end
        borders = [0, *(round(share * at.total) for share in ONLINE_REFRESHES), at.total]
        j = sum(border <= at.step for border in borders[1:-1])
        return j, borders[j], borders[j + 1]

    def _sees_pseudo_labels(self, at: Progress) -> bool:
        j, start, end = self._round(at)
        if self.settings.mode == "online":
            start, end = 0, at.total
        return j > 0 and at.step - start < round((1 - self.settings.finetune) * (end - start))

    def request(self, at: Progress) -> BatchRequest:
        labeled = StreamRequest(self.job.labeled_batch_size, sampler="foreground")
        if not self._sees_pseudo_labels(at):
            return BatchRequest(labeled, StreamRequest(0))
        return BatchRequest(
            labeled, StreamRequest(self.job.unlabeled_batch_size, sampler="pseudo_foreground", store=STORE)
        )

    # ------------------------------------------------------------------------------------------------------------ step

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        weight, n_labeled = self.settings.lambda_pseudo, len(batch.labeled)
        if weight == 0 or unlabeled is None or unlabeled.pseudo_labels is None:  # then the step is the twin's
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        z = network(torch.cat([labeled.image, self._noisy(unlabeled, at)]))
        z_labeled, z_pseudo = [level[:n_labeled] for level in z], [level[n_labeled:] for level in z]
        target, kept, regions = unlabeled.pseudo_labels[0], self._kept(unlabeled), self.job.schema.has_regions
        pseudo = kept_label_loss(z_pseudo, target, kept, unlabeled.pseudo_weights, regions=regions)
        in_dice = judged_classes(target, kept, z[0].shape[1], regions)
        patch_weights = unlabeled.pseudo_weights
        return StepOutput(
            {
                "supervised": self.job.supervised_loss(z_labeled, labeled.target, labeled.valid),
                "pseudo": weight * pseudo,
            },
            {
                "pseudo": pseudo.detach(),
                "pseudo_weight": weight,
                "kept_share": kept.sum() / unlabeled.valid.sum().clamp(min=1),
                "dice_share": in_dice.float().mean(),
                "patch_weight": 1.0 if patch_weights is None else patch_weights.mean(),
            },
        )

    def _kept(self, unlabeled: StreamBatch) -> Tensor:
        """Weight of each voxel [N, 1, *S]. Between a kept voxel and one that is not, interpolation decides."""
        if unlabeled.pseudo_confidences is None:
            raise ValueError(f"pseudo-labels of '{STORE}' came without confidences")
        confidence = unlabeled.pseudo_confidences[0] * unlabeled.valid
        if self.settings.filter == "weight":
            return confidence
        half_a_level = 0.5 / 255
        return ((confidence > 0) & (confidence > self.settings.theta_min - half_a_level)).float()

    def _noisy(self, unlabeled: StreamBatch, at: Progress) -> Tensor:
        """The loader's augmentation is strength 1; the strong view's difference adds the rest."""
        x, more = unlabeled.image, self.settings.intensity_scale - 1
        if more == 0:
            return x
        return torch.lerp(x, self._strong(x, at.generator("noisy student", x.device), unlabeled.valid), more)

    @torch.no_grad()
    def after_step(self, at: Progress) -> None:
        if not self._learns_from_unlabeled:
            return
        network, followers, copied = self.parts.trained["network"], self.parts.followers, self.parts.memory["copied"]
        if self.teacher is not None:
            self.teacher.update(network, at.step)
        j, _, end = self._round(at)
        for name, share in self._checkpoints.items():
            if j == 0 and name not in copied and at.step + 1 >= round(share * end):
                source = network if self.teacher is None else self.teacher.network
                followers[name].load_state_dict(source.state_dict())
                copied.append(name)
        if "previous" in followers and j < self.settings.rounds and end - at.step <= LAST_STEPS:
            followers["previous"].load_state_dict(network.state_dict())

    # ------------------------------------------------------------------------------------------------------ prediction

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        names = {"previous": "previous_round", "teacher": "teacher"}
        return {
            shown: self.job.single_network_prediction(name)
            for name, shown in names.items()
            if name in self.parts.followers
        }

    @property
    def _learns_from_unlabeled(self) -> bool:
        return self.job.has_unlabeled and self.settings.lambda_pseudo > 0

    @property
    def _checkpoints(self) -> dict[str, float]:
        trains_round_0 = self.settings.round_0 == "train"  # else no checkpoint of the first teacher is known
        return CHECKPOINTS if self.settings.stability == "checkpoints" and trains_round_0 else {}


def _copy_of(network: nn.Module) -> nn.Module:
    """Weights to be looked at, not trained."""
    return copy.deepcopy(network).float().eval().requires_grad_(False)
