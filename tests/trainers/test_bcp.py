"""The checks of bidirectional copy-paste, through `losses()` and the loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.data.labels import LabelSchema
from autossl.trainers.base import Batch, BatchRequest, Job, MethodSettings, Phase, Progress, StepOutput
from autossl.trainers.components.losses import hard_label_dice, hard_label_loss, one_hot
from autossl.trainers.components.mixing import mirrored_in_plane
from autossl.trainers.loop import LoopOptions, TrainingInterrupted, TrainingLoop
from autossl.trainers.methods.bcp import (
    BIDIRECTIONAL,
    COPY_PASTE,
    BidirectionalCopyPaste,
    BidirectionalCopyPasteSettings,
)
from autossl.trainers.methods.supervised import Supervised
from toys import toy_batch, toy_configuration, toy_job, toy_schema

FIRST = Progress(step=5, total=100, phase=COPY_PASTE, phase_end=20)
SECOND = Progress(step=50, total=100, phase=BIDIRECTIONAL, phase_start=20, phase_end=100)


def trainer(job: Job | None = None, **settings: Any) -> BidirectionalCopyPaste:
    return BidirectionalCopyPaste(job or toy_job(), BidirectionalCopyPasteSettings(**settings))


def watched(method: BidirectionalCopyPaste, batch: Batch, at: Progress) -> tuple[StepOutput, Tensor, list[Tensor]]:
    """The step, what the student saw, and what it answered."""
    seen: list[Any] = []
    hook = method.parts.trained["network"].register_forward_hook(lambda _, x, z: seen.append((x[0], z)))
    output = method.losses(batch, at)
    hook.remove()
    assert len(seen) == 1, "one forward pass"
    return output, *seen[0]


class Oracle(nn.Module):
    """Reads the class off the image's rounded value and is sure of it."""

    def __init__(self, n_outputs: int, regions: bool = False) -> None:
        super().__init__()
        self.n_outputs, self.regions = n_outputs, regions

    def forward(self, x: Tensor) -> list[Tensor]:
        label = x[:, :1].round().long()
        if self.regions:
            return [torch.cat([80.0 * (label >= index + 1) - 40 for index in range(self.n_outputs)], 1)]
        return [40 * one_hot(label, self.n_outputs)]


def readable(batch: Batch) -> Batch:
    """Makes the images say their labels; unlabeled ones hold classes 0, 1, 2 in stripes."""
    assert batch.unlabeled is not None
    target = batch.labeled.target
    batch.labeled.views = ((target if target.shape[1] == 1 else target.sum(1, keepdim=True)).float(),)
    stripes = torch.arange(16) // 6
    batch.unlabeled.views = (stripes.float().expand_as(batch.unlabeled.image).clone(),)
    return batch


def with_oracles(method: BidirectionalCopyPaste) -> BidirectionalCopyPaste:
    oracle = Oracle(method.job.schema.n_outputs, method.job.schema.has_regions)
    method.parts.trained["network"] = method.teacher.network = oracle
    return method


# -------------------------------------------------------------------------------------------------------- the mixtures


@pytest.mark.parametrize("patch", [(16, 16), (4, 16, 16)])
def test_box_has_the_specified_share_and_short_axes_are_taken_whole(patch: tuple[int, ...]) -> None:
    job = toy_job(configuration=toy_configuration(len(patch), patch_size=patch))
    for at in (FIRST, SECOND):
        output = trainer(job).losses(toy_batch(job), at)
        assert float(output.measures["box_share"]) == pytest.approx((11 / 16) ** 2), "round(2/3 · 16) = 11"
    half = trainer(job, box_fraction=0.5).losses(toy_batch(job), SECOND)
    assert float(half.measures["box_share"]) == pytest.approx(0.25)


