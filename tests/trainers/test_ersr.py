"""The checks of ellipse-refined pseudo-labels and symmetric halves, through `losses()`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autossl.data.labels import LabelSchema
from autossl.trainers.base import Batch, Job, Phase, Progress, StepOutput
from autossl.trainers.components.ellipse_targets import ellipse_targets
from autossl.trainers.components.losses import one_hot, probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.methods.ersr import (
    SEMI_SUPERVISED,
    SUPERVISED_PHASE,
    TEACHER_NOISE,
    EllipseRefinement,
    ERSRSettings,
)
from toys import toy_batch, toy_configuration, toy_job, toy_schema

FIRST = Progress(step=5, total=100, phase=SUPERVISED_PHASE, phase_end=20)
LAST = Progress(step=100, total=100, phase=SEMI_SUPERVISED, phase_start=20, phase_end=100)
SIZE = 64


def job_of(n_classes: int = 1, elliptic: tuple[int, ...] = (1,), **options: Any) -> Job:
    options.setdefault("schema", toy_schema(n_classes))
    n = options.pop("n_unlabeled_patches", 2)
    configuration = toy_configuration(patch_size=(SIZE, SIZE), unlabeled_batch_size=n)
    return replace(toy_job(configuration=configuration, **options), elliptic_classes=elliptic)


def trainer(job: Job | None = None, **settings: Any) -> EllipseRefinement:
    return EllipseRefinement(job or job_of(), ERSRSettings(**settings))


class Reader(nn.Module):
    """Sees the class in the image's rounded value and says it with the given probability."""

    def __init__(self, n_outputs: int, sure: float = 1 - 1e-7, regions: bool = False) -> None:
        super().__init__()
        self.n_outputs, self.regions = n_outputs, regions
        self.logit = nn.Parameter(torch.tensor(math.log(sure / (1 - sure))))

    def forward(self, x: Tensor) -> list[Tensor]:
        label = x[:, :1].round().clamp(min=0).long()
        if self.regions:
            return [self.logit * torch.cat([2.0 * (label > index) - 1 for index in range(self.n_outputs)], 1)]
        return [self.logit * one_hot(label.clamp(max=self.n_outputs - 1), self.n_outputs)]


class Blank(nn.Module):
    """Finds everything equally probable, and keeps what it was shown."""

    def __init__(self, n_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_outputs))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        self.seen.append(x)
        return [self.weight.view(1, -1, 1, 1) + torch.zeros_like(x[:, :1])]


def disk(
    center: tuple[float, float] = (31.3, 30.8), axes: tuple[float, float] = (14, 20), angle: float = 0.0
) -> Tensor:
    """An ellipse as zeros and ones [SIZE, SIZE]."""
    y, x = torch.meshgrid(torch.arange(SIZE) - center[0], torch.arange(SIZE) - center[1], indexing="ij")
    u, v = y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)
    return ((u / axes[0]) ** 2 + (v / axes[1]) ** 2 <= 1).float()


def bar() -> Tensor:
    """What no ellipse is accepted for."""
    image = torch.zeros(SIZE, SIZE)
    image[30:34, 8:56] = 1
    return image


def holed() -> Tensor:
    image = disk()
    image[28:35, 26:34] = 0
    return image


def batch_of(job: Job, *images: Tensor) -> Batch:
    """Unlabeled patches that show these labels; labeled ones of the toys, whose images say theirs."""
    batch = toy_batch(job, 0, 2, len(images))
    assert batch.unlabeled is not None
    batch.unlabeled.views = (torch.stack(images)[:, None].clone(),)
    target = batch.labeled.target
    if not job.schema.has_regions:
        target = target.clamp(max=job.schema.n_outputs - 1)
        batch.labeled.targets = (target,)
    batch.labeled.views = ((target if target.shape[1] == 1 else target.sum(1, keepdim=True)).float(),)
    return batch


def with_readers(method: EllipseRefinement, student: nn.Module | None = None, sure: float = 0.999999) -> Any:
    """The teacher reads the labels off the images; so does the student where no other is given."""
    schema = method.job.schema
    method.teacher.network = Reader(schema.n_outputs, sure, schema.has_regions)
    for parameter in method.teacher.network.parameters():
        parameter.requires_grad_(False)
    default = Reader(schema.n_outputs, regions=schema.has_regions)
    method.parts.trained["network"] = default if student is None else student
    return method


