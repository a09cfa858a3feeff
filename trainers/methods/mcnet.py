"""MC-Net+: decoders that differ in their up-sampling teach each other, on one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from autossl.networks.decoders import DecoderVariant, Upsampling
from autossl.networks.features import decode, encode
from autossl.networks.prediction import Activation, Member, PredictionSpec, SharedDecoder
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    derive_seed,
    setting,
)
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.pseudo import sharpen
from autossl.trainers.components.schedules import sigmoid_ramp

RELEASE = "Wu et al. 2022, released code"
VARIANTS: dict[str, Upsampling] = {"linear_decoder": "linear", "nearest_decoder": "nearest"}
"""Trained parts beside the plan's network, in the order in which `n_decoders` takes them."""


class MutualConsistencySettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(
        2.0,
        "weight of the mutual consistency after its ramp",
        f"{RELEASE} in 3D, divided by its weight of the supervised loss; in 2D it has 0.1, 0.7 % of the gradient",
        ge=0,
    )
    ramp_end: float | None = setting(
        None, "fraction of the run at which its ramp ends; None: 0.4 (3D), 1 (2D)", RELEASE, ge=0
    )
    temperature: float = setting(0.1, "of the sharpening; lower is sharper", RELEASE, gt=0)
    sharpen: Literal["normalized", "channel"] = setting(
        "normalized",
        "normalized: sharpened probabilities sum to 1; channel: each class against the rest, as the release does",
        "ours: with three or more classes the release's targets sum to less than 1",
    )
    n_decoders: int = setting(3, "3: MC-Net+; 2: MC-Net (transposed and linear)", RELEASE, ge=2, le=3)
    detach_targets: bool = setting(False, "no gradient through the sharpened side", RELEASE)
    ds_all: bool = setting(False, "deep supervision of the further decoders as well", "ours: of the plan's decoder")
    ensemble: bool = setting(False, "predict with the mean of all decoders, not with the plan's alone", RELEASE)
    labeled_only: bool = setting(False, "without unlabeled cases: mutual consistency on the labeled ones", "ours")


