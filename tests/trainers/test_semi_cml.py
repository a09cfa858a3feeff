"""The checks of semi_cml's specification, through `losses()` where they are about the method."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autossl.data.channels import ImageChannels
from autossl.data.problems import InvalidInput
from autossl.inference.predictor import Predictor, Window
from autossl.trainers.base import Batch, Progress, StepOutput, poly_over_run
from autossl.trainers.checkpoints import parts_state
from autossl.trainers.components.area_similarity import area_similarity, area_similarity_contrast, halves_of_axes
from autossl.trainers.components.gated_average import GatedAverage, foreground_score
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.soft_labels import soft_label_loss
from autossl.trainers.methods.semi_cml import MUTUAL, RELEARNING, SemiCML, SemiCMLSettings
from autossl.trainers.methods.supervised import Supervised
from autossl.trainers.phases import Timetable
from toys import toy_batch, toy_configuration, toy_job, toy_schema

TOTAL = 100
MUTUAL_TERMS = {"supervised_1", "supervised_2", "consistency", "area_contrast"}
TWO_IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # disjoint areas


def trainer(
    n_channels: int = 2,
    n_unlabeled: int = 4,
    regions: bool = False,
    channels: ImageChannels | None = None,
    total: int = TOTAL,
    ignore: bool = False,
    **settings: Any,
) -> SemiCML:
    plan, schema = toy_configuration(2, n_channels), toy_schema(regions=regions, ignore=ignore)
    job = toy_job(n_unlabeled=n_unlabeled, total_steps=total, configuration=plan, schema=schema)
    return SemiCML(replace(job, named_channels=channels), SemiCMLSettings(**settings))


def progress(method: SemiCML, fraction: float) -> Progress:
    return Timetable(method.phases(), method.job.total_steps).progress(round(fraction * method.job.total_steps))


def enter(method: SemiCML, better: int = 2) -> None:
    """Into the second phase."""
    method.parts.memory["better"] = better
    phase = next(phase for phase in method.phases() if phase.name == RELEARNING)
    method.on_phase(phase, progress(method, 0.63))


def step(method: SemiCML, batch: Batch | None = None, fraction: float = 0.3) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), progress(method, fraction))


def reached(method: SemiCML, term: Tensor) -> set[str]:
    """Trained parts to which a term's gradient flows."""
    named = [(part, p) for part, module in method.parts.trained.items() for p in module.parameters()]
    found = torch.autograd.grad(term, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {part for (part, _), g in zip(named, found, strict=True) if g is not None and bool((g != 0).any())}


def says(method: SemiCML, side: int, foreground: bool) -> None:
    """Makes a network say one thing everywhere."""
    network: Any = method.parts.trained[f"network_{side}"]
    for head in network.decoder.seg_layers:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        with torch.no_grad():
            head.bias[1 if foreground else 0] = 30.0


def masks(rows: Tensor, copies: int = 20) -> Tensor:
    """Maps [n, 1, copies, 2] from rows [n, 2]."""
    return rows[:, None, None].expand(-1, 1, copies, -1).clone()


# ------------------------------------------------------------------------------------------------- the area contrast


def test_closed_forms_of_the_contrast() -> None:
    apart = masks(TWO_IMAGES)
    assert area_similarity_contrast(apart, apart).loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-5)
    same = masks(TWO_IMAGES[:1].repeat(2, 1))
    assert area_similarity_contrast(same, same).loss.item() == pytest.approx(math.log(3), abs=1e-5)
    assert area_similarity_contrast(apart[:1], same[:1]).loss.item() == 0
    crossed = area_similarity_contrast(apart, apart.flip(0)).loss.item()  # the partner's area is another patch's
    assert crossed == pytest.approx(math.log(2 + math.e), abs=1e-5)


def test_similarities() -> None:
    maps = torch.cat([masks(TWO_IMAGES), torch.zeros(2, 1, 20, 2), masks(torch.tensor([[1.0, 1.0]]))])
    dice = area_similarity(maps)[..., 0]
    assert dice[0, 0].item() == pytest.approx(1)
    assert dice[2, 3].item() == pytest.approx(1), "two empty maps"
    assert dice[0, 1].item() == pytest.approx(0, abs=1e-6)
    assert dice[0, 4].item() == pytest.approx(2 * 20 / 60)
    cosine = area_similarity(maps, "cos")[..., 0]
    assert cosine[0, 4].item() == pytest.approx(1 / math.sqrt(2))
    assert cosine[2, 3].item() == 0
    torch.testing.assert_close(dice, dice.T)