def special(output: StepOutput) -> dict[str, float]:
    return {name: term.item() for name, term in output.losses.items() if name != "supervised"}


# ----------------------------------------------------------------------------------------------------------- the terms


@pytest.mark.parametrize("regions", [False, True])
def test_who_agrees_with_refined_and_symmetric_labels_pays_nothing(regions: bool) -> None:
    job = job_of(2, (1,), schema=toy_schema(2, regions))
    method = with_readers(trainer(job, lambda_plain=0))
    output = method.losses(batch_of(job, disk(), disk(angle=0.7)), LAST)
    assert set(output.losses) == {"supervised", "refined", "completed", "symmetry"}
    assert special(output)["refined"] < 1e-3
    # nearest sampling moves the border by up to a voxel
    assert special(output)["completed"] < 5e-3
    assert special(output)["symmetry"] < 1e-2
    assert output.losses["supervised"].item() < 1e-2
    assert output.measures["accepted_share"] == output.measures["mirrored_share"] == 1


def test_exactly_symmetric_patches_cost_nothing() -> None:
    """The border between two columns is the axis: mirror images fall on voxels."""
    job = job_of()
    image = disk((31.5, 31.5), (20, 14))
    output = with_readers(trainer(job)).losses(batch_of(job, image, image), LAST)
    assert special(output) == pytest.approx({"refined": 0, "completed": 0, "symmetry": 0}, abs=1e-6)


def test_closed_form_of_a_student_that_knows_nothing() -> None:
    job = job_of()
    method = with_readers(trainer(job), Blank(2))
    output = method.losses(batch_of(job, disk(), disk()), LAST)
    assert special(output) == pytest.approx({"refined": 0.25, "completed": 0, "symmetry": 0})
    assert {name: float(output.measures[f"{name}_weight"]) for name in special(output)} == {
        "refined": 1,
        "completed": 1,
        "symmetry": 1,
    }


def test_the_student_learns_the_filled_label_and_not_the_teachers_own() -> None:
    job = job_of()
    batch = batch_of(job, holed(), holed())
    hole = 7 * 8 / SIZE**2
    output = with_readers(trainer(job)).losses(batch, LAST)
    assert special(output)["refined"] == pytest.approx(hole, rel=0.05)
    assert output.measures["refined_share"] == pytest.approx(hole, rel=0.05)


def test_the_ablation_takes_the_refinement_away() -> None:
    job = job_of()
    assert EllipseRefinement.ablation == {"refine": "false"}
    method = with_readers(trainer(job, **{k: v == "true" for k, v in EllipseRefinement.ablation.items()}))
    output = method.losses(batch_of(job, holed(), bar()), LAST)
    assert special(output)["refined"] == pytest.approx(0, abs=1e-6)
    assert output.measures["refined_share"] == 0
    assert output.measures["accepted_share"] == 0.5, "the axis still comes from a fit"
    blank = with_readers(trainer(job, refine=False), Blank(2)).losses(batch_of(job, bar(), bar()), LAST)
    assert special(blank)["refined"] == pytest.approx(0.125), "nothing else changes: without a fit it counts half"


def test_a_label_without_an_ellipse_counts_half_and_is_not_mirrored() -> None:
    job = job_of()
    method = with_readers(trainer(job), Blank(2))
    output = method.losses(batch_of(job, bar(), bar()), LAST)
    assert special(output) == pytest.approx({"refined": 0.125, "completed": 0, "symmetry": 0})
    assert output.measures["accepted_share"] == output.measures["mirrored_share"] == 0
    mixed = method.losses(batch_of(job, bar(), disk()), LAST)
    assert special(mixed)["refined"] == pytest.approx(0.25 * 1.5 / 2)
    assert mixed.measures["mirrored_share"] == 0.5


