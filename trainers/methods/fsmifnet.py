"""FSMIFNet: similarities among unlabeled images, and agreement of fused images with fused feature maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from autossl.networks.features import decode, encode, tap_channels
from autossl.networks.prediction import PredictionSpec
from autossl.planners.plans import ConfigurationPlan
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    MethodSettings,
    Needs,
    ParameterGroup,
    Parts,
    Phase,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
    derive_seed,
    setting,
)
from autossl.trainers.components.ema import EMATeacher
from autossl.trainers.components.heads import Projector
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.masks import box_mask, half_size
from autossl.trainers.components.mixing import CopyPaste, Exchange, pseudo_labels_of
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.similarity import (
    CONFIDENT,
    Decisions,
    as_tokens,
    key_tokens,
    pooled_tokens,
    propagate,
    propagation_loss,
    relation_loss,
    relation_pairs,
)

OURS = "ours: the paper's value is not public"
FEWEST_TOKENS = 64
EMBEDDING = 64
PROJECTOR_RATE = 1e-3


class SimilarityFusionSettings(MethodSettings):
    """What can be changed with --set."""

    alpha: float = setting(0.5, "weight of the pseudo-labeled part of a mixture", "Bai et al. 2023", ge=0)
    lambda_features: float = setting(0.5, "weight of the mixed labels on fused feature maps", OURS, ge=0)
    lambda_max: float = setting(1.0, "weight of consistency, propagation and relation after their ramp", OURS, ge=0)
    lambda_cons: float = setting(1.0, "share of the agreement of fused images with fused features in it", OURS, ge=0)
    lambda_prop: float = setting(0.5, "share of the labels propagated along similarities in it", OURS, ge=0)
    lambda_rel: float = setting(0.1, "share of the relations between tokens in it", OURS, ge=0)
    ramp_end: float = setting(0.3, "fraction of the run at which the ramp ends", OURS, ge=0)
    tau: float = setting(0.1, "temperature of the similarities; lower lets fewer tokens speak", OURS, gt=0)
    box_fraction: float = setting(2 / 3, "side of the exchanged box as a share of the patch", OURS, gt=0, lt=1)
    r_warm: float = setting(0.05, "fraction of the run with plain labeled images alone", OURS, ge=0, le=1)
    ema_decay_max: float | None = setting(
        None, "the teacher's decay; None: the plan's horizon", "ours: 1 - 300 / T in 0.99..0.999", ge=0, lt=1
    )
    labeled_only: bool = setting(False, "without unlabeled cases: labeled images are fused with each other", "ours")


Terms = dict[str, tuple[float, Tensor]]
"""Weight and unweighted loss by name."""


class SimilarityFusion(SemiSupervisedTrainer):
    """Deep features of unlabeled images are compared with one another: labels of a mean teacher travel to where the
    features are alike and constrain the student there, and places that the teacher labels alike are drawn together,
    others pushed apart. Beside that, labeled and unlabeled patches exchange a box twice, as images and as the feature
    maps of all encoder stages; both mixtures learn from the mixed labels, and their predictions must agree.

    Of the paper the abstract alone is public. From it: the two parts and that they constrain labels, relations and the
    agreement of image with feature fusion. Reconstructed by us: token propagation from as many tokens of each class,
    relation loss, masks, weights and schedules. The projector serves training alone; its optimizer (AdamW) takes
    steps that do not shrink with the small weight of its only term, since similarities must soon mean something.
    """

    name = "fsmifnet"
    title = "FSMIFNet: feature similarity and consistency of images with feature maps, both fused"
    citation = (
        "J. Long, J. Liu, C. Yang. Semi-Supervised Medical Image Segmentation Based on Feature Similarity and "
        "Multi-Level Information Fusion Consistency. International Journal of Imaging Systems and Technology, 2025. "
        "DOI 10.1002/ima.70009."
    )
    needs = Needs(teacher=True)
    Settings = SimilarityFusionSettings
    reduces_to_supervised = True
    unsupervised_weights = ("alpha", "lambda_max")
    changes_supervised = True
    ablation = {"lambda_prop": "0", "lambda_rel": "0"}
    settings: SimilarityFusionSettings

    def build(self) -> Parts:
        job, settings = self.job, self.settings
        student = job.build_network()
        trained: dict[str, nn.Module] = {"network": student}
        self.stage = deep_stage(job.configuration)
        if job.has_unlabeled and settings.lambda_max * (settings.lambda_prop + settings.lambda_rel) > 0:
            width = tap_channels(job.configuration.architecture, f"enc:{self.stage}")
            trained["projector"] = Projector(width, EMBEDDING, seed=derive_seed(job.seed, "projector"))
        decay = job.ema_decay_max if settings.ema_decay_max is None else settings.ema_decay_max
        self.teacher = EMATeacher(student, decay)
        return Parts(trained, followers={"teacher": self.teacher.network})

    def phases(self) -> list[Phase]:
        if "projector" not in self.parts.trained:
            return super().phases()
        projector = ParameterGroup("projector", optimizer="adamw", learning_rate=PROJECTOR_RATE)
        return [Phase("train", groups=(ParameterGroup("network"), projector))]

    def request(self, at: Progress) -> BatchRequest:
        request = super().request(at)
        return replace(request, unlabeled=StreamRequest(0)) if self._warms_up(at) else request

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if not self._warms_up(at):
            if batch.unlabeled is not None:
                return self._semi_supervised(labeled, batch.unlabeled, at)
            if self.settings.labeled_only and not self.job.has_unlabeled:
                return self._labeled_fusion(labeled, at)
        z = self.parts.trained["network"](labeled.image)  # the twin's step, bit for bit
        return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

    def after_step(self, at: Progress) -> None:
        self.teacher.update(self.parts.trained["network"], at.step)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        return {"teacher": self.job.single_network_prediction("teacher")}

    def _warms_up(self, at: Progress) -> bool:
        return at.fraction < self.settings.r_warm

    def _mask(self, n: int, image: Tensor, at: Progress) -> Tensor:
        """One box for all samples, false inside."""
        return box_mask(n, image.shape[2:], at.generator("box"), self.settings.box_fraction, device=image.device)

    @property
    def _fuses_features(self) -> bool:
        return self.settings.lambda_features > 0 or self.settings.lambda_max * self.settings.lambda_cons > 0

    def _ramped(self, share: float, at: Progress) -> float:
        return self.settings.lambda_max * sigmoid_ramp(at.fraction, self.settings.ramp_end) * share

    def _semi_supervised(self, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        job, student, n = self.job, self.parts.trained["network"], len(labeled)
        q = job.probabilities(self.teacher.logits(unlabeled.image))
        labels = pseudo_labels_of(q, regions=job.schema.has_regions)
        mask = self._mask(half_size(n, len(unlabeled)), labeled.image, at)
        exchange = Exchange(labeled, unlabeled, labels, mask)
        skips = encode(student, torch.cat([labeled.image, unlabeled.image]))
        z = decode(student, skips)[0]
        supervised = job.supervised_loss([level[:n] for level in z], labeled.target, labeled.valid)
        measures: dict[str, Tensor | float] = {
            "pseudo_share": exchange.pseudo_share,
            "pseudo_foreground_share": (labels.target > 0).float().mean(),
            "box_share": (~mask).float().mean(),
        }
        terms: Terms = {"supervised": (1.0, supervised)} | self._fusion(exchange, skips, at)
        if "projector" in self.parts.trained:
            p = job.probabilities(z[0][n:])
            similarity, seen = self._similarity(skips[self.stage][n:], p, q, unlabeled.valid, at)
            terms |= similarity
            measures |= seen
        return _step_output(terms, measures)

    def _fusion(self, exchange: Exchange, skips: Sequence[Tensor], at: Progress) -> Terms:
        """What mixed images cost, what the same mixture of feature maps costs, and how far their predictions differ."""
        student, settings, regions = self.parts.trained["network"], self.settings, self.job.schema.has_regions
        z = student(exchange.image)
        true, pseudo = exchange.loss(z, regions)
        terms: Terms = {"supervised_mixed": (1.0, true), "pseudo": (settings.alpha, pseudo)}
        if not self._fuses_features:
            return terms
        n, weight = len(exchange.labeled), settings.lambda_features
        z_fused = decode(student, [exchange.mixed(f[:n], f[n:]) for f in skips])[0][0]
        if weight > 0:
            true, pseudo = exchange.loss(z_fused, regions)
            terms |= {"supervised_fused": (weight, true), "pseudo_fused": (weight * settings.alpha, pseudo)}
        return terms | self._consistency(z[0], z_fused, exchange.inside, at)

    def _consistency(self, z: Tensor, z_fused: Tensor, inside: Tensor, at: Progress) -> Terms:
        """The agreement of both kinds of fusion; the gradient flows into both."""
        weight = self._ramped(self.settings.lambda_cons, at)
        if weight == 0:
            return {}
        p, p_fused = self.job.probabilities(z), self.job.probabilities(z_fused)
        return {"consistency": (weight, probability_mse(p, p_fused, inside))}

    def _similarity(
        self, features: Tensor, p: Tensor, q: Tensor, valid: Tensor, at: Progress
    ) -> tuple[Terms, dict[str, Tensor | float]]:
        """Propagation and relation on the tokens of all unlabeled patches, and what they act on.

        Args:
            features: of the deep stage, [B_u, c, *S_D].
            p: the student's probabilities of the unlabeled patches, [B_u, C, *S].
            q: the teacher's.
            valid: boolean [B_u, 1, *S].
            at: decides the draws and the weights.
        """
        settings, regions = self.settings, self.job.schema.has_regions
        e = as_tokens(self.parts.trained["projector"](features))
        wanted, known = pooled_tokens(q, valid, features.shape[2:])
        decisions = Decisions.of(wanted, regions)
        believed = known & (decisions.confidence >= CONFIDENT)
        n_known = known.sum().clamp(min=1)
        terms: Terms = {}
        measures: dict[str, Tensor | float] = {"believed_share": believed.sum() / n_known}
        if settings.lambda_prop > 0:
            keys = key_tokens(decisions, known, at.generator("keys"))
            propagated = propagate(e.detach(), wanted, keys, settings.tau)
            guessed, _ = pooled_tokens(p, valid, features.shape[2:])
            loss, share = propagation_loss(guessed, propagated, wanted, known, regions)
            terms["propagation"] = (self._ramped(settings.lambda_prop, at), loss)
            moved = (Decisions.of(propagated, regions).labels != decisions.labels) & known
            measures |= {
                "key_share": len(keys) / n_known,
                "propagation_share": share,
                "moved_share": moved.sum() / n_known,
            }
        if settings.lambda_rel > 0:
            pairs = relation_pairs(decisions.labels, believed, at.generator("pairs"))
            # hard labels hide a teacher that is not finite; its probabilities do not, and the loop drops the term
            loss = relation_loss(e, decisions.labels, pairs) + 0 * wanted.mean()
            terms["relation"] = (self._ramped(settings.lambda_rel, at), loss)
            alike = decisions.labels[pairs[:, 0]] == decisions.labels[pairs[:, 1]]
            measures |= {"pairs": float(len(pairs)), "alike_share": alike.sum() / max(1, len(pairs))}
        return terms, measures

    def _labeled_fusion(self, labeled: StreamBatch, at: Progress) -> StepOutput:
        """Without unlabeled cases: both kinds of fusion, of labeled patches with each other."""
        student, settings, regions = self.parts.trained["network"], self.settings, self.job.schema.has_regions
        mask = self._mask(half_size(len(labeled), 0), labeled.image, at)
        pasted, n = CopyPaste.of(labeled, mask, self.job.configuration.mirror_axes), len(mask)
        skips = encode(student, torch.cat(pasted.images))
        z_plain = decode(student, skips)[0]
        supervised = self.job.supervised_loss(z_plain, torch.cat(pasted.targets), torch.cat(pasted.valids))
        z = student(pasted.image)
        terms: Terms = {"supervised": (1.0, supervised), "supervised_mixed": (1.0, pasted.loss(z, regions))}
        if self._fuses_features:
            z_fused = decode(student, [pasted.mixed(f[:n], f[n:]) for f in skips])[0][0]
            if settings.lambda_features > 0:
                terms["supervised_fused"] = (settings.lambda_features, pasted.loss(z_fused, regions))
            terms |= self._consistency(z[0], z_fused, torch.ones_like(mask), at)
        return _step_output(terms, {"box_share": (~mask).float().mean()})


def deep_stage(configuration: ConfigurationPlan) -> int:
    """The deepest encoder stage with at least 64 positions per patch; where none has so many, the first."""
    shape, deepest = list(configuration.patch_size), 0
    for stage, strides in enumerate(configuration.architecture.arch_kwargs["strides"]):
        shape = [size // stride for size, stride in zip(shape, strides, strict=True)]
        if math.prod(shape) >= FEWEST_TOKENS:
            deepest = stage
    return deepest


def _step_output(terms: Terms, measures: dict[str, Tensor | float]) -> StepOutput:
    """Weighted terms; of each also the plain value and the weight."""
    for name, (weight, term) in terms.items():
        measures |= {name: term.detach(), f"{name}_weight": weight}
    return StepOutput({name: weight * term for name, (weight, term) in terms.items()}, measures)
