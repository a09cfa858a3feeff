"""Semi-CML: two modalities of a patient, each with its own network, learn from each other and from the better one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import field_validator
from torch import Tensor, nn

from autossl.data.channels import TOGETHER, Channels
from autossl.data.problems import InvalidInput, Problem
from autossl.networks.prediction import PredictionSpec
from autossl.trainers.base import (
    Batch,
    Job,
    MethodSettings,
    Needs,
    ParameterGroup,
    Parts,
    Phase,
    Progress,
    SemiSupervisedTrainer,
    StepOutput,
    StreamBatch,
    poly_over_phase,
    poly_over_run,
    setting,
)
from autossl.trainers.components.area_similarity import (
    area_similarity_contrast,
    halves_of_axes,
    pairs_that_show_something,
)
from autossl.trainers.components.augment import clipped_noise
from autossl.trainers.components.gated_average import GatedAverage, foreground_score
from autossl.trainers.components.losses import connected_zero, probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.soft_labels import soft_label_loss

CODE = "publicly hosted code derived from Zhang et al. 2023"
RESCALED = f"{CODE}; divided by 10, as its supervised weight"
MUTUAL, RELEARNING = "mutual learning", "re-learning"
SIDES = (1, 2)
OTHER = {1: 2, 2: 1}
POINTS, FIRST_POINT = 50, 0.12
"""The teacher may move at so many evenly spaced points of the first phase, after this fraction of the run (code)."""
LAST_STRETCH = 0.8
"""After this part of the first phase scores decide on the better modality and on its teacher (ours)."""
DICE_WEIGHT = 0.7
"""Of the re-learning loss, beside its cross-entropy (code: 7 and 10)."""
RESTS = 0.8
"""Up to this part of the second phase the better network does not re-learn (code)."""


class SemiCMLSettings(MethodSettings):
    """What can be changed with --set."""

    groups: tuple[str, ...] | None = setting(
        None,
        "two modalities by the names or numbers of their channels, as FLAIR,T1post or 0+1,2; None: the first two "
        "channel_groups of dataset.json, else the first two channels",
        "ours",
    )
    better: Literal["auto", "1", "2"] = setting(
        "auto", "which modality teaches; auto: the one that fits the labeled patches better", f"{CODE}: validation Dice"
    )
    lambda_mse: float = setting(0.1, "weight of the consistency of both modalities after its ramp", RESCALED, ge=0)
    ramp_end: float = setting(2.47, "fraction of the run at which that ramp would end", CODE, ge=0)
    lambda_asc: float = setting(0.35, "weight of the area-similarity contrast", RESCALED, ge=0)
    similarity: Literal["dice", "cos"] = setting("dice", "similarity of two predicted areas", CODE)
    r_prel: float = setting(
        51 / 81, "fraction of the run at which re-learning begins; 1: it never does", CODE, gt=0, le=1
    )
    lambda_prel: float = setting(1.0, "weight of all re-learning terms", RESCALED, ge=0)
    prel_asc: float = setting(0.1, "share of the area-similarity contrast in them", CODE, ge=0, le=1)
    prel_supervised: float = setting(
        1.0, "weight of the labels while re-learning; 0: pseudo-labels alone", f"ours; {CODE}: 0", ge=0
    )
    noise: float = setting(0.1, "sigma of the teacher's input noise, clipped at twice that", f"{CODE}: positive", ge=0)
    draws: int = setting(4, "predictions of the teacher that are averaged", CODE, ge=1)
    labeled_only: bool = setting(False, "without unlabeled cases: both networks, from labels alone", "ours")
    worse_teacher: Literal["replace", "keep"] = setting(
        "replace",
        "a teacher that scores lower on labeled patches than its network, when re-learning begins: replaced by that "
        "network, or kept",
        f"ours; {CODE}: keep",
    )
    relearning_rate: float = setting(
        0.1,
        "learning rate with which re-learning begins, as a share of the first; it falls to 0 in both phases",
        f"ours; {CODE}: falls in steps, to a thousandth where re-learning begins",
        ge=0,
    )
    infer: Literal["better", "mean"] = setting("better", "which network predicts where both modalities are there", CODE)

    @field_validator("groups", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        """Names with commas between; lists of channel numbers are taken as well, as [[0],[1]]."""
        if isinstance(value, str):
            value = json.loads(value) if value.startswith("[[") else [part.strip() for part in value.split(",")]
        if isinstance(value, list | tuple):
            return tuple(
                TOGETHER.join(str(channel) for channel in group) if isinstance(group, list | tuple) else str(group)
                for group in value
            )
        return value

    @field_validator("groups")
    @classmethod
    def _two(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and len(value) != 2:
            raise ValueError(f"{len(value)} modalities {value}: give two, with a comma between")
        return value


class Patches(NamedTuple):
    """Rows of a stream."""

    image: Tensor
    valid: Tensor
    target: Tensor | None = None


class SemiCML(SemiSupervisedTrainer):
    """Two co-registered modalities of the same patient are segmented by two networks that each see one of them, so that
    either modality suffices to predict. On unlabeled patches their probabilities must agree voxel by voxel, and by
    area: the two modalities' masks of a patch must overlap more than masks of different patches do (a contrast whose
    similarity is the soft Dice). Later the better modality teaches: an average of its weights, taken only when it
    scored well, gives soft pseudo-labels under input noise, from which the weaker network and finally both re-learn.

    Faithful to the hosted code: both terms, the gate of the average, the two phases and all numbers (its scale divided
    by 10), but for the supervised loss, which is the product's, and as many unlabeled patches as labeled ones.
    Reconstructed: several classes, rare areas, which patches show foreground (all do in the code's data), a patch that
    alone does (cut into tiles), labels in the second phase, symmetric noise, labeled training patches instead of
    validation cases for the gate and for the choice of the better modality. Ours: a learning rate that has fallen to 0
    before re-learning as well, since a network that is far from done teaches its faults; for the same reason a teacher
    that is worse than its network is replaced by it. A case that lacks one modality trains the network of the other
    with its label."""

    name = "semi_cml"
    title = "Semi-CML: contrastive mutual learning of two modalities, and pseudo-label re-learning"
    citation = (
        "S. Zhang, J. Zhang, B. Tian, T. Lukasiewicz, Z. Xu. Multi-modal contrastive mutual learning and pseudo-label "
        "re-learning for semi-supervised medical image segmentation. Medical Image Analysis 83, 2023, 102656. "
        "doi:10.1016/j.media.2022.102656."
    )
    needs = Needs(networks=2, teacher=True, modalities=2)
    Settings = SemiCMLSettings
    reduces_to_supervised = True
    unsupervised_weights = ("lambda_mse", "lambda_asc", "lambda_prel")
    changes_supervised = True
    # re-learning keeps its weight without the contrast's share of it
    ablation = {"lambda_asc": "0", "prel_asc": "0", "lambda_prel": "0.9"}
    settings: SemiCMLSettings

    @classmethod
    def refusals(cls, job: Job, settings: MethodSettings) -> list[Problem]:
        if not isinstance(settings, SemiCMLSettings):
            raise TypeError(f"settings of {cls.name} expected, got {type(settings).__name__}")
        try:
            first, second = _channels_of(job, settings)
        except InvalidInput as error:
            return list(error.problems)
        if set(first) & set(second):
            names = job.channels.listed((first, second))
            fix = "name others with --set groups=A,B, or correct channel_groups in dataset.json"
            return [Problem(f"modalities that share a channel: {names}", "two modalities of their own", fix)]
        return []

    def build(self) -> Parts:
        if self._is_supervised:
            return Parts(trained={"network": self.job.build_network()})
        self.channels: dict[int, Channels] = dict(zip(SIDES, _channels_of(self.job, self.settings), strict=True))
        networks = {
            side: self.job.build_network(f"network_{side}", in_channels=len(self.channels[side])) for side in SIDES
        }
        chosen = self.settings.better
        judged = SIDES if chosen == "auto" else (int(chosen),)
        self.teachers = {side: GatedAverage(networks[side]) for side in judged if self._relearns}
        return Parts(
            trained={f"network_{side}": network for side, network in networks.items()},
            followers={f"teacher_{side}": teacher.network for side, teacher in self.teachers.items()},
            memory={
                "better": 0 if chosen == "auto" else int(chosen),
                # per side: sum and number of the scores since the last point, and of the last stretch
                "scores": torch.zeros(2, 2),
                "last_scores": torch.zeros(2, 2),
                "teacher_scores": torch.zeros(2, 2),
                "teacher_replaced": 0,
                **{f"pool_{side}": [] for side in SIDES},
                "teacher_moves": torch.zeros(2),
            },
        )

    def phases(self) -> list[Phase]:
        if self._is_supervised:
            return super().phases()
        if not self._relearns:
            return [Phase(MUTUAL)]
        settings, r_prel = self.settings, self.settings.r_prel
        # where nothing is re-learned it is the supervised run's
        rate = annealed_twice(settings.relearning_rate) if settings.lambda_prel > 0 else poly_over_run
        groups = tuple(ParameterGroup(f"network_{side}", factor=rate) for side in SIDES)
        return [Phase(MUTUAL, r_prel, groups), Phase(RELEARNING, 1 - r_prel, groups)]

    def on_phase(self, phase: Phase, at: Progress) -> None:
        """The better modality is chosen; a teacher that was never made, or is worse, begins as the network is now."""
        memory = self.parts.memory
        if phase.name == RELEARNING:
            memory["better"] = better = self._better()
            memory["teacher_replaced"] = int(self._teacher_is_worse(better))
            if memory["teacher_replaced"] or not self.teachers[better].is_ready(memory[f"pool_{better}"]):
                self.teachers[better].copy_from(self._network(better))

    def losses(self, batch: Batch, at: Progress) -> StepOutput:
        labeled = batch.labeled
        if self._is_supervised:  # the twin, bit for bit
            z = self.parts.trained["network"](labeled.image)
            return StepOutput({"supervised": self.job.supervised_loss(z, labeled.target, labeled.valid)})
        self._step_scores = torch.zeros(2, 2, device=labeled.image.device)
        self._teacher_scores = torch.zeros_like(self._step_scores)
        pairs = None
        if batch.unlabeled is not None:
            pairs = _with_channels(batch.unlabeled, self.channels[1] + self.channels[2])
            pairs = pairs if len(pairs.image) else None
        output = self._relearning(labeled, pairs, at) if at.phase == RELEARNING else self._mutual(labeled, pairs, at)
        if batch.unlabeled is not None:
            output.measures["pair_share"] = (0 if pairs is None else len(pairs.image)) / len(batch.unlabeled)
        return output

    def after_step(self, at: Progress) -> None:
        """Scores are kept, and at the points the average may move."""
        if self._is_supervised or at.phase == RELEARNING:
            return
        memory = self.parts.memory
        memory["scores"] += self._step_scores
        steps, done = at.phase_end - at.phase_start, at.step + 1 - at.phase_start
        if _is_last_stretch(at):
            memory["last_scores"] += self._step_scores
            memory["teacher_scores"] += self._teacher_scores
        is_point = POINTS * done // steps > POINTS * (done - 1) // steps
        if not is_point:
            return
        means = (memory["scores"][:, 0] / memory["scores"][:, 1]).tolist()  # nan where nothing was scored
        memory["scores"].zero_()
        if (at.step + 1) / at.total <= FIRST_POINT:
            return
        for side, teacher in self.teachers.items():
            pool = f"pool_{side}"
            before, memory[pool] = memory[pool], teacher.offer(self._network(side), means[side - 1], memory[pool])
            memory["teacher_moves"][side - 1] += teacher.is_ready(memory[pool]) and memory[pool] != before

    def prediction(self) -> PredictionSpec:
        if self._is_supervised:
            return self.job.single_network_prediction("network")
        return self._of_both() if self.settings.infer == "mean" else self._of_one(self._better())

    def alternative_predictions(self) -> dict[str, PredictionSpec]:
        """Both modalities by name, whichever is better, and their mean."""
        if self._is_supervised:
            return {}
        return {f"modality_{side}": self._of_one(side) for side in SIDES} | {"mean": self._of_both()}

    # ------------------------------------------------------------------------------------------------ the two phases

    def _mutual(self, labeled: StreamBatch, pairs: Patches | None, at: Progress) -> StepOutput:
        """Both networks learn from labels, and from each other where a patch has both modalities."""
        settings = self.settings
        weight = settings.lambda_mse * sigmoid_ramp(at.fraction, settings.ramp_end)
        judged = pairs if weight > 0 or settings.lambda_asc > 0 else None
        losses, z = {}, {}
        for side in SIDES:
            losses[f"supervised_{side}"], z[side] = self._labeled_and_pairs(side, labeled, judged)
        if _is_last_stretch(at):
            self._score_teachers(labeled)
        if judged is None:
            return StepOutput(losses, self._scores())
        p = {side: self.job.probabilities(logits) for side, logits in z.items()}
        measures = {**self._scores(), "valid_share": judged.valid.float().mean()}
        if weight > 0:
            consistency = probability_mse(p[1], p[2], judged.valid)
            losses["consistency"] = weight * consistency
            measures |= {"consistency": consistency.detach(), "consistency_weight": weight}
        if settings.lambda_asc > 0:
            contrast, shares = self._area_contrast(p[1], p[2], judged.valid)
            losses["area_contrast"] = settings.lambda_asc * contrast
            measures |= {"area_contrast": contrast.detach(), "area_contrast_weight": settings.lambda_asc, **shares}
        return StepOutput(losses, measures)

    def _relearning(self, labeled: StreamBatch, pairs: Patches | None, at: Progress) -> StepOutput:
        """The weaker network, and at the end both, learn the teacher's soft labels of the better modality."""
        settings, better = self.settings, self.parts.memory["better"]
        learning = SIDES if at.phase_fraction >= RESTS else (OTHER[better],)
        judged = pairs if settings.lambda_prel > 0 else None
        q = None if judged is None else self._soft_labels(judged.image, better, at)
        losses: dict[str, Tensor] = {}
        terms: dict[int, Tensor] = {}
        contrasts: list[Tensor] = []
        shares: dict[str, Tensor | float] = {}
        for side in SIDES:
            mine = judged if side in learning else None
            if settings.prel_supervised == 0 and mine is None:
                continue  # without a loss a network does not move
            loss, z = self._labeled_and_pairs(side, labeled, mine)
            if settings.prel_supervised > 0:
                losses[f"supervised_{side}"] = settings.prel_supervised * loss
            if mine is None or q is None:
                continue
            terms[side] = soft_label_loss(z, q, mine.valid, self.job.schema.has_regions, DICE_WEIGHT)
            if settings.prel_asc > 0:
                contrast, shares = self._area_contrast(q, self.job.probabilities(z), mine.valid)
                contrasts.append(contrast)
        own = settings.lambda_prel * (1 - settings.prel_asc)
        losses |= {f"relearning_{side}": own * term for side, term in terms.items()}
        measures: dict[str, Tensor | float] = {f"relearning_{side}": term.detach() for side, term in terms.items()}
        if contrasts:
            contrast, weight = torch.stack(contrasts).sum(), settings.lambda_prel * settings.prel_asc / 10
            losses["relearning_contrast"] = weight * contrast
            measures |= {"relearning_contrast": contrast.detach(), "relearning_contrast_weight": weight, **shares}
        if not losses:
            losses = {"relearning": connected_zero(next(self._network(OTHER[better]).parameters()))}
        return StepOutput(
            losses,
            {
                **self._scores(),
                **measures,
                "relearning_weight": own,
                "better": better,
                "learning": len(learning),
                "teacher_replaced": self.parts.memory["teacher_replaced"],
            },
        )

    # ------------------------------------------------------------------------------------------------ parts of a step

    @property
    def _is_supervised(self) -> bool:
        return not (self.job.has_unlabeled or self.settings.labeled_only)

    @property
    def _relearns(self) -> bool:
        return self.job.has_unlabeled and self.settings.r_prel < 1

    def _network(self, side: int) -> nn.Module:
        return self.parts.trained[f"network_{side}"]

    def _better(self) -> int:
        """As decided, else by the scores so far; of two alike the second, as in the code's data (T1ce, PET)."""
        memory = self.parts.memory
        if memory["better"]:
            return int(memory["better"])
        scores = memory["last_scores"] if bool(memory["last_scores"][:, 1].any()) else memory["scores"]
        first, second = (scores[:, 0] / scores[:, 1].clamp(min=1)).tolist()
        return 1 if first > second else 2

    def _labeled_and_pairs(self, side: int, labeled: StreamBatch, pairs: Patches | None) -> tuple[Tensor, Tensor]:
        """One pass: L_sup of the labeled patches that have the modality, full-resolution logits of the pairs."""
        channels, network = list(self.channels[side]), self._network(side)
        known = _with_channels(labeled, channels)
        n = len(known.image)
        x = known.image if pairs is None else torch.cat([known.image, pairs.image])
        if not len(x):
            nothing = next(network.parameters())
            return connected_zero(nothing), nothing
        z = network(x[:, channels])
        if not n or known.target is None:
            return connected_zero(z[0]), z[0]
        self._step_scores[side - 1] = foreground_score(z[0][:n], known.target, known.valid, self.job.schema.has_regions)
        return self.job.supervised_loss([level[:n] for level in z], known.target, known.valid), z[0][n:]

    @torch.no_grad()
    def _score_teachers(self, labeled: StreamBatch) -> None:
        """The teachers on the labeled patches, as their networks are scored; those that were made."""
        for side, teacher in self.teachers.items():
            channels = list(self.channels[side])
            known = _with_channels(labeled, channels)
            if known.target is None or not len(known.image) or not teacher.is_ready(self.parts.memory[f"pool_{side}"]):
                continue
            z = teacher.logits(known.image[:, channels])
            score = foreground_score(z, known.target, known.valid, self.job.schema.has_regions)
            self._teacher_scores[side - 1] = score

    def _teacher_is_worse(self, side: int) -> bool:
        """By the mean scores of the last stretch of the first phase, where both have some."""
        memory = self.parts.memory
        mine, teachers = memory["last_scores"][side - 1], memory["teacher_scores"][side - 1]
        if self.settings.worse_teacher == "keep" or not (mine[1] and teachers[1]):
            return False
        return bool(teachers[0] / teachers[1] < mine[0] / mine[1])

    def _scores(self) -> dict[str, Tensor | float]:
        """Of this step, and how often the averages have moved so far."""
        moves = self.parts.memory["teacher_moves"]
        return {
            **{f"labeled_dice_{side}": self._step_scores[side - 1, 0] for side in SIDES},
            **{f"teacher_moves_{side}": float(moves[side - 1]) for side in self.teachers},
        }

    def _area_contrast(self, q_1: Tensor, q_2: Tensor, valid: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The contrast of the foreground. If one patch alone shows some, its tiles stand for patches."""
        first = 0 if self.job.schema.has_regions else 1
        maps = [torch.where(valid, q[:, first:], 0) for q in (q_1, q_2)]
        shown, alone = pairs_that_show_something(*maps), 1.0
        if int(shown.sum()) == 1:
            maps, alone = [halves_of_axes(values[shown]) for values in maps], 1 / len(shown)
        found = area_similarity_contrast(maps[0], maps[1], self.settings.similarity)
        return found.loss, {"area_row_share": found.row_share * alone, "area_class_share": found.class_share}

    @torch.no_grad()
    def _soft_labels(self, image: Tensor, better: int, at: Progress) -> Tensor:
        """The mean of several predictions of the teacher under input noise, [B, C, *S]."""
        channels, sigma = list(self.channels[better]), self.settings.noise
        x, std = image[:, channels], [self.job.channel_std[channel] for channel in channels]
        generator, teacher = at.generator("teacher noise", x.device), self.teachers[better]
        q = torch.stack(
            [
                self.job.probabilities(teacher.logits(x + clipped_noise(x, generator, sigma, 2 * sigma, std)))
                for _ in range(self.settings.draws)
            ]
        )
        return q.mean(0)

    # ----------------------------------------------------------------------------------------------------- prediction

    def _of_one(self, side: int) -> PredictionSpec:
        return self.job.single_network_prediction(f"network_{side}", self.channels[side])

    def _of_both(self) -> PredictionSpec:
        first, second = (self._of_one(side) for side in SIDES)
        return PredictionSpec(
            members=first.members + second.members, activation=first.activation, combine="mean_probabilities"
        )


def annealed_twice(second: float) -> Callable[[Progress], float]:
    """The learning rate's factor: from 1 to 0 in the first phase, from `second` to 0 in the other."""
    return lambda at: (second if at.phase == RELEARNING else 1) * poly_over_phase(at)


def _is_last_stretch(at: Progress) -> bool:
    """Whether scores decide."""
    return at.step + 1 - at.phase_start > LAST_STRETCH * (at.phase_end - at.phase_start)


def _channels_of(job: Job, settings: SemiCMLSettings) -> tuple[Channels, ...]:
    """Channel numbers of the two modalities."""
    if settings.groups is None:
        return job.channels.default_pair()
    return tuple(job.channels.find(name) for name in settings.groups)


def _with_channels(stream: StreamBatch, channels: Sequence[int]) -> Patches:
    """The patches of cases that have all of these channels."""
    target = None if stream.targets is None else stream.target
    present = stream.has_channel
    if present is None or bool(present[:, list(channels)].all()):
        return Patches(stream.image, stream.valid, target)
    rows = present[:, list(channels)].all(1)
    return Patches(stream.image[rows], stream.valid[rows], None if target is None else target[rows])