def test_without_a_fit_a_patch_that_shows_nothing_sure_is_not_learned() -> None:
    """A voxel above 0.5 is enough for a score, but no label."""
    q = torch.full((1, 1, 8, 8), 0.55)
    found = ellipse_targets(q, torch.ones(1, 1, 8, 8, dtype=torch.bool), np.ones((1, 1), bool), (1.0, 1.0), True)
    assert float(found.weight.sum()) == 0
    q[..., :2] = 0.7
    found = ellipse_targets(q, torch.ones(1, 1, 8, 8, dtype=torch.bool), np.ones((1, 1), bool), (1.0, 1.0), True)
    assert found.weight.unique().tolist() == [0.5]


def test_symmetry_can_be_switched_off() -> None:
    job = job_of()
    student = Blank(2)
    output = with_readers(trainer(job, symmetry=False), student).losses(batch_of(job, disk(), disk()), LAST)
    assert set(output.losses) == {"supervised", "refined"}
    assert special(output)["refined"] == pytest.approx(0.25)
    assert [len(x) for x in student.seen] == [2 + 2]


def test_the_student_sees_all_images_at_once() -> None:
    job = job_of()
    student = Blank(2)
    batch = batch_of(job, disk(), bar())
    assert batch.unlabeled is not None
    with_readers(trainer(job), student).losses(batch, LAST)
    (seen,) = student.seen
    assert len(seen) == 2 + 3 * 2
    assert torch.equal(seen[:4], torch.cat([batch.labeled.image, batch.unlabeled.image]))
    outside = disk(axes=(17, 23)) == 0
    for side in seen[[4, 6]]:
        assert torch.equal(side[0][outside], torch.zeros_like(side[0][outside])), "only the object changes"
    assert not torch.equal(seen[4], seen[6]), "each half on its own"


def test_asymmetric_predictions_pay_for_it() -> None:
    """The student sees the object in the left half of the patch alone, the teacher all of it."""

    class LeftReader(Reader):
        def forward(self, x: Tensor) -> list[Tensor]:
            return super().forward(torch.where(torch.arange(SIZE) < 32, x, 0))

    job = job_of()
    image = disk((31.5, 31.5), (20, 14))
    method = with_readers(trainer(job), LeftReader(2))
    output = method.losses(batch_of(job, image, image), LAST)
    share = image.mean().item() / 2
    assert special(output)["refined"] == pytest.approx(share, rel=1e-3)
    assert special(output)["symmetry"] == pytest.approx(share, rel=1e-3), "in both sides half of the object is missing"
    # completed from what it says of the left half there is a whole object, of which it sees the left half again;
    # completed from the right half there is nothing, and it sees half
    assert special(output)["completed"] == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_through_the_halves_of_the_prediction(detach: bool) -> None:
    job = job_of()
    method = with_readers(trainer(job, detach_sym=detach), student := Blank(2))
    given: list[Tensor] = []
    student.register_forward_hook(lambda _, x, z: (z[0].retain_grad(), given.append(z[0]))[0])
    with torch.no_grad():
        student.weight[1] = 1.0
    batch = batch_of(job, disk(), disk())
    forward = student.forward

    def sloped(x: Tensor) -> list[Tensor]:
        return [z * torch.linspace(1, 2, SIZE)[:, None] for z in forward(x)]

    student.forward = sloped  # type: ignore[method-assign]
    method.losses(batch, LAST).losses["completed"].backward()
    (z,) = given
    assert z.grad is not None
    assert z.grad[4:].abs().sum() > 0
    assert (z.grad[2:4].abs().sum() == 0) == detach
    assert z.grad[:2].abs().sum() == 0


# --------------------------------------------------------------------------------------------------- several classes


def test_other_classes_get_the_consistency_of_mean_teacher() -> None:
    job = job_of(2, (2,))
    method = trainer(job, lambda_plain=0.3)
    batch = toy_batch(job)
    assert batch.unlabeled is not None
    half = replace(LAST, step=60)
    output = method.losses(batch, half)
    x = batch.unlabeled.image
    noise = torch.randn(x.shape, generator=half.generator("teacher noise")).mul_(TEACHER_NOISE).clamp_(-0.2, 0.2)
    q = torch.softmax(method.teacher.logits(x + noise), 1)
    p = torch.softmax(method.parts.trained["network"](x)[0], 1)
    expected = probability_mse(p[:, 1:2], q[:, 1:2]).item()
    assert float(output.measures["consistency"]) == pytest.approx(expected, rel=1e-4)
    assert output.losses["consistency"].item() == pytest.approx(0.3 * sigmoid_ramp(0.5) * expected, rel=1e-4)
    assert "consistency" not in trainer(job, lambda_plain=0).losses(batch, half).losses
    alone = trainer(job, lambda_max=0, lambda_plain=0.3).losses(batch, half)
    assert special(alone)["refined"] == 0
    assert alone.losses["consistency"].item() == output.losses["consistency"].item()