def test_mixtures_are_bit_exact_in_both_directions() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    _, x, _ = watched(method, batch, SECOND)
    mask = method._mask(1, x, SECOND).expand(1, 1, 16, 16)
    labeled, unlabeled = batch.labeled.image, batch.unlabeled.image
    assert x.shape == (2, 1, 16, 16)
    assert torch.equal(x[0, 0][~mask[0, 0]], labeled[0, 0][~mask[0, 0]]), "labeled inside"
    assert torch.equal(x[0, 0][mask[0, 0]], unlabeled[0, 0][mask[0, 0]])
    assert torch.equal(x[1, 0][mask[0, 0]], labeled[1, 0][mask[0, 0]]), "labeled outside"
    assert torch.equal(x[1, 0][~mask[0, 0]], unlabeled[1, 0][~mask[0, 0]])


def test_every_voxel_is_judged_by_the_image_that_it_came_from() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    output, x, z = watched(method, batch, SECOND)
    mask = method._mask(1, x, SECOND)
    pseudo = method.teacher.logits(batch.unlabeled.image).argmax(1, keepdim=True)
    y = batch.labeled.target
    z_1, z_2 = [level[:1] for level in z], [level[1:] for level in z]
    true = 0.5 * (hard_label_loss(z_1, y[:1], ~mask) + hard_label_loss(z_2, y[1:], mask))
    guessed = 0.5 * (hard_label_loss(z_1, pseudo[:1], mask) + hard_label_loss(z_2, pseudo[1:], ~mask))
    assert output.losses["supervised"].item() == pytest.approx(true.item(), rel=1e-6)
    assert float(output.measures["pseudo"]) == pytest.approx(guessed.item(), rel=1e-6)
    assert output.losses["pseudo"].item() == pytest.approx(0.5 * guessed.item(), rel=1e-6)
    assert float(output.measures["pseudo_weight"]) == 0.5
    assert float(output.measures["pseudo_share"]) == pytest.approx(0.5), "one mask, in both directions"


def test_uniform_logits_closed_form() -> None:
    job = toy_job(schema=toy_schema(3))
    method = trainer(job)
    for layer in method.parts.trained["network"].decoder.seg_layers:  # type: ignore[union-attr]
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    batch = toy_batch(job)
    assert batch.unlabeled is not None
    output, x, z = watched(method, batch, SECOND)
    mask = method._mask(1, x, SECOND)
    pseudo, y = method.teacher.logits(batch.unlabeled.image).argmax(1, keepdim=True), batch.labeled.target
    levels = [level[:1] for level in z]
    dice = [
        hard_label_dice(levels, target, part).item()
        for target, part in ((y[:1], ~mask), (y[1:], mask), (pseudo[:1], mask), (pseudo[1:], ~mask))
    ]
    supervised = output.losses["supervised"].item() - 0.5 * (dice[0] + dice[1])
    guessed = output.losses["pseudo"].item() - 0.25 * (dice[2] + dice[3])
    assert supervised == pytest.approx(math.log(4), rel=1e-5)
    assert guessed == pytest.approx(0.5 * math.log(4), rel=1e-5), "both mixtures: 2 · 1.0397 in all"


def test_halving_alpha_halves_the_pseudo_labeled_part_alone() -> None:
    batch = toy_batch(toy_job())
    full, half, none = (trainer(alpha=alpha).losses(batch, SECOND).losses for alpha in (0.5, 0.25, 0.0))
    assert full["pseudo"].item() == 2 * half["pseudo"].item() > 0
    assert none["pseudo"].item() == 0
    assert full["supervised"].item() == half["supervised"].item() == none["supervised"].item()


@pytest.mark.parametrize("regions", [False, True])
def test_perfect_student_and_teacher_pay_nothing(regions: bool) -> None:
    job = toy_job(schema=toy_schema(regions=regions))
    method = with_oracles(trainer(job, alpha=1.0))
    output = method.losses(readable(toy_batch(job)), SECOND)
    assert all(term.item() < 1e-3 for term in output.losses.values())
    first = method.losses(readable(toy_batch(job)), FIRST)
    assert first.losses["supervised"].item() < 1e-3
    batch = readable(toy_batch(job))
    batch.labeled.targets = (torch.zeros_like(batch.labeled.target),)
    wrong = method.losses(batch, SECOND)
    assert wrong.losses["supervised"].item() > 1
    assert wrong.losses["pseudo"].item() < 1e-3, "true labels judge only what is labeled"


