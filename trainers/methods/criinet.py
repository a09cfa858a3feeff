"""CRII-Net: the coarse prediction follows the refined one; ranked losses shape the embeddings of labeled pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from autossl.data.labels import LabelSchema
from autossl.networks.features import decode, encode, tap_channels
from autossl.networks.prediction import Member, PredictionSpec
from autossl.networks.refine import RefineHead
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    derive_seed,
    setting,
)
from autossl.trainers.components.banks import ClassBank
from autossl.trainers.components.contrast import Rows, rows_at
from autossl.trainers.components.heads import Projector
from autossl.trainers.components.losses import EPS, connected_zero, probability_mse
from autossl.trainers.components.ranking import RankedListLoss
from autossl.trainers.components.schedules import linear_ramp, sigmoid_ramp
from autossl.trainers.components.shapes import boundary_band
from autossl.trainers.components.tiles import Tile, border_sample, prototypes_of, random_tiles, tiles_per_axis

Measures = dict[str, Tensor | float]
Ranking = tuple[Tensor, Measures]
"""A term and its measures."""
OURS = "ours: the paper's value is not public"
RANKED_LIST = "ours, near Wang et al., CVPR 2019"
DIM = 64
RANKING_RAMP = (0.02, 0.10)
"""Fractions of the run at which the ranked losses set in and have their full weight."""
MOST_TILES = 16
"""In a step, so that its cost does not grow with the patch."""


class CRIINetSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(1.0, "weight of the coarse-refined consistency after its ramp", OURS, ge=0)
    ramp_end: float = setting(0.4, "fraction of the run at which that ramp ends", OURS, ge=0)
    sym: bool = setting(False, "the refined prediction follows the coarse one as well", OURS)
    lambda_intra: float = setting(0.1, "weight of the ranking of pixels near borders within tiles", OURS, ge=0)
    lambda_inter: float = setting(0.1, "weight of the ranking of class prototypes across tiles", OURS, ge=0)
    band: float = setting(2.0, "width of the band around borders in voxels, on each side", OURS, gt=0)
    boundary: float = setting(1.2, "distance beyond which other classes lie", RANKED_LIST, gt=0, le=2)
    margin: float = setting(0.4, "the own class lies within boundary - margin", RANKED_LIST, ge=0)
    sharpness: float = setting(10.0, "how much the nearest of the other classes count more", "Wang et al. 2019", ge=0)
    bank: int = setting(256, "prototypes per class that are remembered; 0: none", OURS, ge=0)
    labeled_only: bool = setting(False, "without unlabeled cases: refinement and ranked losses", "ours")


class CRIINet(SemiSupervisedTrainer):
    """A small head refines the network's prediction; on unlabeled patches the coarse prediction must follow the refined
    one, a cheap and stable target. On labeled patches two ranked losses shape the embeddings: within a tile, pixels
    near borders must be nearer to those of their class than to others (sharper borders); across tiles, class
    prototypes likewise, the more so where a structure hardly stands out from its surroundings. No code is public: the
    outline is the abstract's; modules, sampling, the form of the losses, weights and schedules are reconstruction."""

    name = "criinet"
    title = "CRII-Net: coarse-refined consistency with ranked losses within and across tiles"
    citation = (
        "J. Du, X. Zhang, P. Liu, T. Wang. Coarse-Refined Consistency Learning Using Pixel-Level Features for "
        "Semi-Supervised Medical Image Segmentation. IEEE JBHI 27(8), 2023. doi:10.1109/JBHI.2023.3278741. Ranked list "
        "loss: X. Wang et al., CVPR 2019. arXiv:1903.03238."
    )
    Settings = CRIINetSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max", "lambda_intra", "lambda_inter")
    changes_supervised = True
    ablation = {"lambda_intra": "0", "lambda_inter": "0"}
    settings: CRIINetSettings

    def build(self) -> Parts:
        job, settings, plan = self.job, self.settings, self.job.configuration
        parts = Parts(trained={"network": job.build_network()})
        self._fresh: Rows | None = None
        if self._is_supervised:
            return parts
        self.ranking = RankedListLoss(settings.boundary, settings.margin, settings.sharpness)
        parts.trained["network_refine"] = RefineHead(
            plan.architecture, job.schema.n_outputs, self._activation, seed=derive_seed(job.seed, "refine head")
        )
        if settings.lambda_intra > 0 or settings.lambda_inter > 0:
            width = tap_channels(plan.architecture, "dec:last")
            parts.trained["projector"] = Projector(width, DIM, norm=None, seed=derive_seed(job.seed, "projector"))
        if settings.lambda_inter > 0 and settings.bank > 0:
            n_classes = job.schema.n_outputs + job.schema.has_regions
            parts.memory["prototypes"] = ClassBank(n_classes, DIM, settings.bank)
        return parts

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        if self._is_supervised:  # the twin's step, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        settings, n = self.settings, len(labeled)
        self._fresh = None
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        x = labeled.image if unlabeled is None or weight == 0 else torch.cat([labeled.image, unlabeled.image])
        z, features = decode(network, encode(network, x))
        refined = self.parts.trained["network_refine"](features[-1], z[0])
        supervised = {
            "supervised_coarse": self._supervised([level[:n] for level in z], labeled),
            "supervised_refined": self._supervised([refined[:n]], labeled),
        }
        losses = {name: 0.5 * loss for name, loss in supervised.items()}
        measures: Measures = {name: loss.detach() for name, loss in supervised.items()}
        if unlabeled is not None and weight > 0:
            consistency = self._consistency(z[0][n:], refined[n:], unlabeled.valid)
            losses["consistency"] = weight * consistency
            measures |= {"consistency": consistency.detach(), "consistency_weight": weight}
            measures["valid_share"] = unlabeled.valid.float().mean()
            measures["refined_share"] = self._share_that_differs(z[0][n:], refined[n:], unlabeled.valid)
        ramp = linear_ramp(at.fraction, *RANKING_RAMP)
        weights = {"intra": ramp * settings.lambda_intra, "inter": ramp * settings.lambda_inter}
        tiles = self._tiles(labeled, at) if any(weights.values()) else []
        for name, rank in (("intra", self._intra), ("inter", self._inter)):
            if weights[name] > 0:
                term, seen = rank(features[-1][:n], tiles, labeled, at)
                losses[name] = weights[name] * term
                measures |= {name: term.detach(), f"{name}_weight": weights[name], **seen}
        return StepOutput(losses, measures)

    def after_step(self, at: Progress) -> None:
        if self._fresh is not None and "prototypes" in self.parts.memory:
            self.parts.memory["prototypes"].push(self._fresh.e, self._fresh.labels)

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        member = Member(name="network", architecture=self.job.configuration.architecture, head="refine")
        return PredictionSpec(members=(member,), activation=self._activation, combine="single")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        return {} if self._is_supervised else {"coarse": self.job.single_network_prediction("network")}

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    @property
    def _activation(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid" if self.job.schema.has_regions else "softmax"

    def _supervised(self, z: Sequence[Tensor], labeled: StreamBatch) -> Tensor:
        return self.job.supervised_loss(z, labeled.target, labeled.valid)

    def _consistency(self, coarse: Tensor, refined: Tensor, valid: Tensor) -> Tensor:
        """The refined probabilities are the target; with `sym` both sides move."""
        p, q = self.job.probabilities(coarse), self.job.probabilities(refined)
        return probability_mse(p, q if self.settings.sym else q.detach(), valid)

    @torch.no_grad()
    def _share_that_differs(self, coarse: Tensor, refined: Tensor, valid: Tensor) -> Tensor:
        """Of the valid voxels, those that the refinement decides otherwise."""
        first, second = (
            (z > 0 if self.job.schema.has_regions else z.argmax(1, keepdim=True)) for z in (coarse, refined)
        )
        return ((first != second).any(1, keepdim=True) & valid).sum() / valid.sum().clamp(min=1)

    # -------------------------------------------------------------------------------------------------- ranked losses

    def _tiles(self, labeled: StreamBatch, at: Progress) -> list[Tile]:
        """Of the step's labeled patches."""
        plan = self.job.configuration
        y = single_labels(labeled.target, self.job.schema)
        band = boundary_band(y, self.settings.band, plan.spacing, labeled.valid)
        counts = tiles_per_axis(plan.patch_size, plan.spacing)
        return random_tiles(y, labeled.valid, band, counts, MOST_TILES, at.generator("tiles"))

    def _embedded(self, features: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings at each of the groups of places, all computed together."""
        e = self.parts.trained["projector"](rows_at(features, torch.cat(list(places))))
        return list(e.split([len(group) for group in places]))

    def _intra(self, features: Tensor, tiles: Sequence[Tile], labeled: StreamBatch, at: Progress) -> Ranking:
        """Mean over the tiles with two classes of the ranked loss of anchors near borders."""
        generator = at.generator("pixels", features.device)
        drawn = [(tile, *border_sample(tile, generator)) for tile in tiles]
        drawn = [entry for entry in drawn if len(entry[1])]
        if not drawn:
            return connected_zero(features), {"intra_tiles": 0, "intra_pairs": 0, "intra_acting_share": 0.0}
        members = [torch.cat([anchors, others]) for _, anchors, others in drawn]
        pairs = zip(drawn, members, strict=True)
        embedded = self._embedded(features, [tile.places[chosen] for (tile, *_), chosen in pairs])
        ranked = []
        for (tile, anchors, _), chosen, e in zip(drawn, members, embedded, strict=True):
            labels, n = tile.labels[chosen], len(anchors)
            ranked.append(self.ranking(Rows(e[:n], labels[:n]), Rows(e, labels), ~_diagonal(n, e)))
        acting = torch.cat([one.acting.flatten() for one in ranked])
        return torch.stack([one.losses.mean() for one in ranked]).mean(), {
            "intra_tiles": len(drawn),
            "intra_pairs": len(acting),
            "intra_acting_share": acting.float().mean(),
        }

    def _inter(self, features: Tensor, tiles: Sequence[Tile], labeled: StreamBatch, at: Progress) -> Ranking:
        """Ranked loss of the foreground prototypes of all tiles, weighted by how little they stand out in theirs.

        The bank gets the step's prototypes after the step.
        """
        intensity, generator = labeled.image[:, 0].flatten(), at.generator("prototypes", features.device)
        found = [prototype for tile in tiles for prototype in prototypes_of(tile, intensity, generator)]
        nothing: Measures = {"inter_anchors": 0, "inter_pairs": 0, "inter_acting_share": 0.0}
        if not found:
            return connected_zero(features), nothing
        means = [e.mean(0) for e in self._embedded(features, [prototype.places for prototype in found])]
        e, labels = (
            functional.normalize(torch.stack(means), dim=1, eps=EPS),
            torch.tensor([p.number for p in found], device=features.device),
        )
        self._fresh = Rows(e.detach(), labels)
        foreground = labels > 0
        if not bool(foreground.any()):
            return connected_zero(features), nothing
        candidates = Rows(e, labels)
        if "prototypes" in self.parts.memory:
            stored = self.parts.memory["prototypes"].everything()
            candidates = Rows(torch.cat([e, stored.rows]), torch.cat([labels, stored.classes]))
        counted = ~_diagonal(len(e), candidates.e)[foreground]
        ranked = self.ranking(Rows(e[foreground], labels[foreground]), candidates, counted)
        omega = torch.stack([prototype.weight for prototype in found])[foreground]
        return (omega * ranked.losses).sum() / omega.sum(), {
            "inter_anchors": len(omega),
            "inter_pairs": ranked.acting.numel(),
            "inter_acting_share": ranked.acting.float().mean(),
            "inter_contrast_weight": omega.mean(),
        }


def single_labels(target: Tensor, schema: LabelSchema) -> Tensor:
    """Integers [B, 1, *S]; where regions overlap, the number (from 1) of the one with the fewest label values."""
    if not schema.has_regions:
        return target
    sizes = [len(values) for values in schema.foreground.values()]
    labels = torch.zeros_like(target[:, :1], dtype=torch.long)
    for region in sorted(range(len(sizes)), key=lambda region: -sizes[region]):
        labels = torch.where(target[:, [region]] > 0.5, region + 1, labels)
    return labels


def _diagonal(n: int, candidates: Tensor) -> Tensor:
    """Boolean [n, m]: the candidate is the anchor itself, anchors being the first n of the m."""
    return torch.eye(n, len(candidates), dtype=torch.bool, device=candidates.device)
