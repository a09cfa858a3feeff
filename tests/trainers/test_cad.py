"""The checks of confidence-aware adaptive displacement, through `losses()`; the search is in test_displacement."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autossl.planners.plans import NETWORK_CLASSES
from autossl.trainers.base import Batch, Job, Phase, Progress, StepOutput
from autossl.trainers.components.displacement import Decisions, find_displacements
from autossl.trainers.components.losses import hard_label_dice
from autossl.trainers.methods.bcp import (
    BIDIRECTIONAL,
    BidirectionalCopyPaste,
    BidirectionalCopyPasteSettings,
)
from autossl.trainers.methods.bcp import COPY_PASTE as BCP_FIRST
from autossl.trainers.methods.cad import CAD, COPY_PASTE, DISPLACEMENT, CADSettings
from autossl.trainers.registry import make_settings
from toys import toy_batch, toy_configuration, toy_job, toy_schema

FIRST = Progress(step=5, total=100, phase=COPY_PASTE, phase_end=20)
START = Progress(step=20, total=100, phase=DISPLACEMENT, phase_start=20, phase_end=100)
HALF = replace(START, step=60)
CPS_HALF = replace(START, step=50, phase_start=0)
TERMS = {f"{name}_{key}" for name in ("supervised", "pseudo", "cross", "displaced") for key in "ab"}


def trainer(job: Job | None = None, **settings: Any) -> CAD:
    return CAD(job or toy_job(), CADSettings(**settings))


def watched(method: CAD, batch: Batch, at: Progress) -> tuple[StepOutput, dict[str, list[tuple[Tensor, Any]]]]:
    """The step, and by network what it saw and answered, pass by pass."""
    seen: dict[str, list[tuple[Tensor, Any]]] = {"a": [], "b": []}
    hooks = [
        method.parts.trained[f"network_{key}"].register_forward_hook(lambda _, x, z, k=k: seen[k].append((x[0], z)))
        for key, k in (("a", "a"), ("b", "b"))
    ]
    output = method.losses(batch, at)
    for hook in hooks:
        hook.remove()
    return output, seen


class Reader(nn.Module):
    """The image is the probability of class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> list[Tensor]:
        z = torch.logit(x.clamp(1e-6, 1 - 1e-6)) * self.scale
        return [torch.cat([torch.zeros_like(z), z], 1)]


def reading(strong: Any = lambda image: image, **settings: Any) -> CAD:
    """Two classes, networks that read, and a strong view of our choice."""
    method = trainer(toy_job(schema=toy_schema(1)), **settings)
    method.parts.trained |= {"network_a": Reader(), "network_b": Reader()}
    method.teacher.network = Reader()
    method.augment = lambda image, generator, valid: strong(image)  # type: ignore[assignment]
    return method


def painted(method: CAD, value: float) -> Batch:
    """All voxels of both streams say this probability."""
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.labeled.targets = (torch.ones_like(batch.labeled.target),)
    for stream in (batch.labeled, batch.unlabeled):
        stream.views = (torch.full_like(stream.image, value),)
    return batch


# ---------------------------------------------------------------------------------------------------- what is displaced


def test_weak_and_strong_views_are_mixed_alike_and_displaced_ones_seen_by_both() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    strong: list[Tensor] = []
    augment = method.augment

    def spy(image: Tensor, *more: Any) -> Tensor:
        strong.append(augment(image, *more))
        return strong[-1]

    method.augment = spy  # type: ignore[assignment]
    output, seen = watched(method, batch, HALF)
    assert set(output.losses) == TERMS
    mask = method._mask(1, batch.labeled.image, HALF)
    for key, (labeled, unlabeled) in {"a": (batch.labeled.image, batch.unlabeled.image), "b": tuple(strong)}.items():
        x = seen[key][0][0]
        assert torch.equal(x[:1], torch.where(mask, unlabeled[:1], labeled[:1]))
        assert torch.equal(x[1:], torch.where(mask, labeled[1:], unlabeled[1:]))
    assert len(strong) == 2
    assert not torch.equal(seen["a"][0][0], seen["b"][0][0])
    assert torch.equal(seen["a"][1][0], seen["b"][1][0])
    assert seen["a"][1][0].shape == (4, 1, 16, 16)


