"""The checks of transferable semantic augmentation, through `losses()` and `after_step()`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.networks.features import forward_features
from autossl.trainers.base import Batch, Job, Phase, Progress, StepOutput
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.methods.bcp import (
    BIDIRECTIONAL,
    BidirectionalCopyPaste,
    BidirectionalCopyPasteSettings,
)
from autossl.trainers.methods.transmedseg import COPY_PASTE, TRANSFER, TransMedSeg, TransMedSegSettings
from autossl.trainers.registry import make_settings
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

FIRST = Progress(step=5, total=100, phase=COPY_PASTE, phase_end=20)
START = Progress(step=20, total=100, phase=TRANSFER, phase_start=20, phase_end=100)
HALF = replace(START, step=60)
ALL = 100_000
"""Voxels per class: none is left out."""


def trainer(job: Job | None = None, **settings: Any) -> TransMedSeg:
    return TransMedSeg(job or toy_job(), TransMedSegSettings(**settings))


def remembering(method: TransMedSeg, seed: int = 0, count: int = 1000) -> TransMedSeg:
    """With made-up moments of every class."""
    draw = torch.Generator().manual_seed(seed)
    for moments in (method.labeled_moments, method.unlabeled_moments):
        n_classes, dim = moments.mean.shape
        moments.mean.copy_(torch.randn(n_classes, dim, generator=draw))
        root = torch.randn(n_classes, dim, dim, generator=draw)
        if moments.kind == "full":
            moments.cov.copy_(root @ root.mT)
        moments.count.fill_(count)
    return method


def clean_voxels(method: TransMedSeg, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, C], features [n, A] and classes [n] of all labeled voxels."""
    z, taps = forward_features(method.parts.trained["network"], batch.labeled.image, ("dec:last",))
    rows = [values.movedim(1, -1).flatten(0, -2) for values in (z[0], taps["dec:last"], batch.labeled.target)]
    return rows[0], rows[1], rows[2][:, 0]


def by_class(z: Tensor, y: Tensor) -> float:
    """Mean over classes of the mean cross-entropy."""
    return torch.stack([functional.cross_entropy(z[y == c], y[y == c]) for c in torch.unique(y)]).mean().item()


def bound(output: StepOutput) -> float:
    """The augmented cross-entropy: the plain one and what is added to it."""
    return float(output.measures["clean"]) + float(output.measures["tsa"])


def both(output: StepOutput) -> Tensor:
    return output.losses["clean"] + output.losses["tsa"]


def head(method: TransMedSeg) -> Any:
    return method.parts.trained["network"].decoder.seg_layers[-1]  # type: ignore[union-attr,index]


def gradients(method: TransMedSeg, term: Tensor) -> dict[str, Tensor]:
    named = dict(method.parts.trained["network"].named_parameters())
    found = torch.autograd.grad(term, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None and bool((g != 0).any())}


# ----------------------------------------------------------------------------------------------------------- the bound


def test_without_strength_or_moments_it_is_the_cross_entropy() -> None:
    job = toy_job()
    batch = toy_batch(job)
    cases = (
        (remembering(trainer(per_class=ALL)), START),  # strength 0
        (remembering(trainer(per_class=ALL, strength_end=0.0)), HALF),
        (trainer(per_class=ALL), HALF),  # nothing is known
        (remembering(trainer(per_class=ALL), count=63), HALF),  # too little
    )
    for method, at in cases:
        z, _, y = clean_voxels(method, batch)
        output = method.losses(batch, at)
        assert float(output.measures["clean"]) == pytest.approx(by_class(z, y), abs=1e-6)
        assert float(output.measures["tsa"]) == pytest.approx(0, abs=1e-6)
        assert output.losses["clean"].item() == pytest.approx(0.1 * by_class(z, y), abs=1e-6)


