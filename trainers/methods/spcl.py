"""Self-paced contrast: patches from the same place, patient or phase should look alike to the encoder."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from autossl.networks.features import decode, encode, tap_channels
from autossl.networks.prediction import PredictionSpec
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
    poly_over_phase,
    setting,
)
from autossl.trainers.components.banks import ClassBank, ClassMoments
from autossl.trainers.components.contrast import (
    Rows,
    has_negatives,
    mean_of_pairs,
    mean_over_anchors,
    pair_losses,
    self_paced_weights,
)
from autossl.trainers.components.heads import Projector
from autossl.trainers.components.losses import EPS, connected_zero
from autossl.trainers.components.meta_labels import MetaLabel, PositionBins, meta_labels, position_bins

logger = logging.getLogger(__name__)

RELEASE = "Peng et al. 2021, released code"
PRETRAINING, SEMI_SUPERVISED = "contrastive pre-training", "semi-supervised"
INSTANCE = "instance"
GAMMAS = {"position": (5.0, 60.0), "patient": (3.5, 50.0), "phase": (2.0, 50.0)}
"""Tolerance at the begin and the end of a phase where several labels are used."""
GAMMAS_OF_POSITION_ALONE = (4.0, 60.0)
CANDIDATES = 59
"""Of an anchor in the release: a batch of 30 in two views, less itself. Its tolerances were found with these."""
DIM = 256
"""Of the projectors' hidden layer and of the embeddings."""
WARM_UP, PRETRAINING_RATE = 0.05, 0.5
"""Share of the pre-training in which its learning rate grows, and that rate in units of the plan's."""
BANK_STEPS = 8
"""Embeddings of earlier steps than these come from too different an encoder."""
SMALLEST_MEAN = 1e-3
"""A loss is divided by no smaller mean of its pair weights, where hardly any pair is easy enough."""


class SelfPacedContrastSettings(MethodSettings):
    """What can be changed with --set."""

    labels: str = setting(
        "position,patient,phase",
        "meta-labels that are used, of position, patient, phase and instance (each patch with its other view alone); "
        "those that the data do not tell are left out, and instance steps in for all",
        RELEASE,
        pattern=r"^(position|patient|phase|instance)(,(position|patient|phase|instance))*$",
    )
    phase_attribute: str = setting("phase", "column of cases.csv that `phase` means: phase, sequence, scanner", "ours")
    r_pre: float = setting(0.25, "fraction of the run that pre-trains the encoder", "ours", gt=0, lt=1)
    lambda_pre: float = setting(1.0, "weight of each label in the pre-training; 0: no pre-training", RELEASE, ge=0)
    lambda_contrast: float = setting(0.1, "weight of each label in the semi-supervised phase", RELEASE, ge=0)
    self_pacing: Literal["linear", "hard", "off"] = setting(
        "linear", "how pairs that are still hard count: less, not at all, or like all others", RELEASE
    )
    gamma_start: float | None = setting(
        None, "tolerance at the begin of a phase; None: 5 position (alone 4), 3.5 patient, 2 phase", RELEASE, gt=0
    )
    gamma_end: float | None = setting(None, "at its end; None: 60 position, 50 patient, phase", RELEASE, gt=0)
    correct_grad: bool = setting(True, "divide a label's loss by the mean weight of its pairs", RELEASE)
    temperature: float = setting(0.07, "of the similarities", RELEASE, gt=0)
    bank_size: int = setting(
        256, "embeddings of earlier steps among the candidates, of 8 steps at most; 0: none", "ours", ge=0
    )
    labeled_only: bool = setting(
        False, "without unlabeled cases: contrast on the labeled ones, without their labels", RELEASE
    )