@pytest.mark.parametrize("regions", [False, True])
def test_displacement_is_exact(regions: bool) -> None:
    """Outside of its box a displaced view is the view; inside, the window of the other view that the search found."""
    method = trainer(toy_job(schema=toy_schema(regions=regions)), side_end=0.5)
    output, seen = watched(method, toy_batch(method.job), HALF)
    views = {key: seen[key][0] for key in "ab"}
    everywhere = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    decided = {
        key: Decisions.of(method.job.probabilities(z[0].detach()), everywhere, regions) for key, (_, z) in views.items()
    }
    limits = method._limits((16, 16), HALF)
    assert limits.threshold == pytest.approx(0.775)
    n_displaced = 0
    for position, (key, other) in enumerate((("a", "b"), ("b", "a"))):
        moves = find_displacements(decided[key], decided[other], everywhere, limits)
        for row, move in enumerate(moves):
            expected = views[key][0][row].clone()
            if move is not None:
                expected[(slice(None), *move.target)] = views[other][0][row][(slice(None), *move.source)]
                n_displaced += 1
            assert torch.equal(seen["a"][1][0][2 * position + row], expected)
        share = sum(move is not None for move in moves) / 2
        assert output.measures[f"displaced_share_{key}"] == share
    assert n_displaced > 0, "the test would show nothing"
    assert float(output.measures["confidence_won_a"]) > 0 or float(output.measures["confidence_won_b"]) > 0


def test_the_least_sure_region_of_a_view_is_replaced_by_what_the_other_is_sure_of() -> None:
    method = reading(lambda image: 1 - (1 - image) / 2)  # the strong view is surer
    batch = painted(method, 0.9)
    assert batch.unlabeled is not None
    for stream in (batch.labeled, batch.unlabeled):
        stream.views[0][:, :, 1:3, 1:3] = 0.59  # smaller than the smallest box
        stream.views[0][:, :, 8:12, 10:14] = 0.59
    output, seen = watched(method, batch, START)
    x = seen["a"][1][0]
    before = seen["a"][0][0]
    changed = x[:2] != before
    assert changed[:, :, 8:12, 10:14].all()
    assert int(changed.sum()) == 2 * 16
    assert torch.allclose(x[:2][changed], torch.tensor(0.95)), "confident, from the strong view"
    assert torch.equal(x[2:], seen["b"][0][0]), "nothing of the strong view is below 0.6"
    assert output.measures["displaced_share_a"] == 1
    assert output.measures["displaced_share_b"] == 0
    assert output.measures["displaced_voxel_share_a"] == pytest.approx(16 / 256)
    assert output.measures["confidence_won_a"] == pytest.approx(0.36, abs=1e-5)
    assert float(output.measures["low_share_a"]) == pytest.approx(20 / 256)


def test_views_without_anything_low_are_used_as_they_are() -> None:
    method = reading()
    output, seen = watched(method, painted(method, 0.99), HALF)
    assert torch.equal(seen["a"][1][0], torch.cat([seen["a"][0][0], seen["b"][0][0]]))
    assert output.measures["displaced_share_a"] == 0
    assert set(output.losses) == TERMS
    equally_unsure, seen = watched(method, painted(method, 0.7), HALF)
    assert equally_unsure.measures["low_share_a"] == 1
    assert equally_unsure.measures["displaced_share_a"] == 0, "the other view knows no better"


def test_what_lies_outside_the_image_is_neither_displaced_nor_judged() -> None:
    method = reading(lambda image: 1 - (1 - image) / 2)
    batch = painted(method, 0.9)
    assert batch.unlabeled is not None
    for stream in (batch.labeled, batch.unlabeled):
        stream.views[0][:, :, 8:12, 10:14] = 0.59
        valid = torch.ones_like(stream.valid)
        valid[:, :, 7:13, 9:15] = False
        stream.valids = (valid,)
    output = method.losses(batch, START)
    assert output.measures["displaced_share_a"] == 0
    nothing = torch.zeros_like(valid)
    batch.labeled.valids = batch.unlabeled.valids = (nothing,)
    output = method.losses(batch, START)
    assert all(term.item() == 0 and term.requires_grad for term in output.losses.values())


