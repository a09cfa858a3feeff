"""DTC: a mask and a distance map of the same structure must agree, on labeled and unlabeled patches."""

from __future__ import annotations

import torch
from torch import Tensor

from autossl.networks.decoders import DistanceHead
from autossl.networks.features import forward_features, tap_channels
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
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp

RELEASE = "Luo et al. 2021, released code"
MOST_CLASSES = 16
"""With more structures so many are drawn per step (ours)."""
MOST_IGNORED = 0.3
"""Patches with a larger share of ignored voxels teach no distances: too much of their boundary is unknown (ours)."""
REACH_VOXELS = 100
"""Up to this distance from a boundary `steepness` is taken as it is (ours)."""


class DualTaskConsistencySettings(MethodSettings):
    """What can be changed with --set."""

    lambda_max: float = setting(1.0, "weight of the agreement after its ramp", RELEASE, ge=0)
    ramp_end: float = setting(1.0, "fraction of the run at which the ramp ends", RELEASE, ge=0)
    beta: float = setting(0.3, "weight of the distances on labeled patches", RELEASE, ge=0)
    steepness: float = setting(
        1500.0,
        "of the sigmoid that makes a mask of a distance; grows with patches above 200 voxels, where a voxel is less of "
        "the largest distance",
        RELEASE,
        gt=0,
    )
    labeled_only: bool = setting(False, "without unlabeled cases: both tasks on the labeled ones", "ours")


class DualTaskConsistency(SemiSupervisedTrainer):
    """A second head regresses the signed distance to each structure's boundary. A steep sigmoid makes a mask of it, and
    on all patches, labeled or not, this mask and the segmentation must agree. Geometry steadies the segmentation, and
    two tasks that differ need neither perturbation nor a second pass."""

    name = "dtc"
    title = "DTC: consistency between segmentation and signed distance"
    citation = (
        "X. Luo, J. Chen, T. Song, G. Wang. Semi-supervised Medical Image Segmentation through Dual-task Consistency. "
        "AAAI 2021. arXiv:2009.04448."
    )
    needs = Needs(signed_distance=True)
    Settings = DualTaskConsistencySettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max", "beta")
    settings: DualTaskConsistencySettings

    def build(self) -> Parts:
        job, trained = self.job, {"network": self.job.build_network()}
        if job.has_unlabeled or self.settings.labeled_only:
            plan = job.configuration
            width = tap_channels(plan.architecture, "dec:last")
            seed = derive_seed(job.seed, "distance head")
            trained["distance_head"] = DistanceHead(width, self._n_structures, plan.dims, seed)
        return Parts(trained)

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, settings = self.parts.trained["network"], batch.labeled, self.settings
        weight = settings.lambda_max * sigmoid_ramp(at.fraction, settings.ramp_end)
        if "distance_head" not in self.parts.trained or (weight == 0 and settings.beta == 0):
            z = network(labeled.image)  # the twin's step, bit for bit
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        unlabeled = batch.unlabeled if weight > 0 else None
        x = labeled.image if unlabeled is None else torch.cat([labeled.image, unlabeled.image])
        z, maps = forward_features(network, x, ("dec:last",))
        classes = self._drawn_classes(labeled, at)
        s = self.parts.trained["distance_head"](maps["dec:last"], classes)
        z_labeled = [level[: len(labeled)] for level in z]
        regression, used = distance_loss(s[: len(labeled)], _chosen(_distances(labeled), classes), labeled.valid)
        losses = {
            "supervised": self.job.supervised_loss(z_labeled, labeled.target, labeled.valid),
            "supervised_distance": settings.beta * regression,
        }
        measures: dict[str, Tensor | float] = {
            "distance": regression.detach(),
            "distance_weight": settings.beta,
            "distance_share": used,
            "boundary_share": (s.detach().abs() < 0.005).float().mean(),  # where the agreement moves the distances
        }
        if weight > 0:
            p = _chosen(self.job.probabilities(z[0])[:, 0 if self.job.schema.has_regions else 1 :], classes)
            # without a label there is nothing to ignore: only voxels outside an unlabeled image do not count
            counted = torch.ones_like(labeled.valid)
            counted = counted if unlabeled is None else torch.cat([counted, unlabeled.valid])
            agreement = probability_mse(mask_of_distance(s, self.steepness), p, counted)
            losses["consistency"] = weight * agreement
            measures |= {"consistency": agreement.detach(), "consistency_weight": weight}
            measures["valid_share"] = counted.float().mean()
        return StepOutput(losses, measures)

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")

    @property
    def steepness(self) -> float:
        """k: a distance map is divided by its largest distance, which for a structure in the middle of the patch is
        about half of the patch's longest side."""
        reach = max(self.job.configuration.patch_size) / 2
        return self.settings.steepness * max(1.0, reach / REACH_VOXELS)

    @property
    def _n_structures(self) -> int:
        return len(self.job.schema.foreground)

    def _drawn_classes(self, labeled: StreamBatch, at: Progress) -> list[int] | None:
        """Structures of this step, those that the labeled patches hold first; None: all."""
        if self._n_structures <= MOST_CLASSES:
            return None
        present = (_distances(labeled).flatten(2).amin((0, 2)) < 1).tolist()  # a map of an absent one is 1 everywhere
        order = torch.randperm(self._n_structures, generator=at.generator("distance classes")).tolist()
        return sorted(sorted(order, key=lambda structure: not present[structure])[:MOST_CLASSES])


def mask_of_distance(s: Tensor, steepness: float) -> Tensor:
    """sigmoid(-k·s) in float32: 1 inside, 0 outside, ½ on the boundary."""
    return torch.sigmoid(-steepness * s.float())


def distance_loss(s: Tensor, distances: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of (s - φ)² over the valid voxels of the patches with few ignored ones, and the share of all voxels used.

    Args:
        s: predicted distances [B, F, *S].
        distances: φ, of the same shape.
        valid: boolean [B, 1, *S], false where ignored.
    """
    few = (~valid).flatten(1).float().mean(1) <= MOST_IGNORED
    used = valid & few.view(-1, *[1] * (valid.ndim - 1))
    return probability_mse(s, distances, used), used.float().mean()


def _distances(labeled: StreamBatch) -> Tensor:
    if labeled.signed_distances is None:
        raise ValueError("the labeled patches have no signed distance maps; the loader makes them for dtc")
    return labeled.signed_distances


def _chosen(maps: Tensor, classes: list[int] | None) -> Tensor:
    return maps if classes is None else maps[:, classes]