def test_the_largest_elliptic_class_is_mirrored() -> None:
    """Class 1 is the smaller one; only class 2 is symmetric about its own axis and filled by the images."""
    job = job_of(2, (1, 2))
    small, large = disk((12.5, 12.5), (5, 7)), disk((40.5, 38.5), (12, 18))
    image = small + 2 * large
    student = Blank(3)
    method = with_readers(trainer(job), student)
    output = method.losses(batch_of(job, image, image), LAST)
    # both classes of both patches: a third everywhere, against 1 inside
    inside = (small.mean() + large.mean()).item() / 2
    assert special(output)["refined"] == pytest.approx((1 - inside) / 9 + inside * 4 / 9, rel=1e-3)
    (seen,) = student.seen
    around = (disk((12.5, 12.5), (8, 10)) > 0) & (seen[2, 0] != 2)
    for side in seen[4:]:
        assert torch.equal(side[0][around], image[around]), "the smaller object stays as it is"
    assert output.measures["mirrored_share"] == 1


def test_elliptic_classes_are_label_values_and_not_channels() -> None:
    schema = LabelSchema({"background": (0,), "a": (2,), "b": (4,), "c": (7,)})
    assert trainer(job_of(schema=schema, elliptic=(4,))).elliptic == [2]
    assert trainer(job_of(schema=schema, elliptic=(4,))).plain == [1, 3]
    regions = LabelSchema({"background": (0,), "a": (2, 4), "b": (4,)}, (2, 4))
    assert trainer(job_of(schema=regions, elliptic=(4,))).elliptic == [1]
    assert trainer(job_of(schema=regions, elliptic=(4,))).plain == [0]


def test_a_task_without_an_elliptic_class_is_refused_unless_forced() -> None:
    with_one, without = job_of(elliptic=(1,)), job_of(2, elliptic=())
    assert EllipseRefinement.refusals(with_one, ERSRSettings()) == []
    (problem,) = EllipseRefinement.refusals(without, ERSRSettings())
    assert "no class is elliptic in the 4 labeled cases" in str(problem)
    assert "--set force=true" in str(problem)
    assert EllipseRefinement.refusals(without, ERSRSettings(force=True)) == []
    assert trainer(without, force=True).elliptic == [1, 2]
    assert trainer(job_of(2, elliptic=(2,)), force=True).elliptic == [2], "what is elliptic is still told apart"


def test_patches_that_cut_outlines_off_are_refused_unless_forced() -> None:
    job = job_of(elliptic=(1,))
    size = job.configuration.patch_size
    covered = replace(job, median_case_shape=(1.0, size[0] / 0.8, size[1] / 0.9))
    assert EllipseRefinement.refusals(covered, ERSRSettings()) == []
    small = replace(job, median_case_shape=(1.0, float(size[0]), 1.5 * size[1]))
    (problem,) = EllipseRefinement.refusals(small, ERSRSettings())
    assert f"in images of {size[0]} x {round(1.5 * size[1])}" in str(problem)
    assert "--overwrite_target_spacing" in str(problem)
    assert EllipseRefinement.refusals(small, ERSRSettings(force=True)) == []
    assert len(EllipseRefinement.refusals(replace(small, elliptic_classes=()), ERSRSettings())) == 2


# ---------------------------------------------------------------------------------------------------------- the filter


def ragged(amount: float) -> Tensor:
    """An ellipse whose outline goes in and out."""
    y, x = torch.meshgrid(torch.arange(SIZE) - 31.5, torch.arange(SIZE) - 31.5, indexing="ij")
    angle = torch.atan2(y / 14, x / 20)
    return (torch.sqrt((y / 14) ** 2 + (x / 20) ** 2) <= 1 + amount * torch.cos(9 * angle)).float()


