"""MEDL: two different networks collect evidence, and learn from the beliefs on which they can agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from autossl.networks.build import other_kind
from autossl.networks.prediction import Member, PredictionSpec
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Needs,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    setting,
)
from autossl.trainers.components.evidence import (
    Dirichlet,
    Opinion,
    dirichlet,
    fisher_evidential,
    fuse_beliefs,
    rank_weight,
    reliability,
)
from autossl.trainers.components.losses import connected_zero, hard_label_ce, hard_label_loss, one_hot
from autossl.trainers.components.schedules import sigmoid_ramp

PAPER = "He et al. 2024"
KEYS = ("a", "b")
Terms = tuple[dict[str, Tensor], dict[str, Tensor | float]]
"""Losses, and what is to be logged."""


class MutualEvidentialSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(0.1, "weight of the unlabeled terms after their ramp", f"ours: {PAPER} is silent", ge=0)
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", f"ours: {PAPER} is silent", ge=0)
    r_warm: float | None = setting(
        None, "fraction of the run up to which the unlabeled terms are off; None: the plan's", "ours: 0.02", ge=0, le=1
    )
    lambda_fisher: float = setting(1.0, "the Fisher term's weight beside that of the pseudo-labels", PAPER, ge=0)
    information_weight: float = setting(
        1e-3, "of ln|I(α)| in the Fisher term; above 0.1 it would outweigh the labels", "ours", ge=0, le=0.1
    )
    xi: float = setting(0.5, "strength of the easy-to-hard curriculum; 0: all voxels count alike", "ours", ge=0, le=1)
    own_share: float = setting(
        0.5,
        "share of a network's own uncertainty in its ranking of labeled voxels; the rest is fused",
        PAPER,
        ge=0,
        le=1,
    )
    fusion: Literal["caef", "ef", "mean"] = setting(
        "caef", "of the beliefs. caef: discounted by the number of classes; ef: Dempster's rule; mean", PAPER
    )
    mask_fisher: bool = setting(False, "the reliability weighs the Fisher term as well", "ours")
    faithful: bool = setting(
        False, "weight 1 without a ramp for the pseudo-labels", f"{PAPER}, eq. 9; from scratch it is unstable"
    )
    labeled_only: bool = setting(False, "without unlabeled cases: two evidential networks, averaged", "ours")


class MutualEvidential(SemiSupervisedTrainer):
    """A plain and a residual network read their logits as evidence for a Dirichlet distribution, and so say how little
    they know of a voxel. Their beliefs are fused by a rule of Dempster's kind that trusts a single witness less the
    more classes there are. The fused belief labels the unlabeled voxels; how uncertain and how divided it is says what
    a label counts. Voxels are ranked by uncertainty, and training goes from the certain to the uncertain ones. A second
    loss on unlabeled voxels weighs each class by its Fisher information, so that classes without evidence are not
    punished alike.

    Faithful: the fusion, the reliability, the curriculum, the Fisher loss and the mean of both networks as prediction.
    Reconstructed, since no code was found: exp as evidence (softplus hardly learns
    here); the size of the curriculum, of ln|I| and of the
    ramp; the reading of the fusion rule, whose printed subscripts do not agree; the direction of the ranks; that the
    reliability multiplies the losses; that the fused belief reaches labeled voxels through the ranking alone; and the
    ramp on the pseudo-labels. The residual network has the plan's stages (the paper: a V-Net and a V-Net decoder on a
    ResNet-34)."""

    name = "medl"
    title = "MEDL: mutual evidential learning of two different networks"
    citation = (
        "Y. He, Y. Bi, L. Li, C.-M. Pun, W. Jiao, Z. Jin. Mutual Evidential Deep Learning for Semi-supervised Medical "
        "Image Segmentation. IEEE BIBM 2024, 2010-2017. arXiv:2505.12418."
    )
    needs = Needs(networks=2, softmax_only=True)
    Settings = MutualEvidentialSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    changes_supervised = True
    # two evidential networks that teach each other; how they are fused, ranked and weighed is taken away
    ablation = {"fusion": "mean", "xi": "0", "lambda_fisher": "0"}
    settings: MutualEvidentialSettings

    def build(self) -> Parts:
        if self._is_supervised:
            return Parts(trained={"network": self.job.build_network()})
        own = self.job.configuration.architecture
        self._architectures = {"a": own, "b": other_kind(own)}
        return Parts(
            trained={
                f"network_{key}": self.job.build_network(f"network_{key}", architecture=architecture)
                for key, architecture in self._architectures.items()
            }
        )

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if self._is_supervised:  # the twin, bit for bit
            z = self.parts.trained["network"](labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        n_labeled, weights = len(labeled), self._weights(at)
        unlabeled = batch.unlabeled if any(weights.values()) else None
        x = labeled.image if unlabeled is None else torch.cat([labeled.image, unlabeled.image])
        z = {key: self.parts.trained[f"network_{key}"](x) for key in KEYS}
        evidence = {key: dirichlet(levels[0]) for key, levels in z.items()}
        fused = self._fused(evidence)
        on_labeled = {
            key: [evidence[key].log_p[:n_labeled], *(dirichlet(level[:n_labeled]).log_p for level in levels[1:])]
            for key, levels in z.items()
        }
        losses, measures = self._labeled(on_labeled, self._doubts(evidence, fused, n_labeled), labeled, at)
        if unlabeled is None or len(unlabeled) == 0:
            return StepOutput(losses, measures)
        rest = {key: Dirichlet(*(part[n_labeled:] for part in found)) for key, found in evidence.items()}
        opinion = Opinion(*(part[n_labeled:] for part in fused))
        terms, acting = self._unlabeled(rest, opinion, unlabeled.valid, at)
        # pseudo-labels hide a network that is not finite; its logits do not, and the loop then drops the terms
        doubt = torch.stack([0 * levels[0].detach().float().mean() for levels in z.values()]).sum()
        return StepOutput(
            losses | {name: weights[name] * (term + doubt) for name, term in terms.items()},
            measures
            | acting
            | {name: term.detach() for name, term in terms.items()}
            | {f"{name}_weight": weights[name] for name in terms},
        )

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        members = tuple(self._member(key) for key in KEYS)
        return PredictionSpec(members=members, activation="dirichlet", combine="mean_probabilities")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if self._is_supervised:
            return {}
        return {
            f"network_{key}": PredictionSpec(members=(self._member(key),), activation="dirichlet", combine="single")
            for key in KEYS
        }

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    def _member(self, key: str) -> Member:
        return Member(name=f"network_{key}", architecture=self._architectures[key])

    def _weights(self, at: Progress) -> dict[str, float]:
        """Of the terms on unlabeled voxels; the ramp is gated by the warm-up, not shifted."""
        settings = self.settings
        r_warm = self.job.warm_up_fraction if settings.r_warm is None else settings.r_warm
        if at.fraction < r_warm:
            return {"pseudo": 0.0, "fisher": 0.0}
        ramp = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        return {"pseudo": 1.0 if settings.faithful else ramp, "fisher": ramp * settings.lambda_fisher}

    @torch.no_grad()
    def _fused(self, evidence: Mapping[str, Dirichlet]) -> Opinion:
        """What both networks believe together."""
        first, second = (evidence[key].opinion for key in KEYS)
        if self.settings.fusion == "mean":
            return Opinion(*((one + other) / 2 for one, other in zip(first, second, strict=True)))
        return fuse_beliefs(first, second, discount=1.0 if self.settings.fusion == "ef" else None)

    @torch.no_grad()
    def _doubts(self, evidence: Mapping[str, Dirichlet], fused: Opinion, n_labeled: int) -> dict[str, Tensor]:
        """What ranks a network's labeled voxels: its own uncertainty and the fused one."""
        own = self.settings.own_share
        mixed = {key: own * e.opinion.uncertainty + (1 - own) * fused.uncertainty for key, e in evidence.items()}
        return {key: u[:n_labeled] for key, u in mixed.items()}

    def _labeled(
        self, z: Mapping[str, list[Tensor]], doubts: Mapping[str, Tensor], labeled: StreamBatch, at: Progress
    ) -> Terms:
        """Each network's supervised loss of α / α0 on all levels, and once more by curriculum at full resolution."""
        target, valid = labeled.target, labeled.valid
        losses = {f"supervised_{key}": self.job.supervised_loss(levels, target, valid) for key, levels in z.items()}
        omega = {key: rank_weight(u, at.fraction, self.settings.xi, valid) for key, u in doubts.items()}
        curriculum = torch.stack([hard_label_ce(z[key][0], target, omega[key], valid) for key in KEYS]).sum()
        return (
            {**losses, "supervised_curriculum": curriculum},
            {
                "supervised_curriculum": curriculum.detach(),
                "curriculum_spread": torch.stack([_mean((w - 1).abs(), valid) for w in omega.values()]).mean(),
                "uncertainty_labeled": torch.stack([_mean(u, valid) for u in doubts.values()]).mean(),
            },
        )

    def _unlabeled(self, evidence: Mapping[str, Dirichlet], opinion: Opinion, valid: Tensor, at: Progress) -> Terms:
        """Loss of the fused labels and Fisher term, each of both networks together, and what they act on."""
        labels, w = opinion.belief.argmax(1, keepdim=True), reliability(opinion) * valid
        omega = rank_weight(opinion.uncertainty, at.fraction, self.settings.xi, valid)
        omega = omega * w if self.settings.mask_fisher else omega
        terms = {"pseudo": torch.stack([hard_label_loss(e.log_p, labels, w) for e in evidence.values()]).sum()}
        if self.settings.lambda_fisher > 0:
            terms["fisher"] = torch.stack([self._fisher(e, labels, omega, valid) for e in evidence.values()]).sum()
        decided = [e.alpha.detach().argmax(1, keepdim=True) for e in evidence.values()]
        return (
            terms,
            {
                "pseudo_share": (w > 0).float().mean(),
                "fisher_share": (omega > 0).float().mean(),
                "reliability": _mean(w, valid),
                "uncertainty_unlabeled": _mean(opinion.uncertainty, valid),
                "disagreement": _mean(decided[0] != decided[1], valid),
                "pseudo_foreground_share": _mean(labels > 0, valid),
            },
        )

    def _fisher(self, evidence: Dirichlet, labels: Tensor, weights: Tensor, valid: Tensor) -> Tensor:
        """Mean over the valid voxels of weight · ℓ; an invalid voxel reaches neither the value nor a gradient."""
        if not bool(valid.any()):
            return connected_zero(evidence.alpha)
        alpha = torch.where(valid, evidence.alpha, 1)
        loss = fisher_evidential(alpha, one_hot(labels, alpha.shape[1]), self.settings.information_weight)
        return (loss * weights).sum() / valid.sum()


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Over the valid voxels; none: 0."""
    return torch.where(valid, values.float(), 0).sum() / valid.sum().clamp(min=1)