def test_threshold_and_size_escalate_over_the_second_phase() -> None:
    method, batch = trainer(), toy_batch(toy_job())
    found = []
    for step in (20, 60, 100):
        measures = method.losses(batch, replace(START, step=step)).measures
        found.append((measures["threshold"], measures["longest_side_share"]))
    assert found[0] == pytest.approx((0.60, 0.125))
    assert found[1] == pytest.approx((0.775, 0.2375))
    assert found[2] == pytest.approx((0.95, 0.35))
    big = replace(START, step=100)
    assert method._limits((64, 40), big).largest_sides == (22, 14)
    assert method._limits((64, 40), big).smallest_sides == (4, 4)
    flat = toy_configuration(3, patch_size=(8, 32, 32), spacing=(5.0, 1.0, 1.0))
    assert trainer(toy_job(configuration=flat))._limits((8, 32, 32), START).smallest_sides == (1, 4, 4)


def test_random_places_are_another_perturbation_of_the_same_size() -> None:
    batch = toy_batch(toy_job())
    runs = {name: watched(trainer(displacement=name, side_end=0.5), batch, HALF) for name in ("llcr", "random")}
    again = watched(trainer(displacement="random", side_end=0.5), batch, HALF)
    x = {name: seen["a"][1][0] for name, (_, seen) in runs.items()}
    assert not torch.equal(x["llcr"], x["random"])
    assert torch.equal(x["random"], again[1]["a"][1][0]), "drawn from the step"
    later = replace(HALF, step=61)
    assert not torch.equal(
        x["random"], watched(trainer(displacement="random", side_end=0.5), batch, later)[1]["a"][1][0]
    )
    for name in ("displaced_share_a", "displaced_voxel_share_a", "displaced_voxel_share_b"):
        assert runs["llcr"][0].measures[name] == runs["random"][0].measures[name]
    assert runs["llcr"][0].measures["displaced_voxel_share_a"] > 0
    won = {name: float(output.measures["confidence_won_a"]) for name, (output, _) in runs.items()}
    assert won["llcr"] > won["random"]


def test_without_displacement_the_frame_is_left() -> None:
    batch = toy_batch(toy_job())
    full = trainer().losses(batch, HALF)
    method = CAD(toy_job(), make_settings(CAD, dict(CAD.ablation)))
    off, seen = watched(method, batch, HALF)
    assert set(off.losses) == {name for name in TERMS if not name.startswith("displaced")}
    assert all(torch.equal(off.losses[name], full.losses[name]) for name in off.losses)
    assert len(seen["a"]) == len(seen["b"]) == 1
    assert not any(name.startswith("displaced") for name in off.measures)


# ------------------------------------------------------------------------------------------------------------ the terms


def test_each_network_learns_from_the_decisions_of_the_other() -> None:
    method, batch = trainer(lambda_max=0.7, ramp_end=0.0), toy_batch(toy_job())
    output, seen = watched(method, batch, HALF)
    for name, index in (("cross", 0), ("displaced", 1)):
        for key, other in (("a", "b"), ("b", "a")):
            labels = seen[other][index][1][0].argmax(1, keepdim=True)
            expected = hard_label_dice(seen[key][index][1], labels)
            term = f"{name}_{key}"
            assert float(output.measures[term]) == pytest.approx(expected.item(), rel=1e-6)
            assert output.losses[term].item() == pytest.approx(0.7 * expected.item(), rel=1e-6)
    assert output.measures["agreement_weight"] == pytest.approx(0.7)
    differs = seen["a"][0][1][0].argmax(1) != seen["b"][0][1][0].argmax(1)
    assert float(output.measures["agreement"]) == pytest.approx(1 - differs.float().mean().item())


def test_own_terms_reach_the_own_network_alone() -> None:
    method, batch = trainer(), toy_batch(toy_job())
    weights = {key: list(method.parts.trained[f"network_{key}"].parameters()) for key in "ab"}
    assert not torch.equal(weights["a"][0], weights["b"][0])
    output = method.losses(batch, HALF)
    for name, term in output.losses.items():
        for key in "ab":
            found = torch.autograd.grad(term, weights[key], allow_unused=True, retain_graph=True)
            reached = any(g is not None and bool((g != 0).any()) for g in found)
            assert reached == name.endswith(key), name
    sum(output.losses.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.network.parameters())