def test_phase_one_pastes_labeled_into_labeled() -> None:
    method = trainer()
    batch = toy_batch(method.job, n_unlabeled=0)
    output, x, z = watched(method, batch, FIRST)
    assert list(output.losses) == ["supervised"]
    mask = method._mask(1, x, FIRST)
    image, y = batch.labeled.image, batch.labeled.target
    assert torch.equal(x, torch.where(mask, image[:1], image[1:]))
    expected = 0.5 * (hard_label_loss(z, y[:1], mask) + hard_label_loss(z, y[1:], ~mask))
    assert output.losses["supervised"].item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------------ pseudo-labels


def island_batch(job: Job) -> Batch:
    """Unlabeled image 0: class 1 as a body and an island; class 2 as two bodies. Image 1 is background."""
    batch = readable(toy_batch(job))
    assert batch.unlabeled is not None
    image = torch.zeros_like(batch.unlabeled.image)
    image[0, 0, 2:5, 2:5] = 1
    image[0, 0, 8, 4] = 1
    image[0, 0, 2:5, 8:11] = 2
    image[0, 0, 10:13, 8:11] = 2
    batch.unlabeled.views = (image,)
    return batch


@pytest.mark.parametrize("regions", [False, True])
def test_only_single_component_classes_lose_their_islands(regions: bool) -> None:
    """The gate holds label values, which need not be the numbers of the output channels."""
    order = (2, 4) if regions else None
    names = {"background": (0,), "a": (2, 4) if regions else (2,), "b": (4,)}
    job = toy_job(schema=LabelSchema(names, order))
    size = 2 * (2 if regions else 1) * 256
    removed = {}
    for classes in ((), (2,), (4,), (2, 4)):
        method = with_oracles(trainer(replace(job, single_component_classes=classes)))
        removed[classes] = float(method.losses(island_batch(job), SECOND).measures["removed_share"]) * size
    # as regions class 2 lies within the first region as well, so that region loses a body and the island
    expected = {(): 0, (2,): 19 if regions else 1, (4,): 9, (2, 4): 28 if regions else 10}
    assert removed == pytest.approx(expected)
    kept = with_oracles(trainer(replace(job, single_component_classes=(2, 4)), largest_component=False))
    assert float(kept.losses(island_batch(job), SECOND).measures["removed_share"]) == 0


def test_a_teacher_that_is_not_finite_makes_its_term_so() -> None:
    method = trainer()
    nn.init.constant_(method.teacher.network.decoder.seg_layers[-1].bias, float("nan"))  # type: ignore[union-attr,index]
    losses = method.losses(toy_batch(method.job), SECOND).losses
    assert not torch.isfinite(losses["pseudo"])
    assert torch.isfinite(losses["supervised"])


def test_invalid_voxels_have_no_part_in_either_direction() -> None:
    job = toy_job(schema=toy_schema(ignore=True))
    method = trainer(job)
    batches = [toy_batch(job) for _ in range(2)]
    for value, batch in enumerate(batches):
        assert batch.unlabeled is not None
        valid = torch.ones_like(batch.labeled.valid)
        valid[..., :6] = False
        batch.labeled.valids, batch.unlabeled.valids = (valid,), (valid.flip(-1),)
        batch.labeled.targets = (torch.where(valid, batch.labeled.target, value),)
    for at in (FIRST, SECOND):
        first, second = (method.losses(batch, at).losses for batch in batches)
        assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}
    nothing = batches[0]
    assert nothing.unlabeled is not None
    nothing.labeled.valids = nothing.unlabeled.valids = (torch.zeros_like(nothing.labeled.valid),)
    for at in (FIRST, SECOND):
        output = method.losses(nothing, at)
        assert all(term.item() == 0 and term.requires_grad for term in output.losses.values())
    assert float(output.measures["pseudo_share"]) == 0


# ------------------------------------------------------------------------------------------------------- small batches


