"""The checks of criinet's specification, through `losses()` where they are about the method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.inference.predictor import Predictor, Window
from autossl.trainers.base import Batch, MethodSettings, Progress, StepOutput
from autossl.trainers.checkpoints import load_parts_state, parts_state
from autossl.trainers.components.contrast import Rows
from autossl.trainers.components.losses import probability_mse
from autossl.trainers.methods.criinet import CRIINet, CRIINetSettings, single_labels
from autossl.trainers.methods.supervised import Supervised
from toys import toy_architecture, toy_batch, toy_configuration, toy_job, toy_schema

SUPERVISED = ["supervised_coarse", "supervised_refined"]
ALL = [*SUPERVISED, "consistency", "intra", "inter"]
LARGE = toy_configuration(2, patch_size=(64, 64), architecture=toy_architecture(2, (4, 8, 8)))


def trainer(n_unlabeled: int = 4, job: dict[str, Any] | None = None, **settings: Any) -> CRIINet:
    return CRIINet(toy_job(n_unlabeled=n_unlabeled, **(job or {})), CRIINetSettings(**settings))


def moved(method: CRIINet) -> CRIINet:
    """With a head that corrects something, as after some training."""
    head: Any = method.parts.trained["network_refine"]
    generator = torch.Generator().manual_seed(1)
    head.correction.weight.data = torch.randn(head.correction.weight.shape, generator=generator)
    return method


def step(method: CRIINet, fraction: float = 1.0, batch: Batch | None = None, seed: int = 0) -> StepOutput:
    return method.losses(batch or toy_batch(method.job), Progress(step=int(100 * fraction), total=100, seed=seed))


def total(output: StepOutput) -> Tensor:
    return torch.stack(list(output.losses.values())).sum()


def gradients(method: CRIINet, term: Tensor) -> dict[str, bool]:
    """Which trained parts the term moves."""
    found = {}
    for name, module in method.parts.trained.items():
        grads = torch.autograd.grad(term, list(module.parameters()), retain_graph=True, allow_unused=True)
        found[name] = any(grad is not None and bool(grad.any()) for grad in grads)
    return found


# --------------------------------------------------------------------------------------------- coarse and refined


@pytest.mark.parametrize("dims", [2, 3])
def test_refined_is_coarse_at_the_start(dims: int) -> None:
    plan = toy_configuration(dims, architecture=toy_architecture(dims, (4, 8)))  # one level
    job = toy_job(dims, configuration=plan)
    method = CRIINet(job, CRIINetSettings(lambda_max=0, lambda_intra=0, lambda_inter=0))
    batch = toy_batch(job)
    output, twin = step(method, batch=batch), Supervised(job, MethodSettings())
    expected = twin.losses(batch, Progress(50, 100)).losses["supervised"]
    assert list(output.losses) == SUPERVISED
    for name in SUPERVISED:
        assert output.losses[name].item() == pytest.approx(0.5 * expected.item(), rel=1e-6)
    start = step(trainer())
    assert start.losses["consistency"].item() == 0
    assert float(start.measures["refined_share"]) == 0


def test_the_coarse_one_is_supervised_on_all_levels_and_the_refined_one_at_full_resolution() -> None:
    method = moved(trainer(lambda_max=0, lambda_intra=0, lambda_inter=0))
    batch = toy_batch(method.job)
    network, head = method.parts.trained["network"], method.parts.trained["network_refine"]
    seen: list[Tensor] = []
    head.register_forward_hook(lambda module, given, answered: seen.append(answered))
    output = step(method, batch=batch)
    loss, labeled = method.job.supervised_loss, batch.labeled
    coarse = loss(network(labeled.image), labeled.target, labeled.valid)
    assert output.losses["supervised_coarse"].item() == pytest.approx(0.5 * coarse.item(), rel=1e-6)
    refined = loss([seen[0]], labeled.target, labeled.valid)
    assert output.losses["supervised_refined"].item() == pytest.approx(0.5 * refined.item(), rel=1e-6)
    assert float(output.measures["supervised_refined"]) == pytest.approx(refined.item(), rel=1e-6)


def test_the_refined_prediction_is_the_target_of_the_coarse_one() -> None:
    method = moved(trainer())
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    pairs: list[tuple[Tensor, Tensor]] = []
    head = method.parts.trained["network_refine"]
    head.register_forward_hook(lambda module, given, answered: pairs.append((given[1], answered)))
    output = step(method, batch=batch)
    coarse, refined = (z[2:].softmax(1) for z in pairs[0])
    expected = (coarse - refined).square().mean()
    assert float(output.measures["consistency"]) == pytest.approx(expected.item(), rel=1e-5)
    assert output.losses["consistency"].item() > 0
    assert 0 < float(output.measures["refined_share"]) <= 1
    assert gradients(method, output.losses["consistency"]) == {
        "network": True,
        "network_refine": False,
        "projector": False,
    }
    # the gradient is that of the coarse logits alone
    (found,) = torch.autograd.grad(output.losses["consistency"], [pairs[0][0]], retain_graph=True)
    z = pairs[0][0].detach()[2:].requires_grad_()
    (alone,) = torch.autograd.grad(probability_mse(z.softmax(1), refined.detach()), [z])
    torch.testing.assert_close(found[2:], alone)


def test_sym_trains_the_refined_one_too() -> None:
    method = moved(trainer(sym=True))
    assert gradients(method, step(method).losses["consistency"])["network_refine"]
    assert step(method).losses["consistency"].item() == step(moved(trainer())).losses["consistency"].item()


def test_what_a_term_moves() -> None:
    method = moved(trainer())
    output = step(method)
    assert list(output.losses) == ALL
    assert gradients(method, output.losses["supervised_coarse"]) == {
        "network": True,
        "network_refine": False,
        "projector": False,
    }
    assert gradients(method, output.losses["supervised_refined"])["network_refine"]
    for name in ("intra", "inter"):
        assert gradients(method, output.losses[name]) == {"network": True, "network_refine": False, "projector": True}


def test_voxels_outside_the_image_do_not_count() -> None:
    method = moved(trainer())
    batch = toy_batch(method.job)
    assert batch.unlabeled is not None
    batch.unlabeled.valids = (torch.zeros_like(batch.unlabeled.valid),)
    output = step(method, batch=batch)
    assert output.losses["consistency"].item() == 0
    assert float(output.measures["valid_share"]) == float(output.measures["refined_share"]) == 0


def test_weights_follow_their_ramps() -> None:
    method = moved(trainer())
    seen = {r: step(method, r) for r in (0, 0.02, 0.06, 0.1, 0.2, 0.4, 1)}
    consistency = [float(seen[r].measures["consistency_weight"]) for r in (0, 0.2, 0.4, 1)]
    assert consistency == pytest.approx([math.exp(-5), 0.2865048, 1, 1], rel=1e-5)
    assert list(seen[0.02].losses) == [*SUPERVISED, "consistency"]
    for name in ("intra", "inter"):
        assert [float(seen[r].measures[f"{name}_weight"]) for r in (0.06, 0.1, 1)] == pytest.approx([0.05, 0.1, 0.1])
        assert seen[0.06].losses[name].item() == pytest.approx(0.05 * float(seen[0.06].measures[name]), rel=1e-5)


def test_the_ablation_turns_both_ranked_losses_off() -> None:
    without = trainer(**{name: float(value) for name, value in CRIINet.ablation.items()})
    assert list(step(without).losses) == [*SUPERVISED, "consistency"]
    assert list(without.parts.trained) == ["network", "network_refine"]
    assert without.parts.memory == {}
    assert list(step(trainer(lambda_intra=0)).losses) == [*SUPERVISED, "consistency", "inter"]
    assert list(step(trainer(lambda_inter=0)).losses) == [*SUPERVISED, "consistency", "intra"]


# ------------------------------------------------------------------------------------------------------ ranked losses


def embed(method: CRIINet, by_value: dict[int, tuple[float, float]]) -> None:
    """The embedding of a pixel becomes that of its image's value; features are the image itself."""

    class Lookup(nn.Module):
        def forward(self, f: Tensor) -> Tensor:
            angle = torch.stack([torch.tensor(by_value[int(v)]) for v in f[:, 0].round().tolist()])
            return angle + 0 * f[:, :1]

    method.parts.trained["projector"] = Lookup()


