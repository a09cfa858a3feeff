"""CAD: where a network is not sure, a confident part of another view is put; two networks must agree on the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from autossl.networks.build import residual_twin
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
from autossl.trainers.components.augment import StrongAugment
from autossl.trainers.components.displacement import (
    Decisions,
    Limits,
    displaced,
    find_displacements,
    smallest_sides,
    what_moved,
)
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.losses import hard_label_dice
from autossl.trainers.components.masks import box_mask, half_size
from autossl.trainers.components.mixing import CopyPaste, Exchange, pseudo_labels_of, single_component_channels
from autossl.trainers.components.schedules import linear_ramp, sigmoid_ramp

ABD = "Chi et al. 2024 (ABD), released code"
OTHER = {"a": "b", "b": "a"}
Levels = Sequence[Tensor]
"""Logits, full resolution first."""
COPY_PASTE, DISPLACEMENT = "labeled copy-paste", "displacement"


class CADSettings(MethodSettings):
    """What can be changed with --set."""

    displacement: Literal["llcr", "random", "off"] = setting(
        "llcr", "llcr: where a network is unsure; random: boxes of the same size anywhere; off: none", "CAD"
    )
    frame: Literal["bcp", "cps"] = setting(
        "bcp", "bcp: mixed patches and a labeled phase first; cps: patches as they are", "ABD on BCP; CAD names CPS"
    )
    second: Literal["same", "residual"] = setting("same", "the second network: like the first, or residual", "ours")
    threshold_start: float = setting(0.6, "confidence below this is low, at the beginning", "ours", ge=0, le=1)
    threshold_end: float = setting(0.95, "and at the end", "ours", ge=0, le=1)
    side_start: float = setting(0.125, "longest side of a box as a share of the patch, at first", "ours", gt=0, le=1)
    side_end: float = setting(0.35, "and at the end", "ours", gt=0, le=1)
    top_k: int = setting(4, "so many of the most confident windows are compared by their classes", ABD, ge=1)
    lambda_max: float | None = setting(None, "weight of agreement; None: 1 with bcp, 0.1 with cps", ABD, ge=0)
    ramp_end: float | None = setting(
        None, "fraction of the phase at which its ramp ends; None: 0.3 with bcp, 1 with cps", "ours; with cps ABD", ge=0
    )
    r_warm: float | None = setting(
        None, "with frame=cps: fraction up to which agreement is off; None: the plan's", "ours: 0.02", ge=0, le=1
    )
    r_pre: float = setting(0.2, "fraction of the run with labeled images alone", "ours, as bcp", gt=0, lt=1)
    alpha: float = setting(0.5, "weight of the pseudo-labeled part of a mixed image", "bcp", ge=0)
    box_fraction: float = setting(2 / 3, "side of the pasted box as a share of the patch", "bcp", gt=0, lt=1)
    ema_decay_max: float | None = setting(
        None, "the teacher's decay; None: the plan's horizon", "ours: 1 - 300 / T in 0.99..0.999", ge=0, lt=1
    )
    labeled_only: bool = setting(False, "without unlabeled cases: labeled copy-paste for both networks", "ours")
    infer: Literal["student", "ensemble", "teacher"] = setting(
        "student", "what predicts: the first network, the mean of both, the first one's average", "ours"
    )


@dataclass(frozen=True)
class Views:
    """What both networks see at one step: the same voxels, weak (a) and strong (b)."""

    image: Mapping[str, Tensor]
    """[N, Ci, *S] each."""
    valid: Tensor
    """Boolean [N, 1, *S], of both."""
    exchange: Mapping[str, Exchange] | None
    """How they were mixed; None: labeled patches, then unlabeled ones."""


class CAD(SemiSupervisedTrainer):
    """Two networks see weak and strong views of the same mixed patches and label them for each other. For each view the
    largest connected region with low confidence is found and replaced by a region of the other view that is confident
    and shows similar classes; the networks must agree on these displaced images as well. What counts as low, and how
    large a region may be, grows during training, so that the perturbation begins small and safe.

    Public are the abstract and the two named parts (replacement of the largest low-confidence region, escalation of the
    threshold); it names cross pseudo supervision as its frame (`frame=cps`). Its base method ABD (arXiv:2405.00378) is
    public with code. Reconstructed: how a component becomes a box, the search of windows, all thresholds and sizes and
    their linear growth, and the default frame, that of ABD on BCP."""

    name = "cad"
    title = "CAD: confidence-aware adaptive displacement"
    citation = (
        "W. Xiao, Z. Xu, G. Liang, Y. Deng, Y. Xiao. CAD: Confidence-Aware Adaptive Displacement for Semi-Supervised "
        "Medical Image Segmentation. 2025. arXiv:2502.00536."
    )
    needs = Needs(networks=2, teacher=True, strong_view=True)
    Settings = CADSettings
    reduces_to_supervised = True
    unsupervised_weights = ("alpha", "lambda_max")
    changes_supervised = True
    ablation = {"displacement": "off"}
    settings: CADSettings

    def build(self) -> Parts:
        job, plan, decay = self.job, self.job.configuration, self.settings.ema_decay_max
        if self._is_supervised:
            return Parts({"network": job.build_network()})
        own = plan.architecture
        self._architectures = {"a": own, "b": residual_twin(own) if self.settings.second == "residual" else own}
        networks = {key: job.build_network(f"network_{key}", architecture=a) for key, a in self._architectures.items()}
        self.augment = StrongAugment(plan.spacing, job.channel_std, plan.use_mask_for_norm)
        self.single_component = single_component_channels(job)
        self.teacher = EMATeacher(networks["a"], job.ema_decay_max if decay is None else decay)
        return Parts(
            {f"network_{key}": network for key, network in networks.items()}, {"teacher": self.teacher.network}
        )

    def phases(self) -> list[Phase]:
        if self.job.has_unlabeled:
            r_pre = self.settings.r_pre if self.settings.frame == "bcp" else 0.0
            first = [Phase(COPY_PASTE, share=r_pre)] if r_pre > 0 else []
            return [*first, Phase(DISPLACEMENT, share=1 - r_pre)]
        return [Phase(COPY_PASTE)] if self.settings.labeled_only else super().phases()

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if at.phase == COPY_PASTE else request

    def on_phase(self, phase: Phase, at: Progress) -> None:
        if phase.name == DISPLACEMENT:
            self.teacher.copy_from(self.parts.trained["network_a"])

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if self._is_supervised:  # the twin, bit for bit
            z = self.parts.trained["network"](labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        if batch.unlabeled is None or at.phase == COPY_PASTE:
            return self._labeled_alone(labeled, at)
        views = self._views(labeled, batch.unlabeled, at)
        z_of = {key: network(views.image[key]) for key, network in self._networks.items()}
        output = self._judged_by_labels(z_of, views, labeled)
        weight = self._weight(at)
        if weight > 0:
            terms, measures = self._agreement(z_of, views, at)
            output.losses |= {name: weight * term for name, term in terms.items()}
            output.measures |= {name: term.detach() for name, term in terms.items()}
            output.measures |= {"agreement_weight": weight, **measures}
        return output

    def after_step(self, at: Progress) -> None:
        if at.phase == DISPLACEMENT:  # ramped in where no phase before gave it trained weights
            self.teacher.update(self.parts.trained["network_a"], at.step, ramp_in=self.settings.frame == "cps")

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        return self._predictions()[self.settings.infer]

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if self._is_supervised:
            return {}
        return {name: spec for name, spec in self._predictions().items() if spec != self.prediction()}

    def _predictions(self) -> dict[str, PredictionSpec]:
        """By what `infer` may ask for."""
        a, b = (self.job.single_network_prediction(f"network_{key}") for key in OTHER)
        second = b.members[0].model_copy(update={"architecture": self._architectures["b"]})
        both = PredictionSpec(members=(*a.members, second), activation=a.activation, combine="mean_probabilities")
        moved = self.job.has_unlabeled  # else the teacher never did
        return {
            "student": a,
            "ensemble": both,
            "teacher": self.job.single_network_prediction("teacher") if moved else a,
        }

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        return {key: self.parts.trained[f"network_{key}"] for key in OTHER}

    # ---------------------------------------------------------------------------------------------------- the frame

    def _labeled_alone(self, labeled: StreamBatch, at: Progress) -> StepOutput:
        """Half of the labeled patches pasted into the other half; with frame=cps, the patches as they are."""
        views = {"a": labeled, "b": self._strong(labeled, None, at, "labeled")}
        mask = self._mask(half_size(len(labeled), 0), labeled.image, at)
        losses = {}
        for key, network in self._networks.items():
            if self.settings.frame == "bcp":
                pasted = CopyPaste.of(views[key], mask, self.job.configuration.mirror_axes)
                loss = pasted.loss(network(pasted.image), self.job.schema.has_regions)
            else:
                loss = self.job.supervised_loss(network(views[key].image), labeled.target, labeled.valid)
            losses[f"supervised_{key}"] = loss
        return StepOutput(losses)

    def _views(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> Views:
        """Weak and strong views, mixed alike; each with pseudo-labels that the teacher gives to that view."""
        streams = {
            "a": (labeled, unlabeled),
            "b": (
                self._strong(labeled, None, at, "labeled"),
                self._strong(unlabeled, unlabeled.valid, at, "unlabeled"),
            ),
        }
        if self.settings.frame == "cps":
            images = {key: torch.cat([known.image, unknown.image]) for key, (known, unknown) in streams.items()}
            return Views(images, torch.cat([labeled.valid, unlabeled.valid]), None)
        mask = self._mask(half_size(len(labeled), len(unlabeled)), labeled.image, at)
        exchanges = {}
        for key, (known, unknown) in streams.items():
            q = self.job.probabilities(self.teacher.logits(unknown.image))
            pseudo = pseudo_labels_of(q, self.single_component, self.job.schema.has_regions)
            exchanges[key] = Exchange(known, unknown, pseudo, mask)
        images = {key: exchange.image for key, exchange in exchanges.items()}
        return Views(images, exchanges["a"].mixed(labeled.valid, unlabeled.valid), exchanges)

    def _judged_by_labels(self, z_of: Mapping[str, Levels], views: Views, labeled: StreamBatch) -> StepOutput:
        """True labels, and the pseudo-labels of what was mixed in."""
        output = StepOutput({})
        for key, z in z_of.items():
            if views.exchange is None:
                known = [level[: len(labeled)] for level in z]
                output.losses[f"supervised_{key}"] = self.job.supervised_loss(known, labeled.target, labeled.valid)
                continue
            true, guessed = views.exchange[key].loss(z, self.job.schema.has_regions)
            output.losses |= {f"supervised_{key}": true, f"pseudo_{key}": self.settings.alpha * guessed}
            output.measures |= {f"pseudo_{key}": guessed.detach(), "pseudo_weight": self.settings.alpha}
            output.measures["pseudo_share"] = views.exchange[key].pseudo_share
        return output

    def _strong(self, stream: StreamBatch, inside: Tensor | None, at: Progress, name: str) -> StreamBatch:
        """The strong views in place of the weak ones; ignore voxels lie inside their image and change as well."""
        image = stream.image
        return replace(stream, views=(self.augment(image, at.generator(f"{name} intensity", image.device), inside),))

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """One box for all samples, false inside."""
        shape = image.shape[2:]
        return box_mask(n, shape, at.generator("box"), self.settings.box_fraction, device=image.device)

    # ------------------------------------------------------------------------------------- agreement and displacement

    def _agreement(
        self, z_of: Mapping[str, Levels], views: Views, at: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Unweighted terms: each network against the other's decisions, on the views and on the displaced ones."""
        valid = views.valid
        terms, decided = self._cross("cross", z_of, valid)
        differs = (decided["a"].labels != decided["b"].labels).any(1, keepdim=True) & valid
        measures: dict[str, Tensor | float] = {"agreement": 1 - differs.sum() / valid.sum().clamp(min=1)}
        if self.settings.displacement == "off":
            return terms, measures
        limits = self._limits(valid.shape[2:], at)
        places = at.generator("places") if self.settings.displacement == "random" else None
        moves = {key: find_displacements(decided[key], decided[o], valid, limits, places) for key, o in OTHER.items()}
        image = views.image
        x = torch.cat([displaced(image[key], image[other], moves[key]) for key, other in OTHER.items()])
        moved_valid = torch.cat([displaced(valid, valid, moves[key]) for key in OTHER])
        z_moved = {key: network(x) for key, network in self._networks.items()}
        terms |= self._cross("displaced", z_moved, moved_valid)[0]
        measures |= {"threshold": limits.threshold, "longest_side_share": self._side(at)}
        for key, other in OTHER.items():
            found = what_moved(moves[key], decided[key], decided[other], valid, limits)
            measures |= {f"{name}_{key}": value for name, value in found.items()}
        return terms, measures

    def _cross(
        self, name: str, z_of: Mapping[str, Levels], valid: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Decisions]]:
        """Soft Dice of each network against the other's decisions, and these decisions."""
        job, regions = self.job, self.job.schema.has_regions
        decided = {key: Decisions.of(job.probabilities(z[0].detach()), valid, regions) for key, z in z_of.items()}
        terms = {
            f"{name}_{key}": hard_label_dice(z, decided[OTHER[key]].labels, valid, regions) + decided[OTHER[key]].doubt
            for key, z in z_of.items()
        }
        return terms, decided

    def _side(self, at: Progress) -> float:
        """The longest side of a box, as a share of the patch."""
        return linear_ramp(at.phase_fraction, 0, 1, self.settings.side_start, self.settings.side_end)

    def _limits(self, shape: Sequence[int], at: Progress) -> Limits:
        """Dynamic escalation: both limits grow in a straight line over the phase."""
        settings, spacing = self.settings, self.job.configuration.spacing
        return Limits(
            threshold=linear_ramp(at.phase_fraction, 0, 1, settings.threshold_start, settings.threshold_end),
            largest_sides=tuple(int(self._side(at) * size) for size in shape),
            smallest_sides=smallest_sides(shape, spacing),
            spacing=spacing,
            n_windows=settings.top_k,
            regions=self.job.schema.has_regions,
        )

    def _weight(self, at: Progress) -> float:
        """Of agreement: a ramp over the phase; with frame=cps it is gated by the warm-up, not shifted."""
        settings, mixed = self.settings, self.settings.frame == "bcp"
        highest = (1.0 if mixed else 0.1) if settings.lambda_max is None else settings.lambda_max
        ramp_end = (0.3 if mixed else 1.0) if settings.ramp_end is None else settings.ramp_end
        r_warm = self.job.warm_up_fraction if settings.r_warm is None else settings.r_warm
        return highest * sigmoid_ramp(at.phase_fraction, ramp_end) if mixed or at.fraction >= r_warm else 0.0