def test_agreement_costs_nothing_and_an_undecided_network_a_half() -> None:
    method = reading(ramp_end=0.0)
    sure = method.losses(painted(method, 1.0), HALF)
    assert all(float(sure.measures[f"{name}_{key}"]) < 1e-4 for name in ("cross", "displaced") for key in "ab")

    def half(image: Tensor) -> Tensor:  # the strong view shows class 1 on one side, class 0 on the other
        stripes = torch.zeros_like(image)
        stripes[..., :8] = 1
        return stripes

    method = reading(half, ramp_end=0.0, displacement="off")
    output = method.losses(painted(method, 0.5), HALF)
    assert float(output.measures["cross_a"]) == pytest.approx(0.5, abs=1e-4), "p = ½, half of the voxels class 1"


@pytest.mark.parametrize("regions", [False, True])
def test_the_first_network_takes_the_step_of_bcp(regions: bool) -> None:
    job = replace(toy_job(schema=toy_schema(regions=regions)), single_component_classes=(1,))
    method, theirs = trainer(job), BidirectionalCopyPaste(job, BidirectionalCopyPasteSettings())
    theirs.parts.trained["network"].load_state_dict(method.parts.trained["network_a"].state_dict())
    theirs.teacher.copy_from(theirs.parts.trained["network"])
    batch = toy_batch(job)
    for mine, their in ((FIRST, replace(FIRST, phase=BCP_FIRST)), (HALF, replace(HALF, phase=BIDIRECTIONAL))):
        a, b = method.losses(batch, mine).losses, theirs.losses(batch, their).losses
        assert all(torch.equal(a[f"{name}_a"], term) for name, term in b.items())
    assert method.losses(batch, FIRST).losses.keys() == {"supervised_a", "supervised_b"}
    half, full = (trainer(job, alpha=alpha).losses(batch, HALF).losses["pseudo_b"] for alpha in (0.25, 0.5))
    assert full.item() == pytest.approx(2 * half.item(), rel=1e-6)


def test_the_teacher_labels_each_view_by_itself() -> None:
    """A strong view that shows the opposite gets the opposite pseudo-labels."""
    method = reading(lambda image: 1 - image)
    batch = painted(method, 0.999)
    assert batch.unlabeled is not None
    for stream in (batch.labeled, batch.unlabeled):
        stream.views[0][..., 8:] = 0.001
    batch.labeled.targets = ((batch.labeled.image > 0.5).long(),)
    output = method.losses(batch, START)
    assert float(output.measures["pseudo_a"]) < 0.01
    assert float(output.measures["pseudo_b"]) < 0.01, "its own view is read, not the weak one"
    assert output.losses["supervised_a"].item() < 0.01
    assert output.losses["supervised_b"].item() > 1, "true labels stay what they are"


def test_networks_that_are_not_finite_are_not_hidden_by_hard_labels() -> None:
    method, batch = trainer(), toy_batch(toy_job())
    nn.init.constant_(method.parts.trained["network_b"].decoder.seg_layers[-1].bias, float("nan"))  # type: ignore[union-attr,index]
    output = method.losses(batch, HALF)
    assert {name for name, term in output.losses.items() if torch.isfinite(term)} == {"supervised_a", "pseudo_a"}
    method = trainer()
    nn.init.constant_(method.teacher.network.decoder.seg_layers[-1].bias, float("nan"))  # type: ignore[union-attr,index]
    output = method.losses(batch, HALF)
    assert {name for name, term in output.losses.items() if not torch.isfinite(term)} == {"pseudo_a", "pseudo_b"}


# -------------------------------------------------------------------------------------------- phases, teacher, settings


def test_the_weight_of_agreement_ramps_up_over_the_second_phase() -> None:
    method, batch = trainer(displacement="off"), toy_batch(toy_job())
    steps = (20, 32, 44, 60)
    found = [method.losses(batch, replace(START, step=step)).measures["agreement_weight"] for step in steps]
    assert found == pytest.approx([0.0067379, 0.2865048, 1, 1], rel=1e-5), "it ends at 0.3 of the phase"