def on_circle(distance: float) -> tuple[float, float]:
    """A unit vector so far from (1, 0)."""
    angle = 2 * math.asin(distance / 2)
    return math.cos(angle), math.sin(angle)


def batch_with(method: CRIINet, target: Tensor, image: Tensor | None = None) -> tuple[Batch, Tensor]:
    """One labeled patch, and features that are its image."""
    batch = toy_batch(method.job, n_labeled=1, n_unlabeled=0)
    image = target.float() if image is None else image
    batch.labeled.targets, batch.labeled.views = (target,), (image,)
    batch.labeled.valids = (torch.ones_like(target, dtype=torch.bool),)
    return batch, image.clone().requires_grad_()


def two_halves(size: int = 32) -> Tensor:
    target = torch.zeros(1, 1, size, size, dtype=torch.long)
    target[..., size // 2 :] = 1
    return target


def test_intra_closed_form() -> None:
    """Each class in one point, 0.4 apart: every negative is nearer than 1.2, every positive at 0."""
    method = trainer()
    batch, features = batch_with(method, two_halves())
    embed(method, {0: (1.0, 0.0), 1: on_circle(0.4)})
    at = Progress(100, 100)
    term, seen = method._intra(features, method._tiles(batch.labeled, at), batch.labeled, at)
    assert term.item() == pytest.approx(0.8 / 2, abs=1e-5)
    assert seen["intra_tiles"] == 1
    assert seen["intra_pairs"] == 64 * 192
    assert float(seen["intra_acting_share"]) == pytest.approx(0.5, abs=0.1)
    embed(method, {0: (1.0, 0.0), 1: (-1.0, 0.0)})
    assert method._intra(features, method._tiles(batch.labeled, at), batch.labeled, at)[0].item() == 0


def test_anchors_lie_near_borders_and_candidates_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    method = trainer(job={"configuration": LARGE})
    target = torch.zeros(1, 1, 64, 64, dtype=torch.long)
    target[0, 0, 6:26, 6:26] = 1  # a square of 20 × 20, in one of the four tiles
    batch, _ = batch_with(method, target)
    at = Progress(100, 100)
    tiles = method._tiles(batch.labeled, at)
    assert [len(tile.places) for tile in tiles] == [32 * 32] * 4
    assert [tile.is_mixed for tile in tiles] == [True, False, False, False]
    position = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))[None].requires_grad_()
    calls: list[tuple[Rows, Rows]] = []

    def keep(anchors: Rows, candidates: Rows, counted: Tensor) -> Any:
        calls.append((anchors, candidates))
        return original(anchors, candidates, counted)

    original = method.ranking
    monkeypatch.setattr(method, "ranking", keep)
    method.parts.trained["projector"] = nn.Identity()
    method._intra(position, tiles, batch.labeled, at)
    ((anchors, candidates),) = calls
    from_edge = (anchors.e - 15.5).abs().amax(1) - 9.5  # 0 for the square's outermost pixels
    assert from_edge.min() >= -1
    assert from_edge.max() <= 2
    assert set(anchors.labels.tolist()) == {0, 1}
    assert candidates.e.max() < 32, "of the tile"
    assert ((candidates.e - 15.5).abs().amax(1) < 8).any()
    for rows in (anchors, candidates):
        assert torch.equal(target[0, 0][rows.e[:, 0].long(), rows.e[:, 1].long()], rows.labels)


