"""M&N: a 2D network that knows photographs and a 3D network that knows nothing teach each other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn

from autossl.data.problems import InvalidInput, Problem
from autossl.networks.build import set_deep_supervision
from autossl.networks.encoders2d import STRIDES, pretrained_encoder, read_encoder_weights
from autossl.networks.prediction import PredictionSpec
from autossl.networks.slices import PretrainedUNet, SliceWise, plane_architecture
from autossl.trainers.base import (
    Batch,
    BatchRequest,
    Job,
    MethodSettings,
    Needs,
    ParameterGroup,
    Parts,
    Phase,
    Progress,
    Refresh,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    StreamRequest,
    derive_seed,
    setting,
)
from autossl.trainers.components.losses import one_hot
from autossl.trainers.components.masks import through_plane_axis
from autossl.trainers.components.soft_targets import soft_target_loss

logger = logging.getLogger(__name__)

RELEASE = "Yeung et al. 2025, released code"
LABELED, CO_TRAINING = "labeled only", "co-training"
STORE = "foreground"
LATER_REFRESHES = (0.25, 0.375, 0.5, 0.75)
"""Of the run; the first one is where co-training begins."""
SHORT = {"model_2d": "2d", "model_3d": "3d"}
PARTNER = {"model_2d": "model_3d", "model_3d": "model_2d"}
FEWEST_BLOCKS = 8
RELEASE_STEPS = 32_000


class MAndNSettings(MethodSettings):
    """What can be changed with --set."""

    encoder2d: Literal["pretrained", "scratch"] = setting(
        "pretrained", "scratch: a 2D U-Net that knows nothing, which is no M&N: for comparison only", RELEASE
    )
    weights: Path | None = setting(
        None,
        "file of an encoder (residual network or EfficientNet; mind its license); None: EfficientNet-Lite0 on ImageNet",
        "ours: the release takes SegFormer-B2 on ADE20K",
    )
    r_1: float = setting(0.125, "fraction of the run with labeled patches alone", RELEASE, gt=0, lt=1)
    block_steps: int = setting(8, "steps that one network trains before the other; fewer in short runs", RELEASE, ge=1)
    lrg: Literal["stochastic", "floor", "half"] = setting(
        "stochastic",
        "pseudo-labeled patches of a batch: the growing share on average, its floor, or half of them throughout",
        "ours: with few patches the release's floor gives none until late",
    )
    share_max: float = setting(1.0, "the share of pseudo-labeled patches is multiplied by it", RELEASE, ge=0, le=1)
    lr_2d: float = setting(1e-3, "learning rate of the 2D network (AdamW)", RELEASE, gt=0)
    encoder_rate: float = setting(0.1, "of lr_2d that the pretrained encoder gets", "ours: the release uses LoRA", ge=0)
    opt3d: Literal["adamw", "sgd"] = setting("adamw", "optimizer of the 3D network", RELEASE)
    lr_3d: float | None = setting(
        None,
        "its learning rate; None: 1e-2 with sgd; with adamw 1e-4, times 32 000 / steps in shorter runs, at most 1e-3",
        f"{RELEASE}, 32 000 steps; ours in shorter runs, which end before 1e-4 gets anywhere",
        gt=0,
    )
    weight_decay: float = setting(0.01, "of AdamW", "PyTorch's default", ge=0)
    warm_up: float = setting(0.0125, "fraction of the run in which the learning rate grows", RELEASE, ge=0)
    slice_axis: Literal["first", "random"] = setting(
        "first", "random: isotropic volumes are cut along an axis that is drawn at each step", "ours"
    )
    guided_crops: bool = setting(
        True, "a third of the unlabeled patches lie on foreground that the 3D network predicts", f"{RELEASE}: half"
    )
    labeled_only: bool = setting(False, "without unlabeled cases: two networks that learn apart", "ours")

    @field_validator("weights")
    @classmethod
    def _from_anywhere(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()


class MAndN(SemiSupervisedTrainer):
    """A 2D network with an encoder pretrained on photographs learns from few labels faster than a 3D network that
    starts from nothing, but sees no context between slices. Both first learn on the labeled patches. Then they take
    turns: the one that rests gives its probabilities on unlabeled patches, cut into slices for the 2D network and
    stacked again, and the other one learns on labeled and pseudo-labeled patches alike. The share of pseudo-labeled
    patches grows while the learning rate falls, because small steps do less harm where a target is wrong. The 3D
    network is deployed.

    Faithful to the released code: the loss, both stages, the turns, learning rates and schedule.
    Ours: the encoder and its fine-tuning (the release adapts SegFormer-B2 by LoRA, which is left out), the share as
    an expectation, guided crops for a third of the patches (half there), no Dice of classes that are absent, deep
    supervision of the 3D network, refreshes as fractions of the run, a higher learning rate of the 3D network in short
    runs. The paper may define the share by the learning
    rate itself; the released code uses the epoch."""

    name = "m_and_n"
    title = "M&N: co-training of a pretrained 2D network and a 3D network from scratch"
    citation = (
        "P.-H. Yeung, J. Ramesh, P. Lyu, A. Namburete, J. Rajapakse. Semi-Supervised 3D Medical Segmentation from 2D "
        "Natural Images Pretrained Model. MLMI at MICCAI 2025. arXiv:2509.15167."
    )
    needs = Needs(networks=2, dims=(3,))
    Settings = MAndNSettings
    reduces_to_supervised = True
    unsupervised_weights = ("share_max",)
    changes_supervised = True
    ablation = {"share_max": "0"}
    settings: MAndNSettings

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        """Without weights it does not begin: a 2D network that knows nothing is never taken silently."""
        if not isinstance(settings, MAndNSettings) or settings.encoder2d == "scratch":
            return []
        if not (job.has_unlabeled or settings.labeled_only):
            return []
        try:
            read_encoder_weights(settings.weights)
        except InvalidInput as error:
            ways = "or give a file with --set weights=PATH, or compare without any by --set encoder2d=scratch"
            return [
                Problem(
                    f"{cls.name} has no pretrained 2D network: {problem.found}",
                    problem.expected,
                    f"{problem.fix}, {ways}",
                    file=problem.file,
                )
                for problem in error.problems
            ]
        return []

    def build(self) -> Parts:
        trained = {"model_3d": self.job.build_network()}
        if self._trains_both:
            trained["model_2d"] = self._model_2d()
        return Parts(trained)

    def _model_2d(self) -> nn.Module:
        job, settings = self.job, self.settings
        if settings.encoder2d == "scratch":
            logger.warning(
                "m_and_n WITHOUT PRETRAINING: encoder2d=scratch trains a 2D network that knows nothing. This is half "
                "of the method, and its figures must not be compared with those of M&N"
            )
            flat = plane_architecture(job.configuration.architecture)
            network = job.build_network("model_2d", architecture=flat)
            set_deep_supervision(network, False)
            return SliceWise(network, max(flat.cumulative_strides[-1]))
        encoder = pretrained_encoder(read_encoder_weights(settings.weights))
        seed = derive_seed(job.seed, "model_2d")
        return SliceWise(PretrainedUNet(encoder, job.channel_std, job.schema.n_outputs, seed), STRIDES[-1])

    # ------------------------------------------------------------------------------------------------------- timetable

    def phases(self) -> list[Phase]:
        if not self._trains_both:
            return super().phases()
        r_1, groups = self.settings.r_1, self._groups()
        refreshes: tuple[Refresh, ...] = ()
        if self._guided:
            later = (Refresh(at, "model_3d", STORE, mirrored=False) for at in LATER_REFRESHES if at > r_1)
            refreshes = (Refresh(None, "model_3d", STORE, mirrored=False), *later)
        return [Phase(LABELED, r_1, groups), Phase(CO_TRAINING, 1 - r_1, groups, refreshes=refreshes)]

    def _groups(self) -> tuple[ParameterGroup, ...]:
        """The 3D network; the encoder of the 2D network; the rest of it."""
        settings, factor, rate_3d = self.settings, warm_restart(self.settings.warm_up), self.settings.lr_3d

        def adamw(prefix: str, rate: float) -> ParameterGroup:
            return ParameterGroup(prefix, "adamw", rate, settings.weight_decay, factor)

        if settings.opt3d == "sgd":
            first = ParameterGroup("model_3d", learning_rate=rate_3d or 1e-2, factor=factor)
        else:
            longer = RELEASE_STEPS / max(1, self.job.total_steps)
            first = adamw("model_3d", rate_3d or 1e-4 * min(max(longer, 1), 10))
        if settings.encoder2d == "scratch":
            return first, adamw("model_2d", settings.lr_2d)
        plane = self.parts.trained["model_2d"].plane
        return first, *(
            adamw(f"model_2d.plane.{name}", settings.lr_2d * (settings.encoder_rate if name == "encoder" else 1))
            for name, module in plane.named_children()  # type: ignore[union-attr]
            if any(True for _ in module.parameters())
        )

    def request(self, at: Progress) -> BatchRequest:
        if not self._trains_both:
            return super().request(at)
        n_pseudo, batch_size = self._n_pseudo(at), self.job.labeled_batch_size
        unlabeled = StreamRequest(n_pseudo)
        if n_pseudo and self._guided:
            unlabeled = StreamRequest(n_pseudo, sampler="pseudo_foreground", store=STORE)
        return BatchRequest(StreamRequest(batch_size - n_pseudo, sampler="foreground"), unlabeled)

    def _share(self, at: Progress) -> float:
        """Of the batch that is to be pseudo-labeled, on average; it grows as the learning rate falls."""
        if at.phase != CO_TRAINING or not self._learns_from_unlabeled:
            return 0.0
        return (0.5 if self.settings.lrg == "half" else at.phase_fraction) * self.settings.share_max

    @property
    def _most_pseudo(self) -> int:
        """A labeled patch stays, unless a batch has but one: then it is labeled or not."""
        return min(max(1, self.job.labeled_batch_size - 1), self.job.unlabeled_batch_size)

    def _expected_share(self, at: Progress) -> float:
        """The mean of what `_n_pseudo` draws, as a share of the batch."""
        wanted, size = self.job.labeled_batch_size * self._share(at), self.job.labeled_batch_size
        return min(math.floor(wanted) if self.settings.lrg == "floor" else wanted, self._most_pseudo) / size

    def _n_pseudo(self, at: Progress) -> int:
        wanted = self.job.labeled_batch_size * self._share(at)
        count = math.floor(wanted)
        if self.settings.lrg != "floor":
            count += int(torch.rand((), generator=at.generator("share")) < wanted - count)
        return min(count, self._most_pseudo)

    def _learner(self, at: Progress) -> str:
        """2D first; blocks are shorter where the stage would have too few of them."""
        length = max(1, min(self.settings.block_steps, (at.phase_end - at.phase_start) // FEWEST_BLOCKS))
        return "model_2d" if (at.step - at.phase_start) // length % 2 == 0 else "model_3d"

    # ------------------------------------------------------------------------------------------------------------ step

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if not self._trains_both:  # the twin, bit for bit
            z = self.parts.trained["model_3d"](labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        if at.phase != CO_TRAINING:
            return StepOutput({f"supervised_{SHORT[name]}": self._labeled_loss(name, labeled, at) for name in SHORT})
        learner = self._learner(at)
        share = {"expected_share": self._expected_share(at), "learner_is_3d": float(learner == "model_3d")}
        if batch.unlabeled is None or not len(batch.unlabeled):
            loss = self._labeled_loss(learner, labeled, at)
            return StepOutput({f"supervised_{SHORT[learner]}": loss}, {"pseudo_share": 0.0, **share}, (learner,))
        output = self._taught(learner, labeled, batch.unlabeled, at)
        output.measures |= share
        return output

    def _labeled_loss(self, name: str, labeled: StreamBatch, at: Progress) -> Tensor:
        z = self._logits(name, labeled.image, at)
        return soft_target_loss(z, self._hard(labeled), labeled.valid, regions=self.job.schema.has_regions)[0]

    def _taught(self, learner: str, labeled: StreamBatch, unlabeled: StreamBatch, at: Progress) -> StepOutput:
        """One batch of labeled patches and of those that the resting partner has labeled."""
        n_labeled, regions = len(labeled), self.job.schema.has_regions
        with resting(self.parts.trained[PARTNER[learner]]):
            q = self.job.probabilities(self._logits(PARTNER[learner], unlabeled.image, at)[0])
        # what is not finite must not reach the labeled patches through the sums of the Dice, but must be seen
        doubt, finite = 0 * q.mean(), torch.isfinite(q).all(1, keepdim=True)
        q = torch.where(finite, q, 0)
        target = torch.cat([self._hard(labeled), q])
        valid = torch.cat([labeled.valid, unlabeled.valid & finite])
        z = self._logits(learner, torch.cat([labeled.image, unlabeled.image]), at)
        supervised, pseudo = soft_target_loss(z, target, valid, n_labeled, regions)
        acting, short = unlabeled.valid & finite, SHORT[learner]
        return StepOutput(
            {**({f"supervised_{short}": supervised} if n_labeled else {}), f"pseudo_{short}": pseudo + doubt},
            {
                f"pseudo_{short}": pseudo.detach(),
                "pseudo_weight": 1.0,
                "pseudo_share": len(unlabeled) / len(target),
                "pseudo_voxel_share": acting.float().mean(),
                "pseudo_foreground_share": _mean_where(self._decided(q) > 0, acting),
                "disagreement": self._disagreement(z[0][n_labeled:].detach(), q, acting),
            },
            (learner,),
        )

    def _logits(self, name: str, image: Tensor, at: Progress) -> list[Tensor]:
        """Of all levels [n, C, *S]."""
        network = self.parts.trained[name]
        return network(image, self._axis(at)) if name == "model_2d" else network(image)

    def _axis(self, at: Progress) -> int:
        """Across which volumes are cut: the coarse axis; of isotropic ones the first or, where asked for, any."""
        coarse = through_plane_axis(self.job.configuration.spacing)
        if coarse is not None or self.settings.slice_axis == "first":
            return coarse or 0
        return int(torch.randint(3, (), generator=at.generator("slice axis")))

    def _hard(self, labeled: StreamBatch) -> Tensor:
        schema = self.job.schema
        return labeled.target if schema.has_regions else one_hot(labeled.target, schema.n_outputs)

    def _decided(self, q: Tensor) -> Tensor:
        """Classes [n, 1, *S]; regions 0/1 [n, C, *S]."""
        return (q > 0.5).long() if self.job.schema.has_regions else q.argmax(1, keepdim=True)

    def _disagreement(self, z: Tensor, q: Tensor, acting: Tensor) -> Tensor:
        """Share of the voxels that both networks do not decide alike."""
        return _mean_where((self._decided(self.job.probabilities(z)) != self._decided(q)).any(1, keepdim=True), acting)

    # ------------------------------------------------------------------------------------------------------ prediction

    def prediction(self) -> PredictionSpec:
        return self.job.single_network_prediction("model_3d")

    @property
    def _learns_from_unlabeled(self) -> bool:
        return self.job.has_unlabeled and self.settings.share_max > 0

    @property
    def _trains_both(self) -> bool:
        return self.job.has_unlabeled or self.settings.labeled_only

    @property
    def _guided(self) -> bool:
        return self._learns_from_unlabeled and self.settings.guided_crops


def warm_restart(warm_up: float) -> Callable[[Progress], float]:
    """The learning rate's factor: up from 0.01 to 1 in this fraction of the run, by a cosine to 0 at the end of the
    first stage, from 1 to 0 in the second."""

    def factor(at: Progress) -> float:
        if at.phase == CO_TRAINING:
            return 0.5 * (1 + math.cos(math.pi * at.phase_fraction))
        if at.fraction < warm_up:
            return 0.01 + 0.99 * at.fraction / warm_up
        end = at.phase_end / max(1, at.total)
        fallen = min(1.0, (at.fraction - warm_up) / max(end - warm_up, 1e-9))
        return 0.5 * (1 + math.cos(math.pi * fallen))

    return factor


@contextmanager
def resting(network: nn.Module) -> Iterator[None]:
    """While it lasts the network is in evaluation mode and nothing gets a gradient."""
    was = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was)


def _mean_where(values: Tensor, acting: Tensor) -> Tensor:
    """Share of the acting voxels at which any channel is true."""
    return (values.any(1, keepdim=True) & acting).sum() / acting.sum().clamp(min=1)