def test_the_teacher_follows_the_first_network_from_the_second_phase_on() -> None:
    method = trainer(ema_decay_max=0.75)
    first, second = (next(method.parts.trained[f"network_{key}"].parameters()) for key in "ab")
    teacher = next(method.teacher.network.parameters())
    with torch.no_grad():
        first.add_(1.0)
    before = teacher.clone()
    method.after_step(FIRST)
    assert torch.equal(teacher, before)
    method.on_phase(Phase(COPY_PASTE), FIRST)
    assert torch.equal(teacher, before)
    method.on_phase(Phase(DISPLACEMENT), START)
    assert torch.equal(teacher, first)
    with torch.no_grad():
        first.add_(1.0)
        second.add_(5.0)
    method.after_step(START)
    assert torch.allclose(teacher, first - 0.75)


def test_streams_and_phases() -> None:
    method = trainer()
    assert [(phase.name, phase.share) for phase in method.phases()] == [(COPY_PASTE, 0.2), (DISPLACEMENT, 0.8)]
    assert {at.phase: method.request(at).unlabeled.count for at in (FIRST, START)} == {COPY_PASTE: 0, DISPLACEMENT: 2}
    alone = trainer(toy_job(n_unlabeled=0), labeled_only=True, infer="teacher")
    assert [phase.name for phase in alone.phases()] == [COPY_PASTE]
    assert alone.prediction().members[0].name == "network_a", "the teacher never moved"
    assert list(trainer(toy_job(n_unlabeled=0)).parts.trained) == ["network"]


def test_the_plain_frame_takes_patches_as_they_are() -> None:
    job = toy_job()
    method, batch = trainer(job, frame="cps"), toy_batch(job)
    assert batch.unlabeled is not None
    assert [phase.name for phase in method.phases()] == [DISPLACEMENT]
    output, seen = watched(method, batch, CPS_HALF)
    assert set(output.losses) == {name for name in TERMS if not name.startswith("pseudo")}
    assert torch.equal(seen["a"][0][0], torch.cat([batch.labeled.image, batch.unlabeled.image]))
    assert seen["a"][1][0].shape[0] == 8
    for key in "ab":
        z = [level[:2] for level in seen[key][0][1]]
        expected = job.supervised_loss(z, batch.labeled.target, batch.labeled.valid)
        assert output.losses[f"supervised_{key}"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.measures["agreement_weight"] == pytest.approx(0.1 * 0.2865048, rel=1e-5)
    early = replace(CPS_HALF, step=1)
    assert set(method.losses(batch, early).losses) == {"supervised_a", "supervised_b"}, "warming up"
    assert "cross_a" in trainer(job, frame="cps", r_warm=0.0).losses(batch, early).losses
    batch.unlabeled = None
    z_a = method.parts.trained["network_a"](batch.labeled.image)
    twin = job.supervised_loss(z_a, batch.labeled.target, batch.labeled.valid)
    assert torch.equal(method.losses(batch, CPS_HALF).losses["supervised_a"], twin)
    teacher, student = (
        next(module.parameters()) for module in (method.teacher.network, method.parts.trained["network_a"])
    )
    with torch.no_grad():
        student.add_(1.0)
    method.after_step(replace(CPS_HALF, step=1))
    assert torch.allclose(teacher, student - 0.5), "ramped in, since it begins untrained"


def test_options_do_what_they_say() -> None:
    method = trainer()
    assert [member.name for member in method.prediction().members] == ["network_a"]
    assert set(method.alternative_predictions()) == {"ensemble", "teacher"}
    both = trainer(infer="ensemble", second="residual")
    spec = both.prediction()
    assert [member.name for member in spec.members] == ["network_a", "network_b"]
    kinds = [member.architecture.network_class_name for member in spec.members]
    assert kinds == [NETWORK_CLASSES["plain"], NETWORK_CLASSES["resenc"]]
    assert set(both.losses(toy_batch(toy_job()), HALF).losses) == TERMS
    assert trainer(infer="teacher").prediction().members[0].name == "teacher"
    assert set(trainer(infer="teacher").alternative_predictions()) == {"student", "ensemble"}
    assert trainer(lambda_max=0.0).losses(toy_batch(toy_job()), HALF).losses.keys() == {
        "supervised_a",
        "supervised_b",
        "pseudo_a",
        "pseudo_b",
    }
