"""Multiscale contrast with cross-supervision: two disturbed networks, and the contrast of cells and of voxels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from autossl.networks.features import Skips, forward_features, tap_channels
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    MethodSettings,
    Needs,
    Parts,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    derive_seed,
    setting,
)
from autossl.trainers.components.augment import Perturbation, StrongAugment, perturb_features
from autossl.trainers.components.banks import ClassBank
from autossl.trainers.components.class_contrast import (
    Topic,
    cell_rows,
    cells_per_axis,
    contrast_with_bank,
    voxel_rows,
)
from autossl.trainers.components.contrast import Rows
from autossl.trainers.components.heads import Projector
from autossl.trainers.components.losses import hard_label_loss
from autossl.trainers.components.masks import box_mask
from autossl.trainers.components.pseudo import pseudo_label
from autossl.trainers.components.schedules import linear_ramp, sigmoid_ramp
from autossl.trainers.components.shapes import boundary_band

logger = logging.getLogger(__name__)

OURS = "ours: the paper's value is not public"
OTHER = {"a": "b", "b": "a"}
KINDS: tuple[Perturbation, ...] = ("noise", "attention", "dropout")
STRIDE = 8
"""The contrast of cells looks at the decoder stage whose down-sampling is nearest to this."""
CONTRAST_RAMP = (0.1, 0.3)
"""Fractions of the run at which the contrast sets in, since it needs pseudo-labels, and has its full weight."""
CUTOUT_CHANCE, CUTOUT_SIDE = 0.2, 0.25
"""Of an emptied box in the disturbed input, and its side as a share of the patch."""
BAND = 2
"""Voxels on both sides of a border from which half of the sampled voxels come."""
DIMS = {"patch": 128, "pixel": 64}
BANK_ROWS = {"patch": 256, "pixel": 1024}
"""Per class."""
MOST_REGIONS = 4
"""Regions that are contrasted in one step."""
FEW_FOREGROUND, SHARE_OF_RUN, FEWEST_STEPS = 0.1, 0.02, 20
"""A collapse: foreground below this share of the labeled one, for so much of the run, and at least so many steps."""


class MultiscaleContrastSettings(MethodSettings):
    """What can be changed with --set."""

    lambda_cs: float = setting(1.0, "weight of the cross-supervision after its ramp", OURS, ge=0)
    ramp_end: float = setting(0.4, "fraction of the run at which that ramp ends", OURS, ge=0)
    r_warm: float | None = setting(
        None, "fraction of the run up to which cross-supervision is off; None: the plan's", "ours: 0.02", ge=0, le=1
    )
    lambda_p: float = setting(0.1, "weight of the contrast of cells (patches of the patch)", OURS, ge=0)
    lambda_x: float = setting(0.1, "weight of the contrast of voxels", OURS, ge=0)
    tau: float = setting(0.1, "temperature of the contrast", "Wang et al., ICCV 2021", gt=0)
    threshold: float = setting(0.8, "confidence of both networks from which a pseudo-label is contrasted", OURS, ge=0)
    perturb: Literal["both", "input", "features", "none"] = setting(
        "both", "what one network's input and the other's features undergo", "the paper: both"
    )
    labeled_only: bool = setting(False, "without unlabeled cases: contrast of labeled features", "ours")
    single: Literal["A", "B"] | None = setting(None, "one network predicts; None: their mean", "ours")


class CleanLabels(NamedTuple):
    """What both networks say about undisturbed unlabeled patches; nothing in here has a gradient."""

    given: dict[str, Tensor]
    """By network: int64 [B, 1, *S]; regions 0/1 [B, C, *S]."""
    common: Tensor
    """The decision of their mean, which is that of both where they agree."""
    reliable: Tensor
    """Boolean, shaped like `common`: both decide alike, are confident, and the voxel is valid."""
    doubt: Tensor
    """0, or nan where a network said nothing finite: hard labels hide that, and the loop must drop the term."""


class MultiscaleContrast(SemiSupervisedTrainer):
    """Two networks see differently disturbed versions of a patch, one a disturbed image, the other disturbed features;
    each must say what the other says about the clean patch. Embeddings of cells (context) and of voxels, half of them
    near borders, are pulled together within a class and pushed apart between classes, by true labels where there are
    some and by pseudo-labels that both networks are sure of elsewhere. Neither code nor the body of the paper is
    public: the three ideas are the abstract's, all else (two networks, cells, banks, weights) is reconstruction."""

    name = "mcl_cs"
    title = "Multiscale contrastive learning with cross-supervision of two networks"
    citation = (
        "W. Wu, J. Yan, D. Liang, Z. Zhang, Z.-C. Li. Semi-supervised Medical Image Segmentation with Multiscale "
        "Contrastive Learning and Cross-Supervision. IEEE EMBC 2023. doi:10.1109/EMBC40787.2023.10341018."
    )
    needs = Needs(networks=2)
    Settings = MultiscaleContrastSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_cs", "lambda_p", "lambda_x")
    ablation = {"lambda_p": "0", "lambda_x": "0"}
    settings: MultiscaleContrastSettings

    def build(self) -> Parts:
        job, plan = self.job, self.job.configuration
        if self._is_supervised:
            return Parts(trained={"network": job.build_network()})
        self.augment = StrongAugment(plan.spacing, job.channel_std, plan.use_mask_for_norm)
        strides = plan.architecture.cumulative_strides[:-1]
        stage = min(range(len(strides)), key=lambda i: sum(abs(math.log2(s / STRIDE)) for s in strides[i]))
        positions = [size // stride for size, stride in zip(plan.patch_size, strides[stage], strict=True)]
        cells = cells_per_axis(plan.patch_size, plan.spacing, positions)
        self.taps = {"patch": f"dec:{len(strides) - 1 - stage}", "pixel": "dec:last"}
        trained: dict[str, nn.Module] = {
            f"network_{key}": job.build_network(f"network_{key}", architecture=plan.architecture) for key in OTHER
        }
        parts = Parts(trained, memory={"few_foreground_steps": 0, "cross_halved": False})
        options: dict[str, dict[str, Any]] = {"patch": {"pool": cells}, "pixel": {"norm": None}}
        n_classes = job.schema.n_outputs * (2 if job.schema.has_regions else 1)
        for scale in self._scales:
            width, seed = tap_channels(plan.architecture, self.taps[scale]), derive_seed(job.seed, f"{scale} head")
            trained[f"{scale}_head"] = Projector(width, DIMS[scale], **options[scale], seed=seed)
            parts.memory[f"{scale}_bank"] = ClassBank(n_classes, DIMS[scale], BANK_ROWS[scale])
        self._fresh: list[tuple[str, Rows]] = []
        self._few_foreground: Tensor | None = None
        return parts

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled, unlabeled = batch.labeled, batch.unlabeled
        self._fresh, self._few_foreground = [], None
        weights = self._weights(at, unlabeled is not None)
        if not any(weights.values()):  # each network takes its own supervised step
            return StepOutput(self._supervised({key: net(labeled.image) for key, net in self._networks.items()}, batch))
        clean = self._clean_labels(unlabeled) if unlabeled is not None else None
        z, maps = self._disturbed(batch, at)
        losses = self._supervised({k: [level[: len(labeled)] for level in levels] for k, levels in z.items()}, batch)
        measures: dict[str, Tensor | float] = {f"{name}_weight": weight for name, weight in weights.items()}
        terms: dict[str, Tensor] = {}
        if unlabeled is not None and clean is not None:
            measures |= self._agreement(clean, labeled, unlabeled)
            if weights["cross"] > 0:
                judged = {key: [level[len(labeled) :] for level in levels] for key, levels in z.items()}
                terms["cross"] = self._cross(judged, clean, unlabeled.valid)
        if weights["patch_contrast"] or weights["pixel_contrast"]:
            valid = labeled.valid if unlabeled is None else torch.cat([labeled.valid, unlabeled.valid])
            found, seen = self._contrasts(maps, self._topics(batch, clean, at), valid, at)
            terms |= found
            measures |= seen
        losses |= {name: weights[name] * term for name, term in terms.items()}
        return StepOutput(losses, measures | {name: term.detach() for name, term in terms.items()})

    def after_step(self, at: Progress) -> None:
        memory = self.parts.memory
        for bank, rows in self._fresh:
            memory[bank].push(rows.e, rows.labels)
        early = at.fraction < self.settings.ramp_end  # supervised runs, too, begin with a stretch of background alone
        if self._few_foreground is None or memory["cross_halved"] or early:
            return
        few = bool(self._few_foreground)
        memory["few_foreground_steps"] = memory["few_foreground_steps"] + 1 if few else 0
        if memory["few_foreground_steps"] >= max(FEWEST_STEPS, SHARE_OF_RUN * at.total):
            memory["cross_halved"] = True
            logger.warning(
                "mcl_cs: for %d steps both networks found hardly any foreground in unlabeled patches, below %.0f %% of "
                "its share in the labeled ones; they may confirm each other's background. Cross-supervision is halved "
                "from here on. What to do: lower --set lambda_cs, or use more labeled cases",
                memory["few_foreground_steps"],
                100 * FEW_FOREGROUND,
            )

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        single = self.settings.single
        return self._of_both() if single is None else self.job.single_network_prediction(f"network_{single.lower()}")

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        if self._is_supervised:
            return {}
        if self.settings.single:
            return {"mean": self._of_both()}
        return {name: self.job.single_network_prediction(name) for name in ("network_a", "network_b")}

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    @property
    def _networks(self) -> dict[str, nn.Module]:
        """By key; without unlabeled cases the twin's network alone."""
        trained = self.parts.trained
        return {name.removeprefix("network_"): net for name, net in trained.items() if name.startswith("network")}

    @property
    def _scales(self) -> list[str]:
        """Those whose contrast has a weight."""
        return [
            name for name, weight in (("patch", self.settings.lambda_p), ("pixel", self.settings.lambda_x)) if weight
        ]

    def _weights(self, at: Progress, has_unlabeled: bool) -> dict[str, float]:
        settings, r = self.settings, at.fraction
        if self._is_supervised:
            return {}
        r_warm = self.job.warm_up_fraction if settings.r_warm is None else settings.r_warm
        cross = settings.lambda_cs * sigmoid_ramp(r, settings.ramp_end) if has_unlabeled and r >= r_warm else 0.0
        contrast = linear_ramp(r, *CONTRAST_RAMP)
        return {
            "cross": cross / 2 if self.parts.memory["cross_halved"] else cross,
            "patch_contrast": settings.lambda_p * contrast,
            "pixel_contrast": settings.lambda_x * contrast,
        }

    def _supervised(self, z: Mapping[str, Sequence[Tensor]], batch: Batch) -> dict[str, Tensor]:
        labeled = batch.labeled
        loss = {key: self.job.supervised_loss(levels, labeled.target, labeled.valid) for key, levels in z.items()}
        return {"supervised" if key == "network" else f"supervised_{key}": term for key, term in loss.items()}

    @torch.no_grad()
    def _clean_labels(self, unlabeled: StreamBatch) -> CleanLabels:
        regions = self.job.schema.has_regions
        q = [self.job.probabilities(net(unlabeled.image)[0]) for net in self._networks.values()]
        torch.clear_autocast_cache()  # older torch keeps weights that were cast without a gradient for the next pass
        (first, sure), (second, also_sure) = (pseudo_label(one, regions) for one in q)
        common, _ = pseudo_label((q[0] + q[1]) / 2, regions)
        confident = torch.minimum(sure, also_sure) >= self.settings.threshold
        reliable = (first == second) & confident & unlabeled.valid
        return CleanLabels({"a": first, "b": second}, common, reliable, 0 * (sure.mean() + also_sure.mean()))

    def _disturbed(self, batch: Batch, at: Progress) -> tuple[dict[str, list[Tensor]], dict[str, dict[str, Tensor]]]:
        """Logits of all levels and the tapped maps of both networks; labeled patches stay as they are."""
        labeled, unlabeled, perturb = batch.labeled, batch.unlabeled, self.settings.perturb
        of_input = self._with_disturbed_input(at)
        z, maps = {}, {}
        for key, net in self._networks.items():
            image, change = labeled.image, None
            if unlabeled is not None:
                seen = unlabeled.image
                if key == of_input and perturb in ("both", "input"):
                    seen = self._disturbed_input(unlabeled, at)
                if key != of_input and perturb in ("both", "features"):
                    change = self._disturbed_features(len(labeled), at)
                image = torch.cat([image, seen])
            z[key], maps[key] = forward_features(net, image, list(self.taps.values()), perturb=change)
        return z, maps

    def _with_disturbed_input(self, at: Progress) -> str:
        """Which network has the disturbed input in this step; the other one has disturbed features."""
        return "a" if float(torch.rand((), generator=at.generator("roles"))) < 0.5 else "b"

    def _disturbed_input(self, unlabeled: StreamBatch, at: Progress) -> Tensor:
        """Other intensities and, in some patches, a box of 0, the mean of normalized images."""
        image, cutout = unlabeled.image, at.generator("cutout")
        strong = self.augment(image, at.generator("intensity", image.device), unlabeled.valid)
        kept = box_mask(len(image), image.shape[2:], cutout, CUTOUT_SIDE, shared=False)
        spared = torch.rand(len(image), generator=cutout) >= CUTOUT_CHANCE
        kept = kept | spared.view(-1, *[1] * (image.ndim - 1))
        return torch.where(kept.to(image.device) | ~unlabeled.valid, strong, 0)

    def _disturbed_features(self, n_clean: int, at: Progress) -> Callable[[Skips], Skips]:
        """Changes skips and bottleneck of the patches behind the first n, in one way per step."""
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=at.generator("kind of perturbation")))]

        def change(skips: Skips) -> Skips:
            generator = at.generator("feature perturbation", skips[0].device)
            changed = perturb_features([f[n_clean:] for f in skips], kind, generator)
            return [torch.cat([f[:n_clean], c]) for f, c in zip(skips, changed, strict=True)]

        return change

    def _cross(self, z: Mapping[str, Sequence[Tensor]], clean: CleanLabels, valid: Tensor) -> Tensor:
        """Half the sum of what both networks pay for the other's labels, on all levels."""
        regions = self.job.schema.has_regions
        costs = [hard_label_loss(z[key], clean.given[other], valid, regions=regions) for key, other in OTHER.items()]
        return torch.stack(costs).sum() / 2 + clean.doubt

    @torch.no_grad()
    def _agreement(self, clean: CleanLabels, labeled: StreamBatch, unlabeled: StreamBatch) -> dict[str, Tensor]:
        """Measures; and whether the networks find next to no foreground."""
        found = torch.stack([_foreground_share(given, unlabeled.valid) for given in clean.given.values()]).mean()
        self._few_foreground = found < FEW_FOREGROUND * _foreground_share(labeled.target, labeled.valid)
        n_valid = unlabeled.valid.sum().clamp(min=1)
        differs = (clean.given["a"] != clean.given["b"]).any(1, keepdim=True) & unlabeled.valid
        return {
            "valid_share": unlabeled.valid.float().mean(),
            "disagreement": differs.sum() / n_valid,
            "reliable_share": clean.reliable.sum() / (n_valid * clean.reliable.shape[1]),
            "foreground_share": found,
        }

    # ------------------------------------------------------------------------------------------------------- contrast

    def _topics(self, batch: Batch, clean: CleanLabels | None, at: Progress) -> list[Topic]:
        """All classes together; regions each for itself, at most four of them in a step."""
        labels, reliable = batch.labeled.target.long(), batch.labeled.valid.expand_as(batch.labeled.target)
        inside = torch.ones_like(batch.labeled.valid)  # its valid tells of ignored voxels, which are in the image
        if clean is not None and batch.unlabeled is not None:
            labels, reliable = torch.cat([labels, clean.common.long()]), torch.cat([reliable, clean.reliable])
            inside = torch.cat([inside, batch.unlabeled.valid])
        if not self.job.schema.has_regions:
            return [Topic(labels, reliable, self.job.schema.n_outputs, inside=inside)]
        chosen = torch.randperm(labels.shape[1], generator=at.generator("regions"))[:MOST_REGIONS].sort().values
        return [Topic(labels[:, [r]], reliable[:, [r]], 2, 2 * r, inside) for r in chosen.tolist()]

    def _contrasts(
        self, maps: Mapping[str, Mapping[str, Tensor]], topics: Sequence[Topic], valid: Tensor, at: Progress
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """The contrast of each scale that has a head, averaged over the topics, and how much takes part in it."""
        terms, measures = {}, {}
        for scale in self._scales:
            both = [tapped[self.taps[scale]] for tapped in maps.values()]
            head, bank = self.parts.trained[f"{scale}_head"], self.parts.memory[f"{scale}_bank"]
            if scale == "patch":
                grids = [head(features) for features in both]
                found = [cell_rows(grids, topic) for topic in topics]
            else:
                grids, found = both, [self._voxel_rows(both, head, topic, valid, at) for topic in topics]
            pairs = zip(found, topics, strict=True)
            losses = [contrast_with_bank(rows, bank, topic, self.settings.tau) for rows, topic in pairs]
            terms[f"{scale}_contrast"] = torch.stack(losses).mean()
            places = sum(grid[:, 0].numel() for grid in grids) * len(topics)
            measures[f"{scale}_share"] = sum(len(rows.labels) for rows in found) / places
            self._fresh += [(f"{scale}_bank", Rows(rows.e.detach(), rows.labels)) for rows in found]
        return terms, measures

    def _voxel_rows(
        self, features: Sequence[Tensor], head: nn.Module, topic: Topic, valid: Tensor, at: Progress
    ) -> Rows:
        """Embedded after they were drawn, which is cheaper than a map of embeddings."""
        band = boundary_band(topic.labels, BAND, self.job.configuration.spacing, valid)
        rows = voxel_rows(features, topic, band, at.generator(f"voxels {topic.first}", valid.device))
        return Rows(head(rows.e), rows.labels)

    def _of_both(self) -> PredictionSpec:
        a, b = (self.job.single_network_prediction(f"network_{key}") for key in OTHER)
        return PredictionSpec(members=a.members + b.members, activation=a.activation, combine="mean_probabilities")


def _foreground_share(labels: Tensor, valid: Tensor) -> Tensor:
    """Of the valid voxels, those of any class or region."""
    return ((labels > 0).any(1, keepdim=True) & valid).sum() / valid.sum().clamp(min=1)