def test_inter_closed_form() -> None:
    """Prototypes of one tile: the foreground's only negative is its own background, 0.4 away."""
    method = trainer(bank=0)
    batch, features = batch_with(method, two_halves())
    embed(method, {0: (1.0, 0.0), 1: on_circle(0.4)})
    at = Progress(100, 100)
    term, seen = method._inter(features, method._tiles(batch.labeled, at), batch.labeled, at)
    assert term.item() == pytest.approx(0.8 / 2, abs=1e-5)
    assert (seen["inter_anchors"], seen["inter_pairs"]) == (1, 2)
    assert float(seen["inter_contrast_weight"]) == pytest.approx(1 + 1 / (1 + 1 / 1e-3), abs=1e-5)


def test_prototypes_of_other_tiles_are_positives_and_low_contrast_counts_more() -> None:
    """Two patches with the same structure, of which one does not stand out from its background."""
    method = trainer(bank=0)
    target = two_halves().repeat(2, 1, 1, 1)
    image = target.float() + 2 * torch.arange(2.0).view(2, 1, 1, 1)  # embedded by 0 1, 2 3
    batch, features = batch_with(method, target, image)
    shown = torch.zeros_like(image)
    shown[0] = 1e6 * target[0]
    batch.labeled.views = (shown,)
    embed(method, {0: (-1.0, 0.0), 1: (1.0, 0.0), 2: (0.0, -1.0), 3: on_circle(1.0)})
    at = Progress(100, 100)
    term, seen = method._inter(features, method._tiles(batch.labeled, at), batch.labeled, at)
    # each anchor's positive is 1.0 away, and no background nearer than 1.2: at 180° and 270° of 0° and 60°
    assert term.item() == pytest.approx(0.2 / 2, abs=1e-5)
    embed(method, {0: (-1.0, 0.0), 1: (1.0, 0.0), 2: on_circle(0.6), 3: on_circle(0.6)})
    term, seen = method._inter(features, method._tiles(batch.labeled, at), batch.labeled, at)
    # the first (ω 1) has a background at 0.6, the second (ω 2) at 0; their distance, 0.6, is near enough
    assert term.item() == pytest.approx((1 * 0.6 / 2 + 2 * (1.2 - 1e-3) / 2) / 3, rel=1e-4)
    assert float(seen["inter_contrast_weight"]) == pytest.approx(1.5, abs=1e-3)