def test_the_least_regular_patch_is_not_used() -> None:
    job = job_of(n_unlabeled_patches=5)
    images = [disk(), ragged(0.2), disk(angle=0.5), disk((28, 33)), disk((30, 30), angle=1.0)]
    start = replace(LAST, step=20)
    output = with_readers(trainer(job), Blank(2)).losses(batch_of(job, *images), start)
    assert output.measures["selected_share"] == 0.8
    assert output.measures["allowed_share"] == pytest.approx(0.5034, abs=1e-4)
    assert output.measures["refined_weight"] == pytest.approx(0.0067, abs=1e-4)

    class Sleepy(Reader):
        """Blind for the second unlabeled patch."""

        def forward(self, x: Tensor) -> list[Tensor]:
            (z,) = super().forward(x)
            return [torch.where(torch.arange(len(z)).view(-1, 1, 1, 1) == 3, 0.0, z)]

    sleepy = with_readers(trainer(job), Sleepy(2)).losses(batch_of(job, *images), start)
    assert float(sleepy.measures["refined"]) < 1e-3, "what it says there does not matter"
    everything = with_readers(trainer(job), Sleepy(2)).losses(batch_of(job, *images), LAST)
    assert everything.measures["selected_share"] == 1
    assert float(everything.measures["refined"]) > 0.01


def test_patches_compete_with_those_of_earlier_steps() -> None:
    """Two regular patches, then two ragged ones of which one is among the best half of four; then a new pass."""
    job = job_of(n_unlabeled=4)
    method = with_readers(trainer(job, edge_share=1.0))
    method.teacher.update = lambda *args: None
    at = [replace(LAST, step=step) for step in (20, 21, 22)]
    method.losses(batch_of(job, disk(), disk(angle=0.5)), at[0])
    assert method.parts.memory["scores"] == [[]], "nothing is remembered before the step is taken"
    method.after_step(at[0])
    assert [len(of_class) for of_class in method.parts.memory["scores"]] == [2]
    second = method.losses(batch_of(job, ragged(0.2), ragged(0.3)), at[1])
    assert second.measures["selected_share"] == 0.5, "one of two, by the floor"
    method.after_step(at[1])
    (scores,) = method.parts.memory["scores"]
    assert scores[0] < scores[2] < scores[3]
    assert method.parts.memory["pass"] == 0
    method.losses(batch_of(job, disk(), disk()), at[2])
    method.after_step(at[2])
    assert method.parts.memory["pass"] == 1
    assert [len(of_class) for of_class in method.parts.memory["scores"]] == [2], "four cases, two at a time"


def test_the_memory_decides() -> None:
    """One patch per step: an earlier one that was better or worse changes how many of two are used."""
    job = job_of(n_unlabeled=40)
    images = [disk(), disk(angle=0.5)]
    shares = {}
    for name, earlier in (("better", 0.0), ("worse", 9.0)):
        method = with_readers(trainer(job))
        method.parts.memory["scores"] = [[earlier] * 10]
        shares[name] = method.losses(batch_of(job, *images), replace(LAST, step=21)).measures["selected_share"]
    assert shares == {"better": 0.5, "worse": 1.0}


def test_score_norm_reaches_the_score() -> None:
    job = job_of()
    plain, normed = (
        with_readers(trainer(job, score_norm=norm)).losses(batch_of(job, disk(), disk()), LAST)
        for norm in (False, True)
    )
    area = disk().sum().item()
    ratio = float(plain.measures["irregularity"]) / float(normed.measures["irregularity"])
    assert ratio == pytest.approx(math.sqrt(area), rel=1e-3)


def test_empty_patches_teach_nothing() -> None:
    job = job_of()
    method = with_readers(trainer(job), Blank(2))
    nothing = torch.zeros(SIZE, SIZE)
    output = method.losses(batch_of(job, nothing, nothing), LAST)
    assert special(output) == {"refined": 0, "completed": 0, "symmetry": 0}
    assert all(term.requires_grad for term in output.losses.values())
    assert output.measures["empty_share"] == 1
    assert output.measures["selected_share"] == 0
    half = method.losses(batch_of(job, nothing, disk()), LAST)
    assert special(half)["refined"] == pytest.approx(0.25), "over the patch that is used"
    assert half.measures["empty_share"] == 0.5


