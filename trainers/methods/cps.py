"""Cross pseudo supervision: two networks that label the unlabeled patches for each other."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autossl.networks.build import residual_twin
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Needs,
    Parts,
    Phase,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    setting,
)
from autossl.trainers.components.losses import hard_label_ce, hard_label_loss
from autossl.trainers.components.masks import cutmix_box, derangement, mix, through_plane_axis
from autossl.trainers.components.pseudo import pseudo_label
from autossl.trainers.components.schedules import sigmoid_ramp

logger = logging.getLogger(__name__)

FEW_LABELED = 5
WARM_UP_WITH_FEW = 0.05
OTHER = {"a": "b", "b": "a"}


class CPSSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(0.1, "weight of the cross terms after their ramp", "SSL4MIS port", ge=0)
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", "SSL4MIS port", ge=0)
    r_warm: float | None = setting(
        None,
        "fraction of the run up to which the cross terms are off; None: the plan's, 0.05 below five labeled cases",
        "ours",
        ge=0,
        le=1,
    )
    on_labeled: bool = setting(False, "cross terms on labeled patches as well (the original does)", "SSL4MIS port")
    cps_dice: bool = setting(False, "Dice beside cross-entropy, for small structures", "ours")
    cutmix: bool = setting(False, "mix unlabeled patches with a box, and the labels of the unmixed ones", "CPS")
    sequential: bool = setting(
        False, "compute one network's gradients after the other's: half the memory, more time", "ours"
    )
    arch_b: Literal["same", "resenc"] = setting("same", "the second network: like the first, or residual", "CPS")
    labeled_only: bool = setting(False, "without unlabeled cases: two supervised networks, averaged", "ours")
    single: Literal["A", "B"] | None = setting(None, "one network predicts (the original: A); None: their mean", "ours")


class CPS(SemiSupervisedTrainer):
    """Two networks that start from different weights label the unlabeled patches for each other: the decision of one is
    the target of the other's cross-entropy. Where they disagree they learn from each other, and hard targets push both
    towards clear decisions. Their mean predicts."""

    name = "cps"
    title = "Cross pseudo supervision: two networks label for each other"
    citation = (
        "X. Chen, Y. Yuan, G. Zeng, J. Wang. Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision. "
        "CVPR 2021. arXiv:2106.01226."
    )
    needs = Needs(networks=2)
    Settings = CPSSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: CPSSettings

    def build(self) -> Parts:
        if self._is_supervised:
            return Parts(trained={"network": self.job.build_network()})
        own = self.job.configuration.architecture
        self._architectures = {"a": own, "b": residual_twin(own) if self.settings.arch_b == "resenc" else own}
        return Parts(
            trained={
                f"network_{key}": self.job.build_network(f"network_{key}", architecture=architecture)
                for key, architecture in self._architectures.items()
            }
        )

    def on_phase(self, phase: Phase, at: Progress) -> None:
        """Initial weights from one file can make both networks equal; then they never disagree."""
        states = [module.state_dict() for module in self.parts.trained.values()]
        alike = len(states) == 2 and list(states[0]) == list(states[1])
        if alike and all(torch.equal(states[0][name], states[1][name]) for name in states[0]):
            logger.warning("cps: both networks start from the same weights and will stay the same")

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled, unlabeled, n_labeled = batch.labeled, batch.unlabeled, len(batch.labeled)
        weight = 0.0 if self._is_supervised else self._weight(at)
        first = 0 if self.settings.on_labeled else n_labeled
        n_judged = n_labeled - first + (len(unlabeled) if unlabeled is not None else 0)
        if weight == 0 or n_judged == 0:  # without the cross terms each network takes its own supervised step
            return StepOutput(self._supervised({key: net(labeled.image) for key, net in self._networks.items()}, batch))

        image, valid = labeled.image, labeled.valid
        mixed_labels: dict[str, tuple[Tensor, Tensor]] = {}
        if unlabeled is not None:
            seen, inside = unlabeled.image, unlabeled.valid
            if self.settings.cutmix:
                seen, inside, mixed_labels = self._mixed(unlabeled, at)
            image, valid = torch.cat([image, seen]), torch.cat([valid, inside])
        z = {key: self._logits(net, image) for key, net in self._networks.items()}
        judged = {key: [level[first:] for level in levels] for key, levels in z.items()}
        labels, doubt = {}, {}
        for key, levels in judged.items():
            labels[key], doubt[key] = self._labels(levels[0])
        for key, (given, doubted) in mixed_labels.items():
            labels[key] = torch.cat([labels[key][: n_labeled - first], given])
            doubt[key] = doubt[key] + doubted
        cross = {
            f"cross_{key}": self._cross(judged[key], labels[other], valid[first:]) + doubt[other]
            for key, other in OTHER.items()
        }
        return StepOutput(
            {
                **self._supervised({key: [level[:n_labeled] for level in levels] for key, levels in z.items()}, batch),
                **{name: weight * term for name, term in cross.items()},
            },
            {
                **{name: term.detach() for name, term in cross.items()},
                "cross_weight": weight,
                "disagreement": _share_that_differs(labels, valid[first:]),
                "valid_share": valid[first:].float().mean(),
            },
        )

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        return self._of_one(self.settings.single.lower()) if self.settings.single else self._of_both()

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if self._is_supervised:
            return {}
        if self.settings.single:
            return {"mean": self._of_both()}
        return {f"network_{key}": self._of_one(key) for key in OTHER}

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        """By key; without unlabeled cases the twin's network alone."""
        return {name.removeprefix("network_"): module for name, module in self.parts.trained.items()}

    def _weight(self, at: Progress) -> float:
        """The ramp is gated by the warm-up, not shifted."""
        r_warm = self.settings.r_warm
        if r_warm is None:
            few = self.job.n_labeled < FEW_LABELED
            r_warm = max(self.job.warm_up_fraction, WARM_UP_WITH_FEW if few else 0.0)
        ramp = sigmoid_ramp(at.fraction, self.settings.ramp_end)
        return self.settings.lambda_max * ramp if at.fraction >= r_warm else 0.0

    def _supervised(self, z: Mapping[str, Sequence[Tensor]], batch: Batch) -> dict[str, Tensor]:
        labeled = batch.labeled
        loss = {key: self.job.supervised_loss(levels, labeled.target, labeled.valid) for key, levels in z.items()}
        return {"supervised" if key == "network" else f"supervised_{key}": term for key, term in loss.items()}

    def _logits(self, network: nn.Module, image: Tensor) -> list[Tensor]:
        """On all levels. `sequential`: without keeping what a backward pass needs, which computes it again then."""
        if not self.settings.sequential:
            return network(image)
        return checkpoint(network, image, use_reentrant=False)

    def _labels(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The network's decisions, without a gradient: integers [B, 1, *S]; regions 0/1 [B, C, *S].

        And 0, or nan where the network said nothing finite: hard labels hide that, and the loop must drop the term.
        """
        labels, confidence = pseudo_label(self.job.probabilities(z.detach()), self.job.schema.has_regions)
        return labels, 0 * confidence.mean()

    def _cross(self, z: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
        loss = hard_label_loss if self.settings.cps_dice else hard_label_ce
        return loss(z, target, valid, regions=self.job.schema.has_regions)

    def _mixed(self, unlabeled: StreamBatch, at: Progress) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Patches with a box of another one, which voxels are valid, and what each network said before the mixing."""
        with torch.no_grad():
            labels = {key: self._labels(net(unlabeled.image)[0]) for key, net in self._networks.items()}
        torch.clear_autocast_cache()  # older torch keeps weights that were cast without a gradient for the next pass
        spacing, image = self.job.configuration.spacing, unlabeled.image
        mask = cutmix_box(
            len(image),
            image.shape[2:],
            at.generator("box"),
            p=1.0,
            through_plane_free=through_plane_axis(spacing) == 0,
            device=image.device,
        )
        partner = derangement(len(image), at.generator("partner")).to(image.device)
        mixed = {key: (mix(given, given[partner], mask), doubt) for key, (given, doubt) in labels.items()}
        return mix(image, image[partner], mask), mix(unlabeled.valid, unlabeled.valid[partner], mask), mixed

    def _of_one(self, key: str) -> PredictionSpec:
        spec = self.job.single_network_prediction(f"network_{key}")
        member = spec.members[0].model_copy(update={"architecture": self._architectures[key]})
        return spec.model_copy(update={"members": (member,)})

    def _of_both(self) -> PredictionSpec:
        a, b = self._of_one("a"), self._of_one("b")
        return PredictionSpec(members=a.members + b.members, activation=a.activation, combine="mean_probabilities")


def _share_that_differs(labels: Mapping[str, Tensor], valid: Tensor) -> Tensor:
    """Of the valid voxels, those that both networks do not label alike (regions: in any channel)."""
    differs = (labels["a"] != labels["b"]).any(1, keepdim=True) & valid
    return differs.sum() / valid.sum().clamp(min=1)