@pytest.mark.parametrize("axes", [(0, 1), (1,), ()])
def test_a_single_labeled_patch_is_pasted_into_its_mirror_image(axes: tuple[int, ...]) -> None:
    method = trainer(toy_job(configuration=toy_configuration(mirror_axes=axes)))
    batch = toy_batch(method.job, n_labeled=1, n_unlabeled=0)
    output, x, z = watched(method, batch, FIRST)
    mask = method._mask(1, x, FIRST)
    mirror = [axis + 2 for axis in axes]
    image, y = batch.labeled.image, batch.labeled.target
    assert torch.equal(x, torch.where(mask, image, image.flip(mirror)))
    target = torch.where(mask, y, y.flip(mirror))
    expected = 0.5 * (hard_label_loss(z, target, mask) + hard_label_loss(z, target, ~mask))
    assert output.losses["supervised"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_volumes_are_mirrored_in_plane_only() -> None:
    values = torch.randn(1, 1, 4, 5, 6)
    assert torch.equal(mirrored_in_plane(values, (0, 1, 2)), values.flip(3, 4))


@pytest.mark.parametrize("counts", [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_any_batch_size_is_legal(counts: tuple[int, int]) -> None:
    method = trainer()
    batch = toy_batch(method.job, 0, *counts)
    output, x, _ = watched(method, batch, SECOND)
    assert len(x) == 2 * math.ceil(max(counts) / 2)
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    if counts == (1, 1):
        mask = method._mask(1, x, SECOND)
        assert batch.unlabeled is not None
        assert torch.equal(x[:1], torch.where(mask, batch.unlabeled.image, batch.labeled.image))
        assert torch.equal(x[1:], torch.where(mask, batch.labeled.image, batch.unlabeled.image))


# ----------------------------------------------------------------------------------------------- teacher and phases


def test_the_teacher_is_copied_once_and_then_follows_at_a_constant_decay() -> None:
    method = trainer(ema_decay_max=0.75)
    student, teacher = method.parts.trained["network"], method.parts.followers["teacher"]
    before = [weight.clone() for weight in teacher.parameters()]
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(1.0)
    method.after_step(FIRST)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True)), "it waits in phase one"
    method.on_phase(Phase(COPY_PASTE), FIRST)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    method.on_phase(Phase(BIDIRECTIONAL), SECOND)
    old = [weight.clone() for weight in student.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(old, teacher.parameters(), strict=True))
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(4.0)
    method.after_step(replace(SECOND, step=1))  # a ramp would take 0.5
    for a, b in zip(old, teacher.parameters(), strict=True):
        assert torch.allclose(b, a + 0.25 * 4.0)
    method.losses(toy_batch(method.job), SECOND).losses["pseudo"].backward()
    assert all(weight.grad is None and not weight.requires_grad for weight in teacher.parameters())
    assert trainer().teacher.decay_max == 0.99


class Source:
    """Toy batches as a function of the step."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def batches(self, steps: Sequence[tuple[int, BatchRequest]]) -> Source.Stream:
        return Source.Stream(toy_batch(self.job, step, r.labeled.count, r.unlabeled.count) for step, r in steps)

    def reload_store(self, store: str, step: int) -> None:
        raise AssertionError("no store was asked for")

    class Stream:
        """A closable iterator."""

        def __init__(self, batches: Iterator[Batch]) -> None:
            self._batches = batches

        def __iter__(self) -> Iterator[Batch]:
            return self._batches

        def close(self) -> None:
            """Nothing to end."""


def loop_of(method: Any, folder: Path, total: int = 10) -> TrainingLoop:
    folder.mkdir(exist_ok=True)
    return TrainingLoop(method, Source(method.job), folder, LoopOptions(total, log_every=2, seed=7))


def state_of(loop: TrainingLoop) -> dict[str, Tensor]:
    modules = {**loop.method.parts.trained, **loop.method.parts.followers}
    return {f"{part}.{k}": v.clone() for part, module in modules.items() for k, v in module.state_dict().items()}


def test_one_copy_one_optimizer_and_one_learning_rate_curve_over_stops_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    whole = loop_of(trainer(toy_job(total_steps=10)), tmp_path / "whole")
    momenta: list[Tensor] = []
    rates: list[float] = []
    enter = whole.method.on_phase
    whole.method.on_phase = lambda phase, at: (  # type: ignore[method-assign]
        momenta.extend(s["momentum_buffer"].abs().sum() for s in whole._optimizers[0].optimizer.state.values()),
        enter(phase, at),
    )[1]
    whole._on_progress = lambda step, total, losses: rates.append(whole._rates["network"])
    whole.run()
    assert [(s.phase.name, s.start) for s in whole.timetable.spans] == [(COPY_PASTE, 0), (BIDIRECTIONAL, 2)]
    assert momenta, "the momentum of phase one enters phase two"
    assert all(value > 0 for value in momenta)
    assert rates == pytest.approx([0.01 * (1 - step / 10) ** 0.9 for step in range(10)])

    copies: list[int] = []
    state: dict[str, Any] | None = None
    for stop in (1, 2, 3, 6, None):  # 2 is the border
        method = trainer(toy_job(total_steps=10))
        broken = loop_of(method, tmp_path / "broken")
        if state is not None:
            broken.load_state(state)
        copy = method.teacher.copy_from
        monkeypatch.setattr(
            method.teacher,
            "copy_from",
            lambda student, broken=broken, copy=copy: (copies.append(broken.step), copy(student))[1],
        )
        if stop is None:
            broken.run()
            break
        broken._should_stop = lambda broken=broken, stop=stop: broken.step == stop
        with pytest.raises(TrainingInterrupted):
            broken.run()
        state = torch.load(tmp_path / "broken" / "checkpoint_latest.pth", weights_only=True)
    assert copies == [2]
    expected = state_of(whole)
    assert all(torch.equal(value, expected[key]) for key, value in state_of(broken).items())


def test_streams_follow_the_phase() -> None:
    method = trainer()
    counts = {at.phase: method.request(at).unlabeled.count for at in (FIRST, SECOND)}
    assert counts == {COPY_PASTE: 0, BIDIRECTIONAL: 2}
    assert [phase.share for phase in trainer(r_pre=0.3).phases()] == pytest.approx([0.3, 0.7])


# ------------------------------------------------------------------------------------------------- no unlabeled cases


def test_without_unlabeled_cases_the_run_is_the_twin_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autossl.trainers.training_log.draw_progress", lambda path, lines: None)
    job = toy_job(n_unlabeled=0, total_steps=4)
    mine = loop_of(trainer(job, infer="teacher"), tmp_path / "mine", 4)
    twin = loop_of(Supervised(job, MethodSettings()), tmp_path / "twin", 4)
    for loop in (mine, twin):
        loop.run()
    after = state_of(mine)
    assert all(torch.equal(value, after[key]) for key, value in state_of(twin).items())
    assert mine.method.prediction().members[0].name == "network", "the teacher never moved"
    assert mine.method.alternative_predictions() == {}


def test_labeled_only_goes_on_with_labeled_copy_paste() -> None:
    method = trainer(toy_job(n_unlabeled=0), labeled_only=True)
    assert [phase.name for phase in method.phases()] == [COPY_PASTE]
    at = replace(FIRST, step=90, phase_end=100)
    assert method.request(at).unlabeled.count == 0
    output = method.losses(toy_batch(method.job, n_unlabeled=0), at)
    assert list(output.losses) == ["supervised"]
    assert "box_share" in output.measures


def test_options_do_what_they_say(caplog: pytest.LogCaptureFixture) -> None:
    assert trainer().prediction().members[0].name == "network"
    assert list(trainer().alternative_predictions()) == ["teacher"]
    teacher = trainer(infer="teacher")
    assert teacher.prediction().members[0].name == "teacher"
    assert teacher.alternative_predictions()["student"].members[0].name == "network"
    with caplog.at_level(logging.INFO):
        trainer()
        assert not caplog.records
        trainer(toy_job(configuration=toy_configuration(use_mask_for_norm=(True,))))
    assert "normalized within a mask" in caplog.text
