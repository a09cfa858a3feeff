"""The checks of mcl_cs's specification, through `losses()` where they are about the method."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.components.augment import Perturbation, channel_dropout, perturb_features
from autossl.trainers.components.contrast import Rows
from autossl.trainers.methods import mcl_cs
from autossl.trainers.methods.cps import CPS, CPSSettings
from autossl.trainers.methods.mcl_cs import MultiscaleContrast, MultiscaleContrastSettings
from autossl.trainers.methods.supervised import Supervised
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

SUPERVISED = ["supervised_a", "supervised_b"]
CONTRASTS = ["patch_contrast", "pixel_contrast"]
DEEP = toy_configuration(2, patch_size=(32, 32), architecture=toy_architecture(2, (4, 8, 8, 8)))


def trainer(n_unlabeled: int = 4, job: dict[str, Any] | None = None, **settings: Any) -> MultiscaleContrast:
    return MultiscaleContrast(toy_job(n_unlabeled=n_unlabeled, **(job or {})), MultiscaleContrastSettings(**settings))


def network(method: Any, key: str) -> Any:
    return method.parts.trained[f"network_{key}"]


def set_outputs(module: Any, logits: tuple[float, ...]) -> None:
    """Makes a network answer the same logits everywhere."""
    for layer in module.decoder.seg_layers:
        nn.init.zeros_(layer.weight)
        layer.bias.data = torch.tensor(logits)


def step(method: Any, fraction: float = 1.0, batch: Batch | None = None, seed: int = 0) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100, seed=seed))


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def gradients(method: MultiscaleContrast, term: Tensor) -> dict[str, bool]:
    """Which trained parts the term moves."""
    found = {}
    for name, module in method.parts.trained.items():
        grads = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
        found[name] = any(grad is not None and bool(grad.any()) for grad in grads)
    return found


# -------------------------------------------------------------------------------------------------- cross-supervision


def test_without_perturbations_it_is_half_the_loss_of_cps_with_dice() -> None:
    method = trainer(perturb="none", job={"configuration": DEEP})
    reference = CPS(toy_job(configuration=DEEP), CPSSettings(cps_dice=True, lambda_max=1.0, ramp_end=0.0))
    for key in "ab":
        network(reference, key).load_state_dict(network(method, key).state_dict())
    mine, theirs = step(method), step(reference)
    expected = (theirs.losses["cross_a"] + theirs.losses["cross_b"]) / 2
    assert mine.losses["cross"].item() == pytest.approx(expected.item(), rel=1e-6)
    for name in SUPERVISED:
        assert mine.losses[name].item() == pytest.approx(theirs.losses[name].item(), rel=1e-6)


def test_weights_follow_their_ramps() -> None:
    method = trainer()
    seen = {r: step(method, r) for r in (0, 0.01, 0.02, 0.1, 0.2, 0.3, 1)}
    assert [list(seen[r].losses) for r in (0, 0.01)] == [SUPERVISED] * 2, "the twins' step"
    cross = [float(seen[r].measures["cross_weight"]) for r in (0.02, 0.2, 1)]
    assert cross == pytest.approx([math.exp(-5 * 0.95**2), 0.2865048, 1], rel=1e-5)
    assert list(seen[0.1].losses) == [*SUPERVISED, "cross"]
    for name in CONTRASTS:
        assert [float(seen[r].measures[f"{name}_weight"]) for r in (0.1, 0.2, 0.3, 1)] == pytest.approx(
            [0, 0.05, 0.1, 0.1]
        )
        assert seen[0.2].losses[name].item() == pytest.approx(0.05 * float(seen[0.2].measures[name]), rel=1e-5)


def test_a_zero_weight_turns_a_term_off_and_the_ablation_both_contrasts() -> None:
    assert list(step(trainer(lambda_cs=0)).losses) == [*SUPERVISED, *CONTRASTS]
    assert "pixel_contrast" not in step(trainer(lambda_x=0)).losses
    without = trainer(**{name: float(value) for name, value in MultiscaleContrast.ablation.items()})
    assert list(step(without).losses) == [*SUPERVISED, "cross"]
    assert list(without.parts.trained) == ["network_a", "network_b"]


def test_what_a_term_moves() -> None:
    output = step(method := trainer())
    both = {"network_a": True, "network_b": True}
    assert gradients(method, output.losses["cross"]) == both | {"patch_head": False, "pixel_head": False}
    assert gradients(method, output.losses["patch_contrast"]) == both | {"patch_head": True, "pixel_head": False}
    assert gradients(method, output.losses["pixel_contrast"]) == both | {"patch_head": False, "pixel_head": True}
    assert gradients(method, output.losses["supervised_a"])["network_b"] is False


def test_no_gradient_through_the_clean_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network pays for its own disturbed prediction; what it said as the other's teacher is a constant."""
    method = trainer()
    losses: list[Tensor] = []
    original = mcl_cs.hard_label_loss

    def keep(z: list[Tensor], target: Tensor, *rest: Any, **named: Any) -> Tensor:
        assert not target.requires_grad
        losses.append(original(z, target, *rest, **named))
        return losses[-1]

    monkeypatch.setattr(mcl_cs, "hard_label_loss", keep)
    modes: list[bool] = []
    for key in "ab":
        network(method, key).register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    cross = step(method).losses["cross"]
    assert modes == [False, False], "the clean passes"
    for key, loss in zip("ab", losses, strict=True):
        parameters = list(network(method, key).parameters())
        found, own = (
            torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) for term in (cross, loss / 2)
        )
        for one, other in zip(found, own, strict=True):
            assert one is other or torch.equal(one, other), "of its own loss alone"