def test_a_single_patch_is_used() -> None:
    job = job_of(n_unlabeled_patches=1)
    output = with_readers(trainer(job), Blank(2)).losses(batch_of(job, ragged(0.2)), replace(LAST, step=20))
    assert output.measures["selected_share"] == 1


def test_invalid_voxels_have_no_part() -> None:
    job = job_of()
    batch = batch_of(job, disk(), disk())
    assert batch.unlabeled is not None
    valid = torch.ones_like(batch.unlabeled.valid)
    valid[..., :10] = False
    batch.unlabeled.valids = (valid,)

    class Odd(Blank):
        def forward(self, x: Tensor) -> list[Tensor]:
            (z,) = super().forward(x)
            return [torch.where(torch.arange(SIZE) < 10, torch.tensor([5.0, -5.0]).view(1, 2, 1, 1), z)]

    output = with_readers(trainer(job), Odd(2)).losses(batch, LAST)
    assert special(output) == pytest.approx({"refined": 0.25, "completed": 0, "symmetry": 0})


# -------------------------------------------------------------------------------------------------- teacher and phases


def test_the_teacher_gets_no_gradient_and_follows_from_the_start() -> None:
    method = trainer(job_of(2), ema_decay_max=0.75)
    student, teacher = method.parts.trained["network"], method.parts.followers["teacher"]
    method.losses(toy_batch(method.job), LAST).losses["refined"].backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    before = [weight.clone() for weight in teacher.parameters()]
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(4.0)
    method.after_step(replace(FIRST, step=1))
    for a, b in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(b, a + 2.0)
    method.on_phase(Phase(SEMI_SUPERVISED), LAST)
    for a, b in zip(before, teacher.parameters(), strict=True):
        torch.testing.assert_close(b, a + 2.0)
    assert trainer().teacher.decay_max == 0.99


def test_labeled_images_alone_come_first() -> None:
    method = trainer(job_of(2))
    assert [(phase.name, phase.share) for phase in method.phases()] == [(SUPERVISED_PHASE, 0.2), (SEMI_SUPERVISED, 0.8)]
    assert [phase.share for phase in trainer(r_pre=0.3).phases()] == pytest.approx([0.3, 0.7])
    assert [method.request(at).unlabeled.count for at in (FIRST, LAST)] == [0, 2]
    assert list(method.losses(toy_batch(method.job), FIRST).losses) == ["supervised"]
    assert [phase.name for phase in trainer(replace(job_of(), n_unlabeled=0)).phases()] == ["train"]


@pytest.mark.parametrize(("step", "ramp"), [(20, 0.0067379), (60, 0.2865048), (100, 1.0)])
def test_weights_grow_over_the_second_phase(step: int, ramp: float) -> None:
    job = job_of()
    batch = batch_of(job, disk(), disk())
    output = with_readers(trainer(job, lambda_max=2.0), Blank(2)).losses(batch, replace(LAST, step=step))
    assert float(output.measures["refined_weight"]) == pytest.approx(2 * ramp, rel=1e-5)
    assert output.losses["refined"].item() == pytest.approx(2 * ramp * 0.25, rel=1e-4)
    early = with_readers(trainer(job, ramp_end=0.5), Blank(2)).losses(batch, replace(LAST, step=60))
    assert float(early.measures["symmetry_weight"]) == 1


def test_a_teacher_that_is_not_finite_makes_its_terms_so_and_leaves_no_trace() -> None:
    method = trainer(job_of(2, (1,)))
    nn.init.constant_(method.teacher.network.decoder.seg_layers[-1].bias, float("nan"))  # type: ignore[union-attr,index]
    losses = method.losses(toy_batch(method.job), LAST).losses
    assert torch.isfinite(losses.pop("supervised"))
    assert losses
    assert not any(torch.isfinite(term) for term in losses.values())
    method.after_step(LAST)
    assert method.parts.memory["scores"] == [[]]


def test_options_do_what_they_say() -> None:
    assert trainer().prediction().members[0].name == "network"
    assert list(trainer().alternative_predictions()) == ["teacher"]
    teacher = trainer(infer="teacher")
    assert teacher.prediction().members[0].name == "teacher"
    assert teacher.alternative_predictions()["student"].members[0].name == "network"