def test_closed_form_with_known_moments() -> None:
    """Labeled features go where the unlabeled ones are, and spread as those do, by half of the final strength."""
    method, batch = remembering(trainer(per_class=ALL)), toy_batch(toy_job())
    z, _, y = clean_voxels(method, batch)
    w, s = head(method).weight.flatten(1), 0.125
    shift = method.unlabeled_moments.mean - method.labeled_moments.mean
    expected = z.clone()
    for label in range(3):
        for c in range(3):
            apart = w[c] - w[label]
            more = s * apart @ shift[label] + s / 2 * apart @ method.unlabeled_moments.cov[label] @ apart
            expected[y == label, c] += more
    output = method.losses(batch, HALF)
    assert output.measures["tsa_strength"] == pytest.approx(s)
    assert bound(output) == pytest.approx(by_class(expected, y), rel=1e-5)
    assert float(output.measures["tsa"]) == pytest.approx(by_class(expected, y) - by_class(z, y), rel=1e-3)
    assert both(output).item() == pytest.approx(0.1 * by_class(expected, y), rel=1e-5)
    assert float(output.measures["mean_shift"]) == pytest.approx(shift.norm(dim=1).mean().item(), rel=1e-5)


def test_spread_alone_can_only_cost_more() -> None:
    method, batch = remembering(trainer(per_class=ALL)), toy_batch(toy_job())
    method.labeled_moments.mean.copy_(method.unlabeled_moments.mean)
    assert float(method.losses(batch, HALF).measures["tsa"]) > 0