def test_the_bank_gives_candidates_and_takes_prototypes_after_the_step() -> None:
    method, at = trainer(), Progress(100, 100)
    batch = toy_batch(method.job)
    bank = method.parts.memory["prototypes"]
    first = method.losses(batch, at)
    assert int(bank.count.sum()) == 0
    method.after_step(at)
    n = int(bank.count.sum())
    assert n > 0
    assert not bank.rows.requires_grad
    second = method.losses(batch, at)
    assert float(second.measures["inter_pairs"]) == float(first.measures["inter_pairs"]) + n * float(
        first.measures["inter_anchors"]
    )
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    bank.push(functional.normalize(rows), torch.ones(9, dtype=torch.long))
    assert step(method, batch=batch).losses["inter"].item() > first.losses["inter"].item(), "further positives"
    step(method, 0.0)
    method.after_step(Progress(0, 100))
    assert int(bank.count.sum()) == n + 9, "a step without ranking brings nothing"
    assert trainer(bank=0).parts.memory == {}


def test_a_network_that_is_not_finite_reaches_no_bank() -> None:
    method = trainer()
    network: Any = method.parts.trained["network"]
    nn.init.constant_(network.decoder.stages[-1].convs[0].conv.weight, math.nan)
    output = step(method)
    assert not output.losses["inter"].isfinite()
    method.after_step(Progress(100, 100))
    assert int(method.parts.memory["prototypes"].count.sum()) == 0


@pytest.mark.parametrize("what", ["background", "nothing valid"])
def test_without_foreground_both_ranked_losses_are_zero(what: str) -> None:
    method = trainer(job={"schema": toy_schema(ignore=True)})
    batch = toy_batch(method.job)
    if what == "background":
        batch.labeled.targets = (torch.zeros_like(batch.labeled.target),)
    else:
        batch.labeled.valids = (torch.zeros_like(batch.labeled.valid),)
    output = step(method, batch=batch)
    assert [output.losses[name].item() for name in ("intra", "inter")] == [0, 0]
    total(output).backward()


def test_ignored_voxels_are_in_no_band_tile_or_prototype() -> None:
    method = trainer()
    batch, _ = batch_with(method, two_halves())
    batch.labeled.valids[0][..., 12:20] = False
    tiles = method._tiles(batch.labeled, Progress(100, 100))
    columns = torch.cat([tile.places for tile in tiles]) % 32
    assert not ((columns >= 12) & (columns < 20)).any()
    assert not any(tile.band.any() for tile in tiles), "what is not known makes no border"


