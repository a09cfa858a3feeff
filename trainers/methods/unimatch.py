"""UniMatch: two strong views and one of perturbed features, all taught by the weak view."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from autossl.networks.features import decode, encode
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import Batch, Needs, Parts, Progress, SemiSupervisedTrainer, StepOutput, setting
from autossl.trainers.components.augment import channel_dropout
from autossl.trainers.components.weak_to_strong import WeakToStrong, WeakToStrongSettings, confidence_memory

FEATURE_SHARE = 0.5
"""Weight of the stream of perturbed features; the strong views share the rest (UniMatch: ¼, ¼, ½)."""


class UniMatchSettings(WeakToStrongSettings):
    """What can be changed with --set."""

    streams: Literal[1, 2] = setting(2, "strongly augmented views of each patch; 1 saves memory", "UniMatch")
    feature_dropout: float = setting(
        0.5, "probability that a channel of the weak view's features is set to 0", "UniMatch", ge=0, lt=1
    )
    fp_stages: int | None = setting(
        None,
        "perturb only so many of the encoder's stages, the deepest; None: all",
        "UniMatch: all of its five; the limit is ours",
        ge=1,
    )


class UniMatch(SemiSupervisedTrainer):
    """FixMatch with more ways to be disturbed: two independent strong views of each unlabeled patch, and a third stream
    that decodes the weak view's features with half of their channels missing. The confident decisions on the
    undisturbed weak view are the labels of all three, so that images and features are explored alike."""

    name = "unimatch"
    title = "UniMatch: two strong views and perturbed features, labeled by the weak view"
    citation = (
        "L. Yang, L. Qi, L. Feng, W. Zhang, Y. Shi. Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic "
        "Segmentation. CVPR 2023. arXiv:2208.09910."
    )
    needs = Needs(strong_view=True)
    Settings = UniMatchSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_max",)
    settings: UniMatchSettings

    def build(self) -> Parts:
        self.weak_to_strong = WeakToStrong(self.job, self.settings)
        return Parts(trained={"network": self.job.build_network()}, memory=confidence_memory(self.job))

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        network, labeled, unlabeled = self.parts.trained["network"], batch.labeled, batch.unlabeled
        weight = self.weak_to_strong.weight(at)
        if weight == 0 or unlabeled is None:  # without the terms the step is the twin's, bit for bit
            z = network(labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})

        n_labeled = len(labeled)
        skips = encode(network, torch.cat([labeled.image, unlabeled.weak]))
        z, _ = decode(network, skips)
        weak = self.weak_to_strong.weak_view(unlabeled, z[0][n_labeled:])
        z_features, _ = decode(network, self._perturbed([skip[n_labeled:] for skip in skips], at))
        names = [f"strong_{index}" for index in range(1, self.settings.streams + 1)]
        views = [self.weak_to_strong.strong_view(weak, labeled, at, name) for name in names]
        z_strong = network(torch.cat([view.image for view in views]))

        terms = {}
        for index, (name, view) in enumerate(zip(names, views, strict=True)):
            rows = slice(index * len(unlabeled), (index + 1) * len(unlabeled))
            terms[name] = self.weak_to_strong.loss([level[rows] for level in z_strong], view)
        terms["features"] = self.weak_to_strong.loss(z_features, weak)
        shares = {**dict.fromkeys(names, (1 - FEATURE_SHARE) / len(names)), "features": FEATURE_SHARE}
        supervised = self.job.supervised_loss([level[:n_labeled] for level in z], labeled.target, labeled.valid)
        return StepOutput(
            {"supervised": supervised, **{name: weight * shares[name] * term for name, term in terms.items()}},
            {
                **{name: term.detach() for name, term in terms.items()},
                **{f"{name}_weight": weight * share for name, share in shares.items()},
                **self.weak_to_strong.watch(weak, at, self.parts.memory, self.name),
            },
        )

    def _perturbed(self, skips: list[Tensor], at: Progress) -> list[Tensor]:
        """Feature maps, full resolution first, with channels dropped in the deepest stages; each map draws anew."""
        generator = at.generator("feature dropout")
        untouched = max(0, len(skips) - (self.settings.fp_stages or len(skips)))
        dropped = [channel_dropout(skip, self.settings.feature_dropout, generator) for skip in skips[untouched:]]
        return skips[:untouched] + dropped

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("network")