class SelfPacedContrast(SemiSupervisedTrainer):
    """Scans carry labels for free: where in the body a patch lies, whose it is, which phase it shows. Patches that
    share such a label are pulled together in the encoder's deepest features, first on all cases as a pre-training,
    then on the unlabeled ones beside the supervised loss. Because the labels are noisy (the middle slice of one scan
    is not that of another) pairs that are still far apart count less at first, and more as training goes on.

    Faithful to the paper and its release: the loss, its temperature, the projectors on the bottleneck, the pre-training
    of the encoder, the pace of both phases. Ours: the bank of earlier rows (a batch of patches has few positives), the
    tolerance scaled to the number of candidates, 3D positions, phases as shares of the run, optimizer and learning
    rates, and that axes which tell a position are not mirrored for these patches. The pooled features are standardized
    by their running moments, which is ours as well: instance normalization has taken out of them nearly all that a mean
    over space can tell, so that patches differ by a few percent and the contrast of the release, made for batch
    normalization, starts from cosines of 0.998 and collapses. Left out: contrast in the decoder, which is optional in
    the paper, and consistency between the views. Without any contrast (both weights 0) a run is that of `supervised`,
    so the ablation takes the pace away instead: all pairs count alike."""

    name = "spcl"
    title = "Self-paced contrast of patches by position, patient and phase"
    citation = (
        "J. Peng, P. Wang, C. Desrosiers, M. Pedersoli. Self-Paced Contrastive Learning for Semi-supervised Medical "
        "Image Segmentation with Meta-labels. NeurIPS 2021. arXiv:2107.13741."
    )
    needs = Needs(views=2, meta_labels=True)
    Settings = SelfPacedContrastSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_pre", "lambda_contrast")
    ablation = {"self_pacing": "off"}
    settings: SelfPacedContrastSettings

    def build(self) -> Parts:
        job, case_shape = self.job, self.job.median_case_shape
        patch = job.configuration.patch_size
        self.bins = position_bins(patch, case_shape) if case_shape is not None else PositionBins((1, 1, 1))
        self.kinds = self._kinds()
        self._fresh: dict[str, tuple[Tensor, MetaLabel]] = {}
        self._reported: set[str] = set()
        parts = Parts(trained={"network": job.build_network()})
        channels = tap_channels(job.configuration.architecture, "bottleneck")
        if self.kinds:
            parts.memory["pooled"] = ClassMoments(1, channels, cov="diag", decay=0.9)
        for kind in self.kinds:
            seed = derive_seed(job.seed, "projector", kind)
            parts.trained[f"project_{kind}"] = Projector(channels, DIM, DIM, norm=None, pool="global", seed=seed)
            if size := self._bank_size:
                parts.memory[f"bank_{kind}"] = ClassBank(1, DIM, size, n_labels=2)
        return parts

    def phases(self) -> list[Phase]:
        if not self.kinds or self.settings.lambda_pre == 0:
            return [Phase(SEMI_SUPERVISED)]
        projectors = [f"project_{kind}" for kind in self.kinds]
        first = [ParameterGroup(prefix, factor=warm_up_and_poly) for prefix in ("network.encoder", *projectors)]
        then = [ParameterGroup(prefix, factor=poly_over_phase) for prefix in ("network", *projectors)]
        r_pre = self.settings.r_pre
        return [Phase(PRETRAINING, r_pre, tuple(first)), Phase(SEMI_SUPERVISED, 1 - r_pre, tuple(then))]

    def request(self, at: Progress) -> BatchRequest:
        job, request = self.job, super().request(at)
        if not self.kinds or self._weight(at) == 0:
            return replace(request, unlabeled=StreamRequest(0))
        axes = self.bins.axes_in_patch(job.configuration.dims) if "position" in self.kinds else ()
        pairs = StreamRequest(
            job.unlabeled_batch_size, views=2, includes_labeled=not job.has_unlabeled, unmirrored_axes=axes
        )
        if at.phase != PRETRAINING:
            return replace(request, unlabeled=pairs)
        count = job.labeled_batch_size + job.unlabeled_batch_size
        all_cases = replace(pairs, count=count, shared_geometry=False, includes_labeled=True)
        return BatchRequest(StreamRequest(0), all_cases)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        self._fresh = {}
        network, labeled = self.parts.trained["network"], batch.labeled
        unlabeled = batch.unlabeled if self.kinds and self._weight(at) > 0 else None
        if at.phase == PRETRAINING:
            if unlabeled is None:  # a step that brought no patch
                return StepOutput({f"contrast_{kind}": self._nothing(kind) for kind in self.kinds})
            return self._contrast(encode(network, torch.cat(unlabeled.views))[-1], unlabeled, at)
        if unlabeled is None:  # the twin's step, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        n = len(labeled)
        skips = encode(network, torch.cat([labeled.image, *unlabeled.views]))
        z, _ = decode(network, [level[:n] for level in skips])
        supervised = self.job.supervised_loss(z, labeled.target, labeled.valid)
        contrast = self._contrast(skips[-1][n:], unlabeled, at)
        return replace(contrast, losses={"supervised": supervised, **contrast.losses})

    def after_step(self, at: Progress) -> None:
        """The step's first views go into the banks; those of a step that was not taken do not."""
        for kind, (e, label) in self._fresh.items():
            bank = self.parts.memory[f"bank_{kind}"]
            bank.push(e, torch.zeros_like(label.values), torch.stack([label.values, label.known.long()], 1))

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    # ------------------------------------------------------------------------------------------------- what is alike

    def _kinds(self) -> tuple[str, ...]:
        """The wanted labels that the data tell; where they tell none, each patch is like its other view alone."""
        settings, values = self.settings, self.job.attribute_values
        trains = self.job.has_unlabeled or settings.labeled_only
        if not trains or settings.lambda_pre == settings.lambda_contrast == 0:
            return ()
        told = {
            "position": self.bins.tells_position,
            "patient": values.get("patient", 0) > 1,
            "phase": values.get(settings.phase_attribute, 0) > 1,
            INSTANCE: True,
        }
        wanted = tuple(dict.fromkeys(settings.labels.split(",")))
        kinds = tuple(kind for kind in wanted if told[kind]) or (INSTANCE,)
        logger.info("spcl: contrast by %s (wanted: %s)", ", ".join(kinds), ", ".join(wanted))
        return kinds

    def _labels(self, stream: StreamBatch) -> dict[str, MetaLabel]:
        index = torch.arange(len(stream), device=stream.image.device)
        return {
            **meta_labels(stream, self.bins, self.settings.phase_attribute),
            INSTANCE: MetaLabel(index, torch.ones_like(index, dtype=torch.bool)),
        }

    @property
    def _bank_size(self) -> int:
        per_step = self.job.unlabeled_batch_size + (self.job.labeled_batch_size if self.settings.lambda_pre > 0 else 0)
        return min(self.settings.bank_size, BANK_STEPS * per_step)

    def _bank(self, kind: str) -> Rows | None:
        if not self._bank_size:
            return None
        stored = self.parts.memory[f"bank_{kind}"].everything()
        return Rows(stored.rows, stored.labels[:, 0], stored.labels[:, 1] > 0)

    # ---------------------------------------------------------------------------------------------------- the contrast

    def _contrast(self, f: Tensor, stream: StreamBatch, at: Progress) -> StepOutput:
        """One term per label, of the deepest features [2n, c, *S] of n patches, first views first."""
        weight, labels = self._weight(at), self._labels(stream)
        output = StepOutput({}, {"contrast_weight": weight})
        f = self._standardized(f)
        for kind in self.kinds:
            e, label = self.parts.trained[f"project_{kind}"](f), labels[kind]
            rows, bank = Rows(e, label.values.repeat(2), label.known.repeat(2)), self._bank(kind)
            if bank is not None:  # a patch of an earlier step is another one, whatever its index was
                kept = MetaLabel(label.values * 0 - 1, label.known & False) if kind == INSTANCE else label
                self._fresh[kind] = (e[: len(stream)].detach(), kept)
            loss = self._term(kind, rows, bank, at, output)
            output.losses[f"contrast_{kind}"] = weight * loss
            output.measures[f"contrast_{kind}"] = loss.detach()
        return output

    def _standardized(self, f: Tensor) -> Tensor:
        """Means over space [2n, c], less their running mean, in units of their running deviation; no gradient there."""
        pooled, moments = f.float().flatten(2).mean(2), self.parts.memory["pooled"]
        moments.update(pooled.detach(), torch.zeros(len(pooled), dtype=torch.long, device=f.device))
        return (pooled - moments.mean[0].clone()) / (moments.cov[0].clone() + EPS).sqrt()

    def _term(self, kind: str, rows: Rows, bank: Rows | None, at: Progress, output: StepOutput) -> Tensor:
        """The loss of one label, and what it acts on."""
        if not has_negatives(rows, bank):
            if kind not in self._reported:
                logger.info("spcl: a step had one %s only and nothing to tell it from; such steps go without", kind)
            self._reported.add(kind)
            return connected_zero(rows.e)
        pairs, gamma = pair_losses(rows, self.settings.temperature, bank), None
        if kind != INSTANCE and self.settings.self_pacing != "off":  # a patch and its other view are alike for certain
            gamma = tolerance(through_phase(at), *self._gammas(kind), candidates=pairs.values.shape[1] - 1)
            output.measures[f"{kind}_gamma"] = gamma
        mode: Literal["linear", "hard"] = "hard" if self.settings.self_pacing == "hard" else "linear"
        w = torch.ones_like(pairs.values) if gamma is None else self_paced_weights(pairs.values, gamma, mode)
        mean_weight = mean_of_pairs(pairs, w)
        output.measures[f"{kind}_pair_weight"] = mean_weight
        output.measures[f"{kind}_pairs_used"] = mean_of_pairs(pairs, w > 0)
        output.measures[f"{kind}_anchors"] = pairs.anchors.float().mean()
        loss = mean_over_anchors(pairs, w)
        return loss / mean_weight.clamp(min=SMALLEST_MEAN) if self.settings.correct_grad else loss

    def _gammas(self, kind: str) -> tuple[float, float]:
        settings = self.settings
        start, end = GAMMAS_OF_POSITION_ALONE if self.kinds == ("position",) else GAMMAS[kind]
        return settings.gamma_start or start, settings.gamma_end or end

    def _weight(self, at: Progress) -> float:
        return self.settings.lambda_pre if at.phase == PRETRAINING else self.settings.lambda_contrast

    def _nothing(self, kind: str) -> Tensor:
        return connected_zero(next(self.parts.trained[f"project_{kind}"].parameters()))


def warm_up_and_poly(at: Progress) -> float:
    """Half of: a straight line over the first 5 % of the phase, times (1 - u) ** 0.9."""
    return PRETRAINING_RATE * min(1.0, through_phase(at) / WARM_UP) * poly_over_phase(at)


def through_phase(at: Progress) -> float:
    """Fraction of the phase that lies behind when the step is done: the last step has 1, and none has 0."""
    return (at.step + 1 - at.phase_start) / (at.phase_end - at.phase_start)


def tolerance(u: float, gamma_0: float, gamma_1: float, candidates: int = CANDIDATES) -> float:
    """γ at the fraction u of a phase: γ0 + (γ1 - γ0)·√u.

    γ0 is scaled by log(candidates) / log(59), because ℓ of a network that tells nothing apart is the logarithm of the
    number of candidates.
    """
    gamma_0 *= math.log(max(candidates, 2)) / math.log(CANDIDATES)
    return gamma_0 + (gamma_1 - gamma_0) * math.sqrt(u)