def test_swapping_sides_and_reordering_patches_changes_nothing_and_both_sides_move() -> None:
    generator = torch.Generator().manual_seed(0)
    q_1, q_2 = (torch.rand(3, 2, 6, 6, generator=generator, requires_grad=True) for _ in range(2))
    loss = area_similarity_contrast(q_1, q_2).loss
    torch.testing.assert_close(area_similarity_contrast(q_2, q_1).loss, loss)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(area_similarity_contrast(q_1[order], q_2[order]).loss, loss)
    loss.backward()
    for q in (q_1, q_2):
        assert q.grad is not None
        assert q.grad.abs().sum() > 0


def test_patches_that_show_nothing_take_no_part() -> None:
    apart = masks(TWO_IMAGES)
    with_empty = torch.cat([apart, torch.full_like(apart[:1], 0.1)])
    assert with_empty[2].sum() > 1, "small probabilities that add up to more than a voxel"
    found = area_similarity_contrast(with_empty, with_empty)
    torch.testing.assert_close(found.loss, area_similarity_contrast(apart, apart).loss)
    assert float(found.row_share) == pytest.approx(2 / 3)
    one_sided = torch.cat([apart, torch.zeros_like(apart[:1])])  # the other side shows something there: it stays
    assert float(area_similarity_contrast(one_sided, torch.cat([apart, apart[:1]])).row_share) == 1
    assert float(area_similarity_contrast(with_empty[1:], with_empty[1:]).row_share) == 0, "one is left: no contrast"
    nothing = torch.zeros(2, 1, 4, 4, requires_grad=True)
    loss = area_similarity_contrast(nothing, nothing).loss
    loss.backward()
    assert loss.item() == 0


def test_rare_classes_take_no_part_where_there_are_several() -> None:
    apart = masks(TWO_IMAGES)
    rare = torch.zeros_like(apart)
    rare[0, 0, :6] = 1  # enough in one patch alone
    found = area_similarity_contrast(torch.cat([apart, rare], 1), torch.cat([apart, rare], 1))
    torch.testing.assert_close(found.loss, area_similarity_contrast(apart, apart).loss)
    assert float(found.class_share) == 0.5
    rare[1, 0, :6] = 1
    assert float(area_similarity_contrast(torch.cat([apart, rare], 1), torch.cat([apart, rare], 1)).class_share) == 1