def test_the_cost_does_not_grow_with_the_patch() -> None:
    pairs = []
    for size in (128, 256, 512):
        plan = toy_configuration(2, patch_size=(size, size), architecture=toy_architecture(2, (2, 2)))
        method = trainer(job={"configuration": plan, "schema": toy_schema(1)}, bank=0)
        batch = toy_batch(method.job)
        checks = ((torch.arange(size)[:, None] // 8 + torch.arange(size) // 8) % 2).view(1, 1, size, size)
        target = checks.repeat(2, 1, 1, 1)
        batch.labeled.targets = (target,)
        at = Progress(100, 100)
        tiles = method._tiles(batch.labeled, at)
        features = torch.zeros(2, 2, size, size, requires_grad=True)
        pairs.append(
            [
                method._intra(features, tiles, batch.labeled, at)[1]["intra_pairs"],
                method._inter(features, tiles, batch.labeled, at)[1]["inter_pairs"],
            ]
        )
    assert pairs[0] == [8 * 64 * 192, 8 * 16], "eight tiles"
    assert pairs[1] == pairs[2] == [16 * 64 * 192, 16 * 32]


def test_overlapping_regions_take_the_label_of_the_smallest() -> None:
    schema = toy_schema(regions=True)  # whole holds core
    whole, core = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[1.0, 0, 0, 1]])
    labels = single_labels(torch.stack([whole, core], 1), schema)
    assert labels.tolist() == [[[2, 1, 0, 2]]]
    method = trainer(job={"schema": schema})
    output = step(method)
    assert list(output.losses) == ALL
    assert all(output.losses[name].item() > 0 for name in ("intra", "inter"))
    method.after_step(Progress(100, 100))
    assert len(method.parts.memory["prototypes"].count) == 3
    assert method.prediction().activation == "sigmoid"


def test_thick_slices_have_tiles_and_bands_in_plane() -> None:
    plan = toy_configuration(
        3,
        patch_size=(4, 16, 16),
        spacing=(4.0, 1.0, 1.0),
        architecture=toy_architecture(3, (2, 2), anisotropic=True),
    )
    method = trainer(job={"configuration": plan})
    target = torch.zeros(1, 1, 4, 16, 16, dtype=torch.long)
    target[:, :, 2:] = 1  # a border between slices alone
    batch, _ = batch_with(method, target)
    tiles = method._tiles(batch.labeled, Progress(100, 100))
    assert [len(tile.places) for tile in tiles] == [256] * 4
    assert not any(tile.band.any() for tile in tiles)


# ------------------------------------------------------------------------------------------------------ run and state


def test_without_unlabeled_cases_it_is_the_twin_or_ranks_labeled_pixels() -> None:
    batch = toy_batch(toy_job(), n_unlabeled=0)
    alone = trainer(n_unlabeled=0)
    twin = Supervised(toy_job(n_unlabeled=0), MethodSettings())
    found = step(alone, batch=batch).losses
    assert torch.equal(found["supervised"], twin.losses(batch, Progress(50, 100)).losses["supervised"])
    assert alone.prediction().members[0].head is None
    assert alone.alternative_predictions() == {}
    ranked = trainer(n_unlabeled=0, labeled_only=True)
    assert list(step(ranked, batch=batch).losses) == [*SUPERVISED, "intra", "inter"]
    assert ranked.prediction().members[0].head == "refine"


def test_weights_load_without_the_projector_to_predict_and_with_it_to_train() -> None:
    method = moved(trainer())
    plan, schema = method.job.configuration, method.job.schema
    state = parts_state(method.parts)
    assert set(state["networks"]) == {"network", "network_refine", "projector"}
    deployed = {name: state["networks"][name] for name in method.prediction().members[0].parts}
    assert set(deployed) == {"network", "network_refine"}
    image = torch.randn(1, 1, 16, 16).numpy()
    found = {}
    for name, spec in (("refined", method.prediction()), *method.alternative_predictions().items()):
        window = Window.of(plan, mirror=False)
        predictor = Predictor.from_state_dicts(spec, [deployed], plan, schema, window, "cpu")
        found[name] = torch.as_tensor(predictor.logits(image))
    assert list(found) == ["refined", "coarse"]
    assert not torch.allclose(found["refined"], found["coarse"])
    again = trainer(job={"seed": 5})
    load_parts_state(again.parts, state)
    batch = toy_batch(method.job)
    assert torch.equal(total(step(again, batch=batch)), total(step(method, batch=batch)))


def test_the_coarse_prediction_approaches_the_refined_one() -> None:
    method = moved(trainer(lambda_max=5.0, ramp_end=0.0, lambda_intra=0, lambda_inter=0))
    parameters = list(method.parts.trained["network"].parameters())
    optimizer = torch.optim.SGD(parameters, 0.02, momentum=0.9)
    values = []
    for index in range(20):
        output = method.losses(toy_batch(method.job, index), Progress(index, 20))
        values.append(float(output.measures["consistency"]))
        optimizer.zero_grad()
        total(output).backward()
        optimizer.step()
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