class MutualConsistency(SemiSupervisedTrainer):
    """One encoder feeds decoders that differ in nothing but their up-sampling. Where they disagree a region is hard.
    Each decoder's sharpened probabilities teach the others, on all patches, which makes them both consistent and
    confident. Prediction needs the plan's own decoder alone."""

    name = "mcnet"
    title = "MC-Net+: mutual consistency of decoders on one encoder"
    citation = (
        "Y. Wu, Z. Ge, D. Zhang, M. Xu, L. Zhang, Y. Xia, J. Cai. Mutual consistency learning for semi-supervised "
        "medical image segmentation. Medical Image Analysis 81, 2022. arXiv:2109.09960."
    )
    Settings = MutualConsistencySettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    changes_supervised = True
    settings: MutualConsistencySettings

    def build(self) -> Parts:
        job, trained = self.job, {"network": self.job.build_network()}
        for name in self._variants:
            trained[name] = DecoderVariant(
                job.configuration.architecture,
                job.schema.n_outputs,
                VARIANTS[name],
                deep_supervision=self.settings.ds_all,
                seed=derive_seed(job.seed, name),
            )
        return Parts(trained)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled = self.parts.trained["network"], batch.labeled
        weight = self.settings.lambda_max * sigmoid_ramp(at.fraction, self._ramp_end)
        if not self._variants:  # the twin's step, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        unlabeled = batch.unlabeled if weight > 0 else None
        x = labeled.image if unlabeled is None else torch.cat([labeled.image, unlabeled.image])
        skips = encode(network, x)
        levels = [decode(network, skips)[0], *(self.parts.trained[name](skips) for name in self._variants)]
        supervised = [
            self.job.supervised_loss([level[: len(labeled)] for level in z], labeled.target, labeled.valid)
            for z in levels
        ]
        measures: dict[str, Tensor | float] = {
            f"supervised_{name}": loss.detach()
            for name, loss in zip(("network", *self._variants), supervised, strict=True)
        }
        losses = {"supervised": torch.stack(supervised).sum()}  # a mean would slow each decoder down
        if weight > 0:
            # without a label there is nothing to ignore: only voxels outside an unlabeled image do not count
            counted = torch.ones_like(labeled.valid)
            counted = counted if unlabeled is None else torch.cat([counted, unlabeled.valid])
            consistency = self._mutual_consistency([z[0] for z in levels], counted)
            losses["consistency"] = weight * consistency
            measures |= {"consistency": consistency.detach(), "consistency_weight": weight}
            measures["valid_share"] = counted.float().mean()
            measures["disagreement"] = self._disagreement([z[0].detach() for z in levels], counted)
        return StepOutput(losses, measures)

    def prediction(self) -> PredictionSpec:
        return self._prediction_of_all() if self.settings.ensemble else self.job.single_network_prediction("network")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if not self._variants:
            return {}
        if self.settings.ensemble:
            return {"first_decoder": self.job.single_network_prediction("network")}
        return {"ensemble": self._prediction_of_all()}

    def _prediction_of_all(self) -> PredictionSpec:
        """The mean of the decoders' probabilities; without further decoders that of the network."""
        if not self._variants:
            return self.job.single_network_prediction("network")
        decoders = tuple(
            SharedDecoder(name=name, upsampling=VARIANTS[name], deep_supervision=self.settings.ds_all)
            for name in self._variants
        )
        member = Member(name="network", architecture=self.job.configuration.architecture, decoders=decoders)
        activation: Activation = "sigmoid" if self.job.schema.has_regions else "softmax"
        return PredictionSpec(members=(member,), activation=activation, combine="mean_probabilities")

    @property
    def _variants(self) -> tuple[str, ...]:
        """Further decoders; none where there is nothing for them to learn from each other."""
        if not self.job.has_unlabeled and not self.settings.labeled_only:
            return ()
        return tuple(VARIANTS)[: self.settings.n_decoders - 1]

    @property
    def _ramp_end(self) -> float:
        flat = self.job.configuration.dims == 2
        return (1.0 if flat else 0.4) if self.settings.ramp_end is None else self.settings.ramp_end

    def _mutual_consistency(self, z: Sequence[Tensor], counted: Tensor) -> Tensor:
        settings = self.settings
        if self.job.schema.has_regions:
            q = [torch.sigmoid(logits.float() / settings.temperature) for logits in z]
        elif settings.sharpen == "channel":
            q = [sharpen_channels(logits, settings.temperature) for logits in z]
        else:
            q = [sharpen(torch.log_softmax(logits.float(), 1), settings.temperature) for logits in z]
        p = [self.job.probabilities(logits) for logits in z]
        return mutual_consistency(p, [target.detach() for target in q] if settings.detach_targets else q, counted)

    @torch.no_grad()
    def _disagreement(self, z: Sequence[Tensor], counted: Tensor) -> Tensor:
        """Share of the counted voxels that the decoders do not decide alike."""
        decided = [logits > 0 if self.job.schema.has_regions else logits.argmax(1, keepdim=True) for logits in z]
        differs = torch.stack([(other != decided[0]).any(1, keepdim=True) for other in decided[1:]]).any(0)
        return (differs & counted).sum() / counted.sum().clamp(min=1)


def mutual_consistency(p: Sequence[Tensor], q: Sequence[Tensor], w: Tensor | None = None) -> Tensor:
    """Σ over ordered pairs i ≠ j of the mean of (p_i - q_j)², p and q [N, C, *S] of each decoder, w [N, 1, *S]."""
    pairs = [probability_mse(p_i, q_j, w) for i, p_i in enumerate(p) for j, q_j in enumerate(q) if i != j]
    return torch.stack(pairs).sum()


def sharpen_channels(z: Tensor, temperature: float) -> Tensor:
    """p^(1/t) / (p^(1/t) + (1 - p)^(1/t)) of each channel of softmax(z) for itself; they do not sum to 1."""
    log_p = torch.log_softmax(z.float(), 1)
    log_not_p = torch.log1p(-log_p.exp().clamp(max=1 - 1e-6))  # beyond, the sigmoid is 1 with no gradient anyway
    return torch.sigmoid((log_p - log_not_p) / temperature)