def test_each_learns_what_the_other_says_about_the_clean_patch() -> None:
    method = trainer()
    set_outputs(network(method, "a"), (0.0, 9.0, 0.0))
    set_outputs(network(method, "b"), (0.0, 0.0, 0.0))
    # a, sure of class 1, is told background by b: almost 9, and Dice of nothing; b, uniform, is told class 1
    ce = [math.log(2 * math.exp(-9) + 1) + 9, math.log(3)]
    dice_b = ((2 / 3) / (1 / 3 + 1) + 0) / 2
    expected = (ce[0] + 1 + ce[1] + 1 - dice_b) / 2
    assert float(step(method).measures["cross"]) == pytest.approx(expected, rel=1e-3)
    assert float(step(method).measures["disagreement"]) == 1
    assert float(step(method).measures["reliable_share"]) == 0


@pytest.mark.parametrize("perturb", ["none", "both"])
def test_swapping_the_networks_changes_nothing(perturb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the roles swapped as well, which are drawn."""
    method, swapped = trainer(perturb=perturb), trainer(perturb=perturb)
    for mine, theirs in (("a", "b"), ("b", "a")):
        network(swapped, mine).load_state_dict(network(method, theirs).state_dict())
    first = step(method)
    drawn = method._with_disturbed_input(Progress(100, 100))
    monkeypatch.setattr(swapped, "_with_disturbed_input", lambda at: "b" if drawn == "a" else "a")
    second = step(swapped)
    for name in ("cross", *CONTRASTS):
        assert first.losses[name].item() == pytest.approx(second.losses[name].item(), rel=1e-4), name
    assert total(first).item() == pytest.approx(total(second).item(), rel=1e-5)


def test_a_network_that_is_not_finite_teaches_nothing_and_reaches_no_bank() -> None:
    method = trainer()

    def spoil(module: nn.Module, given: Any, answered: Tensor) -> Tensor:
        spoiled = answered.clone()
        spoiled[-1] = math.nan
        return spoiled

    network(method, "a").decoder.stages[-1].register_forward_hook(spoil)
    output = step(method)
    assert not output.losses["cross"].isfinite()
    assert output.losses["supervised_a"].isfinite()
    method.after_step(Progress(100, 100))
    for scale in ("patch", "pixel"):
        assert method.parts.memory[f"{scale}_bank"].everything().rows.isfinite().all()
    assert float(output.measures["reliable_share"]) <= 0.5, "nothing of the patch that a does not know"


def test_voxels_outside_the_image_do_not_count() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    output = step(method, batch=batch)
    assert output.losses["cross"].item() == 0
    assert float(output.measures["reliable_share"]) == 0
    total(output).backward()


# ------------------------------------------------------------------------------------------------------- disturbances


def test_one_has_a_disturbed_input_and_the_other_disturbed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    seen: dict[str, tuple[Tensor, Any]] = {}
    original = mcl_cs.forward_features

    def keep(net: nn.Module, image: Tensor, taps: list[str], perturb: Any) -> Any:
        seen["a" if net is network(method, "a") else "b"] = (image, perturb)
        return original(net, image, taps, perturb=perturb)

    monkeypatch.setattr(mcl_cs, "forward_features", keep)
    roles = set()
    for seed in range(8):
        step(method, batch=batch, seed=seed)
        (of_input,) = [key for key in "ab" if seen[key][1] is None]
        roles.add(of_input)
        disturbed, clean = seen[of_input][0], seen["b" if of_input == "a" else "a"][0]
        assert torch.equal(clean, torch.cat([batch.labeled.image, batch.unlabeled.image]))
        assert torch.equal(disturbed[:2], batch.labeled.image), "labeled patches pass clean"
        assert not torch.equal(disturbed[2:], batch.unlabeled.image)
        change = seen["b" if of_input == "a" else "a"][1]
        skips = [torch.rand(4, 6, 8, 8) for _ in range(3)]
        changed = change(skips)
        for before, after in zip(skips, changed, strict=True):
            assert torch.equal(before[:2], after[:2]), "labeled patches pass clean"
            assert not torch.equal(before[2:], after[2:])
            assert after.isfinite().all()
    assert roles == {"a", "b"}


def test_the_disturbed_input_sometimes_has_an_empty_box(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(job={"configuration": DEEP})
    batch = toy_batch(method.job, n_unlabeled=3)
    assert batch.unlabeled is not None
    monkeypatch.setattr(method, "augment", lambda image, generator, valid: torch.ones_like(image))
    emptied = 0
    for seed in range(100):
        image = method._disturbed_input(batch.unlabeled, Progress(0, 100, seed=seed))
        holes = (image == 0).flatten(1).sum(1)
        assert set(holes.tolist()) <= {0, 64}, "a quarter of each side"
        emptied += int((holes > 0).sum())
    assert emptied / 300 == pytest.approx(0.2, abs=0.06)


def test_perturbed_features() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.rand(2, 6, 8, 8, generator=generator)
    assert torch.equal(channel_dropout(f, 0.0, generator), f), "strength 0 is the identity"
    (dropped,) = perturb_features([f], "attention", generator)
    attention = f.mean(1, keepdim=True)
    gone = (dropped == 0).all(1, keepdim=True)
    assert torch.equal(dropped, f * ~gone), "voxels are kept or go as a whole"
    for sample in range(2):
        threshold = attention[sample][gone[sample]].min()
        assert attention[sample][~gone[sample]].max() < threshold, "exactly those above a threshold go"
        assert 0.7 <= float(threshold / attention[sample].max()) <= 1
    kinds: tuple[Perturbation, ...] = ("noise", "attention", "dropout")
    for kind in kinds:
        for features in (f, torch.zeros_like(f), torch.full_like(f, 3.0)):
            (changed,) = perturb_features([features], kind, generator)
            assert functional.instance_norm(changed).isfinite().all()


# ----------------------------------------------------------------------------------------------------------- contrast


def test_reliable_is_what_both_say_with_confidence() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    high, low = math.log(2 * 0.81 / 0.19), math.log(2 * 0.79 / 0.21)  # p = 0.81 and 0.79 beside two equal ones
    for a, b, share in ((high, high, 1.0), (high, low, 0.0), (low, low, 0.0)):
        set_outputs(network(method, "a"), (0.0, a, 0.0))
        set_outputs(network(method, "b"), (0.0, b, 0.0))
        clean = method._clean_labels(batch.unlabeled)
        assert clean.reliable.float().mean() == share
        assert (clean.common == 1).all()
    batch.unlabeled.valids = (batch.unlabeled.image > 0,)
    set_outputs(network(method, "b"), (0.0, high, 0.0))
    set_outputs(network(method, "a"), (0.0, high, 0.0))
    assert torch.equal(method._clean_labels(batch.unlabeled).reliable, batch.unlabeled.valid)


def test_true_labels_where_there_are_some_and_common_ones_elsewhere() -> None:
    method = trainer(job={"schema": toy_schema(ignore=True)})
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.labeled.valids = (batch.labeled.image > 0,)
    clean = method._clean_labels(batch.unlabeled)
    (topic,) = method._topics(batch, clean, Progress(0, 100))
    assert torch.equal(topic.labels[:2], batch.labeled.target)
    assert torch.equal(topic.reliable[:2], batch.labeled.valid), "ignore voxels are not known"
    assert torch.equal(topic.labels[2:], clean.common)
    assert torch.equal(topic.reliable[2:], clean.reliable)


def test_regions_are_contrasted_each_for_itself() -> None:
    method = trainer(job={"schema": toy_schema(regions=True)})
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    topics = method._topics(batch, method._clean_labels(batch.unlabeled), Progress(0, 100))
    assert [(topic.n_classes, topic.first) for topic in topics] == [(2, 0), (2, 2)]
    for region, topic in enumerate(topics):
        assert torch.equal(topic.labels[:2, 0], batch.labeled.target[:, region].long())
    output = step(method, batch=batch)
    assert all(output.losses[name].item() > 0 for name in CONTRASTS)
    total(output).backward()
    method.after_step(Progress(100, 100))
    assert (method.parts.memory["pixel_bank"].count > 0).all()


def test_at_most_four_regions_in_a_step() -> None:
    method = trainer()
    labels = torch.zeros(1, 6, 4, 4)
    batch = toy_batch(method.job, n_labeled=1, n_unlabeled=0)
    batch.labeled.targets = (labels,)
    method.job.schema.__dict__["regions_class_order"] = tuple(range(6))
    batch.labeled.valids = (torch.ones(1, 1, 4, 4, dtype=torch.bool),)
    chosen = {
        tuple(topic.first // 2 for topic in method._topics(batch, None, Progress(0, 100, seed=seed)))
        for seed in range(5)
    }
    assert all(len(set(regions)) == 4 for regions in chosen)
    assert len(chosen) > 1


def test_the_other_network_at_the_same_place_is_a_positive(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Rows] = []

    def keep(rows: Rows, *rest: Any) -> Tensor:
        found.append(rows)
        return rows.e.sum()

    monkeypatch.setattr(mcl_cs, "contrast_with_bank", keep)
    method = trainer(perturb="none")
    network(method, "b").load_state_dict(network(method, "a").state_dict())
    step(method)
    assert [rows.e.shape[1] for rows in found] == [128, 64]
    for rows in found:
        half = len(rows.labels) // 2
        torch.testing.assert_close(rows.e[:half], rows.e[half:])
        assert torch.equal(rows.labels[:half], rows.labels[half:])


def test_banks_take_in_the_rows_after_a_step_that_was_taken() -> None:
    method = trainer()
    at = Progress(100, 100)
    method.losses(toy_batch(method.job), at)
    banks = [method.parts.memory[f"{scale}_bank"] for scale in ("patch", "pixel")]
    assert [int(bank.count.sum()) for bank in banks] == [0, 0]
    method.losses(toy_batch(method.job, 1), at)
    n = [len(rows.labels) for _, rows in method._fresh]
    method.after_step(at)
    assert [int(bank.count.sum()) for bank in banks] == n, "of the last step alone"
    step(method, 0.0)
    method.after_step(Progress(0, 100))
    assert [int(bank.pushed.sum()) for bank in banks] == n, "a step without contrast brings nothing"
    assert all(not bank.rows.requires_grad for bank in banks)


def test_background_alone_is_contrasted_with_the_bank_only() -> None:
    method = trainer()
    batch = toy_batch(method.job)
    for key in "ab":
        set_outputs(network(method, key), (9.0, 0.0, 0.0))
    batch.labeled.targets = (torch.zeros_like(batch.labeled.target),)
    output = step(method, batch=batch)
    assert [output.losses[name].item() for name in CONTRASTS] == [0, 0]
    total(output).backward()
    for scale, dim in (("patch", 128), ("pixel", 64)):
        row = functional.normalize(torch.ones(1, dim))
        method.parts.memory[f"{scale}_bank"].push(row, torch.tensor([2]))
    assert all(step(method, batch=batch).losses[name].item() > 0 for name in CONTRASTS)


def test_no_reliable_unlabeled_voxel_leaves_the_labeled_ones() -> None:
    method = trainer(threshold=1.1)
    output = step(method)
    assert float(output.measures["reliable_share"]) == 0
    assert all(output.losses[name].item() > 0 for name in CONTRASTS)


def test_classes_are_told_apart_in_training() -> None:
    """Two textures: embeddings of one class come together, those of different classes go apart."""
    method = trainer(0, {"schema": toy_schema(1)}, lambda_p=1.0, lambda_x=1.0, labeled_only=True)
    parameters = [p for module in method.parts.trained.values() for p in module.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.02, momentum=0.9)
    at = Progress(100, 100)
    x, y = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    cosines = []
    for index in range(60):
        batch = toy_batch(method.job, index, 1, 0)
        target = torch.zeros(1, 1, 16, 16, dtype=torch.long)
        target[..., 8 - index % 3 :] = 1
        texture = torch.where(target == 1, (x // 2 % 2).float(), (y // 2 % 2).float())
        batch.labeled.views, batch.labeled.targets = (texture,), (target,)
        output = method.losses(batch, at)
        rows = dict(method._fresh)["pixel_bank"]
        similarity = rows.e @ rows.e.T
        same = rows.labels[:, None] == rows.labels
        cosines.append((float(similarity[same].mean()), float(similarity[~same].mean())))
        optimizer.zero_grad()
        total(output).backward()
        optimizer.step()
        method.after_step(at)
    assert cosines[-1][0] > cosines[0][0], "within a class"
    assert cosines[-1][1] < cosines[0][1] - 0.3, "between classes"


# --------------------------------------------------------------------------------------------------- run and options


def test_common_background_halves_the_cross_supervision(caplog: pytest.LogCaptureFixture) -> None:
    method = trainer()
    at = Progress(1000, 2000)
    for key in "ab":
        set_outputs(network(method, key), (9.0, 0.0, 0.0))
    batch = toy_batch(method.job)
    method.losses(batch, at)
    assert bool(method._few_foreground)
    method.after_step(Progress(700, 2000))
    assert method.parts.memory["few_foreground_steps"] == 0, "not before the ramp's end"
    method.parts.memory["few_foreground_steps"] = 37
    with caplog.at_level(logging.WARNING):
        method.after_step(at)
        assert not caplog.records
        assert float(method.losses(batch, at).measures["cross_weight"]) == 1
        method._few_foreground = torch.tensor(False)
        method.after_step(at)
        assert method.parts.memory["few_foreground_steps"] == 0, "in a row"
        method.parts.memory["few_foreground_steps"] = 39  # 2 % of 2000
        method.losses(batch, at)
        method.after_step(at)
    assert "confirm each other's background" in caplog.text
    assert float(method.losses(batch, at).measures["cross_weight"]) == 0.5
    background = toy_batch(method.job)
    background.labeled.targets = (torch.zeros_like(background.labeled.target),)
    method.losses(background, at)
    assert not bool(method._few_foreground), "where the labels show nothing either, nothing is missing"


def test_without_unlabeled_cases_it_is_the_twin_or_contrasts_labeled_features() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=0)
    alone = trainer(n_unlabeled=0)
    twin = Supervised(toy_job(n_unlabeled=0), MethodSettings())
    found = step(alone, batch=batch).losses
    assert list(found) == ["supervised"]
    assert torch.equal(found["supervised"], twin.losses(batch, Progress(50, 100)).losses["supervised"])
    assert [member.name for member in alone.prediction().members] == ["network"]
    assert alone.alternative_predictions() == {}
    pair = trainer(n_unlabeled=0, labeled_only=True)
    losses = step(pair, batch=batch).losses
    assert list(losses) == [*SUPERVISED, *CONTRASTS]
    assert all(losses[name].item() > 0 for name in CONTRASTS)
    assert pair.prediction().combine == "mean_probabilities"


def test_the_mean_predicts_or_one_of_the_two() -> None:
    spec = trainer().prediction()
    assert [member.name for member in spec.members] == ["network_a", "network_b"]
    assert (spec.combine, spec.activation) == ("mean_probabilities", "softmax")
    assert list(trainer().alternative_predictions()) == ["network_a", "network_b"]
    single = trainer(single="B")
    assert [member.name for member in single.prediction().members] == ["network_b"]
    assert list(single.alternative_predictions()) == ["mean"]
    assert trainer(job={"schema": toy_schema(regions=True)}).prediction().activation == "sigmoid"


def test_the_scale_of_the_cells_follows_the_plan() -> None:
    deep = trainer(job={"configuration": DEEP})  # decoder stages at strides 4, 2, 1: the nearest to 8 is 4
    assert deep.taps == {"patch": "dec:0", "pixel": "dec:last"}
    assert deep.parts.trained["patch_head"].cells == (2, 2)
    strides = ((1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    plan = toy_configuration(
        3,
        patch_size=(8, 64, 96),
        spacing=(6.0, 1.0, 1.0),
        architecture=toy_architecture(3, (4, 4, 4, 4, 4), True, strides),
    )
    flat = trainer(job={"configuration": plan})
    assert flat.taps["patch"] == "dec:0"  # strides (2, 8, 8)
    assert flat.parts.trained["patch_head"].cells == (3, 4, 6)  # 48 of 96 mm through plane