def test_what_is_not_finite_shows() -> None:
    maps = masks(TWO_IMAGES)
    maps[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(area_similarity_contrast(maps, masks(TWO_IMAGES)).loss)


def test_a_patch_is_cut_along_every_axis() -> None:
    maps = torch.arange(2 * 3 * 5, dtype=torch.float32).reshape(1, 1, 2, 3, 5)
    tiles = halves_of_axes(maps)
    assert tiles.shape == (8, 1, 1, 2, 3)
    assert tiles.sum() == maps.sum()
    assert tiles[0, 0, 0].tolist() == [[0, 1, 2], [5, 6, 7]]


def test_a_single_unlabeled_patch_is_contrasted_by_its_tiles() -> None:
    method = trainer()
    batch = toy_batch(method.job, n_unlabeled=1)
    output = step(method, batch)
    assert output.losses["area_contrast"].item() > 0
    p = [method.job.probabilities(method.parts.trained[f"network_{s}"](batch.unlabeled.image[:, [s - 1]])[0])[:, 1:]  # type: ignore[union-attr]
         for s in (1, 2)]  # fmt: skip
    expected = area_similarity_contrast(halves_of_axes(p[0]), halves_of_axes(p[1])).loss
    torch.testing.assert_close(output.losses["area_contrast"], 0.35 * expected)


def test_a_patch_that_alone_shows_foreground_is_contrasted_by_its_tiles() -> None:
    method = trainer()
    valid = torch.ones(3, 1, 16, 16, dtype=torch.bool)
    q = torch.full((3, 3, 16, 16), 0.1)
    q[1, 1] = 0.9
    q[1, 1, :8] = 0.6
    loss, measures = method._area_contrast(q, q, valid)
    tiles = halves_of_axes(q[1:2, 1:])
    assert loss.item() == area_similarity_contrast(tiles, tiles).loss.item() > 0
    assert float(measures["area_row_share"]) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------------- the teacher


def copies(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    return layer


def weight_of(teacher: GatedAverage) -> float:
    network: Any = teacher.network
    return float(network.weight)


def test_the_average_moves_only_with_good_scores() -> None:
    teacher = GatedAverage(copies(0.0))
    pool: list[float] = []
    for score in (0.81, 0.76, 0.79, 0.83, 0.8):
        pool = teacher.offer(copies(1.0), score, pool)
    assert weight_of(teacher) == 0
    assert not teacher.is_ready(pool)
    pool = teacher.offer(copies(2.0), 0.78, pool)
    assert weight_of(teacher) == 2, "the score that fills the pool makes a copy"
    assert teacher.offer(copies(9.0), 0.76, pool) == pool
    assert weight_of(teacher) == 2
    after = teacher.offer(copies(3.0), 0.8, pool)
    assert weight_of(teacher) == pytest.approx(0.95 * 2 + 0.05 * 3)
    assert after == [0.78, 0.79, 0.8, 0.8, 0.81, 0.83]
    before = weight_of(teacher)
    teacher.offer(copies(3.0), 0.7801, after)
    assert weight_of(teacher) == pytest.approx(0.99 * before + 0.01 * 3), "never less than a hundredth"


def test_what_is_not_finite_neither_moves_nor_fills() -> None:
    teacher = GatedAverage(copies(1.0), size=1)
    assert teacher.offer(copies(2.0), float("nan"), []) == []
    assert teacher.offer(copies(float("nan")), 0.5, []) == []
    assert teacher.offer(copies(float("inf")), 0.9, [0.5]) == [0.5]
    assert weight_of(teacher) == 1


def test_scores_are_dice_of_decisions_over_the_classes_that_are_there() -> None:
    target = torch.zeros(1, 1, 2, 4, dtype=torch.long)
    target[..., 0, :] = 1
    z = torch.zeros(1, 4, 2, 4)
    z[:, 1, 0, :2] = z[:, 2, 1, :2] = 5.0  # half of class 1; of class 2 what is not there; class 3 nowhere
    everywhere = torch.ones(1, 1, 2, 4, dtype=torch.bool)
    assert foreground_score(z, target, everywhere).tolist() == pytest.approx([(2 * 2 / 6 + 0) / 2, 1])
    upper = torch.zeros_like(everywhere)
    upper[..., 0, :] = True
    assert foreground_score(z, target, upper).tolist() == pytest.approx([2 * 2 / 6, 1])
    assert foreground_score(torch.zeros_like(z), 0 * target, everywhere).tolist() == [0, 0]
    assert foreground_score(z / 0, target, everywhere).tolist() == [0, 0]
    regions = torch.cat([target, 0 * target], 1).float()
    assert foreground_score(20 * regions - 10, regions, everywhere, regions=True).tolist() == [1, 1]


def walk(method: SemiCML, steps: range, batch: Batch | None = None) -> None:
    for index in steps:
        at = Timetable(method.phases(), method.job.total_steps).progress(index)
        method.losses(batch or toy_batch(method.job, seed=index), at)
        method.after_step(at)


def test_scores_are_offered_at_points_after_the_first_part() -> None:
    method = trainer(total=200)
    teacher = method.teachers[1]
    teacher.offer = lambda network, score, pool: [*pool, score]  # type: ignore[method-assign]
    walk(method, range(30))
    scores = method.parts.memory["pool_1"]
    timetable = Timetable(method.phases(), 200).spans[0]
    points = [s for s in range(30) if 50 * (s + 1) // timetable.end > 50 * s // timetable.end and (s + 1) / 200 > 0.12]
    assert len(scores) == len(points) > 0
    assert all(0 <= score <= 1 for score in scores)
    whole = trainer(total=200)
    for one in whole.teachers.values():
        one.offer = lambda network, score, pool: [*pool, score]  # type: ignore[method-assign]
    walk(whole, range(timetable.end))
    assert len(whole.parts.memory["pool_1"]) == sum(
        50 * (s + 1) // timetable.end > 50 * s // timetable.end and (s + 1) / 200 > 0.12 for s in range(timetable.end)
    )


def test_an_offered_score_is_the_mean_since_the_point_before() -> None:
    method = trainer(total=1000)
    given: list[float] = []
    method.teachers[1].offer = lambda network, score, pool: given.append(score) or [score]  # type: ignore
    start = next(s for s in range(125, 200) if 50 * (s + 1) // 630 > 50 * s // 630)
    before = next(s for s in range(start - 1, 0, -1) if 50 * (s + 1) // 630 > 50 * s // 630)
    walk(method, range(before - 3, before + 1))
    found = []
    for index in range(before + 1, before + 20):
        at = Timetable(method.phases(), 1000).progress(index)
        found.append(float(method.losses(toy_batch(method.job, seed=index), at).measures["labeled_dice_1"]))
        method.after_step(at)
        if given:
            break
    assert given[0] == pytest.approx(sum(found) / len(found), abs=1e-6)
    assert method.parts.memory["scores"].abs().sum() == 0


@pytest.mark.parametrize("right", [1, 2])
def test_the_better_modality_is_the_one_that_fits_the_labels_at_the_end_of_the_phase(right: int) -> None:
    method = trainer()
    batch = toy_batch(method.job)
    batch.labeled.targets = (torch.ones_like(batch.labeled.target),)
    says(method, right, False)
    says(method, 3 - right, True)
    walk(method, range(10), batch)  # until now the other one is right
    says(method, right, True)
    says(method, 3 - right, False)
    walk(method, range(51, 63), batch)
    assert method.prediction().members[0].name == f"network_{right}"
    phase = method.phases()[1]
    method.on_phase(phase, progress(method, 0.63))
    assert method.parts.memory["better"] == right
    asked = trainer(better=str(3 - right))
    walk(asked, range(51, 63), batch)
    asked.on_phase(phase, progress(asked, 0.63))
    assert asked.parts.memory["better"] == 3 - right
    assert list(asked.parts.followers) == [f"teacher_{3 - right}"]


def test_a_teacher_that_was_never_made_begins_as_the_network_is() -> None:
    method = trainer()
    network = method.parts.trained["network_2"]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 1
    method.parts.memory["pool_2"] = [0.5] * 6
    enter(method)
    first = dict(method.parts.followers["teacher_2"].named_parameters())
    assert not any(torch.equal(first[name], value) for name, value in network.named_parameters())
    method.parts.memory["pool_2"] = [0.5] * 5
    enter(method)
    assert all(torch.equal(first[name], value) for name, value in network.named_parameters())


@pytest.mark.parametrize(
    "wrong, setting, replaced", [("teacher", "replace", 1), ("network", "replace", 0), ("teacher", "keep", 0)]
)
def test_a_teacher_that_is_worse_than_its_network_is_replaced(wrong: str, setting: Any, replaced: int) -> None:
    method = trainer(better="2", worse_teacher=setting)
    batch = toy_batch(method.job)
    batch.labeled.targets = (torch.ones_like(batch.labeled.target),)
    says(method, 2, wrong == "teacher")
    method.teachers[2].copy_from(method.parts.trained["network_2"])
    if wrong == "network":  # until the last stretch, which alone counts, the teacher is as wrong
        walk(method, range(50), batch)
        assert method.parts.memory["teacher_scores"].sum() == 0
    method.parts.memory["pool_2"] = [2.0] * 6  # made, and never to move
    says(method, 2, wrong == "network")
    method.teachers[2].copy_from(method.parts.trained["network_2"])
    says(method, 2, wrong == "teacher")
    walk(method, range(51, 63), batch)
    expected = [0, 12] if wrong == "teacher" else [12, 12]
    assert method.parts.memory["teacher_scores"][1].tolist() == expected
    enter(method)
    assert step(method, batch, 0.8).measures["teacher_replaced"] == replaced
    mine, teachers = (module.state_dict() for module in (method._network(2), method.teachers[2].network))
    assert all(torch.equal(mine[name], value) for name, value in teachers.items()) == bool(replaced)


def test_the_teacher_stays_as_it_is_while_it_teaches() -> None:
    method = trainer()
    enter(method)
    before = {k: v.clone() for k, v in method.parts.followers["teacher_2"].state_dict().items()}
    memory = {key: value.clone() if isinstance(value, Tensor) else value for key, value in method.parts.memory.items()}
    walk(method, range(90, 100))
    assert all(torch.equal(before[k], v) for k, v in method.parts.followers["teacher_2"].state_dict().items())
    for key, value in memory.items():
        now = method.parts.memory[key]
        assert torch.equal(value, now) if isinstance(value, Tensor) else value == now


# ------------------------------------------------------------------------------------------------------- first phase


def test_terms_of_the_first_phase() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    output = step(method, batch, 0.3)
    assert set(output.losses) == MUTUAL_TERMS
    networks = method.parts.trained
    for side in (1, 2):
        z = networks[f"network_{side}"](batch.labeled.image[:, [side - 1]])
        expected = method.job.supervised_loss(z, batch.labeled.target, batch.labeled.valid)
        torch.testing.assert_close(output.losses[f"supervised_{side}"], expected)
    p = [method.job.probabilities(networks[f"network_{s}"](batch.unlabeled.image[:, [s - 1]])[0]) for s in (1, 2)]
    expected = 0.1 * sigmoid_ramp(0.3, 2.47) * probability_mse(p[0], p[1])
    torch.testing.assert_close(output.losses["consistency"], expected)
    expected = 0.35 * area_similarity_contrast(p[0][:, 1:], p[1][:, 1:]).loss
    torch.testing.assert_close(output.losses["area_contrast"], expected)
    assert output.measures["pair_share"] == output.measures["area_row_share"] == 1


def test_the_ramp_goes_on_beyond_the_run() -> None:
    assert sigmoid_ramp(0.63, 2.47) == pytest.approx(0.0624, abs=1e-4)
    method = trainer()
    assert step(method, fraction=0.62).measures["consistency_weight"] == pytest.approx(0.1 * sigmoid_ramp(0.62, 2.47))


@pytest.mark.parametrize("term", ["consistency", "area_contrast"])
def test_both_networks_learn_from_what_both_say(term: str) -> None:
    method = trainer()
    assert reached(method, step(method).losses[term]) == {"network_1", "network_2"}
    assert reached(method, step(method).losses["supervised_1"]) == {"network_1"}


def test_voxels_outside_the_image_count_nowhere() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    valid = torch.ones_like(batch.unlabeled.valid)
    valid[..., 8:] = False
    batch.unlabeled.valids = (valid,)
    output = step(method, batch)
    p = [method.job.probabilities(method.parts.trained[f"network_{s}"](batch.unlabeled.image[:, [s - 1]])[0])
         for s in (1, 2)]  # fmt: skip
    expected = area_similarity_contrast(p[0][:, 1:, :, :8], p[1][:, 1:, :, :8]).loss
    torch.testing.assert_close(output.measures["area_contrast"], expected.detach())
    expected = probability_mse(p[0][..., :8], p[1][..., :8])
    torch.testing.assert_close(output.measures["consistency"], expected.detach())
    assert float(output.measures["valid_share"]) == 0.5


def test_the_contrast_can_be_switched_off_and_so_can_the_consistency() -> None:
    method = trainer(**SemiCML.ablation)
    assert set(step(method).losses) == MUTUAL_TERMS - {"area_contrast"}
    enter(method)
    late = step(method, fraction=0.95)
    assert set(late.losses) == {"supervised_1", "supervised_2", "relearning_1", "relearning_2"}
    whole = trainer()
    enter(whole)
    assert late.measures["relearning_weight"] == step(whole, fraction=0.95).measures["relearning_weight"]
    assert set(step(trainer(lambda_mse=0)).losses) == MUTUAL_TERMS - {"consistency"}
    cosine = step(trainer(similarity="cos")).losses["area_contrast"]
    assert cosine.item() != step(trainer()).losses["area_contrast"].item()


# ------------------------------------------------------------------------------------------------------ second phase


def test_phases_switch_at_the_border() -> None:
    method = trainer(total=1000)
    assert [phase.name for phase in method.phases()] == [MUTUAL, RELEARNING]
    assert progress(method, 0.629).phase == MUTUAL
    assert progress(method, 0.63).phase == RELEARNING
    enter(method)
    early, late = step(method, fraction=0.92), step(method, fraction=0.93)
    assert "area_contrast" not in early.losses
    assert "consistency" not in early.losses
    assert set(early.losses) == {"supervised_1", "supervised_2", "relearning_1", "relearning_contrast"}
    assert set(late.losses) == set(early.losses) | {"relearning_2"}
    assert (early.measures["learning"], late.measures["learning"]) == (1, 2)


@pytest.mark.parametrize("settings, second", [({}, 0.1), ({"relearning_rate": 0.5}, 0.5)])
def test_the_learning_rate_falls_to_0_in_both_phases(settings: Any, second: float) -> None:
    method = trainer(total=1000, **settings)
    first, last = method.phases()
    assert first.groups is not None
    assert first.groups == last.groups, "so that the optimizers go on"
    assert [group.prefix for group in first.groups] == ["network_1", "network_2"]
    factor = first.groups[0].factor
    border = Timetable(method.phases(), 1000).spans[0].end
    assert factor(progress(method, 0)) == 1
    assert factor(progress(method, 0.315)) == pytest.approx(0.5**0.9, abs=1e-2)
    assert factor(Timetable(method.phases(), 1000).progress(border - 1)) < 0.004
    assert factor(Timetable(method.phases(), 1000).progress(border)) == second
    assert factor(progress(method, 0.999)) < 0.01 * second


def test_where_nothing_is_re_learned_the_learning_rate_is_that_of_the_supervised_run() -> None:
    method = trainer(total=1000, lambda_mse=0, lambda_asc=0, lambda_prel=0)
    for phase, fraction in zip(method.phases(), (0.315, 0.8), strict=True):
        assert phase.groups is not None
        at = progress(method, fraction)
        assert {group.factor(at) for group in phase.groups} == {poly_over_run(at)}


def teacher_says(method: SemiCML, batch: Batch) -> Tensor:
    assert batch.unlabeled is not None
    teacher = method.teachers[2]
    return method.job.probabilities(teacher.logits(batch.unlabeled.image[:, [1]]))


def test_terms_of_the_second_phase() -> None:
    method = trainer(noise=0)
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    enter(method)
    with torch.no_grad():
        for parameter in method.parts.trained["network_2"].parameters():
            parameter *= 1.1
    output = step(method, batch, 0.95)
    q, contrasts = teacher_says(method, batch), []
    for side in (1, 2):
        z = method.parts.trained[f"network_{side}"](batch.unlabeled.image[:, [side - 1]])[0]
        p = z.softmax(1)
        ce = -(q * z.log_softmax(1)).sum(1).mean()
        axes = (0, 2, 3)
        dice = ((2 * (p * q).sum(axes) + 1e-5) / (p.sum(axes) + q.sum(axes) + 1e-5))[1:].mean()
        torch.testing.assert_close(output.losses[f"relearning_{side}"], 0.9 * (ce + 0.7 * (1 - dice)))
        contrasts.append(area_similarity_contrast(q[:, 1:], p[:, 1:]).loss)
    torch.testing.assert_close(output.losses["relearning_contrast"], 0.01 * (contrasts[0] + contrasts[1]))


def test_gradients_of_the_second_phase() -> None:
    method = trainer()
    enter(method)
    early, late = step(method, fraction=0.8), step(method, fraction=0.95)
    for name in ("relearning_1", "relearning_contrast"):
        assert reached(method, early.losses[name]) == {"network_1"}
    assert reached(method, late.losses["relearning_2"]) == {"network_2"}
    assert reached(method, late.losses["relearning_contrast"]) == {"network_1", "network_2"}
    torch.stack(list(late.losses.values())).sum().backward()
    assert all(p.grad is None for p in method.parts.followers["teacher_2"].parameters())


def test_the_better_network_rests_altogether_without_labels() -> None:
    method = trainer(prel_supervised=0)
    enter(method, better=1)
    early = step(method, fraction=0.8)
    assert set(early.losses) == {"relearning_2", "relearning_contrast"}
    torch.stack(list(early.losses.values())).sum().backward()
    assert all(p.grad is None for p in method.parts.trained["network_1"].parameters())
    enter(method, better=2)
    half = trainer(prel_supervised=0.5)
    enter(half)
    whole = trainer()
    enter(whole)
    batch = toy_batch(whole.job)
    terms = [step(one, batch, 0.8).losses["supervised_1"] for one in (half, whole)]
    torch.testing.assert_close(2 * terms[0], terms[1])


def test_nothing_to_learn_from_is_a_zero() -> None:
    method = trainer(prel_supervised=0)
    enter(method)
    output = step(method, toy_batch(method.job, n_unlabeled=0), 0.8)
    assert list(output.losses) == ["relearning"]
    output.losses["relearning"].backward()


def test_the_teacher_averages_predictions_under_noise() -> None:
    method = trainer()
    enter(method)
    image = toy_batch(method.job).unlabeled.image  # type: ignore[union-attr]
    seen: list[Tensor] = []
    plain = method.teachers[2].logits
    method.teachers[2].logits = lambda x: seen.append(x) or plain(x)  # type: ignore
    q = method._soft_labels(image, 2, progress(method, 0.8))
    assert len(seen) == 4
    noise = torch.stack([x - image[:, [1]] for x in seen])
    assert noise.abs().max() <= 0.2 + 1e-6
    assert noise.min() < -0.15 < 0.15 < noise.max()
    assert noise.std() == pytest.approx(0.1, abs=0.01)
    torch.testing.assert_close(q, torch.stack([plain(x).softmax(1) for x in seen]).mean(0))
    assert not q.requires_grad


def test_re_learning_can_be_switched_off() -> None:
    method = trainer(r_prel=1)
    assert [phase.name for phase in method.phases()] == [MUTUAL]
    assert method.parts.followers == {}
    assert set(step(method, fraction=0.95).losses) == MUTUAL_TERMS
    walk(method, range(80, 100))
    assert method.prediction().members[0].name in ("network_1", "network_2")
    without = trainer(lambda_prel=0)
    enter(without)
    assert set(step(without, fraction=0.95).losses) == {"supervised_1", "supervised_2"}


def test_soft_labels_of_regions() -> None:
    z, q = torch.tensor([[[[0.5]], [[-1.0]]]]), torch.tensor([[[[0.7]], [[0.2]]]])
    valid = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    p = z.sigmoid()
    bce = -(q * p.log() + (1 - q) * (1 - p).log()).mean()
    dice = (2 * p * q / (p + q)).mean()
    assert soft_label_loss(z, q, valid, True, 0.7).item() == pytest.approx((bce + 0.7 * (1 - dice)).item(), abs=1e-4)
    method = trainer(regions=True)
    assert set(step(method).losses) == MUTUAL_TERMS
    enter(method)
    assert all(torch.isfinite(term) for term in step(method, fraction=0.95).losses.values())


def test_a_teacher_that_is_not_finite_makes_its_terms_so() -> None:
    method = trainer()
    enter(method)
    with torch.no_grad():
        next(method.parts.followers["teacher_2"].parameters()).fill_(float("nan"))
    terms = step(method, fraction=0.95).losses
    assert {name for name, term in terms.items() if not torch.isfinite(term)} == {
        "relearning_1", "relearning_2", "relearning_contrast",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- modalities


def lacking(batch: Batch, labeled: list[list[bool]], unlabeled: list[list[bool]]) -> Batch:
    """Some cases lack a channel: it is 0 before augmentation and something else after it."""
    assert batch.unlabeled is not None
    batch.labeled.has_channel, batch.unlabeled.has_channel = torch.tensor(labeled), torch.tensor(unlabeled)
    return batch


def test_a_case_that_lacks_a_modality_trains_the_network_of_the_other_alone() -> None:
    method = trainer()
    batch = lacking(toy_batch(method.job), [[True, True], [True, False]], [[True, True], [False, True]])
    assert batch.unlabeled is not None
    output = step(method, batch)
    first, second = batch.labeled.target, batch.labeled.target[:1]
    for side, target in ((1, first), (2, second)):
        z = method.parts.trained[f"network_{side}"](batch.labeled.image[: len(target), [side - 1]])
        expected = method.job.supervised_loss(z, target, batch.labeled.valid[: len(target)])
        torch.testing.assert_close(output.losses[f"supervised_{side}"], expected)
    assert output.measures["pair_share"] == 0.5
    p = [method.job.probabilities(method.parts.trained[f"network_{s}"](batch.unlabeled.image[:1, [s - 1]])[0])
         for s in (1, 2)]  # fmt: skip
    torch.testing.assert_close(output.measures["consistency"], probability_mse(p[0], p[1]).detach())


def test_nobody_has_both() -> None:
    method = trainer()
    batch = lacking(toy_batch(method.job), [[True, False]] * 2, [[True, False], [False, True]])
    output = step(method, batch)
    assert set(output.losses) == {"supervised_1", "supervised_2"}
    assert output.losses["supervised_2"].item() == 0
    assert output.measures["pair_share"] == 0
    torch.stack(list(output.losses.values())).sum().backward()
    method.after_step(progress(method, 0.3))
    assert method.parts.memory["scores"][1].tolist() == [0, 0]
    enter(method)
    assert set(step(method, batch, 0.95).losses) == {"supervised_1", "supervised_2"}


def test_each_network_sees_its_own_channels() -> None:
    method = trainer(n_channels=3, groups="2,0+1")
    assert method.channels == {1: (2,), 2: (0, 1)}
    networks = [method._of_one(side) for side in (1, 2)]
    assert [spec.members[0].channels for spec in networks] == [(2,), (0, 1)]
    states = parts_state(method.parts)["networks"]
    image = torch.randn(3, 1, 16, 16)
    zeroed = image.clone()
    zeroed[:2] = 0
    plan, schema = method.job.configuration, method.job.schema
    for spec, same in zip(networks, (True, False), strict=True):
        predictor = Predictor.from_state_dicts(spec, [states], plan, schema, Window.of(plan))
        assert torch.equal(predictor.logits(image), predictor.logits(zeroed)) == same
    batch = toy_batch(method.job)
    before = step(method, batch).losses["supervised_1"]
    batch.labeled.image[:, :2] = 0
    assert torch.equal(step(method, batch).losses["supervised_1"], before)


NAMED = ImageChannels(("T1pre", "FLAIR", "T1+C"), {"late": (2,), "early": (0, 1)})


@pytest.mark.parametrize(
    "given, channels, expected",
    [
        (None, None, {1: (0,), 2: (1,)}),
        (None, NAMED, {1: (2,), 2: (0, 1)}),
        ("FLAIR,T1+C", NAMED, {1: (1,), 2: (2,)}),
        ("flair, early", ImageChannels(NAMED.names, {"early": (0, 2)}), {1: (1,), 2: (0, 2)}),
        ("T1pre+FLAIR,2", NAMED, {1: (0, 1), 2: (2,)}),
        ("[[0],[1, 2]]", NAMED, {1: (0,), 2: (1, 2)}),
        ([[2], [0]], None, {1: (2,), 2: (0,)}),
        (("FLAIR", "0"), NAMED, {1: (1,), 2: (0,)}),
    ],
)
def test_modalities_are_named(given: Any, channels: ImageChannels | None, expected: dict[int, Any]) -> None:
    assert trainer(n_channels=3, channels=channels, groups=given).channels == expected


@pytest.mark.parametrize(
    "given, message",
    [("FLAIR,T2", "'T2' is unknown"), ("early,FLAIR", "share a channel: early, FLAIR"), ("0,3", "'3' is unknown")],
)
def test_modalities_that_make_no_sense_are_refused(given: str, message: str) -> None:
    job = replace(toy_job(configuration=toy_configuration(2, 3)), named_channels=NAMED)
    (problem,) = SemiCML.refusals(job, SemiCMLSettings(groups=given))
    assert message in str(problem)
    assert SemiCML.refusals(job, SemiCMLSettings(groups="FLAIR,2")) == []
    assert SemiCML.needs.modalities == 2


@pytest.mark.parametrize("given", ["FLAIR", "0,1,2", "[[0],[1"])
def test_two_modalities_it_must_be(given: str) -> None:
    with pytest.raises(ValidationError):
        SemiCMLSettings(groups=given)


def test_either_modality_predicts_alone_and_both_together() -> None:
    method = trainer(better="2")
    assert method.prediction() == method._of_one(2)
    others = method.alternative_predictions()
    assert list(others) == ["modality_1", "modality_2", "mean"]
    assert [spec.channels for spec in others.values()] == [{0}, {1}, {0, 1}]
    assert trainer(infer="mean").prediction() == others["mean"]


# ------------------------------------------------------------------------------------------------- what it reduces to


def test_without_weights_each_network_is_the_supervised_run_of_its_modality() -> None:
    method = trainer(lambda_mse=0, lambda_asc=0, lambda_prel=0)
    batch = toy_batch(method.job)
    for fraction in (0.3, 0.95):
        if fraction > 0.63:
            enter(method)
        output = step(method, batch, fraction)
        assert set(output.losses) == {"supervised_1", "supervised_2"}
        for side in (1, 2):
            twin = Supervised(method.job, Supervised.Settings(channels=str(side - 1)))
            own = method.parts.trained[f"network_{side}"]
            twin.parts.trained["network"].load_state_dict(own.state_dict())
            expected = twin.losses(batch, progress(method, fraction)).losses["supervised"]
            assert torch.equal(output.losses[f"supervised_{side}"], expected)


def test_no_unlabeled_case_is_the_twin_unless_asked_otherwise() -> None:
    method = trainer(n_unlabeled=0)
    batch = toy_batch(method.job, n_unlabeled=0)
    mine = method.losses(batch, Progress(99, 100)).losses
    twin = Supervised(method.job, Supervised.Settings()).losses(batch, Progress(99, 100)).losses
    assert list(mine) == ["supervised"]
    assert torch.equal(mine["supervised"], twin["supervised"])
    assert method.alternative_predictions() == {}
    assert method.prediction().members[0].channels is None
    both = trainer(n_unlabeled=0, labeled_only=True)
    assert set(step(both, batch, 0.95).losses) == {"supervised_1", "supervised_2"}
    assert both.parts.followers == {}
    assert len(both.phases()) == 1


def test_an_unknown_channel_is_said_by_build_too() -> None:
    with pytest.raises(InvalidInput, match="unknown"):
        trainer(groups="0,T9")