def test_one_vector_added_to_all_class_weights_changes_nothing() -> None:
    batch, found = toy_batch(toy_job()), []
    for more in (0.0, 1.5):
        method = remembering(trainer())
        with torch.no_grad():
            head(method).weight += more * torch.arange(4).view(1, 4, 1, 1)
        found.append(bound(method.losses(batch, HALF)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_class_is_augmented_once_enough_of_it_was_seen() -> None:
    method, batch = remembering(trainer(per_class=ALL)), toy_batch(toy_job())
    z, _, y = clean_voxels(method, batch)
    method.unlabeled_moments.count[1] = 63
    output = method.losses(batch, HALF)
    assert float(output.measures["classes_ready_share"]) == pytest.approx(2 / 3)
    method.unlabeled_moments.count[:] = 63
    assert bound(method.losses(batch, HALF)) == pytest.approx(by_class(z, y), abs=1e-6)
    method.unlabeled_moments.count[:] = 64
    assert float(method.losses(batch, HALF).measures["classes_ready_share"]) == 1
    method.labeled_moments.count[2] = 0
    assert float(method.losses(batch, HALF).measures["classes_ready_share"]) == pytest.approx(2 / 3)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_features_and_classifier_learn_from_it_and_nothing_else() -> None:
    method, batch = remembering(trainer()), toy_batch(toy_job())
    found = gradients(method, both(method.losses(batch, HALF)))
    assert "decoder.seg_layers.1.weight" in found
    assert any(name.startswith("encoder") for name in found)
    assert "decoder.seg_layers.0.weight" not in found, "full resolution alone"
    sum(method.losses(batch, HALF).losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.network.parameters())
    method.after_step(HALF)
    for moments in (method.labeled_moments, method.unlabeled_moments):
        assert not any(value.requires_grad for value in moments.state_dict().values())


def test_the_correction_need_not_pull_at_the_classifier() -> None:
    batch = toy_batch(toy_job())
    pulled, plain, spared = (
        gradients(method, both(method.losses(batch, at)))["decoder.seg_layers.1.weight"]
        for method, at in (
            (remembering(trainer()), HALF),
            (remembering(trainer()), START),
            (remembering(trainer(detach_w_correction=True)), HALF),
        )
    )
    assert not torch.allclose(pulled, spared)
    assert not torch.allclose(plain, spared), "the corrected probabilities still count"
    values = [
        method.losses(batch, HALF).losses["tsa"].item()
        for method in (remembering(trainer()), remembering(trainer(detach_w_correction=True)))
    ]
    assert values[0] == values[1]


# ---------------------------------------------------------------------------------------------------------- the memory


def test_a_step_uses_the_memory_of_the_steps_before() -> None:
    method, batch = trainer(per_class=ALL, confidence=0.0, n_min=1), toy_batch(toy_job())
    assert batch.unlabeled is not None
    z, f, y = clean_voxels(method, batch)
    first, again = (bound(method.losses(batch, HALF)) for _ in range(2))
    assert first == again == pytest.approx(by_class(z, y), abs=1e-6)
    assert int(method.labeled_moments.count.sum()) == 0
    z_teacher, taps = forward_features(method.teacher.network, batch.unlabeled.image, ("dec:last",))
    g = taps["dec:last"].movedim(1, -1).flatten(0, -2)
    classes = z_teacher[0].argmax(1).flatten()
    method.after_step(HALF)
    for moments, rows, labels in ((method.labeled_moments, f, y), (method.unlabeled_moments, g, classes)):
        for c in range(3):
            mine = rows[labels == c]
            assert int(moments.count[c]) == len(mine)
            if len(mine):
                assert torch.allclose(moments.mean[c], mine.mean(0), atol=1e-5)
                if moments.kind == "full":
                    assert torch.allclose(moments.cov[c], torch.cov(mine.T, correction=0), atol=1e-5)
    assert method.labeled_moments.kind == "none", "its spread is not needed"
    assert float(method.losses(batch, HALF).measures["tsa"]) != 0
    count = int(method.labeled_moments.count.sum())
    method.losses(batch, FIRST)
    method.after_step(HALF)
    assert int(method.labeled_moments.count.sum()) == count, "rows are taken in once"


def test_running_means_decay() -> None:
    method, batches = trainer(per_class=ALL), [toy_batch(toy_job(), seed) for seed in range(2)]
    means = []
    for batch in batches:
        _, f, y = clean_voxels(method, batch)
        means.append(torch.stack([f[y == c].mean(0) for c in range(3)]))
        method.losses(batch, HALF)
        method.after_step(HALF)
    assert torch.allclose(method.labeled_moments.mean, 0.99 * means[0] + 0.01 * means[1], atol=1e-5)


def test_only_sure_valid_voxels_enter_and_so_many_of_each_class() -> None:
    job = toy_job(schema=toy_schema(ignore=True))
    method, batch = trainer(job, per_class=10, confidence=0.0), toy_batch(job)
    assert batch.unlabeled is not None
    output = method.losses(batch, HALF)
    assert output.measures["tsa_share"] == pytest.approx(30 / 512)
    method.after_step(HALF)
    assert method.labeled_moments.count.tolist() == [10, 10, 10]
    unsure = trainer(job, confidence=1.01)
    output = unsure.losses(batch, HALF)
    assert float(output.measures["confident_share"]) == 0
    unsure.after_step(HALF)
    assert int(unsure.unlabeled_moments.count.sum()) == 0
    assert int(unsure.labeled_moments.count.sum()) > 0
    batch.labeled.valids = (torch.zeros_like(batch.labeled.valid),)
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    output = method.losses(batch, HALF)
    assert output.losses["tsa"].item() == 0
    assert output.losses["tsa"].requires_grad
    before = method.labeled_moments.count.tolist()
    method.after_step(HALF)
    assert method.labeled_moments.count.tolist() == before


def test_a_class_that_the_labels_do_not_show_keeps_its_memory() -> None:
    method, batch = remembering(trainer()), toy_batch(toy_job())
    batch.labeled.targets = (batch.labeled.target.clamp(max=1),)
    mean = method.labeled_moments.mean[2].clone()
    assert torch.isfinite(method.losses(batch, HALF).losses["tsa"])
    method.after_step(HALF)
    assert torch.equal(method.labeled_moments.mean[2], mean)
    assert int(method.labeled_moments.count[2]) == 1000
    assert int(method.labeled_moments.count[1]) > 1000


def test_networks_that_are_not_finite_poison_no_memory() -> None:
    method, batch = trainer(), toy_batch(toy_job())
    nn.init.constant_(method.teacher.network.decoder.seg_layers[-1].bias, float("nan"))  # type: ignore[union-attr,index]
    output = method.losses(batch, HALF)
    assert not torch.isfinite(output.losses["pseudo"])
    assert torch.isfinite(output.losses["supervised"])
    assert torch.isfinite(output.losses["tsa"])
    assert int(sum(len(classes) for _, classes in method._seen[1:])) == 0, "no voxel has a class"
    nn.init.constant_(head(method).weight, float("nan"))
    assert not torch.isfinite(method.losses(batch, HALF).losses["tsa"])
    with torch.no_grad():
        next(method.parts.trained["network"].parameters()).fill_(float("nan"))
    method.losses(batch, HALF)
    method.after_step(HALF)
    for moments in (method.labeled_moments, method.unlabeled_moments):
        assert int(moments.count.sum()) == 0
        assert bool(torch.isfinite(moments.mean).all())


def test_many_features_keep_the_diagonal_alone() -> None:
    job = toy_job(configuration=toy_configuration(architecture=toy_architecture(2, (65, 8, 8))))
    method, batch = trainer(job, confidence=0.0), toy_batch(job)
    assert method.unlabeled_moments.kind == "diag"
    for _ in range(2):
        output = method.losses(batch, HALF)
        method.after_step(HALF)
    assert method.unlabeled_moments.cov.shape == (3, 65)
    assert float(output.measures["tsa"]) != 0
    assert trainer().unlabeled_moments.kind == "full"


# ---------------------------------------------------------------------------------------------- the frame, and settings


def test_without_its_term_a_step_is_that_of_bcp() -> None:
    job = toy_job()
    off = TransMedSegSettings(lambda_tsa=0)
    method = TransMedSeg(job, off)
    theirs = BidirectionalCopyPaste(job, BidirectionalCopyPasteSettings())
    batch = toy_batch(job)
    for mine, at in ((FIRST, FIRST), (HALF, replace(HALF, phase=BIDIRECTIONAL))):
        a, b = method.losses(batch, mine), theirs.losses(batch, at)
        assert list(a.losses) == list(b.losses), "nothing else is left"
        assert all(torch.equal(a.losses[key], b.losses[key]) for key in a.losses)
    a, b = trainer().losses(batch, HALF), theirs.losses(batch, replace(HALF, phase=BIDIRECTIONAL))
    assert set(a.losses) == {*b.losses, "clean", "tsa"}
    assert all(a.losses[key].item() == pytest.approx(b.losses[key].item(), rel=1e-5) for key in b.losses)


def test_the_ablation_keeps_the_labeled_voxels_and_does_not_augment_them() -> None:
    batch = toy_batch(toy_job())
    whole = remembering(trainer())
    plain = remembering(TransMedSeg(toy_job(), make_settings(TransMedSeg, dict(TransMedSeg.ablation))))
    with_it, without = (method.losses(batch, HALF) for method in (whole, plain))
    assert with_it.losses["clean"].item() == without.losses["clean"].item()
    assert with_it.losses["tsa"].item() != 0
    assert without.losses["tsa"].item() == 0
    assert not gradients(plain, without.losses["tsa"])


def test_beside_mean_teacher_patches_stay_as_they_are() -> None:
    job = toy_job()
    method = remembering(trainer(job, base="mean_teacher", per_class=ALL))
    batch = toy_batch(job)
    assert batch.unlabeled is not None
    assert [phase.name for phase in method.phases()] == [TRANSFER]
    with torch.no_grad():
        for weights in method.teacher.network.parameters():
            weights.mul_(1.1)
    z, _, y = clean_voxels(method, batch)
    student = method.parts.trained["network"]
    output = method.losses(batch, HALF)
    assert set(output.losses) == {"supervised", "consistency", "clean", "tsa"}
    supervised = job.supervised_loss(student(batch.labeled.image), batch.labeled.target, batch.labeled.valid)
    assert output.losses["supervised"].item() == pytest.approx(supervised.item(), rel=1e-5)
    p = job.probabilities(student(batch.unlabeled.image)[0])
    q = job.probabilities(method.teacher.logits(batch.unlabeled.image))
    expected = 0.1 * sigmoid_ramp(0.6, 1.0) * (p - q).square().mean()
    assert output.losses["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert float(output.measures["clean"]) == pytest.approx(by_class(z, y), rel=1e-5)
    off = trainer(job, base="mean_teacher", lambda_tsa=0, lambda_mean_teacher=0)
    twin = off.job.supervised_loss(
        off.parts.trained["network"](batch.labeled.image), batch.labeled.target, batch.labeled.valid
    )
    assert torch.equal(off.losses(batch, HALF).losses["supervised"], twin)
    teacher, weights = (next(net.parameters()) for net in (method.teacher.network, student))
    with torch.no_grad():
        weights.add_(1.0)
    method.after_step(replace(HALF, step=0))
    assert torch.equal(teacher, weights), "the first average is the student itself"


def test_the_first_phase_knows_labeled_patches_alone() -> None:
    method = trainer()
    assert method.request(FIRST).unlabeled.count == 0
    assert list(method.losses(toy_batch(method.job, n_unlabeled=0), FIRST).losses) == ["supervised"]
    assert [phase.share for phase in method.phases()] == pytest.approx([0.2, 0.8])
    student = next(method.parts.trained["network"].parameters())
    with torch.no_grad():
        student.add_(1.0)
    method.on_phase(Phase(TRANSFER), START)
    teacher = next(method.teacher.network.parameters())
    assert torch.equal(teacher, student)
    with torch.no_grad():
        student.add_(1.0)
    method.after_step(START)
    assert torch.allclose(teacher, student - 0.99)


def test_the_strength_grows_from_nothing_over_the_second_phase() -> None:
    method, batch = trainer(strength_end=0.4), toy_batch(toy_job())
    found = [method.losses(batch, replace(START, step=step)).measures["tsa_strength"] for step in (20, 40, 99)]
    assert found == pytest.approx([0, 0.1, 0.4 * 79 / 80])


def test_the_reverse_moves_the_teachers_features_towards_the_labeled_ones() -> None:
    method = remembering(trainer(direction="teacher", per_class=ALL, confidence=0.0))
    batch = toy_batch(toy_job())
    assert batch.unlabeled is not None
    _, taps = forward_features(method.teacher.network, batch.unlabeled.image, ("dec:last",))
    f = taps["dec:last"].movedim(1, -1).flatten(0, -2)
    z = functional.linear(f, head(method).weight.flatten(1), head(method).bias)
    y, w, s = z.argmax(1), head(method).weight.flatten(1), 0.125  # the teacher still is the student
    shift = method.labeled_moments.mean - method.unlabeled_moments.mean
    for label in range(3):
        for c in range(3):
            apart = w[c] - w[label]
            more = s * apart @ shift[label] + s / 2 * apart @ method.labeled_moments.cov[label] @ apart
            z[y == label, c] += more
    output = method.losses(batch, HALF)
    assert bound(output) == pytest.approx(by_class(z, y), rel=1e-5)
    assert set(gradients(method, both(output))) == {
        "decoder.seg_layers.1.weight",
        "decoder.seg_layers.1.bias",
    }
    assert (method.labeled_moments.kind, method.unlabeled_moments.kind) == ("full", "none")


def test_options_do_what_they_say() -> None:
    assert trainer().prediction().members[0].name == "network"
    assert trainer(infer="teacher").prediction().members[0].name == "teacher"
    assert trainer(infer="teacher").alternative_predictions()["student"].members[0].name == "network"
    assert trainer(ema_decay_max=0.5).teacher.decay_max == 0.5
    alone = trainer(toy_job(n_unlabeled=0), labeled_only=True, infer="teacher")
    assert [phase.name for phase in alone.phases()] == [COPY_PASTE]
    assert alone.prediction().members[0].name == "network", "the teacher never moved"
    assert alone.alternative_predictions() == {}
    assert TransMedSeg.needs.softmax_only
    half, full = (trainer(alpha=a).losses(toy_batch(toy_job()), HALF).losses["pseudo"] for a in (0.25, 0.5))
    assert full.item() == pytest.approx(2 * half.item(), rel=1e-6)
